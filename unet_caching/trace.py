"""Tells, without running the network, which values a call asks its cache for and which of them a policy reuses.

One call is traced, on the meta device where that is cheapest; any policy can then be walked over what was asked for.
All that follows from a policy's choices (multiply-accumulates, kinds of calls, pictures) needs nothing else of it.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from unet_caching.nest import Cache
from unet_caching.policy import Policy

Count = TypeVar("Count")


class Asked(NamedTuple):
    """A value that a call asks for. inner: those that computing it asks for in turn."""
    key: Hashable
    shape: torch.Size
    inner: list["Asked"]


def trace(forward: Callable[[Cache], object]) -> list[Asked]:
    """What `forward(cache)` asks its cache for, in its order."""
    found: list[Asked] = []
    inside = [found]

    def asking(key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        inside.append([])
        value = compute()
        inner = inside.pop()
        inside[-1].append(Asked(key, value.shape, inner))
        return value

    forward(asking)
    return found


def metered(forward: Callable[[Cache], object], so_far: Callable[[], Count]
            ) -> tuple[list[Asked], dict[Hashable, tuple[Count, Count]]]:
    """`trace`, and what a meter said before and after each value was computed, by its key.

    so_far: reads the meter.
    """
    counts: dict[Hashable, tuple[Count, Count]] = {}

    def with_meter(cache: Cache) -> object:
        def one(key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
            def measured() -> Tensor:
                before, value = so_far(), compute()
                counts[key] = before, so_far()
                return value
            return cache(key, measured)
        return forward(one)

    return trace(with_meter), counts


def reused(asked: list[Asked], policy: Policy, calls: int) -> Iterator[frozenset[Hashable]]:
    """The keys that each of the `calls` network calls of a run reuses, the outermost where one contains others.

    The policy, made for the meta device, is walked over stand-ins of the values, once for each of its patterns, and
    reset before and after.
    """
    def walk(level: list[Asked], cache: Cache, missed: list[Hashable]) -> None:
        for one in level:
            computed = False

            def compute(one: Asked = one) -> Tensor:
                nonlocal computed
                computed = True
                walk(one.inner, cache, missed)
                return _stand_in(one.shape)

            cache(one.key, compute)
            if not computed:
                missed.append(one.key)

    known: dict[Hashable, frozenset[Hashable]] = {}
    policy.reset()
    for step in range(calls):
        cache, pattern = policy.at(step), policy.pattern
        if pattern is None or pattern not in known:
            missed: list[Hashable] = []
            walk(asked, cache, missed)
            known[pattern] = frozenset(missed)
        yield known[pattern]
    policy.reset()


@cache
def _stand_in(shape: torch.Size) -> Tensor:
    return torch.empty(shape, device="meta")


def positions(asked: list[Asked]) -> Mapping[Hashable, Asked]:
    """Every value that is asked for, by its key."""
    found: dict[Hashable, Asked] = {}
    for one in asked:
        found[one.key] = one
        found |= positions(one.inner)
    return found
