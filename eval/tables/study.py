"""A study: runs that are sampled, measured, tabulated and drawn together, as a YAML file of configs/studies/ says.

    title: All caching systems at equal cost
    model: ldm_emoji
    seeds: 0-127                of every run
    common: {timesteps: trailing}       options of all runs; for text also prompts, images_per_prompt
    against: {sampler: unipc, steps: 100}       of the run without caching that all others are compared with
    measure: [near, quality, fidelity, time]    see lab/study/measures.py
    made:                       files to fit first, and how; {common} is the config and the common options
      FILE: lab.fit adaptor {common} --sampler unipc --steps 48 --clock 4 --seeds 1000-1063 ...
    arms:                       each is all combinations of its options, those of the sample command
    - {kind: Clockwork, budget: 18, sampler: unipc, steps: 48, clock: 4}
    - {kind: plan, budget: [8, 12], plan: "checkpoints/plans/ldm_emoji_{budget}.json"}
    show: budgets               see lab/study/show.py

Beside options an arm may say what it is called, its kind (arms of one kind are a line in a chart) and its budget in
full network calls. The fields of `Part` are what else there is. A file may have several parts, each of one model: under
`parts` stands what each says otherwise than the file does.

A table of a paper is a study whose arms also carry what is `printed` for them (eval/tables/paper.py).
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
MOST_ARMS, MOST_CALLS = 2000, 500_000       # of a part: arms, and network calls of an image of each


@dataclass
class Part:
    """The arms of one model, and what is done with them."""
    arms: list[dict[str, Any]]
    model: str = ""                     # the name of a config, or its path
    seeds: str = ""
    title: str = ""
    common: dict[str, Any] = field(default_factory=dict)
    against: dict[str, Any] = field(default_factory=dict)
    measure: list[str] = field(default_factory=list)
    chosen_on: Annotated[int, AtLeast(0)] = 0       # so many seeds choose settings, the others report; 0: all do both
    twice: Annotated[int, AtLeast(0)] = 0   # seeds on which twice the steps show how far `against` is converged
    real: str | None = None             # images that `quality` compares with (default: what the model learnt from)
    extractors: list[str] = field(default_factory=list)     # of `quality`, beside EffLite0
    converged: dict[str, Any] = field(default_factory=dict)     # of the run that `converged` compares with
    time: dict[str, int] = field(default_factory=dict)      # options of eval.throughput
    made: dict[str, str] = field(default_factory=dict)
    also: list[str] = field(default_factory=list)           # studies of the same model whose arms are shown, too
    show: str | dict[str, Any] = "arms"
    # Of a paper's table: what --only and notes call the part, images of each arm, decimals of columns, and columns that
    # are shown though nothing is printed.
    name: str = ""
    images: Annotated[int, AtLeast(1)] | None = None
    decimals: dict[str, int] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)


@dataclass
class Note:
    """A footnote of a paper's table: of some cells or rows, or of the whole table where it names none."""
    text: str
    section: str | None = None
    rows: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)

    def marks(self, section: str, row: str, column: str | None = None) -> bool:
        """Whether it is of a cell; without a column, of a whole row."""
        of_column = not self.columns if column is None else column in self.columns
        return row in self.rows and self.section in (None, section) and of_column


@dataclass
class Study:
    """What a file says of all of its parts."""
    title: str = ""
    about: str = ""
    script: str | None = None           # of a paper's table: of scripts/, which has its commands; None: none can be run
    macs_steps: Annotated[int, AtLeast(1)] | None = None    # what its MACs are divided by, if not the row's own steps
    schedules: bool = False             # whether it lists settings, not measurements
    waiting: str | None = None          # why rows whose block schedules are not made yet cannot be run
    notes: list[Note] = field(default_factory=list)
    # Not said in the file.
    name: str = ""                      # of its folder in results/
    path: Path = Path()
    paper: str = ""                     # whose table it is
    parts: list[Part] = field(default_factory=list)

    @property
    def heading(self) -> str:
        return f"{self.paper}, Table {self.name.rsplit('table', 1)[1]}: {self.title}" if self.paper else self.title


_OF_STUDY = ("about", "script", "macs_steps", "schedules", "waiting", "notes")


@dataclass(frozen=True)
class Entry:
    """An arm as the file has it."""
    options: dict[str, Any]
    called: str = ""
    kind: str = ""
    budget: Annotated[int, AtLeast(1)] | None = None
    # Of a paper's table: the row's model, if not the part's; what it prints, as numbers or as they are printed; the row
    # that one of ours stands beside; and whether it can be run here.
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
        """The row of the paper that it is, or stands beside."""
        return self.beside or self.called


_OF_ENTRY = [one.name for one in dataclasses.fields(Entry) if one.name != "options"]


def read_study(name: str | Path) -> Study:
    """A study by its name or the path of its file. Raises UserError that names the file, the arm and the option."""
    path = Path(name) if str(name).endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not (ROOT / path).is_file():
        known = ", ".join(sorted(path.stem for path in (ROOT / FOLDER).glob("*.yaml")))
        raise UserError(f"no study {str(name)!r}: there are {known}, or give the path of a file")
    study = study_of(load_yaml(ROOT / path), path.stem, path)
    for part in study.parts:
        _check(part, path)
    return study


def study_of(content: dict[str, Any], name: str, path: Path, paper: str = "") -> Study:
    """What a file says, checked as far as that goes without models. Raises UserError."""
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
    """Raises UserError for what could not be carried out, and says the seeds the same way everywhere from then on."""
    seeds = sorted(parse_seeds(part.seeds))
    part.seeds = format_seeds(seeds)
    if not part.arms:
        raise UserError(f"{path}: arms is empty: a study needs at least one, like {{interval: 5}}")
    if of_papers := {key for arm in part.arms for key in arm} & {"model", "printed", "beside", "run"}:
        raise UserError(f"{path}: no option {min(of_papers)!r}: only rows of the papers' tables have it")
    if part.chosen_on > max(0, len(seeds) - 2) or part.chosen_on == 1:
        raise UserError(f"{path}: chosen_on must leave 2 of the {len(seeds)} seeds or more on either side")
    if part.twice > len(seeds):
        raise UserError(f"{path}: twice must be from 0 to the {len(seeds)} seeds, got {part.twice}")
    if unknown := part.converged.keys() - set(arguments.names(SamplerOptions)):
        raise UserError(f"{path}: converged has no option {min(unknown)!r}: there are "
                        f"{', '.join(arguments.names(SamplerOptions))}")
    if part.converged and "steps" not in part.converged:
        raise UserError(f"{path}: converged says no steps, like 100")
    if lacking := [name for name in part.extractors if name not in EXTRACTORS]:
        raise UserError(f"{path}: extractors has no {lacking[0]!r}: there are {', '.join(EXTRACTORS)}")
    _check_made(part.made, path)


def _check_made(made: Mapping[str, str], path: Path) -> None:
    for file, line in made.items():
        try:
            shlex.split(line)
        except ValueError as error:
            raise UserError(f"{path}, {file}: its command has a {error}") from None
    try:
        TopologicalSorter({file: set(shlex.split(line)) - {file} for file, line in made.items()}).prepare()
    except CycleError as error:
        raise UserError(f"{path}: each of {', '.join(error.args[1][1:])} is made of the others") from None


def config_of(model: str) -> Path:
    """Where the config of a model is. Raises UserError."""
    path = Path(model) if model.endswith(".yaml") else Path("configs") / f"{model}.yaml"
    if not (ROOT / path).is_file():
        known = ", ".join(sorted(path.stem for path in (ROOT / "configs").glob("*.yaml")))
        raise UserError(f"no model {model!r}: there are {known}, or give the path of a config")
    return path


def check_options(spec: RunSpec, options: Mapping[str, Any]) -> None:
    """Raises UserError for an option that a model does not have, or a value that it does not take."""
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
            raise UserError(f"{name} has no {value!r}: choose from {', '.join(choices)}")


def entries(part: Part, path: Path | str) -> Iterator[Entry]:
    """The arms of a part: all combinations of the values of each, that of the last option changing first; `branch: all`
    spelt out, {budget} filled in. Raises UserError."""
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
    """A run with the options of all runs and its own: but for what a plan brings itself. Raises UserError."""
    brought = SAMPLING if options.get("plan") else ()
    spec = RunSpec.of(config_of(model or part.model))
    chosen = {key: value for key, value in part.common.items() if key not in brought} | dict(options)
    check_options(spec, chosen)
    return spec.having(**chosen)


@cache
def _files() -> list[str]:
    return [name for method in METHODS for name in arguments.names(method) if arguments.kind(method, name) is Path]


def files_of(entry: Entry) -> dict[str, Path]:
    """What was fitted for an arm, by option."""
    return {name: Path(entry.options[name]) for name in _files() if entry.options.get(name)}


def missing(entry: Entry) -> list[Path]:
    """Those of its files that are not here."""
    return [file for file in files_of(entry).values() if not (ROOT / file).is_file()]


def opened(part: Part, path: Path) -> tuple[list[tuple[Entry, Run]], list[Entry]]:
    """The arms whose files are there, none twice, and the others.

    Raises UserError for arms that cannot be, and where two different ones would share a folder.
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
            raise UserError(f"{path}: two different runs would both be called {name}")
        found.setdefault((name, entry.called, entry.kind, entry.budget), (entry, known[name]))
    return list(found.values()), left_out


def check_run(run: Run, images: int) -> None:
    """Raises UserError for a sampler, or something fitted, that does not go with the model, and for too few prompts."""
    run.refuse_foreign(run.settings)
    prompts = getattr(run.spec.condition, "prompts", None)
    if prompts and prompts.is_file():
        count = len(read_prompts(prompts))
        if images > count * getattr(run.spec.condition, "images_per_prompt", 1):
            raise UserError(f"{images} images from {count} prompts need an images_per_prompt of "
                            f"{-(-images // count)} or more")


def against(part: Part, path: Path) -> Run:
    """The run without caching that all others are compared with. Raises UserError."""
    try:
        return with_common(part, part.against).open()
    except UserError as error:
        raise UserError(f"{path}, {part.model}, common and against: {error}") from None


def needed(file: str, made: Mapping[str, str]) -> list[str]:
    """The files that one is made of, in the order in which they must be made, itself the last."""
    inside = [other for word in shlex.split(made[file]) if word in made and word != file
              for other in needed(word, made)]
    return [*dict.fromkeys(inside), file]
