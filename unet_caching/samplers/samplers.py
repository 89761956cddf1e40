"""Samplers with their settings, which all have the same call, and the noise predictor that they call."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from unet_caching.nest import Network, no_cache
from unet_caching.policy import Policy
from unet_caching.samplers.diffusion import Diffusion, Predict, alpha_at, guided, predicted_noise
from unet_caching.samplers.noise import SeededNoise
from unet_caching.samplers.solvers import SOLVERS, solver
from unet_caching.samplers.table import Table
from unet_caching.samplers.timesteps import listed

SAMPLERS = tuple(SOLVERS)
TIMESTEPS = tuple(dict.fromkeys(spacing for one in SOLVERS.values() for spacing in one.spacings))
SAMPLERS_HELP = "; ".join(f"{name} ({one.about})" for name, one in SOLVERS.items())


def _timesteps_help() -> str:
    takers: dict[tuple[str, ...], list[str]] = {}
    for name, one in SOLVERS.items():
        takers.setdefault(tuple(one.spacings), []).append(name)
    return "; ".join(f"{', '.join(names)}: {', '.join(spacings)}" for spacings, names in takers.items())


TIMESTEPS_HELP = ("how the steps spread over the noise levels (default: the config's, or leading): "
                  f"{_timesteps_help()}; or a list like 999,750,400.5,120 (not plms)")


def timesteps_for(sampler: str, of_config: str) -> str:
    """The config's spacing if the sampler takes it, else Stable Diffusion's, 'leading'."""
    return solver(sampler).spacing(of_config)


@dataclass(frozen=True)
class Sampler:
    """A sampler with its settings. Raises ValueError for settings that do not go together.

    name: one of SAMPLERS. timesteps: a list, or one of TIMESTEPS that the sampler takes. eta: only for ddim.
    """
    name: str
    steps: int
    timesteps: str
    eta: float
    diffusion: Diffusion
    table: Table | None = None      # coefficients instead of the sampler's

    def __post_init__(self) -> None:
        chosen = solver(self.name)
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be from 0 to 1, got {self.eta}")
        if not chosen.takes_eta and self.eta != 0:
            stochastic = ", ".join(name for name, one in SOLVERS.items() if one.takes_eta)
            raise ValueError(f"{self.name} is deterministic: eta is for {stochastic}")
        chosen.check(self.steps, self.timesteps, self.diffusion.betas())
        if self.table is not None:
            self.table.check(self.steps)

    @property
    def calls(self) -> int:
        """Network calls of a run: PLMS makes one more than it has steps, since its first step takes two.

        Caching schedules are made for the steps and indexed by call. So with caching PLMS's last call is a cached one,
        as in the released code (github horseee/DeepCache, 1691a3a).
        """
        return solver(self.name).calls(self.steps)

    def call_timesteps(self) -> list[float]:
        """The timestep of each network call, in order."""
        found = []

        def predict(x: Tensor, t: float, step: int) -> Tensor:
            found.append(t)
            return x

        self.run(predict, torch.zeros(1, 1, 1, 1), SeededNoise([0]))
        return found

    @property
    def settings(self) -> dict[str, Any]:
        """The sampler's entries of run.json."""
        diffusion = {name: value for name, value in asdict(self.diffusion).items()
                     if name != "zero_terminal_snr" or value}       # older folders do not have this key
        return {"diffusion": diffusion, "sampler": self.name, "steps": self.steps,
                "timesteps": self.timesteps, "eta": self.eta}

    def run(self, predict: Predict, x: Tensor, noise: SeededNoise | None = None,
            progress: Callable[[float], None] | None = None) -> Tensor:
        """Sample x_0 from x_T.

        predict, x: as in `samplers.solvers.Solver.run`. noise: draws per image, for eta > 0. progress: called with the
        finished fraction of the network calls.
        """
        def report(step: int, x: Tensor) -> None:
            if progress:
                progress((step + 1) / self.calls)

        if self.table is not None:
            timesteps = listed(self.timesteps, self.steps, self.diffusion.num_timesteps)[::-1]
            return self.table.sample(predict, x, timesteps, self.diffusion.alphas_cumprod(), report)
        return solver(self.name).run(predict, x, self.steps, self.timesteps, self.diffusion, self.eta, noise, report)


def noise_predictor(network: Network, diffusion: Diffusion, dtype: torch.dtype, cache: Policy | None,
                    context: Sequence[Tensor] = (), guidance: float = 1.0) -> Predict:
    """The function that samplers call: predict(x, t, step) -> the predicted noise, both float32.

    network: gets x in `dtype`.
    cache: a fresh caching policy; None computes everything.
    context: for a guidance other than 1, of the doubled batch [uncond, cond].
    """
    alphas = diffusion.alphas_cumprod()

    def predict(x: Tensor, t: float | Tensor, step: int) -> Tensor:
        batch = x if guidance == 1 else torch.cat([x, x])
        t_batch = t.to(x).expand(len(batch)) if isinstance(t, Tensor) else torch.full((len(batch),), t, device=x.device)
        at_step = no_cache if cache is None else cache.at(step)
        output = network(batch.to(dtype), t_batch, *context, cache=at_step).float()
        if guidance != 1:
            output = guided(output, guidance)
        alpha = alpha_at(alphas, t)
        return predicted_noise(diffusion.prediction, output, x, alpha if isinstance(t, Tensor) else alpha.item())
    return predict
