"""A table of a paper with our numbers in it: paper | ours | difference."""

import csv
import io
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from eval.cost.macs import giga
from eval.cost.runs import macs_per_step, pruned
from eval.cost.timing import RunTime, Times
from eval.metrics.registry import RMSE_TO_CONVERGED
from eval.tables.arms import kind_of_result
from eval.tables.current import Wanted, inputs_of, match
from eval.tables.paper import COLUMNS, Row, Runs, columns_of, decimals, of_table, printed_rows, tables
from eval.tables.study import Part, Study
from eval.tables.text import align, markdown
from run.files import ROOT
from run.results import Result
from run.spec import Run

RESULTS = ROOT / "results"
Found = Sequence[tuple[Path, Result]]
_SETTINGS = ("center", "power")
_SPEED = ("throughput", "speedup")
_THEIR_GPU = "2080"


def wanted(row: Row, kind: str) -> Wanted:
    """What the number of a row is to be of, with the evaluator's files in their places."""
    return Wanted(row.run, kind, row.part.images, inputs_of(row.run, kind), published=True)


def speed_of(found: Found, run: Run) -> tuple[Path, Result, RunTime] | None:
    """The time of a run's network; from an accelerator where there is one, else from a CPU, and the newest of them."""
    own = []
    for path, result in found:
        same = (result.model, result.settings.get("dtype")) == (run.config.name, run.spec.network.dtype)
        timed = result.kind == "throughput" and result.times and same and not pruned(run)
        if timed and (time := Times.of(result).of_run(run)):
            own.append((path, result, time))
    return max(own, key=lambda one: (one[1].provenance.get("device") != "cpu", one[1].finished or "", str(one[0])),
               default=None)


class Cell(NamedTuple):
    """A number of ours beside a paper's. source: the file that it is from."""
    ours: str = "-"
    difference: str = "-"
    source: str = ""


class Ours(NamedTuple):
    """A run of ours beside a row of a paper. trial: how many images its numbers are of, where not as many as wanted."""
    row: Row
    cells: dict[str, Cell]
    trial: int | None


class Filled(NamedTuple):
    """A part with its numbers. rows: of each row of the paper what it prints, and the runs beside it.
    missing: (row, why it has no number of ours)."""
    part: Part
    columns: list[str]
    rows: list[tuple[str, dict[str, float | str | None], list[Ours]]]
    missing: list[tuple[str, str]]


class Filler:
    """Fills a table with what was counted and measured. sources: where the numbers are from, in words.

    wanted: what the number of a row is to be of. trials: also with numbers of fewer images, labelled.
    """

    def __init__(self, table: Study, found: Found, wanted: Callable[[Row, str], Wanted], trials: bool):
        self.table, self.found, self.wanted, self.trials = table, found, wanted, trials
        self.sources: dict[str, None] = {}

    def fill(self, part: Part, runs: Runs) -> Filled:
        own = columns_of(part)
        filled = Filled(part, [key for key in COLUMNS if key in own or (key == "macs_G" and runs.rows)], [], [])
        base = None     # calls of the run that the paper prints as 1x, for the rows after it; else the config's steps
        for label, printed in printed_rows(part).items():
            beside = runs.beside(part, label)
            if beside and printed.get("speedup") in (1.0, "1.0", "1.00"):
                base = beside[0].run.calls
            filled.rows.append((label, printed, [self.ours(row, printed, base, filled) for row in beside]))
        return filled

    def ours(self, row: Row, printed: Mapping[str, float | str | None], base: int | None, filled: Filled) -> Ours:
        """The numbers of a row."""
        values = {"macs_G": giga(macs_per_step(row.run, self.table.macs_steps).hook)}
        values |= {key: row.run.caching.settings[key] for key in _SETTINGS if key in filled.columns}
        files: dict[str, Path] = {}
        why: dict[str, None] = {}
        trial = self._scores(row, filled.columns, values, files, why)
        run = row.run
        device = self._speed(run, base or run.config.sampler.steps + run.calls - run.steps, filled.columns, values,
                             files)
        named = f"{row.part.title}, {row.label}" if row.part.name else row.label
        filled.missing.extend((named, reason) for reason in why)
        cells = {}
        for key in filled.columns:
            there, digits = key in values, _decimals(row.part, key, printed.get(key))
            source = files[key].name if key in files else "counted" if key == "macs_G" else ""
            apart = (trial and COLUMNS[key].metric) or key in _SETTINGS or (
                key == "throughput" and _THEIR_GPU not in device)
            number = printed.get(key)
            cells[key] = Cell(_shown(values[key], digits) if there else "-", "-" if apart or not there or number is None
                              else f"{round(values[key], digits) - float(number):+.{digits}f}", source)
        return Ours(row, cells, trial)

    def _scores(self, row: Row, columns: Sequence[str], values: dict[str, float], files: dict[str, Path],
                why: dict[str, None]) -> int | None:
        """Put in what evaluators measured, and why it is not there; of how many images a trial is."""
        trial = None
        for column in columns:
            name = COLUMNS[column].metric
            if not name:
                continue
            kind = "fidelity" if name == RMSE_TO_CONVERGED.name else kind_of_result(row)
            of_row = self.wanted(row, kind)
            path, result, fault = match([pair for pair in self.found if name in pair[1].metrics], of_row, self.trials)
            if path is None or result is None:
                why[fault or of_row.progress()] = None
                continue
            if fault:
                trial = result.images
                why[f"{fault}, shown"] = None
            values[column], files[column] = COLUMNS[column].scale * result.metrics[name].value, path
            digest = result.hashes.get("checkpoint", "not recorded")[:12]
            self.sources[f"{row.run.config.name} was measured by eval.{result.kind} on {result.images:,} images of "
                         f"each row; checkpoint sha256 {digest}. The CSV names the files."] = None
        return trial

    def _speed(self, run: Run, base: int, columns: Sequence[str], values: dict[str, float], files: dict[str, Path]
               ) -> str:
        """Put in the throughput, and the speed-up over an uncached run of `base` network calls; the device's name."""
        speed = speed_of(self.found, run) if {*_SPEED} & {*columns} else None
        if speed is None:
            return ""
        path, result, time = speed
        values |= {"throughput": result.settings["batch_size"] / time.seconds, "speedup": base / time.full_calls}
        files |= dict.fromkeys(_SPEED, path)
        where, settings = result.provenance, result.settings
        threads = f", CPU threads: {where['threads']}" if where["device"] == "cpu" else ""
        self.sources[f"images/s and speed-up of ours ({run.config.name}): the network alone, {settings['weights']} "
                     f"weights, {settings['dtype']}, batch {settings['batch_size']}, {where['device_name']}{threads} "
                     f"({path.name}). Images/s of other devices are not compared."] = None
        return str(where.get("device_name"))


def _decimals(part: Part, column: str, printed: float | str | None) -> int:
    return len(printed.partition(".")[2]) if isinstance(printed, str) else decimals(part, column)


def _shown(value: float, digits: int) -> str:
    """With the paper's decimals; with two digits where those would leave nothing, as of images/s on a CPU."""
    return f"{value:.2g}" if 0 < abs(value) < 10 ** -digits else f"{value:.{digits}f}"


def _printed(part: Part, column: str, value: float | str | None) -> str:
    """A value as the column is printed; a dash for none."""
    return value or "-" if value is None or isinstance(value, str) else f"{value:.{decimals(part, column)}f}"


class Rendered(NamedTuple):
    """A table with its numbers. steps: the full ones of each row, of a table of settings. marked: footnotes by number.
    notes: of the whole table."""
    table: Study
    filled: list[Filled]
    pending: list[tuple[Part, str]]
    steps: list[str]
    marked: list[str]
    notes: list[str]


def render(table: Study, runs: Runs, found: Found, asked: Callable[[Row, str], Wanted] = wanted, trials: bool = False
           ) -> Rendered:
    """Fill a table with what was counted and measured."""
    filler = Filler(table, found, asked, trials)
    filled = [filler.fill(part, runs) for part in table.parts]
    notes = [note.text.strip() for note in table.notes if not note.rows]
    if runs.pending:
        notes.append(f"Not run ({table.waiting}): {'; '.join(row for _, row in runs.pending)}.")
    marked = [note.text.strip() for note in table.notes if note.rows]
    return Rendered(table, filled, runs.pending, schedules(runs) if table.schedules else [],
                    [f"[{i}] {text}" for i, text in enumerate(marked, 1)], [*notes, *filler.sources])


def schedules(runs: Runs) -> list[str]:
    """The full steps of each row, for a table of settings."""
    return [f"{row.part.title + ', ' if row.part.name else ''}{row.label}: {len(level.full_steps)} full of "
            f"{row.run.steps} steps: {' '.join(map(str, level.full_steps))}"
            for row in runs.rows if (level := row.run.deepcache)]


def grid(rendered: Rendered, part: Filled) -> Iterator[list[str]]:
    """The lines of a part, its head first: a row's name, what a line holds, and its cells."""
    table, section = rendered.table, part.part.name
    numbers = {i: note for i, note in enumerate((note for note in table.notes if note.rows), 1)}

    def marks(label: str, column: str | None = None) -> str:
        return "".join(f" [{number}]" for number, note in numbers.items() if note.marks(section, label, column))

    yield ["", "", *(COLUMNS[key].heading for key in part.columns)]
    for label, printed, runs in part.rows:
        if table.paper:
            yield [label + marks(label), "paper", *(_printed(part.part, key, printed.get(key)) + marks(label, key)
                                                    for key in part.columns)]
        for row, cells, trial in runs:
            name = (f"... {row.entry.called}" if row.entry.beside else "") if table.paper else row.label
            yield [name, f"trial, {trial} images" if trial else "ours", *(cell.ours for cell in cells.values())]
            if table.paper:
                yield ["", "difference", *(cell.difference for cell in cells.values())]
        if (part.part, label) in rendered.pending:
            yield ["", "ours", *["-"] * len(part.columns)]


def why_missing(rendered: Rendered) -> list[str]:
    """Why rows have no number of ours, a line for each reason."""
    found: dict[str, list[str]] = {}
    for part in rendered.filled:
        for row, reason in part.missing:
            found.setdefault(reason, []).append(row)
    every = len(rendered.pending) + sum(len(runs) for part in rendered.filled for _, _, runs in part.rows)
    lines = [f"{reason}: {'all rows' if len(rows) == every > 1 else '; '.join(rows)}" for reason, rows in found.items()]
    hidden = any(reason.startswith("trial") and not reason.endswith("shown") for reason in found)
    return [*lines, *(["trials are shown with --trials"] if hidden else [])]


def _title(part: Part) -> str:
    return part.title if part.name else ""


def as_text(rendered: Rendered) -> str:
    """For a terminal."""
    parts = [rendered.table.heading]
    for part in rendered.filled:
        parts += [*filter(None, [_title(part.part)]), align([*grid(rendered, part)])]
    notes = [*rendered.marked, *(f"* {text}" for text in rendered.notes),
             *(f"- {text}" for text in why_missing(rendered))]
    parts += ["\n".join(textwrap.fill(line, 118, subsequent_indent="  ", break_on_hyphens=False) for line in lines)
              for lines in (rendered.steps, notes) if lines]
    return "\n\n".join(parts)


def as_markdown(rendered: Rendered) -> str:
    """With a heading of the second level."""
    lines = [f"## {rendered.table.heading}", ""]
    for part in rendered.filled:
        if title := _title(part.part):
            lines += [f"**{title}**", ""]
        lines += [*markdown([[cell.replace("*", r"\*") for cell in row] for row in grid(rendered, part)], right=2), ""]
    for bullets in (rendered.steps, rendered.marked, rendered.notes):
        lines += [f"- {text}" for text in bullets] + ([""] if bullets else [])
    return "\n".join(lines)


def as_csv(rendered: Rendered) -> str:
    """One number per line, with the file that ours is from."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["table", "section", "row", "run", "column", "paper", "ours", "difference", "from"])
    for part in rendered.filled:
        for label, printed, runs in part.rows:
            own = [(row.label + (f" (trial, {trial} images)" if trial else ""), cells) for row, cells, trial in runs]
            for named, cells in own or [("", dict.fromkeys(part.columns, Cell()))]:
                writer.writerows([rendered.table.name, part.part.name, label, named, key, _printed(
                    part.part, key, printed.get(key)), *cells[key]] for key in part.columns)
    return text.getvalue()


_TEX = {"&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_", "$": r"\$", "{": r"\{", "}": r"\}"}


def _tex(text: str) -> str:
    return "".join(_TEX.get(c, c) for c in text)


def as_latex(rendered: Rendered) -> str:
    """A table environment; needs booktabs."""
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{_tex(rendered.table.heading)}}}"]
    for part in rendered.filled:
        head, *body = grid(rendered, part)
        lines += [rf"\begin{{tabular}}{{ll{'r' * len(part.columns)}}}", r"\toprule"]
        if title := _title(part.part):
            lines.append(rf"\multicolumn{{{len(head)}}}{{l}}{{{_tex(title)}}} \\")
        lines += [" & ".join(map(_tex, head)) + r" \\", r"\midrule"]
        lines += [" & ".join("--" if cell == "-" else _tex(cell) for cell in row) + r" \\" for row in body]
        lines += [r"\bottomrule", r"\end{tabular}", ""]
    notes = [*rendered.steps, *rendered.marked, *rendered.notes]
    lines += [r"\begin{flushleft}\footnotesize", *(rf"{_tex(note)}\\" for note in notes), r"\end{flushleft}"]
    return "\n".join([*lines, r"\end{table}", ""])


FORMATS = {"text": as_text, "markdown": as_markdown, "csv": as_csv, "latex": as_latex}


_ABOUT = """# The papers' tables

Written by `python -m eval.table --all`; do not edit. Each row: what the paper prints, ours, and the difference to the
printed digits. A dash: not printed, or not measured here. MACs are exact and counted for every row; all else is taken
from the JSON files in this folder, and only from runs with just the settings of the row and the paper's number of
images. Rows without a line of ours are other authors' methods. Paper values: `configs/papers/*.yaml`. Commands behind
the rows: `scripts/table*.sh`. The same tables as CSV and LaTeX: `tables/`. What was measured on the small models that
are shipped here: a folder for each study (`python -m lab.study NAME`), with its table, its charts and its records; what
searches for plans found: `planning/`; step times: `throughput/`, `machines/`.
"""


def everything(found: Found) -> dict[str, str]:
    """The text of results/README.md and of every file of results/tables/, by path below results/."""
    filled = [render(table, of_table(table), found) for table in tables().values()]
    files = {"README.md": "\n".join([_ABOUT, *map(as_markdown, filled)])}
    for one in filled:
        files |= {f"tables/{one.table.name}.csv": as_csv(one), f"tables/{one.table.name}.tex": as_latex(one)}
    return files
