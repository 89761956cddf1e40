"""A study: runs that are sampled, measured, tabulated and drawn together. A YAML file of configs/studies/ defines it.

    title: All caching systems at equal cost
    model: ldm_emoji
    seeds: 0-127                of every run
    common: {timesteps: trailing}       options of all runs; for text also prompts, images_per_prompt
    against: {sampler: unipc, steps: 100}       the run without caching that all others are compared with
    measure: [near, quality, fidelity, time]    see lab/study/measures.py
    made:                       files to fit first, with their commands; {common}: the config and the common options
      FILE: lab.fit adaptor {common} --sampler unipc --steps 48 --clock 4 --seeds 1000-1063 ...
    arms:                       each is all combinations of its options, those of the sample command
    - {kind: Clockwork, budget: 18, sampler: unipc, steps: 48, clock: 4}
    - {kind: plan, budget: [8, 12], plan: "checkpoints/plans/ldm_emoji_{budget}.json"}
    show: budgets               see lab/study/show.py

Besides options, an arm may have a name (called), a kind (arms of one kind are a line in a chart) and a budget in full
network calls. The fields of `Part` are the other keys. A file may have several `parts`, each of one model; a part lists
only the keys in which it differs from the file.

A table of a paper is a study whose arms also have the paper's numbers, `printed` (eval/tables/paper.py).
"""

import dataclasses
import difflib
import itertools
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from eval.metrics.registry import EXTRACTORS
from run import arguments
from run.files import ROOT
from run.prompts import read_prompts
from run.seeds import format_seeds, parse_seeds
from run.settings import load_yaml
from run.spec import Run, RunSpec, SamplerOptions
from unet_caching.errors import UserError
from unet_caching.files.schema import AtLeast, build, fault
from unet_caching.methods.plan import SAMPLING
from unet_caching.registry import METHODS

FOLDER = Path("configs/studies")
MOST_ARMS, MOST_CALLS = 2000, 500_000       # of a part: arms, and their network calls for one image each


@dataclass
class Part:
    """The arms of one model, and how they are measured and shown."""
    arms: list[dict[str, Any]]
    model: str = ""                     # the name of a config, or its path
    seeds: str = ""
    title: str = ""
    common: dict[str, Any] = field(default_factory=dict)
    against: dict[str, Any] = field(default_factory=dict)
    measure: list[str] = field(default_factory=list)
    chosen_on: Annotated[int, AtLeast(0)] = 0       # so many seeds choose settings, the others report; 0: all do both
    twice: Annotated[int, AtLeast(0)] = 0   # so many seeds show, with twice the steps, how far `against` is converged
    real: str | None = None             # images that `quality` compares with (default: the training images)
    extractors: list[str] = field(default_factory=list)     # of `quality`, besides EffLite0
    converged: dict[str, Any] = field(default_factory=dict)     # options of the run that `converged` compares with
    time: dict[str, int] = field(default_factory=dict)      # options of eval.throughput
    made: dict[str, str] = field(default_factory=dict)
    also: list[str] = field(default_factory=list)           # studies of the same model whose arms are shown, too
    show: str | dict[str, Any] = "arms"
    # For a paper's table: the part's name for --only and notes, images of each arm, decimals of columns, and columns
    # that are shown although the paper prints nothing there.
    name: str = ""
    images: Annotated[int, AtLeast(1)] | None = None
    decimals: dict[str, int] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)


@dataclass
class Note:
    """A footnote of a paper's table: on some cells or rows, or on the whole table if it names none."""
    text: str
    section: str | None = None
    rows: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)

    def marks(self, section: str, row: str, column: str | None = None) -> bool:
        """Whether the note is on a cell; without a column, on a whole row."""
        of_column = not self.columns if column is None else column in self.columns
        return row in self.rows and self.section in (None, section) and of_column


@dataclass
class Study:
    """A file: the keys that all of its parts share, and the parts."""
    title: str = ""
    about: str = ""
    script: str | None = None           # of a paper's table: the file in scripts/ that runs it, if one can
    macs_steps: Annotated[int, AtLeast(1)] | None = None    # MACs are divided by it (default: the row's steps)
    schedules: bool = False             # whether it lists settings, not measurements
    waiting: str | None = None          # why rows without their block schedules cannot run yet
    notes: list[Note] = field(default_factory=list)
    # Not from the file:
    name: str = ""                      # of its folder in results/
    path: Path = Path()
    paper: str = ""                     # the paper of the table
    parts: list[Part] = field(default_factory=list)

    @property
    def heading(self) -> str:
        return f"{self.paper}, Table {self.name.rsplit('table', 1)[1]}: {self.title}" if self.paper else self.title


_OF_STUDY = ("about", "script", "macs_steps", "schedules", "waiting", "notes")


@dataclass(frozen=True)
class Entry:
    """An arm in the file."""
    options: dict[str, Any]
    called: str = ""
    kind: str = ""
    budget: Annotated[int, AtLeast(1)] | None = None
    # For a paper's table: the row's model, if not the part's; its printed values (a string keeps its digits); the row
    # that a run of ours stands beside; and whether it can run here.
    model: str = ""
    printed: dict[str, float | str | None] = field(default_factory=dict)
    beside: str = ""
    run: bool = True

    def __str__(self) -> str:
        return f"{self.called or self.kind or 'an arm'}{f' at {self.budget} calls' if self.budget else ''}"

    @property
    def label(self) -> str:
        return f"{self.beside} / {self.called}" if self.beside else self.called

    @property
    def row(self) -> str:
        """The paper's row that it is, or stands beside."""
        return self.beside or self.called


_OF_ENTRY = [one.name for one in dataclasses.fields(Entry) if one.name != "options"]


def read_study(name: str | Path) -> Study:
    """A study by its name or the path of its file. Raises UserError that names the file, the arm and the option."""
    path = Path(name) if str(name).endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not (ROOT / path).is_file():
        known = ", ".join(sorted(path.stem for path in (ROOT / FOLDER).glob("*.yaml")))
        raise UserError(f"no study {str(name)!r}: choose from {known}, or give the path of a file")
    study = study_of(load_yaml(ROOT / path), path.stem, path)
    for part in study.parts:
        _check(part, path)
    return study


def study_of(content: dict[str, Any], name: str, path: Path, paper: str = "") -> Study:
    """The study in a file, with all checks that need no model. Raises UserError."""
    parts = content.pop("parts", [{}])
    own = {key: content.pop(key) for key in _OF_STUDY if key in content}
    wrong = fault(own, Study) or fault(parts, list[dict], "parts")
    for one in () if wrong else parts:
        wrong = wrong or fault({**content, **one}, Part)
    if wrong:
        raise UserError(f"{path}: {f'{name}: ' if paper else ''}{wrong}")
    return dataclasses.replace(build(own, Study), title=content.get("title") or name, name=name, path=path, paper=paper,
                               about=own.get("about", "").strip(),
                               parts=[Part(**{**content, **one}) for one in parts])


def _check(part: Part, path: Path) -> None:
    """Raises UserError for a part that cannot run, and brings its seeds into their usual form."""
    seeds = sorted(parse_seeds(part.seeds))
    part.seeds = format_seeds(seeds)
    if not part.arms:
        raise UserError(f"{path}: arms is empty: a study needs at least one, like {{interval: 5}}")
    if of_papers := {key for arm in part.arms for key in arm} & {"model", "printed", "beside", "run"}:
        raise UserError(f"{path}: no option {min(of_papers)!r}: only rows of the papers' tables have it")
    if part.chosen_on > max(0, len(seeds) - 2) or part.chosen_on == 1:
        raise UserError(f"{path}: chosen_on must split the {len(seeds)} seeds into two parts of at least 2, or be 0")
    if part.twice > len(seeds):
        raise UserError(f"{path}: twice must be from 0 to the {len(seeds)} seeds, got {part.twice}")
    if unknown := part.converged.keys() - set(arguments.names(SamplerOptions)):
        raise UserError(f"{path}: converged has no option {min(unknown)!r}: there are "
                        f"{', '.join(arguments.names(SamplerOptions))}")
    if part.converged and "steps" not in part.converged:
        raise UserError(f"{path}: converged has no steps: add them, like steps: 100")
    if lacking := [name for name in part.extractors if name not in EXTRACTORS]:
        raise UserError(f"{path}: no extractor {lacking[0]!r}: choose from {', '.join(EXTRACTORS)}")
    _check_made(part.made, path)


def _check_made(made: Mapping[str, str], path: Path) -> None:
    for file, line in made.items():
        try:
            shlex.split(line)
        except ValueError as error:
            raise UserError(f"{path}, {file}: its command is wrong: {error}") from None
    try:
        TopologicalSorter({file: set(shlex.split(line)) - {file} for file, line in made.items()}).prepare()
    except CycleError as error:
        raise UserError(f"{path}: {', '.join(error.args[1][1:])} need each other: one of them must be made first"
                        ) from None


def config_of(model: str) -> Path:
    """The config file of a model. Raises UserError."""
    path = Path(model) if model.endswith(".yaml") else Path("configs") / f"{model}.yaml"
    if not (ROOT / path).is_file():
        known = ", ".join(sorted(path.stem for path in (ROOT / "configs").glob("*.yaml")))
        raise UserError(f"no model {model!r}: choose from {known}, or give the path of a config")
    return path


def check_options(spec: RunSpec, options: Mapping[str, Any]) -> None:
    """Raises UserError for an option that a model does not have, or a value that does not fit."""
    known = {one.name: (get_type_hints(type(part))[one.name], one.metadata["choices"])
             for part in spec.parts for one in dataclasses.fields(part)}
    for name, value in options.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise UserError(f"no option {name!r}: {f'is it {near[0]}? ' if near else ''}there are {', '.join(known)}")
        kind, choices = known[name]
        if wrong := fault(value, kind, name):
            raise UserError(wrong)
        if choices and value not in choices:
            raise UserError(f"{name} cannot be {value!r}: choose from {', '.join(choices)}")


def entries(part: Part, path: Path | str) -> Iterator[Entry]:
    """The arms of a part: for each entry, all combinations of its values; the last option changes first.

    `branch: all` becomes all branches, and {budget} is filled in. Raises UserError.
    """
    for number, arm in enumerate(part.arms, 1):
        lists = {name: values if isinstance(values, list) else [values] for name, values in arm.items()}
        if empty := [name for name, values in lists.items() if not values]:
            raise UserError(f"{path}, arm {number}: {empty[0]} has no values")
        if "all" in lists.get("branch", []):
            lists["branch"] = list(range(RunSpec.of(config_of(part.model)).open().unet.num_branches))
        for values in itertools.product(*lists.values()):
            options = dict(zip(lists, values, strict=True))
            about = {name: options.pop(name) for name in _OF_ENTRY if name in options}
            if wrong := fault({"options": {}, **about}, Entry):
                raise UserError(f"{path}, arm {number}: {wrong}")
            budget = str(about.get("budget", ""))
            yield Entry({name: value.replace("{budget}", budget) if isinstance(value, str) else value
                         for name, value in options.items()}, **about)


def with_common(part: Part, options: Mapping[str, Any], model: str = "") -> RunSpec:
    """A run with the common options and its own; a plan's options replace common ones. Raises UserError."""
    brought = SAMPLING if options.get("plan") else ()
    spec = RunSpec.of(config_of(model or part.model))
    chosen = {key: value for key, value in part.common.items() if key not in brought} | dict(options)
    check_options(spec, chosen)
    return spec.having(**chosen)


@cache
def _files() -> list[str]:
    return [name for method in METHODS for name in arguments.names(method) if arguments.kind(method, name) is Path]


def files_of(entry: Entry) -> dict[str, Path]:
    """The fitted files of an arm, by option."""
    return {name: Path(entry.options[name]) for name in _files() if entry.options.get(name)}


def missing(entry: Entry) -> list[Path]:
    """The fitted files of an arm that do not exist."""
    return [file for file in files_of(entry).values() if not (ROOT / file).is_file()]


def opened(part: Part, path: Path) -> tuple[list[tuple[Entry, Run]], list[Entry]]:
    """The arms whose fitted files exist, without duplicates, and the other arms.

    Raises UserError for arms that cannot run, and if two different ones would share a folder.
    """
    found: dict[tuple, tuple[Entry, Run]] = {}
    known: dict[str, Run] = {}
    left_out: list[Entry] = []
    calls = 0
    for number, entry in enumerate(entries(part, path), 1):
        if number > MOST_ARMS or calls > MOST_CALLS:
            raise UserError(f"{path}: more than {MOST_ARMS:,} arms, or {MOST_CALLS:,} network calls of an image of "
                            "each together, are too many to plan")
        if missing(entry):
            left_out.append(entry)
            continue
        label = ", ".join(f"{name} {value}" for name, value in entry.options.items()) or "uncached"
        try:
            run = with_common(part, entry.options).open()
            check_run(run, len(parse_seeds(part.seeds)))
        except UserError as error:
            raise UserError(f"{path}, {part.model}, {label}: {error}") from None
        calls += run.calls
        name = run.name
        if known.setdefault(name, run).brief != run.brief:
            raise UserError(f"{path}: two different runs would have the same folder {name}")
        found.setdefault((name, entry.called, entry.kind, entry.budget), (entry, known[name]))
    return list(found.values()), left_out


def check_run(run: Run, images: int) -> None:
    """Raises UserError for a sampler or a fitted file that does not fit the model, and for too few prompts."""
    run.refuse_foreign(run.settings)
    prompts = getattr(run.spec.condition, "prompts", None)
    if prompts and prompts.is_file():
        count = len(read_prompts(prompts))
        if images > count * getattr(run.spec.condition, "images_per_prompt", 1):
            raise UserError(f"{images} images from {count} prompts need images_per_prompt to be at least "
                            f"{-(-images // count)}")


def against(part: Part, path: Path) -> Run:
    """The run without caching that all others are compared with. Raises UserError."""
    try:
        return with_common(part, part.against).open()
    except UserError as error:
        raise UserError(f"{path}, {part.model}, common and against: {error}") from None


def needed(file: str, made: Mapping[str, str]) -> list[str]:
    """The files that a file is made from, in the order to make them, and the file itself last."""
    inside = [other for word in shlex.split(made[file]) if word in made and word != file
              for other in needed(word, made)]
    return [*dict.fromkeys(inside), file]
