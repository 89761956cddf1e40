"""The papers' digits and the settings behind them, from configs/papers/*.yaml. Their tables are studies (study.py).

Tables of our own, in the same form, are in configs/papers/own/*.yaml.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from eval.metrics.registry import MEASURES
from eval.tables.study import Part, Study, entries, study_of
from run.files import ROOT
from run.settings import load_yaml
from unet_caching.errors import UserError
from unet_caching.files.schema import fault

FOLDER, OWN = ROOT / "configs" / "papers", ROOT / "configs" / "papers" / "own"
Printed = dict[str, float | str | None]         # a row's printed values by column; a string keeps its digits


class Column(NamedTuple):
    """A column of the papers: heading and usual decimals; for a metric, its name in results and a factor of its values.
    """
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


@dataclass
class _File:
    name: str
    source: str
    tables: dict[str, dict[str, Any]]
    settings: dict[str, Any]                # stated outside of the paper's tables
    contradictions: list[Any]


def columns_of(part: Part) -> list[str]:
    """The columns that any row of a part has."""
    printed = {key for entry in entries(part, part.name) for key in entry.printed}
    return [key for key in COLUMNS if key in printed or key in part.columns]


def decimals(part: Part, column: str) -> int:
    """The decimals of a printed column."""
    return part.decimals.get(column, COLUMNS[column].decimals)


def printed_rows(part: Part) -> dict[str, Printed]:
    """The printed values of a part, by row."""
    blank: Printed = dict.fromkeys(part.columns)
    return {entry.called: blank | entry.printed for entry in entries(part, part.name) if not entry.beside}


@cache
def tables() -> dict[str, Study]:
    """All tables of the papers, by name: the papers in the order of their sources, the tables in the paper's."""
    return _read_all(FOLDER)


@cache
def own_tables() -> dict[str, Study]:
    """Our own tables, by name."""
    return _read_all(OWN)


def _read_all(folder: Path) -> dict[str, Study]:
    files: dict[Path, Any] = {path: load_yaml(path) for path in folder.glob("*.yaml")}
    for path, content in files.items():
        if wrong := fault({"settings": {}, "contradictions": [], **content}, _File):
            raise UserError(f"{path} is damaged: {wrong}")
    found = {}
    for path, content in sorted(files.items(), key=lambda file: file[1]["source"]):
        for name, table in content["tables"].items():
            found[name] = study_of(table, name, path, content["name"])
            _check(found[name])
    return found


def _check(table: Study) -> None:
    """Raises UserError for rows and notes that are wrong."""
    where, known = f"{table.path}, {table.name}", set()
    for part in table.parts:
        own = [(entry.label, entry) for entry in entries(part, where)]
        if unlabelled := [place for place, (label, _) in enumerate(own, 1) if not label]:
            raise UserError(f"{where}: row {unlabelled[0]} has no name: add called")
        if len(dict(own)) < len(own):
            raise UserError(f"{where}: two rows have the same name")
        if unknown := ({key for _, entry in own for key in entry.printed} | {*part.columns}) - COLUMNS.keys():
            raise UserError(f"{where}: unknown column {', '.join(sorted(unknown))}")
        known |= {(section, entry.called) for _, entry in own for section in (None, part.name)}
    for note in table.notes:
        if gone := [row for row in note.rows if (note.section, row) not in known]:
            raise UserError(f"{where}: a note names rows that do not exist: {', '.join(gone)}")


def find(name: str) -> Study:
    """A table by its name; '3' for table3. Raises UserError."""
    known = tables() | own_tables()
    for candidate in (name, f"table{name}"):
        if candidate in known:
            return known[candidate]
    raise UserError(f"no table {name!r}: choose from {', '.join(known)}")
