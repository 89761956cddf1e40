"""DeepCache on the models that are shipped here, end to end: sample every arm, judge it, time it, draw it.

    python -m scripts.demo              about half an hour on 2 cores
    python -m scripts.demo --quick      about five minutes: fewer images, steps and arms

All arms of a model start from the same seeds, so their images can be compared one by one. Images go to
samples/demo/MODEL/ARM, results to results/demo/ (demo_quick with --quick). A second run reuses the images.
"""

import argparse
import dataclasses
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from caching.deepcache import DeepCache
from caching.schedules import centered, uniform
from eval import fidelity, quality
from eval.cost.macs import Macs, average, giga, step_macs
from eval.cost.timing import time_steps
from eval.metrics.features import EffLite0
from eval.metrics.images import open_images
from eval.quality import FD, KID
from eval.tables.plots import cost_against_quality, sample_rows
from eval.tables.results import of_samples
from experiments.demo_report import report
from runs import results
from runs.cli import command
from runs.errors import UserError
from runs.families import build, example_inputs, load_config, load_unet, rows_per_image
from runs.files import ROOT, write_atomically
from runs.prompts import read_prompts
from runs.provenance import provenance
from runs.results import Cost, Metric, Result
from speed.accelerate import place

POWER = 1.4                                 # of the non-uniform arms, with the center at 40 % of the steps: about where
CENTER = 0.4                                # the paper has them for LDM and SD; not tuned here
SHOWN = 16                                  # images per row of the pictures


class Model(NamedTuple):
    """A model of the demo.

    package: whose `sample` command makes the images. groups: of the emoji it was trained on, which it is compared with.
    images: per arm. intervals: N of the caching arms. prompts: file, for a model that takes them.
    """
    name: str
    package: str
    title: str
    steps: int
    sampler: str
    groups: str
    images: int
    intervals: tuple[int, ...]
    prompts: Path | None = None

    @property
    def config(self) -> Path:
        return ROOT / "configs" / f"{self.name}_emoji.yaml"

    def options(self, images: int) -> list[str]:
        """Of the sample command, for so many images."""
        if self.prompts is None:
            return []
        per_prompt = math.ceil(images / len(read_prompts(self.prompts)))
        return ["--prompts", str(self.prompts.relative_to(ROOT)), "--images-per-prompt", str(per_prompt)]


SMILEYS = "Smileys & Emotion"
MODELS = (Model("ddpm", "ddpm", "DDPM in pixels, branch 2", 100, "DDIM", SMILEYS, 256, (2, 3, 5, 10)),
          Model("ldm", "ldm", "LDM in latents, by class, guidance 1.5, branch 0", 50, "DDIM", SMILEYS, 256,
                (2, 3, 5, 10)),
          Model("sd", "stable_diffusion", "Stable Diffusion's layout, by prompt, guidance 4, branch 1", 50, "PLMS",
                f"{SMILEYS},Animals & Nature,Food & Drink", 192, (2, 5), ROOT / "data" / "emoji" / "prompts.txt"))


class Arm(NamedTuple):
    """One way to sample: `steps` network calls, of which `full_steps` are full."""
    name: str
    label: str
    family: str                 # a key of eval.tables.plots.STYLE
    steps: int
    full_steps: list[int]
    options: list[str]          # of the sample command


def plan(model: Model, ratio: float, quick: bool) -> list[Arm]:
    """The arms of a model, the uncached one first. ratio: MACs of a cached step over those of a full one."""
    steps = model.steps

    def cached(name: str, label: str, family: str, interval: int, full_steps: list[int], *options: str) -> Arm:
        return Arm(name, label, family, steps, full_steps, ["--interval", str(interval), *options])

    def fewer(name: str, family: str, steps: int) -> Arm:
        return Arm(name, f"{model.sampler} {steps}", family, steps, list(range(steps)), ["--steps", str(steps)])

    intervals, center = ((5, 10) if quick else model.intervals), round(CENTER * steps)
    arms = [fewer("uncached", "uncached", steps)._replace(label="no cache")]
    arms += [cached(f"n{n}", f"N={n}", "uniform", n, uniform(steps, n)) for n in intervals]
    if not quick:
        arms += [cached(f"n{n}_centered", f"N={n} non-uniform", "non-uniform", n, centered(steps, n, center, POWER),
                        "--schedule", "centered", "--center", str(center), "--power", str(POWER))
                 for n in intervals if n >= 5]
        equal_cost = [round(k + (steps - k) * ratio) for k in (math.ceil(steps / n) for n in intervals)]
        arms += [fewer(f"equal{n}", "fewer steps", calls) for n, calls in zip(intervals, equal_cost, strict=True)]
    arms.append(fewer(f"{model.sampler.lower()}10", "ablation", 10))
    arms.append(cached("n10_zeroed", "N=10, cache zeroed", "ablation", 10, uniform(steps, 10), "--zero-cache"))
    return [arm._replace(options=["--steps", str(arm.steps), *(arm.options if arm.full_steps != list(range(arm.steps))
                                                              else [])]) for arm in arms]


def sample(model: Model, arm: Arm, folder: Path, images: int, batch_size: int) -> None:
    """Run the model's sample command for one arm; it keeps what is there.

    One process with one thread per core: for a small network that is quicker than one process with all threads.
    """
    command = [sys.executable, "-m", f"{model.package}.sample", "--config", str(model.config.relative_to(ROOT)),
               "--seeds", f"0-{images - 1}", "--batch-size", str(batch_size), "--out", str(folder.relative_to(ROOT)),
               "--device", "cpu", "--threads", "1", *model.options(images), *arm.options]
    world = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8)
    ranks = []
    try:
        for rank in range(world):
            env = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL))
        if any([rank.wait() for rank in ranks]):
            raise UserError(f"arm {arm.name} failed; to see it alone: {' '.join(['python', *command[1:]])}")
    finally:
        for rank in ranks:
            rank.terminate()
            rank.wait()


def judge(kind: str, model: Model, macs: Macs, per_image: Macs, folder: Path, uncached: Path, extractor: EffLite0,
          **details: object) -> Result:
    """Distances to the real images, and to the uncached images of the same seeds.

    macs, per_image: of a step and one row, and of a whole image. details: what else there is to say of the arm.
    """
    started, against = time.time(), open_images(uncached)
    samples = open_images(folder)
    samples.description = str(folder.relative_to(ROOT))         # for the record, which is read on other machines too
    reference, held_out = quality.open_reference(f"emoji:{model.groups}", samples.size)
    found = quality.quality(samples, reference, extractor, held_out, with_floors=folder == uncached)
    near = fidelity.fidelity(samples, against, extractor) if folder != uncached else None
    result = of_samples(
        kind, samples, quality.metrics(found) | (fidelity.metrics(near) if near else {}), extractor.device,
        inputs={"reference": f"emoji:{model.groups}", "against": str(uncached.relative_to(ROOT))},
        hashes=quality.hashes(found), started=started, details={
            **details, "macs_per_image": dataclasses.asdict(Cost(*per_image)), "quality": found, "fidelity": near,
            "sampled": samples.run()["provenance"]})
    return dataclasses.replace(result, macs=Cost(*macs))


def time_arms(model: Model, arms: list[Arm], quick: bool) -> Result:
    """Seconds of a full and of a cached step, in turns, and from them the seconds of a run of every arm."""
    started = time.time()
    config = load_config(model.config)
    unet = place(load_unet(config, ROOT / config.checkpoint), "cpu", torch.float32)
    batch_size = 32
    x, t, *context = example_inputs(config, batch_size * rows_per_image(config), "cpu")
    inputs = (torch.randn_like(x), t + 500, *context)
    timings = time_steps(unet, inputs, {"cached": DeepCache(config.sampler.branch, [0])}, 5 if quick else 20)
    full, ratio = timings["full"], timings["cached"].ratio(timings["full"])
    # The cost of a run in full steps. The ratio is taken round by round, so that times when the machine is busy cancel.
    cost = {arm.name: len(arm.full_steps) + (arm.steps - len(arm.full_steps)) * ratio for arm in arms}
    return Result(
        "throughput", config.name, {"batch_size": batch_size, "dtype": "fp32", "weights": config.checkpoint},
        throughput={"full": full.to_json(), "branches": [
            {"branch": config.sampler.branch, **timings["cached"].to_json(), "ratio": ratio}]},
        details={"images_per_second": {name: batch_size / (value * full.median) for name, value in cost.items()},
                 "speedup": {name: cost["uncached"] / value for name, value in cost.items()}},
        provenance=provenance("cpu")).stamped(started)


def point(family: str, result: Result) -> dict:
    """What the charts of cost against quality show of an arm."""
    def interval(metric: Metric, scale: float = 1.0) -> list[float]:
        return [scale * v for v in (metric.value, *metric.interval)]

    psnr = result.metrics.get("PSNR")
    return {"family": family, "label": result.details["label"], "cost": giga(result.details["macs_per_image"]["macs"]),
            "fd": interval(result.metrics[FD]), "kid": interval(result.metrics[KID], 1e3),
            "psnr": psnr.value if psnr else None}


PANELS = [("fd", "FD-EffLite0 (lower is better)"), ("kid", "KID-EffLite0 x 1000 (lower is better)"),
          ("psnr", "PSNR to uncached, dB (higher is better)")]


def pictures(model: Model, arms: list[Arm], found: dict[str, Result], folder: Path, samples: Path) -> None:
    """samples_MODEL.png and cost_quality_MODEL.png."""
    shown = [arm for arm in arms if arm.family != "fewer steps" and arm.name != "n2"]
    rows = [(arm.label, next(open_images(samples / arm.name).batches(SHOWN))) for arm in shown]
    sample_rows(rows, folder / f"samples_{model.name}.png")

    points = [point(arm.family, found[arm.name]) for arm in arms if arm.family != "ablation"]
    cost_against_quality(points, folder / f"cost_quality_{model.name}.png", PANELS)


def arms_of(model: Model, quick: bool) -> tuple[list[Arm], Macs, Macs]:
    """The arms of a model and the MACs of its full and cached steps, for one row of a batch."""
    config = load_config(model.config)
    full, cached = step_macs(build(config), example_inputs(config), config.sampler.branch)
    return plan(model, cached.hook / full.hook, quick), full, cached


def section(model: Model, folder: Path) -> str | None:
    """A model's part of table.md, from its results in `folder`; None where there are none."""
    timing = folder / model.name / "timing.json"
    if not timing.is_file():
        return None
    found = {result.details["arm"]: result for path, result in results.read_all(folder / model.name) if path != timing}
    in_order = dict(sorted(found.items(), key=lambda pair: pair[1].details["place"]))
    return f"## {model.title}\n\n" + report(in_order, results.read(timing))


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer images, steps and arms: about five minutes")
    parser.add_argument("--models", nargs="+", choices=[model.name for model in MODELS],
                        help="only these; the table keeps the results of the others")
    parser.add_argument("--images", type=int, help="images per arm (default: 256, of the slowest model 192; 80 with "
                                                   "--quick)")
    parser.add_argument("--batch-size", type=int, default=32, help="images at a time (default: %(default)s)")
    args = parser.parse_args()
    if args.images is not None and args.images < 80:
        raise UserError(f"--images must be 80 or more for the distances to mean something, got {args.images}")
    models = [model for model in MODELS if args.models is None or model.name in args.models]
    if args.quick:
        models = [model._replace(images=80, steps=min(50, model.steps)) for model in models]
    if args.images is not None:
        models = [model._replace(images=args.images) for model in models]
    plans = {model: arms_of(model, args.quick) for model in models}

    name = "demo_quick" if args.quick else "demo"
    samples, folder = ROOT / "samples" / name, ROOT / "results" / name
    jobs = [(model, arm) for model, (arms, _, _) in plans.items() for arm in arms]
    for i, (model, arm) in enumerate(jobs):
        print(f"[{i + 1}/{len(jobs)}] {model.name}: {arm.label}, {len(arm.full_steps)} full of {arm.steps} steps",
              flush=True)
        sample(model, arm, samples / model.name / arm.name, model.images, args.batch_size)

    extractor = EffLite0()
    for model, (arms, full, cached) in plans.items():
        print(f"{model.name}: timing full and cached steps", flush=True)
        results.write(folder / model.name / "timing.json", time_arms(model, arms, args.quick))
        found, root = {}, samples / model.name
        for number, arm in enumerate(tqdm(arms, desc=f"judging {model.name}", unit="arm")):
            macs = average(full, cached, arm.full_steps, arm.steps)
            rows = rows_per_image(load_config(model.config))
            found[arm.name] = judge("demo", model, macs, Macs(*(value * arm.steps * rows for value in macs)),
                                    root / arm.name, root / "uncached", extractor, arm=arm.name, label=arm.label,
                                    place=number)
            results.write(folder / model.name / f"{arm.name}.json", found[arm.name])
        pictures(model, arms, found, folder, root)
    table = "\n".join(filter(None, (section(model, folder) for model in MODELS)))
    write_atomically(folder / "table.md", lambda temporary: temporary.write_text(table))
    print(f"\n{table}\nwrote {folder.relative_to(ROOT)}/: table.md, pictures, one JSON per arm")


if __name__ == "__main__":
    main()
