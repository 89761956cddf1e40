"""DPM-Solver++ (2M) (Lu et al., arXiv 2211.01095), by diffusers' DPMSolverMultistepScheduler."""

from collections.abc import Callable

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

# Our names of spacings (sampling.ddim.SPACINGS) -> diffusers' arguments.
_SPACINGS = {"leading": {"timestep_spacing": "leading", "steps_offset": 1},
             "linspace": {"timestep_spacing": "linspace"},
             "trailing": {"timestep_spacing": "trailing"}}


def scheduler(num_steps: int, betas: Tensor, spacing: str = "leading") -> DPMSolverMultistepScheduler:
    """diffusers' scheduler, with its timesteps set: descending, as many as steps. Ends on a clean image.

    Second order, multistep; the last step is of first order (and the one before, below 15 steps).
    spacing: 'leading' (multiples of num_timesteps // (num_steps + 1), each one later, without the lowest), 'linspace'
    (what diffusers makes of the scheduler_config.json published with Stable Diffusion v1.5) or 'trailing'.
    Raises ValueError for any other, and for numbers of steps out of range.
    """
    num_timesteps = len(betas)
    if spacing not in _SPACINGS:
        raise ValueError(f"dpmpp takes timesteps {', '.join(_SPACINGS)}, got {spacing!r}")
    if not 1 <= num_steps < num_timesteps:
        raise ValueError(f"the number of steps must be from 1 to {num_timesteps - 1}, got {num_steps}")
    made = DPMSolverMultistepScheduler(num_timesteps, trained_betas=betas.tolist(), solver_order=2,
                                       algorithm_type="dpmsolver++", solver_type="midpoint", lower_order_final=True,
                                       final_sigmas_type="zero", **_SPACINGS[spacing])
    made.set_timesteps(num_steps)
    made.set_begin_index(0)
    return made


@torch.no_grad()
def dpm_solver(predict: Callable[[Tensor, int, int], Tensor], x: Tensor, num_steps: int, betas: Tensor,
               spacing: str = "leading", progress: Callable[[int, Tensor], None] | None = None) -> Tensor:
    """Sample x_0 from x_T by DPM-Solver++ (2M), with as many network calls as steps.

    predict(x, t, step) -> the predicted noise; t is the timestep, step = 0, 1, ... the number of the network call.
    x: [batch, channels, height, width], standard normal. betas: float32 [num_timesteps]. spacing: see `scheduler`.
    progress: called after each step with (step, x).
    """
    rule = scheduler(num_steps, betas, spacing)
    for step, t in enumerate(rule.timesteps.tolist()):
        x = rule.step(predict(x, t, step), t, x).prev_sample
        if progress:
            progress(step, x)
    return x
