"""The rows of the papers' tables as runs of ours: configs/papers/*.yaml has the settings of each beside its digits."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from eval.tables.paper import Section, Table, tables
from run.families import family_named_by
from run.files import ROOT
from run.spec import Run, RunSpec
from unet_caching.errors import UserError

_FITTED = ("block_schedule", "scale_shift")     # options that name files which are made here


class Row(NamedTuple):
    """One run of a table. variant: empty for the paper's row itself, else what stands beside it."""
    section: str
    printed_as: str
    variant: str
    run: Run

    @property
    def label(self) -> str:
        return f"{self.printed_as} / {self.variant}" if self.variant else self.printed_as


class Runs(NamedTuple):
    """What of a table can be run. pending: (section, label) -> why it cannot be run yet."""
    rows: list[Row]
    pending: dict[tuple[str, str], str]

    def beside(self, section: str, label: str) -> list[Row]:
        """The runs that are, or stand beside, a row of the paper."""
        return [row for row in self.rows if (row.section, row.printed_as) == (section, label)]


def of_table(table: Table, configs: Mapping[str, Path] | None = None) -> Runs:
    """The runs of a table; none where it gives no settings.

    configs: by family, another model's for the rows of that family. Raises UserError.
    """
    rows, pending = [], {}
    for section in table.sections.values():
        for label, variants in section.runs.items():
            for variant, options in variants.items():
                absent = [options[name] for name in _FITTED if name in options and not (ROOT / options[name]).exists()]
                if absent and table.waiting:
                    pending[section.name, label] = table.waiting
                else:
                    rows.append(Row(section.name, label, variant, _run(table, label, options, configs or {})))
    return Runs(rows, pending)


def _run(table: Table, label: str, options: Mapping[str, Any], configs: Mapping[str, Path]) -> Run:
    given = dict(options)
    try:
        config = given.pop("config")
        return RunSpec.of(configs.get(family_named_by(config).name, config), **given).open()
    except KeyError:
        raise UserError(f"{table.name}, row {label!r}: its run names no config") from None
    except UserError as error:
        raise UserError(f"{table.name}, row {label!r}: {error}") from None


@cache
def printed_values(model: str) -> dict[str, list[tuple[Table, str, dict[str, float | str | None]]]]:
    """What the papers print for the runs of a model: name of the sample folder -> (table, label, numbers) of each row.

    Rows of ours that only stand beside one of the paper's are left out.
    """
    found: dict[str, list] = {}
    for table in tables().values():
        for row in [] if table.schedules else of_table(table).rows:
            if row.run.config.name == model and not row.variant:
                found.setdefault(row.run.name, []).append((table, row.label, section_of(table, row).rows[row.label]))
    return found


def section_of(table: Table, row: Row) -> Section:
    """The part of a table that a row stands in."""
    return table.sections[row.section]
