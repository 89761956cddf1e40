"""What the papers print, and the settings that give it: configs/papers/*.yaml, read and checked.

Tables of no paper, in the same form, are in configs/papers/own/*.yaml.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from eval.metrics.registry import MEASURES
from run.files import ROOT
from run.settings import load_yaml
from unet_caching.errors import UserError, as_user_error
from unet_caching.files.schema import AtLeast, check, fault

FOLDER, OWN = ROOT / "configs" / "papers", ROOT / "configs" / "papers" / "own"


class Column(NamedTuple):
    """A column of the papers: its heading, the decimals it is usually printed with, and of one of a metric (a name of
    results) what its values are multiplied by."""
    heading: str
    decimals: int
    metric: str | None = None
    scale: float = 1


COLUMNS = {
    "center": Column("centre", 0), "power": Column("power", 2), "macs_G": Column("MACs (G)", 2),
    "throughput": Column("images/s", 3), "speedup": Column("speed-up", 2),
    **{measure.column: Column(measure.heading, measure.decimals, measure.name, measure.scale)
       for measure in MEASURES.values() if measure.column},
    "caching_img_s": Column("images/s, caching", 2),
    "baseline_img_s": Column("images/s, baseline", 2), "win": Column("win %", 1), "tie": Column("tie %", 1),
    "lose": Column("lose %", 1)}


class Note(NamedTuple):
    """A footnote: of some cells or rows, or of the whole table where it names none."""
    text: str
    section: str | None
    rows: tuple[str, ...]
    columns: tuple[str, ...]

    def marks_row(self, section: str, row: str) -> bool:
        return row in self.rows and self.section in (None, section) and not self.columns

    def marks_cell(self, section: str, row: str, column: str) -> bool:
        return row in self.rows and self.section in (None, section) and column in self.columns


class Section(NamedTuple):
    """Rows that share a data set. rows: by label, in the paper's order: {column: value}, a string as it is printed.

    runs: of those rows that can be run here, by label, the options of the run that gives it (under "") and of those of
    ours that stand beside it (run/spec.py).
    """
    name: str                       # "" where a table has one section
    title: str
    images: int | None              # of each row, in the paper
    decimals: dict[str, int]
    rows: dict[str, dict[str, float | str | None]]
    runs: dict[str, dict[str, dict[str, Any]]]

    def columns(self) -> list[str]:
        """Those that any row has."""
        return [key for key in COLUMNS if any(key in row for row in self.rows.values())]

    def shown(self, column: str, value: float | str | None, sign: str = "") -> str:
        """A value as the column is printed; a dash for none."""
        if value is None or isinstance(value, str):
            return value or "-"
        return f"{value:{sign}.{self.decimals.get(column, COLUMNS[column].decimals)}f}"


class Table(NamedTuple):
    """One table of a paper. script: of scripts/, which has its commands; None where nothing can be run."""
    name: str                       # table1, block_caching_table1
    paper: str                      # empty: of no paper
    title: str
    script: str | None
    macs_steps: int | None          # what MACs are divided by; the row's own steps where None
    schedules: bool                 # whether it lists settings, not measurements
    sections: dict[str, Section]
    notes: list[Note]
    waiting: str | None             # why rows whose block schedules are not made yet cannot be run

    @property
    def heading(self) -> str:
        return f"{self.paper}, Table {self.name.rsplit('table', 1)[1]}: {self.title}" if self.paper else self.title


# What a file may say, checked as it is read.

@dataclass
class _Note:
    text: str
    section: str | None = None
    rows: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)


@dataclass
class _Section:
    rows: list[dict[str, Any]]
    title: str | None = None
    images: Annotated[int, AtLeast(1)] | None = None
    decimals: dict[str, int] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Table:
    title: str
    script: str | None = None
    images: Annotated[int, AtLeast(1)] | None = None
    decimals: dict[str, int] = field(default_factory=dict)
    macs_steps: Annotated[int, AtLeast(1)] | None = None
    schedules: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)
    sections: dict[str, _Section] = field(default_factory=dict)
    notes: list[_Note] = field(default_factory=list)
    run: dict[str, Any] = field(default_factory=dict)
    waiting: str | None = None
    columns: list[str] = field(default_factory=list)


@dataclass
class _File:
    name: str
    source: str
    tables: dict[str, _Table]
    settings: dict[str, Any] = field(default_factory=dict)          # what the paper says beside its tables
    contradictions: list[Any] = field(default_factory=list)


_RUN_KEYS = ("row", "run", "beside")


def _section(name: str, content: dict[str, Any], table: dict[str, Any]) -> Section:
    for place, row in enumerate(content["rows"], 1):
        if "row" not in row:
            raise ValueError(f"row {place} has no row, its name")
        for key, wanted in {"run": dict[str, Any], "beside": dict[str, dict]}.items():
            if key in row and (wrong := fault(row[key], wanted, f"{row['row']}.{key}")):
                raise ValueError(wrong)
        for key in row.keys() - {*_RUN_KEYS}:
            if wrong := fault(row[key], float | str | None, f"{row['row']}.{key}"):
                raise ValueError(wrong)
    blank = dict.fromkeys(table.get("columns", ()))
    rows = {str(row["row"]): blank | {key: value for key, value in row.items() if key not in _RUN_KEYS}
            for row in content["rows"]}
    if len(rows) < len(content["rows"]):
        raise ValueError("two rows of one name")
    unknown = {key for row in rows.values() for key in row} - COLUMNS.keys()
    if unknown:
        raise ValueError(f"unknown column {', '.join(sorted(unknown))}")
    return Section(name, content.get("title", "") if name else "", content.get("images", table.get("images")),
                   {**table.get("decimals", {}), **content.get("decimals", {})}, rows,
                   {str(row["row"]): _runs(row, content.get("run", table.get("run", {})))
                    for row in content["rows"] if "run" in row})


def _runs(row: dict[str, Any], common: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {variant: common | own for variant, own in {"": row["run"], **row.get("beside", {})}.items()}


def _table(name: str, paper: str, content: dict[str, Any]) -> Table:
    parts = content.get("sections") or {"": content}
    sections = {key: _section(key, part, content) for key, part in parts.items()}
    notes = [Note(note["text"].strip(), note.get("section"), tuple(note.get("rows", ())),
                  tuple(note.get("columns", ()))) for note in content.get("notes", [])]
    for note in notes:
        there = [s for s in sections.values() if note.section in (None, s.name)]
        if not there or set(note.rows) - {row for s in there for row in s.rows}:
            raise ValueError(f"a note is of rows that are not there: {', '.join(note.rows)}")
    return Table(name, paper, content["title"], content.get("script"), content.get("macs_steps"),
                 content.get("schedules", False), sections, notes, content.get("waiting"))


@cache
def tables() -> dict[str, Table]:
    """All tables of the papers, by name: the papers in the order of their sources, the tables in the paper's."""
    return _read_all(FOLDER)


@cache
def own_tables() -> dict[str, Table]:
    """The tables of no paper, by name."""
    return _read_all(OWN)


def _read_all(folder: Path) -> dict[str, Table]:
    files: dict[Path, Any] = {path: _content(path) for path in folder.glob("*.yaml")}
    return {table.name: table for path, content in sorted(files.items(), key=lambda file: file[1]["source"])
            for table in _read(path, content)}


def _content(path: Path) -> Any:
    """What a file says. Raises UserError that names the file, the key, and what would be right."""
    content = load_yaml(path)
    with as_user_error():
        check(content, _File, path)
    return content


def _read(path: Path, content: dict[str, Any]) -> Iterator[Table]:
    for name, table in content["tables"].items():
        try:
            yield _table(name, content["name"], table)
        except (KeyError, ValueError) as error:
            raise UserError(f"{path}, {name}: {error}") from None


def find(name: str) -> Table:
    """A table by its name; '3' for table3. Raises UserError."""
    known = tables() | own_tables()
    for candidate in (name, f"table{name}"):
        if candidate in known:
            return known[candidate]
    raise UserError(f"no table {name!r}: choose from {', '.join(known)}")
