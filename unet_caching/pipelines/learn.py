"""Learn a plan on a diffusers pipeline, for its U-Net, guidance and prompts (unet_caching/learning.py).

    learn_plan(pipe, "plan.json", prompts, seeds=range(64), held_out=range(100, 132), out="learned.json")
    pipe.scheduler = plan_scheduler("learned.json", pipe.scheduler)
    enable_deepcache(pipe, plan="learned.json")
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor
from tqdm import tqdm

from unet_caching.errors import UserError, as_user_error
from unet_caching.files.whole import write_and_move
from unet_caching.learning import Learner, Learning, Recomputed, learned_plan, solved
from unet_caching.methods.plan import Plan
from unet_caching.nest import Cache
from unet_caching.pipelines.forward import argument_names, cached_forward
from unet_caching.pipelines.install import check, unwrapped
from unet_caching.pipelines.parts import Caching
from unet_caching.pipelines.scheduler import FROM_DIFFUSERS, plan_scheduler
from unet_caching.policy import Policy
from unet_caching.samplers.diffusion import Diffusion, Predict
from unet_caching.samplers.samplers import noise_predictor
from unet_caching.samplers.table import table_of


def learn_plan(pipe: DiffusionPipeline, plan: Path | str, prompts: Sequence[str] | None, seeds: Sequence[int],
               held_out: Sequence[int], out: Path | str, options: Learning = Learning(),  # noqa: B008  it is frozen
               converged_steps: int = 100, **arguments: Any) -> Plan:
    """Learn timesteps, solver and forecasts of a plan, and write the learned plan.

    prompts: seed s has prompt s % len(prompts), and noise from a generator with that seed; None for a pipeline without
    prompts. held_out: the seeds that choose the best plan, which may be the one before learning.
    out: the plan to write, JSON. The state of learning is kept beside it; after a kill the same call resumes and gives
    the same plan. converged_steps: UniPC steps of the target images. arguments: of the pipeline's call, like
    guidance_scale and height. Raises UserError for a pipeline that is not in float32, or whose network calls depend on
    more than x and the timestep, as with a ControlNet.
    """
    with as_user_error():
        before = Plan.load(plan)
    own, unet = pipe.scheduler, unwrapped(pipe.unet)
    check(unet)
    if unet.dtype != torch.float32:
        raise UserError(f"plans are learned in float32, but pipe.unet is in {unet.dtype}: pipe.to(torch.float32); the "
                        "learned plan runs in any dtype")
    state, about = Path(out).with_suffix(".learning"), repr((prompts, arguments, converged_steps))
    kept = state.with_suffix(f".{hashlib.sha256(about.encode()).hexdigest()[:8]}.converged")
    weights = [weight for weight in unet.parameters() if weight.requires_grad]
    bars = getattr(pipe, "_progress_bar_config", {})
    try:
        unet.requires_grad_(False)
        pipe.scheduler = plan_scheduler(plan, own)
        pipe.set_progress_bar_config(disable=True)
        starts = Starts(pipe, prompts, before.made_for["steps"], arguments)
        images = starts.converged([*seeds, *held_out], converged_steps, options.batch_size, kept)
        with as_user_error():
            outcome = Learner(solved(before, starts.diffusion), starts, starts.diffusion.alphas_cumprod(),
                              lambda some: torch.stack([images[seed] for seed in some]), seeds, held_out, options,
                              state, about).learn("learning")
    finally:
        pipe.scheduler, pipe._progress_bar_config = own, bars
        for weight in weights:
            weight.requires_grad_()
    made = learned_plan(before, outcome, {"learnt_on": f"{len(seeds)} seeds", "chosen_on": f"{len(held_out)} others"})
    made.save(out)
    return made


class OfScheduler(Diffusion):
    """The noise schedule and prediction of a pipeline's network. scheduler: from `plan_scheduler`, which checks it."""

    def __init__(self, scheduler: SchedulerMixin):
        self._betas = scheduler.betas.float().cpu()
        super().__init__(num_timesteps=len(self._betas), prediction=FROM_DIFFUSERS[scheduler.config.prediction_type])

    def betas(self) -> Tensor:
        return self._betas


class _Stopped(Exception):
    """Stops a pipeline at its first network call."""


class Starts:
    """A `learning.Start` of a pipeline, which runs up to its first network call.

    steps: of the pipeline's scheduler. arguments: of the pipeline's call.
    """

    def __init__(self, pipe: Any, prompts: Sequence[str] | None, steps: int, arguments: dict[str, Any]):
        self.pipe, self.prompts, self.steps, self.arguments = pipe, prompts, steps, arguments
        self.unet = unwrapped(pipe.unet)
        self.names = argument_names(self.unet)
        self.diffusion = OfScheduler(pipe.scheduler)

    def __call__(self, seeds: Sequence[int], policy: Policy | None) -> tuple[Predict, Tensor]:
        call = self._first_call(seeds)
        x = call.pop("sample")
        del call["timestep"]
        guided = len(x) == 2 * len(seeds)
        if not guided and (len(x) != len(seeds) or getattr(self.pipe, "do_classifier_free_guidance", False)):
            raise UserError(f"the pipeline's network calls have {len(x)} rows for {len(seeds)} images: plans are "
                            "learned with one row per image, or two with guidance")
        if any(call.get(name) is not None for name in self.names if "additional_residual" in name):
            raise UserError("plans are learned without ControlNets and adapters, whose residuals change from step to "
                            "step")
        if getattr(self.pipe, "guidance_rescale", 0.0):
            raise UserError("plans are learned without guidance_rescale")

        def network(x: Tensor, t: Tensor, cache: Cache) -> Tensor:
            given = call | {"sample": x, "timestep": t, "return_dict": False}
            return cached_forward(self.unet, self.names, Caching(cache), **given)[0]

        guidance = self.pipe.guidance_scale if guided else 1.0
        return noise_predictor(Recomputed(network), self.diffusion, x.dtype, policy, (), guidance), x[:len(seeds)]

    @torch.no_grad()
    def _first_call(self, seeds: Sequence[int]) -> dict[str, Any]:
        """The arguments of the first network call for some seeds, by name."""
        found: dict[str, Any] = {}

        def stop(module: Any, args: tuple, kwargs: dict) -> None:
            found.update(zip(self.names, args, strict=False), **kwargs)
            raise _Stopped

        hook = self.unet.register_forward_pre_hook(stop, with_kwargs=True)
        shown: dict[str, Any] = ({"batch_size": len(seeds)} if self.prompts is None else
                 {"prompt": [self.prompts[seed % len(self.prompts)] for seed in seeds]})
        shown |= {name: [value] * len(seeds) if isinstance(value, str) and name.startswith("negative_prompt") else value
                  for name, value in self.arguments.items()}
        try:
            self.pipe(**shown, generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                      num_inference_steps=self.steps)
        except _Stopped:
            return found
        finally:
            hook.remove()
        raise UserError(f"a {type(self.pipe).__name__} does not call its U-Net")

    def converged(self, seeds: Sequence[int], steps: int, batch_size: int, file: Path) -> dict[int, Tensor]:
        """The latents of runs with many steps, by seed. file: keeps them."""
        images: dict[int, Tensor] = torch.load(file, weights_only=True) if file.is_file() else {}
        timesteps, table = table_of("unipc", steps, "trailing", self.diffusion)
        missing = [seed for seed in seeds if seed not in images]
        for i in tqdm(range(0, len(missing), batch_size), "converged images", disable=not missing):
            batch = missing[i:i + batch_size]
            with torch.no_grad():
                predict, x = self(batch, None)
                made = table.sample(predict, x, timesteps, self.diffusion.alphas_cumprod())
            images |= dict(zip(batch, made.cpu(), strict=True))
            write_and_move(file, lambda temporary: torch.save(images, temporary))
        return images
