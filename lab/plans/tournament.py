"""Finds the best plan for a budget: by real runs of ever fewer candidates on ever more seeds (successive halving,
Jamieson and Talwalkar, arXiv 1502.07943), then by small changes of the best. What it returns follows from its arguments
and from what is measured alone, so that a search that was killed, or that runs in other processes, comes to the same
end.
"""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np

from lab.plans.candidates import (
    FITTED,
    INTERVALS,
    PLAN,
    POWERS,
    Prices,
    Trial,
    fewer_steps,
    lengths,
    neighbours,
    plans_of,
    uniform_trials,
)
from lab.plans.gaps import GapMeasurements, Gaps
from lab.plans.judge import CONVERGED, Grid, Judge
from lab.plans.timesteps import RULES, Rule, trajectory

BELOW = 3           # fewer steps than the budget pays for are tried too: more of them are not always better
GRIDS = 3           # the timesteps of plans: trailing, and those that fit best by two rules
OFFERS = 6          # changes that are weighed by what is measured of gaps, for each that is run


@dataclass
class Tournament:
    """Compares candidates for a budget on some seeds.

    samplers: which are tried; plans are first compared with one of them. seeds: to learn from. attempts: changes of the
    best plan that are run, `at_once` from each plan that was found. rungs: how many plans are kept after each; a rung
    has twice as many seeds as the one before it, the last one all.
    """
    judge: Judge
    measured: GapMeasurements
    prices: Prices
    samplers: Sequence[str]
    seeds: Sequence[int]
    attempts: int = 48
    at_once: int = 8
    rungs: Sequence[int] = (16, 6, 3, 2)
    first: list[tuple[Trial, float]] = field(default_factory=list)      # everything, with its mean on the first rung
    _fitted: dict[Rule, list[str]] = field(default_factory=dict)

    def lengths(self) -> list[int]:
        """The numbers of calls of the plans that are tried."""
        return lengths(self.prices)

    def sizes(self) -> list[int]:
        """The seeds of each rung."""
        return [max(min(4, len(self.seeds)), len(self.seeds) >> back) for back in reversed(range(len(self.rungs)))]

    def network_calls(self) -> int:
        """How many full network calls `run` makes at most, but for measuring gaps."""
        kinds = 4
        started = (BELOW * len(self.samplers) + len(RULES) + 3 * len(INTERVALS)
                   + GRIDS * len(self.lengths()) * (2 * len(POWERS) + 1))
        relatives = self.rungs[0] // 4 + 2 * len(self.samplers)
        images, before, trials = len(RULES) * (self.few() - self.sizes()[0]), 0, started
        for number, (seeds, kept) in enumerate(zip(self.sizes(), self.rungs, strict=True)):
            if number == 1:
                images, trials = images + relatives * before, trials + relatives
            images += trials * (seeds - before)
            trials, before = kept + kinds * max(1, kept // 4), seeds
        rounds = -(-self.attempts // self.at_once)
        few = self.few()
        images += rounds * (self.at_once * few + 2 * (len(self.seeds) - few))
        measured = len(self.measured.seeds) * self.judge.distances.run.calls
        return round(images * self.prices.budget) + measured + self.measured.network_calls(GRIDS * self.lengths())

    def few(self) -> int:
        """On how many seeds a change is first tried."""
        return self.sizes()[-2] if len(self.rungs) > 1 else len(self.seeds)

    def run(self) -> list[Trial]:
        """The best of each group without a search, then the best plans: found, and improved."""
        self.trajectory = trajectory(self.judge, self.measured.seeds)
        fitted = {rule: self.fitted(rule, int(self.prices.budget)) for rule in RULES}
        grids = [Grid(calls) for calls in self.lengths()]
        for rule in self.best_rules(fitted)[:GRIDS - 1]:
            grids += filter(None, (self.fitted(rule, calls) for calls in self.lengths()))
        self.measured.measure(grids)
        self.gaps: dict[Grid, Gaps] = {grid: self.measured.of(grid) for grid in grids}
        trials = [*self.without_caching(), *self.fewer_fitted(fitted.values()),
                  *uniform_trials(self.prices, CONVERGED),
                  *(trial for grid in grids for trial in plans_of(self.gaps[grid], grid, self.prices, CONVERGED))]
        for number, (seeds, kept) in enumerate(zip(self.sizes(), self.rungs, strict=True)):
            if number == 1:
                trials = list(dict.fromkeys([*trials, *self.relatives(trials)]))
            trials = self.best(trials, self.seeds[:seeds], kept, number == 0)
        plans = [trial for trial in trials if trial.kind == PLAN]
        arms = {trial.group: trial for trial in reversed(trials) if trial.kind != PLAN}
        return [*arms.values(), *dict.fromkeys([*plans, *(self.improved(plan) for plan in plans[:1])])]

    def without_caching(self) -> Iterator[Trial]:
        """Fewer steps, for each sampler as many as the budget pays for, and a few less."""
        for sampler in self.samplers:
            found = 0
            for steps in range(int(self.prices.budget + 1e-9), 0, -1):
                calls = self.judge.calls(sampler, Grid(steps))
                if calls is not None and calls <= self.prices.budget + 1e-9 and found < BELOW:
                    found += 1
                    yield fewer_steps(sampler, Grid(steps), calls)

    def fitted(self, rule: Rule, steps: int) -> Grid | None:
        """So many fitted timesteps; None where the converged run has too few to choose among."""
        if rule not in self._fitted:
            self._fitted[rule] = self.trajectory.fitted(rule, max(int(self.prices.budget), *self.lengths(), 1))
        return Grid(steps, self._fitted[rule][steps - 1]) if steps <= len(self._fitted[rule]) else None

    def fewer_fitted(self, grids: Iterable[Grid | None]) -> Iterator[Trial]:
        """Fewer steps without caching, at fitted timesteps."""
        for grid in dict.fromkeys(filter(None, grids)):
            yield fewer_steps(CONVERGED, grid, grid.steps)

    def best_rules(self, fitted: Mapping[Rule, Grid | None]) -> list[Rule]:
        """The rules by which timesteps were fitted, that whose runs without caching come nearest first."""
        rules = [rule for rule, grid in fitted.items() if grid is not None]
        runs = [next(self.fewer_fitted([fitted[rule]])).run for rule in rules]
        found = self.judge.measure(runs, self.seeds[:self.few()], "fitted timesteps")
        order = sorted(range(len(rules)), key=lambda one: -found[one].mean())
        return [rules[one] for one in order]

    def relatives(self, trials: Sequence[Trial]) -> Iterator[Trial]:
        """The best plans with forecasts of order 1, and the best one, and the best fitted timesteps, with the other
        samplers."""
        plans = [trial for trial in trials if trial.kind == PLAN]
        for trial in plans[:max(1, self.rungs[0] // 4)]:
            calls = self.gaps[trial.run.grid].fitted(trial.depths, 1)
            yield replace(trial, run=trial.run._replace(calls=calls), order=1)
        for trial in [*plans[:1], *[trial for trial in trials if trial.group == FITTED][:1]]:
            for sampler in self.samplers:
                if self.judge.calls(sampler, trial.run.grid) == len(trial.run.calls):
                    yield trial.on(sampler)

    def best(self, trials: Sequence[Trial], seeds: Sequence[int], kept: int, first: bool = False) -> list[Trial]:
        """The best plans, and of each other group a quarter as many, at least one: the best first."""
        title = f"{len(trials)} candidates, {len(seeds)} seeds"
        found = self.judge.measure([trial.run for trial in trials], seeds, title)
        ranked = sorted(((trial, float(psnr.mean())) for trial, psnr in zip(trials, found, strict=True)),
                        key=lambda pair: -pair[1])
        if first:
            self.first = ranked
        return [trial for group in dict.fromkeys(trial.group for trial, _ in ranked)
                for trial in [one for one, _ in ranked if one.group == group][:kept if group == PLAN
                                                                              else max(1, kept // 4)]]

    def improved(self, trial: Trial) -> Trial:
        """A plan after so many attempts at changing it to a better one.

        Some changes at a time are tried on few seeds, the best two of them on all, and the better one is taken if it is
        better than the plan by more than half a standard error.
        """
        gaps, dice, tried = self.gaps[trial.run.grid], random.Random(0), {trial.depths}
        few = self.seeds[:self.few()]
        left = self.attempts
        while left > 0:
            number = min(left, self.at_once)
            left -= number
            changes = self.changes(trial, gaps, dice, tried, number)
            tried |= {change.depths for change in changes}
            if not changes:
                continue
            title = f"improving a plan, {left} more"
            gains = self.gains(changes, trial, few, title)
            order = sorted(range(len(changes)), key=lambda one: -gains[one].mean())
            promising = [changes[one] for one in order[:2] if gains[one].mean() > 0]
            gains = self.gains(promising, trial, self.seeds, title)
            for change, gain in sorted(zip(promising, gains, strict=True), key=lambda pair: -pair[1].mean()):
                if gain.mean() > 0.5 * gain.std() / np.sqrt(len(gain)):
                    trial = change
                    break
        return trial

    def changes(self, trial: Trial, gaps: Gaps, dice: random.Random, tried: set, number: int) -> list[Trial]:
        """So many neighbours that were not tried: half of them what gaps say is best, half whatever comes."""
        walk = neighbours(trial.depths, gaps, self.prices, trial.order, dice)
        offers = [depths for depths in dict.fromkeys(islice(walk, OFFERS * number)) if depths not in tried]
        weighed = sorted(offers, key=lambda depths: gaps.error(depths, trial.order))
        chosen = list(dict.fromkeys([*weighed[:number - number // 2], *offers]))[:number]
        return [replace(trial, run=trial.run._replace(calls=gaps.fitted(depths, trial.order))) for depths in chosen]

    def gains(self, others: Sequence[Trial], trial: Trial, seeds: Sequence[int], title: str) -> list[np.ndarray]:
        """How much nearer other plans come than one, for each seed, dB."""
        own, *found = self.judge.measure([trial.run, *(other.run for other in others)], seeds, title)
        return [one - own for one in found]
