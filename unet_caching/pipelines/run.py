"""A run: one denoising loop, from where it opens its progress bar to where it closes it, by an exception too.

The run is kept in a context variable of the thread that runs the loop: two threads, or two pipelines on one U-Net,
never see each other's. A pipeline that runs inside a callback of another has a run of its own, within the outer one.
"""

import logging
import sys
from collections.abc import Callable
from contextvars import ContextVar
from threading import get_ident
from types import FrameType
from typing import Any, NamedTuple

from torch import Tensor, nn

from unet_caching.nest import Cache, no_cache
from unet_caching.pipelines.kinds import prove
from unet_caching.pipelines.loop import Loop, Timestep
from unet_caching.pipelines.parts import Caching, residual_names
from unet_caching.policy import Policy

log = logging.getLogger("unet_caching")
_running: ContextVar["Run | None"] = ContextVar("unet_caching_run", default=None)


class Stream:
    """The k-th network calls of all steps, which share a policy: guidance by two calls of a step has two features."""

    def __init__(self, policy: Policy | None):
        self.policy = policy
        self.step = -1
        self.fits: tuple | None = None

    def at(self, step: int, x: Tensor) -> Cache:
        """What the call of this step, on x, is given as its cache."""
        if self.policy is None:
            return no_cache
        fits = x.shape, x.dtype, x.device
        goes_on = step == self.step + 1 and self.fits in (None, fits)
        self.step, self.fits = step, fits
        if goes_on:
            return self.policy.at(step)
        self.policy.reset()                 # nothing to reuse, or nothing that fits: computed, whatever was planned
        try:
            self.policy.at(step)
        except RuntimeError:
            self.policy.reset()
        return self.policy


class Plan(NamedTuple):
    """What a run caches by.

    calls: how many steps it is planned for. make: a fresh policy for tensors like one. tell: says what the run does,
    given the arguments of its first network call.
    """
    calls: int
    make: Callable[[Tensor], Policy | None]
    tell: Callable[[tuple, dict], None]


class Run:
    """One denoising loop on a U-Net; a context manager, inside which it is the thread's.

    planned: raises UserError for a schedule that the run does not have. It is asked at the first network call, before
    it computes anything, or ahead of that by `prepare`.
    """

    def __init__(self, unet: nn.Module, loop: Loop, planned: Callable[[], Plan]):
        self.unet, self.loop, self.planned = unet, loop, planned
        self.plan: Plan | None = None
        self.asked: frozenset[str] = frozenset()
        self.streams: list[Stream] = []
        self.step, self.stream, self.others = -1, 0, 0
        self.time: Timestep | None = None
        self.thread = get_ident()

    def prepare(self) -> "Run":
        """Plan it."""
        self.plan = self.planned()
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
        if kind is None and self.others and self.step < 0:
            log.warning("nothing was cached: none of the %d network calls of this run was made by the function that "
                        "opened the progress bar", self.others)

    def next(self, args: tuple, kwargs: dict) -> Caching:
        """What the next network call of the loop is given to cache by."""
        x, time = argument(args, kwargs, 0, "sample"), Timestep(argument(args, kwargs, 1, "timestep"))
        plan = self.plan or self.planned()
        if self.step < 0:
            prove(self.unet, frozenset(), args, kwargs)
            plan.tell(args, kwargs)
        self.plan = plan
        if self.time is None or not time.same(self.time):
            self.step, self.stream, self.time = self.step + 1, 0, time
        else:
            self.stream += 1
        if self.step >= plan.calls:
            return Caching(no_cache)        # more steps than it was planned for
        if self.stream == len(self.streams):
            self.streams.append(Stream(plan.make(x)))
            self.asked = residuals_of(self.streams[-1].policy, self.unet)
        return Caching(self.streams[self.stream].at(self.step, x), self.asked)


def residuals_of(policy: Policy | None, unet: nn.Module) -> frozenset[str]:
    """The residuals of a U-Net that a policy may keep."""
    return frozenset(name for name in residual_names(unet) if policy is not None and policy.owns(name))


def caching_of_call(unet: nn.Module, args: tuple, kwargs: dict) -> Caching | None:
    """What a call of the U-Net, made one frame up, is given to cache by; None where it is no step of a run on it."""
    run = _running.get()
    if run is None or run.unet is not unet or run.thread != get_ident():
        return None
    frame: FrameType = sys._getframe(1)
    if not run.loop.makes(frame):
        run.others += 1
        return None
    return run.next(args, kwargs)


def argument(args: tuple, kwargs: dict, place: int, name: str) -> Any:
    """An argument of a call, given by place or by name."""
    return args[place] if len(args) > place else kwargs[name]


