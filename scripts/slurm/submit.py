"""Submit a table as Slurm jobs: an array per row that samples, an evaluation per row, and the table. See README.md.

    bash scripts/slurm/submit_table.sh table1_ldm_imagenet --images 1000 --dry-run

The table scripts (lab/study/papers.py) give the rows, their commands, and which of their images exist. The names of the
jobs are the only record of what is queued already.
"""

import contextlib
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from eval.tables.arms import Arm, Given
from eval.tables.paper import own_tables, tables
from eval.tables.study import Study
from lab.study.papers import Options, Plan, make_plan
from run.claims import only_one
from run.cli import command
from run.files import ROOT
from run.folder import missing_seeds, seeds_there
from run.seeds import format_seeds
from scripts.slurm import cluster
from scripts.slurm.cluster import Live, Settings, Step
from unet_caching.errors import UserError
from unet_caching.options import option, required

_SHORTEST = 900     # seconds: a time limit that leaves time for work before USR1, which may come a minute early


class Slices(NamedTuple):
    """The seeds of an array: task i samples seeds i size to (i + 1) size - 1, up to last."""
    folder: str
    last: int
    size: int

    @property
    def name(self) -> str:
        """The name of the array's jobs."""
        return f"sample:{self.folder}:0-{self.last}/{self.size}"

    @classmethod
    def named(cls, name: str) -> "Slices | None":
        """The inverse of `name`; None for other jobs."""
        match = re.fullmatch(r"sample:(.*):0-(\d+)/(\d+)", name)
        return cls(match[1], int(match[2]), int(match[3])) if match else None

    def seeds(self, task: int) -> range:
        return range(task * self.size, min((task + 1) * self.size, self.last + 1))

    def tasks(self, seeds: Iterable[int]) -> list[int]:
        """The tasks that have any of the seeds."""
        return sorted({seed // self.size for seed in seeds})


def missing_images(arm: Arm) -> set[int]:
    """The seeds without an image. For a judged row only file names are checked, which is quicker."""
    if arm.why_not():
        return set(missing_seeds(arm.folder, range(arm.images)))
    return set(range(arm.images)).difference(seeds_there(arm.folder))


class Graph:
    """The missing steps of a table, and the live jobs that it needs."""

    def __init__(self, settings: Settings, logs: Path, live: Sequence[Live], device: str | None):
        self.settings, self.logs, self.live = settings, logs, live
        self.side = "cpu" if device == "cpu" else "gpu"
        self.steps: dict[str, Step] = {}
        self.keep: list[str] = []           # ids of live jobs that the table needs
        self.replaced: list[str] = []       # ids of pending jobs that would wait in vain: steps replace them

    def add_row(self, arm: Arm) -> list[str]:
        """Add the missing steps of a row. Returns the names of steps and ids of jobs that the table must wait for."""
        missing, taken, arriving = missing_images(arm), set[int](), set[str]()
        for live in self.live:
            slices = Slices.named(live.name)
            if slices and slices.folder == str(arm.folder) and (
                    coming := missing.intersection(slices.seeds(live.task or 0))):
                taken |= coming
                arriving.add(live.job)
        self.keep += sorted(arriving)
        label = f"{arm.run.config.name}_{arm.folder.name}"
        sampled = []
        # A task may have seeds that another job has, too: samplers in one folder share them.
        size = self.settings.images_per_task
        slices = Slices(str(arm.folder), arm.images - 1, size)
        if tasks := slices.tasks(missing - taken):
            throttle = f"%{self.settings.tasks_at_once}" if self.settings.tasks_at_once else ""
            sampled.append(self._add(
                slices.name, f"sample {arm.label}, {len(tasks)} task{'s' if len(tasks) > 1 else ''}", self.side,
                "sample", f"sample_{label}_%A_%a", ["sample.sbatch", f"0-{slices.last}", str(size), sys.executable,
                                                    *arm.command(seeds="")],
                more=[f"--array={format_seeds(tasks)}{throttle}"]))

        if arm.missing_for_judging() or not (missing or arm.why_not()):
            return [*sampled, *sorted(arriving)]
        name = f"evaluate:{arm.result}"
        if not sampled and (there := self._there(name)):
            self.keep += there
            return there
        return [self._add(name, f"evaluate {arm.label}", self.side, "evaluate", f"evaluate_{label}_%j",
                          ["run.sbatch", shlex.join([sys.executable, *arm.judge_command()])],
                          sampled, sorted(arriving))]

    def add_table(self, words: Sequence[str], file: Path, arms: Sequence[Arm], after: Sequence[str]) -> None:
        """Add the table's step, if it is needed. words: writes the table to `file`. after: from `add_row`."""
        name = f"table:{file}"
        written = file.stat().st_mtime if file.exists() else 0.0
        newer = any(arm.result.exists() and arm.result.stat().st_mtime > written for arm in arms)
        there = self._there(name)
        if not self.steps and (there or (written and not newer and not after)):
            self.keep += there
            return
        after = list(dict.fromkeys(after))
        self._add(name, f"table {file}", "cpu", "table", f"{file.stem}_%j", ["run.sbatch", shlex.join(words)],
                  [one for one in after if one in self.steps], [one for one in after if one not in self.steps])

    def _add(self, name: str, title: str, side: str, kind: str, log: str, script: list[str], ok: Sequence[str] = (),
             ended: Sequence[str] = (), more: Sequence[str] = ()) -> str:
        """Add a step once, since two rows may share a folder. It replaces a pending job. Returns its name."""
        if name not in self.steps and kind != "sample":
            self.replaced += [live.job for live in self.live if live.name == name and live.pending]
        options = [*more, *self.settings.options(side, kind), f"--output={self.logs / log}.log"]
        self.steps.setdefault(name, Step(name, title, options, [f"scripts/slurm/{script[0]}", *script[1:]], ok, ended))
        return name

    def _there(self, name: str) -> list[str]:
        return [live.job for live in self.live if live.name == name]


def find_table(name: str) -> Study:
    """A table with a script, by the name of either. Raises UserError."""
    known = {table.script.removesuffix(".sh"): table for table in (tables() | own_tables()).values() if table.script}
    name = name.removesuffix(".sh")
    for script, table in known.items():
        if name in (script, table.name):
            return table
    raise UserError(f"no table {name!r}: choose from {', '.join(known)}")


@dataclass(frozen=True)
class Jobs:
    title: ClassVar[str] = "the jobs (defaults: scripts/slurm/settings.yaml)"
    table: str = required("a table script, like table1_ldm_imagenet; table_emoji is a trial", word=True)
    settings: Path = option(cluster.SETTINGS, "another file of settings")
    account: str | None = option(None, "instead of the file's")
    partition: str | None = option(None, "for sampling and evaluation")
    cpu_partition: str | None = option(None, "for the table; with --device cpu for everything")
    time: str | None = option(None, "time limit of a task that samples, like 04:00:00")
    images_per_task: int | None = option(None, "images that a task samples", least=1)
    logs: Path = option(Path("logs/slurm"), "folder of the logs (default: %(default)s)")


def settings_of(jobs: Jobs) -> Settings:
    """The settings of the file, overridden by the user's options. Raises UserError."""
    settings = cluster.read_settings(jobs.settings)
    settings.time.sample = jobs.time if jobs.time is not None else settings.time.sample
    if cluster.seconds(settings.time.sample) < _SHORTEST:
        raise UserError(f"the time limit of a task that samples must be {_SHORTEST // 60} minutes or more: it stops "
                        "five minutes before (the --signal line of scripts/slurm/sample.sbatch)")
    settings.account = jobs.account or settings.account
    settings.images_per_task = jobs.images_per_task or settings.images_per_task
    for options, partition in ((settings.gpu, jobs.partition), (settings.cpu, jobs.cpu_partition)):
        options |= {"partition": partition} if partition else {}
    return settings


def build_graph(options: Options, given: Given, script: str, plan: Plan, graph: Graph) -> Graph:
    """Add all missing steps, and print the rows that are left out. Raises UserError if no row can be sampled."""
    ready = []
    for arm in plan.arms:
        if lacking := arm.missing_for_sampling():
            print(f"# left out: {arm.label}, without {'; '.join(lacking)}")
        else:
            ready.append(arm)
    if not ready:
        raise UserError(f"no row of {script} can be sampled: its files are missing (bash scripts/{script} --dry-run)")
    for thing in dict.fromkeys(thing for arm in ready for thing in arm.missing_for_judging()):
        print(f"# not judged without: {thing}")
    after = [name for arm in ready for name in graph.add_row(arm)]
    images = ["--images", str(given.images)] if given.images else []
    file = given.results / "runs" / f"{'_'.join([script.removesuffix('.sh'), *images[1:]])}.txt"
    words = ["env", f"VIRTUAL_ENV={sys.prefix}", "bash", f"scripts/{script}", "--write-table", str(file), "--results",
             str(given.results), *images, *(word for path in options.config for word in ("--config", str(path)))]
    graph.add_table(words, file, ready, after)
    if not graph.steps and not graph.keep:
        print(f"# {script} is complete: {file}")
    if graph.keep:
        print(f"# on their way already: {' '.join(dict.fromkeys(graph.keep))}")
    return graph


def show(graph: Graph) -> None:
    """Print the lines that would submit the missing steps."""
    for line in [f"mkdir -p {graph.logs}", *cluster.as_script(graph.steps.values())] if graph.steps else []:
        print(line)
    for job in graph.replaced:
        print(f"scancel {job}")


def submit(graph: Graph) -> None:
    """Submit the missing steps, and print the ids of their jobs."""
    steps = list(graph.steps.values())
    cluster.check(steps)
    if steps:
        graph.logs.mkdir(parents=True, exist_ok=True)
    ids: dict[str, str] = {}
    for step in steps:
        print(f"{cluster.submit(step, ids)}  {step.title}", flush=True)
    cluster.cancel(graph.replaced)
    for job in graph.replaced:
        print(f"{job}  cancelled: a new job takes its place")
    if not steps:
        print("nothing submitted")


@command
def main(options: Options, given: Given, jobs: Jobs) -> None:
    table, settings = find_table(jobs.table), settings_of(jobs)
    plan = make_plan(table, options, given)
    if not plan.arms:
        print(f"{table.script} only lists settings, there is nothing to run: bash scripts/{table.script}")
        return
    with contextlib.nullcontext() if options.dry_run else only_one(ROOT / cluster.SETTINGS):  # the next one sees jobs
        try:
            live = cluster.live_jobs()
        except UserError as error:
            if not options.dry_run:
                raise
            print(f"# what is queued is not known: {error}")
            live = []
        graph = build_graph(options, given, str(table.script), plan, Graph(settings, jobs.logs, live, given.device))
        (show if options.dry_run else submit)(graph)


if __name__ == "__main__":
    main()
