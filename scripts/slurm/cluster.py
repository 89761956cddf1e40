"""Talks to Slurm: the settings of the jobs, the live jobs, and the lines for sbatch."""

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
_PATIENCE = 60          # seconds to wait for a Slurm command, and for jobs that are just ending


@dataclass
class Times:
    """Time limits, in the format of sbatch."""
    sample: str
    evaluate: str
    table: str


@dataclass
class Settings:
    """scripts/slurm/settings.yaml. gpu, cpu: options of sbatch; null: left out, true: without a value."""
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
    """Read the settings. Raises UserError for a wrong file."""
    settings = read_yaml(path, Settings)
    for name in ("images_per_task", "tasks_at_once"):
        if (value := getattr(settings, name)) is not None and value < 1:
            raise UserError(f"{path}: {name} must be 1 or more, got {value}")
    for limit in vars(settings.time).values():
        seconds(limit)
    return settings


def seconds(text: str) -> float:
    """The seconds of a time in Slurm's format: minutes, [hours:]minutes:seconds, days-hours[:minutes[:seconds]].

    Raises UserError for anything else.
    """
    if text.lower() in ("infinite", "unlimited"):
        return float("inf")
    match = re.fullmatch(r"(?:(\d{1,5})-)?(\d{1,9})(?::(\d{1,9}))?(?::(\d{1,9}))?", text, re.ASCII)
    if not match:
        raise UserError(f"time limit {text!r} does not parse: use minutes, hours:minutes:seconds or "
                        'days-hours:minutes:seconds, in quotes, like "04:00:00"')
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    units = (3600, 60, 1) if days or len(numbers) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(n * unit for n, unit in zip(numbers, units, strict=False))


class Live(NamedTuple):
    """A job of this folder that is queued or running; each task of an array is one."""
    job: str                    # id; for a task, the array's
    task: int | None
    name: str
    pending: bool


class Step(NamedTuple):
    """A job to submit."""
    name: str                   # identifies its work among `live_jobs`, so that nothing is submitted twice
    title: str                  # for the user
    options: list[str]          # of sbatch
    command: list[str]          # a script and its arguments
    ok: Sequence[str] = ()      # names of steps that must succeed first
    ended: Sequence[str] = ()   # ids of jobs that must have ended

    def words(self, ids: dict[str, str] | None = None) -> list[str]:
        """The words of the sbatch line. ids: of the steps before it, by name; None: without dependencies."""
        after = [] if ids is None else [":".join(words) for words in (
            ["afterok", *(ids[name] for name in self.ok)], ["afterany", *self.ended]) if len(words) > 1]
        dependency = [f"--dependency={','.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
        return ["--parsable", f"--job-name={self.name}", f"--chdir={ROOT}", *self.options, *dependency, *self.command]


def as_script(steps: Iterable[Step]) -> list[str]:
    """The lines that would submit the steps, to read or to run with bash."""
    lines: list[str] = []
    ids: dict[str, str] = {}
    for i, step in enumerate(steps, 1):
        words = [word if word.startswith("--dependency=") else shlex.quote(word) for word in step.words(ids)]
        lines += [f"# {step.title}", f"job{i}=$(sbatch {' '.join(words)})"]
        ids[step.name] = f"$job{i}"
    return lines


def submit(step: Step, ids: dict[str, str]) -> str:
    """Submit a step, add its id to `ids`, and return it. Raises UserError."""
    ids[step.name] = _ask("sbatch", *step.words(ids)).split(";")[0]
    return ids[step.name]


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs. Raises UserError."""
    if jobs:
        _ask("scancel", *jobs)


def check(steps: Sequence[Step]) -> None:
    """Check that the cluster would accept the steps, as far as it can say beforehand. Raises UserError."""
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
            raise UserError(f"the time limit {given['time']} is beyond the limit of partition {' and '.join(names)}, "
                            f"{' and '.join(limits[name] for name in names)}")
        try:
            _ask("sbatch", "--test-only", *step.words())
        except UserError as error:
            raise UserError(f"{step.title}: {error}"
                            + ("; more images per task make fewer tasks" if "array" in str(error) else "")) from None


def live_jobs() -> list[Live]:
    """The user's queued and running jobs that were submitted from this folder. Raises UserError.

    It waits for jobs that are just ending: they may disappear, or go back into the queue.
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
    """The output of a Slurm command. Raises UserError if it does not exist, fails, or takes too long."""
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
