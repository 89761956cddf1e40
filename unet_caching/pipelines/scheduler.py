"""The scheduler of a plan, for a diffusers pipeline."""

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor
from torch import device as Device

from unet_caching.errors import UserError, as_user_error
from unet_caching.files.fitted import Fitted
from unet_caching.methods.plan import SAMPLING, Plan
from unet_caching.samplers.diffusion import PREDICTIONS, clean_image, predicted_noise
from unet_caching.samplers.solvers import OfDiffusers, set_listed, solver
from unet_caching.samplers.table import Table, combined
from unet_caching.samplers.timesteps import is_listed, make_timesteps

FROM_DIFFUSERS = {theirs: ours for ours, theirs in PREDICTIONS.items()}


def plan_scheduler(plan: Path | str, scheduler: SchedulerMixin) -> SchedulerMixin:
    """diffusers' scheduler for a plan's sampler, with the plan's timesteps and solver.

    plan: a file of lab.plans. scheduler: the pipeline's, whose noise levels and prediction the new one has. If the new
    one is saved, its timesteps and solver are lost. Raises UserError for a file that is not a plan, and if there is no
    such scheduler in diffusers.
    """
    with as_user_error():
        found = Plan.load(plan)
        sampler, steps, timesteps = (found.made_for[key] for key in SAMPLING)
        chosen = solver("unipc" if found.solver else found.made_for["sampler"])     # a plan's solver goes with any
    betas, prediction = _betas(scheduler), getattr(scheduler, "config", {}).get("prediction_type", "epsilon")
    if not isinstance(chosen, OfDiffusers) or (not chosen.takes_lists and prediction != "epsilon") or (
            found.solver is not None and prediction not in FROM_DIFFUSERS):
        raise UserError(f"the plan is for {sampler}, and diffusers has no such scheduler for a network that predicts "
                        f"{prediction}: set your own, with {steps} {timesteps} timesteps")
    with as_user_error():
        chosen.make(steps, timesteps, betas)        # checks the steps and timesteps
        own = chosen.own_timesteps(timesteps, steps, betas)
    kind = getattr(diffusers, chosen.scheduler)

    def set_timesteps(self: Any, num_inference_steps: int | None = None, device: str | Device | None = None,
                      **others: Any) -> None:
        if num_inference_steps != steps or others:
            raise UserError(f"the pipeline's scheduler is for a plan of {steps} steps: num_inference_steps={steps}, "
                            "and no timesteps or sigmas")
        kind.set_timesteps(self, steps, device=device)
        if own is not None:
            set_listed(self, own)

    methods = {"set_timesteps": set_timesteps, "__module__": kind.__module__}
    if found.solver is not None:
        methods |= {"step": _step_of(found.solver), "plan_sha256": found.sha256}
    made = type(kind.__name__, (kind,), methods)
    return chosen.build(made, timesteps, betas, prediction_type=prediction)


def _step_of(table: Table) -> Any:
    """The method `step` of a scheduler with a table of coefficients."""
    def step(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
        if self.step_index is None:
            self._init_step_index(timestep)
        number = self.step_index
        if number == 0:
            self.start, self.clean = sample.float(), []
        elif len(getattr(self, "clean", ())) != number:
            raise UserError("a learned plan starts from pure noise and runs all its steps: leave out the start image, "
                            "and run every step")
        alpha = 1 / (1 + self.sigmas[number].double().item() ** 2)
        prediction = FROM_DIFFUSERS[self.config.prediction_type]
        noise = predicted_noise(prediction, model_output.float(), sample.float(), alpha)
        self.clean.append(clean_image(sample.float(), noise, alpha))
        x = combined(self.start, self.clean, table.p[number], table.q[number]).to(sample.dtype)
        self._step_index += 1
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)
    return step


def _betas(scheduler: Any) -> Tensor:
    """The betas of a scheduler, [num_timesteps]. Raises UserError if its noise levels are not a diffusion model's."""
    name, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    betas, bars = (getattr(scheduler, key, None) for key in ("betas", "alphas_cumprod"))
    if betas is None or bars is None or config.get("use_flow_sigmas"):
        raise UserError(f"a {name} has no betas: a plan needs the noise levels of a diffusion model, like those of "
                        "DDIMScheduler")
    betas = betas.float().clone()
    if betas[-1] == 1:                      # zero terminal SNR (arXiv 2305.08891)
        if config.get("prediction_type") == "epsilon":
            raise UserError(f"this {name} has zero terminal SNR, where a network that predicts noise says nothing of "
                            "the image: use a network that predicts v, or another scheduler")
        betas[-1] = 1 - 2 ** -24 / (1 - betas[:-1]).prod()      # diffusers' bound: the first sigma stays finite
    if not torch.allclose((1 - betas).cumprod(0), bars.float(), rtol=1e-3, atol=1e-6):
        raise UserError(f"the betas of a {name} are not its noise levels: a plan needs noise levels like those of "
                        "DDIMScheduler")
    return betas


def refuse_other_sampling(file: Fitted, scheduler: Any) -> None:
    """Raise a UserError if a scheduler, with its timesteps set, is not the sampler that a file was made for."""
    sampler, steps, timesteps = (file.made_for[key] for key in SAMPLING)
    learned = isinstance(file, Plan) and file.solver is not None
    chosen, config = solver("unipc" if learned else sampler), getattr(scheduler, "config", {})
    if isinstance(chosen, OfDiffusers):
        same = type(scheduler).__name__ == chosen.scheduler and all(
            config.get(name, value) == value for name, value in chosen.arguments.items()) and (
            not learned or getattr(scheduler, "plan_sha256", None) == file.sha256)
        expected = chosen.make(steps, timesteps, _betas(scheduler)).timesteps.tolist() if same else []
    else:
        same = type(scheduler).__name__ == "DDIMScheduler" and not is_listed(timesteps)
        expected = make_timesteps(timesteps, steps, config.get("num_train_timesteps", 1000))[::-1]
    if not same or [round(float(t), 2) for t in scheduler.timesteps] != [round(t, 2) for t in expected]:
        what = f"a solver learned from {sampler}" if learned else sampler
        remedy = ": pipe.scheduler = plan_scheduler(FILE, pipe.scheduler)" if isinstance(file, Plan) else ""
        raise UserError(f"the {file.kind} was made for {what} with {timesteps} timesteps in {steps} steps, and this "
                        f"pipeline's scheduler has others{remedy}")
