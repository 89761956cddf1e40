"""An arm of an experiment: one run on this machine, where it goes, what of it is there already and what is missing."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.metrics.registry import EXTRACTORS
from eval.metrics.small_sets import KernelDistance
from eval.tables.current import CLIP, COMMANDS, INCEPTION, Wanted, inputs_of, trained_on
from eval.tables.paper import Table
from eval.tables.render import kind_of_result
from eval.tables.rows import Row
from run import arguments, results
from run.files import ROOT
from run.folder import seeds_there
from run.machine import Machine
from run.results import Result
from run.spec import Run


@dataclass(frozen=True)
class Given:
    """What a user says of all arms of an experiment. reference: MODEL=PATH, or PATH for every model.

    images: of each arm; None for as many as the experiment has. pixels: options of the runs. machine: options of
    run.machine.Machine.
    """
    images: int | None = None
    samples: Path = Path("samples")
    results: Path = Path("results")
    inception: Path = INCEPTION
    clip_weights: Path = CLIP
    reference: tuple[str, ...] = ()
    pixels: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """One run on this machine, on the seeds from 0.

    kind: of its result; one of COMMANDS, or else the experiment's: it is judged beside the uncached run then
    (lab/study/runner.py). machine: options of run.machine.Machine. inputs: of the evaluator's command, by option.
    complete: whether images are as many as the paper's. section: of a paper's table. style: of eval.tables.plots.
    others: extractors beside EffLite0 (eval.metrics.registry), for what is judged beside the uncached run.
    converged: the runs of many and of twice as many steps that it is compared with, too; none where there are none.
    """
    label: str
    run: Run
    images: int
    folder: Path
    kind: str
    result: Path
    machine: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Path] = field(default_factory=dict)
    complete: bool = True
    section: str = ""
    style: str = ""
    others: tuple[str, ...] = ()
    converged: tuple["Arm", ...] = ()

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def seeds(self) -> str:
        return f"0-{self.images - 1}"

    @property
    def npz(self) -> Path | None:
        """Its images in ADM's layout, where its evaluator reads that."""
        packed = self.run.family.packed and self.kind == self.run.family.judge
        return self.folder.with_name(f"{self.name}_{self.images}.npz") if packed else None

    @property
    def pixels(self) -> int:
        """How many bytes the pixels of an image take."""
        return 3 * self.run.family.resolution(self.run.config) ** 2

    @property
    def on(self) -> Machine:
        """The machine, with the family's batch size where none was given."""
        return Machine(**{"batch_size": self.run.family.batch_size, **self.machine})

    def command(self, seeds: str | None = None) -> list[str]:
        """The sample command, without "python"; with all seeds unless a part of them is named, without any if empty."""
        chosen = self.seeds if seeds is None else seeds
        return ["-m", self.run.family.command, *self.run.spec.words(), *(["--seeds", chosen] if chosen else []),
                *arguments.words(self.machine), "--out", str(self.folder)]

    def npz_command(self) -> list[str]:
        return ["-m", "run.npz", "--samples", str(self.folder), "--seeds", self.seeds, "--out", str(self.npz)]

    def judge_command(self) -> list[str]:
        given = [word for option, path in self.inputs.items() for word in (option, str(path))]
        expected = [] if self.complete else ["--allow-fewer"]
        if self.kind != "clip_score":
            expected = [] if self.kind == "quality" else ["--count", str(self.images)]
        device = self.machine.get("device")
        return ["-m", f"eval.{self.kind}", "--samples", str(self.folder), *given, "--seeds", self.seeds, *expected,
                *(["--device", device] if device else []), "--out", str(self.result)]

    @property
    def present(self) -> int:
        """How many of the images are in the folder, by their number alone."""
        return sum(seed < self.images for seed in seeds_there(self.folder))

    @property
    def bytes_needed(self) -> int:
        """On the disk for what is not there yet, at most."""
        return self.pixels * (self.images - self.present + (0 if self.packed() else self.images))

    def packed(self) -> bool:
        """Whether the npz is there, and no older than the last sampling; an arm without one is done."""
        notes = (self.folder / name for name in ("run.json", "sessions.jsonl"))
        made = [path.stat().st_mtime for path in notes if path.exists()]
        return self.npz is None or (self.npz.exists() and self.npz.stat().st_mtime >= max(made, default=0))

    @property
    def wanted(self) -> Wanted:
        """What its number is to be of."""
        trained = trained_on(self.run.config)
        beside = {"--reference": Path(trained)} if self.kind not in COMMANDS and trained else {}
        return Wanted(self.run, self.kind, self.images, {**self.inputs, **beside}, self.folder)

    def why_not(self) -> str | None:
        """Why it has no number that is current, in words; None where it has."""
        if not self.result.is_file():
            return self.wanted.progress()
        found = results.read(self.result)
        lacking = [f"not judged by {name}" for name in self.others
                   if KernelDistance.named(EXTRACTORS[name].name).name not in found.metrics]
        if self.converged and Path(found.inputs.get("converged", "")).name != self.converged[0].name:
            lacking.append(f"not compared with {self.converged[0].name}")
        return self.wanted.fault(found) or next(iter(lacking), None)

    def measured(self) -> Result | None:
        """The result, where it is there and current."""
        return results.read(self.result) if self.result.is_file() and self.why_not() is None else None

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


def of_row(row: Row, table: Table, given: Given | None = None) -> Arm:
    """A row of a table. Raises UserError."""
    section = table.sections[row.section]
    return of_run(row.run, row.label, section.images or row.run.config.sampler.images,
                  kind_of_result(row.run, section.columns()), given, row.section)


def of_run(run: Run, label: str, whole: int, kind: str, given: Given | None = None, section: str = "") -> Arm:
    """A run in the folder that every table and sweep has for its settings. Raises UserError.

    whole: images, unless the user says how many.
    """
    given = given or Given()
    prompts: Path | None = getattr(run.spec.condition, "prompts", None)
    images = min(given.images or whole, whole) if prompts else given.images or whole
    folder = given.samples / run.config.name / run.name         # the user's options are in no name
    result = given.results / "runs" / run.config.name / f"{folder.name}_{images}_{kind}.json"
    inputs = inputs_of(run, kind, given.inception, given.clip_weights, given.reference)
    known = {name for part in run.spec.parts for name in arguments.names(part)}
    chosen = {name: value for name, value in given.pixels.items() if name in known}
    return Arm(label, run.spec.having(**chosen).open(), images, folder, kind, result, given.machine, inputs,
               images >= whole, section)
