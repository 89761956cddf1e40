"""DDIM (Song et al., arXiv 2010.02502) over any list of timesteps."""

import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from unet_caching.samplers.diffusion import Predict, alpha_at


def uniform_timesteps(num_steps: int, num_timesteps: int = 1000) -> list[int]:
    """Evenly spaced timesteps from 0: ascending, `num_steps` of them.

    The released DDPM code's `skip_type uniform`. Where num_steps does not divide num_timesteps, that code takes the
    stride num_timesteps // num_steps and so makes more steps than asked for; ours makes as many, over the same range.
    Raises ValueError unless 1 <= num_steps <= num_timesteps.
    """
    _check(num_steps, num_timesteps)
    return [i * num_timesteps // num_steps for i in range(num_steps)]


def quadratic_timesteps(num_steps: int, num_timesteps: int = 1000) -> list[int]:
    """Timesteps dense near the image: int(linspace(0, sqrt(0.8 * num_timesteps), num_steps)^2), ascending.

    The released DDPM code's `skip_type quad`, used for CIFAR-10. From 30 steps of 1000 on the lowest ones repeat, there
    as here (100 steps begin 0, 0, 0, 0, 1, 2, 2, 3): a step from a timestep to itself is a network call, and leaves the
    image as it is. Raises ValueError unless 1 <= num_steps <= num_timesteps.
    """
    _check(num_steps, num_timesteps)
    return [int(t) for t in np.linspace(0, np.sqrt(num_timesteps * 0.8), num_steps) ** 2]


def offset_timesteps(num_steps: int, num_timesteps: int = 1000) -> list[int]:
    """`uniform_timesteps`, each one later, as in LDM and Stable Diffusion: ascending, 1 to num_timesteps - 1.

    Sampling ends on the alpha_bar of timestep 0 then, not on 1 (`final_alpha` of `ddim`).
    Raises ValueError unless 1 <= num_steps < num_timesteps.
    """
    _check(num_steps, num_timesteps - 1)
    return [t + 1 for t in uniform_timesteps(num_steps, num_timesteps)]


def leading_timesteps(num_steps: int, num_timesteps: int = 1000) -> list[int]:
    """Multiples of num_timesteps // num_steps, each one later, as diffusers has them for Stable Diffusion: ascending.

    They are `offset_timesteps` where num_steps divides num_timesteps, and do not reach as high otherwise.
    Sampling ends as there. Raises ValueError unless 1 <= num_steps < num_timesteps.
    """
    _check(num_steps, num_timesteps - 1)
    return [i * (num_timesteps // num_steps) + 1 for i in range(num_steps)]


def trailing_timesteps(num_steps: int, num_timesteps: int = 1000) -> list[int]:
    """Evenly spaced timesteps that end on the last one, num_timesteps - 1, where the image is nearly all noise.

    Lin et al. (arXiv 2305.08891), Table 2: with few steps, the other spacings start the sampler, on pure noise, at a
    timestep where the network expects some of the image. Raises ValueError unless 1 <= num_steps <= num_timesteps.
    """
    _check(num_steps, num_timesteps)
    return [(i + 1) * num_timesteps // num_steps - 1 for i in range(num_steps)]


SPACINGS = {"uniform": uniform_timesteps, "quad": quadratic_timesteps, "offset": offset_timesteps,
            "leading": leading_timesteps, "trailing": trailing_timesteps}


def make_timesteps(spacing: str, num_steps: int, num_timesteps: int = 1000) -> list[float]:
    """Timesteps of a named spacing (SPACINGS), or `listed` ones: ascending. Raises ValueError for anything else."""
    if is_listed(spacing):
        return listed(spacing, num_steps, num_timesteps)
    if spacing not in SPACINGS:
        raise ValueError(f"unknown spacing of timesteps {spacing!r}: choose from {', '.join(SPACINGS)}, or list them")
    return [*SPACINGS[spacing](num_steps, num_timesteps)]


def is_listed(spacing: str) -> bool:
    """Whether this lists timesteps, instead of naming a spacing of them."""
    return spacing[:1].isdigit()


def listed(text: str, num_steps: int, num_timesteps: int) -> list[float]:
    """The timesteps of a list as runs go through them, '999,750,400.5,120': ascending.

    They may be fractions (`samplers.diffusion.alpha_at`). Sampling ends on a clean image after the last one. Raises
    ValueError unless they fall, none above the last timestep, and there are num_steps of them.
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
    """Alpha_bar of the end point: 1, a clean image, but for 'offset' and 'leading', which end on timestep 0."""
    return alphas_cumprod[0].item() if spacing in ("offset", "leading") else 1.0


def _check(num_steps: int, num_timesteps: int) -> None:
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"the number of steps must be from 1 to {num_timesteps}, got {num_steps}")


@torch.no_grad()
def ddim(predict: Predict, x: Tensor, timesteps: Sequence[float], alphas_cumprod: Tensor,
         eta: float = 0.0, noise: Callable[[Sequence[int]], Tensor] | None = None, final_alpha: float = 1.0,
         progress: Callable[[int, Tensor], None] | None = None) -> Tensor:
    """Sample x_0 from x_T by DDIM.

    predict(x, t, step) -> the predicted noise; t is the timestep, step = 0, 1, ... the number of the network call.
    x: [batch, channels, height, width], standard normal. timesteps: ascending; run from the last to the first.
    alphas_cumprod: [num_timesteps]. final_alpha: alpha_bar of the end point, 1 for a clean image.
    eta: 0 = deterministic, 1 = the variance of DDPM (Equation 16). noise: draws per image, needed when eta > 0, else
    ValueError.
    progress: called after each step with (step, x).
    """
    bars = torch.tensor([final_alpha, *(alpha_at(alphas_cumprod, t).item() for t in timesteps)], dtype=torch.float64)
    if noise is None and eta > 0:
        raise ValueError("eta above 0 needs noise to draw from")
    for step, i in enumerate(reversed(range(len(timesteps)))):
        alpha, alpha_next = bars[i + 1].item(), bars[i].item()
        sigma = eta * ((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)) ** 0.5         # Equation 16

        eps = predict(x, timesteps[i], step)
        x0 = (x - (1 - alpha) ** 0.5 * eps) / alpha ** 0.5                              # Equation 12: predicted x_0,
        x = alpha_next ** 0.5 * x0 + (1 - alpha_next - sigma ** 2) ** 0.5 * eps         # direction to x_t,
        if noise is not None and sigma > 0:
            x = x + sigma * noise(x.shape[1:])                                          # random noise
        if progress:
            progress(step, x)
    return x
