"""A run of a table or a sweep on this machine: its commands, what is there already and what is missing."""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eval.tables.paper import Section, Table
from eval.tables.render import judge
from eval.tables.rows import Row
from runs import arguments
from runs.errors import UserError
from runs.families import Config
from runs.files import ROOT
from runs.machine import Machine
from runs.spec import Run

# Where scripts/download.sh puts what the evaluators need.
INCEPTION = Path("checkpoints/inception/weights-inception-2015-12-05-6726825d.pth")
CLIP = Path("checkpoints/clip_vit_g_14/open_clip_pytorch_model.bin")
PIXELS = ("checkpoint", "labels", "dtype", "released_noise")       # of the user's options, those that decide them


class Job(NamedTuple):
    """One run on this machine. npz: in ADM's layout, for ImageNet. inputs: of the evaluator, by option."""
    label: str
    section: str
    run: Run
    images: int
    complete: bool              # whether that is as many as the paper's
    folder: Path
    npz: Path | None
    machine: Mapping[str, Any]  # what the user says of it: options of runs.machine.Machine
    kind: str                   # of evaluation: adm, fid, clip_score, quality
    inputs: dict[str, Path]
    result: Path

    @property
    def seeds(self) -> str:
        return f"0-{self.images - 1}"

    @property
    def pixels(self) -> int:
        """How many bytes the pixels of an image take."""
        return 3 * self.run.family.resolution(self.run.config) ** 2

    def command(self, seeds: str | None = None) -> list[str]:
        """The sample command, without "python"; with all seeds unless a part of them is named, without any if empty."""
        chosen = self.seeds if seeds is None else seeds
        return ["-m", self.run.family.command, *self.run.spec.words(), *(["--seeds", chosen] if chosen else []),
                *arguments.words(self.machine), "--out", str(self.folder)]

    @property
    def present(self) -> int:
        """How many of the images are in the folder, by their number alone."""
        return min(self.images, sum(1 for _ in self.folder.glob("*/*.png")))

    def packed(self) -> bool:
        """Whether the npz is there, and no older than the sample folder; a run without one is done."""
        run = self.folder / "run.json"
        return self.npz is None or (self.npz.exists()
                                    and not (run.exists() and run.stat().st_mtime > self.npz.stat().st_mtime))

    def judged(self) -> bool:
        """Whether the result is there, and no older than the last sampling."""
        sessions = self.folder / "sessions.jsonl"
        return self.result.exists() and not (sessions.exists()
                                             and sessions.stat().st_mtime > self.result.stat().st_mtime)

    @property
    def bytes_needed(self) -> int:
        """On the disk for what is not there yet, at most."""
        return self.pixels * (self.images - self.present + (0 if self.packed() else self.images))

    def npz_command(self) -> list[str]:
        return ["-m", "runs.npz", "--samples", str(self.folder), "--seeds", self.seeds, "--out", str(self.npz)]

    def judge_command(self) -> list[str]:
        given = [word for option, path in self.inputs.items() for word in (option, str(path))]
        expected = [] if self.complete else ["--allow-fewer"]
        if self.kind != "clip_score":
            expected = ["--seeds", self.seeds] if self.kind == "quality" else ["--count", str(self.images)]
        device = self.machine.get("device")
        return ["-m", f"eval.{self.kind}", "--samples", str(self.folder), *given, *expected,
                *(["--device", device] if device else []), "--out", str(self.result)]

    def inputs_of_sampling(self) -> dict[str, Path]:
        """What the sampler reads: checkpoint and prompts."""
        prompts = getattr(self.run.spec.condition, "prompts", None)
        return {"checkpoint": self.run.checkpoint, **({"prompts": prompts} if prompts else {})}

    def missing_for_sampling(self) -> list[str]:
        """What the sampler lacks on this machine."""
        return [f"{what} {path} (python -m scripts.doctor says where it comes from)"
                for what, path in self.inputs_of_sampling().items() if not _there(path)]

    def missing_for_judging(self) -> list[str]:
        """What the evaluator lacks on this machine."""
        return [f"{option} {path}" for option, path in self.inputs.items()
                if option != "--prompts" and not _there(path)]


def _there(path: Path) -> bool:
    return str(path).startswith("emoji:") or (ROOT / path).exists()


def make_job(row: Row, table: Table, args: argparse.Namespace) -> Job:
    """A row of a table, by the user's options. Raises UserError."""
    section: Section = table.sections[row.section]
    kind = judge(row.run, section.columns())
    return job_of(row.run, row.label, section.images or row.run.config.sampler.images, kind, args, row.section)


def job_of(run: Run, label: str, whole: int, kind: str, args: argparse.Namespace, section: str = "") -> Job:
    """Where a run goes and how it is made, by the user's options (experiments.plan.add_options). Raises UserError.

    whole: images, unless the user says --images. kind: of its result.
    """
    prompts = getattr(run.spec.condition, "prompts", None)
    images = min(args.images or whole, whole) if prompts else args.images or whole
    folder = args.samples / run.config.name / run.name          # the user's options are in no name
    npz = folder.with_name(f"{folder.name}_{images}.npz") if run.family.packed else None
    result = args.results / "runs" / run.config.name / f"{folder.name}_{images}_{kind}.json"
    if kind == "clip_score":
        inputs = {"--prompts": prompts, "--weights": args.clip_weights or CLIP}
    else:
        inputs = {"--reference": reference_of(run, args)}
        inputs |= {"--inception": args.inception or INCEPTION} if kind != "quality" else {}
    known = {name for part in run.spec.parts for name in arguments.names(part)}
    chosen = {name: getattr(args, name) for name in PIXELS if getattr(args, name) and name in known}
    machine = {name: value for name in arguments.names(Machine) if (value := getattr(args, name))}
    return Job(label, section, run.spec.having(**chosen).open(), images, images >= whole, folder, npz, machine, kind,
               inputs, result)


def trained_on(config: Config) -> str | None:
    """The images that a model was trained on here, as eval.quality calls them; None for a published one."""
    if config.train is None:
        return None
    groups = getattr(config.train, "groups", None) or [config.train.group or "all"]
    return f"emoji:{','.join(groups)}"


def reference_of(run: Run, args: argparse.Namespace) -> Path:
    """--reference MODEL=PATH or PATH, else what the model was trained on, or where its reference is looked for."""
    name = run.config.name
    for text in args.reference:
        model, _, path = text.rpartition("=")
        if model in ("", name):
            return Path(path)
    return Path(trained_on(run.config) or run.family.references.get(name, f"data/references/{name}.npz"))


def run(jobs: Sequence[Job]) -> None:
    """Sample each run, pack it and judge it where that can be done; what is there is kept.

    Raises UserError for one that fails.
    """
    for i, job in enumerate(jobs):
        print(f"[{i + 1}/{len(jobs)}] {job.label}", flush=True)
        python(job, job.command())
        if not job.packed():
            python(job, job.npz_command())
        if not job.missing_for_judging() and not job.judged():
            python(job, job.judge_command())


def python(job: Job, line: list[str]) -> None:
    if subprocess.run([sys.executable, *line], cwd=ROOT).returncode:
        raise UserError(f"row {job.label!r} failed; to see it alone: {shlex.join(['python', *line])}")
