"""The charts of a study: a measure against a cost, a line for each kind of arm; and maps of two options."""

import math
import shlex
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from eval.cost.macs import giga
from eval.metrics.measure import Measure
from eval.metrics.registry import MEASURES
from eval.tables.plots import Map
from eval.tables.svg import MOST, Line, Mark, Plot
from lab.study.columns import of_images, on_front, scores_of
from lab.study.measures import minus_uncached
from lab.study.rows import Cost, Row, Rows, front
from lab.study.show import Show
from run.results import Metric
from run.seeds import format_seeds

ALIKE = 1.05                # costs with a smaller ratio are alike


class Axis(NamedTuple):
    label: str
    of: Cost


def cost_axis(word: str, rows: Rows) -> Axis:
    """A cost of a chart, by its word."""
    return {"cost": Axis("cost per image by MACs, full calls", lambda row: row.cost),
            "time": Axis("network time per image, full calls", lambda row: row.time),
            "macs": Axis("MACs per image, G", lambda row: giga(row.macs))}[word]


def value_of(name: str, row: Row, rows: Rows) -> Metric | None:
    """The value of a row in a chart, in the unit of its axis."""
    metric = rows.near(row) if name == "near" else row.metric(name)
    if metric is None or name == "near":
        return metric
    scale = _measure(name).scale
    return Metric(scale * metric.value, [scale * end for end in metric.interval] if metric.interval else None)


def _measure(name: str) -> Measure:
    return MEASURES[name.removesuffix(minus_uncached(""))]


def charts(rows: Rows, show: Show) -> list[Plot]:
    """All charts that have something to show."""
    found = [chart(rows, show, *words) for words in show.charts]
    return [one for one in found if any(line.marks for line in one.lines)]


def chart(rows: Rows, show: Show, name: str, cost: str) -> Plot:
    """A measure against a cost, of the best lines."""
    axis = cost_axis(cost, rows)
    kinds: dict[str, list[tuple[float, Metric, Row]]] = {}
    for row in rows.rows:
        value, price = value_of(name, row, rows), axis.of(row)
        if value is not None and price is not None and row.kind != "control":
            kinds.setdefault(_line(row, rows, show), []).append((price, value, row))
    if show.front and name == "near":
        kinds = {kind: _unbeaten(own, rows) for kind, own in kinds.items()}
    higher = name == "near" or _measure(name).higher
    every = [(price, value.value if higher else -value.value) for own in kinds.values() for price, value, _ in own]

    def shortfall(kind: str) -> float:
        """How far the marks of a line are behind the best at the same cost, in the mean."""
        own = [(price, value.value if higher else -value.value) for price, value, _ in kinds[kind]]
        return float(np.mean([max(v for c, v in every if c <= ALIKE * price) - value for price, value in own]))
    beside = [] if show.lines else [_front(rows, axis, name, kinds)]
    most = MOST - len(beside)
    kept = sorted(sorted(kinds, key=shortfall)[:most], key=list(kinds).index)       # the table has all of them
    lines = [Line(kind, [_mark(*one, rows) for one in sorted(kinds[kind], key=lambda one: one[0])], show.lines)
             for kind in kept]
    left_out = f", the best {most} of {len(kinds)} kinds" if len(kinds) > most else ""
    title, label = _titles(name, cost, rows)
    message = show.says.get(f"{name}, {cost}")
    return Plot(message or f"{title}{left_out}", axis.label, label, [*lines, *beside], log=cost in ("cost", "time"))


def _titles(name: str, cost: str, rows: Rows) -> tuple[str, str]:
    by = "time" if "time" in cost else "cost"
    if name == "near":
        return f"PSNR against {by}", "PSNR, dB"
    heading, better = _measure(name).heading or name, "higher" if _measure(name).higher else "lower"
    label = of_images(heading, name, rows)
    if name.endswith(minus_uncached("")):
        return f"{heading} less uncached against {by}", f"{label}, more than uncached"
    return f"{heading} against {by}", f"{label} ({better} is better)"


def _line(row: Row, rows: Rows, show: Show) -> str:
    """The name of a row's line: its kind, or the value of the option with the most values."""
    if show.lines:
        return row.kind
    if row.plain:
        return "no cache"
    varying = options_that_differ(rows)
    return f"{varying[0]} {row.options.get(varying[0])}" if varying else "cached"


def options_that_differ(rows: Rows) -> list[str]:
    """The options in which the cached rows differ, the one with the most values first."""
    cached = [row for row in rows.rows if not row.plain]
    names = dict.fromkeys(name for row in cached for name in row.options)
    count = {name: len({row.options.get(name) for row in cached}) for name in names}
    return sorted((name for name in names if count[name] > 1), key=lambda name: -count[name])


def _unbeaten(own: list[tuple[float, Metric, Row]], rows: Rows) -> list[tuple[float, Metric, Row]]:
    """The settings of a kind that no other setting of it beats on the seeds that choose."""
    points = [(price, row.psnr[rows.choose].mean()) for price, _, row in own]        # type: ignore[index]
    return [own[i] for i in front(points, higher=True)]


def _mark(price: float, value: Metric, row: Row, rows: Rows) -> Mark:
    """A row in a chart: its value with its interval, and a note with its name, seeds and command."""
    arm, (middle, low, high) = row.arm, value.bounds
    return Mark(price, middle, low, high, f"{arm.label}: {middle:.4g} [{low:.4g}, {high:.4g}]\nat {price:.4g}\nseeds "
                f"{format_seeds(list(arm.seeds)[rows.report])}\n{shlex.join(['python', *arm.command()])}")


def _front(rows: Rows, axis: Axis, name: str, kinds: dict[str, list[tuple[float, Metric, Row]]]) -> Line:
    places = {id(rows.rows[i]) for i in on_front(rows, axis.of, name)}
    marks = [Mark(price, value.value) for own in kinds.values() for price, value, row in own if id(row) in places]
    return Line("front", sorted(marks, key=lambda mark: mark.x), dots=False)


def maps(rows: Rows, down: str, across: str) -> list[Map]:
    """A map for each score. If other options differ, too: a map of the first score for each combination of those."""
    cached = [row for row in rows.rows if row.run.deepcache and {down, across} <= row.options.keys()]
    heads = [sorted({row.options[name] for row in cached}) for name in (down, across)]
    others = [name for name in options_that_differ(rows) if name not in (down, across)]
    shifted = {name: minus_uncached(name) for name in scores_of(rows)
               if any(row.metric(minus_uncached(name)) for row in cached)}
    scores = [(shifted.get(name, name), name in MEASURES and MEASURES[name].higher) for name in scores_of(rows)]

    def made(which: str, chosen: Sequence[Row], name: str, higher: bool) -> Map:
        numbers = np.full([len(head) for head in heads], math.nan)
        texts = [["" for _ in heads[1]] for _ in heads[0]]
        for row in chosen:
            metric = row.metric(name)
            if name == "speed-up by MACs":
                metric = Metric(rows.whole.macs / row.macs)
            elif name == "speed-up measured":
                metric = Metric(rows.whole.run.calls / row.time) if row.time else None
            if metric is not None:
                i, j = (head.index(row.options[axis]) for head, axis in zip(heads, (down, across), strict=True))
                numbers[i, j], low, high = metric.bounds
                sure = name in shifted.values() and not low <= 0 <= high
                texts[i][j] = f"{metric.value:.3g}" + ("*" if sure else "")
        return Map(of_images(name, name, rows) + which, heads[0], heads[1], numbers, texts, higher)

    if others:
        kinds = dict.fromkeys(tuple(row.options.get(name) for name in others) for row in cached)
        found = []
        for kind in kinds:
            chosen = [row for row in cached if tuple(row.options.get(name) for name in others) == kind]
            words = ", ".join(f"{name} {value}" for name, value in zip(others, kind, strict=True) if value is not None)
            if len(chosen) > 1:
                found.append(made(f"\n{textwrap.fill(words, 44)}", chosen, *scores[0]))
    else:
        found = [made("", cached, name, higher) for name, higher in (
            *scores, ("speed-up by MACs", True), ("speed-up measured", True))]
    return [one for one in found if not np.isnan(one.numbers).all()]
