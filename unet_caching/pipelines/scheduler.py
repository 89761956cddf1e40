"""The scheduler that a plan was made for, for a diffusers pipeline."""

from pathlib import Path
from typing import Any

import diffusers
from diffusers import SchedulerMixin
from torch import device as Device

from unet_caching.errors import UserError, as_user_error
from unet_caching.files.plan_file import SAMPLING, Plan
from unet_caching.samplers.ddim import is_listed, listed
from unet_caching.samplers.solvers import OfDiffusers, set_listed, solver


def plan_scheduler(plan: Path | str, scheduler: SchedulerMixin) -> SchedulerMixin:
    """diffusers' scheduler of a plan's sampler, at the plan's timesteps: pipe.scheduler = plan_scheduler(plan,
    pipe.scheduler).

    plan: a file of lab.plans search. scheduler: the pipeline's own, whose noise levels and prediction it has. It is for
    as many steps as the plan has, and refuses others where the pipeline sets them. Saved, it is the scheduler of
    diffusers without the list. Raises UserError for a file that is no plan, and where there is no such scheduler.
    """
    with as_user_error():
        found = Plan.load(plan)
        sampler, steps, timesteps = (found.run[key] for key in SAMPLING)
        chosen = solver(sampler)
    betas, config = getattr(scheduler, "betas", None), getattr(scheduler, "config", {})
    if betas is None:
        raise UserError(f"a {type(scheduler).__name__} has no betas: a plan needs the noise levels of a diffusion "
                        "model, which DDIMScheduler has, say")
    prediction = config.get("prediction_type", "epsilon")
    if not isinstance(chosen, OfDiffusers) or (not chosen.takes_lists and prediction != "epsilon"):
        raise UserError(f"the plan is of {sampler}, and for a network that predicts {prediction} no scheduler of "
                        f"diffusers is that: set one of your own, with {steps} {timesteps} timesteps")
    with as_user_error():
        chosen.make(steps, timesteps, betas.float())            # which refuses what cannot be
        own = listed(timesteps, steps, len(betas)) if is_listed(timesteps) else None
    kind = getattr(diffusers, chosen.scheduler)

    def set_timesteps(self: Any, num_inference_steps: int | None = None, device: str | Device | None = None,
                      **others: Any) -> None:
        if num_inference_steps != steps or others:
            raise UserError(f"the pipeline's scheduler is for a plan of {steps} steps: num_inference_steps={steps}, "
                            "and no timesteps or sigmas")
        kind.set_timesteps(self, steps, device=device)
        if own is not None:
            set_listed(self, own)

    made = type(kind.__name__, (kind,), {"set_timesteps": set_timesteps, "__module__": kind.__module__})
    return chosen.build(made, timesteps, betas.float(), prediction_type=prediction)


def refuse_other_timesteps(plan: Plan, scheduler: Any) -> None:
    """Refuse a pipeline's scheduler, its timesteps set, that does not go through those which a plan lists.

    Raises UserError.
    """
    _, steps, timesteps = (plan.run[key] for key in SAMPLING)
    if not is_listed(timesteps):
        return
    there = getattr(scheduler, "timesteps", None)
    if there is None or [round(float(t)) for t in there] != [int(word) for word in timesteps.split(",")]:
        raise UserError(f"the plan was made for other timesteps than this pipeline's scheduler has, {timesteps}: "
                        "pipe.scheduler = plan_scheduler(FILE, pipe.scheduler) gives it those "
                        f"(from unet_caching import plan_scheduler), and the call num_inference_steps={steps}")
