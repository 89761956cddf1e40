"""The measures of an arm. Each writes one record for each arm. To add one: a function here and its word in MEASURES.

    near        PSNR of the final latents to the reference run's, by seed; the part's `against` says which run that is
    quality     distances to real images on features of small networks, and how far they are above the reference run's
    fidelity    PSNR, SSIM and feature distance to the reference run's images, by seed
    converged   error of the images to a run of many steps, if twice as many steps change little
    twice       PSNR of the reference run to a run of twice as many steps, on the first seeds
    spent       cost of each seed, if each image decides what is computed
    time        time of each kind of network call, and so of a run
    adm, fid, clip_score        for published models: the papers' evaluators, by their commands
"""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from eval import fidelity as pairs
from eval import quality as sets
from eval.cost.runs import in_full_calls, macs_per_step
from eval.cost.timing import Times, only_reuses, random_inputs, time_runs
from eval.metrics.extract import pixels_sha256
from eval.metrics.features import EffLite0, SmallExtractor
from eval.metrics.images import ImageSet, open_images
from eval.metrics.intervals import mean_estimate
from eval.metrics.registry import EXTRACTORS
from eval.metrics.results import of_samples
from eval.metrics.small_sets import FrechetInBasis, KernelDistance
from eval.tables.arms import Arm
from eval.tables.current import Wanted, trained_on
from eval.tables.study import Part
from lab.fit.adaptive import spent_on
from lab.plans.distances import Distances
from lab.study.commands import evaluate
from run.families import build
from run.provenance import provenance
from run.results import Cost, Metric, Result
from run.seeds import format_seeds
from run.spec import Run
from unet_caching.errors import as_user_error
from unet_caching.methods.adaptive import AdaptiveMethod
from unet_caching.speed.accelerate import accelerated, place

PSNR = "PSNR to converged"         # of latents; for images it is the metric PSNR
FEWEST = 80             # images, for a Frechet distance in 64 dimensions; the kernel distance is unbiased with fewer


def minus_uncached(name: str) -> str:
    """The name of the difference between a metric and the uncached run's."""
    return f"{name} minus uncached"


@dataclass(frozen=True)
class Setup:
    """The things that the measures of a part need."""
    part: Part
    whole: Arm                          # the reference run, without caching
    converged: Sequence[Arm]            # runs of many steps and of twice as many, for the measure `converged`
    work: Path                          # the folder of converged latents

    @cached_property
    def distances(self) -> Distances:
        """The converged latents, and the model with its weights. Raises UserError."""
        return Distances(self.whole.run.spec, self.whole.on, self.work)

    @property
    def device(self) -> str:
        return self.whole.on.device

    @property
    def real(self) -> str | None:
        """The real images of `quality`, as --reference of eval.quality."""
        return self.part.real or trained_on(self.whole.run.config)

    @property
    def extractors(self) -> list[SmallExtractor]:
        """The networks of `quality`. Raises UserError if the file of one is missing."""
        return [_extractor(name, self.device) for name in dict.fromkeys(("efflite0", *self.part.extractors))]

    def images(self, arm: Arm) -> ImageSet:
        return open_images(arm.folder, arm.seeds)


@dataclass(frozen=True)
class Measure:
    """of: measures an arm; None if this machine cannot. images: whether it needs the images. inputs: other files that
    it reads. metrics: the names that its record must have."""
    of: Callable[[Arm, Setup], Result | None]
    images: bool = True
    applies: Callable[[Arm, Setup], bool] = lambda arm, setup: True
    inputs: Callable[[Setup], Mapping[str, Path]] = lambda setup: {}
    metrics: Callable[[Setup], Sequence[str]] = lambda setup: ()

    def wanted(self, kind: str, arm: Arm, setup: Setup) -> Wanted:
        """What its record of an arm must belong to."""
        if kind == arm.evaluator:
            return arm.wanted
        if kind == "time":              # the same for all images
            return Wanted(arm.run, kind, None)
        if kind == "twice":
            seeds = format_seeds(list(arm.seeds)[:setup.part.twice])
            return Wanted(arm.run, kind, None, seeds=seeds, against=with_steps(arm.run, 2))
        compared = setup.converged[0] if kind == "converged" else setup.whole
        return Wanted(arm.run, kind, None, self.inputs(setup), arm.folder if self.images else None,
                      seeds=format_seeds(arm.seeds), against=compared.run, metrics=self.metrics(setup))


@cache
def _extractor(name: str, device: str) -> SmallExtractor:
    return EXTRACTORS[name](device)


@cache
def _real(text: str, size: tuple[int, int]) -> tuple[ImageSet, ImageSet | None]:
    return sets.open_reference(text, size)


def near(arm: Arm, setup: Setup) -> Result:
    """The PSNR of the final latents to the reference run's, by seed."""
    started, distances = time.time(), setup.distances
    distances.check(arm.run)
    psnr = distances.of(arm.run, list(arm.seeds), title=arm.label)
    return _of_run("near", arm, setup, distances.on(arm.run).settings, {PSNR: Metric.of(mean_estimate(psnr))},
                   {"psnr": [round(float(value), 4) for value in psnr]}, started)


def twice(arm: Arm, setup: Setup) -> Result:
    """The PSNR of the reference run to a run of twice as many steps, on the first seeds."""
    started, run, first = time.time(), with_steps(arm.run, 2), replace(arm, seeds=list(arm.seeds)[:setup.part.twice])
    psnr = setup.distances.of(run, list(first.seeds), title="twice the steps")
    return _of_run("twice", first, setup, setup.distances.model.settings, {PSNR: Metric.of(mean_estimate(psnr))},
                   {"against": run.brief}, started)


def with_steps(run: Run, times: int) -> Run:
    """The same run with `times` as many steps."""
    return run.spec.having(steps=times * run.steps).open()


def spent(arm: Arm, setup: Setup) -> Result:
    """The cost of each seed, in full network calls."""
    started, model = time.time(), setup.distances.on(arm.run)
    adaptive = arm.run.caching.of(AdaptiveMethod)
    assert adaptive is not None         # else the measure does not apply
    calls = spent_on(model, adaptive.rule, list(arm.seeds), setup.whole.on.batch_size)
    return _of_run("spent", arm, setup, model.settings, {"full calls": Metric.of(mean_estimate(calls))},
                   {"calls": calls.round(4).tolist()}, started)


def _of_run(kind: str, arm: Arm, setup: Setup, model: dict[str, Any], metrics: dict[str, Metric],
            details: dict[str, Any], started: float) -> Result:
    """model: the settings of the model that sampled."""
    about = {"name": arm.name, "seeds": format_seeds(arm.seeds), "against": setup.whole.run.brief,
             "full_calls": in_full_calls(arm.run)}
    return Result(kind, arm.run.config.name, model | {"cache": arm.run.caching.settings}, arm.images, metrics,
                  hashes={"checkpoint": model["checkpoint_sha256"]}, macs=Cost(*macs_per_step(arm.run)),
                  provenance=provenance(setup.device), details=about | details).stamped(started)


def quality(arm: Arm, setup: Setup) -> Result:
    """Distances to real images by all extractors, and how far they are above the reference run's.

    The record of the reference run also has the distances of real images.
    """
    started, samples, base = time.time(), setup.images(arm), setup.images(setup.whole)
    real, held_out = _real(str(setup.real), samples.size)
    first, metrics, hashes, details = arm.run.name == setup.whole.run.name, dict[str, Metric](), dict[str, str](), {}
    warnings.filterwarnings("ignore", r"\d+ images for \d+ dimensions")     # FD is left out with few images
    for extractor in setup.extractors:
        main = extractor.name == "EffLite0"
        found = sets.quality(samples, real, extractor, held_out if main else None, with_floors=first and main,
                             against=None if first else base)
        own = sets.metrics(found)
        if more := found.get("difference"):
            own |= {minus_uncached(name): metric for name, metric in sets.metrics(more).items()}
            hashes |= {"against": more["against"]["sha256"]}
        few = FrechetInBasis.named(extractor.name).name if len(samples) < FEWEST else ""
        metrics |= {name: metric for name, metric in own.items() if not few or not name.startswith(few)}
        hashes |= sets.hashes(found) if main else {f"extractor {extractor.name}": extractor.id}
        if main:
            details = {"nearest_reference": found["nearest_reference"], "real_images": len(real)}
            details |= {"floors": found["floors"]} if first else {}
    return _of_images("quality", arm, setup, samples, metrics, started,
                      {"reference": str(setup.real), "against": str(setup.whole.folder)}, hashes, details)


def fidelity(arm: Arm, setup: Setup) -> Result:
    """The likeness of the images of each seed to the reference run's."""
    started, samples = time.time(), setup.images(arm)
    found = pairs.fidelity(samples, setup.images(setup.whole), EffLite0(setup.device))
    details = {"psnr": [round(value, 4) if value is not None else None for value in found["per_image"]["psnr"]]}
    return _of_images("fidelity", arm, setup, samples, pairs.metrics(found), started,
                      {"against": str(setup.whole.folder)}, {"images": found["images_sha256"]["samples"],
                                                             "against": found["images_sha256"]["against"]}, details)


def converged(arm: Arm, setup: Setup) -> Result:
    """The error to a run of many steps; no metric if twice as many steps change it by more than 5 %."""
    started, samples = time.time(), setup.images(arm)
    others = dict(zip(("against", "twice"), setup.converged, strict=True))
    images = {name: setup.images(one) for name, one in others.items()}
    found = pairs.to_converged(samples, images["against"], images["twice"])
    return _of_images("converged", arm, setup, samples, pairs.converged_metrics(found), started,
                      {name: str(one.folder) for name, one in others.items()},
                      {name: pixels_sha256(one) for name, one in {"images": samples, **images}.items()},
                      {"convergence": found}, against=setup.converged[0])


def _of_images(kind: str, arm: Arm, setup: Setup, samples: ImageSet, metrics: dict[str, Metric], started: float,
               inputs: dict[str, str], hashes: dict[str, str], details: dict[str, Any], against: Arm | None = None
               ) -> Result:
    about = {"name": arm.name, "against": (against or setup.whole).run.brief}
    return of_samples(kind, samples, metrics, setup.device, started=started, inputs=inputs, hashes=hashes,
                      macs=Cost(*macs_per_step(arm.run)), details=about | details)


def times(arms: Sequence[Arm], setup: Setup) -> Iterator[tuple[Arm, Result]]:
    """The times of the runs of some arms. Each kind of call is timed once, in turns with a full call."""
    alone = [arm for arm in arms if not only_reuses(arm.run)]
    groups = [[arm for arm in arms if arm not in alone], *([arm] for arm in alone)]
    options = {"batch_size": 1, "repeats": 20, "warmup": 2} | setup.part.time
    machine = replace(setup.whole.on, batch_size=options["batch_size"])
    for group in filter(None, groups):
        run, device, where = group[0].run, machine.prepare(), provenance(machine.device)
        torch.manual_seed(0)
        network = accelerated(place(build(run.config, "cpu"), device, run.dtype), machine.compile, machine.cuda_graphs,
                              len({kind for arm in group for kind in arm.run.reused}))
        rows = machine.batch_size * run.rows_per_image
        inputs = random_inputs(run.family.shapes(run.config), rows, device, run.dtype)
        with as_user_error():
            found = time_runs([arm.run for arm in group], network.network, inputs, options["repeats"],
                              options["warmup"])
        known = Times(found, run.caching.settings if group[0] in alone else None)
        for arm in group:
            took = known.of_run(arm.run)
            assert took is not None         # all of its kinds were timed
            yield arm, Result("time", run.config.name, arm.run.settings,
                              throughput={"run": {"calls": arm.run.calls, **took._asdict()}, "with": {
                                  **options, "full": found["full"]["median"], **network.in_use}},
                              provenance=where, details={"name": arm.name}).stamped(None)


def by_command(arm: Arm, setup: Setup) -> Result | None:
    """The result of the papers' evaluator."""
    evaluate(arm)
    return arm.measured()


def timed(arm: Arm, setup: Setup) -> Result:
    """The time of one run. For several, `times` is quicker."""
    return next(found for _, found in times([arm], setup))


def _small(setup: Setup) -> list[str]:
    """The distances of `quality` that need no minimum number of images."""
    names = dict.fromkeys(("efflite0", *setup.part.extractors))
    return [KernelDistance.named(EXTRACTORS[name].name).name for name in names]


MEASURES: dict[str, Measure] = {
    "near": Measure(near, images=False),
    "quality": Measure(quality, inputs=lambda setup: {"--reference": Path(str(setup.real))}, metrics=_small),
    "fidelity": Measure(fidelity, applies=lambda arm, setup: arm.run.name != setup.whole.run.name),
    "converged": Measure(converged),
    "twice": Measure(twice, images=False, applies=lambda arm, setup: arm.name == setup.whole.name),
    "spent": Measure(spent, images=False, applies=lambda arm, setup: arm.run.caching.of(AdaptiveMethod) is not None),
    "time": Measure(timed, images=False, applies=lambda arm, setup: bool(arm.run.caching)),
    **dict.fromkeys(("adm", "fid", "clip_score"), Measure(by_command)),
}
