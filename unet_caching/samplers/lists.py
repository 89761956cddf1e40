"""Timesteps that are made for a noise schedule: those of Karras et al., and those of Align Your Steps."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from unet_caching.samplers.diffusion import make_betas

AYS = (24, 124, 233, 343, 455, 545, 645, 736, 850, 999)


def karras_timesteps(steps: int, betas: Tensor) -> list[float]:
    """Fractions of timesteps whose sigmas are those of Karras et al. (arXiv 2206.00364, Equation 5, rho 7): ascending.

    Sigma, s / a, falls from 80 to 0.002 as there, as far as the noise schedule goes; the first call is at the last
    timestep nevertheless, as that of every run from pure noise. betas: [num_timesteps].
    """
    log_sigmas = torch.logit((1 - betas.double()).cumprod(0)).numpy() / -2
    high, low = min(80.0, np.exp(log_sigmas[-1])), max(0.002, np.exp(log_sigmas[0]))
    sigmas = np.linspace(high ** (1 / 7), low ** (1 / 7), steps) ** 7
    found = np.interp(np.log(sigmas), log_sigmas, np.arange(len(betas))).round(4).tolist()
    return [*found[:0:-1], len(betas) - 1]


def align_your_steps(steps: int, betas: Tensor) -> list[float]:
    """The ten timesteps of Align Your Steps (arXiv 2404.14507) for Stable Diffusion 1.5, ascending.

    Raises ValueError for another noise schedule, and for another number of steps.
    """
    released = make_betas("scaled_linear", 1000, 0.00085, 0.012)
    if steps != len(AYS) or betas.shape != released.shape or not torch.allclose(betas, released, atol=1e-6):
        raise ValueError("ays are 10 timesteps, for a model with the noise schedule of Stable Diffusion 1.5")
    return [*AYS]


LISTS: Mapping[str, Callable[[int, Tensor], list[float]]] = {"karras": karras_timesteps, "ays": align_your_steps}
