"""The tables of a part of a study."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from eval.tables.arms import Given
from eval.tables.study import Entry, Part, Study, read_study
from lab.study.bench import Bench
from lab.study.columns import columns_of, short
from lab.study.ledger import Ledger
from lab.study.measures import PSNR
from lab.study.rows import Row, Rows, rows_of
from run.files import ROOT


def open_benches(name: str | Path, given: Given, narrow: Callable[[Part], Part] = lambda part: part
                 ) -> tuple[Study, list[Bench]]:
    """A study and its parts on this machine. narrow: changes a part by the user's options. Raises UserError."""
    study = read_study(name)
    ledger = Ledger(given.results / study.name / "records.jsonl")
    return study, [Bench(narrow(part), study.path, given, ledger) for part in study.parts]


def measured(name: str | Path, results: Path = ROOT / "results") -> list[Row]:
    """The measured arms of a study, from its file of records. Raises UserError."""
    return [row for bench in open_benches(name, Given(results=results))[1] for row in Shown(bench).rows.rows]


class Table(NamedTuple):
    """rows: one for each line after the head."""
    heading: str
    rows: list[Row]
    lines: list[tuple[str, ...]]


class Shown:
    """A part of a study with its measured arms, to show."""

    def __init__(self, bench: Bench):
        self.bench, self.show = bench, bench.show
        whole = Row(bench.setup.whole, {})
        self.rows = Rows(named(rows_of(bench), whole), whole, bench.part.chosen_on)

    @property
    def left_out(self) -> list[Entry]:
        """The arms without records whose fitted files do not exist."""
        kept = [arm.entry.options for arm, _ in self.bench.kept()]
        return [entry for entry in self.bench.left_out if entry.options not in kept]

    @property
    def total(self) -> int:
        """How many arms there are, measured or not."""
        beside = {arm.name for other in self.bench.also for arm in other.arms} - {arm.name for arm in self.bench.arms}
        return len(self.bench.arms) + len(self.bench.left_out) + len(beside)

    @property
    def title(self) -> str:
        return self.bench.part.title or self.bench.setup.whole.run.config.name

    @cached_property
    def columns(self) -> list:
        return [one for word in self.show.columns for one in columns_of(word, self.rows)]

    @property
    def counted(self) -> str:
        """The number of arms and of seeds, and the machine of the times, in words."""
        rows, choose = self.rows.rows, self.rows.chosen_on
        text = f"{len(rows)} arms" if len(rows) >= self.total else f"{len(rows)} of {self.total} arms are measured"
        text += f", {rows[0].arm.images} seeds each"
        text += f": the first {choose} choose, the others report" if choose else ""
        if timed := next((row.records["time"] for row in rows if "time" in row.records), None):
            where, size = timed.provenance, timed.times["with"]["batch_size"]
            threads = f", {where['threads']} CPU threads" if where["device"] == "cpu" else ""
            text += f"; timed with a batch of {size} on {where['device_name']}{threads}"
        if twice := self.bench.record(self.rows.whole.arm, "twice")[0] if self.bench.part.twice else None:
            text += f"; twice the steps of the converged run come within {twice.metrics[PSNR].value:.0f} dB of it"
        return f"{text}."

    @property
    def about(self) -> list[str]:
        """How to read the columns."""
        return list(dict.fromkeys(one.about for one in self.columns if one.about))

    @cached_property
    def tables(self) -> list[Table]:
        """One table of all arms, or one for each budget."""
        if self.show.by != "budget":
            return [self._table("", self.rows.rows)]
        budgets = sorted({row.arm.entry.budget for row in self.rows.rows if row.arm.entry.budget is not None})
        return [self._table(f"{budget} calls", [row for row in self.rows.rows if row.arm.entry.budget == budget])
                for budget in budgets]

    def _table(self, heading: str, rows: Sequence[Row]) -> Table:
        if self.show.order == "near":
            rows = sorted(rows, key=lambda row: float("inf") if row.psnr is None else -float(row.psnr.mean()))
        elif self.show.order == "cost":
            rows = sorted(rows, key=lambda row: (-row.cost, row.name))
        return Table(heading, list(rows), [tuple(one.heading for one in self.columns),
                                           *(tuple(one.cell(row, self.rows) for one in self.columns) for row in rows)])


def named(rows: Sequence[Row], whole: Row) -> list[Row]:
    """Label rows without a name by the options in which they differ, or by their run if labels would repeat."""
    among = Rows(rows, whole)
    names = [short(row, among) for row in rows]

    def called(row: Row, name: str) -> Row:
        return replace(row, arm=replace(row.arm, entry=replace(row.arm.entry, called=name)))

    return [row if row.arm.label != row.run.name or names.count(name) > 1 else called(row, name)
            for row, name in zip(rows, names, strict=True)]
