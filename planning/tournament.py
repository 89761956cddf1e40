"""Finds the best plan for a budget: by real runs of ever fewer candidates on ever more seeds (successive halving,
Jamieson and Talwalkar, arXiv 1502.07943), then by small changes of the best. What it returns follows from its arguments
and from what is measured alone, so that a search that was killed comes to the same end.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from tqdm import tqdm

from planning.candidates import Prices, Trial, fewer_steps, lengths, neighbours, plans_of
from planning.distances import CONVERGED, Distances
from planning.gaps import GapMeasurements, Gaps
from runs.errors import UserError

PLAN = "plan"
OFFERS = 8          # changes that are weighed by what is measured of gaps, before one of them is run


@dataclass
class Tournament:
    """Compares candidates for a budget on some seeds.

    samplers: which are tried; plans are first compared with one of them. seeds: to learn from. attempts: changes of the
    best plans that are run. rungs: (seeds, how many plans are kept); the other samplers take part from the last but one
    on.
    """
    distances: Distances
    measured: GapMeasurements
    prices: Prices
    samplers: Sequence[str]
    seeds: Sequence[int]
    attempts: int = 80
    rungs: Sequence[tuple[int, int]] = ((2, 24), (4, 6), (8, 6), (16, 2))

    def run(self) -> list[Trial]:
        """The best of each kind without a search, and the best plans, in that order."""
        self.gaps: dict[int, Gaps] = {calls: self.measured.of(calls)
                                      for calls in tqdm(lengths(self.prices), desc="measuring gaps", unit="length")}
        trials = [*self.without_caching(), *(trial for gaps in self.gaps.values()
                                             for trial in plans_of(gaps, self.prices, CONVERGED))]
        for number, (seeds, kept) in enumerate(self.rungs):
            if number == len(self.rungs) - 2:
                trials = list(dict.fromkeys([*trials, *self.relatives(trials)]))
            trials = self.best(trials, self.seeds[:seeds], kept)
        plans = [trial for trial in trials if trial.kind == PLAN]
        others = [trial for trial in self.best(trials, self.seeds[:self.rungs[-1][0]], 1) if trial.kind != PLAN]
        climbed = [self.climbed(plan, self.attempts // len(plans)) for plan in plans]
        return [*others, *dict.fromkeys([*plans, *climbed])]

    def without_caching(self) -> Iterator[Trial]:
        """Fewer steps, for each sampler as many as the budget pays for."""
        for sampler in self.samplers:
            for steps in range(int(self.prices.budget + 1e-9), 0, -1):
                run = self._valid(sampler, steps)
                if run is not None and run <= self.prices.budget + 1e-9:
                    yield fewer_steps(sampler, steps, run)
                    break

    def relatives(self, trials: Sequence[Trial]) -> Iterator[Trial]:
        """The same plans with the other samplers, and with forecasts of order 2."""
        for trial in trials:
            if len(set(trial.depths)) == 1:
                continue
            for sampler in self.samplers:
                if self._valid(sampler, trial.run.steps) == len(trial.run.calls):
                    yield trial.on(sampler)
            if trial.kind == PLAN:
                calls = self.gaps[trial.run.steps].fitted(trial.depths, 2)
                yield replace(trial, run=trial.run._replace(calls=calls), order=2)

    def _valid(self, sampler: str, steps: int) -> int | None:
        """The network calls of so many steps; None where the sampler does not take them."""
        try:
            run = self.distances.run(sampler, steps)
            _ = run.sampler
        except UserError:
            return None
        return run.calls

    def best(self, trials: Sequence[Trial], seeds: Sequence[int], kept: int) -> list[Trial]:
        """The best plans, and of each other kind a quarter as many, at least one: the best first."""
        scores = {trial: self.distances.of(trial.run, seeds).mean()
                  for trial in tqdm(trials, desc=f"{len(trials)} candidates, {len(seeds)} seeds", unit="run")}
        ranked = sorted(scores, key=lambda trial: -scores[trial])
        found: list[Trial] = []
        for kind in dict.fromkeys(trial.kind for trial in ranked):
            found += [trial for trial in ranked if trial.kind == kind][:kept if kind == PLAN else max(1, kept // 4)]
        return found

    def climbed(self, trial: Trial, attempts: int) -> Trial:
        """A plan after so many attempts at changing it to a better one."""
        gaps, dice, tried = self.gaps[trial.run.steps], random.Random(trial.run.key), {trial.depths}
        for _ in tqdm(range(attempts), desc="improving a plan", unit="attempt"):
            offers = dict.fromkeys(islice(neighbours(trial.depths, gaps, self.prices, trial.order, dice), OFFERS))
            new = [depths for depths in offers if depths not in tried]
            if not new:
                continue
            depths = min(new, key=lambda depths: gaps.error(depths, trial.order))
            tried.add(depths)
            other = replace(trial, run=trial.run._replace(calls=gaps.fitted(depths, trial.order)))
            if self.is_better(other, trial):
                trial = other
        return trial

    def is_better(self, other: Trial, trial: Trial) -> bool:
        """Whether a plan is better than another on all seeds; a few of them suffice to give it up."""
        few = self.seeds[:max(4, len(self.seeds) // 4)]
        if self.gain(other, trial, few).mean() <= 0:
            return False
        gain = self.gain(other, trial, self.seeds)
        return bool(gain.mean() > 0.5 * gain.std() / np.sqrt(len(gain)))

    def gain(self, other: Trial, trial: Trial, seeds: Sequence[int]) -> np.ndarray:
        """How much nearer a plan comes, for each seed, dB."""
        return self.distances.of(other.run, seeds) - self.distances.of(trial.run, seeds)
