"""A run: one denoising loop, from the start to the end of its progress bar, which may also end by an exception.

It is kept in a context variable, so two threads, or two pipelines with one U-Net, never see each other's runs.
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

from unet_caching.errors import UserError
from unet_caching.nest import Cache, no_cache
from unet_caching.pipelines.cost import FULL, Meter
from unet_caching.pipelines.forward import check_container, prove
from unet_caching.pipelines.loop import Loop, Timestep
from unet_caching.pipelines.parts import Caching, residuals
from unet_caching.policy import Policy
from unet_caching.registry import Methods

log = logging.getLogger("unet_caching")
FEW = 10        # network calls: with fewer there is next to nothing to reuse
wanted: "WeakKeyDictionary[nn.Module, WeakSet]" = WeakKeyDictionary()       # U-Net -> pipelines that cache with it
_outside: "WeakKeyDictionary[DiffusionPipeline, int]" = WeakKeyDictionary()     # calls outside of progress bars
_running: ContextVar["Run | None"] = ContextVar("unet_caching_run", default=None)
# Attributes in which the attention processors of Attend-and-Excite, SAG, LEDITS++, Pix2Pix-Zero and Prompt-to-Prompt
# store their maps.
STORES = ("attnstore", "attention_store", "attention_probs", "is_pix2pix_zero", "controller")


class Stream:
    """The k-th network calls of all steps, which share a policy. Guidance by two calls per step has two features."""

    def __init__(self, policy: Policy | None):
        self.policy = policy
        self.step = -1
        self.fits: tuple | None = None
        self.kind: Hashable = FULL          # of the last call; calls of one kind compute the same

    def at(self, step: int, x: Tensor) -> Cache:
        """The cache of this step's call on x."""
        before, now = (self.step + 1, self.fits), (step, (x.shape, x.dtype, x.device))
        (self.step, self.fits), self.kind = now, FULL
        if self.policy is None:
            return no_cache
        if now == before:
            cache = self.policy.at(step)
            self.kind = cache.pattern
            return cache
        self.policy.reset()                 # nothing that fits can be reused, so this call computes everything
        try:
            self.policy.at(step)
        except RuntimeError:
            self.policy.reset()
        return self.policy


class Run:
    """One denoising loop on a U-Net, and a context in which it is the thread's run. planned: returns the methods and
    the number of network calls; called at the first network call, or before by `prepare`."""

    def __init__(self, unet: nn.Module, loop: Loop, planned: Callable[[], tuple[Methods, int]]):
        self.unet, self.loop, self.planned = unet, loop, planned
        self.plan: Methods | None = None
        self.calls = 0
        self.asked: dict[nn.Module, str] = {}
        self.streams: list[Stream] = []
        self.step, self.stream, self.others, self.differentiated = -1, 0, 0, 0
        self.time: Timestep | None = None
        self.meter: Meter | None = None
        self.thread = get_ident()

    def prepare(self) -> "Run":
        self.plan, self.calls = self.planned()
        return self

    def __enter__(self) -> "Run":
        self.outer = _running.get()
        _running.set(self)
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        if _running.get() is self:          # the run of a broken-off loop may end after the next has begun
            _running.set(self.outer)
        self.outer = None
        self.streams.clear()
        if kind is None:
            self._report()

    def _report(self) -> None:
        """Log what the run has done, and where it differed from the plan."""
        if self.others and self.step < 0:
            log.warning("nothing was cached: none of this run's %d network calls was made by the function that opened "
                        "the progress bar", self.others)
        for calls, which in ((self.step + 1 - self.calls, "beyond those planned"),
                             (self.differentiated, "with gradients")):
            if self.plan and calls > 0:
                log.warning("%d steps %s computed everything", calls, which)
        if self.meter is not None and self.plan is not None:
            settings = ", ".join(method.summary for method in self.plan.methods) or "without caching"
            log.info("%s", self.meter.report(settings))

    def next(self, args: tuple, kwargs: dict) -> Caching:
        """The caching of the loop's next network call. Raises UserError if the call cannot be cached."""
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
        cache: Cache = no_cache             # for steps beyond the plan, and for gradients, which reuse would cut off
        kind: Hashable = FULL
        if self.step < self.calls and not (torch.is_grad_enabled() and self._differentiates(args, kwargs)):
            while len(self.streams) <= self.stream:
                self.streams.append(Stream(self.plan.policy(x.device, x.dtype)))
            stream = self.streams[self.stream]
            cache, kind = stream.at(self.step, x), stream.kind
        return Caching(cache, self.asked, None if self.meter is None else self.meter.call((self.stream, x.shape), kind))

    def _begin(self, plan: Methods, x: Tensor, args: tuple, kwargs: dict) -> None:
        """Prepare what depends on the first network call."""
        policy = plan.policy("meta", x.dtype)
        if policy is not None:
            self.asked = {module: name for module, name in residuals(self.unet) if policy.owns(name)}
            for processor in (getattr(module, "processor", None) for module in self.unet.modules()):
                if any(hasattr(processor, name) for name in STORES):
                    raise UserError(f"{type(processor).__name__}s store attention maps, which are read after each "
                                    "network call: cached steps do not run the layers that make them, so switch "
                                    "caching off, or use interval=1")
            if any(name.startswith("middle_block.") for name in self.asked.values()):
                check_container("mid_block", self.unet.get_submodule("mid_block"))
        prove(self.unet, self.asked, args, kwargs)
        if log.isEnabledFor(logging.INFO):
            self.meter = Meter(self.unet)

    def _differentiates(self, args: tuple, kwargs: dict) -> bool:
        """Whether the call is part of a loss."""
        found = self.unet.training or any(getattr(value, "requires_grad", False) for value in (*args, *kwargs.values()))
        self.differentiated += found
        return found


def caching_of_call(unet: nn.Module, args: tuple, kwargs: dict) -> Caching | None:
    """The caching of a U-Net's call that is made one frame up; None if the call is not a step of a run."""
    run, frame = _running.get(), sys._getframe(1)
    if run is None or run.unet is not unet or run.thread != get_ident():
        _count_outside(unet, frame)
        return None
    if not run.loop.makes(frame):
        run.others += 1
        return None
    return run.next(args, kwargs)


def _count_outside(unet: nn.Module, frame: FrameType | None) -> None:
    """Warn if a pipeline with caching on often calls its network outside of its progress bar."""
    while frame is not None:
        pipe = frame.f_locals.get("self") if frame.f_code.co_name == "__call__" else None
        if isinstance(pipe, DiffusionPipeline) and pipe in wanted.get(unet, ()):
            _outside[pipe] = _outside.get(pipe, 0) + 1
            if _outside[pipe] == FEW:
                log.warning("%d network calls of a %s were made outside of its progress bar, and computed everything",
                            FEW, type(pipe).__name__)
            return
        frame = frame.f_back


def refresh_deepcache() -> None:
    """Make the next network call of this thread's run compute everything, for a callback that changes the prompt, say.
    """
    run = _running.get()
    for stream in () if run is None else run.streams:
        stream.fits = None
