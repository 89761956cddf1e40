"""One HTML file that shows results: tables, plots, images to compare, and what each call computed.

The file needs no network and no library. Code with results fills in a `Page` and writes it. The template beside this
file has the styles and the script.
"""

import base64
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from eval.metrics.images import open_images
from eval.tables import svg
from eval.tables.calls import Calls
from eval.tables.svg import TEMPLATE, Plot
from run.files import write_atomically
from run.psnr import psnr

MOST_BYTES = 3_500_000              # of the encoded images in a file
SMALL, LARGE = 64, 224              # pixels a side: small images stay unchanged, others are shrunk to the larger size
LONG = 16                           # rows: a longer table comes after the plots
FIRST, WORST, SEEN = 8, 3, 256      # seeds: the first ones, each arm's worst ones, and how many the worst are among
Rows = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Pictures:
    """The images of an arm. images: seed -> uint8 [height, width, 3], the same seeds in every arm of a section.

    distances: seed -> PSNR to the section's first arm, dB; None for the same image. about: a word or two on the arm.
    """
    label: str
    images: Mapping[int, np.ndarray]
    distances: Mapping[int, float | None] = field(default_factory=dict)
    about: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a page; empty fields are left out.

    rows: of a table, its head first. calls: of each arm, by label. commands: of the arms, by label.
    """
    title: str
    text: Sequence[str] = ()
    rows: Rows = ()
    plots: Sequence[Plot] = ()
    pictures: Sequence[Pictures] = ()
    calls: Mapping[str, Calls] = field(default_factory=dict)
    commands: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Page:
    """The contents of a page. made_by: the command, and other notes on the source of the numbers."""
    title: str
    lead: Sequence[str]
    sections: Sequence[Section]
    made_by: Sequence[str] = ()


def pictures_of(folders: Mapping[str, Path], seeds: Iterable[int], about: Mapping[str, str] | None = None
                ) -> list[Pictures]:
    """The images of arms, by label, from their sample folders: the first seeds, and those at which each arm is furthest
    from the first arm. Every folder must have all the seeds."""
    looked = list(seeds)[:SEEN]
    whole = {label: np.concatenate(list(open_images(folder, looked).batches(64))) for label, folder in folders.items()}
    return pictures_among(whole, looked, about)


def pictures_among(whole: Mapping[str, np.ndarray], seeds: Sequence[int], about: Mapping[str, str] | None = None
                   ) -> list[Pictures]:
    """The same for images in memory: uint8 [seeds, height, width, 3] for every arm."""
    first = next(iter(whole.values()))
    far = {label: psnr(np.square(images.astype(float) - first).mean((1, 2, 3))) for label, images in whole.items()}
    shown = [int(i) for values in far.values() if not np.isinf(values).all() for i in np.argsort(values)[:WORST]]
    places = list(dict.fromkeys([*shown, *range(min(FIRST, len(seeds)))]))      # the most important first
    return [Pictures(label, {seeds[i]: images[i] for i in places},
                     {} if images is first else {seeds[i]: _decibels(far[label][i]) for i in places},
                     (about or {}).get(label, "")) for label, images in whole.items()]


def _decibels(value: float) -> float | None:
    return round(float(value), 2) if np.isfinite(value) else None


def write(page: Page, path: Path) -> None:
    """Write the page, atomically. If its images take too many bytes, some seeds are left out."""
    body = [f"<h1>{escape(page.title)}</h1>", *map(_paragraph, page.lead)]
    if len(page.sections) > 1:
        body.append("<nav>" + "".join(f'<a href="#s{number}">{escape(one.title)}</a>'
                                      for number, one in enumerate(page.sections)) + "</nav>")
    room = MOST_BYTES // max(1, sum(bool(one.pictures) for one in page.sections))
    body += [_section(one, number, room) for number, one in enumerate(page.sections)]
    if page.made_by:
        body.append("<footer>" + "".join(f'<p class="quiet">{_text(line)}</p>' for line in page.made_by) + "</footer>")
    parts = {"TITLE": escape(page.title), "BODY": "\n".join(body)}
    text = re.sub("@(TITLE|BODY)@", lambda found: parts[found[1]], TEMPLATE.read_text(encoding="utf-8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _section(section: Section, number: int, room: int) -> str:
    parts = [f'<section id="s{number}"><h2>{escape(section.title)}</h2>', *map(_paragraph, section.text)]
    shown = [_table(section.rows)] if section.rows else []
    if drawn := [svg.plot(one) for one in section.plots if any(line.marks for line in one.lines)]:
        plots = "".join(f"<figure>{one}</figure>" for one in drawn)
        shown.insert(len(section.rows) < LONG, f'<h3>Plots</h3><div class="plots">{plots}</div>')
    parts += shown
    if section.pictures:
        parts.append(_viewer(section.pictures, room))
    if section.calls:
        parts.append(_calls(section.calls))
    if section.commands:
        lines = "".join(f"<li>{escape(label)}<br><code>{escape(words)}</code></li>"
                        for label, words in section.commands.items())
        parts.append(f"<h3>Commands</h3><details><summary>the sample command of each arm</summary><ul>{lines}</ul>"
                     "</details>")
    return "\n".join([*parts, "</section>"])


def _paragraph(text: str) -> str:
    return f"<p>{_text(text)}</p>"


def _text(text: str) -> str:
    """Text with `commands` as code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def _table(rows: Rows) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(row(cells, "td") for cells in rows[1:])
    head = row(rows[0], "th")
    return ('<div class="wide" tabindex="0" role="region" aria-label="table"><table>'
            f"<thead>{head}</thead><tbody>{body}</tbody></table></div>")


def _viewer(pictures: Sequence[Pictures], room: int) -> str:
    """The images to compare, as data for the template's script."""
    seeds, size = list(pictures[0].images), max(next(iter(pictures[0].images.values())).shape[:2])
    encoded = {one.label: {seed: _encoded(one.images[seed]) for seed in seeds} for one in pictures}
    each = [sum(len(images[seed]) for images in encoded.values()) for seed in seeds]
    kept = [seed for number, seed in enumerate(seeds) if sum(each[:number + 1]) <= room or number < 2]
    arms = [{"label": one.label, "about": one.about,
             "distances": {seed: value for seed, value in one.distances.items() if seed in kept},
             "images": {seed: encoded[one.label][seed] for seed in kept}} for one in pictures]
    data = json.dumps(arms).replace("</", "<\\/")
    return (f'<h3>Two arms, one seed</h3><div class="viewer" data-pixels="{"yes" if size <= SMALL else "no"}">'
            f'<script type="application/json">{data}</script></div>')


def _encoded(image: np.ndarray) -> str:
    """A picture as a URL; a large one is shrunk."""
    picture, buffer = Image.fromarray(image), io.BytesIO()
    small = max(picture.size) <= SMALL
    picture.thumbnail((LARGE, LARGE))
    picture.save(buffer, "WEBP", lossless=small, quality=100 if small else 85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _calls(shown: Mapping[str, Calls]) -> str:
    figures = "".join(
        f"<figure><figcaption>{escape(label)} <span>({len(one.full)} of {len(one.states[0])} calls compute everything)"
        f"</span></figcaption>{svg.calls(one)}</figure>" for label, one in shown.items())
    key = "".join(f'<li><svg viewBox="0 0 14 14"><rect width="14" height="14" class="{state}"/></svg>{state}</li>'
                  for state in ("computed", "forecast", "reused"))
    return ('<h3>What each call computed</h3><p class="quiet">From left to right the network calls of an image, from '
            "the highest noise on; from top to bottom the parts of the U-Net, from the outermost blocks in.</p>"
            f'<ul class="key">{key}</ul><div class="steps">{figures}</div>')
