"""All caching systems on one model, compared at equal multiply-accumulates.

    python -m scripts.systems --config configs/studies/systems_ldm.yaml --list        its runs, and what is there
    python -m scripts.systems --config configs/studies/systems_ldm.yaml --make        all of it, or go on with it
    python -m scripts.systems --config configs/studies/systems_ldm.yaml --seeds 0-31 --quick      distances alone
    python -m scripts.systems --config configs/studies/systems_ldm.yaml --render      table and picture of what is there

A study is a YAML file:

    model: ldm_emoji
    seeds: 0-127                of every run; from 0, since its images are judged too
    converged: {sampler: unipc, steps: 100}
    common: {timesteps: trailing}       options of all runs; for text also prompts, images_per_prompt
    files:                      of what was fitted: how each is made. {common} is the config and the common options
      FILE: lab.fit adaptor {common} --sampler unipc --steps 48 --clock 4 --seeds 1000-1063 ...
    systems:
    - {system: Clockwork, calls: 18, sampler: unipc, steps: 48, clock: 4}       calls: the budget, in full network calls
    - {system: plan, calls: [8, 12], plan: "checkpoints/plans/ldm_emoji_{calls}.json"}      {calls} is the budget here

With --make the files that are not there are made first; without, a run whose file is missing is left out, and a line
says so. Each run is sampled once: how near its latents come to the converged ones of the same seed, its images judged
(FD, KID), its network calls timed. All of that is one file in results/systems/NAME/runs/; in made/ is what each file
that was fitted took to make.
"""

import argparse
import resource
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import numpy as np

from eval.cost.runs import in_full_calls
from eval.quality import KID
from eval.tables.text import align
from lab.fit.adaptive import spent_on
from lab.plans.distances import Distances
from lab.study import convergence, systems_page, systems_report
from lab.study.arms import Arm, Given, of_run
from lab.study.runner import judge, python
from lab.study.sweep import check_axis, config_of, every, lists_of, with_common
from lab.study.systems_report import Row
from run import arguments, results
from run.cli import command
from run.files import ROOT
from run.folder import RunFolder, missing_seeds
from run.machine import Machine
from run.provenance import provenance
from run.results import Result
from run.seeds import format_seeds, parse_seeds
from run.settings import read_yaml
from run.spec import Run, RunSpec
from run.weights import sha256
from unet_caching.errors import UserError
from unet_caching.methods.adaptive import AdaptiveMethod

KIND, MADE = "systems", "fitted file"
SPENT = "spent"              # in details: what each seed cost, in full network calls, where each image decides
FILE_OPTIONS = ("adaptor", "adaptive", "plan", "block_schedule", "scale_shift")


@dataclass
class Study:
    """A study file; see above."""
    model: str
    seeds: str
    converged: dict[str, Any]
    systems: list[dict[str, Any]]
    common: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A run of a study. calls: the budget. options: of the run, its files by name among them."""
    system: str
    calls: int
    options: dict[str, Any]

    @property
    def files(self) -> list[Path]:
        """What was fitted for it."""
        return [Path(self.options[name]) for name in FILE_OPTIONS if self.options.get(name)]

    @property
    def missing(self) -> list[Path]:
        return [path for path in self.files if not (ROOT / path).is_file()]

    def open(self, study: Study) -> Run:
        """The run. Raises UserError."""
        return RunSpec.of(config_of(study.model), **with_common(study.common, self.options)).open()


@dataclass(frozen=True)
class Place:
    """Where a study keeps what it makes. work: for converged latents. samples: for images."""
    name: str
    results: Path
    work: Path
    samples: Path

    @property
    def folder(self) -> Path:
        return self.results / "systems" / self.name

    def result(self, run: Run) -> Path:
        return self.folder / "runs" / f"{run.name}.json"

    def made(self, file: Path) -> Path:
        return self.folder / "made" / f"{file.name}.json"

    def arm(self, run: Run, images: int, machine: Machine) -> Arm:
        """The run as something that is judged; what that tells is kept beside the images."""
        found = of_run(run, run.name, images, KIND, Given(samples=self.samples, machine=arguments.given(machine)))
        return replace(found, result=found.folder.with_name(f"{run.name}.judged.json"))


def read_study(path: Path) -> Study:
    """Raises UserError that names the file, the entry and the option that is wrong."""
    study = read_yaml(path, Study)
    seeds = parse_seeds(study.seeds)
    if seeds != list(range(len(seeds))) or len(seeds) < 2:
        raise UserError(f"{path}: seeds must be from 0 on, two or more, like 0-127, got {study.seeds}")
    for number, entry in enumerate(study.systems, 1):
        where = f"{path}, system {number}"
        budgets = lists_of(entry).get("calls", [])
        if not isinstance(entry.get("system"), str) or not budgets or not all(
                isinstance(calls, int) and not isinstance(calls, bool) and calls > 0 for calls in budgets):
            raise UserError(f"{where} must say its system, a name, and its calls, the budget: whole numbers from 1")
        for axis, values in lists_of(entry).items():
            if axis == "model":
                raise UserError(f"{where}: a study is of one model, which it names once")
            if axis not in ("system", "calls"):
                check_axis(where, axis, values)
    for file, line in study.files.items():
        try:
            shlex.split(line)
        except ValueError as error:
            raise UserError(f"{path}, {file}: its command has a {error}") from None
    try:
        TopologicalSorter({file: set(shlex.split(line)) - {file} for file, line in study.files.items()}).prepare()
    except CycleError as error:
        raise UserError(f"{path}: each of {', '.join(error.args[1][1:])} is made of the others") from None
    return study


def entries(study: Study) -> Iterator[Entry]:
    """All runs, those without caching first: they are what the others are compared with."""
    found = []
    for grid in study.systems:
        for values in every(lists_of(grid)):
            system, calls = values.pop("system"), values.pop("calls")
            options = {name: value.replace("{calls}", str(calls)) if isinstance(value, str) else value
                       for name, value in values.items()}
            found.append(Entry(system, calls, options))
    yield from sorted(found, key=lambda one: not one.system.startswith("fewer steps"))


def converged_run(study: Study) -> Run:
    """The run that all others are compared with. Raises UserError."""
    return RunSpec.of(config_of(study.model), **study.common | study.converged).open()


def opened(found: Sequence[Entry], study: Study, path: Path) -> list[tuple[Entry, Run]]:
    """The entries whose files are there, with their runs. Raises UserError where two runs would share a result."""
    known: dict[str, Run] = {}
    there = [(entry, entry.open(study)) for entry in found if not entry.missing]
    for _, run in there:
        if known.setdefault(run.name, run).brief != run.brief:
            raise UserError(f"{path}: two different runs would both be called {run.name}")
    return there


def needed(path: str, files: Mapping[str, str]) -> list[str]:
    """The files that one is made of, in the order in which they must be made, itself the last."""
    inside = [other for word in shlex.split(files[path]) if word in files and word != path
              for other in needed(word, files)]
    return [*dict.fromkeys(inside), path]


def make(study: Study, place: Place, found: Sequence[Entry]) -> None:
    """Make the files that are not there, and write how long each took. Raises UserError where that fails."""
    asked = [other for entry in found for path in entry.files if str(path) in study.files
             for other in needed(str(path), study.files)]
    common = shlex.join(RunSpec.of(config_of(study.model), **study.common).words())
    for path in dict.fromkeys(asked):
        if (ROOT / path).is_file():
            continue
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        line = ["-m", *shlex.split(study.files[path].replace("{common}", common)), "--out", path]
        print(shlex.join(["python", *line]), flush=True)
        started, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
        python(line, path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = sum(getattr(after, name) - getattr(before, name) for name in ("ru_utime", "ru_stime"))
        results.write(place.made(Path(path)), Result(
            MADE, study.model, hashes={"file": sha256(ROOT / path)}, provenance=provenance("cpu"),
            details={"file": path, "command": shlex.join(["python", *line]), "cpu_s": round(cpu, 2),
                     "bytes": (ROOT / path).stat().st_size}).stamped(started))


def cost_of_making(entry: Entry, study: Study, place: Place) -> float | None:
    """CPU seconds that all files of a run took, those that they are made of included; None where one is not known."""
    if any(str(path) not in study.files for path in entry.files):
        return None
    total = 0.0
    for path in dict.fromkeys(other for own in entry.files for other in needed(str(own), study.files)):
        made = place.made(Path(path))
        if not made.is_file():
            return None
        note = results.read(made)
        if (ROOT / path).is_file() and note.hashes["file"] != sha256(ROOT / path):
            return None             # it was made anew elsewhere; one that is not kept has its note alone
        total += note.details["cpu_s"]
    return total


def sample(arm: Arm, distances: Distances, seeds: Sequence[int]) -> None:
    """Make the images that are not there yet, and note how near their latents come."""
    if not missing_seeds(arm.folder, seeds):
        return
    model = distances.on(arm.run)
    folder = RunFolder(arm.folder, model.settings | {"cache": arm.run.caching.settings}, provenance(model.device))

    def images(some: list[int], report: Any) -> np.ndarray:
        latents = model.latents(some, model.policy(), report=report)
        distances.note(arm.run, some, latents)
        return model.decode(latents)

    folder.fill(list(seeds), distances.machine.batch_size, images, lambda: False)
    model.write_listing(folder)


def run_all(study: Study, place: Place, machine: Machine, runs: Sequence[Run], quick: bool) -> None:
    """Measure what is not there yet; quick: the distances alone."""
    seeds = parse_seeds(study.seeds)
    distances = Distances(converged_run(study).spec, machine, place.work)
    distances.model.check_seeds(seeds)
    for run in runs:
        distances.check(run)
    distances.converged(seeds)
    whole = replace(place.arm(distances.run, len(seeds), machine), result=place.folder / "converged.json")
    if not quick:
        sample(whole, distances, seeds)
        if whole.measured() is None:
            judge(whole, whole)
    for number, run in enumerate(runs, 1):
        print(f"[{number}/{len(runs)}] {run.name}: {cost_of(run):.2f} full calls", flush=True)
        arm = place.arm(run, len(seeds), machine)
        if not quick:
            sample(arm, distances, seeds)
        known = found = convergence.there(run, place.result(run), distances.run, seeds)
        if found is None:
            found = replace(convergence.measured(run, distances, seeds), kind=KIND)
        if (adaptive := run.caching.of(AdaptiveMethod)) and SPENT not in found.details:
            spent = spent_on(distances.on(run), adaptive.rule, seeds, machine.batch_size).round(4).tolist()
            found = replace(found, details=found.details | {SPENT: spent})
        if not quick and KID not in found.metrics and (by := arm.measured() or judge(arm, whole)):
            found = replace(found, metrics=found.metrics | by.metrics, hashes=by.hashes | found.hashes)
        if not quick and run.caching and not found.throughput:
            found = replace(found, throughput=timed(arm, machine))
        if found is not known:
            results.write(place.result(run), found)


def timed(arm: Arm, machine: Machine) -> dict[str, Any]:
    """The time of a run and of each kind of its calls, one image at a time, and what that was measured with."""
    path = arm.folder.with_name(f"{arm.name}.times.json")
    words = arguments.words({name: value for name, value in arguments.given(machine).items()
                             if name in ("device", "threads")})
    python(["-m", "eval.throughput", "run", *arm.run.spec.words(), *words, "--batch-size", "1", "--out", str(path)],
           "timing")
    return brief(results.read(path))


def brief(found: Result) -> dict[str, Any]:
    """What `eval.throughput run` found without single rounds and the names of what each kind of call reuses."""
    with_ = {name: found.settings[name] for name in ("batch_size", "rows", "repeats", "warmup", "weights")}
    return {"run": found.times["runs"][0], "full": {key: found.times["full"][key] for key in ("median", "quartiles")},
            "kinds": {key: [one[key] for one in found.times["kinds"]] for key in ("calls", "median", "ratio")},
            "with": {**with_, **{name: found.provenance[name] for name in ("device_name", "threads")}}}


def cost_of(run: Run) -> float:
    """Of an image, in full network calls; where each image decides, its mean on held-out seeds."""
    adaptive = run.caching.of(AdaptiveMethod)
    found = adaptive.rule.notes.get("spent") if adaptive else None
    return found["mean"] if found else in_full_calls(run)


def rows(study: Study, place: Place, found: Sequence[tuple[Entry, Run]]) -> list[Row]:
    """What is measured of the study."""
    converged, seeds, made = converged_run(study), parse_seeds(study.seeds), []
    for entry, run in found:
        result = convergence.there(run, place.result(run), converged, seeds)
        if result is None:
            continue
        whole = None if run.caching else float(run.calls)
        made.append(Row(entry.system, entry.calls, run.name, float(np.mean(result.details.get(SPENT, cost_of(run)))),
                        run.calls / result.times["run"]["speedup"] if result.times else whole,
                        np.array(result.details["psnr"]), result.metrics,
                        cost_of_making(entry, study, place) if entry.files else 0.0))
    return made


def listing(study: Study, place: Place, found: Sequence[Entry]) -> str:
    """A line per run."""
    lines = [["system", "calls", "run", "full calls", "measured"]]
    for entry in found:
        if entry.missing:
            lines.append([entry.system, str(entry.calls), f"no {entry.missing[0]}", "-", "no"])
            continue
        run = entry.open(study)
        lines.append([entry.system, str(entry.calls), run.name, f"{cost_of(run):.2f}",
                      "yes" if place.result(run).is_file() else "no"])
    return align(lines)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, help="the study: configs/studies/systems_*.yaml")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--list", action="store_true", help="print the runs and which are measured; do nothing")
    mode.add_argument("--render", action="store_true", help="only write table and picture of what is there")
    mode.add_argument("--make", action="store_true", help="make the files first that are not there")
    parser.add_argument("--quick", action="store_true", help="distances alone: no images are judged, nothing is timed")
    parser.add_argument("--seeds", help="from 0, instead of the study's")
    parser.add_argument("--calls", type=arguments.whole, action="append", help="this budget alone; repeatable")
    parser.add_argument("--results", type=Path, default=Path("results"), help="default: %(default)s")
    parser.add_argument("--samples", type=Path, default=Path("samples/systems"),
                        help="folder of the images (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("samples/convergence"),
                        help="folder of the converged latents (default: %(default)s)")
    arguments.add(parser, Machine)
    parser.set_defaults(batch_size=32)
    args = parser.parse_args()
    study, name = read_study(args.config), args.config.stem.removeprefix("systems_")
    if args.seeds is not None:
        study.seeds = format_seeds(parse_seeds(args.seeds))
    place, machine = Place(name, args.results, args.work, args.samples), arguments.chosen(Machine, args)
    found = [entry for entry in entries(study) if not args.calls or entry.calls in args.calls]
    if args.list:
        print(listing(study, place, found))
        return
    if args.make:
        make(study, place, found)
    there = opened(found, study, args.config)
    left_out = [f"left out: {entry.system} at {entry.calls} calls, there is no {path}"
                for entry in found for path in entry.missing[:1]]
    print("\n".join(left_out), end="\n" if left_out else "", flush=True)
    if not args.render:
        run_all(study, place, machine, list({run.name: run for _, run in there}.values()), args.quick)
    measured, converged = rows(study, place, there), converged_run(study)
    print(systems_report.render(measured, left_out, place.folder))
    if measured:
        seeds = len(parse_seeds(study.seeds))
        arms = {run.name: place.arm(run, seeds, machine) for _, run in there}
        page = systems_page.write_page(measured, place.arm(converged, seeds, machine), arms, place.folder)
        print(f"to look at: {page}")


if __name__ == "__main__":
    main()
