"""Caching in a diffusers pipeline, in two lines.

    enable_deepcache(pipe, interval=3)      # pipe(...) as before, now with one full step in three
    disable_deepcache(pipe)                 # off again; or: with enable_deepcache(pipe, interval=3): ...

docs/pipelines.md lists the pipelines, loop.py defines a step. Several pipelines, also in threads, may share a U-Net.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from numbers import Integral
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, PNDMScheduler, UNet2DModel
from torch import nn

from unet_caching.errors import UserError
from unet_caching.files.fitted import fingerprint, made_for
from unet_caching.forecast import check_order
from unet_caching.methods.block_caching import BlockCachingMethod
from unet_caching.methods.deepcache import DeepCacheOptions
from unet_caching.methods.forecast import ForecastOptions
from unet_caching.methods.plan import HIGHEST_ORDER
from unet_caching.options import RunShape
from unet_caching.pipelines.install import check, install, uninstall, unwrapped
from unet_caching.pipelines.loop import Loop, num_calls
from unet_caching.pipelines.parts import residuals
from unet_caching.pipelines.run import FEW, Run, log
from unet_caching.pipelines.scheduler import refuse_other_sampling
from unet_caching.registry import METHODS, Methods, bind, options_by_name
from unet_caching.samplers.solvers import solver
from unet_caching.schedules import check_settings

LONG = 1000     # steps: in a run of this length all valid settings are possible
# Options of methods that decide what each call computes. With one of them DeepCache is off unless it is asked for.
ALONE = {one.name for method in METHODS if method not in (DeepCacheOptions, ForecastOptions) for one in fields(method)}


def enable_deepcache(pipe: DiffusionPipeline, interval: int | None = None, branch: int | None = None,
                     schedule: str = "uniform", center: int | None = None, power: float | None = None,
                     **options: Any) -> AbstractContextManager[DiffusionPipeline]:
    """Switch caching on in a pipeline, or change its settings; in a `with` statement until its end.

    interval: N of 1:N, one full step in every N; 2 and 3 are cautious, the papers go up to 10, 1 does not cache. The
    default is 3, or 1 with a plan, block_schedule, clock or adaptive rule, which decides what each call computes.
    branch: 0-based skip that cached steps still compute. 0 saves most. The default is 1, the paper's for Stable
    Diffusion, and 2 for a UNet2DModel.
    schedule: "uniform", or "centered" with the paper's non-uniform center and power (unet_caching/schedules.py).
    options: of all methods in registry.py, named like the flags of the sample commands, with files as paths.
    forecast=1 extrapolates the cached values (not in the papers). A plan needs its own scheduler: plan_scheduler.
    Raises UserError for settings that are not possible and for a pipeline that cannot be cached; then nothing changes.
    """
    if interval is None:
        interval = 1 if options.keys() & ALONE else 3
    options |= {"interval": interval, "branch": branch, "schedule": schedule, "center": center, "power": power}
    bar, before = ProgressBar(pipe, options), vars(pipe).get("progress_bar")
    bar.check(_unet(pipe))
    disable_deepcache(pipe)
    _switch_on(pipe, bar)
    return _within(pipe, before if isinstance(before, ProgressBar) else None)


def disable_deepcache(pipe: DiffusionPipeline) -> None:
    """Switch caching off in a pipeline, and give its U-Net the original forward back. No effect if caching is off."""
    bar = vars(pipe).get("progress_bar")
    if isinstance(bar, ProgressBar):
        if bar.shadowed is None:
            del pipe.progress_bar
        else:
            pipe.progress_bar = bar.shadowed
    uninstall(pipe)


@contextmanager
def _within(pipe: DiffusionPipeline, before: "ProgressBar | None") -> Iterator[DiffusionPipeline]:
    """A context at whose end caching is switched off, or has its earlier settings again."""
    try:
        yield pipe
    finally:
        disable_deepcache(pipe)
        if before is not None:
            _switch_on(pipe, before)


def _switch_on(pipe: DiffusionPipeline, bar: "ProgressBar") -> None:
    bar.shadowed, pipe.progress_bar = vars(pipe).get("progress_bar"), bar
    install(pipe)


def _plain(name: str, value: Any) -> Any:
    """The value of an option, with numpy's whole numbers as int and files as paths."""
    if name in ("schedule", "clock_preset", "zero_cache"):
        return value
    if isinstance(value, bool):
        raise ValueError(f"{name} must be a number, got {value}")
    return Path(value) if isinstance(value, str) else int(value) if isinstance(value, Integral) else value


def _unet(pipe: Any) -> Any:
    """The U-Net of a pipeline. Raises UserError if there is none that can be cached."""
    name = type(pipe).__name__
    if any(kind.__name__ == "ModularPipeline" for kind in type(pipe).__mro__):
        raise UserError(f"a {name} runs its loop in blocks, outside of pipe.progress_bar: take a pipeline class")
    if not isinstance(pipe, DiffusionPipeline) or not hasattr(pipe, "unet"):
        raise UserError(f"a {name} has no pipe.unet: caching is for diffusers pipelines with a U-Net")
    for inner, value in vars(pipe).items():
        if isinstance(value, DiffusionPipeline) and getattr(value, "unet", None) is pipe.unet:
            raise UserError(f"the loop of a {name} runs in pipe.{inner}: use enable_deepcache(pipe.{inner})")
    check(unwrapped(pipe.unet))
    return unwrapped(pipe.unet)


@contextmanager
def as_options_error(prefix: str = "") -> Iterator[None]:
    """A context that turns ValueErrors into UserErrors, with arguments' names instead of flags."""
    try:
        yield
    except ValueError as error:
        words = re.sub(r"--([a-z]+(?:-[a-z]+)*)", lambda flag: flag[1].replace("-", "_"), str(error))
        raise UserError(prefix + words) from None


class ProgressBar:
    """Replaces a pipeline's `progress_bar`: the original one, with a run around the loop that it counts."""

    def __init__(self, pipe: DiffusionPipeline, options: Mapping[str, Any]):
        self.pipe = pipe
        with as_options_error():
            self.options = {name: _plain(name, value) for name, value in options.items()}
            check_settings(*(self.options[name] for name in ("schedule", "interval", "center", "power")))
        self.order = options.get("forecast", 0)
        self.shadowed: Any = None           # a progress bar that the user has set on the object; else it is the class's
        self.warnings: set[str] = set()

    def __call__(self, iterable: Any = None, total: int | None = None, **others: Any) -> Any:
        loop = Loop(sys._getframe(1), self.pipe)
        own = self.shadowed or type(self.pipe).progress_bar.__get__(self.pipe)
        bar = own(iterable, **others) if total is None else own(iterable, total, **others)
        return bar if total is None and not hasattr(iterable, "__len__") else _Bar(bar, self, loop, iterable, total)

    def run(self, loop: Loop, iterable: Any, total: int | None) -> Run:
        """The run of a loop. Raises UserError if the pipeline's present U-Net cannot be cached."""
        check(unwrapped(self.pipe.unet))
        install(self.pipe)
        unet, calls = unwrapped(self.pipe.unet), num_calls(self.pipe, loop, iterable, total)
        return Run(unet, loop, lambda: (self._methods(unet, calls), calls))

    def check(self, unet: nn.Module) -> None:
        """Raise a UserError for settings that no run can have."""
        steps = calls = LONG
        for path in self.options.values():
            if isinstance(path, Path) and (run := made_for(path)):
                steps, calls = run["steps"], solver(run["sampler"]).calls(run["steps"])
        with as_options_error():
            check_order(self.order)
            if self.order > HIGHEST_ORDER:
                raise ValueError(f"forecast is an order up to {HIGHEST_ORDER}, got {self.order}")
            _bound({**self.options, "schedule": "uniform", "center": None, "power": None}, unet, steps, calls)

    def _methods(self, unet: nn.Module, calls: int) -> Methods:
        """The methods of a run with this number of calls; interval and order are lowered to fit. Raises UserError."""
        scheduler = getattr(self.pipe, "scheduler", None)
        steps = max(calls - (isinstance(scheduler, PNDMScheduler) and bool(scheduler.config.skip_prk_steps)), 1)
        fitting = self.options | {"interval": min(self.options["interval"], steps)}
        with as_options_error(f"this run has {steps} steps: "):
            for order in range(self.order, -1, -1):
                fitting |= {"forecast": order} if order else {"forecast": 0, "forecast_damping": 1.0}
                try:
                    found = _bound(fitting, unet, steps, calls)
                    break
                except ValueError:
                    if order == 0:
                        raise
        for file in (file for method in found.methods for file in method.files):
            refuse_other_sampling(file, scheduler)
        few = f"this run has only {calls} network calls: there is next to nothing to reuse, and each cached call shows"
        low = f"this run has {steps} steps, too few to forecast by order {self.order}: order {order} is used"
        noise = "this scheduler adds noise at every step, where a forecast gains less, or nothing for certain"
        kind = f"{type(scheduler).__name__} {getattr(scheduler, 'config', {}).get('algorithm_type')}"
        fresh = order > 0 and re.search("Ancestral|sde|SDE", kind)
        for message in [few] * bool(found and calls < FEW) + [low] * (order < self.order) + [noise] * bool(fresh):
            if message not in self.warnings:
                self.warnings.add(message)
                log.warning("%s", message)
        return found


def _bound(options: Mapping[str, Any], unet: Any, steps: int, calls: int) -> Methods:
    """The methods of a run on this U-Net. Raises ValueError."""
    branches = sum(len(block.resnets) for block in unet.up_blocks)
    usual = min(2 if isinstance(unet, UNet2DModel) else 1, branches - 1)
    found = bind(options_by_name(options), RunShape(steps, calls, branches, usual))
    if any(method.files for method in found.methods):
        context = getattr(unet.config, "cross_attention_dim", None)
        found.check({"steps": steps, "fingerprint": fingerprint(unet, unet.config.in_channels, context)})
    blocks = found.of(BlockCachingMethod)
    if blocks and (unknown := blocks.computed.keys() - {name for _, name in residuals(unet)}):
        raise ValueError(f"the block schedule names {min(unknown)}, which is not a residual layer of this U-Net")
    return found


class _Bar:
    """A progress bar with a run inside it. All other attributes are the bar's."""

    def __init__(self, bar: Any, of: ProgressBar, loop: Loop, iterable: Any, total: int | None):
        self._bar, self._of, self._run_of = bar, of, (loop, iterable, total)

    def __enter__(self) -> Any:
        self._run = self._of.run(*self._run_of).prepare()
        found = self._bar.__enter__()
        self._run.__enter__()
        return found

    def __exit__(self, *error: Any) -> Any:
        self._run.__exit__(*error)
        return self._bar.__exit__(*error)

    def __iter__(self) -> Iterator:
        with self._of.run(*self._run_of):
            yield from self._bar

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)
