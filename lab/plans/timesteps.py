"""Timesteps that are fitted to a model: steps are short where its trajectories bend.

The idea is from GITS (Chen et al., arXiv 2405.11326): runs of many steps give the error of each longer step, and
dynamic programming finds the timesteps of least error. GITS takes the error of Euler's rule between two timesteps. Here
the second-order multistep rule can be taken, too, whose error also depends on the timestep before.

In the images that DPM-Solver++ and UniPC step through (x at a noise level, and the predicted clean image D),

    x_k = s_k / s_j x_j - a_k (e^-h - 1) D,    h = l_k - l_j,    l = log(a / s),    a^2 = alpha_bar,    a^2 + s^2 = 1

with D = D_j of first order, and D = D_j + h / (2 (l_j - l_i)) (D_j - D_i) of second (arXiv 2211.01095, Algorithm 2).
All is linear in x and D, so their inner products over one trajectory (the Gram matrix) give the error of every step. An
error of x is assumed to reach the image undiminished: here x always has about unit variance.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lab.fit.fit import own_unet
from lab.plans.dynamic_programming import best_marks
from lab.plans.judge import Judge
from run.seeds import format_seeds, in_batches
from unet_caching.nest import Network
from unet_caching.policy import Policy
from unet_caching.samplers.diffusion import Diffusion, alpha_at, guided, predicted_noise


class Rule(NamedTuple):
    """The assumed error of a step. order: of the solver. coherent: errors of a run add up, else their squares do."""
    order: int
    coherent: bool


RULES = (Rule(2, False), Rule(1, False), Rule(2, True), Rule(1, True))


class TrajectoryMeter:
    """Stands in for the U-Net while a run samples without caching: `network(x, t, *context, cache=...)`.

    `gram`: the inner products of x of each call, the final image and D of each call, per value of an image, float64
    [2 calls + 1, 2 calls + 1]; the sum over finished batches.
    """

    def __init__(self, unet: Network, diffusion: Diffusion, guidance: float):
        self.unet, self.prediction, self.guidance = unet, diffusion.prediction, guidance
        self.alphas = diffusion.alphas_cumprod()
        self.states: list[Tensor] = []
        self.clean: list[Tensor] = []
        self.gram: np.ndarray | float = 0.0

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, *context: Tensor, cache: Policy) -> Tensor:
        out = self.unet(x, t, *context, cache=cache)
        state, output = x.float(), out.float()
        if self.guidance != 1:
            state, output = state.chunk(2)[0], guided(output, self.guidance)
        alpha = self.alphas[int(t[0])].item()
        noise = predicted_noise(self.prediction, output, state, alpha).double()
        self.states.append(state.double())
        self.clean.append((state.double() - (1 - alpha) ** 0.5 * noise) / alpha ** 0.5)
        return out

    def finish(self, final: Tensor) -> None:
        """Add the products of a batch with the images `final` to `gram`, and drop the batch."""
        states = [*self.states, final.to(self.states[0].device).double()]
        rows = torch.stack([*states, *self.clean]).flatten(1)
        self.gram = self.gram + (rows @ rows.T / rows.shape[1]).cpu().numpy()
        self.states, self.clean = [], []


@dataclass
class Trajectory:
    """A run of many steps, to choose fewer ones from."""
    timesteps: Sequence[float]      # of its n calls
    alphas: np.ndarray              # alpha_bar at the timesteps
    gram: np.ndarray                # see `TrajectoryMeter`, [2n + 1, 2n + 1]

    def errors(self, order: int) -> np.ndarray:
        """The squared error of every step, [i, j, k]: from call j to k (k = n: the end), if the call before j is i (i =
        n: none)."""
        n, gram = len(self.timesteps), self.gram
        a, s = np.append(self.alphas ** 0.5, 1.0), np.append((1 - self.alphas) ** 0.5, 0.0)
        log_snr = np.log(a[:n] / s[:n])
        found = np.full((n + 1, n, n + 1), np.inf)
        for j in range(n):
            before = np.arange(j)
            bend = gram[n + 1 + j] - gram[n + 1 + before]                   # D_j - D_i with all else, [i, 2n + 1]
            square = bend[:, n + 1 + j] - bend[before, n + 1 + before]
            for k in range(j + 1, n + 1):
                h = log_snr[k] - log_snr[j] if k < n else np.inf
                parts, weights = [k, j, n + 1 + j], np.array([1.0, -s[k] / s[j], a[k] * np.expm1(-h)])
                first = weights @ gram[np.ix_(parts, parts)] @ weights
                found[:j, j, k] = found[n, j, k] = first
                if order > 1 and k < n:                                     # the last step is of first order
                    by = -weights[2] * h / (2 * (log_snr[j] - log_snr[before]))
                    found[:j, j, k] += by * (by * square - 2 * bend[:, parts] @ weights)
        return found.clip(min=0)

    def fitted(self, rule: Rule, most: int) -> list[str]:
        """The timesteps of least error for 1, 2, ... `most` steps, in the format of `samplers.timesteps.listed`."""
        errors = self.errors(rule.order)
        best = best_marks(np.sqrt(errors) if rule.coherent else errors, most)
        return [",".join(str(self.timesteps[call]) for call in calls) for calls in best]


def trajectory(judge: Judge, seeds: Sequence[int]) -> Trajectory:
    """The trajectory of the converged run for some seeds, measured once and kept beside its distances."""
    distances = judge.distances
    run = distances.run

    def measure() -> list:
        meter = TrajectoryMeter(own_unet(distances.model), run.config.diffusion, run.guidance)
        for batch in in_batches(seeds, distances.machine.batch_size):
            meter.finish(distances.latents(run, batch, network=meter))
        return np.asarray(meter.gram).tolist()

    gram = np.array(distances.kept("trajectory", format_seeds(seeds), measure))
    timesteps = run.sampler.call_timesteps()
    levels = run.config.diffusion.alphas_cumprod()
    alphas = np.array([alpha_at(levels, t).item() for t in timesteps])
    return Trajectory(timesteps, alphas, gram)
