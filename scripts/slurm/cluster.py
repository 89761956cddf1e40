"""What goes to Slurm and comes from it: the settings of the jobs, the jobs that are there, and the lines for sbatch."""

import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from run.files import ROOT
from run.settings import read_yaml
from unet_caching.errors import UserError, one_line

SETTINGS = Path("scripts/slurm/settings.yaml")
_PATIENCE = 60          # seconds that a client of Slurm gets, and jobs that are just ending


@dataclass
class Times:
    """Time limits, as sbatch takes them."""
    sample: str
    evaluate: str
    table: str


@dataclass
class Settings:
    """scripts/slurm/settings.yaml. gpu, cpu: options of sbatch; none where null, true for one without a value."""
    time: Times
    images_per_task: int
    account: str | None = None
    gpu: dict[str, Any] = field(default_factory=dict)
    cpu: dict[str, Any] = field(default_factory=dict)
    tasks_at_once: int | None = None

    def options(self, side: str, kind: str) -> list[str]:
        """The options of sbatch for a job on the gpu or cpu side that samples, evaluates or writes a table."""
        values = {"account": self.account, **getattr(self, side), "time": getattr(self.time, kind)}
        return [f"--{key}" if value is True else f"--{key}={value}" for key, value in values.items()
                if value is not None and value is not False]


def read_settings(path: Path) -> Settings:
    """Read the settings. Raises UserError for a file that is wrong or has no sense."""
    settings = read_yaml(path, Settings)
    for name in ("images_per_task", "tasks_at_once"):
        if (value := getattr(settings, name)) is not None and value < 1:
            raise UserError(f"{path}: {name} must be 1 or more, got {value}")
    for limit in vars(settings.time).values():
        seconds(limit)
    return settings


def seconds(text: str) -> float:
    """A time as Slurm writes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].

    Raises UserError for anything else.
    """
    if text.lower() in ("infinite", "unlimited"):
        return float("inf")
    match = re.fullmatch(r"(?:(\d{1,5})-)?(\d{1,9})(?::(\d{1,9}))?(?::(\d{1,9}))?", text, re.ASCII)
    if not match:
        raise UserError(f"time limit {text!r} does not parse: write minutes, hours:minutes:seconds or "
                        'days-hours:minutes:seconds, in quotes, like "04:00:00"')
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    units = (3600, 60, 1) if days or len(numbers) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(n * unit for n, unit in zip(numbers, units, strict=False))


class Live(NamedTuple):
    """A job of this folder that is queued or running; a task of an array has a line of its own."""
    job: str                    # id; of the array, where it is of one
    task: int | None
    name: str
    pending: bool


class Step(NamedTuple):
    """A job to be submitted."""
    name: str                   # says what it is for, so that `live_jobs` tells what need not be submitted again
    title: str                  # for the user
    options: list[str]          # of sbatch
    command: list[str]          # a script and its arguments
    ok: Sequence[str] = ()      # names of steps that must succeed first
    ended: Sequence[str] = ()   # ids of jobs that must have ended

    def words(self, ids: dict[str, str] | None = None) -> list[str]:
        """The words of the whole line, with the ids of the steps before it; without ids, without its dependency."""
        after = [] if ids is None else [":".join(words) for words in (
            ["afterok", *(ids[name] for name in self.ok)], ["afterany", *self.ended]) if len(words) > 1]
        dependency = [f"--dependency={','.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
        return ["--parsable", f"--job-name={self.name}", f"--chdir={ROOT}", *self.options, *dependency, *self.command]


def as_script(steps: Iterable[Step]) -> list[str]:
    """The lines that would submit the steps, to be read, or run by bash."""
    lines: list[str] = []
    ids: dict[str, str] = {}
    for i, step in enumerate(steps, 1):
        words = [word if word.startswith("--dependency=") else shlex.quote(word) for word in step.words(ids)]
        lines += [f"# {step.title}", f"job{i}=$(sbatch {' '.join(words)})"]
        ids[step.name] = f"$job{i}"
    return lines


def submit(step: Step, ids: dict[str, str]) -> str:
    """Submit a step, add its id to those of the steps before, and return it. Raises UserError."""
    ids[step.name] = _ask("sbatch", *step.words(ids)).split(";")[0]
    return ids[step.name]


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs. Raises UserError."""
    if jobs:
        _ask("scancel", *jobs)


def check(steps: Sequence[Step]) -> None:
    """Check that the cluster would take the steps, as far as it says beforehand. Raises UserError."""
    partitions = [line.split("|") for line in _ask("sinfo", "-h", "-o", "%R|%l|%P").splitlines()]
    limits = {name: limit for name, limit, _ in partitions}
    for step in steps:
        given = dict(word.removeprefix("--").partition("=")[::2] for word in step.options)
        names = given["partition"].split(",") if "partition" in given else [
            name for name, _, marked in partitions if marked.endswith("*")]
        for name in names:
            if name not in limits:
                raise UserError(f"no partition {name!r} on this cluster: it has {', '.join(limits)}")
        if names and all(seconds(given["time"]) > seconds(limits[name]) for name in names):
            raise UserError(f"the time limit {given['time']} is beyond that of partition {' and '.join(names)}, "
                            f"{' and '.join(limits[name] for name in names)}")
        try:
            _ask("sbatch", "--test-only", *step.words())
        except UserError as error:
            raise UserError(f"{step.title}: {error}"
                            + ("; more images per task make fewer tasks" if "array" in str(error) else "")) from None


def live_jobs() -> list[Live]:
    """This user's jobs that were submitted from this folder and are not over. Raises UserError.

    Jobs that are just ending are waited for: they may be gone after that, or back in the queue.
    """
    until = time.monotonic() + _PATIENCE
    while True:
        lines = _ask("squeue", "-h", "-r", "-u", str(os.getuid()), "-o", "%F|%K|%T|%Z|%j").splitlines()
        fields = [line.split("|", 4) for line in lines]
        own = [(job, task, state, name) for job, task, state, folder, name in fields if folder == str(ROOT)]
        live = [Live(job, int(task) if task.isdigit() else None, name, state == "PENDING")
                for job, task, state, name in own if state != "COMPLETING"]
        if len(live) == len(own) or time.monotonic() > until:
            return live
        time.sleep(0.5)


def _ask(*words: str) -> str:
    """What a client of Slurm prints. Raises UserError where it is not there, fails, or takes too long."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_PATIENCE)
    except FileNotFoundError:
        raise UserError(f"no {words[0]} on PATH: is this a login node of a Slurm cluster? (--dry-run works without)"
                        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{words[0]} does not answer") from None
    if done.returncode:
        raise UserError(f"{words[0]}: {one_line(done.stderr) or f'exit status {done.returncode}'} "
                        f"(the line: {shlex.join(words)})")
    return done.stdout.strip()
