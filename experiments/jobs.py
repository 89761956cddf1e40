"""What a table script runs: a job per row, its commands, what is there already and what is missing."""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from eval.tables.paper import Section, Table
from eval.tables.render import judge
from eval.tables.rows import COMMANDS, ROOT, Row
from runs.errors import UserError

# Where scripts/download.sh puts what the evaluators need, and where references are looked for, by model.
INCEPTION = Path("checkpoints/inception/weights-inception-2015-12-05-6726825d.pth")
CLIP = Path("checkpoints/clip_vit_g_14/open_clip_pytorch_model.bin")
REFERENCES = {"ldm_cin256": Path("data/references/VIRTUAL_imagenet256_labeled.npz"),
              "ddpm_cifar10": Path("data/references/cifar10.npz"),
              "ddpm_bedroom": Path("data/references/lsun_bedroom.npz"),
              "ddpm_church": Path("data/references/lsun_church.npz"),
              "sd_v15": Path("data/references/coco_val2017.npz"),
              "ddpm_emoji": Path("emoji:Smileys & Emotion")}        # what it was trained on, as eval.quality calls it
_PASSED_ON = ("checkpoint", "labels", "batch_size", "device", "dtype", "threads", "compile", "cuda_graphs",
              "released_noise")


class Job(NamedTuple):
    """One row on this machine. npz: in ADM's layout, for ImageNet. reference, weights: of the evaluator."""
    row: Row
    images: int
    complete: bool              # whether that is as many as the paper's
    folder: Path
    npz: Path | None
    command: list[str]          # of the sampler, without "python"
    kind: str                   # of evaluation: adm, fid, clip_score, quality
    inputs: dict[str, Path]     # of the evaluator, by option
    result: Path
    device: str | None

    @property
    def seeds(self) -> str:
        return f"0-{self.images - 1}"

    @property
    def present(self) -> int:
        """How many of the images are in the folder, by their number alone."""
        return min(self.images, sum(1 for _ in self.folder.glob("*/*.png")))

    def packed(self) -> bool:
        """Whether the npz is there, and no older than the sample folder; a row without one is done."""
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
        return self.row.pixels * (self.images - self.present + (0 if self.packed() else self.images))

    def npz_command(self) -> list[str]:
        return ["-m", "runs.npz", "--samples", str(self.folder), "--seeds", self.seeds, "--out", str(self.npz)]

    def judge_command(self) -> list[str]:
        given = [word for option, path in self.inputs.items() for word in (option, str(path))]
        expected = [] if self.complete else ["--allow-fewer"]
        if self.kind != "clip_score":
            expected = ["--seeds", self.seeds] if self.kind == "quality" else ["--count", str(self.images)]
        return ["-m", f"eval.{self.kind}", "--samples", str(self.folder), *given, *expected,
                *(["--device", self.device] if self.device else []), "--out", str(self.result)]

    def inputs_of_sampling(self) -> dict[str, Path]:
        """What the sampler reads: checkpoint and prompts."""
        given = _last("--model", self.command) or _last("--checkpoint", self.command)
        prompts = self.row.given.prompts
        return {"checkpoint": Path(given or self.row.config.checkpoint),
                **({"prompts": Path(prompts)} if prompts else {})}

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


def _last(option: str, words: Sequence[str]) -> str | None:
    """The value of an option that may be given twice: the user's comes after the row's, and counts."""
    return next((words[i + 1] for i in range(len(words) - 2, -1, -1) if words[i] == option), None)


def make_job(row: Row, table: Table, args: argparse.Namespace) -> Job:
    """A row of a table, by the user's options. Raises UserError."""
    section: Section = table.sections[row.section]
    return job_of(row, section.images or row.config.sampler.images, judge(row, section.columns()), args)


def job_of(row: Row, whole: int, kind: str, args: argparse.Namespace) -> Job:
    """Where a run goes and how it is made, by the user's options (scripts.plan.add_options). Raises UserError.

    whole: images, unless the user says --images. kind: of its result.
    """
    images = min(args.images or whole, whole) if row.given.prompts else args.images or whole
    folder = args.samples / row.config.name / row.name()
    npz = folder.with_name(f"{folder.name}_{images}.npz") if row.package == "ldm" else None
    result = args.results / "runs" / row.config.name / f"{folder.name}_{images}_{kind}.json"
    command = ["-m", COMMANDS[row.package], "--config", str(row.config_path), *row.options, "--seeds",
               f"0-{images - 1}", *passed_on(args, row.package), "--out", str(folder)]
    if kind == "clip_score":
        inputs = {"--prompts": Path(row.given.prompts), "--weights": args.clip_weights or CLIP}
    else:
        inputs = {"--reference": reference_of(row, args)}
        inputs |= {"--inception": args.inception or INCEPTION} if kind != "quality" else {}
    return Job(row, images, images >= whole, folder, npz, command, kind, inputs, result, args.device)


def reference_of(row: Row, args: argparse.Namespace) -> Path:
    """--reference MODEL=PATH or PATH, else where the model's is looked for."""
    for text in args.reference:
        model, _, path = text.rpartition("=")
        if model in ("", row.config.name):
            return Path(path)
    return REFERENCES.get(row.config.name, Path("data/references") / f"{row.config.name}.npz")


def passed_on(args: argparse.Namespace, package: str) -> list[str]:
    """The user's options for a sampler."""
    only = {"labels": "ldm", "released_noise": "sd"}
    flags = []
    for name in _PASSED_ON:
        value = getattr(args, name)
        if value in (None, False) or package != only.get(name, package):
            continue
        option = "model" if (name, package) == ("checkpoint", "sd") else name.replace("_", "-")
        flags += [f"--{option}"] + ([] if value is True else [str(value)])
    return flags


def run(jobs: Sequence[Job]) -> None:
    """Sample each row, pack it and judge it where that can be done; what is there is kept.

    Raises UserError for a row that fails.
    """
    for i, job in enumerate(jobs):
        print(f"[{i + 1}/{len(jobs)}] {job.row.label}", flush=True)
        python(job, job.command)
        if not job.packed():
            python(job, job.npz_command())
        if not job.missing_for_judging() and not job.judged():
            python(job, job.judge_command())


def python(job: Job, line: list[str]) -> None:
    if subprocess.run([sys.executable, *line], cwd=ROOT).returncode:
        raise UserError(f"row {job.row.label!r} failed; to see it alone: {shlex.join(['python', *line])}")
