"""The page of a study (eval/tables/page.py): for each part its tables, charts, images to compare and calls."""

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from eval.tables.arms import Arm
from eval.tables.calls import calls_of
from eval.tables.page import Page, Pictures, Section, pictures_of, write
from eval.tables.study import Study
from lab.study.charts import charts
from lab.study.columns import on_front, scores_of
from lab.study.more import sentences
from lab.study.rows import PLAIN, Row
from lab.study.tables import Shown, Table
from run.folder import missing_seeds
from run.image_model import fill, open_model
from run.provenance import provenance

MOST, FIRST, WORST = 10, 6, 2       # arms whose images and calls are shown; seeds, and those where one is furthest


def looked_at(shown: Shown, table: Table) -> list[Row]:
    """The rows whose images are shown: where there are too many those on the front, or one of each kind at about the
    cost of the middle one of the cached rows."""
    rows = table.rows
    if len(rows) <= MOST or shown.show.by:
        return rows[:MOST]
    if not shown.show.lines:
        places = on_front(shown.rows, lambda row: row.macs, next(iter(scores_of(shown.rows)), ""))
        return [shown.rows.rows[i] for i in places][:MOST]
    cached = sorted(row.cost for row in rows if not row.plain) or sorted(row.cost for row in rows)
    middle, found = cached[len(cached) // 2], dict[str, Row]()
    for row in sorted(rows, key=lambda row: (round(abs(math.log(row.cost / middle)), 1), -_mean(row))):
        found.setdefault(PLAIN if row.plain else row.kind, row)
    return sorted(found.values(), key=lambda row: -_mean(row))[:MOST]


def _mean(row: Row) -> float:
    return 0.0 if row.psnr is None else float(row.psnr.mean())


def folder_of(shown: Shown, study: Study, arm: Arm) -> Path:
    """Where the images of an arm are; of a study that looks at none the page has some of its own."""
    if shown.bench.looks_at_images:
        return arm.folder
    return shown.bench.given.samples / "pages" / study.name / arm.run.name


def seeds_of(shown: Shown, rows: Sequence[Row]) -> list[int]:
    """Which seeds are looked at, of those that report: all; or the first, and those where a row is furthest."""
    report = list(shown.bench.seeds)[shown.rows.report]
    if shown.bench.looks_at_images:
        return report
    worst = [report[int(i)] for row in rows if row.psnr is not None
             for i in np.argsort(row.psnr[shown.rows.report])[:WORST]]
    return sorted(dict.fromkeys([*report[:FIRST], *worst]))


def make_images(study: Study, shown: Shown) -> None:
    """Sample the images of the page, where the study looks at none, unless they are there. Raises UserError."""
    if shown.bench.looks_at_images or not shown.rows.rows:
        return
    rows = looked_at(shown, shown.tables[0])
    for arm in (shown.bench.setup.whole, *(row.arm for row in rows)):
        if missing_seeds(folder_of(shown, study, arm), seeds_of(shown, rows)):
            fill(open_model(arm.run, arm.on), seeds_of(shown, rows), folder_of(shown, study, arm), arm.on)


def pictures(study: Study, shown: Shown, rows: Sequence[Row]) -> list[Pictures]:
    """The images that are there; none without those of the run that all are compared with."""
    whole, seeds = shown.bench.setup.whole, seeds_of(shown, rows)
    whole = next((row.arm for row in rows if row.arm.name == whole.name and not shown.show.by), whole)
    arms = {whole.label: whole, **{label_of(shown, row): row.arm for row in rows if row.arm.name != whole.name}}
    folders = {label: folder for label, arm in arms.items()
               if not missing_seeds(folder := folder_of(shown, study, arm), seeds)}
    about = {label_of(shown, row): f"{row.run.name}, {row.cost:.2f} full calls" for row in rows}
    return pictures_of(folders, seeds, about) if whole.label in folders and len(folders) > 1 else []


def label_of(shown: Shown, row: Row) -> str:
    return row.kind if shown.show.by else row.arm.label


def command_of(arm: Arm) -> str:
    return shlex.join(["python", *arm.command()])


def sections(study: Study, shown: Shown) -> list[Section]:
    """A part of the page: one section, or one of the charts and one for each budget."""
    plots, found = charts(shown.rows, shown.show), list[Section]()
    if shown.show.by:
        found.append(Section(shown.title, [shown.counted], plots=plots))
    for table in shown.tables:
        rows = looked_at(shown, table)
        own = () if shown.show.by else plots
        found.append(Section(
            table.heading or shown.title, () if shown.show.by else [shown.counted, *in_words(shown)], table.lines, own,
            pictures(study, shown, rows), {label_of(shown, row): calls_of(row.run) for row in rows},
            {label_of(shown, row): command_of(row.arm) for row in table.rows}))
    return found


def in_words(shown: Shown) -> list[str]:
    """What the table comes to, in sentences."""
    return [line.removeprefix("- ") for line in sentences(shown.rows)] if "sentences" in shown.show.more else []


def write_page(study: Study, shown: Sequence[Shown], folder: Path) -> Path:
    """Write the page of what is measured into a folder; returns its path."""
    where: Mapping = provenance(shown[0].bench.setup.device)
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    made_by = [f"Made by `python -m lab.study {study.name}` at commit {where['commit'] or 'unknown'}.",
               f"{where['device_name']}; {versions}."]
    about = " ".join(dict.fromkeys(line for part in shown for line in part.about))
    lead = ["Every arm starts from the same seeds.", *([study.about] if study.about else []), about]
    path = folder / "index.html"
    write(Page(study.title, lead, [one for part in shown for one in sections(study, part)], made_by), path)
    return path
