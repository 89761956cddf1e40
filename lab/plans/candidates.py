"""The plans that a search tries for a budget, and changes of them."""

import math
import random
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from lab.fit.fit import evenly
from lab.plans.dynamic_programming import best_marks
from lab.plans.gaps import Gaps
from lab.plans.judge import Candidate, Depths, Grid
from unet_caching.methods.plan import Call
from unet_caching.samplers.timesteps import is_listed
from unet_caching.schedules import uniform

PLAN, UNIFORM, FORECAST = "plan", "DeepCache, uniform", "forecast, uniform"
FEWER, FITTED = "fewer steps", "fewer steps, fitted"
INTERVALS = (2, 3, 4, 5)    # of the uniform schedules, each with as many calls as the budget allows
STRETCH = (1.25, 1.6)       # a plan has as many calls as a uniform schedule, or so many calls for each full one
MOST_CALLS = 100
ORDER = 2                   # of the forecasts of plans; the best damping may leave little of the second term
POWERS = (1.0, 0.5, 0.0)    # powers of the weights of errors in dynamic programming (`Gaps.flattened`)


def deepcache_calls(branch: int, full_steps: Collection[int], calls: int, forecast: int = 0, damping: float = 1.0
                    ) -> list[Call]:
    """The plan that equals `unet_caching.methods.deepcache.DeepCache`. calls: network calls of the run."""
    return [Call() if step in full_steps else Call(branch, (damping,) * forecast) for step in range(calls)]


@dataclass(frozen=True)
class Prices:
    """The budget, and the costs of cached calls, in full network calls."""
    budget: float
    cached: Mapping[int, float]         # branch -> the cost of a call that computes down to it

    @property
    def cheapest(self) -> int:
        """The branch whose cached call costs least."""
        return min(self.cached, key=self.cached.__getitem__)

    def of(self, depths: Depths) -> float:
        return sum(1.0 if branch is None else self.cached[branch] for branch in depths)

    def allow(self, depths: Depths) -> bool:
        return self.of(depths) <= self.budget + 1e-9

    def full_calls(self, calls: int) -> int:
        """The most full calls of a run of `calls`, if the others are the cheapest."""
        cached = self.cached[self.cheapest]
        return min(calls, math.floor((self.budget - calls * cached) / (1 - cached) + 1e-9))

    def uniform_calls(self, interval: int) -> int:
        """The most calls of a uniform schedule within the budget."""
        calls = interval
        while calls < MOST_CALLS and self.full_calls(calls + 1) >= len(uniform(calls + 1, interval)):
            calls += 1
        return calls

    def lengths(self) -> list[int]:
        """The numbers of calls that plans of this budget may have."""
        cached = self.cached[self.cheapest]
        found = {math.floor(self.budget / ((1 - cached) / stretch + cached)) for stretch in STRETCH}
        found |= {self.uniform_calls(interval) for interval in INTERVALS}
        return sorted(calls for calls in found if self.budget < calls <= MOST_CALLS and self.full_calls(calls) >= 2)


def uniform_schedules(prices: Prices, sampler: str) -> Iterator[Candidate]:
    """The papers' uniform schedules at the cheapest branch, reused and forecast, as long as the budget allows."""
    for interval in INTERVALS:
        calls = prices.uniform_calls(interval)
        full = uniform(calls, interval)
        if len(full) > prices.full_calls(calls) or calls <= interval:
            continue
        for group, order in ((UNIFORM, 0), (FORECAST, 1), (FORECAST, 2)):
            made = tuple(deepcache_calls(prices.cheapest, full, calls, order))
            yield Candidate(group, sampler, Grid(calls), made, order)


def plans_of(gaps: Gaps, grid: Grid, prices: Prices, sampler: str) -> Iterator[Candidate]:
    """The plans over a grid: from dynamic programming, and with evenly spread full calls. All have the best damping
    and spend the rest of the budget on deeper calls."""
    calls, most = gaps.calls, prices.full_calls(gaps.calls)
    if most < 2:
        return
    found = [best_marks(gaps.flattened(power).of_gaps(prices.cheapest, coherent), most)[-1]
             for power in POWERS for coherent in (True, False)]
    found.append(evenly(calls, most))
    for full in dict.fromkeys(map(tuple, found)):
        depths = tuple(None if step in full else prices.cheapest for step in range(calls))
        depths = deepened(depths, gaps, prices, ORDER)
        yield Candidate(PLAN, sampler, grid, gaps.fitted(depths, ORDER), ORDER)


def fewer_steps(sampler: str, grid: Grid, calls: int) -> Candidate:
    """The candidate without caching over a grid. calls: of the network."""
    return Candidate(FITTED if is_listed(grid.timesteps) else FEWER, sampler, grid, (Call(),) * calls)


def deepened(depths: Depths, gaps: Gaps, prices: Prices, order: int) -> Depths:
    """Spend the rest of the budget on cached calls: those at which one level deeper saves the most error."""
    left, offers = prices.budget - prices.of(depths), []
    for level, below in pairwise(sorted(prices.cached)):
        for step, branch in enumerate(depths):
            if branch == level:
                now, then = (gaps.fit(one, step, _before(depths, step, one), order)[1] for one in (level, below))
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
    """An endless series of plans near this one, of its length and within the budget: with a full call moved, a call
    deeper or shallower, or a full call exchanged for deeper others."""
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
            found[dice.choice(full)] = prices.cheapest
        changed = tuple(found)
        if move != "depth":
            # The budget of deeper calls may be needed elsewhere now, so it is spent again.
            flat = tuple(branch if branch is None else prices.cheapest for branch in found)
            changed = deepened(flat, gaps, prices, order)
        yield changed if prices.allow(changed) else depths      # the caller counts attempts


def with_depths(candidate: Candidate, depths: Depths, gaps: Gaps, order: int) -> Candidate:
    """A plan with other depths, or another order of its forecasts, and with the best damping."""
    return replace(candidate, calls=gaps.fitted(depths, order), order=order)
