"""The page of a study of convergence: its table, distance against cost, and images of one run of each kind."""

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.tables.calls import calls_of
from eval.tables.page import Page, Pictures, Section, pictures_of
from eval.tables.page import write as write_page
from eval.tables.svg import Line, Mark, Plot
from lab.study import pages
from lab.study.convergence_report import PSNR, Point, fronts, rows
from run.folder import missing_seeds
from run.image_model import fill, open_model
from run.machine import Machine
from run.spec import Run

FEWER = "fewer steps"
MOST, FIRST, WORST = 8, 6, 2        # runs with images; seeds, and those where a run is furthest from converged


@dataclass(frozen=True)
class Shown:
    """What a page shows of a study. converged: the run that all are compared with. runs: of the points, by name.
    seeds: of the study, of which the first `chosen_on` choose. images: a folder for those of the runs."""
    converged: Run
    runs: Mapping[str, Run]
    seeds: Sequence[int]
    chosen_on: int
    images: Path

    def folder(self, run: Run) -> Path:
        return self.images / ("converged" if run is self.converged else run.name)


def examples(points: Sequence[Point]) -> list[Point]:
    """One run of each kind, fewer steps being one, at about one cost: that of the middle one of the cached runs."""
    cached = sorted(point.cost for point in points if not point.kind.startswith(FEWER))
    middle = cached[len(cached) // 2] if cached else sorted(point.cost for point in points)[len(points) // 2]
    found: dict[str, Point] = {}
    for point in sorted(points, key=lambda one: (round(abs(math.log(one.cost / middle)), 1), -one.psnr.mean())):
        found.setdefault(FEWER if point.kind.startswith(FEWER) else point.kind, point)
    return sorted(found.values(), key=lambda one: -one.psnr.mean())[:MOST]


def seeds_of(shown: Shown, chosen: Sequence[Point]) -> list[int]:
    """Which seeds are looked at, of those that report: the first, and those where a run is furthest from converged."""
    report = list(shown.seeds)[shown.chosen_on:]
    worst = [report[int(i)] for point in chosen for i in np.argsort(point.psnr[shown.chosen_on:])[:WORST]]
    return sorted(dict.fromkeys([*report[:FIRST], *worst]))


def make_images(shown: Shown, points: Sequence[Point], machine: Machine) -> None:
    """Sample the images that the page shows, unless they are there. Raises UserError."""
    chosen = examples(points)
    for run in (shown.converged, *(shown.runs[point.name] for point in chosen)):
        if missing_seeds(shown.folder(run), seeds_of(shown, chosen)):
            fill(open_model(run, machine), seeds_of(shown, chosen), shown.folder(run), machine)


def pictures(shown: Shown, chosen: Sequence[Point]) -> list[Pictures]:
    """The images that are there; none without those of the converged run."""
    seeds = seeds_of(shown, chosen)
    runs = {"converged": shown.converged, **{point.name: shown.runs[point.name] for point in chosen}}
    folders = {label: shown.folder(run) for label, run in runs.items() if not missing_seeds(shown.folder(run), seeds)}
    about = {point.name: f"{point.kind}, {point.cost:.2f} full calls" for point in chosen}
    return pictures_of(folders, seeds, about) if "converged" in folders and len(folders) > 1 else []


def plot(points: Sequence[Point], shown: Shown, cost: Callable[[Point], float | None], label: str) -> Plot:
    """The settings of each kind that no other of it beats, as in the study's picture."""
    choose, report = slice(shown.chosen_on), slice(shown.chosen_on, None)
    lines: list[Line] = []
    for kind, line in fronts(points, cost, choose, report).items():
        marks = []
        for price, value, low, high in line:
            point = next(one for one in points if one.kind == kind and cost(one) == price
                         and one.on(report).value == value)
            words = shlex.join(["python", "-m", shown.runs[point.name].family.command,
                                *shown.runs[point.name].spec.words()])
            note = (f"{point.name}: {value:.1f} dB [{low:.1f}, {high:.1f}] at {price:.2f}\n{len(point.psnr[report])} "
                    f"seeds from {shown.seeds[shown.chosen_on]}\n{words}")
            marks.append(Mark(price, value, low, high, note))
        lines.append(Line(kind, marks))
    return Plot("Distance against cost", label, f"{PSNR}, dB", lines, log=True)


def by_seed(points: Sequence[Point], shown: Shown) -> Plot:
    """The seeds of some runs, those of the first run worst first: which images a run gets wrong."""
    order = np.argsort(points[0].psnr[shown.chosen_on:])
    seeds = [shown.seeds[shown.chosen_on + int(i)] for i in order]
    return Plot("Seed by seed", f"seeds, the worst of {points[0].name} first", f"{PSNR}, dB", [
        Line(point.name, [Mark(n, float(point.psnr[shown.chosen_on:][i]), note=f"seed {seed}: "
                               f"{point.psnr[shown.chosen_on:][i]:.1f} dB")
                          for n, (i, seed) in enumerate(zip(order, seeds, strict=True), 1)], joined=False)
        for point in points])


def write(points: Sequence[Point], shown: Shown, folder: Path) -> Path | None:
    """Write the page of what is measured into `folder`; returns its path, None where nothing is."""
    if not points:
        return None
    chosen = examples(points)
    plots = [plot(points, shown, lambda one: one.cost, "cost per image by MACs, full calls")]
    if any(point.time is not None for point in points):
        plots.append(plot(points, shown, lambda one: one.time, "network time per image, full calls"))
    plots.append(by_seed(chosen[:3], shown))
    section = Section(
        shown.converged.config.name,
        [f"{len(shown.seeds)} seeds: the first {shown.chosen_on} choose, the others report. {PSNR}: of the final "
         "latents to the converged ones of the same seed; differences are to the run without caching at equal cost, in "
         "brackets. The images are of one run of each kind, at about one cost; their distances are of "
         "pixels."],
        rows(points, slice(shown.chosen_on), slice(shown.chosen_on, None)), plots, pictures(shown, chosen),
        {point.name: calls_of(shown.runs[point.name]) for point in chosen})
    lead = ["How near runs come to the converged images of the same seeds, and at what cost."]
    write_page(Page(f"Study {folder.name}", lead, [section],
                    pages.made_by(f"python -m scripts.convergence --config configs/studies/{folder.name}.yaml")),
               folder / "index.html")
    return folder / "index.html"
