"""Plots and pictures of calls as SVG, in the colours of a page (eval/tables/page.py) and for a page or a file."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from eval.tables.calls import COMPUTED, FORECAST, Calls
from run.files import write_atomically

TEMPLATE = Path(__file__).with_name("page.html")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 700, 340, 52, 26, 44       # GitHub shows pictures at this width
LETTER = 6.6                # the width of a letter in a line's name
MOST = COLORS = 8           # lines of a plot; colours
# A method has the same colour in every plot: that of the first word here that its name contains, else by its number.
HUES = {"plan": 3, "front": 0, "fewer steps": 0, "uncached": 0, "no cache": 0, "Block Caching": 4, "blocks": 4,
        "transformers": 4, "Clockwork": 5, "Learning-to-Cache": 6, "adaptive": 7, "forecast None": 1, "forecast": 2,
        "reuse": 1, "uniform": 1, "DeepCache": 1, "both": 6, "package": 5, "macs": 0}
SHAPES = ("M-5,0a5,5 0 1 0 10,0a5,5 0 1 0 -10,0z", "M-4.5,-4.5h9v9h-9z", "M0,-6l5.5,10h-11z", "M0,-6l6,6l-6,6l-6,-6z",
          "M0,6l5.5,-10h-11z")


@dataclass(frozen=True)
class Mark:
    """A point of a plot. low, high: the ends of its interval. note: shown when a reader points at it."""
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Line:
    """Marks of one kind, in order. joined: whether a line joins them. dots: whether the marks are shown."""
    name: str
    marks: Sequence[Mark]
    joined: bool = True
    dots: bool = True


@dataclass(frozen=True)
class Plot:
    """x, y: the titles of the axes. log: whether the x axis is logarithmic."""
    title: str
    x: str
    y: str
    lines: Sequence[Line]
    log: bool = False

    @property
    def drawn(self) -> list[tuple[Line, int, int]]:
        """The lines with marks, each with the numbers of its colour and its shape."""
        found: list[tuple[Line, int, int]] = []
        for line in (line for line in self.lines if line.marks):
            number = int("".join(re.findall(r"\d+$", line.name)) or 0)
            hue = next((hue for word, hue in HUES.items() if word in line.name), 1 + number % (COLORS - 1))
            found.append((line, hue, sum(hue == other for _, other, _ in found) % len(SHAPES)))
        return found

    @property
    def right(self) -> float:
        """Where the axes end and the names of the lines begin."""
        return WIDTH - 30 - LETTER * max(len(line.name) for line, *_ in self.drawn)


def ticks(low: float, high: float, log: bool = False) -> list[float]:
    """About five round numbers between low and high; on a logarithmic axis 1, 2 and 5 times powers of ten, or more."""
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
    """An axis of the picture: turns values into places."""

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
    """The picture for a page; empty for a plot without marks."""
    if not shown.drawn:
        return ""
    return "".join([f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="group" '
                    f'aria-label="{escape(shown.title)}">', *_inside(shown), "</svg>"])


def _inside(shown: Plot) -> Iterator[str]:
    """Title, axes, marks, and the name of each line beside its last mark."""
    marks = [mark for line, *_ in shown.drawn for mark in line.marks]
    heights = [value for mark in marks for value in (mark.y, mark.low, mark.high) if value is not None]
    x, y = Axis([mark.x for mark in marks], LEFT, shown.right, shown.log), Axis(heights, HEIGHT - BOTTOM, TOP)
    yield f'<text class="title" x="{LEFT}" y="14">{escape(shown.title)}</text>'
    yield from _axes(x, y, shown)
    at: dict[float, int] = {}           # marks of one cost stand side by side
    ends = []
    for line, hue, shape in shown.drawn:
        places = [_beside(x.at(mark.x), at) if line.dots else x.at(mark.x) for mark in line.marks]
        yield from _line(line, hue, shape, places, y)
        ends.append((y.at(line.marks[-1].y), places[-1], line.name, hue, shape))
    yield from _names(sorted(ends), shown.right)


def _axes(x: Axis, y: Axis, shown: Plot) -> Iterator[str]:
    for value in y.ticks():
        yield f'<path class="rule" d="M{LEFT},{y.at(value)}H{shown.right:.1f}"/>'
        yield f'<text x="{LEFT - 6}" y="{y.at(value) + 4}" text-anchor="end">{value:g}</text>'
    for value in x.ticks():
        yield f'<text x="{x.at(value)}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{value:g}</text>'
    yield f'<text x="{(LEFT + shown.right) / 2:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(shown.x)}</text>'
    yield (f'<text transform="translate(13,{(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
           f"{escape(shown.y)}</text>")


def _beside(place: float, taken: dict[float, int]) -> float:
    """A place, moved a little to the left or right if others have it. taken: how many marks, by place."""
    number = taken.get(place, 0)
    taken[place] = number + 1
    return place + (-1) ** number * 7 * ((number + 1) // 2)


def _line(line: Line, hue: int, shape: int, places: Sequence[float], y: Axis) -> Iterator[str]:
    kind = f"k{hue}"
    if line.joined and len(line.marks) > 1:
        path = "L".join(f"{x},{y.at(mark.y)}" for x, mark in zip(places, line.marks, strict=True))
        yield f'<path class="link {kind}" d="M{path}"/>'
    for x, mark in zip(places, line.marks if line.dots else [], strict=line.dots):
        bar = ""
        if mark.low is not None and mark.high is not None:
            bar = f'<path class="bar {kind}" d="M{x},{y.at(mark.low)}V{y.at(mark.high)}"/>'
        note = escape(f"{line.name}\n{mark.note}".strip())
        yield (f'<g class="mark" role="img" aria-label="{note}" data-note="{note}"><title>{note}</title>{bar}'
               f'<path class="dot {kind}" transform="translate({x},{y.at(mark.y)})" d="{SHAPES[shape]}"/></g>')


def _names(ends: Sequence[tuple[float, float, str, int, int]], right: float) -> Iterator[str]:
    """The name of each line at the height of its last mark, or as near to it as the others let it. ends: from above,
    the height and place of the last mark, the name, and the numbers of colour and shape."""
    room, height = 16, float(TOP)
    for number, (end, place, name, hue, shape) in enumerate(ends):
        height = max(height, min(end, HEIGHT - BOTTOM - room * (len(ends) - number - 1)))
        yield (f'<path class="lead k{hue}" d="M{place},{end}L{right + 8:.1f},{height:.1f}"/>'
               f'<path class="dot k{hue}" transform="translate({right + 14:.1f},{height:.1f})" d="{SHAPES[shape]}"/>'
               f'<text class="name" x="{right + 24:.1f}" y="{height + 4:.1f}">{escape(name)}</text>')
        height += room


def sheet(plots: Sequence[Plot], path: Path) -> None:
    """Write plots into an SVG file, one below the other; it is read on light and dark ground."""
    high = len(plots) * HEIGHT
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {high}" width="{WIDTH}" height="{high}">',
             f'<style>{_style()}</style><rect class="ground" width="100%" height="100%"/>']
    for number, shown in enumerate(plots):
        parts.append(f'<g class="plot" transform="translate(0,{number * HEIGHT})">{"".join(_inside(shown))}</g>')
    path.parent.mkdir(parents=True, exist_ok=True)
    text = re.sub(r"<title>.*?</title>", "", "".join([*parts, "</svg>\n"]), flags=re.S)
    write_atomically(path, lambda temporary: temporary.write_text(
        re.sub(r' (?:data-note|aria-label|role)="[^"]*"', "", text), encoding="utf-8"))


def _style() -> str:
    """The styles of a plot in a file, taken from the page's, light or dark by the reader's preference."""
    page = TEMPLATE.read_text(encoding="utf-8")
    colours = re.findall(r":root \{\s*(.*?)\s*\}", page, re.S)
    rules = re.findall(r"^(?:\.plot (?:text|\.title|\.name|\.rule)|\.(?:dot|link|lead|bar|k\d))[ .].*\}$", page, re.M)
    return (f":root{{{colours[0]}}}@media (prefers-color-scheme: dark){{:root{{{colours[1]}}}}}"
            f".ground{{fill:var(--page)}}{''.join(rules)}").replace("\n", "")


def calls(shown: Calls) -> str:
    """A column for each network call and a row for each part of the U-Net; reused parts are left empty."""
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
