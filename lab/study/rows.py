"""The measured arms of a study as rows, and their comparison with each other, for its tables and charts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from eval.cost.runs import in_full_calls, macs_per_image
from eval.metrics.intervals import mean_estimate
from eval.tables.arms import Arm
from lab.study.bench import Bench
from run import arguments
from run.results import Metric, Result
from run.spec import Run
from unet_caching.methods.adaptive import AdaptiveMethod
from unet_caching.methods.plan import PlanMethod
from unet_caching.samplers.timesteps import is_listed

Cost = Callable[["Row"], float | None]
PLAIN = "fewer steps"
EQUAL = 0.98                # a run costs as much as another if it costs at least this fraction
EXACT = 100.0               # dB, for an identical image


@dataclass(frozen=True)
class Row:
    """An arm with its records."""
    arm: Arm
    records: Mapping[str, Result]       # by measure
    timed: bool = False                 # whether the study measures time
    made: float | None = 0.0            # CPU seconds that making its fitted files took; None if not known
    kept_as: str = ""                   # the name of its run, if a fitted file no longer exists

    @property
    def run(self) -> Run:
        return self.arm.run

    @property
    def name(self) -> str:
        """The name of its run."""
        return self.kept_as or self.run.name

    @cached_property
    def kind(self) -> str:
        """The way in which it is cheaper than the uncached run."""
        return self.arm.entry.kind or kind_of(self.run)

    @property
    def plain(self) -> bool:
        """Whether it computes everything in all calls. Plans without cached calls do that, too."""
        return not self.run.caching or self.kind.startswith(PLAIN)

    @cached_property
    def cost(self) -> float:
        """The cost of an image in full network calls, by multiply-accumulates."""
        spent = self.metric("full calls")
        return spent.value if spent else cost_of(self.run)

    @cached_property
    def macs(self) -> float:
        """The MACs of an image, both rows of guidance included."""
        return macs_per_image(self.run).hook

    @property
    def time(self) -> float | None:
        """The network time of an image in full calls; None if it was not measured."""
        if not self.timed or self.plain:
            return float(self.run.calls) if self.timed else None
        return self.records["time"].times["run"]["full_calls"] if "time" in self.records else None

    def metric(self, name: str) -> Metric | None:
        return next((one.metrics[name] for one in self.records.values() if name in one.metrics), None)

    @cached_property
    def psnr(self) -> np.ndarray | None:
        """The PSNR to the reference run, dB, by seed: of latents if `near` is measured, else of images."""
        found = self.records.get("near") or self.records.get("fidelity")
        if found is None:
            return None
        return np.array([EXACT if value is None else value for value in found.details["psnr"]])

    @property
    def options(self) -> dict[str, Any]:
        """The given options of its sampler and its caching, by name."""
        own = {name for part in (self.run.spec.sampler, *self.run.spec.caching) for name in arguments.names(part)}
        return {name: value.stem if isinstance(value, Path) else value
                for name, value in self.run.spec.options.items() if name in own}


def cost_of(run: Run) -> float:
    """The cost of an image, in full network calls; if each image decides, the mean on held-out seeds."""
    adaptive = run.caching.of(AdaptiveMethod)
    found = adaptive.rule.notes.get("spent") if adaptive else None
    return found["mean"] if found else in_full_calls(run)


def kind_of(run: Run) -> str:
    """The name of the way in which a run is cheaper."""
    plan = run.caching.of(PlanMethod)
    learned = plan is not None and plan.plan.solver is not None
    if run.full_calls == run.calls:
        listed = "fitted, " if is_listed(run.sampler.timesteps) else ""
        return f"{PLAIN}, learned" if learned else f"{PLAIN}, {listed}{run.sampler.name}"
    if plan is not None:
        return "plan of another model" if "found_on" in plan.plan.notes else "plan, learned" if learned else "plan"
    if own := [method.system for method in run.caching.methods if method.system]:
        return ", ".join(own)
    cache = run.caching.settings
    blocks, forecast = cache.get("block_caching"), cache.get("forecast")
    parts = [] if blocks is None else ["blocks, scale-shift" if blocks["scale_shift_sha256"] else "blocks"]
    parts += [cache["schedule"]] if cache.get("schedule", "uniform") != "uniform" else []
    if forecast is None:
        return ", ".join([*parts, "reuse"])
    how = [] if forecast["damping"] == 1 else ["damped"]
    return ", ".join([*parts, f"forecast, order {forecast['order']}", *how])


def rows_of(bench: Bench) -> list[Row]:
    """The arms of a part that have a record, or need none."""
    timed = "time" in bench.part.measure
    found = [Row(arm, records, timed, bench.cost_of_making(arm.entry)) for arm in bench.arms
             if (records := bench.records(arm)) or not bench.kinds(arm)]
    for arm, records in bench.kept():
        name = next(iter(records.values())).details["name"].partition("/")[2]
        found.append(Row(arm, records, timed, bench.cost_of_making(arm.entry), name))
    names = {row.name for row in found}
    return [*found, *(replace(row, timed=timed) for other in bench.also for row in rows_of(other)
                      if row.name not in names)]


def front(points: Sequence[Sequence[float]], higher: bool) -> list[int]:
    """The positions of the points (cost, quality) that no other point beats, in both or in one with the other equal."""
    def beaten(i: int) -> bool:
        cost, value = points[i][0], points[i][1] * (1 if higher else -1)
        return any(c <= cost and v * (1 if higher else -1) >= value and (c, v) != tuple(points[i]) for c, v in points)
    return [i for i in range(len(points)) if not beaten(i)]


def mean_of(values: np.ndarray) -> Metric:
    return Metric.of(mean_estimate(values))


@dataclass(frozen=True)
class Rows:
    """The rows of a part."""
    rows: Sequence[Row]
    whole: Row                  # the reference run, without caching
    chosen_on: int = 0          # so many seeds choose settings, and the others report; 0: all do both

    @property
    def choose(self) -> slice:
        return slice(self.chosen_on or None)

    @property
    def report(self) -> slice:
        return slice(self.chosen_on, None)

    def near(self, row: Row) -> Metric | None:
        """The mean PSNR of a row on the seeds that report."""
        return None if row.psnr is None else mean_of(row.psnr[self.report])

    def rival(self, row: Row, cost: Cost = lambda one: one.cost, among: Callable[[Row], bool] = lambda one: True
              ) -> Row | None:
        """The nearest run without caching at equal cost, on the seeds that choose.

        The candidates are the runs with the row's budget. Without a budget: take the cheapest run that costs as much as
        the row, and all runs that are no dearer. None if there is no candidate.
        """
        plain = [one for one in self.rows if one.plain and one.psnr is not None and among(one)]
        if row.arm.entry.budget is not None:
            near = [one for one in plain if one.arm.entry.budget == row.arm.entry.budget]
        else:
            known, wanted = [(value, one) for one in plain if (value := cost(one)) is not None], cost(row)
            dear = [value for value, _ in known if wanted is not None and value >= EQUAL * wanted]
            near = [one for value, one in known if dear and value <= min(dear)]
        return max(near, key=lambda one: one.psnr[self.choose].mean(), default=None)    # type: ignore[index]

    def nearer(self, row: Row, other: Row | None) -> Metric | None:
        """How much nearer a row is than another, dB, paired by seed, on the seeds that report."""
        if other is None or other is row or row.psnr is None or other.psnr is None:
            return None
        return mean_of(row.psnr[self.report] - other.psnr[self.report])
