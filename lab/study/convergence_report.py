"""What a study of convergence shows: table.md, and distance to the converged images against cost."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eval.cost.runs import call_macs, costs_of
from eval.cost.timing import Times
from eval.metrics.intervals import mean_estimate
from eval.metrics.registry import MEASURES
from eval.tables.plots import calls_of_runs, lines_of_kinds
from eval.tables.text import markdown
from lab.study.sweep_report import front
from run.files import write_atomically
from run.results import Metric
from run.spec import Run
from unet_caching.methods.plan import PlanMethod
from unet_caching.samplers.ddim import is_listed

PSNR = "PSNR to converged"
Calls = tuple[tuple[float, float, int], ...]      # timestep, share of a full call, order of the forecast; of each call
LESS = " less that of the converged images"
EQUAL = 0.98                # what costs so much of a run's cost or more is no cheaper than it


@dataclass(frozen=True)
class Point:
    """A run that is measured. kind: what makes it cheap. psnr: dB, [seeds].

    interval: None for a run of fewer steps. cost, time: of an image, in full network calls; time is None where the
    steps were not timed. metrics: how far its images are from real ones, where they were judged. calls: of a plan.
    """
    name: str
    sampler: str
    kind: str
    steps: int
    interval: int | None
    cost: float
    time: float | None
    psnr: np.ndarray
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    calls: Calls | None = None

    @classmethod
    def of(cls, run: Run, cost: float, times: Mapping[str, Any] | None, psnr: np.ndarray,
           metrics: Mapping[str, Metric]) -> "Point":
        interval = run.caching.settings.get("interval") if run.caching else None
        return cls(run.name, run.sampler.name, kind_of(run), run.steps, interval, cost, time_of(run, times), psnr,
                   metrics, plan_calls(run))

    def on(self, seeds: slice) -> Metric:
        """The mean over some of the seeds."""
        return Metric.of(mean_estimate(self.psnr[seeds]))


def plan_calls(run: Run) -> Calls | None:
    """What the calls of a plan do; None for other runs."""
    planned = run.caching.of(PlanMethod)
    if planned is None:
        return None
    shares = [macs.hook / costs_of(run).full.hook for macs in call_macs(run)]
    return tuple((t, share, len(call.damping))
                 for t, share, call in zip(run.sampler.call_timesteps(), shares, planned.plan.calls, strict=True))


def kind_of(run: Run) -> str:
    """The name of what a run does to be cheaper."""
    if not run.caching:
        return f"fewer steps, {'fitted, ' if is_listed(run.sampler.timesteps) else ''}{run.sampler.name}"
    if own := [method.system for method in run.caching.methods if method.system]:
        return ", ".join(own)
    cache = run.caching.settings
    if "plan" in cache:
        plan = run.caching.of(PlanMethod)
        return "plan of another model" if plan is not None and "found_on" in plan.plan.notes else "plan"
    blocks, forecast = cache.get("block_caching"), cache.get("forecast")
    parts = [] if blocks is None else ["blocks, scale-shift" if blocks["scale_shift_sha256"] else "blocks"]
    parts += [cache["schedule"]] if cache.get("schedule", "uniform") != "uniform" else []
    if forecast is None:
        return ", ".join([*parts, "reuse"])
    how = [] if forecast["damping"] == 1 else ["damped"]
    return ", ".join([*parts, f"forecast, order {forecast['order']}", *how])


def time_of(run: Run, times: Mapping[str, Any] | None) -> float | None:
    """Network time of an image in full calls, from `eval.throughput --forecast`; None where that has no such step."""
    time = None if times is None else Times(times).of_run(run)
    return None if time is None else time.full_calls


def rival(point: Point, plain: Sequence[Point], cost: Callable[[Point], float | None], choose: slice) -> Point | None:
    """The run without caching that comes nearest to converged, on the seeds that choose, at equal cost.

    That is, of all that cost no more than the cheapest one which costs as much as the point. None where none does.
    """
    known, wanted = [(value, other) for other in plain if (value := cost(other)) is not None], cost(point)
    dear = [value for value, _ in known if wanted is not None and value >= EQUAL * wanted]
    cheap = [other for value, other in known if dear and value <= min(dear)]
    return max(cheap, key=lambda one: one.psnr[choose].mean(), default=None)


def paired(psnr: np.ndarray, other: np.ndarray) -> str:
    """How much nearer some seeds of a run come than those of another one: the mean with its 95 % interval, dB."""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*Metric.of(mean_estimate(psnr - other)).bounds)


def difference(point: Point, other: Point | None, report: slice) -> str:
    """How much nearer a run comes than another one, in dB, paired by seed, with a 95 % interval."""
    if other is None:
        return "-"
    return f"{paired(point.psnr[report], other.psnr[report])} ({other.sampler}, {other.cost:g})"


def rows(points: Sequence[Point], choose: slice, report: slice) -> list[tuple[str, ...]]:
    """A row per run, the dearest first; those with caching beside the runs without at equal cost."""
    plain = [point for point in points if point.kind.startswith("fewer steps")]
    found: list[tuple[str, ...]] = [("run", "cost by MACs", "by time", "PSNR, dB", "beside the same sampler",
                                     "beside the best sampler", "the same at equal time")]
    for point in sorted(points, key=lambda one: (-one.cost, one.name)):
        same = [other for other in plain if other.sampler == point.sampler]
        beside = ["", "", ""] if point in plain else [
            difference(point, rival(point, same, lambda one: one.cost, choose), report),
            difference(point, rival(point, plain, lambda one: one.cost, choose), report),
            difference(point, rival(point, plain, lambda one: one.time, choose), report)]
        found.append((point.name, f"{point.cost:.2f}", "-" if point.time is None else f"{point.time:.2f}",
                      "{:.1f} [{:.1f}, {:.1f}]".format(*point.on(report).bounds), *beside))
    return found


def fronts(points: Sequence[Point], cost: Callable[[Point], float | None], choose: slice, report: slice
           ) -> dict[str, list[tuple[float, float, float, float]]]:
    """Of each kind the settings that no other one of it beats on the seeds that choose: (cost, PSNR, low, high), on the
    seeds that report."""
    found = {}
    for kind in dict.fromkeys(point.kind for point in points):
        own = [(value, point) for point in points if point.kind == kind and (value := cost(point)) is not None]
        chosen = front([(value, point.psnr[choose].mean()) for value, point in own], higher=True)
        found[kind] = sorted((own[i][0], *own[i][1].on(report).bounds) for i in chosen)
    return {kind: line for kind, line in found.items() if line}


def measures_of(points: Sequence[Point]) -> list[str]:
    """The distances of images to real ones that some of the runs have."""
    return list(dict.fromkeys(name for point in points for name in point.metrics if name.endswith(LESS)))


def of_images(points: Sequence[Point], measure: str) -> dict[str, list[tuple[float, float, float, float]]]:
    """(cost, value, low, high) of all runs that were judged, by kind."""
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    for point in sorted(points, key=lambda one: one.cost):
        if measure in point.metrics:
            found.setdefault(point.kind, []).append((point.cost, *point.metrics[measure].bounds))
    return found


def judged_rows(points: Sequence[Point]) -> list[tuple[str, ...]]:
    """How much further from real images than the converged ones each run's are, the dearest first."""
    measures = {name: MEASURES[name.removesuffix(LESS)] for name in measures_of(points)}
    found: list[tuple[str, ...]] = [("run", "cost by MACs", *(one.heading for one in measures.values()))]
    for point in sorted(points, key=lambda one: (-one.cost, one.name)):
        if point.metrics.keys() >= measures.keys():
            found.append((point.name, f"{point.cost:.2f}", *("{:+.2f} [{:+.2f}, {:+.2f}]".format(
                *(one.scale * value for value in point.metrics[name].bounds)) for name, one in measures.items())))
    return found


def orders(points: Sequence[Point]) -> list[tuple[str, ...]]:
    """How fast the error falls as all steps shrink: a row for each kind, sampler and interval with three steps or more.

    The order between two numbers of steps is the slope of log(error) over log(steps); an error is 10^(-PSNR / 20).
    """
    found: list[tuple[str, ...]] = [("kind", "sampler", "N", "steps", "order between them")]
    for kind, sampler, interval in dict.fromkeys((one.kind, one.sampler, one.interval) for one in points):
        own = {one.steps: one.psnr.mean() for one in sorted(points, key=lambda one: one.steps)
               if (one.kind, one.sampler, one.interval) == (kind, sampler, interval)}
        if len(own) > 2:
            slopes = np.diff(list(own.values())) / 20 / np.diff(np.log10(list(own)))
            found.append((kind, sampler, str(interval or "-"), ", ".join(map(str, own)),
                          ", ".join(f"{slope:.2f}" for slope in slopes)))
    return found


def render(points: Sequence[Point], chosen_on: int, folder: Path) -> str:
    """Write table and picture of what there is into `folder`; returns what to tell the user."""
    if not points:
        return "nothing is measured yet"
    folder.mkdir(parents=True, exist_ok=True)
    choose, report = slice(chosen_on), slice(chosen_on, None)
    seeds = len(points[0].psnr)
    panels = [("cost per image by MACs (full calls)", fronts(points, lambda one: one.cost, choose, report))]
    if any(point.time is not None for point in points):
        panels.append(("network time per image (full calls)", fronts(points, lambda one: one.time, choose, report)))
    lines_of_kinds(panels, folder / "fronts.png", f"{PSNR}, dB")
    if judged := measures_of(points):
        lines_of_kinds([(f"cost per image by MACs (full calls): {name.removesuffix(LESS)}", of_images(points, name))
                        for name in judged], folder / "judged.png", "further from real images than converged ones")
    plans = [(f"{one.cost:.4g} calls", one.calls) for one in sorted(points, key=lambda one: one.cost) if one.calls]
    if plans:
        calls_of_runs(plans, folder / "plans.png")
    text = "\n".join([
        f"# {folder.name}", "",
        f"{seeds} seeds: the first {chosen_on} choose (the sampler, and the settings on a line of the picture), the "
        f"last {seeds - chosen_on} report. PSNR of the final latents to the converged ones of the same seed; costs are "
        "in full network calls per image. Differences are in dB, paired by seed, with 95 % intervals, to the run "
        "without caching named in brackets: the best of those that cost no more than the cheapest which costs at least "
        f"{EQUAL:g} of what the row does.", "",
        *markdown(rows(points, choose, report)), "", "![fronts](fronts.png)", "",
        *(["What the network calls of the plans do:", "", "![plans](plans.png)", ""] if plans else []),
        *(["How much further from real images than the converged images of the same seeds: distances of feature "
           "distributions (`eval.quality`) on all seeds, less those of the converged images, with 95 % intervals of "
           "the paired difference; below zero is nearer.", "", *markdown(judged_rows(points)), "",
           "![judged](judged.png)", ""] if judged else []),
        "How fast the error falls as all steps shrink: the slope of log(error) over log(steps), between one number of "
        "steps and the next.", "", *markdown(orders(points)), ""])
    write_atomically(folder / "table.md", lambda path: path.write_text(text))
    return f"{len(points)} runs are measured; wrote {folder / 'table.md'} and {folder / 'fronts.png'}"
