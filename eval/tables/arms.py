"""An arm: one run on this machine, where its images and records are, what of it is there and what is missing."""

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
    title: ClassVar[str] = "the evaluators (python -m scripts.doctor says where their files are looked for)"
    inception: Path | None = option(None, "weights of Inception, for FID and its kin")
    reference: tuple[str, ...] = option((), "statistics of the real images; one for each model of the table",
                                        metavar="[MODEL=]PATH", action="append")
    clip_weights: Path | None = option(None, "open_clip's ViT-g-14, laion2b_s34b_b88k")


@dataclass(frozen=True)
class PassedOn:
    title: ClassVar[str] = "passed on to the sampler, which has their defaults"
    checkpoint: Path | None = option(None, "weights, instead of the config's")
    labels: str | None = option(None, "balanced, random or a list; LDM only")
    released_noise: bool = option(False, "the same noise in every batch, as the released evaluation; Stable Diffusion "
                                         "only")
    batch_size: int | None = option(None, "images at a time", least=1)
    device: str | None = option(None, "cpu, cuda, cuda:1")
    dtype: str | None = option(None, "of the network", choices=tuple(DTYPES))
    threads: int | None = option(None, "CPU threads", least=1)
    compile: bool = option(False, "go through torch.compile")
    cuda_graphs: bool = option(False, "record each kind of step once and replay it")


@dataclass(frozen=True)
class Given(PassedOn, Evaluators):
    """What a user says of all arms. Raises UserError for values that no arm could use."""
    title: ClassVar[str] = "the arms"
    images: int | None = option(None, "per arm, from the first seed on; a later run with more keeps them (default: as "
                                      "many as the paper, or the study)", least=1)
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
                raise UserError(f"--device {self.device} is no device: cpu, cuda, cuda:1") from None
        named = (Path(text.rpartition("=")[2]) for text in self.reference)
        for path in (self.inception, self.clip_weights, *named):
            if path is not None and not path.exists():
                raise UserError(f"no file {path}")

    @property
    def pixels(self) -> dict[str, Any]:
        """Options of the runs."""
        names = ("checkpoint", "labels", "dtype", "released_noise")
        return {name: value for name in names if (value := getattr(self, name))}

    @property
    def machine(self) -> dict[str, Any]:
        """Options of run.machine.Machine."""
        return {name: value for name in arguments.names(Machine) if (value := getattr(self, name))}

    def check_one_model(self, models: Collection[str]) -> None:
        """Raises UserError for options that fit one model where there are several."""
        for name, values in (("checkpoint", self.checkpoint),
                             ("reference", [text for text in self.reference if "=" not in text])):
            if values and len(models) > 1:
                raise UserError(f"--{name} is for one model; here are {', '.join(sorted(models))}: "
                                + ("name it in a config of its own" if name == "checkpoint"
                                   else "say --reference MODEL=PATH"))


@dataclass(frozen=True)
class Arm:
    """One run on some seeds."""
    entry: Entry                        # as its file has it
    run: Run
    seeds: Sequence[int]
    folder: Path                        # of its images
    records: Path                       # of its records: the name of each goes on with that of the measure
    evaluator: str = ""                 # the command of eval/ that judges it
    machine: Mapping[str, Any] = field(default_factory=dict)        # options of run.machine.Machine
    inputs: Mapping[str, Path] = field(default_factory=dict)        # of the evaluator, by option
    # Of a row of a table:
    section: str = ""                   # the name of its part
    whole: int = 0                      # of how many images its numbers are to be
    published: bool = False             # whether they stand beside a paper's

    @property
    def label(self) -> str:
        return self.entry.label or self.run.name

    @cached_property
    def name(self) -> str:
        """That of its run, of its model."""
        return f"{self.run.config.name}/{self.run.name}"

    @property
    def images(self) -> int:
        return len(self.seeds)

    def record(self, measure: str) -> Path:
        """Where what a measure found is kept."""
        return self.records.with_name(f"{self.records.name}_{measure}.json")

    @property
    def result(self) -> Path:
        """Where its evaluator's result is kept."""
        return self.record(self.evaluator)

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
        """How many of the images are in the folder, by their number alone."""
        return len(set(seeds_there(self.folder)).intersection(self.seeds))

    @property
    def bytes_needed(self) -> int:
        """On the disk for what is not there yet, at most."""
        return self.pixels * (self.images - self.present)

    @property
    def wanted(self) -> Wanted:
        """What its evaluator's number is to be of."""
        return Wanted(self.run, self.evaluator, self.images, self.inputs, self.folder)

    def wanted_in_table(self, kind: str) -> Wanted:
        """What a number of its table is to be of. kind: of the result that has it."""
        inputs = self.inputs if kind == self.evaluator else {}
        return replace(self.wanted, kind=kind, images=self.whole, inputs=inputs, published=self.published)

    def why_not(self) -> str | None:
        """Why its evaluator has no number of it that is current, in words; None where it has."""
        if not self.result.is_file():
            return self.wanted.progress()
        return self.wanted.fault(results.read(self.result))

    def measured(self) -> Result | None:
        """Its evaluator's result, where it is there and current."""
        return results.read(self.result) if self.why_not() is None else None

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


class Runs(NamedTuple):
    """What of a table can be run. pending: the rows that cannot be yet, each with the name of its part."""
    arms: list[Arm]
    pending: list[tuple[str, str]]

    def of(self, part: Part, row: str | None = None) -> list[Arm]:
        """Those of a part; of one row of it, and those that stand beside that, where it is named."""
        return [arm for arm in self.arms if arm.section == part.name and row in (None, arm.entry.row)]


def runs_of(table: Study, given: Given | None = None, configs: Mapping[str, Path] | None = None) -> Runs:
    """The runs of a table; none where it gives no settings.

    configs: by family, another model's for the rows of that family. Raises UserError.
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
    """A row: its records are results of their own."""
    whole = part.images or run.config.sampler.images
    prompts = getattr(run.spec.condition, "prompts", None)
    images = min(given.images or whole, whole) if prompts else given.images or whole
    arm = of_run(run, entry, range(images), given, kind_of_result(part, run))
    records = given.results / "runs" / run.config.name / f"{run.name}_{images}"
    return replace(arm, records=records, section=part.name, whole=whole, published=bool(table.paper))


def kind_of_result(part: Part, run: Run) -> str:
    """The kind of result that has the metrics of a row: whose convention the paper's column follows."""
    columns = columns_of(part)
    if any(measure.column in columns for measure in SMALL_MEASURES):
        return "quality"
    return "fid" if run.family.judge == "clip_score" and "clip" not in columns else run.family.judge


def of_run(run: Run, entry: Entry, seeds: Sequence[int], given: Given, evaluator: str = "") -> Arm:
    """A run in the folder that all tables and studies have for its settings; its records lie beside that."""
    folder = given.samples / run.config.name / run.name         # the user's options are in no name
    records = folder.with_name(f"{run.name}_{format_seeds(seeds)[:60]}")
    inputs = inputs_of(run, evaluator, given.inception or INCEPTION, given.clip_weights or CLIP,
                       given.reference) if evaluator else dict[str, Path]()
    known = {name for part in run.spec.parts for name in arguments.names(part)}
    chosen = {name: value for name, value in given.pixels.items() if name in known}
    opened = run.spec.having(**chosen).open() if chosen else run
    return Arm(entry, opened, seeds, folder, records, evaluator, given.machine, inputs)
