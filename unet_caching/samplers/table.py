"""Solvers as tables of coefficients of the clean images that the network calls of a run predict.

    x_{i+1} = p_i x_T + sum over j <= i of q_ij D_j,    D_j = (x_j - s_j noise_j) / a_j,    a^2 = alpha_bar = 1 - s^2

Every linear multistep solver, with its corrector, is such a table. All coefficients are of order 1. As coefficients of
the noises, for x / a, they would span five decades on a cosine schedule.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unet_caching.samplers.diffusion import Diffusion, Predict, alpha_at, clean_image
from unet_caching.samplers.solvers import solver


def multistep(predict: Predict, x: Tensor, timesteps: Sequence[float] | Tensor, p: Sequence[float] | Tensor,
              q: Sequence[Sequence[float]] | Tensor, alphas: Tensor,
              progress: Callable[[int, Tensor], None] | None = None) -> tuple[Tensor, list[Tensor]]:
    """Sample x_0 from x_T by a table; returns x_0 and the D of each call. Differentiable in every tensor.

    predict, x, progress: as in `samplers.solvers.Solver.run`. timesteps: of each network call. p: [calls]. q: [calls]
    rows with a number per D or more. alphas: [num_timesteps].
    """
    start, clean = x, list[Tensor]()
    for step, t in enumerate(timesteps):
        clean.append(clean_image(x, predict(x, t, step), alpha_at(alphas.double(), t)))
        x = combined(start, clean, p[step], q[step])
        if progress:
            progress(step, x)
    return x, clean


def combined(start: Tensor, clean: Sequence[Tensor], p: float | Tensor, q: Sequence[float] | Tensor) -> Tensor:
    """p x_T + sum of q_j D_j. q: a number per D or more."""
    x = p * start
    for weight, image in zip(q, clean, strict=False):
        x = x + weight * image
    return x


@dataclass(frozen=True)
class Table:
    """The coefficients of a solver. p: [calls]. q: row i has those of D_0 to D_i."""
    p: tuple[float, ...]
    q: tuple[tuple[float, ...], ...]

    def check(self, calls: int) -> None:
        """Raise a ValueError if the table is not for this number of network calls."""
        if len(self.p) != calls or [len(row) for row in self.q] != [*range(1, calls + 1)]:
            raise ValueError(f"a solver of {calls} network calls has as many p, and rows of q with 1, 2, ... numbers")
        if not all(map(math.isfinite, (*self.p, *(weight for row in self.q for weight in row)))):
            raise ValueError("the p and q of a solver must be finite numbers")

    @torch.no_grad()
    def sample(self, predict: Predict, x: Tensor, timesteps: Sequence[float], alphas: Tensor,
               progress: Callable[[int, Tensor], None] | None = None) -> Tensor:
        """Sample x_0 by `multistep`."""
        return multistep(predict, x, timesteps, self.p, self.q, alphas, progress)[0]


def table_of(name: str, steps: int, spacing: str, diffusion: Diffusion) -> tuple[list[float], Table]:
    """The timesteps of a sampler, one for each network call, and its table, found by sampling unit vectors.

    Raises ValueError for settings that the sampler does not take, and for PLMS, whose rule combines noises.
    """
    if not solver(name).takes_lists:
        raise ValueError(f"{name} has no table over clean images: choose another sampler")
    alphas = diffusion.alphas_cumprod().double()
    vectors = torch.eye(steps + 1, dtype=torch.float64)[:, None, :, None, None]         # of D_0, D_1, ... and x_T
    timesteps, rows = list[float](), list[list[float]]()

    def predict(x: Tensor, t: float, step: int) -> Tensor:
        timesteps.append(t)
        alpha = alpha_at(alphas, t)
        return (x - alpha ** 0.5 * vectors[step]) / (1 - alpha) ** 0.5

    solver(name).run(predict, vectors[steps], steps, spacing, diffusion,
                     progress=lambda step, x: rows.append(x.flatten().tolist()))
    return timesteps, Table(tuple(row[steps] for row in rows), tuple(tuple(row[:i + 1]) for i, row in enumerate(rows)))
