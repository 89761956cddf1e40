"""Studies of convergence: how near runs come to the converged images of the same seeds, and at what cost.

    python -m scripts.convergence --config configs/studies/forecast_ldm.yaml --list     its runs and what is there
    python -m scripts.convergence --config configs/studies/forecast_ldm.yaml            run it, or go on with it
    python -m scripts.convergence --config configs/studies/forecast_ldm.yaml --render   draw what is there

A study is a YAML file:

    model: ldm_emoji
    seeds: 5000-5127            of every run
    chosen_on: 64               the first so many choose the best setting of each kind, the others report on it
    converged: {sampler: unipc, steps: 100}
    twice: 16                   seeds on which twice as many steps show how far converged the images are
    common: {timesteps: trailing}       options of all runs; for text also prompts, images_per_prompt
    judged: emoji:all           also the distances of the images to these real ones (as eval.quality), less those that
                                the converged images of the same seeds have
    also: [forecast_ldm]        other studies, of the same model, seeds and converged run, whose runs are shown, too
    grids:                      each is all combinations of its axes, options of the sample command
    - {sampler: [ddim, dpmpp, unipc], steps: [8, 13, 18, 26]}
    - {sampler: unipc, steps: 50, interval: [2, 3, 5], forecast: [0, 1, 2]}

Every run has a JSON in results/convergence/NAME/, with the PSNR of each seed, and is made once. Costs are in full
network calls per image: by multiply-accumulates, and by time where results/convergence/NAME/times.json is there, which
`eval.throughput --forecast` makes.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from eval.cost.runs import in_full_calls, macs_per_step
from eval.metrics.images import ImageSet, from_array
from eval.metrics.intervals import mean_estimate
from eval.metrics.registry import EXTRACTORS
from eval.metrics.sources import open_reference
from eval.quality import difference, metrics, quality
from eval.tables.current import other_weights
from eval.tables.text import align
from lab.plans.distances import Distances
from lab.study import convergence_page, convergence_report
from lab.study.convergence_page import Shown
from lab.study.convergence_report import LESS, PSNR, Point
from lab.study.sweep import check_axis, config_of, every, lists_of, options_of, with_common
from run import arguments, results
from run.cli import command
from run.machine import Machine
from run.provenance import provenance
from run.results import Cost, Metric, Result
from run.seeds import format_seeds, parse_seeds
from run.settings import read_yaml
from run.spec import Run, RunSpec
from unet_caching.errors import UserError
from unet_caching.files import schema

KIND = "convergence"


@dataclass
class Study:
    """A study file; see above."""
    model: str
    seeds: str
    converged: dict[str, Any]
    grids: list[dict[str, Any]]
    chosen_on: int = 64
    twice: int = 16
    common: dict[str, Any] = field(default_factory=dict)
    judged: str | None = None
    also: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Place:
    """Where a study keeps what it makes. work: for the converged latents."""
    name: str
    results: Path
    work: Path

    @property
    def folder(self) -> Path:
        return self.results / "convergence" / self.name

    def result(self, run: Run) -> Path:
        return self.folder / f"{run.name}.json"


def read_study(path: Path) -> Study:
    """Raises UserError that names the file, the grid and the axis that is wrong."""
    study = read_yaml(path, Study)
    for number, grid in enumerate(study.grids, 1):
        for axis, values in lists_of(grid).items():
            if axis == "model":
                raise UserError(f"{path}, grid {number}: a study is of one model, which it names once")
            check_axis(f"{path}, grid {number}", axis, values)
    known = options_of(*map(type, RunSpec.of(config_of(study.model)).parts))
    for key, options in (("converged", study.converged), ("common", study.common)):
        for name, value in options.items():
            check_axis(f"{path}, {key}", str(name), [value], known)
    if not study.grids:
        raise UserError(f"{path}: grids is empty: a study needs at least one, like {{sampler: unipc, steps: [9, 18]}}")
    seeds = sorted(parse_seeds(study.seeds))        # results tell of each in turn
    study.seeds = format_seeds(seeds)
    if not 0 <= study.twice <= len(seeds):
        raise UserError(f"{path}: twice must be from 0 to the {len(seeds)} seeds, got {study.twice}")
    if not 2 <= study.chosen_on <= len(seeds) - 2:
        raise UserError(f"{path}: chosen_on must leave 2 of the {len(seeds)} seeds or more on either side")
    return study


def specs(study: Study) -> Iterator[RunSpec]:
    """Every run of the study. Raises UserError."""
    for grid in study.grids:
        for values in every(lists_of(grid)):
            yield RunSpec.of(config_of(study.model), **with_common(study.common, values))


def check_names(runs: list[RunSpec], path: Path) -> None:
    """Refuse runs that do not open, and different ones that would share a result. Raises UserError."""
    known: dict[str, Run] = {}
    for spec in runs:
        run = spec.open()
        if known.setdefault(run.name, run).brief != run.brief:
            raise UserError(f"{path}: two different runs would both be called {run.name}")


class Judged:
    """Compares the images of runs with real ones, less what the converged images of the same seeds come to."""

    def __init__(self, text: str, distances: Distances, seeds: list[int]):
        self.text, self.distances, self.seeds = text, distances, seeds
        self.extractor = EXTRACTORS["efflite0"](distances.model.device)
        self.converged = self.images([distances.converged(seeds)], "converged")
        self.reference, _ = open_reference(text, self.converged.size)

    def images(self, latents: list[Tensor], name: str) -> ImageSet:
        """The images of latents, in the order of the seeds."""
        pixels = np.concatenate([self.distances.model.decode(batch.to(self.distances.model.device)) for many in latents
                                 for batch in many.split(self.distances.machine.batch_size)])
        return replace(from_array(pixels, name, list(map(str, self.seeds))), seeds=self.seeds)

    def of(self, latents: list[Tensor], name: str) -> dict[str, Metric]:
        """The distances, and by how much they are above those of the converged images, paired by seed."""
        images = self.images(latents, name)
        args = self.reference, self.extractor
        own = metrics(quality(images, *args, repeats=100, with_floors=False))
        more = metrics(difference(images, self.converged, *args, repeats=100))
        return own | {f"{measure}{LESS}": found for measure, found in more.items()}


def measured(run: Run, distances: Distances, seeds: list[int], judged: Judged | None = None) -> Result:
    """Sample a run, and see how near each seed comes."""
    started, latents = time.time(), list[Tensor]()
    psnr = distances.of(run, seeds, title=run.name, keep=latents.append if judged else None)
    found = {PSNR: Metric.of(mean_estimate(psnr))} | (judged.of(latents, run.name) if judged else {})
    return Result(KIND, run.config.name, run.brief, len(psnr), found,
                  inputs={"reference": judged.text} if judged else {},
                  hashes={"checkpoint": distances.checkpoint_sha256}, macs=Cost(*macs_per_step(run)),
                  provenance=provenance(distances.model.device),
                  details=of(run, distances, seeds) | {"psnr": [round(float(value), 4) for value in psnr]}
                  ).stamped(started)


def of(run: Run, distances: Distances, seeds: list[int]) -> dict[str, Any]:
    """What a result says of the comparison."""
    return {"name": run.name, "seeds": format_seeds(seeds), "converged": distances.run.brief,
            "full_calls": in_full_calls(run),
            "condition": {name: str(value) for name, value in arguments.given(run.spec.condition).items()}}


def fault(run: Run, path: Path, converged: Run, seeds: list[int], judged: str | None = None) -> str | None:
    """Why there is no current result of a run, in words; None where there is one.

    `Wanted.fault` (eval/tables/current.py) for distances, which have no images. judged: the real images that its own
    are compared with. Raises UserError for a damaged file.
    """
    if not path.is_file():
        return "no"
    found = results.read(path)
    if found.settings != json.loads(json.dumps(run.brief)):
        return "measured with other settings"
    if found.details.get("converged") != json.loads(json.dumps(converged.brief)):
        return "compared with another converged run"
    psnr = found.details.get("psnr", [0] * len(seeds))          # of twice the steps it is in the metrics alone
    if wrong := schema.fault(psnr, list[float], "details.psnr"):
        raise UserError(f"{path} is damaged: {wrong}; delete it, and the study measures it again")
    if found.details.get("seeds") != format_seeds(seeds) or len(psnr) != len(seeds):
        return "measured on other seeds"
    if found.inputs.get("reference") != judged:
        return "judged by other real images" if judged else "judged, and the study does not ask for it"
    return other_weights(run, found.hashes.get("checkpoint"))


def there(run: Run, path: Path, converged: Run, seeds: list[int], judged: str | None = None) -> Result | None:
    """The result of a run, where it is current."""
    return results.read(path) if fault(run, path, converged, seeds, judged) is None else None


def converged_of(study: Study) -> RunSpec:
    """The run that all others are compared with. Raises UserError."""
    return RunSpec.of(config_of(study.model), **study.common | study.converged)


def run_all(study: Study, place: Place, machine: Machine, runs: list[RunSpec]) -> None:
    """Measure what is not there yet."""
    seeds = parse_seeds(study.seeds)
    distances = Distances(converged_of(study), machine, place.work)
    distances.model.check_seeds(seeds)
    for spec in runs:
        distances.check(spec.open())
    distances.converged(seeds)
    measure_twice(study, place, distances, seeds[:study.twice])
    judged = None if study.judged is None else Judged(study.judged, distances, seeds)
    for number, spec in enumerate(runs, 1):
        run = spec.open()
        path = place.result(run)
        if there(run, path, distances.run, seeds, study.judged) is None:
            print(f"[{number}/{len(runs)}] {run.name}: {in_full_calls(run):.2f} full calls", flush=True)
            results.write(path, measured(run, distances, seeds, judged))


def measure_twice(study: Study, place: Place, distances: Distances, seeds: list[int]) -> None:
    """How near the converged images come to those of twice as many steps."""
    path = place.folder / "twice.json"
    started, run = time.time(), distances.run.spec.having(steps=2 * distances.run.steps).open()
    if not seeds or there(run, path, distances.run, seeds):
        return
    psnr = distances.of(run, seeds, title=run.name)
    results.write(path, Result("converged", run.config.name, run.brief, len(seeds),
                               {PSNR: Metric.of(mean_estimate(psnr))}, provenance=provenance(distances.model.device),
                               hashes={"checkpoint": distances.checkpoint_sha256},
                               details={"converged": distances.run.brief, "seeds": format_seeds(seeds)}
                               ).stamped(started))


def also(study: Study, path: Path, place: Place) -> Iterator[tuple[Study, Place]]:
    """The other studies whose runs are shown beside. Raises UserError for one that cannot be compared."""
    for name in study.also:
        other = read_study(path.with_name(f"{name}.yaml"))
        differing = [key for key in ("model", "seeds", "converged") if getattr(other, key) != getattr(study, key)]
        if differing:
            raise UserError(f"{path}: {name} cannot be shown beside it: it has another {' and '.join(differing)}")
        yield other, Place(name, place.results, place.work)


def points(study: Study, place: Place, runs: list[RunSpec], times: Path | None = None) -> list[Point]:
    """What is measured of the study; says what is no longer current. times: of its steps (default: its own)."""
    converged, seeds, found = converged_of(study).open(), parse_seeds(study.seeds), []
    timed = times_of(times or place.folder / "times.json", converged)
    for spec in runs:
        run = spec.open()
        path = place.result(run)
        if (why_not := fault(run, path, converged, seeds, study.judged)) not in (None, "no"):
            print(f"left out: {run.name}, {why_not}")
        if why_not is None:
            result = results.read(path)
            found.append(Point.of(run, in_full_calls(run), timed, np.array(result.details["psnr"]), result.metrics))
    return found


def shown(study: Study, place: Place, runs: list[RunSpec], others: list[tuple[Study, Place]]) -> Shown:
    """What a page needs beside the points."""
    opened = [spec.open() for spec in (*runs, *(spec for other, _ in others for spec in specs(other)))]
    return Shown(converged_of(study).open(), {run.name: run for run in opened}, parse_seeds(study.seeds),
                 study.chosen_on, place.work / "images")


def times_of(path: Path, run: Run) -> dict[str, Any] | None:
    """The times of the steps of a study's model; None where there are none. Raises UserError for another model's."""
    if not path.is_file():
        return None
    found = results.read(path)
    if found.model != run.config.name:
        raise UserError(f"{path} has times of {found.model}, and the study is of {run.config.name}: delete it, or time "
                        "again with eval.throughput --forecast")
    return found.times


def listing(study: Study, place: Place, runs: list[RunSpec]) -> str:
    """A line per run."""
    converged, seeds = converged_of(study).open(), parse_seeds(study.seeds)
    lines = [["run", "full / calls", "cost, full calls", "measured"]]
    for run in (spec.open() for spec in runs):
        why_not = fault(run, place.result(run), converged, seeds, study.judged)
        lines.append([run.name, f"{run.full_calls} / {run.calls}", f"{in_full_calls(run):.2f}", why_not or "yes"])
    return align(lines)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, help="the study, a YAML file; configs/studies/ has some")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--list", action="store_true", help="print the runs and which are measured; do nothing")
    mode.add_argument("--render", action="store_true", help="only write table and picture of what is there")
    parser.add_argument("--results", type=Path, default=Path("results"), help="default: %(default)s")
    parser.add_argument("--work", type=Path, default=Path("samples/convergence"),
                        help="folder of the converged latents (default: %(default)s)")
    arguments.add(parser, Machine)
    parser.set_defaults(batch_size=32)
    args = parser.parse_args()
    study, name = read_study(args.config), args.config.stem
    place, runs = Place(name, args.results, args.work / name), list(specs(study))
    check_names(runs, args.config)
    others = list(also(study, args.config, place))
    if args.list:
        print(listing(study, place, runs))
        return
    machine = arguments.chosen(Machine, args)
    if not args.render:
        run_all(study, place, machine, runs)
    found, to_show = points(study, place, runs), shown(study, place, runs, others)
    for other, beside in others:
        names = {one.name for one in found}
        found += [point for point in points(other, beside, list(specs(other)), place.folder / "times.json")
                  if point.name not in names]
    print(convergence_report.render(found, study.chosen_on, place.folder))
    if not args.render:
        convergence_page.make_images(to_show, found, machine)
    if page := convergence_page.write(found, to_show, place.folder):
        print(f"to look at: {page}")


if __name__ == "__main__":
    main()
