"""A table of a paper with our numbers in it: paper | ours | difference."""

import csv
import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from eval.cost.macs import giga
from eval.cost.runs import macs_per_step, pruned
from eval.cost.timing import RunTime, Times
from eval.metrics.registry import RMSE_TO_CONVERGED
from eval.tables.arms import Arm, Runs, runs_of
from eval.tables.current import match
from eval.tables.paper import COLUMNS, Printed, columns_of, decimals, printed_rows, tables
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


def speed_of(found: Found, run: Run) -> tuple[Path, Result, RunTime] | None:
    """The newest time of a run's network, on an accelerator if there is one, else on a CPU."""
    own = []
    for path, result in found:
        if result.kind == "throughput" and result.times and result.model == run.config.name and not pruned(run):
            time = Times.of(result).of_run(run)
            if time and result.settings.get("dtype") == run.spec.network.dtype:
                own.append((path, result, time))
    return max(own, key=lambda one: (one[1].provenance.get("device") != "cpu", one[1].finished or "", str(one[0])),
               default=None)


class Cell(NamedTuple):
    """A number of ours beside a paper's. source: the name of its file, or "counted"."""
    ours: str = "-"
    difference: str = "-"
    source: str = ""


class Ours(NamedTuple):
    """A run of ours beside a row of a paper. trial: the number of images of its numbers, if not the wanted one."""
    arm: Arm
    cells: dict[str, Cell]
    trial: int | None


class Filled(NamedTuple):
    """A part with its numbers. rows: the name of each row of the paper, its printed values, and our runs beside it."""
    part: Part
    columns: list[str]
    rows: list[tuple[str, Printed, list[Ours]]]

    @property
    def title(self) -> str:
        return self.part.title if self.part.name else ""

    def named(self, arm: Arm) -> str:
        return f"{self.title}, {arm.label}" if self.title else arm.label


class Rendered:
    """A table with our numbers. trials: also with numbers of fewer images, labelled."""

    def __init__(self, table: Study, runs: Runs, found: Found, trials: bool = False):
        self.table, self.runs, self.found, self.trials = table, runs, found, trials
        self.sources: dict[str, None] = {}              # the sources of the numbers, in words
        self.missing: dict[str, dict[str, None]] = {}   # reason -> the rows without a number of ours
        self.parts = [self._filled(part) for part in table.parts]
        self.marks = [note for note in table.notes if note.rows]        # footnotes, from 1

    def _filled(self, part: Part) -> Filled:
        own = columns_of(part)
        columns = [key for key in COLUMNS if key in own or (key == "macs_G" and self.runs.arms)]
        filled, base = Filled(part, columns, []), None
        for label, printed in printed_rows(part).items():
            beside = self.runs.of(part, label)
            if beside and printed.get("speedup") in (1.0, "1.0", "1.00"):
                base = beside[0].run.calls          # the calls of the row that the paper prints as 1x
            filled.rows.append((label, printed, [self._ours(filled, arm, printed, base) for arm in beside]))
        return filled

    def _ours(self, filled: Filled, arm: Arm, printed: Printed, base: int | None) -> Ours:
        """The numbers of a run."""
        run, files = arm.run, dict[str, Path]()
        values = {"macs_G": giga(macs_per_step(run, self.table.macs_steps).hook)}
        values |= {key: run.caching.settings[key] for key in _SETTINGS if key in filled.columns}
        trial = self._score(filled, arm, values, files)
        device = self._time(filled, run, base or run.config.sampler.steps + run.calls - run.steps, values, files)
        cells = {}
        for key in filled.columns:
            number, digits = printed.get(key), _decimals(filled.part, key, printed.get(key))
            source = files[key].name if key in files else "counted" if key == "macs_G" else ""
            apart = (trial and COLUMNS[key].metric) or key in _SETTINGS or (
                key == "throughput" and _THEIR_GPU not in device)
            cells[key] = Cell() if key not in values else Cell(
                _shown(values[key], digits), "-" if apart or number is None
                else f"{round(values[key], digits) - float(number):+.{digits}f}", source)
        return Ours(arm, cells, trial)

    def _score(self, filled: Filled, arm: Arm, values: dict[str, float], files: dict[str, Path]) -> int | None:
        """Add evaluators' numbers to values, and their files; note why some are missing. Returns a trial's images."""
        trial = None
        for column in filled.columns:
            name = COLUMNS[column].metric
            if not name:
                continue
            wanted = arm.wanted_in_table("fidelity" if name == RMSE_TO_CONVERGED.name else arm.evaluator)
            path, result, fault = match([pair for pair in self.found if name in pair[1].metrics], wanted, self.trials)
            if path is None or result is None:
                self.missing.setdefault(fault or wanted.progress(), {})[filled.named(arm)] = None
                continue
            if fault:
                trial = result.images
                self.missing.setdefault(f"{fault}, shown", {})[filled.named(arm)] = None
            values[column], files[column] = COLUMNS[column].scale * result.metrics[name].value, path
            digest = result.hashes.get("checkpoint", "not recorded")[:12]
            self.sources[f"{arm.run.config.name} was measured by eval.{result.kind} on {result.images:,} images of "
                         f"each row; checkpoint sha256 {digest}. The CSV names the files."] = None
        return trial

    def _time(self, filled: Filled, run: Run, base: int, values: dict[str, float], files: dict[str, Path]) -> str:
        """Add the throughput, and the speed-up over an uncached run of `base` calls. Returns the device's name."""
        speed = speed_of(self.found, run) if {*_SPEED} & {*filled.columns} else None
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

    @property
    def steps(self) -> list[str]:
        """The full steps of each row, for a table of settings."""
        return [f"{part.named(arm)}: {len(level.full_steps)} full of {arm.run.steps} steps: "
                f"{' '.join(map(str, level.full_steps))}"
                for part in self.parts if self.table.schedules for arm in self.runs.of(part.part)
                if (level := arm.run.deepcache)]

    @property
    def footnotes(self) -> list[str]:
        return [f"[{number}] {note.text.strip()}" for number, note in enumerate(self.marks, 1)]

    @property
    def notes(self) -> list[str]:
        """The notes on the whole table, and the sources of its numbers."""
        pending = [f"Not run ({self.table.waiting}): {'; '.join(row for _, row in self.runs.pending)}."]
        return [*(note.text.strip() for note in self.table.notes if not note.rows),
                *(pending if self.runs.pending else []), *self.sources]

    @property
    def why_missing(self) -> list[str]:
        """Why rows have no number of ours: a line for each reason."""
        every = len(self.runs.pending) + len(self.runs.arms)
        lines = [f"{reason}: {'all rows' if len(rows) == every > 1 else '; '.join(rows)}"
                 for reason, rows in self.missing.items()]
        hidden = any(reason.startswith("trial") and not reason.endswith("shown") for reason in self.missing)
        return [*lines, *(["trials are shown with --trials"] if hidden else [])]

    def grid(self, filled: Filled) -> Iterator[list[str]]:
        """The lines of a part, its head first: the name of the row, paper, ours or difference, and the cells."""
        part, paper = filled.part, self.table.paper

        def marks(label: str, column: str | None = None) -> str:
            return "".join(f" [{number}]" for number, note in enumerate(self.marks, 1)
                           if note.marks(part.name, label, column))

        images = any(COLUMNS[key].metric for key in filled.columns) and part.images
        yield ["", f"{images:,} images" if images else "", *(COLUMNS[key].heading for key in filled.columns)]
        for label, printed, runs in filled.rows:
            if paper:
                yield [label + marks(label), "paper", *(_printed(part, key, printed) + marks(label, key)
                                                        for key in filled.columns)]
            for arm, cells, trial in runs:
                name = (f"... {arm.entry.called}" if arm.entry.beside else "") if paper else arm.label
                yield [name, f"trial, {trial} images" if trial else "ours", *(cell.ours for cell in cells.values())]
                if paper:
                    yield ["", "difference", *(cell.difference for cell in cells.values())]
            if (part.name, label) in self.runs.pending:
                yield ["", "ours", *["-"] * len(filled.columns)]


def _decimals(part: Part, column: str, printed: float | str | None) -> int:
    return len(printed.partition(".")[2]) if isinstance(printed, str) else decimals(part, column)


def _shown(value: float, digits: int) -> str:
    """A value with the paper's decimals, or with two digits if it would become 0, such as images/s on a CPU."""
    return f"{value:.2g}" if 0 < abs(value) < 10 ** -digits else f"{value:.{digits}f}"


def _printed(part: Part, column: str, printed: Mapping[str, float | str | None]) -> str:
    """A printed value with the column's decimals; a dash if there is none."""
    value = printed.get(column)
    return value or "-" if value is None or isinstance(value, str) else f"{value:.{decimals(part, column)}f}"


def as_text(rendered: Rendered) -> str:
    """The table for a terminal."""
    parts = [rendered.table.heading]
    for part in rendered.parts:
        parts += [*filter(None, [part.title]), align([*rendered.grid(part)])]
    notes = [*rendered.footnotes, *(f"* {text}" for text in rendered.notes),
             *(f"- {text}" for text in rendered.why_missing)]
    parts += ["\n".join(textwrap.fill(line, 118, subsequent_indent="  ", break_on_hyphens=False) for line in lines)
              for lines in (rendered.steps, notes) if lines]
    return "\n\n".join(parts)


def as_markdown(rendered: Rendered) -> str:
    """The table in Markdown, with a heading of the second level."""
    lines = [f"## {rendered.table.heading}", ""]
    for part in rendered.parts:
        lines += [f"**{part.title}**", ""] if part.title else []
        cells = [[cell.replace("*", r"\*") for cell in row] for row in rendered.grid(part)]
        lines += [*markdown(cells, right=2), ""]
    for bullets in (rendered.steps, rendered.footnotes, rendered.notes):
        lines += [f"- {text}" for text in bullets] + ([""] if bullets else [])
    return "\n".join(lines)


def as_csv(rendered: Rendered) -> str:
    """One number per line, with the file that our number is from."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["table", "section", "row", "run", "column", "images", "paper", "ours", "difference", "from"])
    for part, columns, rows in rendered.parts:
        for label, printed, runs in rows:
            own = [(arm.label + (f" (trial, {trial} images)" if trial else ""), cells) for arm, cells, trial in runs]
            for named, cells in own or [("", dict.fromkeys(columns, Cell()))]:
                writer.writerows([rendered.table.name, part.name, label, named, key, part.images if COLUMNS[key].metric
                                  else "", _printed(part, key, printed), *cells[key]] for key in columns)
    return text.getvalue()


_TEX = {"&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_", "$": r"\$", "{": r"\{", "}": r"\}"}


def _tex(text: str) -> str:
    return "".join(_TEX.get(c, c) for c in text)


def as_latex(rendered: Rendered) -> str:
    """A LaTeX table; it needs booktabs."""
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{_tex(rendered.table.heading)}}}"]
    for part in rendered.parts:
        head, *body = rendered.grid(part)
        lines += [rf"\begin{{tabular}}{{ll{'r' * len(part.columns)}}}", r"\toprule"]
        lines += [rf"\multicolumn{{{len(head)}}}{{l}}{{{_tex(part.title)}}} \\"] if part.title else []
        lines += [" & ".join(map(_tex, head)) + r" \\", r"\midrule"]
        lines += [" & ".join("--" if cell == "-" else _tex(cell) for cell in row) + r" \\" for row in body]
        lines += [r"\bottomrule", r"\end{tabular}", ""]
    notes = [*rendered.steps, *rendered.footnotes, *rendered.notes]
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
    rendered = [Rendered(table, runs_of(table), found) for table in tables().values()]
    files = {"README.md": "\n".join([_ABOUT, *map(as_markdown, rendered)])}
    for one in rendered:
        files |= {f"tables/{one.table.name}.csv": as_csv(one), f"tables/{one.table.name}.tex": as_latex(one)}
    return files
