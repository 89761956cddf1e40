"""Find out which values a network call asks its cache for, and which of them a policy reuses, without sampling.

One call is traced, best on the meta device. Any policy can then be tried on the traced values. Everything that follows
from a policy's choices (multiply-accumulates, kinds of calls, pictures) is derived from that.
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
    """A value that a call asks its cache for. inner: the values that computing it asks for in turn."""
    key: Hashable
    shape: torch.Size
    inner: list["Asked"]


def trace(forward: Callable[[Cache], object]) -> list[Asked]:
    """The values that `forward(cache)` asks its cache for, in order."""
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
    """`trace`, and the readings of a meter before and after each value is computed, by key.

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
    """The keys that each of the `calls` network calls of a run reuses. Of nested values only the outermost is listed.

    The policy, made for the meta device, is tried on stand-ins of the values, once for each of its patterns. It is
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
    """All traced values by key, inner ones included."""
    found: dict[Hashable, Asked] = {}
    for one in asked:
        found[one.key] = one
        found |= positions(one.inner)
    return found
