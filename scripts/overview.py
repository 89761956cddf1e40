"""The costs of all tables, the runs that they share, and the files that are missing. scripts/all_tables.sh calls it.

    python -m scripts.overview --dry-run [options of the table scripts]
"""

from pathlib import Path

from eval.cost.runs import macs_per_image
from eval.tables.arms import Arm, Given, runs_of
from eval.tables.paper import tables
from eval.tables.text import align
from lab.study.papers import ABOUT, Options, disk, gigabytes
from run import arguments
from run.cli import command
from scripts.doctor import needs
from scripts.download import catalogue
from unet_caching.errors import UserError


def cost(arms: list[Arm]) -> list[str]:
    """The network calls, MACs and disk space of the missing images."""
    left = [(arm.images - arm.present, arm) for arm in arms]
    return [f"{sum(n * arm.run.calls for n, arm in left):,}",
            f"{sum(n * macs_per_image(arm.run).hook for n, arm in left) / 1e15:,.1f}",
            gigabytes(sum(arm.bytes_needed for arm in arms))]


def overview(given: Given) -> str:
    """A line per table. Runs that tables share are counted for the first one."""
    lines = [["table", "script", "runs", "new", "calls left", "PMACs left", "disk up to"]]
    seen: dict[Path, Arm] = {}
    for table in (table for table in tables().values() if table.script):
        arms = {} if table.schedules else {arm.folder: arm for arm in runs_of(table, given).arms}
        new = [arm for folder, arm in arms.items() if folder not in seen]
        seen |= arms
        lines.append([table.name, str(table.script), str(len(arms)), str(len(new)), *cost(new)])
    lines.append(["all", "", "", str(len(seen)), *cost(list(seen.values()))])
    missing = dict.fromkeys(line for table in tables().values() for line in needs(table, catalogue()))
    return "\n\n".join([align(lines), disk(list(seen.values()), given.samples),
                        "\n".join(missing or ["nothing is missing"])])


@command
def main() -> None:
    options, given = arguments.parse(ABOUT, Options, Given, prog="bash scripts/all_tables.sh")
    if options.config or options.only or given.checkpoint or any("=" not in text for text in given.reference):
        raise UserError("--config, --only, --checkpoint and a --reference without MODEL= are for single tables")
    print(overview(given))


if __name__ == "__main__":
    main()
