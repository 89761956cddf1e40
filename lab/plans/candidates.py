"""The plans that a search tries for a budget, and how they are changed to better ones."""

import math
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from lab.plans.dynamic_programming import best_marks
from lab.plans.gaps import Gaps
from lab.plans.judge import Candidate, Grid
from unet_caching.methods.plan import Call
from unet_caching.samplers.ddim import is_listed
from unet_caching.schedules import uniform

Depths = tuple[int | None, ...]         # the branch of each call; None computes everything
PLAN, UNIFORM, FORECAST = "plan", "DeepCache, uniform", "forecast, uniform"
FEWER, FITTED = "fewer steps", "fewer steps, fitted"
INTERVALS = (2, 3, 4, 5)    # of the uniform schedules, each with as many calls as the budget pays for
STRETCH = (1.25, 1.6)       # plans have as many calls as those, or so many times as many full ones as the budget
MOST_CALLS = 100
ORDER = 2                   # of the forecasts of plans; the damping that fits may leave little of the second term
POWERS = (1.0, 0.5, 0.0)    # how much dynamic programming believes of what errors do to the image


def deepcache_calls(branch: int, full_steps: Collection[int], calls: int, forecast: int = 0, damping: float = 1.0
                    ) -> list[Call]:
    """The plan that does what `unet_caching.methods.deepcache.DeepCache` does. calls: network calls of the run."""
    return [Call() if step in full_steps else Call(branch, (damping,) * forecast) for step in range(calls)]


@dataclass(frozen=True)
class Prices:
    """The budget, and the costs of cached calls, in full network calls.

    cached: branch -> the cost of a call that computes down to it.
    """
    budget: float
    cached: Mapping[int, float]

    def of(self, depths: Sequence[int | None]) -> float:
        return sum(1.0 if branch is None else self.cached[branch] for branch in depths)

    def allow(self, depths: Sequence[int | None]) -> bool:
        return self.of(depths) <= self.budget + 1e-9

    def full_calls(self, calls: int, branch: int) -> int:
        """How many of so many calls can be full where the others compute down to a branch."""
        cached = self.cached[branch]
        return min(calls, math.floor((self.budget - calls * cached) / (1 - cached) + 1e-9))


@dataclass(frozen=True)
class Trial:
    """A candidate with where it comes from. kind: what a report calls it. order: of its forecasts."""
    kind: str
    run: Candidate
    order: int

    @property
    def group(self) -> str:
        """What it is compared among at first: fewer steps of all samplers are one group, and those fitted another."""
        return next((group for group in (FITTED, FEWER) if self.kind.startswith(group)), self.kind)

    @property
    def depths(self) -> Depths:
        return tuple(call.branch for call in self.run.calls)

    def on(self, sampler: str) -> "Trial":
        """The same with another sampler."""
        kind = self.kind.replace(self.run.sampler, sampler) if self.group in (FEWER, FITTED) else self.kind
        return replace(self, kind=kind, run=self.run._replace(sampler=sampler))


def uniform_calls(prices: Prices, interval: int, branch: int) -> int:
    """The most calls of a uniform schedule that the budget pays for."""
    calls = interval
    while calls < MOST_CALLS and prices.full_calls(calls + 1, branch) >= len(uniform(calls + 1, interval)):
        calls += 1
    return calls


def lengths(prices: Prices) -> list[int]:
    """The numbers of calls that plans of this budget may have."""
    branch = min(prices.cached, key=prices.cached.__getitem__)
    cheapest = prices.cached[branch]
    found = {math.floor(prices.budget / ((1 - cheapest) / stretch + cheapest)) for stretch in STRETCH}
    found |= {uniform_calls(prices, interval, branch) for interval in INTERVALS}
    return sorted(calls for calls in found if prices.budget < calls <= MOST_CALLS
                  and prices.full_calls(calls, branch) >= 2)


def with_full_calls(full: Sequence[int], calls: int, branch: int) -> Depths:
    """So many calls of which some are full, and all others compute down to a branch."""
    return tuple(None if step in set(full) else branch for step in range(calls))


def uniform_trials(prices: Prices, sampler: str) -> Iterator[Trial]:
    """The papers' uniform schedules at the cheapest branch, reused and forecast, as long as the budget allows."""
    branch = min(prices.cached, key=prices.cached.__getitem__)
    for interval in INTERVALS:
        calls = uniform_calls(prices, interval, branch)
        full = uniform(calls, interval)
        if len(full) > prices.full_calls(calls, branch) or calls <= interval:
            continue
        for kind, order in ((UNIFORM, 0), (FORECAST, 1), (FORECAST, 2)):
            made = tuple(deepcache_calls(branch, full, calls, order))
            yield Trial(kind, Candidate(sampler, Grid(calls), made), order)


def plans_of(gaps: Gaps, grid: Grid, prices: Prices, sampler: str) -> Iterator[Trial]:
    """The plans over some steps: those that dynamic programming finds, and full calls evenly spread, both with
    the damping that fits best, and what is left of the budget spent on deeper calls."""
    calls, branch = gaps.calls, min(prices.cached, key=prices.cached.__getitem__)
    most = prices.full_calls(calls, branch)
    if most < 2:
        return
    found = [best_marks(gaps.flattened(power).of_gaps(branch, coherent), most)[-1]
             for power in POWERS for coherent in (True, False)]
    found.append([step * calls // most for step in range(most)])
    for depths in dict.fromkeys(with_full_calls(full, calls, branch) for full in found):
        depths = deepened(depths, gaps, prices, ORDER)
        yield Trial(PLAN, Candidate(sampler, grid, gaps.fitted(depths, ORDER)), ORDER)


def fewer_steps(sampler: str, grid: Grid, calls: int) -> Trial:
    """Such steps without caching. calls: of the network."""
    kind = FITTED if is_listed(grid.timesteps) else FEWER
    return Trial(f"{kind}, {sampler}", Candidate(sampler, grid, (Call(),) * calls), 0)


def deepened(depths: Depths, gaps: Gaps, prices: Prices, order: int) -> Depths:
    """Spend what is left of the budget on cached calls, where one level deeper saves the most error for its price."""
    branches, left = sorted(prices.cached), prices.budget - prices.of(depths)
    deeper = dict(pairwise(branches))
    offers = []
    for level, below in deeper.items():
        for step, branch in enumerate(depths):
            if branch == level:
                _, now = gaps.fit(level, step, _before(depths, step, level), order)
                _, then = gaps.fit(below, step, _before(depths, step, below), order)
                price = prices.cached[below] - prices.cached[level]
                offers.append(((now ** 2 - then ** 2) / price, price, step, below))
    found = list(depths)
    for gain, price, step, below in sorted(offers, reverse=True):
        if gain > 0 and price <= left + 1e-9:
            found[step], left = below, left - price
    return tuple(found)


def _before(depths: Depths, step: int, level: int) -> list[int]:
    """The calls before a step that compute a level, the latest first."""
    return [s for s in range(step - 1, -1, -1) if Call(depths[s]).refreshes(level)]


def neighbours(depths: Depths, gaps: Gaps, prices: Prices, order: int, dice: random.Random) -> Iterator[Depths]:
    """Plans of the same length near this one and within the budget, without end: a full call moved, some call deeper or
    shallower, a full call given up for deeper others."""
    cheapest = min(prices.cached, key=prices.cached.__getitem__)
    full = [step for step, branch in enumerate(depths) if branch is None and step]
    cached = [step for step, branch in enumerate(depths) if branch is not None]
    while full and cached:
        found = list(depths)
        move = dice.choice(("by one", "by one", "by one", "anywhere", "depth", "traded"))
        if move == "by one":
            step = dice.choice(full)
            other = step + dice.choice((-2, -1, 1, 2))
            if 0 < other < len(found):
                found[step], found[other] = found[other], found[step]
        elif move == "anywhere":
            step, other = dice.choice(full), dice.choice(cached)
            found[step], found[other] = found[other], found[step]
        elif move == "depth":
            found[dice.choice(cached)] = dice.choice(sorted(prices.cached))
        else:
            found[dice.choice(full)] = cheapest
        if move != "depth":
            # What deeper calls cost may be needed elsewhere now: it is given out anew.
            found = [branch if branch is None else cheapest for branch in found]
        changed = tuple(found) if move == "depth" else deepened(tuple(found), gaps, prices, order)
        yield changed if prices.allow(changed) else depths      # the caller counts attempts
