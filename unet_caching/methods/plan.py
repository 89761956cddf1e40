"""A run as a plan: for each network call which blocks it computes, and what stands in for the others.

A call computes everything, or the blocks down to some branch b: 0..b of either side. At b it sees the level inside as
it was last computed, or as a forecast of that (forecast.py). Calls of different depths may follow each other
in any order, and several levels are held at once: a call refreshes those levels that it computes, 0..b-1, while those
from b on stay as they were.
"""

from collections.abc import Sequence
from typing import NamedTuple

from unet_caching.forecast import Forecast
from unet_caching.keep import Keep


class Call(NamedTuple):
    """What one network call does.

    branch: None computes everything; b computes down to skip b and reuses or forecasts the level inside.
    damping: a weight for each term of the forecast, as many as its order: () is reuse, (1.0,) a line. Terms for which
    the level has not been computed often enough yet have no effect.
    """
    branch: int | None = None
    damping: tuple[float, ...] = ()

    def refreshes(self, level: int) -> bool:
        """Whether the call computes the level at this skip."""
        return self.branch is None or level < self.branch


def check_calls(calls: Sequence[Call]) -> None:
    """Refuse what is no plan. Raises ValueError that says which call is wrong."""
    if not calls:
        raise ValueError("a plan needs at least one network call")
    if calls[0].branch is not None:
        raise ValueError("call 0 of a plan must compute everything: there is nothing to reuse yet")
    for step, call in enumerate(calls):
        if call.branch is not None and call.branch < 0:
            raise ValueError(f"call {step} of the plan: a branch must be 0 or more, got {call.branch}")
        if call.branch is None and call.damping:
            raise ValueError(f"call {step} of the plan computes everything: there is nothing to forecast")


class PlanCache(Keep):
    """Compute, reuse and forecast as a plan says, call by call.

    `unet(x, t, cache=cache.at(step))` runs network call `step`. Between calls one tensor is held for each level that
    some call reuses, and one more for each order of its forecasts. Raises ValueError for what is no plan; RuntimeError
    for a call that would reuse what was never computed, or that the plan does not have.
    """

    def __init__(self, calls: Sequence[Call]):
        check_calls(calls)
        self.calls = tuple(calls)
        levels = sorted({call.branch for call in calls if call.branch is not None})
        super().__init__({level: [step for step, call in enumerate(calls) if call.refreshes(level)]
                          for level in levels}, {level: _forecast(calls, level) for level in levels})

    def at(self, step: int) -> "PlanCache":
        if not 0 <= step < len(self.calls):
            raise RuntimeError(f"the plan has {len(self.calls)} network calls, and none for call {step}")
        super().at(step)
        return self


def _forecast(calls: Sequence[Call], level: int) -> Forecast:
    """What stands in for a level on the calls of a plan that reuse it; on all others nothing is asked of it."""
    damping = [call.damping if call.branch == level else () for call in calls]
    order = max(map(len, damping))
    return Forecast(order, [[*one, *[0.0] * (order - len(one))] for one in damping])
