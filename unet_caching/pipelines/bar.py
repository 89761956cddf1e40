"""A pipeline's progress bar, with a run around the loop that it counts, and what such a run caches by."""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from diffusers import DiffusionPipeline, PNDMScheduler, UNet2DModel
from torch import nn

from unet_caching.errors import UserError
from unet_caching.files.fitted import fingerprint
from unet_caching.methods.block_caching import BlockCachingMethod
from unet_caching.methods.deepcache import DeepCacheOptions
from unet_caching.methods.forecast import ForecastOptions
from unet_caching.methods.plan import HIGHEST_ORDER, PlanMethod
from unet_caching.options import MethodOptions, RunShape
from unet_caching.pipelines.install import check, install, unwrapped
from unet_caching.pipelines.loop import Loop, num_calls
from unet_caching.pipelines.parts import num_skips, residual_names
from unet_caching.pipelines.run import FEW, Run, log
from unet_caching.pipelines.scheduler import refuse_other_sampling
from unet_caching.registry import Methods, bind
from unet_caching.samplers.solvers import solver

LONG = 1000     # steps of a run into which all settings fit that any run can have


@contextmanager
def as_options_error(prefix: str = "") -> Iterator[None]:
    """Raise ValueErrors as UserErrors that speak of arguments, not of the flags of commands."""
    try:
        yield
    except ValueError as error:
        words = re.sub(r"--([a-z]+(?:-[a-z]+)*)", lambda flag: flag[1].replace("-", "_"), str(error))
        raise UserError(prefix + words) from None


class ProgressBar:
    """A pipeline's `progress_bar`: the one that it had before, with a run around the loop that it counts."""

    def __init__(self, pipe: DiffusionPipeline, methods: Sequence[MethodOptions]):
        self.pipe, self.methods = pipe, methods
        self.shadowed: Any = None           # set on the object by the user; else it is the class's
        self.said: set[str] = set()         # warnings

    def __call__(self, iterable: Any = None, total: int | None = None, **others: Any) -> Any:
        loop = Loop(sys._getframe(1), self.pipe)
        own = self.shadowed or type(self.pipe).progress_bar.__get__(self.pipe)
        bar = own(iterable, **others) if total is None else own(iterable, total, **others)
        return bar if total is None and not hasattr(iterable, "__len__") else _Bar(bar, self, loop, iterable, total)

    def run(self, loop: Loop, iterable: Any, total: int | None) -> Run:
        """The run of a loop. Raises UserError for a U-Net, as it is now, that cannot be cached."""
        check(unwrapped(self.pipe.unet))
        install(self.pipe)
        unet, calls = unwrapped(self.pipe.unet), num_calls(self.pipe, loop, iterable, total)
        return Run(unet, loop, lambda: (self._plan(unet, calls), calls))

    def check(self, unet: nn.Module) -> None:
        """Refuse settings that no run can have. Raises UserError."""
        steps = calls = LONG
        methods = [replace(one, schedule="uniform", center=None, power=None) if isinstance(one, DeepCacheOptions)
                   else one for one in self.methods]            # where the full steps gather is of one run
        with as_options_error():
            for one in methods:
                if isinstance(one, ForecastOptions) and one.forecast > HIGHEST_ORDER:
                    raise ValueError(f"--forecast is an order up to {HIGHEST_ORDER}, got {one.forecast}")
                if own := one.sampling():
                    steps, calls = own["steps"], solver(own["sampler"]).calls(own["steps"])
            if any(getattr(one, name, None) for one in methods for name in ("adaptor", "adaptive")):
                return                      # they say for how many steps when they are opened
            self._checked(bind(methods, RunShape(steps, calls, *_branches(unet))), unet)

    def _plan(self, unet: nn.Module, calls: int) -> Methods:
        """What a run of so many network calls caches by. Raises UserError."""
        scheduler = getattr(self.pipe, "scheduler", None)
        plms = isinstance(scheduler, PNDMScheduler) and bool(scheduler.config.skip_prk_steps)
        steps = max(calls - plms, 1)
        with as_options_error(f"this run has {steps} steps: "):
            found = self._checked(self._clipped(RunShape(steps, calls, *_branches(unet))), unet, {"steps": steps})
        if (own := found.of(PlanMethod)) is not None:
            refuse_other_sampling(own.plan, scheduler)
        if found and calls < FEW:
            self._warn(f"this run has {calls} network calls: there is next to nothing to reuse, and each cached one "
                       "shows")
        return found

    def _clipped(self, shape: RunShape) -> Methods:
        """The plan of a run, with an interval and an order that fit into it. Raises ValueError."""
        order = max(one.forecast for one in self.methods if isinstance(one, ForecastOptions))
        for lower in range(order, -1, -1):
            try:
                found = bind([_into(one, shape.steps, lower) for one in self.methods], shape)
                break
            except ValueError:
                if lower == 0:
                    raise
        if lower < order:
            self._warn(f"this run has {shape.steps} steps, too few to forecast by order {order}: "
                       + (f"order {lower} is taken" if lower else "values are reused"))
        return found

    def _checked(self, found: Methods, unet: Any, settings: Mapping[str, Any] | None = None) -> Methods:
        """A plan that is for this U-Net, and for what is known of the run. Raises ValueError and UserError."""
        settings = dict(settings or {})
        if any(method.files for method in found.methods):
            settings["fingerprint"] = fingerprint(unet, unet.config.in_channels,
                                                  getattr(unet.config, "cross_attention_dim", None))
        found.check(settings)
        blocks = found.of(BlockCachingMethod)
        unknown = sorted(blocks.blocks.keys() - set(residual_names(unet))) if blocks else []
        if unknown:
            raise UserError(f"a block schedule for pipelines is of ResNet blocks and transformers: this U-Net has no "
                            f"{unknown[0]}")
        return found

    def _warn(self, message: str) -> None:
        """Once, whatever runs there are."""
        if message not in self.said:
            self.said.add(message)
            log.warning("%s", message)


def _branches(unet: nn.Module) -> tuple[int, int]:
    """How many branches there are, and which one is cached unless the user says otherwise."""
    branches = num_skips(unet)
    return branches, min(2 if isinstance(unet, UNet2DModel) else 1, branches - 1)


def _into(one: MethodOptions, steps: int, order: int) -> MethodOptions:
    """Options that fit into a run of so many steps. order: of forecasts."""
    if isinstance(one, DeepCacheOptions):
        return replace(one, interval=min(one.interval, steps))
    if isinstance(one, ForecastOptions):
        return replace(one, forecast=order, forecast_damping=one.forecast_damping if order else 1.0)
    return one


class _Bar:
    """A progress bar with a run inside it; whatever else it has is the bar's own."""

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
