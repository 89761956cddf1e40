"""A run: one denoising loop, from where it opens its progress bar to where it closes it, by an exception too.

The run is kept in a context variable of the thread that runs the loop: two threads, or two pipelines on one U-Net,
never see each other's. A pipeline that runs inside a callback of another has a run of its own, within the outer one.
"""

import logging
import sys
from collections.abc import Callable, Hashable
from contextvars import ContextVar
from threading import get_ident
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from unet_caching.errors import UserError, as_user_error
from unet_caching.nest import Cache, no_cache
from unet_caching.options import Method
from unet_caching.pipelines.containers import check_containers
from unet_caching.pipelines.cost import FULL, Meter
from unet_caching.pipelines.kinds import prove
from unet_caching.pipelines.loop import Loop, Timestep
from unet_caching.pipelines.parts import Caching, residual_names
from unet_caching.policy import Policy
from unet_caching.registry import Methods

log = logging.getLogger("unet_caching")
FEW = 10        # network calls: in less there is next to nothing to reuse
wanted: "WeakKeyDictionary[nn.Module, WeakSet]" = WeakKeyDictionary()       # U-Net -> pipelines that cache with it
_outside: "WeakKeyDictionary[DiffusionPipeline, tuple[int, int]]" = WeakKeyDictionary()     # their call, how often
_running: ContextVar["Run | None"] = ContextVar("unet_caching_run", default=None)
# By these attributes attention processors store maps, which a pipeline reads in the same step: those of
# Attend-and-Excite, Self-Attention Guidance, LEDITS++, Pix2Pix-Zero and Prompt-to-Prompt.
STORES = ("attnstore", "attention_store", "attention_probs", "is_pix2pix_zero", "controller")


class Stream:
    """The k-th network calls of all steps, which share a policy: guidance by two calls of a step has two features."""

    def __init__(self, policy: Policy | None):
        self.policy = policy
        self.step = -1
        self.fits: tuple | None = None
        self.fresh = True                   # whether the last call had nothing to reuse

    def at(self, step: int, x: Tensor) -> Cache:
        """What the call of this step, on x, is given as its cache."""
        fits = x.shape, x.dtype, x.device
        self.fresh = step != self.step + 1 or self.fits != fits
        self.step, self.fits = step, fits
        if self.policy is None:
            return no_cache
        if not self.fresh:
            return self.policy.at(step)
        self.policy.reset()                 # nothing to reuse, or nothing that fits: computed, whatever was planned
        try:
            self.policy.at(step)
        except RuntimeError:
            self.policy.reset()
        return self.policy


class Run:
    """One denoising loop on a U-Net; a context manager, inside which it is the thread's.

    planned: what it caches by, and for how many steps. Raises UserError for a schedule that the run does not have. It
    is asked at the first network call, before it computes anything, or ahead of that by `prepare`.
    """

    def __init__(self, unet: nn.Module, loop: Loop, planned: Callable[[], tuple[Methods, int]]):
        self.unet, self.loop, self.planned = unet, loop, planned
        self.plan: Methods | None = None
        self.calls = 0
        self.asked: frozenset[str] = frozenset()
        self.streams: list[Stream] = []
        self.step, self.stream, self.others, self.differentiated = -1, 0, 0, 0
        self.time: Timestep | None = None
        self.channels: dict[Hashable, int] | None = None        # of what is cached, until that was checked
        self.meter: Meter | None = None
        self.thread = get_ident()

    def prepare(self) -> "Run":
        """Plan it."""
        self.plan, self.calls = self.planned()
        return self

    def __enter__(self) -> "Run":
        self.outer = _running.get()
        _running.set(self)
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        if _running.get() is self:          # a run in a loop that was broken off may end after the next has begun
            _running.set(self.outer)
        self.outer = None
        self.streams.clear()
        if kind is None:
            self._report()

    def _report(self) -> None:
        """Say what the run has done, and what of it was not as planned."""
        if self.others and self.step < 0:
            log.warning("nothing was cached: none of the %d network calls of this run was made by the function that "
                        "opened the progress bar", self.others)
        if self.plan and self.step >= self.calls:
            log.warning("the last %d of %d steps were not planned for, and computed everything",
                        self.step + 1 - self.calls, self.step + 1)
        if self.plan and self.differentiated:
            log.warning("%d network calls with gradients computed everything", self.differentiated)
        if self.meter is not None and self.plan is not None:
            settings = ", ".join(method.summary for method in self.plan.methods) or "without caching"
            log.info("%s", self.meter.report(settings))

    def next(self, args: tuple, kwargs: dict) -> Caching:
        """What the next network call of the loop is given to cache by. Raises UserError where it cannot be cached."""
        x, time = args[0] if args else kwargs["sample"], Timestep(args[1] if len(args) > 1 else kwargs["timestep"])
        if self.plan is None:
            self.prepare()
        assert self.plan is not None
        if self.step < 0:
            self._begin(self.plan, x, args, kwargs)
        if self.time is None or not time.same(self.time):
            self.step, self.stream, self.time = self.step + 1, 0, time
        else:
            self.stream += 1
        if self.step >= self.calls or (torch.is_grad_enabled() and self._differentiates(args, kwargs)):
            meter = None if self.meter is None else self.meter.call((self.stream, x.shape), FULL)
            return Caching(no_cache, self.asked, meter)
        while len(self.streams) <= self.stream:
            self.streams.append(Stream(self.plan.policy(x.device, x.dtype)))
        stream = self.streams[self.stream]
        cache = stream.at(self.step, x)
        if self.channels is not None:
            cache = self._checked(self.plan, self.channels, cache)
        if self.meter is None:
            return Caching(cache, self.asked)
        kind = FULL if stream.fresh or stream.policy is None else stream.policy.pattern
        return Caching(cache, self.asked, self.meter.call((self.stream, x.shape), kind))

    def _begin(self, plan: Methods, x: Tensor, args: tuple, kwargs: dict) -> None:
        """What is known at the first network call alone."""
        policy = plan.policy("meta", x.dtype)
        if policy is not None:
            self.asked = frozenset(name for name in residual_names(self.unet) if policy.owns(name))
            stores = next((type(module.processor).__name__ for module in self.unet.modules()
                           if any(hasattr(getattr(module, "processor", None), name) for name in STORES)), None)
            if stores is not None:
                raise UserError(f"{stores}s store attention maps, which are read after each network call: cached steps "
                                "do not run the layers that make them. Switch caching off, or use interval=1")
            check_containers(self.unet, any(name.startswith("middle_block.") for name in self.asked))
            if any(type(method).check_network is not Method.check_network for method in plan.methods):
                self.channels = {}
        prove(self.unet, self.asked, args, kwargs)
        if log.isEnabledFor(logging.INFO):
            self.meter = Meter(self.unet)

    def _checked(self, plan: Methods, channels: dict[Hashable, int], cache: Cache) -> Cache:
        """Note the channels of all that the first call caches, and check them before the next one."""
        if channels:
            self.channels = None
            with as_user_error():
                plan.check_network(channels)
            return cache

        def noted(key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
            value = cache(key, compute)
            channels[key] = value.shape[1 if value.ndim > 3 else -1]
            return value
        return noted

    def _differentiates(self, args: tuple, kwargs: dict) -> bool:
        """Whether a loss goes through this call, which must not end at what is reused."""
        found = self.unet.training or any(isinstance(value, Tensor) and value.requires_grad
                                          for value in (*args, *kwargs.values()))
        self.differentiated += found
        return found


def caching_of_call(unet: nn.Module, args: tuple, kwargs: dict) -> Caching | None:
    """What a call of the U-Net, made one frame up, is given to cache by; None where it is no step of a run on it."""
    run, frame = _running.get(), sys._getframe(1)
    if run is None:
        _count_outside(unet, frame)
    if run is None or run.unet is not unet or run.thread != get_ident():
        return None
    if not run.loop.makes(frame):
        run.others += 1
        return None
    return run.next(args, kwargs)


def _count_outside(unet: nn.Module, frame: FrameType | None) -> None:
    """Warn where a pipeline with caching on calls its network time and again, and not in its progress bar."""
    while frame is not None:
        pipe = frame.f_locals.get("self") if frame.f_code.co_name == "__call__" else None
        if isinstance(pipe, DiffusionPipeline) and pipe in wanted.get(unet, ()):
            call, times = _outside.get(pipe, (0, 0))
            _outside[pipe] = id(frame), times + 1 if call == id(frame) else 1
            if _outside[pipe][1] == FEW:
                log.warning("nothing was cached: a %s calls its U-Net outside of its progress bar", type(pipe).__name__)
            return
        frame = frame.f_back


def recompute(unet: nn.Module) -> None:
    """Let the next network call of this thread's run on a U-Net reuse nothing."""
    run = _running.get()
    while run is not None:
        if run.unet is unet:
            for stream in run.streams:
                stream.fits = None
        run = run.outer
