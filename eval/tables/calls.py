"""What each network call of a run computes, reuses and forecasts, for pictures."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from run.spec import Run
from unet_caching.keep import Keep
from unet_caching.policy import Policy
from unet_caching.trace import Asked

COMPUTED, REUSED, FORECAST = "computed", "reused", "forecast"


@dataclass(frozen=True)
class Calls:
    """states: of each part of the U-Net in each network call, [parts][calls]. parts: from the outermost in."""
    parts: list[str]
    states: list[list[str]]

    @property
    def full(self) -> list[int]:
        """The calls that compute everything."""
        return [step for step, column in enumerate(zip(*self.states, strict=True)) if set(column) == {COMPUTED}]


def calls_of(run: Run) -> Calls:
    """The calls of a run. The parts are the residuals if a run reuses single residuals, else the blocks of each skip.

    The value that skip k concatenates contains all blocks further in: if it is reused, they are not computed.
    """
    policy, met, around = run.caching.policy("meta", run.dtype), run.reused, dict(_around(run.trace))
    ahead = list(_forecasts(met, around, policy))
    levels = run.unet.num_branches
    parts: dict[str, frozenset[Hashable]] = {
        **{f"blocks of skip {level}": frozenset(range(level)) for level in range(levels)},
        "middle": frozenset(range(levels))}
    if any(isinstance(key, str) for keys in met for key in keys):
        parts = {key: inside | {key} for key, inside in around.items() if isinstance(key, str)}
    states = [[COMPUTED if not (known := inside & keys) else FORECAST if known & forecast else REUSED
               for keys, forecast in zip(met, ahead, strict=True)] for inside in parts.values()]
    return Calls(list(parts), states)


def _around(asked: Sequence[Asked], outer: frozenset[Hashable] = frozenset()
            ) -> Iterator[tuple[Hashable, frozenset[Hashable]]]:
    """The key of every value that a call asks its cache for, and the keys of the values around it."""
    for one in asked:
        yield one.key, outer
        yield from _around(one.inner, outer | {one.key})


def _forecasts(met: Sequence[frozenset[Hashable]], around: Mapping[Hashable, frozenset[Hashable]],
               policy: Policy | None) -> Iterator[set[Hashable]]:
    """For each call, the reused values that are extrapolated: the ones that were computed at least twice before."""
    held = policy.held if isinstance(policy, Keep) else {}
    before = dict.fromkeys(around, 0)
    for step, keys in enumerate(met):
        yield {key for key in keys if before[key] > 1 and key in held and held[key].forecast.extrapolates(step)}
        for key, inside in around.items():
            before[key] += not keys & (inside | {key})
