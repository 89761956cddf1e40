"""Plots and pictures of calls as SVG: in a page (eval/tables/page.py), whose colours they have, or as a file."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from eval.tables.calls import COMPUTED, FORECAST, Calls
from run.files import write_atomically

TEMPLATE = Path(__file__).with_name("page.html")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 520, 340, 52, 14, 26, 44
COLORS = 8
SHAPES = ("M-5,0a5,5 0 1 0 10,0a5,5 0 1 0 -10,0z", "M-4.5,-4.5h9v9h-9z", "M0,-6l5.5,10h-11z", "M0,-6l6,6l-6,6l-6,-6z",
          "M0,6l5.5,-10h-11z")


@dataclass(frozen=True)
class Mark:
    """A point of a plot. low, high: the ends of its interval. note: what is told where a reader points at it."""
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Line:
    """Marks of one kind, in the order in which they are joined. joined: whether they are. dots: whether the marks are
    shown, or the line alone."""
    name: str
    marks: Sequence[Mark]
    joined: bool = True
    dots: bool = True


@dataclass(frozen=True)
class Plot:
    """x, y: what the axes show. log: of the x axis."""
    title: str
    x: str
    y: str
    lines: Sequence[Line]
    log: bool = False


def ticks(low: float, high: float, log: bool = False) -> list[float]:
    """Round numbers between two others: about five; on a logarithmic axis 1, 2 and 5 times powers of ten, or more."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for factors in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
            found = [factor * 10.0 ** power for power in powers for factor in factors]
            found = [value for value in found if low <= value <= high]
            if len(found) > 3:
                return found
    rough = (high - low) / 5 or 1.0
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * size for factor in (1, 2, 5, 10) if factor * size >= rough)
    return [step * n for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


class Axis:
    """Values to places along an axis of the picture."""

    def __init__(self, values: Sequence[float], start: float, end: float, log: bool = False):
        self.log = log and min(values) > 0
        low, high = min(values), max(values)
        if self.log:
            self.low, self.high = low / 1.1, high * 1.1
        else:
            room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
            self.low, self.high = low - room, high + room
        self.start, self.end = start, end

    def at(self, value: float) -> float:
        low, high, value = (math.log(one) if self.log else one for one in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        return ticks(self.low, self.high, self.log)


def plot(shown: Plot) -> str:
    """The picture for a page, and its key as a list. Nothing of a plot without marks."""
    if not any(line.marks for line in shown.lines):
        return ""
    return "".join([f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="group" '
                    f'aria-label="{escape(shown.title)}">', *_inside(shown), "</svg>", _key(shown.lines)])


def _axes_of(shown: Plot) -> tuple[Axis, Axis]:
    marks = [mark for line in shown.lines for mark in line.marks]
    heights = [value for mark in marks for value in (mark.y, mark.low, mark.high) if value is not None]
    return Axis([mark.x for mark in marks], LEFT, WIDTH - RIGHT, shown.log), Axis(heights, HEIGHT - BOTTOM, TOP)


def _inside(shown: Plot) -> Iterator[str]:
    """Title, axes and marks."""
    x, y = _axes_of(shown)
    yield f'<text class="title" x="{LEFT}" y="14">{escape(shown.title)}</text>'
    yield from _axes(x, y, shown)
    at: dict[float, int] = {}           # marks of one cost stand side by side
    for number, line in enumerate(shown.lines):
        places = [_beside(x.at(mark.x), at) if line.dots else x.at(mark.x) for mark in line.marks]
        yield from _line(line, number, places, y)


def _axes(x: Axis, y: Axis, shown: Plot) -> Iterator[str]:
    for value in y.ticks():
        yield f'<path class="rule" d="M{LEFT},{y.at(value)}H{WIDTH - RIGHT}"/>'
        yield f'<text x="{LEFT - 6}" y="{y.at(value) + 4}" text-anchor="end">{value:g}</text>'
    for value in x.ticks():
        yield f'<text x="{x.at(value)}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{value:g}</text>'
    yield f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(shown.x)}</text>'
    yield (f'<text transform="translate(13,{(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
           f"{escape(shown.y)}</text>")


def _beside(place: float, taken: dict[float, int]) -> float:
    """A place, or one a little to the left or right of it where others are there already. taken: how many, by place."""
    number = taken.get(place, 0)
    taken[place] = number + 1
    return place + (-1) ** number * 7 * ((number + 1) // 2)


def _line(line: Line, number: int, places: Sequence[float], y: Axis) -> Iterator[str]:
    kind, shape = f"k{number % COLORS}", SHAPES[number % len(SHAPES)]
    if line.joined and len(line.marks) > 1:
        path = "L".join(f"{x},{y.at(mark.y)}" for x, mark in zip(places, line.marks, strict=True))
        yield f'<path class="link {kind}" d="M{path}"/>'
    for x, mark in zip(places, line.marks if line.dots else [], strict=line.dots):
        bar = ""
        if mark.low is not None and mark.high is not None:
            bar = f'<path class="bar {kind}" d="M{x},{y.at(mark.low)}V{y.at(mark.high)}"/>'
        note = escape(f"{line.name}\n{mark.note}".strip())
        yield (f'<g class="mark" role="img" aria-label="{note}" data-note="{note}"><title>{note}</title>{bar}'
               f'<path class="dot {kind}" transform="translate({x},{y.at(mark.y)})" d="{shape}"/></g>')


def _key(lines: Sequence[Line]) -> str:
    names = "".join(f'<li><svg viewBox="-7 -7 14 14"><path class="dot k{number % COLORS}" '
                    f'd="{SHAPES[number % len(SHAPES)]}"/></svg>{escape(line.name)}</li>'
                    for number, line in enumerate(lines) if line.marks)
    return f'<ul class="key">{names}</ul>'


def sheet(plots: Sequence[Plot], path: Path) -> None:
    """Write plots into an SVG file, two in a row, each line named at its end; it is read on light and dark ground."""
    names = max(len(line.name) for shown in plots for line in shown.lines if line.marks)
    width, columns = WIDTH + 6 * names + 24, min(2, len(plots))
    rows = -(-len(plots) // columns)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {columns * width} {rows * HEIGHT}" '
             f'width="{columns * width}" height="{rows * HEIGHT}">', f"<style>{_style()}</style>",
             '<rect class="ground" width="100%" height="100%"/>']
    for number, shown in enumerate(plots):
        place = f"translate({number % columns * width},{number // columns * HEIGHT})"
        parts.append(f'<g class="plot" transform="{place}">{"".join([*_inside(shown), *_names(shown)])}</g>')
    path.parent.mkdir(parents=True, exist_ok=True)
    text = re.sub(r"<title>.*?</title>", "", "".join([*parts, "</svg>\n"]), flags=re.S)
    write_atomically(path, lambda temporary: temporary.write_text(
        re.sub(r' (?:data-note|aria-label|role)="[^"]*"', "", text), encoding="utf-8"))


def _names(shown: Plot) -> Iterator[str]:
    """The name of each line beside its last mark, or as near to it as the others let it."""
    lines = [(number, line) for number, line in enumerate(shown.lines) if line.marks]
    _, y = _axes_of(shown)
    wanted = sorted((y.at(line.marks[-1].y), number, line.name) for number, line in lines)
    room, height = 15, float(TOP)
    for place, (end, number, name) in enumerate(wanted):
        height = max(height, min(end, HEIGHT - BOTTOM - room * (len(wanted) - place - 1)))
        yield (f'<path class="dot k{number % COLORS}" transform="translate({WIDTH},{height:.1f})" '
               f'd="{SHAPES[number % len(SHAPES)]}"/><text x="{WIDTH + 10}" y="{height + 4:.1f}">{escape(name)}</text>')
        height += room


def _style() -> str:
    """The looks of a plot in a file: those of a page, which follow what a reader prefers."""
    page = TEMPLATE.read_text(encoding="utf-8")
    colours = re.findall(r":root \{\s*(.*?)\s*\}", page, re.S)
    rules = re.findall(r"^(?:\.plot (?:text|\.title|\.rule)|\.dot|\.link|\.bar|\.k\d)[ .].*\}$", page, re.M)
    return (f":root{{{colours[0]}}}@media (prefers-color-scheme: dark){{:root{{{colours[1]}}}}}"
            f".ground{{fill:var(--page)}}{''.join(rules)}").replace("\n", "")


def calls(shown: Calls) -> str:
    """A column for each network call, a row for each part of the U-Net; what is reused shows the ground."""
    width, rows = len(shown.states[0]), len(shown.states)
    found = {COMPUTED: "", FORECAST: ""}
    for row, states in enumerate(shown.states):
        start = 0
        for step in range(1, width + 1):
            if step == width or states[step] != states[start]:
                if states[start] in found:
                    found[states[start]] += f"M{start},{row}h{step - start - 0.12:.2f}v1h{start - step + 0.12:.2f}z"
                start = step
    paths = "".join(f'<path class="{state}" d="{path}"/>' for state, path in found.items())
    said = f"{len(shown.full)} of {width} network calls compute everything"
    return (f'<svg viewBox="0 0 {width} {rows}" preserveAspectRatio="none" role="img" aria-label="{said}" '
            f'style="height:{min(130, max(40, 7 * rows))}px">{paths}</svg>')
