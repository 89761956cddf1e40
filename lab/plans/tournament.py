"""Finds the best plan for a budget: by real runs of ever fewer candidates on ever more seeds (successive halving,
Jamieson and Talwalkar, arXiv 1502.07943), then by small changes of the best. The result depends only on the arguments
and the measurements. So a search that was killed, or that runs in several processes, finds the same plan.
"""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from lab.plans.candidates import (
    FITTED,
    INTERVALS,
    PLAN,
    POWERS,
    Prices,
    fewer_steps,
    neighbours,
    plans_of,
    uniform_schedules,
    with_depths,
)
from lab.plans.gaps import GapMeasurements, Gaps
from lab.plans.judge import CONVERGED, Candidate, Depths, Grid, Judge
from lab.plans.timesteps import RULES, Rule, trajectory

BELOW = 3           # numbers of steps to try, from the budget's down: more steps are not always better
GRIDS = 3           # the timesteps of plans: trailing, and fitted by the two best rules
GROUPS = 4          # groups of candidates, without plans
OFFERS = 6          # changes that are compared by their gaps' errors, for each that is run


@dataclass
class Tournament:
    """Compares candidates for a budget on some seeds."""
    judge: Judge
    measured: GapMeasurements
    prices: Prices
    samplers: Sequence[str]         # plans are first run with only one of them
    seeds: Sequence[int]            # to learn from
    attempts: int = 48              # changes of the best plan to run
    at_once: int = 8                # changes of one plan before the best of them is chosen
    rungs: Sequence[int] = (16, 6, 3, 2)        # plans to keep after each rung; the last rung has all seeds
    first: list[tuple[Candidate, float]] = field(default_factory=list)      # candidates and means of the first rung
    _fitted: dict[Rule, list[str]] = field(default_factory=dict)

    def sizes(self) -> list[int]:
        """The number of seeds of each rung, twice as many as of the rung before."""
        return [max(min(4, len(self.seeds)), len(self.seeds) >> back) for back in reversed(range(len(self.rungs)))]

    @property
    def few(self) -> int:
        """The number of seeds on which a change is first tried."""
        return self.sizes()[-2] if len(self.rungs) > 1 else len(self.seeds)

    def network_calls(self) -> int:
        """The most full network calls that `run` makes."""
        lengths = self.prices.lengths()
        count = (BELOW * len(self.samplers) + len(RULES) + 3 * len(INTERVALS)
                 + GRIDS * len(lengths) * (2 * len(POWERS) + 1))
        relatives = self.rungs[0] // 4 + 2 * len(self.samplers)
        images, before = len(RULES) * self.few + relatives * len(self.seeds), 0
        for seeds, kept in zip(self.sizes(), self.rungs, strict=True):
            images += count * (seeds - before)
            count, before = kept + GROUPS * max(1, kept // 4), seeds
        rounds = -(-self.attempts // self.at_once)
        images += rounds * (self.at_once * self.few + 2 * len(self.seeds))
        measured = len(self.measured.seeds) * self.judge.distances.run.calls
        return round(images * self.prices.budget) + measured + self.measured.network_calls(GRIDS * lengths)

    def run(self) -> list[Candidate]:
        """The best of each group without a search, then the best plans: as found, and improved."""
        lengths, prices = self.prices.lengths(), self.prices
        self.trajectory = trajectory(self.judge, self.measured.seeds)
        fitted = {rule: self.fitted(rule, int(prices.budget)) for rule in RULES}
        grids = [Grid(calls) for calls in lengths]
        for rule in self.best_rules(fitted)[:GRIDS - 1]:
            grids += filter(None, (self.fitted(rule, calls) for calls in lengths))
        self.measured.measure(grids)
        self.gaps: dict[Grid, Gaps] = {grid: self.measured.of(grid) for grid in grids}
        found = [*self.without_caching(), *self.fewer_fitted(fitted.values()), *uniform_schedules(prices, CONVERGED),
                 *(plan for grid in grids for plan in plans_of(self.gaps[grid], grid, prices, CONVERGED))]
        for number, (seeds, kept) in enumerate(zip(self.sizes(), self.rungs, strict=True)):
            if number == 1:
                found = list(dict.fromkeys([*found, *self.relatives(found)]))
            found = self.best(found, self.seeds[:seeds], kept)
        plans = [one for one in found if one.group == PLAN]
        others = {one.group: one for one in reversed(found) if one.group != PLAN}
        return [*others.values(), *dict.fromkeys([*plans, *(self.improved(plan) for plan in plans[:1])])]

    def without_caching(self) -> Iterator[Candidate]:
        """Fewer steps, for each sampler as many as the budget allows, and a few less."""
        for sampler in self.samplers:
            calls = ((steps, self.judge.calls(sampler, Grid(steps)))
                     for steps in range(int(self.prices.budget + 1e-9), 0, -1))
            paid = ((steps, n) for steps, n in calls if n is not None and n <= self.prices.budget + 1e-9)
            for steps, n in islice(paid, BELOW):
                yield fewer_steps(sampler, Grid(steps), n)

    def fitted(self, rule: Rule, steps: int) -> Grid | None:
        """A grid of fitted timesteps; None if the converged run has too few to choose from."""
        if rule not in self._fitted:
            most = max(int(self.prices.budget), *self.prices.lengths(), 1)
            self._fitted[rule] = self.trajectory.fitted(rule, most)
        return Grid(steps, self._fitted[rule][steps - 1]) if steps <= len(self._fitted[rule]) else None

    def fewer_fitted(self, grids: Iterable[Grid | None]) -> Iterator[Candidate]:
        """Fewer steps without caching, at fitted timesteps."""
        for grid in dict.fromkeys(filter(None, grids)):
            yield fewer_steps(CONVERGED, grid, grid.steps)

    def best_rules(self, fitted: Mapping[Rule, Grid | None]) -> list[Rule]:
        """The rules of fitted timesteps, the one whose runs without caching are nearest first."""
        runs = {rule: fewer_steps(CONVERGED, grid, grid.steps) for rule, grid in fitted.items() if grid is not None}
        found = self.judge.measure(list(runs.values()), self.seeds[:self.few], "fitted timesteps")
        means = {rule: psnr.mean() for rule, psnr in zip(runs, found, strict=True)}
        return sorted(means, key=lambda rule: -means[rule])

    def relatives(self, candidates: Sequence[Candidate]) -> Iterator[Candidate]:
        """The best plans with forecasts of order 1; the best plan and the best fitted timesteps with other samplers."""
        plans = [one for one in candidates if one.group == PLAN]
        for plan in plans[:max(1, self.rungs[0] // 4)]:
            yield with_depths(plan, plan.depths, self.gaps[plan.grid], 1)
        for one in [*plans[:1], *[one for one in candidates if one.group == FITTED][:1]]:
            for sampler in self.samplers:
                if self.judge.calls(sampler, one.grid) == len(one.calls):
                    yield one.on(sampler)

    def best(self, candidates: Sequence[Candidate], seeds: Sequence[int], kept: int) -> list[Candidate]:
        """The best plans, and a quarter as many, but at least one, of each other group; the best first."""
        found = self.judge.measure(candidates, seeds, f"{len(candidates)} candidates, {len(seeds)} seeds")
        means = [float(psnr.mean()) for psnr in found]
        ranked = sorted(zip(candidates, means, strict=True), key=lambda pair: -pair[1])
        self.first = self.first or ranked
        groups: dict[str, list[Candidate]] = {}
        for candidate, _ in ranked:
            groups.setdefault(candidate.group, []).append(candidate)
        return [one for group, members in groups.items()
                for one in members[:kept if group == PLAN else max(1, kept // 4)]]

    def improved(self, plan: Candidate) -> Candidate:
        """A plan after `attempts` changes.

        Some changes at a time are tried on few seeds, the best two of them on all seeds. The better one replaces the
        plan if it is better by more than half a standard error.
        """
        dice, tried = random.Random(0), {plan.depths}
        left = self.attempts
        while left > 0:
            number = min(left, self.at_once)
            left -= number
            changes = self.changes(plan, dice, tried, number)
            tried |= {change.depths for change in changes}
            if not changes:
                continue
            title = f"improving a plan, {left} more"
            gains = self.gains(changes, plan, self.seeds[:self.few], title)
            order = sorted(range(len(changes)), key=lambda one: -gains[one].mean())
            promising = [changes[one] for one in order[:2] if gains[one].mean() > 0]
            gains = self.gains(promising, plan, self.seeds, title)
            for change, gain in sorted(zip(promising, gains, strict=True), key=lambda pair: -pair[1].mean()):
                if gain.mean() > 0.5 * gain.std() / np.sqrt(len(gain)):
                    plan = change
                    break
        return plan

    def changes(self, plan: Candidate, dice: random.Random, tried: set[Depths], number: int) -> list[Candidate]:
        """Untried neighbours of a plan: half of them the best by the errors of their gaps, half at random."""
        gaps = self.gaps[plan.grid]
        walk = neighbours(plan.depths, gaps, self.prices, plan.order, dice)
        offers = [depths for depths in dict.fromkeys(islice(walk, OFFERS * number)) if depths not in tried]
        weighed = sorted(offers, key=lambda depths: gaps.error(depths, plan.order))
        chosen = list(dict.fromkeys([*weighed[:number - number // 2], *offers]))[:number]
        return [with_depths(plan, depths, gaps, plan.order) for depths in chosen]

    def gains(self, others: Sequence[Candidate], plan: Candidate, seeds: Sequence[int], title: str) -> list[np.ndarray]:
        """How much nearer other plans are than one, for each seed, dB."""
        own, *found = self.judge.measure([plan, *others], seeds, title)
        return [one - own for one in found]
