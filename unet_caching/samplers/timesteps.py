"""Timesteps: named spacings, timesteps for a noise schedule, and lists."""

import re
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from unet_caching.samplers.diffusion import make_betas

AYS = (24, 124, 233, 343, 455, 545, 645, 736, 850, 999)


def uniform_timesteps(num_steps: int, num_timesteps: int = 1000) -> list[int]:
    """`num_steps` evenly spaced timesteps from 0, ascending.

    The released DDPM code's `skip_type uniform`. If num_steps does not divide num_timesteps, that code uses the stride
    num_timesteps // num_steps, which gives more steps. Ours gives num_steps over the same range.
    Raises ValueError unless 1 <= num_steps <= num_timesteps.
    """
    _check(num_steps, num_timesteps)
    return [i * num_timesteps // num_steps for i in range(num_steps)]


def quadratic_timesteps(num_steps: int, num_timesteps: int = 1000) -> list[int]:
    """Timesteps dense near the image: int(linspace(0, sqrt(0.8 * num_timesteps), num_steps)^2), ascending.

    The released DDPM code's `skip_type quad`, used for CIFAR-10. From 30 steps of 1000 on, the lowest timesteps repeat
    (100 steps begin 0, 0, 0, 0, 1, 2, 2, 3), as in that code. A step from a timestep to itself is a network call that
    does not change the image. Raises ValueError unless 1 <= num_steps <= num_timesteps.
    """
    _check(num_steps, num_timesteps)
    return [int(t) for t in np.linspace(0, np.sqrt(num_timesteps * 0.8), num_steps) ** 2]


def offset_timesteps(num_steps: int, num_timesteps: int = 1000) -> list[int]:
    """`uniform_timesteps` plus one, as in LDM and Stable Diffusion: ascending, 1 to num_timesteps - 1.

    Sampling then ends at the alpha_bar of timestep 0, not at 1 (`final_alpha` of `ddim`).
    Raises ValueError unless 1 <= num_steps < num_timesteps.
    """
    _check(num_steps, num_timesteps - 1)
    return [t + 1 for t in uniform_timesteps(num_steps, num_timesteps)]


def leading_timesteps(num_steps: int, num_timesteps: int = 1000) -> list[int]:
    """Multiples of num_timesteps // num_steps plus one, as in diffusers for Stable Diffusion: ascending.

    They equal `offset_timesteps` if num_steps divides num_timesteps, and else do not reach as high. Sampling ends at
    the alpha_bar of timestep 0. Raises ValueError unless 1 <= num_steps < num_timesteps.
    """
    _check(num_steps, num_timesteps - 1)
    return [i * (num_timesteps // num_steps) + 1 for i in range(num_steps)]


def trailing_timesteps(num_steps: int, num_timesteps: int = 1000) -> list[int]:
    """Evenly spaced timesteps that end at the last one, num_timesteps - 1, where the image is almost all noise.

    Lin et al. (arXiv 2305.08891), Table 2: with few steps, other spacings start from pure noise at a timestep where the
    network expects some of the image. Raises ValueError unless 1 <= num_steps <= num_timesteps.
    """
    _check(num_steps, num_timesteps)
    return [(i + 1) * num_timesteps // num_steps - 1 for i in range(num_steps)]


SPACINGS = {"uniform": uniform_timesteps, "quad": quadratic_timesteps, "offset": offset_timesteps,
            "leading": leading_timesteps, "trailing": trailing_timesteps}


def make_timesteps(spacing: str, num_steps: int, num_timesteps: int = 1000) -> list[float]:
    """The timesteps of a spacing in SPACINGS, or of a list: ascending. Raises ValueError for anything else."""
    if is_listed(spacing):
        return listed(spacing, num_steps, num_timesteps)
    if spacing not in SPACINGS:
        raise ValueError(f"unknown spacing of timesteps {spacing!r}: choose from {', '.join(SPACINGS)}, or list them")
    return [*SPACINGS[spacing](num_steps, num_timesteps)]


def is_listed(spacing: str) -> bool:
    """Whether the text is a list of timesteps, not the name of a spacing."""
    return spacing[:1].isdigit()


def listed(text: str, num_steps: int, num_timesteps: int) -> list[float]:
    """Read a list of timesteps in the order of a run, '999,750,400.5,120'; returns them ascending.

    They may be fractions (`samplers.diffusion.alpha_at`). Sampling ends at a clean image after the last one. Raises
    ValueError unless there are num_steps of them, which fall and do not exceed the last timestep.
    """
    words = text.split(",")
    if not all(re.fullmatch(r"\d{1,7}(\.\d{1,9})?", word, re.ASCII) for word in words):
        raise ValueError(f"a list of timesteps is like 999,750,400,120, got {text[:40]!r}")
    found = [float(word) if "." in word else int(word) for word in reversed(words)]
    if found != sorted(set(found)) or found[-1] > num_timesteps - 1:
        raise ValueError(f"timesteps must fall from step to step, from {num_timesteps - 1} at most, got {text[:40]}")
    if len(found) != num_steps:
        raise ValueError(f"{num_steps} steps, but {len(found)} timesteps are listed: leave --steps out")
    return found


def final_alpha(spacing: str, alphas_cumprod: Tensor) -> float:
    """Alpha_bar of the end point: that of timestep 0 for 'offset' and 'leading', else 1, a clean image."""
    return alphas_cumprod[0].item() if spacing in ("offset", "leading") else 1.0


def _check(num_steps: int, num_timesteps: int) -> None:
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"the number of steps must be from 1 to {num_timesteps}, got {num_steps}")


def karras_timesteps(steps: int, betas: Tensor) -> list[float]:
    """Fractional timesteps with the sigmas of Karras et al. (arXiv 2206.00364, Equation 5, rho 7): ascending.

    Sigma, s / a, falls from 80 to 0.002, within the range of the noise schedule. The first call is always at the last
    timestep, since runs start from pure noise. betas: [num_timesteps].
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
        raise ValueError("ays are 10 timesteps for the noise schedule of Stable Diffusion 1.5: take 10 steps, and such "
                         "a model")
    return [*AYS]


LISTS: Mapping[str, Callable[[int, Tensor], list[float]]] = {"karras": karras_timesteps, "ays": align_your_steps}
