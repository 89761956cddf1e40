"""Submit a table as Slurm jobs: an array per row that samples, an evaluation per row, and the table. See README.md.

    bash scripts/slurm/submit_table.sh table1_ldm_imagenet --images 1000 --dry-run

The rows, their commands and what is there of them are those of the table scripts (lab/study/plan.py).
What is queued already is told by the names of the jobs alone: there is no other record that could be wrong.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from eval.cost.runs import macs_per_image
from eval.tables.paper import Table, own_tables, tables
from lab.study.arms import Arm
from lab.study.plan import Plan, make_plan, user_parser
from run import arguments
from run.cli import command
from run.folder import missing_seeds, seeds_there
from run.seeds import format_seeds
from scripts.slurm import cluster
from scripts.slurm.cluster import Live, Settings, Step
from unet_caching.errors import UserError

_SHORTEST = 900     # seconds of a time limit that leave room for work before USR1, which Slurm may send a minute early
_SHARE = 0.8        # of the time limit that a task's images may take; the rest is for loading and for slow nodes


class Slices(NamedTuple):
    """What an array samples: its task i the seeds first + i size to first + (i + 1) size - 1, but not beyond last."""
    folder: str
    first: int
    last: int
    size: int

    @property
    def name(self) -> str:
        """The name of the array's jobs."""
        return f"sample:{self.folder}:{self.first}-{self.last}/{self.size}"

    @classmethod
    def named(cls, name: str) -> "Slices | None":
        """The inverse of `name`; None for other jobs."""
        match = re.fullmatch(r"sample:(.*):(\d+)-(\d+)/(\d+)", name)
        return cls(match[1], *map(int, match.groups()[1:])) if match else None

    def seeds(self, task: int) -> range:
        start = self.first + task * self.size
        return range(start, min(start + self.size, self.last + 1))

    def tasks(self, seeds: Sequence[int]) -> list[int]:
        """The tasks that have any of the seeds."""
        return sorted({(seed - self.first) // self.size for seed in seeds})


def arrays(folder: str, images: int, size: int, todo: Sequence[int], taken: set[int]) -> list[tuple[Slices, list[int]]]:
    """Arrays, with the tasks that are needed, for the seeds `todo` and none of those that live jobs have `taken`."""
    whole = Slices(folder, 0, images - 1, size)
    tasks = whole.tasks(todo)
    if not tasks or not any(seed in taken for task in tasks for seed in whole.seeds(task)):
        return [(whole, tasks)] if tasks else []
    # Slices of another size are on their way: an array for each stretch that they leave.
    runs: list[list[int]] = []
    for before, seed in zip([None, *todo], todo, strict=False):
        if before is None or any(other in taken for other in range(before, seed)):
            runs.append([])
        runs[-1].append(seed)
    stretches = [Slices(folder, run[0], run[-1], size) for run in runs]
    return [(stretch, stretch.tasks(run)) for stretch, run in zip(stretches, runs, strict=True)]


def missing_images(arm: Arm) -> list[int]:
    """Seeds without an image. Those of a row that was judged are looked for by name alone, which is quicker."""
    if arm.why_not():
        return missing_seeds(arm.folder, range(arm.images))
    there = set(seeds_there(arm.folder))
    return [seed for seed in range(arm.images) if seed not in there]


class Graph:
    """The steps of a table that are missing, and what is on its way.

    live: jobs that are there. keep: ids of those that the table needs. replaced: ids of those that wait for what will
    not come, since steps take their places.
    """

    def __init__(self, settings: Settings, logs: Path, live: Sequence[Live], device: str | None):
        self.settings, self.logs, self.live = settings, logs, live
        self.side = "cpu" if device == "cpu" else "gpu"
        self.steps: list[Step] = []
        self.keep: list[str] = []
        self.replaced: list[str] = []

    def add_row(self, arm: Arm, size: int) -> list[str]:
        """What a row lacks; returns names of steps and ids of jobs that the table must wait for."""
        missing, arriving = set(missing_images(arm)), set()
        taken: set[int] = set()
        for live in self.live:
            slices = Slices.named(live.name)
            if slices and slices.folder == str(arm.folder):
                on_its_way = missing.intersection(slices.seeds(live.task or 0))
                taken |= on_its_way
                arriving |= {live.job} if on_its_way else set()
        self.keep += sorted(arriving)
        sampled = [self._sample(arm, slices, tasks)
                   for slices, tasks in arrays(str(arm.folder), arm.images, size, sorted(missing - taken), taken)]

        lines = [] if arm.packed() else [arm.npz_command()]
        if not arm.missing_for_judging() and (missing or arm.why_not()):
            lines.append(arm.judge_command())
        if not lines:
            return [*sampled, *sorted(arriving)]
        name, there = f"evaluate:{arm.result}", self._there(f"evaluate:{arm.result}")
        if there and not sampled:
            self.keep += [live.job for live in there]
            return [live.job for live in there]
        self.replaced += [live.job for live in there if live.pending]
        self._add(Step(name, f"evaluate {arm.label}",
                       [*self._options(self.side, "evaluate"), self._log(f"evaluate_{_label(arm)}_%j")],
                       ["scripts/slurm/run.sbatch", *(shlex.join([sys.executable, *line]) for line in lines)],
                       sampled, sorted(arriving)))
        return [name]

    def _sample(self, arm: Arm, slices: Slices, tasks: Sequence[int]) -> str:
        words = arm.command(seeds="")
        throttle = f"%{self.settings.tasks_at_once}" if self.settings.tasks_at_once else ""
        self._add(Step(slices.name, f"sample {arm.label}, {len(tasks)} task{'s' if len(tasks) > 1 else ''}",
                       [f"--array={format_seeds(tasks)}{throttle}", *self._options(self.side, "sample"),
                        self._log(f"sample_{_label(arm)}_%A_%a")],
                       ["scripts/slurm/sample.sbatch", f"{slices.first}-{slices.last}", str(slices.size),
                        sys.executable, *words]))
        return slices.name

    def add_table(self, words: Sequence[str], file: Path, arms: Sequence[Arm], after: Sequence[str]) -> None:
        """words: the command that writes it to `file`. after: what `add_row` returned."""
        name, there = f"table:{file}", self._there(f"table:{file}")
        written = file.stat().st_mtime if file.exists() else 0.0
        newer = any(arm.result.exists() and arm.result.stat().st_mtime > written for arm in arms)
        if not self.steps and (there or (written and not newer and not after)):
            self.keep += [live.job for live in there]
            return
        self.replaced += [live.job for live in there if live.pending]
        steps = {step.name for step in self.steps}
        self._add(Step(name, f"table {file}", [*self._options("cpu", "table"), self._log(f"{file.stem}_%j")],
                       ["scripts/slurm/run.sbatch", shlex.join(words)],
                       list(dict.fromkeys(other for other in after if other in steps)),
                       list(dict.fromkeys(other for other in after if other not in steps))))

    def _add(self, step: Step) -> None:
        if step.name not in {other.name for other in self.steps}:       # two rows may have one folder
            self.steps.append(step)

    def _there(self, name: str) -> list[Live]:
        return [live for live in self.live if live.name == name]

    def _options(self, side: str, kind: str) -> list[str]:
        return self.settings.options(side, getattr(self.settings.time, kind))

    def _log(self, name: str) -> str:
        return f"--output={self.logs / name}.log"


def _label(arm: Arm) -> str:
    return f"{arm.run.config.name}_{arm.folder.name}"


def images_per_task(arms: Sequence[Arm], settings: Settings, per_hour: float | None) -> Iterator[int]:
    """How many images a task of each row makes.

    per_hour: images of the row with the most MACs in an hour; what others make goes by their MACs.
    """
    if per_hour is None:
        yield from [settings.images_per_task] * len(arms)
        return
    macs = [macs_per_image(arm.run).hook for arm in arms]
    hours = cluster.seconds(settings.time.sample) / 3600
    for arm, own in zip(arms, macs, strict=True):
        yield max(1, int(min(arm.images, _SHARE * hours * per_hour * max(macs) / own)))


def find_table(name: str) -> Table:
    """A table that has a script, by its name or the script's. Raises UserError."""
    known = {table.script.removesuffix(".sh"): table for table in (tables() | own_tables()).values() if table.script}
    name = name.removesuffix(".sh")
    found = known.get(name) or next((table for table in known.values() if table.name == name), None)
    if found is None:
        raise UserError(f"no table {name!r}: choose from {', '.join(known)}")
    return found


def build_parser() -> argparse.ArgumentParser:
    parser = user_parser("bash scripts/slurm/submit_table.sh")
    parser.description = ("Submit a table as Slurm jobs: an array per row that samples, an evaluation per row, the "
                          "table. A second run submits what is missing and not queued. scripts/slurm/README.md")
    parser.add_argument("table", help="a table script, like table1_ldm_imagenet; table_emoji is a trial")
    slurm = parser.add_argument_group("the jobs (defaults: scripts/slurm/settings.yaml)")
    slurm.add_argument("--settings", type=Path, default=cluster.SETTINGS, help="another file of settings")
    slurm.add_argument("--account")
    slurm.add_argument("--partition", help="of sampling and evaluation")
    slurm.add_argument("--cpu-partition", help="of the table; with --device cpu of everything")
    slurm.add_argument("--time", help="limit of a task that samples, like 04:00:00")
    slurm.add_argument("--images-per-task", type=arguments.whole)
    slurm.add_argument("--images-per-hour", type=arguments.finite,
                       help="that a task makes of the most expensive row; tasks then get as many as they make in four "
                            "fifths of --time, in cheaper rows more by their MACs")
    slurm.add_argument("--logs", type=Path, default=Path("logs/slurm"), help="folder (default: %(default)s)")
    return parser


def settings_of(args: argparse.Namespace) -> Settings:
    """The file's, and the user's before them. Raises UserError."""
    settings = cluster.read_settings(args.settings)
    if args.images_per_task is not None and args.images_per_hour is not None:
        raise UserError("give --images-per-task or --images-per-hour, not both")
    for option in ("images_per_task", "images_per_hour"):
        value = getattr(args, option)
        if value is not None and value <= 0:
            raise UserError(f"--{option.replace('_', '-')} must be more than 0, got {value}")
    settings.time.sample = settings.time.sample if args.time is None else args.time
    if cluster.seconds(settings.time.sample) < _SHORTEST:
        raise UserError(f"a task that samples stops five minutes before its time limit, so that must be "
                        f"{_SHORTEST // 60} minutes or more (the --signal line of scripts/slurm/sample.sbatch)")
    settings.account = args.account or settings.account
    settings.images_per_task = args.images_per_task or settings.images_per_task
    for options, partition in ((settings.gpu, args.partition), (settings.cpu, args.cpu_partition)):
        if partition:
            options["partition"] = partition
    return settings


def build_graph(args: argparse.Namespace, script: str, plan: Plan, settings: Settings, live: Sequence[Live]) -> Graph:
    """All steps that are missing; says which rows are left out. Raises UserError where none can be sampled."""
    graph = Graph(settings, args.logs, live, args.device)
    ready = [arm for arm in plan.arms if not arm.missing_for_sampling()]
    for arm in plan.arms:
        if arm not in ready:
            print(f"# left out: {arm.label}, without {'; '.join(arm.missing_for_sampling())}")
    if not ready:
        raise UserError(f"no row of {script} can be sampled: its files are missing (bash scripts/{script} --dry-run)")
    for thing in dict.fromkeys(thing for arm in ready for thing in arm.missing_for_judging()):
        print(f"# not judged without: {thing}")
    sizes = images_per_task(ready, settings, args.images_per_hour)
    after = [name for arm, size in zip(ready, sizes, strict=True) for name in graph.add_row(arm, size)]
    count = f"_{args.images}" if args.images else ""
    file = args.results / "runs" / f"{script.removesuffix('.sh')}{count}.txt"
    words = ["env", f"VIRTUAL_ENV={sys.prefix}", "bash", f"scripts/{script}", "--write-table", str(file)]
    words += ["--results", str(args.results)]
    words += ["--images", str(args.images)] if args.images else []
    words += [word for path in args.config for word in ("--config", str(path))]
    graph.add_table(words, file, ready, after)
    if not graph.steps and not graph.keep:
        print(f"# {script} is complete: {file}")
    if graph.keep:
        print(f"# on their way already: {' '.join(dict.fromkeys(graph.keep))}")
    return graph


def dry_run(args: argparse.Namespace, script: str, plan: Plan, settings: Settings) -> None:
    """Print the lines that would submit what is missing."""
    try:
        live = cluster.live_jobs()
    except UserError as error:
        print(f"# what is queued is not known: {error}")
        live = []
    graph = build_graph(args, script, plan, settings, live)
    for line in [f"mkdir -p {args.logs}", *cluster.as_script(graph.steps)] if graph.steps else []:
        print(line)
    for job in graph.replaced:
        print(f"scancel {job}")


def submit(args: argparse.Namespace, script: str, plan: Plan, settings: Settings) -> None:
    """Submit what is missing, and print the ids of its jobs."""
    graph = build_graph(args, script, plan, settings, cluster.live_jobs())
    cluster.check(graph.steps)
    if graph.steps:
        args.logs.mkdir(parents=True, exist_ok=True)
    ids: dict[str, str] = {}
    for step in graph.steps:
        print(f"{cluster.submit(step, ids)}  {step.title}", flush=True)
    cluster.cancel(graph.replaced)
    for job in graph.replaced:
        print(f"{job}  cancelled: a new job takes its place")
    if not graph.steps:
        print("nothing submitted")


@command
def main() -> None:
    args = build_parser().parse_args()
    table = find_table(args.table)
    settings = settings_of(args)
    plan, script = make_plan(table, args), str(table.script)
    if not plan.arms:
        print(f"{script} only lists settings, there is nothing to run: bash scripts/{script}")
        return
    if args.dry_run:
        dry_run(args, script, plan, settings)
    else:
        with cluster.only_one():
            submit(args, script, plan, settings)


if __name__ == "__main__":
    main()
