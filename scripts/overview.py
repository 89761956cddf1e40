"""All tables at once: what each costs, what they share, and what is missing here. scripts/all_tables.sh calls it.

    python -m scripts.overview --dry-run [options of the table scripts]
"""

import argparse
import sys
from pathlib import Path

from eval.cost.runs import macs_per_image
from eval.tables.paper import tables
from eval.tables.render import align
from eval.tables.rows import of_table
from experiments.jobs import Job, make_job
from experiments.plan import check, disk, gigabytes, user_parser
from runs.cli import command
from runs.errors import UserError
from scripts.doctor import needs
from scripts.download import catalogue


def cost(jobs: list[Job]) -> list[str]:
    """Network calls, MACs and disk of what is not there yet."""
    left = [(job.images - job.present, job) for job in jobs]
    return [f"{sum(n * job.run.calls for n, job in left):,}",
            f"{sum(n * macs_per_image(job.run).hook for n, job in left) / 1e15:,.1f}",
            gigabytes(sum(job.bytes_needed for job in jobs))]


def overview(args: argparse.Namespace) -> str:
    """A line per table; what a table shares with an earlier one is counted there."""
    lines = [["table", "script", "runs", "new", "calls left", "PMACs left", "disk up to"]]
    seen: dict[Path, Job] = {}
    for table in (table for table in tables().values() if table.script):
        rows = [] if table.schedules else of_table(table).rows
        jobs = {job.folder: job for job in (make_job(row, table, args) for row in rows)}
        new = [job for folder, job in jobs.items() if folder not in seen]
        seen |= jobs
        lines.append([table.name, table.script, str(len(jobs)), str(len(new)), *cost(new)])
    lines.append(["all", "", "", str(len(seen)), *cost(list(seen.values()))])
    missing = dict.fromkeys(line for table in tables().values() for line in needs(table, catalogue()))
    return "\n\n".join([align(lines), disk(list(seen.values()), args.samples),
                        "\n".join(missing or ["nothing is missing"])])


@command
def main() -> None:
    args = user_parser("bash scripts/all_tables.sh").parse_args(sys.argv[1:])
    check(args)
    if args.config or args.only or args.checkpoint or any("=" not in text for text in args.reference):
        raise UserError("--config, --only, --checkpoint and a --reference without MODEL= are for single tables")
    print(overview(args))


if __name__ == "__main__":
    main()
