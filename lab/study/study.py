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
from typing import Annotated, Any, NamedTuple

from eval.metrics.registry import EXTRACTORS
from lab.study.show import SHOWS, Show
from run import arguments
from run.files import ROOT
from run.prompts import read_prompts
from run.seeds import format_seeds, parse_seeds
from run.settings import load_yaml
from run.spec import Run, RunSpec, SamplerOptions
from unet_caching.errors import UserError
from unet_caching.files.schema import AtLeast, fault
from unet_caching.methods.plan import SAMPLING
from unet_caching.registry import METHODS

FOLDER = Path("configs/studies")
MOST_ARMS, MOST_CALLS = 2000, 500_000       # of a part: arms, and network calls of an image of each
_ABOUT = ("called", "kind", "budget")       # what an arm says beside its options
_WORDS = {int: "whole numbers", float: "numbers", str: "names", Path: "files", bool: "true or false"}


@dataclass
class Part:
    """The arms of one model, and what is done with them."""
    model: str                          # the name of a config, or its path
    seeds: str
    arms: list[dict[str, Any]]
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


class Study(NamedTuple):
    name: str                           # of its folder in results/
    path: Path
    title: str
    about: str
    parts: list[Part]


class Entry(NamedTuple):
    """An arm as the file has it."""
    options: dict[str, Any]
    called: str = ""
    kind: str = ""
    budget: int | None = None

    def __str__(self) -> str:
        return f"{self.called or self.kind or 'an arm'}{f' at {self.budget} calls' if self.budget else ''}"


class Axis(NamedTuple):
    """What an option holds: its type, and its choices where there are few."""
    kind: type
    choices: tuple[str, ...] = ()

    def takes(self, value: Any) -> bool:
        """Whether a study may say this."""
        if self.kind is bool or isinstance(value, bool):
            return self.kind is bool and isinstance(value, bool)
        return isinstance(value, {float: (int, float), Path: (str,)}.get(self.kind, (self.kind,)))


def read_study(name: str | Path) -> Study:
    """A study by its name or the path of its file. Raises UserError that names the file, the arm and the option."""
    path = Path(name) if str(name).endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not (ROOT / path).is_file():
        known = ", ".join(sorted(path.stem for path in (ROOT / FOLDER).glob("*.yaml")))
        raise UserError(f"no study {name}: there are {known}, or give the path of a file")
    content: Any = load_yaml(ROOT / path)
    about, parts = content.pop("about", ""), content.pop("parts", [{}])
    wrong = fault(about, str, "about") or fault(parts, list[dict], "parts")
    for one in () if wrong else parts:
        wrong = wrong or fault({**content, **one}, Part)
    if wrong:
        raise UserError(f"{path}: {wrong}")
    found = [Part(**{**content, **one}) for one in parts]
    for part in found:
        _check(part, path)
    return Study(path.stem, path, content.get("title") or path.stem, about.strip(), found)


def _check(part: Part, path: Path) -> None:
    """Raises UserError for what could not be carried out, and says it the same way everywhere from then on."""
    seeds = sorted(parse_seeds(part.seeds))
    part.seeds = format_seeds(seeds)
    if not part.arms:
        raise UserError(f"{path}: arms is empty: a study needs at least one, like {{interval: 5}}")
    if part.chosen_on > max(0, len(seeds) - 2) or part.chosen_on == 1:
        raise UserError(f"{path}: chosen_on must leave 2 of the {len(seeds)} seeds or more on either side")
    if part.twice > len(seeds):
        raise UserError(f"{path}: twice must be from 0 to the {len(seeds)} seeds, got {part.twice}")
    known = options_of(*map(type, RunSpec.of(config_of(part.model)).parts))
    for number, entry in enumerate(part.arms, 1):
        for axis, values in lists_of(entry).items():
            if str(axis) not in _ABOUT:
                check_option(f"{path}, arm {number}", str(axis), values, known)
        if not all(isinstance(budget, int) and budget > 0 for budget in lists_of(entry).get("budget", [])):
            raise UserError(f"{path}, arm {number}: budget takes whole numbers from 1, of full network calls")
    for where, options, among in (("common", part.common, known), ("against", part.against, known),
                                  ("converged", part.converged, options_of(SamplerOptions))):
        for name, value in options.items():
            check_option(f"{path}, {where}", str(name), [value], among)
    if part.converged and "steps" not in part.converged:
        raise UserError(f"{path}: converged says no steps, like 100")
    if unknown := [name for name in part.extractors if name not in EXTRACTORS]:
        raise UserError(f"{path}: extractors has no {unknown[0]!r}: there are {', '.join(EXTRACTORS)}")
    _check_made(part.made, path)
    show_of(part, path)


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


def show_of(part: Part, path: Path | str = "") -> Show:
    """How a part is shown: one of SHOWS, or that with some of its fields said otherwise. Raises UserError."""
    said = {"like": part.show} if isinstance(part.show, str) else dict(part.show)
    name = said.pop("like", "arms")
    if name not in SHOWS:
        raise UserError(f"{path}: show has no {name!r}: choose from {', '.join(SHOWS)}")
    if wrong := fault(dataclasses.asdict(SHOWS[name]) | said, Show, "show"):
        raise UserError(f"{path}: {wrong}")
    return dataclasses.replace(SHOWS[name], **said)


def config_of(model: str) -> Path:
    """Where the config of a model is. Raises UserError."""
    path = Path(model) if model.endswith(".yaml") else Path("configs") / f"{model}.yaml"
    if not (ROOT / path).is_file():
        known = ", ".join(sorted(path.stem for path in (ROOT / "configs").glob("*.yaml")))
        raise UserError(f"no model {model!r}: there are {known}, or give the path of a config")
    return path


def options_of(*parts: Any) -> dict[str, Axis]:
    """All options of some dataclasses of them (unet_caching/options.py), by name."""
    return {one.name: Axis(arguments.kind(part, one.name), tuple(one.metadata["choices"]))
            for part in parts for one in dataclasses.fields(part)}


def check_option(where: str, name: str, values: list, known: Mapping[str, Axis]) -> None:
    """Raises UserError for an option or a value that there is not."""
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        raise UserError(f"{where} has no option {name!r}: " + (f"is it {near[0]}? " if near else "")
                        + f"There are {', '.join(known)}")
    if not values:
        raise UserError(f"{where}: {name} has no values")
    axis = known[name]
    for value in values:
        if name == "branch" and value == "all":
            continue
        if not axis.takes(value):
            raise UserError(f"{where}: {name} takes {_WORDS[axis.kind]}, got {value!r}")
        if axis.choices and value not in axis.choices:
            raise UserError(f"{where}: {name} has no {value!r}: choose from {', '.join(axis.choices)}")


def lists_of(entry: Mapping[str, Any]) -> dict[str, list]:
    """The values of each option; one that stands alone is a list of one."""
    return {name: values if isinstance(values, list) else [values] for name, values in entry.items()}


def every(lists: Mapping[str, list]) -> Iterator[dict[str, Any]]:
    """All combinations of one value of each option; that of the last option changes first."""
    return (dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values()))


def entries(part: Part) -> Iterator[Entry]:
    """The arms of a part, `branch: all` spelt out, {budget} filled in."""
    for entry in part.arms:
        lists = lists_of(entry)
        if "all" in lists.get("branch", []):
            lists["branch"] = list(range(RunSpec.of(config_of(part.model)).open().unet.num_branches))
        for values in every(lists):
            about = {name: values.pop(name) for name in _ABOUT if name in values}
            budget = str(about.get("budget", ""))
            options = {name: value.replace("{budget}", budget) if isinstance(value, str) else value
                       for name, value in values.items()}
            yield Entry(options, **about)


def with_common(part: Part, options: Mapping[str, Any]) -> RunSpec:
    """A run with the options of all runs and its own: but for what a plan brings itself. Raises UserError."""
    brought = SAMPLING if options.get("plan") else ()
    common = {key: value for key, value in part.common.items() if key not in brought}
    return RunSpec.of(config_of(part.model), **common | dict(options))


@cache
def _files() -> list[str]:
    return [name for name, axis in options_of(*METHODS).items() if axis.kind is Path]


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
    for number, entry in enumerate(entries(part), 1):
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
        found.setdefault((name, *entry[1:]), (entry, known[name]))
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


def against(part: Part) -> Run:
    """The run without caching that all others are compared with. Raises UserError."""
    return with_common(part, part.against).open()


def needed(file: str, made: Mapping[str, str]) -> list[str]:
    """The files that one is made of, in the order in which they must be made, itself the last."""
    inside = [other for word in shlex.split(made[file]) if word in made and word != file
              for other in needed(word, made)]
    return [*dict.fromkeys(inside), file]
