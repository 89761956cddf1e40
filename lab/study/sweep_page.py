"""The page of a sweep: its table, quality against cost, and the images of the points that matter."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from eval.cost.macs import giga
from eval.tables.page import Page, Section
from eval.tables.page import write as write_page
from eval.tables.svg import Line, Mark, Plot
from lab.study import pages
from lab.study.arms import Arm
from lab.study.sweep_report import (
    HIGHER,
    Point,
    about,
    label,
    on_front,
    points_of,
    shown_metrics,
    table,
    varying,
)
from run.results import Result


def named(arms: Sequence[Arm], points: Sequence[Point]) -> list[Arm]:
    """The arms of one model under short names, where those tell them apart."""
    short = [label(point, points, varying(points)) or "cached" for point in points]
    return [replace(arm, label=name) if short.count(name) == 1 else arm for arm, name in zip(arms, short, strict=True)]


def plot(arms: Sequence[Arm], points: Sequence[Point], name: str, cost: str, axis: str | None) -> Plot:
    """A metric against a cost: a kind of mark for each value of the axis that varies most, and the front."""
    lines: dict[str, list[Mark]] = {}
    at: dict[int, Mark] = {}
    for i, (arm, point) in enumerate(zip(arms, points, strict=True)):
        value, price = point.metric(name), giga(point.macs) if cost == "macs" else point.time
        if value is not None and price is not None:
            kind = "no cache" if not point.run.caching else f"{axis} {point.axes.get(axis)}" if axis else "cached"
            at[i] = pages.mark(arm, price, value)
            lines.setdefault(kind, []).append(at[i])
    front = sorted((at[i] for i in on_front(points, cost, name) if i in at), key=lambda mark: mark.x)
    better = f"{name} ({'higher' if name in HIGHER else 'lower'} is better)"
    marks = [Line(kind, found, joined=False) for kind, found in lines.items()]
    return Plot(better, "MACs per image, G" if cost == "macs" else "network time (uncached = 1)", better,
                [*marks, Line("front", front, dots=False)])


def section(arms: Sequence[Arm], points: Sequence[Point]) -> Section:
    """One model's part; the arms with images are the uncached one, those on the front, and others after them."""
    names, axes, arms = shown_metrics(points), varying(points), named(arms, points)
    costs = [cost for cost in ("macs", "time") if any(getattr(point, cost) is not None for point in points)]
    plots = [plot(arms, points, name, cost, axes[0] if axes else None) for name in names for cost in costs]
    front = on_front(points, "macs", names[0]) if names else set()
    order = sorted(range(len(arms)), key=lambda i: (i > 0, i not in front, i))
    done = sum(point.result is not None for point in points)
    rows = [tuple(row) for row in table(points)]
    return pages.section(points[0].run.config.name, [f"{done} of {len(points)} points judged. {about(points)}"], rows,
                         plots, [arms[i] for i in order])


def write(found: Sequence[tuple[Arm, Result | None]], folder: Path) -> Path:
    """Write the page of what there is into `folder`; returns its path."""
    by_model = points_of(found, folder)
    sections = [section([arm for arm, _ in found if arm.run.config.name == model], points)
                for model, points in by_model.items()]
    path = folder / "index.html"
    write_page(Page(f"Sweep {folder.name}", ["The first arm of a model is its uncached run, which the images of the "
                                             "others are compared with, seed by seed."], sections,
                    pages.made_by(f"python -m scripts.sweep --config configs/sweeps/{folder.name}.yaml")), path)
    return path
