"""Carries out arms of experiments: samples them, judges them and times their steps, what is there already aside."""

import contextlib
import dataclasses
import importlib
import io
import json
import os
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from eval import fidelity, quality
from eval.cost.runs import deepcache_alone, macs_per_image, macs_per_step
from eval.cost.timing import Kind, Times
from eval.metrics.extract import pixels_sha256
from eval.metrics.features import EffLite0, SmallExtractor
from eval.metrics.images import ImageSet, open_images
from eval.metrics.registry import EXTRACTORS
from eval.metrics.results import of_samples
from eval.metrics.small_sets import FrechetInBasis
from eval.tables.current import COMMANDS, trained_on
from lab.study.arms import Arm
from run import results
from run.files import ROOT
from run.folder import missing_seeds
from run.image_model import fill, open_model, summary
from run.results import Cost, Metric, Result
from unet_caching.errors import UserError

Extractor = TypeVar("Extractor", bound=SmallExtractor)
_SAMPLING = 0.8         # share of an arm's time, of small models, for the time that is left
FEWEST = 80             # images, for a Frechet distance in 64 dimensions; the kernel distance is unbiased with fewer


def python(line: Sequence[str], what: str) -> None:
    """Run a command of the project, in a process of its own. Raises UserError where it fails."""
    if subprocess.run([sys.executable, *line], cwd=ROOT).returncode:
        raise UserError(f"{what} failed; to see it alone: {shlex.join(['python', *line])}")


def sample(arm: Arm) -> None:
    """Fill the sample folder of an arm, in this process."""
    made = fill(open_model(arm.run, arm.on), range(arm.images), arm.folder, arm.on)
    print(summary(arm.run, arm.folder, arm.images, made), flush=True)


def sampled(arms: Sequence[Arm]) -> Generator[Arm, None, None]:
    """Fill the sample folders by the sample commands, and yield each arm once its images are there.

    One process with one thread per core goes through all arms: for a small network that is quicker than one process
    with all threads. A bar tells how long the rest takes, by multiply-accumulates. Raises UserError where one fails.
    """
    costs = [macs_per_image(arm.run).hook for arm in arms]
    ranks: list[subprocess.Popen] = []
    try:
        lacking = [arm.command()[1:] for arm in arms if missing_seeds(arm.folder, range(arm.images))]
        if lacking:
            ranks += _processes(lacking)
        with tqdm(total=_work(arms, costs, len(arms)), initial=_work(arms, costs, 0), smoothing=0,
                  bar_format="{desc}: {percentage:3.0f}% |{bar:20}| {elapsed} gone, about {remaining} left",
                  mininterval=0.5 if sys.stderr.isatty() else 15) as bar:
            for number, arm in enumerate(arms):
                bar.set_description_str(f"{arm.run.config.name}: {arm.label}", refresh=False)
                while missing := missing_seeds(arm.folder, range(arm.images)):
                    if failed := [rank for rank in ranks if rank.poll()]:
                        raise UserError(f"sampling failed with exit code {failed[0].returncode}; to see it alone: "
                                        + shlex.join(["python", *arm.command()]))
                    if all(rank.poll() == 0 for rank in ranks):
                        raise UserError(f"{arm.folder} lacks {len(missing)} images: other processes are at them; run "
                                        "the same command again")
                    bar.update(_work(arms, costs, number) - bar.n)
                    time.sleep(0.2)
                bar.update(_work(arms, costs, number) - bar.n)
                yield arm
            bar.update(_work(arms, costs, len(arms)) - bar.n)
    finally:
        for rank in ranks:
            assert rank.stdin is not None       # asked for
            rank.stdin.close()                  # which ends it
            rank.wait()


def _processes(lines: list[list[str]]) -> Iterator[subprocess.Popen]:
    """One process per core that carries out sample commands one after another, each its share of every one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    world = min(cores, 8)
    for rank in range(world):
        env = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
        process = subprocess.Popen([sys.executable, "-m", "lab.study.sampling_process"], cwd=ROOT, env=env,
                                   stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        yield process
        assert process.stdin is not None
        process.stdin.write(json.dumps(lines) + "\n")
        process.stdin.flush()


def _work(arms: Sequence[Arm], costs: Sequence[float], done: int) -> int:
    """G MACs that are done: those of the first arms, and most of those of the images that the others have; the rest
    stands for what is done with an arm once it is sampled."""
    whole = sum(cost * arm.images for cost, arm in zip(costs[:done], arms[:done], strict=True))
    part = sum(cost * arm.present for cost, arm in zip(costs[done:], arms[done:], strict=True))
    return round((whole + _SAMPLING * part) / 1e9)


def sample_on_all_cores(arms: Sequence[Arm]) -> None:
    """Fill the sample folders as `sampled` does."""
    for _ in sampled(arms):
        pass


def by_commands(arms: Sequence[Arm]) -> None:
    """Sample, pack and judge arms as the papers' tables want it, each step in a process of its own.

    Raises UserError for one that fails.
    """
    for i, arm in enumerate(arms):
        print(f"[{i + 1}/{len(arms)}] {arm.label}", flush=True)
        python(arm.command(), f"row {arm.label!r}")
        evaluate(arm)


def evaluate(arm: Arm) -> None:
    """Pack the images where that is asked for, and judge them by the evaluator's command, where its files are there."""
    if not arm.packed():
        python(arm.npz_command(), f"row {arm.label!r}")
    if not arm.missing_for_judging() and arm.measured() is None:
        python(arm.judge_command(), f"row {arm.label!r}")


def uncached_of(arm: Arm, arms: Sequence[Arm]) -> Arm:
    """The uncached run that an arm is compared with: the first of its model."""
    return next(other for other in arms if other.run.config.name == arm.run.config.name)


def minus_uncached(name: str) -> str:
    """What the difference of a metric to that of the uncached run is called."""
    return f"{name} minus uncached"


@cache
def _extractor(kind: type[Extractor], device: str | None) -> Extractor:
    return kind(device or ("cuda" if torch.cuda.is_available() else "cpu"))


@cache
def _reference(text: str, size: tuple[int, int]) -> tuple[ImageSet, ImageSet | None]:
    return quality.open_reference(text, size)


def _distances(samples: ImageSet, against: ImageSet | None, reference: ImageSet, extractor: SmallExtractor,
               held_out: ImageSet | None = None, with_floors: bool = False
               ) -> tuple[dict[str, Any], dict[str, Metric]]:
    """What eval.quality finds, and its metrics with how much they differ from those of `against`; FD only of enough."""
    warnings.filterwarnings("ignore", r"\d+ images for \d+ dimensions")     # of FD, which is left out with few images
    found = quality.quality(samples, reference, extractor, held_out, with_floors=with_floors)
    metrics = quality.metrics(found)
    if against is not None:
        by = quality.metrics(quality.difference(samples, against, reference, extractor))
        metrics |= {minus_uncached(name): metric for name, metric in by.items()}
    if len(samples) < FEWEST:
        name = FrechetInBasis.named(extractor.name).name
        metrics = {key: metric for key, metric in metrics.items() if key not in (name, minus_uncached(name))}
    return found, metrics


def judge(arm: Arm, uncached: Arm, report: Mapping[str, Any] | None = None, floors: bool = True) -> Result | None:
    """Judge a sampled arm and write its result, where all that it takes is there; None where it is not, or by commands.

    That of a model which was trained here has FD and KID by EffLite0 and the arm's other extractors, how much larger
    they are than those of the uncached run (the interval is that of pairs of images of one seed), the mean PSNR, SSIM
    and feature distance to its images and, where the arm names a converged run that is one, the mean error to it.
    report: what is kept in details besides, with all that eval.quality and eval.fidelity tell; None: next to nothing.
    floors: with it, whether the uncached run's says what real images score.
    """
    if arm.kind in COMMANDS:
        if not arm.missing_for_judging():
            evaluate(arm)
        return None
    if any(missing_seeds(one.folder, range(arm.images)) for one in (uncached, *arm.converged)):
        return None             # another process is at it; the last one judges this
    started, device = time.time(), arm.machine.get("device")
    extractor, others = _extractor(EffLite0, device), [_extractor(EXTRACTORS[name], device) for name in arm.others]
    samples, against = (open_images(one.folder, range(arm.images)) for one in (arm, uncached))
    named = str(trained_on(arm.run.config))
    reference, held_out = _reference(named, samples.size)
    first = arm.folder == uncached.folder
    base, near = None if first else against, None
    found, metrics = _distances(samples, base, reference, extractor, held_out, first and floors and report is not None)
    for other in others:
        metrics |= _distances(samples, base, reference, other)[1]
    if not first:
        near = fidelity.fidelity(samples, against, extractor)
        metrics |= fidelity.metrics(near)
    details: dict[str, Any] = {"nearest_reference": found["nearest_reference"]}
    if report is not None:
        details = {**report, "label": arm.label, "quality": found, "fidelity": near,
                   "macs_per_image": dataclasses.asdict(Cost(*macs_per_image(arm.run))),
                   "sampled": (samples.run() or {}).get("provenance")}
    inputs, of_converged = {"reference": named, "against": str(uncached.folder)}, dict[str, str]()
    if arm.converged:
        others_of = [open_images(one.folder, range(arm.images)) for one in arm.converged]
        by = fidelity.to_converged(samples, others_of[0], others_of[1])
        metrics |= fidelity.converged_metrics(by)
        details["convergence"] = {key: value for key, value in by.items() if key != "per_image"}
        for name, one, images in zip(("converged", "twice"), arm.converged, others_of, strict=True):
            inputs[name], of_converged[name] = str(one.folder), pixels_sha256(images)
    hashes = {**quality.hashes(found), **of_converged,
              **({"against": near["images_sha256"]["against"]} if near else {}),
              **{f"extractor {one.name}": one.id for one in others}}
    result = of_samples(arm.kind, samples, metrics, extractor.device, started=started, details=details,
                        inputs=inputs, hashes=hashes,
                        macs=Cost(*macs_per_step(arm.run)))
    results.write(arm.result, result)
    return result


def judged(arm: Arm, arms: Sequence[Arm], floors: bool = True) -> Result:
    """The result of a sampled arm with the whole report, judged now where there is none that is current.

    arms: all of its model, the uncached one first. Raises UserError where that one lacks images.
    """
    report = {"arm": arm.name, "place": arms.index(arm)}
    known = arm.measured()
    if known is not None and {**report, "label": arm.label}.items() <= known.details.items():
        return known
    result = judge(arm, arms[0], report, floors)
    if result is None:
        raise UserError(f"{arms[0].folder} lacks images: other processes are at them; run the same command again")
    return result


def judge_all(arms: Sequence[Arm]) -> dict[str, Result]:
    """The results of the arms of one model, which are all sampled, by name; with the whole report."""
    return {arm.name: judged(arm, arms) for arm in tqdm(arms, desc=f"judging {arms[0].run.config.name}", unit="arm")}


def times_paths(steps: Path, arms: Sequence[Arm]) -> list[Path]:
    """Where the times of the arms of one model are kept: of DeepCache's steps, and of each run whose time they do not
    tell."""
    alone = [arm.name for arm in arms if not deepcache_alone(arm.run)]
    return [steps, *(steps.with_name(f"{steps.stem}_{name}.json") for name in alone)]


def in_this_process(line: Sequence[str], what: str) -> None:
    """Run a command of the project without starting Python anew, and without what it prints. Raises UserError."""
    main, before = importlib.import_module(line[1]).main, sys.argv
    sys.argv = [*line[1:]]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            main()
    except SystemExit:
        raise UserError(f"{what} failed; to see it alone: {shlex.join(['python', *line])}") from None
    finally:
        sys.argv = before


def time_steps(arms: Sequence[Arm], steps: Path, words: Sequence[str],
               call: Callable[[Sequence[str], str], None] = python) -> None:
    """Time the network calls of the arms of one model (eval.throughput), unless that is done.

    steps: the first of `times_paths`. words: further options of the command. call: what runs it.
    """
    runs, config = [arm.run for arm in arms if deepcache_alone(arm.run)], arms[0].run.config
    branches = {run.deepcache.branch for run in runs if run.deepcache} or {config.sampler.branch}
    known = Times.of(results.read(steps)).kinds if steps.is_file() else {}
    if not all(Kind((str(branch),)) in known for branch in branches):
        call(["-m", "eval.throughput", "--config", str(arms[0].run.spec.config), "--branch",
              *map(str, sorted(branches)), "--interval", "2", *words, "--out", str(steps)], "timing")
    alone = (arm for arm in arms if not deepcache_alone(arm.run))
    for arm, path in zip(alone, times_paths(steps, arms)[1:], strict=True):
        if not path.is_file():
            call(["-m", "eval.throughput", "run", *arm.run.spec.words(), *words, "--out", str(path)], "timing")
