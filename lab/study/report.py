"""The results of a study in results/NAME/: records.jsonl, table.md, charts, sheets of images, and a page to look at."""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.metrics.images import open_images
from eval.tables.arms import Arm
from eval.tables.calls import calls_of
from eval.tables.page import Page, Pictures, Section, pictures_of, write
from eval.tables.plots import heat_maps, sample_rows
from eval.tables.study import Study, missing
from eval.tables.svg import sheet
from eval.tables.text import markdown
from lab.study.bench import Bench
from lab.study.charts import charts, maps
from lab.study.columns import on_front, scores_of
from lab.study.more import MORE, sentences
from lab.study.rows import PLAIN, Row, Rows
from lab.study.show import Show
from lab.study.tables import Shown, Table
from run.files import write_atomically
from run.folder import missing_seeds
from run.image_model import fill, open_model
from run.provenance import provenance

AMPLIFIED = 8           # factor of the differences in a sheet of images
MOST, FIRST, WORST = 10, 6, 2       # arms with images and calls; first seeds, and seeds at which an arm is furthest


def text_of(shown: Shown) -> list[str]:
    """The lines of a part of table.md."""
    text = [shown.counted, ""]
    for one in shown.tables:
        text += [*([f"## {one.heading}", ""] if one.heading else []), *markdown(one.lines), ""]
    for word in shown.show.more:
        if lines := MORE[word](shown.rows):
            text += [*lines, ""]
    left_out = [f"Left out: {entry}, there is no {missing(entry)[0]}." for entry in shown.left_out]
    return text + left_out + ([""] if left_out else [])


def sheet_of_images(rows: Rows, show: Show, path: Path) -> bool:
    """Draw the first images of the arms, if the study wants it each above its difference to the first arm's.

    False if there is nothing to show.
    """
    own = [row for row in rows.rows if not missing_seeds(row.arm.folder, row.arm.seeds[:show.samples])]
    if not show.samples or len(own) < 2 or (show.differences and len(own) > AMPLIFIED):
        return False
    seen: list[tuple[str, np.ndarray]] = []
    for row in own:
        images = next(open_images(row.arm.folder, row.arm.seeds[:show.samples]).batches(show.samples))
        seen.append((row.arm.label, images))
        if show.differences and len(seen) > 1:
            change = AMPLIFIED * abs(images.astype(int) - seen[0][1])
            seen.append((f"difference x {AMPLIFIED}", (255 - change.clip(0, 255)).astype(np.uint8)))
    sample_rows(seen, path, scale=64 / seen[0][1].shape[1])
    return True


def render(study: Study, benches: Sequence[Bench], folder: Path) -> str:
    """Write the results of a study so far into its folder. Returns a message for the user."""
    shown = [one for one in map(Shown, benches) if one.rows.rows]
    if not shown:
        return "nothing is measured yet"
    folder.mkdir(parents=True, exist_ok=True)
    pack(benches)
    about = " ".join(dict.fromkeys(line for one in shown for line in one.about))
    text, pictures = [f"# {study.title}", "", *([study.about, ""] if study.about else []), about, ""], list[Path]()
    for one in shown:
        name = "" if len(benches) == 1 else f"_{one.rows.whole.run.config.name}"
        own = draw(one, folder, name)
        text += [*([f"## {one.title}", ""] if len(benches) > 1 else []),
                 *text_of(one),
                 *(line for path in own for line in (f"![{path.stem}]({path.name})", ""))]
        pictures += own
    write_atomically(folder / "table.md", lambda path: path.write_text("\n".join(text).rstrip() + "\n"))
    page = write_page(study, shown, folder)
    done, total = sum(len(one.rows.rows) for one in shown), sum(one.total for one in map(Shown, benches))
    return (f"{done} of {total} arms are measured; wrote {', '.join(map(str, (folder / 'table.md', *pictures)))}\n"
            f"to look at: {page}")


def draw(shown: Shown, folder: Path, name: str) -> list[Path]:
    """Draw the charts, maps and sheet of images of a part, as far as it has them. Returns their paths."""
    rows, found = shown.rows, list[Path]()
    if plots := charts(rows, shown.show):
        found.append(folder / f"charts{name}.svg")
        sheet(plots, found[-1])
    for down, across in shown.show.maps:
        if panels := maps(rows, down, across):
            found.append(folder / f"{down}_{across}{name}.png")
            heat_maps(panels, found[-1], down, across)
    images = folder / f"samples{name}.png"
    if sheet_of_images(rows, shown.show, images) or images.is_file():       # perhaps made on another machine
        found.append(images)
    return found


def pack(benches: Sequence[Bench]) -> None:
    """Write all records of a study to one file."""
    found, names = [], set[str]()
    for bench in benches:
        found += [one for arm in bench.all for one in bench.records(arm).values()]
        found += [one for _, kept in bench.kept() for one in kept.values()]
        found += filter(None, map(bench.note, bench.part.made))
        names |= bench.part.made.keys() | {arm.name for one in (bench, *bench.also)
                                           for arm in (one.setup.whole, *one.all)}
    benches[0].ledger.pack(found, names)


def looked_at(shown: Shown, table: Table) -> list[Row]:
    """The rows whose images are shown. If there are too many: the front, or one of each kind at about the median cost
    of the cached rows."""
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
    """The folder of an arm's images. If a study needs no images, its page has its own."""
    if shown.bench.looks_at_images:
        return arm.folder
    return shown.bench.given.samples / "pages" / study.name / arm.run.name


def seeds_of(shown: Shown, rows: Sequence[Row]) -> list[int]:
    """The seeds on the page, among those that report: all, or the first ones and those at which a row is furthest."""
    report = list(shown.bench.seeds)[shown.rows.report]
    if shown.bench.looks_at_images:
        return report
    worst = [report[int(i)] for row in rows if row.psnr is not None
             for i in np.argsort(row.psnr[shown.rows.report])[:WORST]]
    return sorted(dict.fromkeys([*report[:FIRST], *worst]))


def make_images(study: Study, shown: Shown) -> None:
    """Sample the missing images of the page, if the study itself needs none. Raises UserError."""
    if shown.bench.looks_at_images or not shown.rows.rows:
        return
    rows = looked_at(shown, shown.tables[0])
    for arm in (shown.bench.setup.whole, *(row.arm for row in rows)):
        if missing_seeds(folder_of(shown, study, arm), seeds_of(shown, rows)):
            fill(open_model(arm.run, arm.on), seeds_of(shown, rows), folder_of(shown, study, arm), arm.on)


def pictures(study: Study, shown: Shown, rows: Sequence[Row]) -> list[Pictures]:
    """The images of the rows, as far as they exist; none without the reference run's."""
    whole, seeds = shown.bench.setup.whole, seeds_of(shown, rows)
    whole = next((row.arm for row in rows if row.arm.name == whole.name and not shown.show.by), whole)
    arms = {whole.label: whole, **{label_of(shown, row): row.arm for row in rows if row.arm.name != whole.name}}
    folders = {label: folder for label, arm in arms.items()
               if not missing_seeds(folder := folder_of(shown, study, arm), seeds)}
    about = {label_of(shown, row): f"{row.run.name}, {row.cost:.2f} full calls" for row in rows}
    return pictures_of(folders, seeds, about) if whole.label in folders and len(folders) > 1 else []


def label_of(shown: Shown, row: Row) -> str:
    return row.kind if shown.show.by else row.arm.label


def sections(study: Study, shown: Shown) -> list[Section]:
    """The sections of a part: a single one, or one with the charts and one for each budget."""
    plots, by = charts(shown.rows, shown.show), shown.show.by
    words = [line.removeprefix("- ") for line in sentences(shown.rows)] if "sentences" in shown.show.more else []
    found = [Section(shown.title, [shown.counted], plots=plots)] if by else []
    for table in shown.tables:
        rows = looked_at(shown, table)
        found.append(Section(
            table.heading or shown.title, () if by else [shown.counted, *words], table.lines, () if by else plots,
            pictures(study, shown, rows), {label_of(shown, row): calls_of(row.run) for row in rows},
            {label_of(shown, row): shlex.join(["python", *row.arm.command()]) for row in table.rows}))
    return found


def write_page(study: Study, shown: Sequence[Shown], folder: Path) -> Path:
    """Write the page of a study into a folder. Returns its path."""
    where = provenance(shown[0].bench.setup.device)
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    made_by = [f"Made by `python -m lab.study {study.name}` at commit {where['commit'] or 'unknown'}.",
               f"{where['device_name']}; {versions}."]
    about = " ".join(dict.fromkeys(line for part in shown for line in part.about))
    lead = ["Every arm starts from the same seeds.", *([study.about] if study.about else []), about]
    path = folder / "index.html"
    write(Page(study.title, lead, [one for part in shown for one in sections(study, part)], made_by), path)
    return path
