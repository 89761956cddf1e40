"""A table of a paper with our numbers in it: paper | ours | difference."""

import csv
import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from eval.cost.macs import giga
from eval.cost.runs import macs_per_step, pruned
from eval.cost.timing import Times
from eval.metrics.registry import RMSE_TO_CONVERGED, SMALL_MEASURES
from eval.tables.current import Wanted, inputs_of
from eval.tables.paper import COLUMNS, Note, Section, Table, tables
from eval.tables.rows import Row, Runs, of_table
from eval.tables.text import align
from run.files import ROOT
from run.results import Result
from run.spec import Run

RESULTS = ROOT / "results"


Found = Sequence[tuple[Path, Result]]


_SETTINGS = ("center", "power")


_THEIR_GPU = "2080"


def kind_of_result(run: Run, columns: Sequence[str]) -> str:
    """The kind of result that has a row's metrics: whose convention the paper's column follows."""
    if any(measure.column in columns for measure in SMALL_MEASURES):
        return "quality"
    return "fid" if run.family.judge == "clip_score" and "clip" not in columns else run.family.judge


def wanted(row: Row, section: Section, kind: str) -> Wanted:
    """What the number of a row is to be of, with the evaluator's files in their places."""
    return Wanted(row.run, kind, section.images, inputs_of(row.run, kind), published=True)


def is_of(result: Result, row: Row, section: Section, kind: str) -> bool:
    """Whether a result is the current one of a row: of just its settings, inputs and number of images."""
    return wanted(row, section, kind).fault(result) is None


Candidates = Sequence[tuple[Path, Result]]


def newest(found: Candidates, row: Row, section: Section, kind: str) -> tuple[Path, Result] | None:
    """The last of the results that are of a row."""
    return _last([pair for pair in found if is_of(pair[1], row, section, kind)])


def _last(found: Candidates) -> tuple[Path, Result] | None:
    return max(found, key=lambda pair: (pair[1].finished or "", str(pair[0])), default=None)


class Measured(NamedTuple):
    """What there is for a cell. path, result: None without a number. why: none is shown, or whose number this is."""
    path: Path | None
    result: Result | None
    why: str | None


class Asked(NamedTuple):
    """What a table is filled with. wanted: of a row, its section and a kind of result. trials: also with numbers of
    fewer images, labelled."""
    wanted: Callable[[Row, Section, str], Wanted] = wanted
    trials: bool = False


def measured(found: Candidates, asked: Wanted, trials: bool) -> Measured:
    """The number of a row, or why there is none; with `trials`, else that of another number of images."""
    own = [(path, result) for path, result in found if asked.of_another_run(result) is None]
    faults = {path: asked.fault(result) for path, result in own}
    current = _last([pair for pair in own if faults[pair[0]] is None])
    if current:
        return Measured(*current, None)
    trial = _last([(path, result) for path, result in own if faults[path] == asked.trial(result)])
    if trial and trials:
        return Measured(*trial, faults[trial[0]])
    last = trial or _last(own)
    return Measured(None, None, faults[last[0]] if last else None)


class Speed(NamedTuple):
    """Of the network alone, from the times of full and cached steps."""
    images_per_second: float
    speedup: float                  # over an uncached run of `base` network calls
    path: Path
    result: Result


def speed_of(found: Found, run: Run, base: int) -> Speed | None:
    """The throughput of a run; from an accelerator where there is one, else from a CPU, and from the newest of them.

    base: network calls of the uncached run that the speed-up is over.
    """
    own = []
    for path, result in found:
        same = (result.model, result.settings.get("dtype")) == (run.config.name, run.spec.network.dtype)
        if pruned(run) or result.kind != "throughput" or not result.times or not same:
            continue
        if time := Times.of(result).of_run(run):
            own.append(Speed(result.settings["batch_size"] / time.seconds, base / time.full_calls, path, result))
    return max(own, key=lambda s: (s.result.provenance.get("device") != "cpu", s.result.finished or "", str(s.path)),
               default=None)


class Line(NamedTuple):
    """One line of a table: what the paper prints for a row, what is ours, or their difference."""
    label: str                      # with the marks of its footnotes; empty but on a row's first line
    what: str                       # paper, ours, difference
    cells: list[str]


class Filled(NamedTuple):
    """A section with its numbers. values: what the lines show: (row, run, column, paper, ours, difference, from).
    missing: (row, why it has no number of ours)."""
    section: Section
    columns: list[str]
    lines: list[Line]
    values: list[tuple[str, ...]]
    missing: list[tuple[str, str]]


class Rendered(NamedTuple):
    """A table with its numbers. marked: footnotes by number. notes: of the whole table."""
    table: Table
    filled: list[Filled]
    marked: list[str]
    notes: list[str]


def _decimals(section: Section, column: str, printed: float | str | None) -> int:
    if isinstance(printed, str):
        return len(printed.partition(".")[2])
    return section.decimals.get(column, COLUMNS[column].decimals)


def _shown(value: float, decimals: int) -> str:
    """With the paper's decimals; with two digits where those would leave nothing, as of images/s on a CPU."""
    return f"{value:.2g}" if 0 < abs(value) < 10 ** -decimals else f"{value:.{decimals}f}"


class Ours(NamedTuple):
    """What we have for a row, by column. files: that it is from. missing: why a number is not there. trial: how many
    images the numbers are of, where not as many as asked for."""
    values: dict[str, float]
    files: dict[str, Path]
    missing: list[str]
    trial: int | None


def _ours(table: Table, section: Section, columns: Sequence[str], row: Row, base: int, found: Found,
          sources: dict[str, None], asked: Asked) -> Ours:
    """The numbers of a row; where they are from is added to `sources` in words. base: see `speed_of`."""
    values = {"macs_G": giga(macs_per_step(row.run, table.macs_steps).hook)}
    values |= {key: row.run.caching.settings[key] for key in _SETTINGS if key in columns}
    files: dict[str, Path] = {}
    missing: dict[str, None] = {}
    trial = None
    for column in columns:
        name = COLUMNS[column].metric
        if not name:
            continue
        kind = "fidelity" if name == RMSE_TO_CONVERGED.name else kind_of_result(row.run, columns)
        of_row = asked.wanted(row, section, kind)
        path, result, why = measured([pair for pair in found if name in pair[1].metrics], of_row, asked.trials)
        if path is None or result is None:
            missing[why or of_row.progress()] = None
            continue
        if why:
            trial = result.images
            missing[f"{why}, shown"] = None
        values[column], files[column] = COLUMNS[column].scale * result.metrics[name].value, path
        digest = result.hashes.get("checkpoint", "not recorded")[:12]
        sources[f"{row.run.config.name} was measured by eval.{result.kind} on {result.images:,} images of each row; "
                f"checkpoint sha256 {digest}. The CSV names the files."] = None
    speed = speed_of(found, row.run, base) if {"throughput", "speedup"} & set(columns) else None
    if speed:
        values |= {"throughput": speed.images_per_second, "speedup": speed.speedup}
        files |= dict.fromkeys(("throughput", "speedup"), speed.path)
        where, settings = speed.result.provenance, speed.result.settings
        threads = f", CPU threads: {where['threads']}" if where["device"] == "cpu" else ""
        sources[f"images/s and speed-up of ours ({row.run.config.name}): the network alone, {settings['weights']} "
                f"weights, {settings['dtype']}, batch {settings['batch_size']}, {where['device_name']}{threads} "
                f"({speed.path.name}). Images/s of other devices are not compared."] = None
    return Ours(values, files, list(missing), trial)


def _difference(section: Section, column: str, printed: float | str | None, ours: float | None,
                device: str | None) -> str:
    elsewhere = column == "throughput" and _THEIR_GPU not in (device or "")
    if printed is None or ours is None or elsewhere or column in _SETTINGS:
        return "-"
    decimals = _decimals(section, column, printed)
    return f"{round(ours, decimals) - float(printed):+.{decimals}f}"


def _fill(table: Table, section: Section, runs: Runs, found: Found, numbers: Mapping[Note, int],
          sources: dict[str, None], asked: Asked) -> Filled:
    columns = [key for key in COLUMNS if key in section.columns() or (key == "macs_G" and runs.rows)]
    lines: list[Line] = []
    values: list[tuple[str, ...]] = []
    missing: list[tuple[str, str]] = []

    def marks(test: str, *args: str) -> str:
        found = [number for note, number in numbers.items() if getattr(note, test)(section.name, *args)]
        return "".join(f" [{number}]" for number in found)

    base = None         # the run that the paper prints as 1x, for the rows after it; else the config's own steps
    for label, printed in section.rows.items():
        cells = [section.shown(key, printed.get(key)) + marks("marks_cell", label, key) for key in columns]
        if table.paper:
            lines.append(Line(label + marks("marks_row", label), "paper", cells))
        beside = runs.beside(section.name, label)
        if beside and printed.get("speedup") in (1.0, "1.0", "1.00"):
            base = beside[0].run.calls
        for row in beside:
            ours, files, why, trial = _ours(
                table, section, columns, row, base or row.run.config.sampler.steps + row.run.calls - row.run.steps,
                found, sources, asked)
            named = f"{section.title}, {row.label}" if section.title else row.label
            missing += [(named, reason) for reason in why]
            device = next((result.provenance.get("device_name") for path, result in found
                           if path == files.get("throughput")), None)
            shown = {key: _shown(ours[key], _decimals(section, key, printed.get(key))) if key in ours else "-"
                     for key in columns}
            difference = {key: _difference(section, key, printed.get(key), ours.get(key), device)
                          if not trial or COLUMNS[key].metric is None else "-" for key in columns}
            ours_label = (row.variant and f"... {row.variant}") if table.paper else row.label
            of_trial = f"trial, {trial} images" if trial else ""
            lines.append(Line(ours_label, of_trial or "ours", list(shown.values())))
            if table.paper:
                lines.append(Line("", "difference", list(difference.values())))
            run_label = f"{row.label} ({of_trial})" if trial else row.label
            values += [(label, run_label, key, section.shown(key, printed.get(key)), shown[key], difference[key],
                        files[key].name if key in files else "counted" if key == "macs_G" else "") for key in columns]
        if not beside:
            values += [(label, "", key, section.shown(key, printed.get(key)), "-", "-", "") for key in columns]
        if (section.name, label) in runs.pending:
            lines.append(Line("", "ours", ["-"] * len(columns)))
    return Filled(section, columns, lines, values, missing)


def render(table: Table, runs: Runs, found: Found, asked: Asked | None = None) -> Rendered:
    """Fill a table with what was counted and measured."""
    marked = [note for note in table.notes if note.rows]
    numbers = {note: i + 1 for i, note in enumerate(marked)}
    sources: dict[str, None] = {}
    filled = [_fill(table, section, runs, found, numbers, sources, asked or Asked())
              for section in table.sections.values()]
    notes = [note.text for note in table.notes if not note.rows]
    for reason in dict.fromkeys(runs.pending.values()):
        rows = [label for (_, label), other in runs.pending.items() if other == reason]
        notes.append(f"Not run ({reason}): {'; '.join(rows)}.")
    return Rendered(table, filled, [note.text for note in marked], [*notes, *sources])


def schedules(table: Table, runs: Runs) -> list[str]:
    """The full steps of each row, for a table of settings."""
    return [f"{section.title + ', ' if section.title else ''}{row.label}: {len(level.full_steps)} full of "
            f"{row.run.steps} steps: {' '.join(map(str, level.full_steps))}"
            for section in table.sections.values() for row in runs.rows if row.section == section.name
            if (level := row.run.deepcache)]


def _grid(part: Filled) -> list[list[str]]:
    return [["", "", *(COLUMNS[key].heading for key in part.columns)],
            *([line.label, line.what, *line.cells] for line in part.lines)]


def why_missing(rendered: Rendered) -> list[str]:
    """Why rows have no number of ours, a line for each reason."""
    found: dict[str, list[str]] = {}
    for part in rendered.filled:
        for row, reason in part.missing:
            found.setdefault(reason, []).append(row)
    every = sum(line.what not in ("paper", "difference") for part in rendered.filled for line in part.lines)
    lines = [f"{reason}: {'all rows' if len(rows) == every > 1 else '; '.join(rows)}" for reason, rows in found.items()]
    hidden = any(reason.startswith("trial") and not reason.endswith("shown") for reason in found)
    return [*lines, *(["trials are shown with --trials"] if hidden else [])]


def as_text(rendered: Rendered, extra: Sequence[str] = ()) -> str:
    """For a terminal."""
    parts = [rendered.table.heading]
    for part in rendered.filled:
        parts += [*([part.section.title] if part.section.title else []), align(_grid(part))]
    notes = [*(f"[{i}] {text}" for i, text in enumerate(rendered.marked, 1)), *(f"* {text}" for text in rendered.notes),
             *(f"- {text}" for text in why_missing(rendered))]
    parts += ["\n".join(textwrap.fill(line, 118, subsequent_indent="  ", break_on_hyphens=False) for line in lines)
              for lines in (extra, notes) if lines]
    return "\n\n".join(parts)


def as_markdown(rendered: Rendered, extra: Sequence[str] = ()) -> str:
    """With a heading of the second level."""
    lines = [f"## {rendered.table.heading}", ""]
    for part in rendered.filled:
        head, *body = _grid(part)
        if part.section.title:
            lines += [f"**{part.section.title}**", ""]
        lines += [f"| {' | '.join(head)} |", "|---|---" + "|---:" * len(part.columns) + "|"]
        lines += [f"| {' | '.join(cell.replace('*', chr(92) + '*') for cell in row)} |" for row in body] + [""]
    for bullets in (extra, [f"[{i}] {text}" for i, text in enumerate(rendered.marked, 1)], rendered.notes):
        lines += [f"- {text}" for text in bullets] + ([""] if bullets else [])
    return "\n".join(lines)


def as_csv(rendered: Rendered, extra: Sequence[str] = ()) -> str:
    """One number per line, with the file that ours is from."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["table", "section", "row", "run", "column", "paper", "ours", "difference", "from"])
    for part in rendered.filled:
        writer.writerows([rendered.table.name, part.section.name, *value] for value in part.values)
    return text.getvalue()


_TEX = {"&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_", "$": r"\$", "{": r"\{", "}": r"\}"}


def _tex(text: str) -> str:
    return "".join(_TEX.get(c, c) for c in text)


def as_latex(rendered: Rendered, extra: Sequence[str] = ()) -> str:
    """A table environment; needs booktabs."""
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{_tex(rendered.table.heading)}}}"]
    for part in rendered.filled:
        head, *body = _grid(part)
        lines += [rf"\begin{{tabular}}{{ll{'r' * len(part.columns)}}}", r"\toprule"]
        if part.section.title:
            lines.append(rf"\multicolumn{{{len(head)}}}{{l}}{{{_tex(part.section.title)}}} \\")
        lines += [" & ".join(map(_tex, head)) + r" \\", r"\midrule"]
        lines += [" & ".join("--" if cell == "-" else _tex(cell) for cell in row) + r" \\" for row in body]
        lines += [r"\bottomrule", r"\end{tabular}", ""]
    notes = [*extra, *(f"[{i}] {text}" for i, text in enumerate(rendered.marked, 1)), *rendered.notes]
    lines += [r"\begin{flushleft}\footnotesize", *(rf"{_tex(note)}\\" for note in notes), r"\end{flushleft}"]
    return "\n".join([*lines, r"\end{table}", ""])


FORMATS = {"text": as_text, "markdown": as_markdown, "csv": as_csv, "latex": as_latex}


def shown(table: Table, found: Found, form: str = "text", runs: Runs | None = None, asked: Asked | None = None) -> str:
    """A table in one of FORMATS, with the full steps where it is one of settings."""
    runs = of_table(table) if runs is None else runs
    return FORMATS[form](render(table, runs, found, asked), schedules(table, runs) if table.schedules else ())


_ABOUT = """# The papers' tables

Written by `python -m eval.table --all`; do not edit. Each row: what the paper prints, ours, and the difference to the
printed digits. A dash: not printed, or not measured here. MACs are exact and counted for every row; all else is taken
from the JSON files in this folder, and only from runs with just the settings of the row and the paper's number of
images. Rows without a line of ours are other authors' methods. Paper values: `configs/papers/*.yaml`. Commands behind
the rows: `scripts/table*.sh`. The same tables as CSV and LaTeX: `tables/`. What was measured on the small models that
are shipped here: a folder for each study (`python -m lab.study NAME`), with its table, its charts and its records; what
searches for plans found: `planning/`; step times: `throughput/`.
"""


def everything(found: Found) -> dict[str, str]:
    """The text of results/README.md and of every file of results/tables/, by path below results/."""
    files: dict[str, str] = {}
    sections = [_ABOUT]
    for table in tables().values():
        runs = of_table(table)
        parts = render(table, runs, found), schedules(table, runs) if table.schedules else ()
        sections.append(as_markdown(*parts))
        files |= {f"tables/{table.name}.csv": as_csv(*parts), f"tables/{table.name}.tex": as_latex(*parts)}
    return {"README.md": "\n".join(sections), **files}
