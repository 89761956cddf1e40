"""A run as a plan: for each network call which blocks it computes, and what stands in for the others.

A call computes everything, or the blocks down to some branch b: 0..b of either side. At b it sees the level inside as
it was last computed, or as a forecast of that (forecast.py). Calls of different depths may follow each other
in any order, and several levels are held at once: a call refreshes those levels that it computes, 0..b-1, while those
from b on stay as they were. DeepCache's schedules are the plans of one branch (`deepcache_calls`).
"""

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from unet_caching.forecast import Forecast, History, forecast, on_device
from unet_caching.policy import Policy


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


def deepcache_calls(branch: int, full_steps: Collection[int], calls: int, forecast: int = 0, damping: float = 1.0
                    ) -> list[Call]:
    """The plan that does what `unet_caching.methods.deepcache.DeepCache` does. calls: network calls of the run."""
    return [Call() if step in full_steps else Call(branch, (damping,) * forecast) for step in range(calls)]


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


class PlanCache(Policy):
    """Compute, reuse and forecast as a plan says, call by call.

    `unet(x, t, cache=cache.at(step))` runs network call `step`. Between calls one tensor is held for each level that
    some call reuses, and one more for each order of its forecasts. Raises ValueError for what is no plan; RuntimeError
    for a call that would reuse what was never computed.
    """

    def __init__(self, calls: Sequence[Call]):
        check_calls(calls)
        self.calls = tuple(calls)
        self.histories: dict[int, History] = {}
        self.forecasts: dict[int, Forecast] = {}
        for level in sorted({call.branch for call in calls if call.branch is not None}):
            at_level = [call.damping if call.branch == level else () for call in calls]
            order = max(map(len, at_level))
            self.histories[level] = History(order)
            self.forecasts[level] = Forecast(order, [[*given, *[0.0] * (order - len(given))] for given in at_level])
        self.reset()

    def reset(self) -> None:
        """Let go of all values, after the last call of a batch."""
        self.values: dict[Hashable, Tensor] = {}        # before the call, and those that it computes: apart, so that
        self.computed: dict[Hashable, Tensor] = {}      # compiled networks see the same of both on every call
        self.weights: Tensor | None = None              # [order of the level]
        self.branch: int | None = None
        for history in self.histories.values():
            history.reset()

    def owns(self, key: Hashable) -> bool:
        return key in self.histories

    def at(self, step: int) -> "PlanCache":
        """Choose what the next network call does: plain values and tensors, set outside any compiled region."""
        if not 0 <= step < len(self.calls):
            raise RuntimeError(f"the plan has {len(self.calls)} network calls, and none for call {step}")
        self._settle()
        call = self.calls[step]
        self.branch, self.weights = call.branch, None
        for level, history in self.histories.items():
            if call.refreshes(level):
                history.before_full(step, self.values.get(level))
        if self.branch is not None:
            if self.branch not in self.values:
                raise RuntimeError(f"call {step} is to reuse the level at branch {self.branch}, which has not been "
                                   "computed since the start, or the U-Net does not have it")
            self._look_ahead(step, self.branch)
        return self

    def _look_ahead(self, step: int, level: int) -> None:
        history = self.histories[level]
        if history.order:
            history.before_cached(self.values[level])
            self.weights = on_device(self.forecasts[level].weights(step, history.steps), self.values[level])

    def __call__(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        if key == self.branch and self.branch is not None:
            return self._reuse(self.branch)
        value = compute()
        if key in self.histories:
            self.computed[key] = value
        return value

    def _settle(self) -> None:
        self.values |= self.computed
        self.computed = {}

    def _reuse(self, level: int) -> Tensor:
        value = self.values[level]
        return value if self.weights is None else forecast(value, self.histories[level].older, self.weights)

    @property
    def pattern(self) -> Hashable:
        """Equal for calls that compute, keep and reuse the same."""
        levels = tuple((level, history.order) for level, history in self.histories.items())
        return type(self).__name__, levels, self.branch

    @property
    def kept(self) -> dict[Hashable, Tensor]:
        """What is kept between calls, by level and, for older values, age; the weights of the call's forecast.

        To assign to it puts other tensors in its place.
        """
        self._settle()
        found: dict[Hashable, Tensor] = {}
        for level, history in self.histories.items():
            found |= history.kept(level)
            if level in self.values:
                found[level] = self.values[level]
        return found if self.weights is None else found | {(self.branch, "weights"): self.weights}

    @kept.setter
    def kept(self, values: Mapping[Hashable, Tensor]) -> None:
        self.computed = {}
        self.values = {level: values[level] for level in self.histories if level in values}
        self.weights = values.get((self.branch, "weights"))
        for level, history in self.histories.items():
            history.put(level, values)
