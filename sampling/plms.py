"""PLMS (Liu et al., arXiv 2202.09778), the sampler of Stable Diffusion v1's tables, by diffusers' PNDMScheduler."""

from collections.abc import Callable

import torch
from diffusers import PNDMScheduler
from torch import Tensor

# Our names of spacings (sampling.ddim.SPACINGS) -> diffusers' arguments, with the end point that belongs to each.
_SPACINGS = {"leading": {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False},
             "trailing": {"timestep_spacing": "trailing", "set_alpha_to_one": True}}


def scheduler(num_steps: int, betas: Tensor, spacing: str = "leading") -> PNDMScheduler:
    """diffusers' scheduler, with its timesteps set: descending, the second one twice.

    spacing: 'leading', multiples of num_timesteps // num_steps, each one later, ending on timestep 0, as Stable
    Diffusion's; or 'trailing' (see `sampling.ddim.trailing_timesteps`), ending on a clean image.
    Raises ValueError for any other, and for numbers of steps out of range.
    """
    num_timesteps = len(betas)
    if spacing not in _SPACINGS:
        raise ValueError(f"plms takes timesteps {' or '.join(_SPACINGS)}, got {spacing!r}")
    if not 1 <= num_steps < num_timesteps:
        raise ValueError(f"the number of steps must be from 1 to {num_timesteps - 1}, got {num_steps}")
    if spacing == "trailing" and num_timesteps % num_steps:
        # The scheduler's steps are all num_timesteps // num_steps long, whatever its timesteps are.
        raise ValueError(f"plms with trailing timesteps needs a number of steps that divides {num_timesteps}, "
                         f"got {num_steps}")
    made = PNDMScheduler(num_timesteps, trained_betas=betas.tolist(), skip_prk_steps=True, **_SPACINGS[spacing])
    made.set_timesteps(num_steps)
    return made


@torch.no_grad()
def plms(predict: Callable[[Tensor, int, int], Tensor], x: Tensor, num_steps: int, betas: Tensor,
         spacing: str = "leading", progress: Callable[[int, Tensor], None] | None = None) -> Tensor:
    """Sample x_0 from x_T by PLMS, with one network call more than steps (`sampling.samplers.num_calls`).

    The multistep rule is of predicted noises, as in the paper, for networks that predict v too; diffusers' scheduler
    would take it over the v of different timesteps.

    predict(x, t, step) -> the predicted noise; t is the timestep, step = 0, 1, ... the number of the network call.
    x: [batch, channels, height, width], standard normal. betas: float32 [num_timesteps]. spacing: see `scheduler`.
    progress: called after each network call with (step, x).
    """
    rule = scheduler(num_steps, betas, spacing)
    for step, t in enumerate(rule.timesteps.tolist()):
        x = rule.step(predict(x, t, step), t, x).prev_sample
        if progress:
            progress(step, x)
    return x
