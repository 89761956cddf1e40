"""An arm: one run on this machine, the places of its images and records, and what exists of them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from eval.metrics.registry import SMALL_MEASURES
from eval.tables.current import CLIP, INCEPTION, Wanted, inputs_of
from eval.tables.paper import columns_of
from eval.tables.study import Entry, Part, Study, config_of, entries, missing, with_common
from run import arguments, results
from run.families import family_named_by
from run.files import ROOT
from run.folder import seeds_there
from run.machine import Machine
from run.results import Result
from run.seeds import MOST, format_seeds
from run.spec import DTYPES, Run
from unet_caching.errors import UserError
from unet_caching.options import option


@dataclass(frozen=True)
class Evaluators:
    title: ClassVar[str] = "the evaluators (python -m scripts.doctor shows the default places of their files)"
    inception: Path | None = option(None, "weights of Inception, for FID, sFID, IS, precision and recall")
    reference: tuple[str, ...] = option((), "statistics of the real images; one for each model of the table",
                                        metavar="[MODEL=]PATH", action="append")
    clip_weights: Path | None = option(None, "open_clip's ViT-g-14, laion2b_s34b_b88k")


@dataclass(frozen=True)
class PassedOn:
    title: ClassVar[str] = "passed on to the sample command (its defaults)"
    checkpoint: Path | None = option(None, "weights, instead of the config's")
    labels: str | None = option(None, "balanced, random or a list; LDM only")
    released_noise: bool = option(False, "the same noise in every batch, as in the released evaluation; Stable "
                                         "Diffusion only")
    batch_size: int | None = option(None, "images at a time", least=1)
    device: str | None = option(None, "cpu, cuda, cuda:1")
    dtype: str | None = option(None, "of the network", choices=tuple(DTYPES))
    threads: int | None = option(None, "CPU threads", least=1)
    compile: bool = option(False, "use torch.compile")
    cuda_graphs: bool = option(False, "record each kind of step once and replay it")


@dataclass(frozen=True)
class Given(PassedOn, Evaluators):
    """A user's options for all arms. Raises UserError for values that no arm could use."""
    title: ClassVar[str] = "the arms"
    images: int | None = option(None, "images per arm, from the first seed on; a later run with more keeps them "
                                      "(default: the paper's or the study's number)", least=1)
    samples: Path = option(Path("samples"), "where the sample folders are (default: %(default)s)")
    results: Path = option(Path("results"), "where the measured numbers are (default: %(default)s)")

    def __post_init__(self) -> None:
        arguments.check(self)
        if self.images is not None and self.images > MOST:
            raise UserError(f"--images must be at most {MOST:,}, got {self.images:,}")
        if self.device is not None:
            try:
                torch.device(self.device)
            except RuntimeError:
                raise UserError(f"--device {self.device} is not a device: use cpu, cuda or cuda:1") from None
        named = (Path(text.rpartition("=")[2]) for text in self.reference)
        for path in (self.inception, self.clip_weights, *named):
            if path is not None and not (path.exists() or _there(path)):
                raise UserError(f"no file {path}")

    @property
    def pixels(self) -> dict[str, Any]:
        """The options of runs that change pixels."""
        names = ("checkpoint", "labels", "dtype", "released_noise")
        return {name: value for name in names if (value := getattr(self, name))}

    @property
    def machine(self) -> dict[str, Any]:
        """Options of run.machine.Machine."""
        return {name: value for name in arguments.names(Machine) if (value := getattr(self, name))}

    def check_one_model(self, models: Collection[str]) -> None:
        """Raises UserError for options that fit only one model if there are several."""
        for name, values in (("checkpoint", self.checkpoint),
                             ("reference", [text for text in self.reference if "=" not in text])):
            if values and len(models) > 1:
                raise UserError(f"--{name} is for one model, and there are {', '.join(sorted(models))}: "
                                + ("put the checkpoint into a config" if name == "checkpoint"
                                   else "use --reference MODEL=PATH"))


@dataclass(frozen=True)
class Arm:
    """One run on some seeds."""
    entry: Entry                        # from the study's file
    run: Run
    seeds: Sequence[int]
    folder: Path                        # of its images
    records: Path                       # the start of its records' paths, before the name of the measure
    evaluator: str = ""                 # the command of eval/ that judges it
    machine: Mapping[str, Any] = field(default_factory=dict)        # options of run.machine.Machine
    inputs: Mapping[str, Path] = field(default_factory=dict)        # of the evaluator, by option
    # For a row of a table:
    section: str = ""                   # the name of its part
    whole: int = 0                      # the number of images that its numbers need
    published: bool = False             # whether they stand beside a paper's

    @property
    def label(self) -> str:
        return self.entry.label or self.run.name

    @cached_property
    def name(self) -> str:
        """The names of its model and its run."""
        return f"{self.run.config.name}/{self.run.name}"

    @property
    def images(self) -> int:
        return len(self.seeds)

    def record(self, measure: str) -> Path:
        """The file of a measure's record."""
        return self.records.with_name(f"{self.records.name}_{measure}.json")

    @property
    def result(self) -> Path:
        """The file of its evaluator's result."""
        return self.record(self.evaluator)

    @property
    def pixels(self) -> int:
        """The bytes of an image's pixels."""
        return 3 * self.run.family.resolution(self.run.config) ** 2

    @property
    def on(self) -> Machine:
        """The machine; the default batch size is the family's."""
        return Machine(**{"batch_size": self.run.family.batch_size, **self.machine})

    def command(self, seeds: str | None = None) -> list[str]:
        """The words of the sample command after "python". seeds: some of its seeds (default: all; "": no --seeds)."""
        chosen = format_seeds(self.seeds) if seeds is None else seeds
        return ["-m", self.run.family.command, *self.run.spec.words(), *(["--seeds", chosen] if chosen else []),
                *arguments.words(self.machine), "--out", str(self.folder)]

    def judge_command(self) -> list[str]:
        read = [word for option, path in self.inputs.items() for word in (option, str(path))]
        expected = [] if self.images >= self.whole else ["--allow-fewer"]
        if self.evaluator != "clip_score":
            expected = [] if self.evaluator == "quality" else ["--count", str(self.images)]
        device = self.machine.get("device")
        return ["-m", f"eval.{self.evaluator}", "--samples", str(self.folder), *read, "--seeds",
                format_seeds(self.seeds), *expected, *(["--device", device] if device else []), "--out",
                str(self.result)]

    @property
    def present(self) -> int:
        """How many of its images are in the folder, by their names only."""
        return len(set(seeds_there(self.folder)).intersection(self.seeds))

    @property
    def bytes_needed(self) -> int:
        """The most bytes that the missing images take on the disk."""
        return self.pixels * (self.images - self.present)

    @property
    def wanted(self) -> Wanted:
        """What a number of its evaluator must belong to."""
        return Wanted(self.run, self.evaluator, self.images, self.inputs, self.folder)

    def wanted_in_table(self, kind: str) -> Wanted:
        """What a number of its table must belong to. kind: of the result."""
        inputs = self.inputs if kind == self.evaluator else {}
        return replace(self.wanted, kind=kind, images=self.whole, inputs=inputs, published=self.published)

    def why_not(self) -> str | None:
        """Why it has no current number of its evaluator, in words; None if it has one."""
        if not self.result.is_file():
            return self.wanted.progress()
        return self.wanted.fault(results.read(self.result))

    def measured(self) -> Result | None:
        """Its evaluator's result, if it exists and is current."""
        return results.read(self.result) if self.why_not() is None else None

    def inputs_of_sampling(self) -> dict[str, Path]:
        """The files that the sample command reads: checkpoint and prompts."""
        prompts = getattr(self.run.spec.condition, "prompts", None)
        return {"checkpoint": self.run.checkpoint, **({"prompts": prompts} if prompts else {})}

    def missing_for_sampling(self) -> list[str]:
        """The files of the sample command that are missing on this machine."""
        return [f"{what} {path} (python -m scripts.doctor says where it comes from)"
                for what, path in self.inputs_of_sampling().items() if not _there(path)]

    def missing_for_judging(self) -> list[str]:
        """The files of the evaluator that are missing on this machine."""
        return [f"{option} {path}" for option, path in self.inputs.items()
                if option != "--prompts" and not _there(path)]


def _there(path: Path) -> bool:
    return str(path).startswith("emoji:") or (ROOT / path).exists()


class Runs(NamedTuple):
    """The rows of a table that can run. pending: the rows that cannot run yet, each with the name of its part."""
    arms: list[Arm]
    pending: list[tuple[str, str]]

    def of(self, part: Part, row: str | None = None) -> list[Arm]:
        """The arms of a part. row: only the arms of this row, and those that stand beside it."""
        return [arm for arm in self.arms if arm.section == part.name and row in (None, arm.entry.row)]


def runs_of(table: Study, given: Given | None = None, configs: Mapping[str, Path] | None = None) -> Runs:
    """The runs of a table; none if it has no settings.

    configs: by family, the config of another model for the rows of that family. Raises UserError.
    """
    given, found = given or Given(), Runs([], [])
    for part in table.parts:
        for entry in entries(part, table.name):
            model = entry.model or part.model
            if not entry.run or (not model and not entry.options):
                continue
            if missing(entry) and table.waiting:
                found.pending.append((part.name, entry.row))
                continue
            try:
                family = family_named_by(config_of(model)).name
                run = with_common(part, entry.options, str((configs or {}).get(family, model))).open()
            except UserError as error:
                raise UserError(f"{table.name}, row {entry.label!r}: {error}") from None
            found.arms.append(_of_row(table, part, entry, run, given))
    return found


def _of_row(table: Study, part: Part, entry: Entry, run: Run, given: Given) -> Arm:
    """The arm of a row. Its records are single results."""
    whole = part.images or run.config.sampler.images
    prompts = getattr(run.spec.condition, "prompts", None)
    images = min(given.images or whole, whole) if prompts else given.images or whole
    arm = of_run(run, entry, range(images), given, kind_of_result(part, run))
    records = given.results / "runs" / run.config.name / f"{run.name}_{images}"
    return replace(arm, records=records, section=part.name, whole=whole, published=bool(table.paper))


def kind_of_result(part: Part, run: Run) -> str:
    """The kind of result with the metrics of a row, by the convention of the paper's column."""
    columns = columns_of(part)
    if any(measure.column in columns for measure in SMALL_MEASURES):
        return "quality"
    return "fid" if run.family.judge == "clip_score" and "clip" not in columns else run.family.judge


def of_run(run: Run, entry: Entry, seeds: Sequence[int], given: Given, evaluator: str = "") -> Arm:
    """The arm of a run. All tables and studies share one folder for its settings; its records lie beside the folder."""
    folder = given.samples / run.config.name / run.name         # the name does not depend on the user's options
    records = folder.with_name(f"{run.name}_{format_seeds(seeds)[:60]}")
    inputs = inputs_of(run, evaluator, given.inception or INCEPTION, given.clip_weights or CLIP,
                       given.reference) if evaluator else dict[str, Path]()
    known = {name for part in run.spec.parts for name in arguments.names(part)}
    chosen = {name: value for name, value in given.pixels.items() if name in known}
    opened = run.spec.having(**chosen).open() if chosen else run
    return Arm(entry, opened, seeds, folder, records, evaluator, given.machine, inputs)
