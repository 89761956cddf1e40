"""What a comparison of systems shows: table.md, and distance to the converged images against cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.metrics.intervals import mean_estimate
from eval.metrics.registry import MEASURES
from eval.quality import FD, KID
from eval.tables.plots import lines_of_kinds
from eval.tables.text import markdown
from lab.study.convergence_report import PSNR, paired
from lab.study.demo_report import distance
from run.files import write_atomically
from run.results import Metric

PLAIN = "fewer steps"
HEAD = ("system", "run", "cost, calls", "time, calls", "PSNR, dB", "beside the best of fewer steps",
        MEASURES[FD].heading, MEASURES[KID].heading, "made in, CPU min")
ABOUT = ("Nothing was learnt on these seeds. PSNR of the final latents to the converged ones of the same seed, with 95 "
         "% intervals; differences are paired by seed, to the nearest of the runs without caching at the same budget. "
         "Costs are in full network calls per image: by multiply-accumulates (of the adaptive rule the mean of what it "
         "came to on these seeds), and as timed, one image at a time. Distances to real images, of all seeds, with "
         "95 % errors; in brackets how much more that is than of the converged images of the same seeds. Made in: CPU "
         "minutes that measuring and training took before the first image; ? where that was made elsewhere.")


@dataclass(frozen=True)
class Row:
    """A run that is measured. calls: the budget. cost, time: of an image, in full network calls. psnr: dB, [seeds].

    quality: by metric. made: CPU seconds that its files took; 0 without any, None where that is not known.
    """
    system: str
    calls: int
    name: str
    cost: float
    time: float | None
    psnr: np.ndarray
    quality: Mapping[str, Metric]
    made: float | None

    @property
    def plain(self) -> bool:
        """Whether it is a run without caching."""
        return self.system.startswith(PLAIN)


def rival(row: Row, others: Sequence[Row]) -> Row | None:
    """The run without caching of the same budget that comes nearest."""
    return max((other for other in others if other.plain and other.calls == row.calls),
               key=lambda one: one.psnr.mean(), default=None)


def difference(row: Row, other: Row | None) -> str:
    """How much nearer a run comes than another one, in dB, paired by seed, with a 95 % interval."""
    return "-" if other is None or other is row else paired(row.psnr, other.psnr)


def ranked(rows: Sequence[Row], calls: int) -> list[Row]:
    """The runs of one budget, the nearest first."""
    return sorted((row for row in rows if row.calls == calls), key=lambda one: -one.psnr.mean())


def table(rows: Sequence[Row], calls: int) -> list[tuple[str, ...]]:
    """A row for each run of one budget, the nearest first."""
    found: list[tuple[str, ...]] = [HEAD]
    for row in ranked(rows, calls):
        found.append((row.system, row.name, f"{row.cost:.2f}", "-" if row.time is None else f"{row.time:.2f}",
                      "{:.1f} [{:.1f}, {:.1f}]".format(*bounds(row)),
                      difference(row, rival(row, rows)), distance(row.quality, FD), distance(row.quality, KID),
                      "?" if row.made is None else f"{row.made / 60:.1f}" if row.made else "-"))
    return found


def bounds(row: Row) -> tuple[float, float, float]:
    """The mean PSNR of a run and its 95 % interval."""
    return Metric.of(mean_estimate(row.psnr)).bounds


def lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The runs of each system, the cheapest first."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda one: one.cost):
        found.setdefault(row.system, []).append(row)
    return dict(sorted(found.items()))


def render(rows: Sequence[Row], left_out: Sequence[str], folder: Path) -> str:
    """Write table and picture of what there is into `folder`; returns what to tell the user."""
    if not rows:
        return "nothing is measured yet"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {system: [(row.cost, *bounds(row)) for row in line] for system, line in lines(rows).items()}
    lines_of_kinds([("cost per image by MACs (full calls)", drawn)], folder / "systems.png", f"{PSNR}, dB")
    text = [f"# {folder.name}: all systems at equal cost", "", f"{len(rows[0].psnr)} seeds. {ABOUT}", ""]
    for calls in sorted({row.calls for row in rows}):
        text += [f"## {calls} calls", "", *markdown(table(rows, calls)), ""]
    text += ["![systems](systems.png)", "", *(f"{line[0].upper()}{line[1:]}." for line in left_out)]
    write_atomically(folder / "table.md", lambda path: path.write_text("\n".join(text).rstrip() + "\n"))
    return f"{len(rows)} runs are measured; wrote {folder / 'table.md'} and {folder / 'systems.png'}"
