"""The error of not computing a level on some network calls, measured in one pass of uncached runs.

The error of a forecast is a distance of features of the same run. So the inner products of all its features (their Gram
matrix) give the error of every gap, order and damping, and the best damping, in closed form. The same pass measures how
much of a feature's error arrives in the network's output. A few runs with a single cached call measure how much of an
output's error arrives in the image.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lab.fit.fit import own_unet
from lab.plans.judge import CONVERGED, Depths, Grid, Judge
from run.seeds import format_seeds, in_batches
from unet_caching.forecast import newton_terms
from unet_caching.methods.plan import Call, PlanCache
from unet_caching.nest import Network

DAMPING = (0.0, 1.5)        # beyond, a fit to a few images is noise
TINY = 1e-30


class GapMeter:
    """Stands in for the U-Net while a run samples without caching: `network(x, t, *context, cache=...)`.

    branches: the levels to measure. `gram`: for each, the inner products of its features over all images, float64
    [calls, calls], complete after `finish` of each batch. `output`: for each, the squared error of the network's output
    in each call with the level's value of the call before.
    """

    def __init__(self, unet: Network, branches: Sequence[int]):
        self.unet, self.branches = unet, branches
        self.gram: dict[int, np.ndarray | float] = dict.fromkeys(branches, 0.0)
        self.output: dict[int, np.ndarray | float] = dict.fromkeys(branches, 0.0)
        self.begin()

    def begin(self) -> None:
        self.features: dict[int, list[Tensor]] = {branch: [] for branch in self.branches}
        self.errors: dict[int, list[float]] = {branch: [] for branch in self.branches}

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, *context: Tensor, cache: object) -> Tensor:
        found: dict[Hashable, Tensor] = {}

        def keep(key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
            found[key] = compute()
            return found[key]

        out = self.unet(x, t, *context, cache=keep)
        for branch, before in self.features.items():
            error = 0.0
            if before:
                seen = self.unet(x, t, *context,
                                 cache=lambda key, compute: before[-1] if key == branch else compute())
                error = (seen.float() - out.float()).square().sum().item()
            self.errors[branch].append(error)
            before.append(found[branch])
        return out

    def finish(self) -> None:
        """Add the products and errors of the batch, and drop its features."""
        for branch, features in self.features.items():
            for row in range(len(features[0])):
                rows = torch.stack([value[row].flatten() for value in features]).double()
                self.gram[branch] = self.gram[branch] + (rows @ rows.T).cpu().numpy()
            self.output[branch] = self.output[branch] + np.array(self.errors[branch])
        self.begin()


@dataclass
class Gaps:
    """The errors of the gaps in runs of some number of calls."""
    gram: Mapping[int, np.ndarray]          # branch -> [calls, calls]
    weights: Mapping[int, np.ndarray]       # branch -> [calls], the error of the image per error of the feature
    ridge: float = 1e-2

    def flattened(self, power: float) -> "Gaps":
        """The same with weights to a power. 0: errors of the feature matter equally in all calls, 1: as measured."""
        return replace(self, weights={branch: np.where(weight > 0, weight ** power, 0.0)
                                      for branch, weight in self.weights.items()})

    @property
    def calls(self) -> int:
        return len(next(iter(self.gram.values())))

    def fit(self, branch: int, step: int, steps: Sequence[int], order: int) -> tuple[tuple[float, ...], float]:
        """The best damping of a forecast at `step` through computed calls `steps`, the latest first, and the remaining
        error of the image."""
        gram = self.gram[branch]
        left = np.zeros(self.calls)                 # the change that the forecast should predict, as a sum of features
        left[step], left[steps[0]] = 1.0, -1.0
        factors = newton_terms(step, steps[:order + 1])
        terms = np.zeros((len(factors), self.calls))
        for term, row in zip(terms, factors, strict=True):
            term[list(steps[1:len(row) + 1])] = row
            term[steps[0]] = -sum(row)
        damping: tuple[float, ...] = ()
        if len(terms):
            products = terms @ gram @ terms.T
            pull = self.ridge * products.diagonal() + TINY
            best = np.linalg.solve(products + np.diag(pull), terms @ gram @ left + pull)
            damping = tuple(round(float(w), 4) for w in best.clip(*DAMPING))
            left = left - np.array(damping) @ terms
        return damping, float(self.weights[branch][step] * np.sqrt(max(0.0, left @ gram @ left)))

    def fitted(self, depths: Depths, order: int) -> tuple[Call, ...]:
        """The calls of a plan with these depths, each forecast with the best damping."""
        forecasts = self.forecasts(depths, order)
        return tuple(Call(branch, damping) for branch, (damping, _) in zip(depths, forecasts, strict=True))

    def error(self, depths: Depths, order: int) -> float:
        """The expected squared error of the image with a plan of these depths.

        Errors within a gap point the same way and add up; errors of different gaps do not.
        """
        total = gap = 0.0
        for branch, (_, error) in zip(depths, self.forecasts(depths, order), strict=True):
            if branch is None:
                total, gap = total + gap ** 2, 0.0
            gap += error
        return total + gap ** 2

    def forecasts(self, depths: Depths, order: int) -> list[tuple[tuple[float, ...], float]]:
        """The best damping of every call in a plan of these depths, and the remaining error of the image."""
        computed: dict[int, list[int]] = {level: [] for level in self.gram}
        found: list[tuple[tuple[float, ...], float]] = []
        for step, branch in enumerate(depths):
            found.append(((), 0.0) if branch is None else self.fit(branch, step, computed[branch], order))
            for level, steps in computed.items():
                if Call(branch).refreshes(level):
                    steps.insert(0, step)
        return found

    def of_gaps(self, branch: int, coherent: bool) -> np.ndarray:
        """The squared error of every gap of order 1 between full calls, [i, j, k]: of the calls between j and k, if the
        full call before j is i (i = calls: none); k = calls is the end.
        """
        gram, weight, calls = self.gram[branch], self.weights[branch], self.calls
        square = gram.diagonal()
        found = np.full((calls + 1, calls, calls + 1), np.inf)
        for j in range(calls):
            later = np.arange(j + 1, calls)
            apart = square[later] - 2 * gram[later, j] + square[j]
            for i in [calls] if j == 0 else range(j):
                left = apart
                if i < calls:
                    reach = (later - j) / (j - i)
                    line = reach ** 2 * (square[j] - 2 * gram[i, j] + square[i])
                    along = reach * (gram[later, j] - gram[later, i] - square[j] + gram[i, j])
                    pull = self.ridge * line + TINY
                    w = ((along + pull) / (line + pull)).clip(*DAMPING)
                    left = apart - 2 * w * along + w ** 2 * line
                errors = weight[later] * np.sqrt(left.clip(min=0))
                found[i, j, j + 1] = 0.0
                found[i, j, j + 2:] = np.cumsum(errors) ** 2 if coherent else np.cumsum(errors ** 2)
        return found


class GapMeasurements(NamedTuple):
    """Measures gaps of a model on some seeds, and keeps the measurements beside its distances."""
    judge: Judge
    branches: Sequence[int]     # the levels to measure, the cheapest first
    seeds: Sequence[int]
    probe: Grid = Grid(20)      # of the runs with a single cached call, one for each of `nodes` calls
    nodes: int = 8

    def measure(self, grids: Sequence[Grid]) -> None:
        """Measure everything that `of` needs for some grids."""
        wanted = [self.probe, *sorted({*grids} - {self.probe}, reverse=True)]           # the longest work first
        self.judge.each(_measure, [(grid, *self[1:]) for grid in wanted], "measuring gaps")

    def network_calls(self, lengths: Sequence[int]) -> int:
        """The full network calls of measuring runs of these lengths, without cached calls."""
        return len(self.seeds) * (sum(lengths) + self.probe.steps * (self.nodes + 2))

    def of(self, grid: Grid) -> Gaps:
        """The gaps of runs over a grid."""
        gram, output = self.measured(grid)
        in_image, weights = self._image_per_output(grid), {}
        for branch in self.branches:
            square, beside = gram[branch].diagonal(), gram[branch].diagonal(-1)
            change = square[1:] - 2 * beside + square[:-1]
            arrives = np.sqrt(output[branch][1:] / change.clip(min=TINY))
            weights[branch] = np.concatenate([[0.0], arrives * in_image[1:]])
        return Gaps(gram, weights)

    def measured(self, grid: Grid) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
        """(Gram matrices, squared output errors of gaps of one call), by branch."""
        def measure() -> list:
            meter = GapMeter(own_unet(self.judge.distances.model), self.branches)
            for batch in self._batches():
                self.judge.distances.latents(self.judge.run(CONVERGED, grid), batch, network=meter)
                meter.finish()
            return [[np.asarray(values[branch]).tolist() for branch in self.branches]
                    for values in (meter.gram, meter.output)]

        about = [*grid, *self.branches, format_seeds(self.seeds)]
        found = self.judge.distances.kept("gaps", about, measure)
        gram, output = (dict(zip(self.branches, map(np.array, values), strict=True)) for values in found)
        return gram, output

    def _image_per_output(self, grid: Grid) -> np.ndarray:
        """The error of the image per error of the network's output at each call: [steps]."""
        probe, branch = self.probe.steps, self.branches[0]
        calls = sorted({int(call) for call in np.linspace(1, probe - 1, self.nodes).round()})

        def measure() -> list:
            errors = dict.fromkeys(calls, 0.0)
            run, latents = self.judge.run(CONVERGED, self.probe), self.judge.distances.latents
            for batch in self._batches():
                exact = latents(run, batch)
                for call in calls:
                    alone = PlanCache([Call(branch if step == call else None) for step in range(probe)])
                    errors[call] += (latents(run, batch, alone) - exact).double().square().sum().item()
            return list(errors.values())

        output = self.measured(self.probe)[1][branch]
        image = self.judge.distances.kept("image", [probe, branch, *calls, format_seeds(self.seeds)], measure)
        ratios = [np.log(max(error, TINY) / max(output[call], TINY)) / 2
                  for call, error in zip(calls, image, strict=True)]
        sampler = self.judge.run(CONVERGED, grid).sampler
        whole = sampler.diffusion.num_timesteps
        times = np.array([*sampler.call_timesteps(), -1])
        at, long = (whole - 1 - times[:-1]) / whole * probe, (times[:-1] - times[1:]) / whole * probe
        return np.exp(np.interp(at, calls, ratios)) * long      # in proportion to the length of the step

    def _batches(self) -> list[list[int]]:
        return in_batches(self.seeds, self.judge.distances.machine.batch_size)


def _measure(judge: Judge, grid: Grid, *about: Any) -> None:
    measurements = GapMeasurements(judge, *about)
    if grid == measurements.probe:
        measurements.of(grid)
    else:
        measurements.measured(grid)
