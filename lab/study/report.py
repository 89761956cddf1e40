"""What a study ends in: records.jsonl, table.md, charts, sheets of images, and a page to look at, in results/NAME/."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.metrics.images import open_images
from eval.tables.plots import heat_maps, sample_rows
from eval.tables.study import Study, missing
from eval.tables.svg import sheet
from eval.tables.text import markdown
from lab.study.bench import Bench
from lab.study.charts import charts, maps
from lab.study.more import MORE
from lab.study.page import write_page
from lab.study.rows import Rows
from lab.study.show import Show
from lab.study.tables import Shown
from run.files import write_atomically
from run.folder import missing_seeds

AMPLIFIED = 8           # differences in a sheet of images


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
    """The first images of the arms, each above its difference to the first one's where that is asked for; False where
    none can be shown."""
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
    """Write what there is of a study into its folder; returns what to tell the user."""
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
    """The pictures of a part: its charts, maps, and a sheet of its images, those that there is something for."""
    rows, found = shown.rows, list[Path]()
    if plots := charts(rows, shown.show):
        found.append(folder / f"charts{name}.svg")
        sheet(plots, found[-1])
    for down, across in shown.show.maps:
        if panels := maps(rows, down, across):
            found.append(folder / f"{down}_{across}{name}.png")
            heat_maps(panels, found[-1], down, across)
    images = folder / f"samples{name}.png"
    if sheet_of_images(rows, shown.show, images) or images.is_file():       # one that was made where the images are
        found.append(images)
    return found


def pack(benches: Sequence[Bench]) -> None:
    """Write all records of a study to its one file."""
    found, names = [], set[str]()
    for bench in benches:
        found += [one for arm in bench.all for one in bench.records(arm).values()]
        found += [one for _, kept in bench.kept() for one in kept.values()]
        notes = {name: bench.note(Path(name)) for name in bench.part.made}
        found += [note for note in notes.values() if note]
        names |= {arm.name for one in (bench, *bench.also) for arm in one.all} | notes.keys()
        names |= {bench.setup.whole.name}
    benches[0].ledger.pack(found, names)
