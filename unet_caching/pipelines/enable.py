"""Caching in a diffusers pipeline, in two lines.

    from unet_caching import disable_deepcache, enable_deepcache
    enable_deepcache(pipe, interval=3)      # pipe(...) as before, now one full step in three
    disable_deepcache(pipe)                 # as it was

    with enable_deepcache(pipe, interval=3, forecast=1):
        pipe(...)                           # on in here alone

For pipelines whose U-Net is a UNet2DConditionModel (Stable Diffusion 1.x and 2.x, SDXL, and others of its blocks) or a
UNet2DModel, and whose denoising loop runs in the pipeline's progress bar, as diffusers' own do. The pipeline's modules
run as they are: LoRA, ControlNets, T2I- and IP-Adapters, FreeU, attention processors, offloading and quantised layers
act as they do without caching.

- A step is one network call of the loop, or several that are given the same timestep (`pipelines.loop`); other calls of
  the network compute everything. Schedules are made for the calls of a run; for one less with PLMS (PNDMScheduler with
  skip_prk_steps), which repeats one step: T steps are T + 1 calls there, the last of them a cached one, as in the
  released code (github horseee/DeepCache, 1691a3a). Second-order schedulers, as Heun's, count each of their calls.
- An interval longer than the run leaves one full step. A center beyond the run's steps is an error.
- ControlNets run on every step, and their residuals enter at all skips that a step computes. A cached feature holds
  those of its own full step, as it holds what adapters added to the encoder.
- `torch.compile(pipe.unet)`, before or after: one graph for full steps, one for cached ones.
- Several pipelines may share one U-Net, each with its own settings or without caching, in threads of their own too.
- `logging.getLogger("unet_caching")` tells at the first step of each run, at level INFO, what it does and what that
  saves.
"""

import logging
import operator
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, PNDMScheduler, UNet2DModel
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from unet_caching.errors import UserError, as_user_error
from unet_caching.files.block_schedule import PlannedBlocks
from unet_caching.files.fitted import fingerprint
from unet_caching.files.plan_file import PlannedPlan
from unet_caching.methods.deepcache import DeepCacheOptions
from unet_caching.methods.forecast_options import ForecastOptions
from unet_caching.options import MethodOptions, RunShape
from unet_caching.pipelines.containers import check_containers
from unet_caching.pipelines.cost import run_macs
from unet_caching.pipelines.install import check, install, uninstall, unwrapped
from unet_caching.pipelines.loop import Loop
from unet_caching.pipelines.parts import num_skips, residual_names
from unet_caching.pipelines.run import Plan, Run, argument, log, residuals_of
from unet_caching.pipelines.scheduler import refuse_other_timesteps
from unet_caching.policy import Policy
from unet_caching.registry import METHODS, CachePlan, options_by_name, plan
from unet_caching.schedules import check_settings

# Options of methods that say themselves what each call computes, or leave that to DeepCache where it is asked for.
ALONE = {one.name for method in METHODS if method not in (DeepCacheOptions, ForecastOptions) for one in fields(method)}
FEW = 10        # network calls: in less there is next to nothing to reuse


def _fingerprint(unet: Any) -> str:
    return fingerprint(unet, unet.config.in_channels, getattr(unet.config, "cross_attention_dim", None))


class Enabled:
    """What `enable_deepcache` returns: in a `with` statement caching ends, or is as before, where that ends."""

    def __init__(self, pipe: DiffusionPipeline, before: "ProgressBar | None"):
        self.pipe, self.before = pipe, before

    def __enter__(self) -> DiffusionPipeline:
        return self.pipe

    def __exit__(self, *error: Any) -> None:
        disable_deepcache(self.pipe)
        if self.before is not None:
            _switch_on(self.pipe, self.before)


def enable_deepcache(pipe: DiffusionPipeline, interval: int | None = None, branch: int | None = None,
                     schedule: str = "uniform", center: int | None = None, power: float | None = None,
                     **options: Any) -> Enabled:
    """Switch caching on in a pipeline, or change its settings.

    interval: N of 1:N, one full step in every N; 2 and 3 are cautious, the papers go up to 10, 1 does not cache. By
    default 3, or 1 beside a plan, block_schedule, clock or adaptive rule, which say themselves what each call computes.
    branch: 0-based skip that cached steps still compute; 0 saves most, 1 is the paper's for Stable Diffusion and the
    default, 2 for a UNet2DModel.
    schedule: "uniform", or "centered" with the paper's non-uniform center and power (unet_caching/schedules.py).
    options: of all methods in registry.py, by the names that their flags have in the sample commands, files as
    paths: forecast=1 extrapolates what is reused (not of the papers). A plan wants its own scheduler, too:
    unet_caching.pipelines.scheduler.plan_scheduler.
    Raises UserError for settings that cannot be and for a pipeline that cannot be cached; nothing has changed then.
    """
    if interval is None:
        interval = 1 if options.keys() & ALONE else 3
    options = {name: Path(value) if isinstance(value, str) else value for name, value in options.items()}
    try:
        options |= {"interval": _whole(interval), "branch": None if branch is None else _whole(branch),
                    "schedule": schedule, "center": center, "power": power}
        check_settings(schedule, options["interval"], center, power)
        methods = options_by_name(options)
    except ValueError as error:
        raise UserError(str(error)) from None
    if not isinstance(pipe, DiffusionPipeline) or not hasattr(pipe, "unet"):
        raise UserError(f"a {type(pipe).__name__} has no U-Net: this is for diffusers pipelines with one")
    unet = unwrapped(pipe.unet)
    check(unet)
    branch = options["branch"]
    if branch is not None and not (isinstance(branch, int) and 0 <= branch < num_skips(unet)):
        raise UserError(f"branch must be from 0 to {num_skips(unet) - 1} for this model, got {branch!r}")
    before = vars(pipe).get("progress_bar")
    before = before if isinstance(before, ProgressBar) else None
    disable_deepcache(pipe)
    _switch_on(pipe, ProgressBar(pipe, methods))
    return Enabled(pipe, before)


def disable_deepcache(pipe: DiffusionPipeline) -> None:
    """Give a pipeline its own U-Net's forward back; without effect where caching is off."""
    bar = vars(pipe).get("progress_bar")
    if isinstance(bar, ProgressBar):
        if bar.shadowed is None:
            del pipe.progress_bar
        else:
            pipe.progress_bar = bar.shadowed
    uninstall(pipe)


def _switch_on(pipe: DiffusionPipeline, bar: "ProgressBar") -> None:
    bar.shadowed = vars(pipe).get("progress_bar")
    pipe.progress_bar = bar
    install(pipe)


def _whole(value: Any) -> Any:
    """A whole number of any kind, numpy's too, as an int; what is none is left to the checks."""
    try:
        return operator.index(value)
    except TypeError:
        return value


class ProgressBar:
    """A pipeline's `progress_bar`: the one that it had before, with a run around the loop that it counts."""

    def __init__(self, pipe: DiffusionPipeline, methods: Sequence[MethodOptions]):
        self.pipe, self.methods = pipe, methods
        self.shadowed: Any = None           # set on the object by the user; else it is the class's
        self.warned = False
        self.counted: tuple[Any, int, list[int]] | None = None

    def __call__(self, iterable: Any = None, total: int | None = None, **others: Any) -> Any:
        frame = sys._getframe(1)
        own = self.shadowed or type(self.pipe).progress_bar.__get__(self.pipe)
        bar = own(iterable, **others) if total is None else own(iterable, total, **others)
        steps = total if iterable is None else len(iterable) if hasattr(iterable, "__len__") else total
        return bar if steps is None else _Bar(bar, self, Loop(frame, self.pipe), steps)

    def run(self, loop: Loop, total: int) -> Run:
        """The run of a loop. Raises UserError for a U-Net, as it is now, that cannot be cached."""
        check(unwrapped(self.pipe.unet))
        install(self.pipe)
        unet = unwrapped(self.pipe.unet)
        calls = self._calls(loop, total)

        def planned() -> Plan:
            found = self._plan(unet, calls)

            def make(x: Tensor) -> Policy | None:
                return found.policy(x.device, x.dtype)

            def tell(args: tuple, kwargs: dict) -> None:
                if log.isEnabledFor(logging.INFO):
                    self._tell(unet, found, calls, args, kwargs)
            return Plan(calls, make, tell)
        return Run(unet, loop, planned)

    def _calls(self, loop: Loop, total: int) -> int:
        """How often the network will be called."""
        number = getattr(self.pipe, "_num_timesteps", None)
        if number is not None and "_num_timesteps" in loop.code.co_names:       # else it is of an older run
            return number
        timesteps = getattr(getattr(self.pipe, "scheduler", None), "timesteps", None)
        return max(total, 0 if timesteps is None else len(timesteps))

    def _plan(self, unet: nn.Module, calls: int) -> CachePlan:
        scheduler = getattr(self.pipe, "scheduler", None)
        plms = isinstance(scheduler, PNDMScheduler) and bool(scheduler.config.skip_prk_steps)
        steps = max(calls - plms, 1)
        fitting = [replace(one, interval=min(one.interval, steps)) if isinstance(one, DeepCacheOptions) else one
                   for one in self.methods]
        branches = num_skips(unet)
        usual = min(2 if isinstance(unet, UNet2DModel) else 1, branches - 1)
        with as_user_error(f"this run has {steps} steps: "):
            found = plan(fitting, RunShape(steps, calls, branches, usual))
            fitted = any(method.fitted for method in found.methods)
            found.check({"steps": steps, **({"fingerprint": _fingerprint(unet)} if fitted else {})})
        if (own := found.of(PlannedPlan)) is not None:
            refuse_other_timesteps(own.plan, scheduler)
        blocks = found.of(PlannedBlocks)
        unknown = sorted(blocks.blocks.keys() - set(residual_names(unet))) if blocks else []
        if unknown:
            raise UserError(f"a block schedule for pipelines is of ResNet blocks and transformers: this U-Net has no "
                            f"{unknown[0]}")
        if blocks and any(name.startswith("middle_block.") for name in blocks.blocks):
            check_containers(unet, middle=True)
        if found and calls < FEW and not self.warned:
            self.warned = True
            log.warning("this run has %d network calls: there is next to nothing to reuse, and each cached one shows",
                        calls)
        return found

    def _tell(self, unet: nn.Module, found: CachePlan, calls: int, args: tuple, kwargs: dict) -> None:
        """Say what the run does and what that saves."""
        sample = argument(args, kwargs, 0, "sample")
        policy = found.policy("meta", sample.dtype)
        key = id(unet), calls, repr(tree_map_only(Tensor, lambda value: value.shape, (args, kwargs)))
        try:
            if self.counted is None or self.counted[0] != key:      # counted once for runs of the same kind
                self.counted = key, *run_macs(unet, args, kwargs, policy, residuals_of(policy, unet), calls)
            _, full, each = self.counted
        except Exception as error:          # a quantised layer, say, has no copy on the meta device
            log.info("caching in %d network calls: %s; multiply-accumulates were not counted (%s)", calls,
                     _summary(found), error)
            return
        log.info("caching in %d network calls, %d of them full: %s; %.1f of %.1f GMACs per call and image: %.2f times "
                 "as fast by them", calls, each.count(full), _summary(found), sum(each) / calls / len(sample) / 1e9,
                 full / len(sample) / 1e9, calls * full / sum(each))


def _summary(found: CachePlan) -> str:
    return ", ".join(method.summary for method in found.methods) or "without caching"


class _Bar:
    """A progress bar with a run inside it; whatever else it has is the bar's own."""

    def __init__(self, bar: Any, of: ProgressBar, loop: Loop, total: int):
        self._bar, self._of, self._loop, self._total = bar, of, loop, total

    def __enter__(self) -> Any:
        self._run = self._of.run(self._loop, self._total).prepare()
        found = self._bar.__enter__()
        self._run.__enter__()
        return found

    def __exit__(self, *error: Any) -> Any:
        self._run.__exit__(*error)
        return self._bar.__exit__(*error)

    def __iter__(self) -> Iterator:
        with self._of.run(self._loop, self._total):
            yield from self._bar

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)
