"""Sweeps: every combination of some settings, sampled, judged, timed, and drawn as quality against cost.

    python -m scripts.sweep --config sweeps/ddpm_emoji_interval_branch.yaml --list         its points; nothing runs
    python -m scripts.sweep --config sweeps/ddpm_emoji_interval_branch.yaml                run it, or go on with it
    python -m scripts.sweep --config sweeps/ddpm_emoji_interval_branch.yaml --share 2/8    a share of the points
    python -m scripts.sweep --config sweeps/ddpm_emoji_interval_branch.yaml --render       draw what is there

A sweep is a YAML file:

    images: 256                 of each point: seeds 0 to 255
    prompts: FILE               for Stable Diffusion; also images_per_prompt (1 unless given)
    dtype: fp16                 of the network (fp32 unless given)
    grids:                      each is all combinations of its axes
    - {model: ddpm_emoji, interval: [2, 3, 5, 10], branch: all}
    - {model: ddpm_emoji, interval: 10, schedule: centered, center: [30, 50], power: [1.2, 1.4]}

Axes: model (a name in configs/, or a path), interval, branch (a 0-based skip, or all), schedule, center, power, steps,
sampler, block_schedule (a file of scripts.block_caching). The first point of a model, which its others are compared
with, is always its uncached run, with the first sampler and steps of its first grid. A point is sampled into
samples/MODEL/ under the name that the table scripts give these settings, and judged into results/runs/: models that
were trained here against their training images and the uncached run (eval.quality, eval.fidelity), others as in the
papers' tables, where the evaluator's files are given. Full and cached steps are timed once for each model. Table and
pictures go to results/sweeps/NAME/.
"""

import argparse
import dataclasses
import difflib
import itertools
import re
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from caching.block_schedule import PlannedBlocks
from caching.schedules import RULES
from eval import fidelity, quality
from eval.cost.macs import giga
from eval.cost.runs import macs_per_image, macs_per_step
from eval.metrics.features import EffLite0
from eval.metrics.images import open_images
from eval.quality import FD, KID
from eval.tables.render import align
from eval.tables.results import of_samples
from experiments import sweep_report
from experiments.jobs import Job, job_of, python, trained_on
from experiments.plan import add_options, check, check_one_model, disk
from runs import arguments, results
from runs.cli import command
from runs.errors import UserError
from runs.families import family_named_by
from runs.files import ROOT
from runs.folder import missing_seeds
from runs.image_model import fill
from runs.machine import Machine
from runs.prompts import read_prompts
from runs.results import Metric, Result
from runs.settings import read_yaml
from runs.spec import DTYPES, RunSpec
from sampling.samplers import SAMPLERS

# What an axis holds: its type in words, what Python calls that, and its choices where there are few.
AXES = {"model": ("names of configs", str, None), "interval": ("whole numbers", int, None),
        "branch": ("whole numbers", int, None), "schedule": ("names", str, tuple(RULES)),
        "center": ("whole numbers", int, None), "power": ("numbers", int | float, None),
        "steps": ("whole numbers", int, None), "sampler": ("names", str, SAMPLERS),
        "block_schedule": ("files", str, None)}
KIND = "sweep"          # of the results of the models that are trained here
FEWEST = 80             # images, for a Frechet distance in 64 dimensions; the kernel distance is unbiased with fewer


@dataclass
class Sweep:
    """A sweep file. grids: axis -> a value or several."""
    images: int
    grids: list[dict[str, Any]]
    prompts: str | None = None
    images_per_prompt: int = 1
    dtype: str = "fp32"


def read_sweep(path: Path) -> Sweep:
    """Raises UserError that names the file, the grid and the axis that is wrong."""
    sweep = read_yaml(path, Sweep)
    if sweep.images < 3 or sweep.images_per_prompt < 1:
        raise UserError(f"{path}: images must be 3 or more and images_per_prompt 1 or more")
    if sweep.dtype not in DTYPES:
        raise UserError(f"{path}: dtype must be one of {', '.join(DTYPES)}, got {sweep.dtype!r}")
    if not sweep.grids:
        raise UserError(f"{path}: grids is empty: a sweep needs at least one, like {{model: ddpm_emoji, interval: 5}}")
    for number, grid in enumerate(sweep.grids, 1):
        for axis, given in grid.items():
            check_axis(f"{path}, grid {number}", str(axis), given if isinstance(given, list) else [given])
        if "model" not in grid:
            raise UserError(f"{path}, grid {number} names no model")
    return sweep


def check_axis(where: str, axis: str, given: list) -> None:
    """Raises UserError for an axis or a value that there is not."""
    if axis not in AXES:
        near = difflib.get_close_matches(axis, AXES, 1)
        raise UserError(f"{where} has no axis {axis!r}: " + (f"is it {near[0]}? " if near else "")
                        + f"There are {', '.join(AXES)}")
    words, kind, choices = AXES[axis]
    if not given:
        raise UserError(f"{where}: {axis} has no values")
    for value in given:
        if axis == "branch" and value == "all":
            continue
        if isinstance(value, bool) or not isinstance(value, kind):
            raise UserError(f"{where}: {axis} takes {words}, got {value!r}")
        if choices and value not in choices:
            raise UserError(f"{where}: {axis} has no {value!r}: choose from {', '.join(choices)}")


def combinations(grid: dict[str, Any], seen: set[Path]) -> Iterator[dict[str, Any]]:
    """The points of a grid: one value of each axis, `branch: all` spelt out.

    Those of a model that is not among the `seen` ones begin with its uncached run.
    """
    axes = {axis: given if isinstance(given, list) else [given] for axis, given in grid.items()}
    for model in axes.pop("model"):
        path = config_of(model)
        if path not in seen:
            yield {"model": path, **{axis: axes[axis][0] for axis in ("sampler", "steps") if axis in axes}}
            seen.add(path)
        branches = axes.get("branch", [])
        skips = RunSpec.of(path).open().unet.num_branches
        of_model = axes | ({"branch": list(range(skips))} if "all" in branches else {})
        for values in itertools.product(*of_model.values()):
            yield {"model": path, **dict(zip(of_model, values, strict=True))}


def config_of(model: str) -> Path:
    """Where the config of a model is. Raises UserError."""
    path = Path(model) if model.endswith(".yaml") else Path("configs") / f"{model}.yaml"
    if not (ROOT / path).is_file():
        known = ", ".join(sorted(path.stem for path in (ROOT / "configs").glob("*.yaml")))
        raise UserError(f"no model {model!r}: there are {known}, or give the path of a config")
    return path


def make_points(sweep: Sweep, path: Path, args: argparse.Namespace) -> list[Job]:
    """The points of a sweep, none twice, checked as far as that goes without weights. Raises UserError."""
    found: dict[tuple[str, str], Job] = {}
    seen: set[Path] = set()
    for number, grid in enumerate(sweep.grids, 1):
        for values in combinations(grid, seen):
            options = {axis: value for axis, value in values.items() if axis != "model"} | {"dtype": sweep.dtype}
            if "prompts" in arguments.names(family_named_by(values["model"]).condition):
                if sweep.prompts is None:
                    raise UserError(f"{path}: {values['model']} takes prompts: say prompts: FILE")
                options |= {"prompts": sweep.prompts, "images_per_prompt": sweep.images_per_prompt}
            label = ", ".join(f"{axis} {value}" for axis, value in values.items() if axis != "model") or "uncached"
            try:
                run = RunSpec.of(values["model"], **options).open()
                job = job_of(run, label, sweep.images, KIND if trained_on(run.config) else run.family.judge, args)
                check_point(job)
            except UserError as error:
                raise UserError(f"{path}, grid {number}, {values['model']}, {label}: {error}") from None
            same = found.setdefault((run.config.name, run.name), job).run
            if same.spec.config != run.spec.config or same.caching.settings != run.caching.settings:
                raise UserError(f"{path}, grid {number}: two different points would share {job.folder}; give the "
                                "models, or the files of their block schedules, names of their own")
    return list(found.values())


def check_point(job: Job) -> None:
    """Raises UserError for a sampler, or a block schedule, that does not go with the model."""
    run = job.run
    run.refuse_foreign({"model": run.config.name, "unet": asdict(run.config.unet), **run.sampler.settings})
    prompts = getattr(run.spec.condition, "prompts", None)
    if prompts and prompts.is_file():
        count = len(read_prompts(prompts))
        if job.images > count * run.spec.condition.images_per_prompt:
            raise UserError(f"{job.images} images from {count} prompts need an images_per_prompt of "
                            f"{-(-job.images // count)} or more")


def uncached_of(job: Job, jobs: Sequence[Job]) -> Job:
    """The uncached run that a point is compared with: the first of its model."""
    return next(other for other in jobs if other.run.config.name == job.run.config.name)


def measured(job: Job) -> Result | None:
    """The result of a point, where it is there and of these settings and images."""
    if not job.judged():
        return None
    result = results.read(job.result)
    same = result.images == job.images and all(result.settings.get(key) == value
                                               for key, value in job.run.told.items())
    return result if same else None


def sample(job: Job) -> None:
    """Fill the sample folder of a point, in this process."""
    machine = Machine(**{"batch_size": job.run.family.batch_size, **job.machine})
    fill(job.run.family.open(job.run, machine), range(job.images), job.folder, machine)


@cache
def _extractor(device: str | None) -> EffLite0:
    return EffLite0(device or ("cuda" if torch.cuda.is_available() else "cpu"))


@cache
def _reference(text: str, size: tuple[int, int]) -> tuple:
    return quality.open_reference(text, size)


def judge(job: Job, uncached: Job) -> None:
    """Write the result of a sampled point, where all that it takes is there.

    That of a model which was trained here has FD and KID, how much larger they are than those of the uncached run (the
    interval is that of pairs of images of one seed), and the mean PSNR, SSIM and feature distance to its images.
    """
    if job.kind != KIND:
        if not job.missing_for_judging():
            if job.npz is not None and not job.packed():
                python(job, job.npz_command())
            python(job, job.judge_command())
        return
    if missing_seeds(uncached.folder, range(job.images)):       # another share is at it; the last command judges this
        return
    started, extractor = time.time(), _extractor(job.machine.get("device"))
    warnings.filterwarnings("ignore", r"\d+ images for \d+ dimensions")     # of FD, which is left out with few images
    samples, against = (open_images(one.folder, range(job.images)) for one in (job, uncached))
    reference, held_out = _reference(trained_on(job.run.config), samples.size)
    found = quality.quality(samples, reference, extractor, held_out, with_floors=False)
    kept = (FD, KID) if job.images >= FEWEST else (KID,)
    metrics = {name: Metric.of(found[name]) for name in kept}
    if job.folder != uncached.folder:
        by = quality.difference(samples, against, reference, extractor)
        metrics |= {sweep_report.minus_uncached(name): Metric.of(by[name]) for name in kept}
        metrics |= fidelity.metrics(fidelity.fidelity(samples, against, extractor))
    inputs = {"reference": trained_on(job.run.config), "against": str(uncached.folder)}
    result = of_samples(KIND, samples, metrics, extractor.device, inputs=inputs, hashes=quality.hashes(found),
                                details={"nearest_reference": found["nearest_reference"]}, started=started)
    results.write(job.result, dataclasses.replace(result, macs=results.Cost(*macs_per_step(job.run))))


def run(jobs: Sequence[Job], all_jobs: Sequence[Job]) -> None:
    """Sample and judge what is not there yet, of some of the points."""
    for number, job in enumerate(jobs, 1):
        if measured(job) is None:
            print(f"[{number}/{len(jobs)}] {job.run.config.name}: {job.label}", flush=True)
            sample(job)
            judge(job, uncached_of(job, all_jobs))


def measure_times(jobs: Sequence[Job], folder: Path, args: argparse.Namespace) -> None:
    """Time full and cached steps of each model of the sweep (eval.throughput), unless that is done."""
    given = [word for name in ("batch_size", "device", "dtype", "threads") if getattr(args, name) is not None
             for word in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    for path in dict.fromkeys(job.run.spec.config for job in jobs):
        runs = [job.run for job in jobs if job.run.spec.config == path]
        steps, blocks = sweep_report.times_paths(folder, runs[0].config.name)
        branches = {run.deepcache.branch for run in runs if run.deepcache} or {runs[0].config.sampler.branch}
        schedules = {planned.schedule.sha256: str(run.spec.given()["block_schedule"]) for run in runs
                     if (planned := run.caching.of(PlannedBlocks))}
        known = results.read(steps).throughput["branches"] if steps.is_file() else []
        if not branches <= {one["branch"] for one in known}:
            time_steps(path, ["--branch", *map(str, sorted(branches)), "--interval", "1", *given], steps)
        known = results.read(blocks).throughput["schedules"] if blocks.is_file() else []
        if not schedules.keys() <= {one["sha256"] for one in known}:
            time_steps(path, ["--block-schedule", *schedules.values(), *given], blocks)


def time_steps(config: Path, words: Sequence[str], out: Path) -> None:
    """Run eval.throughput, in a process of its own."""
    line = ["-m", "eval.throughput", "--config", str(config), *words, "--out", str(out)]
    if subprocess.run([sys.executable, *line], cwd=ROOT).returncode:
        raise UserError(f"the times could not be measured; to see it alone: {shlex.join(['python', *line])}")


def share_of(jobs: list[Job], text: str | None) -> list[Job]:
    """Every COUNT-th point from the INDEX-th, counted from 1; all without a share. Raises UserError."""
    if text is None:
        return jobs
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--share must be INDEX/COUNT with INDEX from 1 to COUNT, like 2/8, got {text!r}")
    return jobs[int(match[1]) - 1::int(match[2])]


def listing(jobs: Sequence[Job]) -> str:
    """A line per point."""
    lines = [["point", "", "full / calls", "MACs/image G", "of uncached", "images there", "judged"]]
    for number, job in enumerate(jobs, 1):
        run, whole = job.run, macs_per_image(uncached_of(job, jobs).run).hook
        macs = macs_per_image(run).hook
        lines.append([f"{number}  {run.config.name}", job.label, f"{run.full_calls} / {run.calls}",
                      f"{giga(macs):.4f}", f"{macs / whole:.3f}", f"{job.present:,} of {job.images:,}",
                      "yes" if measured(job) else "no"])
    return align(lines)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, help="the sweep, a YAML file; sweeps/ has some")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--list", action="store_true", help="print the points and what is missing; do nothing")
    mode.add_argument("--share", metavar="INDEX/COUNT",
                      help="only sample and judge this share of the points, without times and pictures: for many "
                           "machines; the command without it does what is left")
    mode.add_argument("--render", action="store_true", help="only draw what is there")
    add_options(parser, images="the sweep's")
    args = parser.parse_args()
    check(args)
    sweep = read_sweep(args.config)
    sweep.images, sweep.dtype = args.images or sweep.images, args.dtype or sweep.dtype
    jobs = make_points(sweep, args.config, args)
    check_one_model(args, {job.run.config.name for job in jobs})
    chosen = share_of(jobs, args.share)
    folder = args.results / "sweeps" / args.config.stem
    if args.list:
        print(f"{listing(jobs)}\n\n{disk(jobs, args.samples)}")
    if not args.render:
        lacking = list(dict.fromkeys(thing for job in chosen for thing in job.missing_for_sampling()))
        unjudged = dict.fromkeys(thing for job in chosen if job.kind != KIND for thing in job.missing_for_judging())
        print("".join(f"not judged without: {thing}\n" for thing in unjudged), end="", flush=True)
        if jobs[0].images < FEWEST:
            print(f"{jobs[0].images} images are few: FD is left out below {FEWEST}", flush=True)
        if args.list:
            print("".join(f"missing: {thing}\n" for thing in lacking), end="")
            return
        if lacking and any(measured(job) is None for job in chosen):
            raise UserError(f"missing: {'; '.join(lacking)}")
        run(chosen, jobs)
        if args.share:
            return
        folder.mkdir(parents=True, exist_ok=True)
        measure_times(jobs, folder, args)
    print(sweep_report.render([(job, measured(job)) for job in jobs], folder))


if __name__ == "__main__":
    main()
