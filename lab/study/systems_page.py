"""The page of a comparison of systems: distance against cost, and for each budget its table, images and calls."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from eval.tables.page import Page, Section, write
from eval.tables.svg import Line, Plot
from lab.study import pages
from lab.study.arms import Arm
from lab.study.convergence_report import PSNR
from lab.study.systems_report import ABOUT, Row, bounds, lines, ranked, table


def plot(rows: Sequence[Row], arms: Mapping[str, Arm]) -> Plot:
    """Distance against cost, a line for each system. arms: of the runs, by name."""
    drawn = [Line(system, [pages.mark(replace(arms[row.name], label=system), row.cost, bounds(row), " dB")
                           for row in line])
             for system, line in lines(rows).items()]
    return Plot("Distance against cost", "cost per image by MACs, full calls", f"{PSNR}, dB", drawn, log=True)


def section(rows: Sequence[Row], calls: int, whole: Arm, arms: Mapping[str, Arm]) -> Section:
    """One budget: its images are beside the converged ones, the nearest run first."""
    found = ranked(rows, calls)
    shown = [replace(whole, label="converged"), *(replace(arms[row.name], label=row.system) for row in found)]
    about = {row.system: f"{row.name}, {row.cost:.2f} full calls" for row in found}
    return pages.section(f"{calls} calls", (), table(rows, calls), (), shown, about)


def write_page(rows: Sequence[Row], whole: Arm, arms: Mapping[str, Arm], folder: Path) -> Path:
    """Write the page of what is measured into `folder`; returns its path."""
    lead = ["All caching systems on one model at equal cost.", f"{len(rows[0].psnr)} seeds. {ABOUT}"]
    sections = [Section(whole.run.config.name, plots=[plot(rows, arms)]),
                *(section(rows, calls, whole, arms) for calls in sorted({row.calls for row in rows}))]
    write(Page(f"Systems: {folder.name}", lead, sections,
               pages.made_by(f"python -m scripts.systems --config configs/studies/systems_{folder.name}.yaml --make")),
          folder / "index.html")
    return folder / "index.html"
