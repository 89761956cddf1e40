"""DeepCache on the models that are shipped here, end to end: sample every arm, judge it, time it, draw it.

    python -m scripts.demo              about half an hour on 2 cores
    python -m scripts.demo --quick      about five minutes: fewer images, steps and arms

All arms of a model start from the same seeds, so their images can be compared one by one. Images go to
samples/demo/MODEL/ARM, results to results/demo/ (demo_quick with --quick). A second run reuses the images.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from caching.deepcache import DeepCache
from caching.schedules import centered, uniform
from eval.cost.macs import Macs, average, giga, step_macs
from eval.cost.timing import time_steps
from eval.fidelity import fidelity
from eval.metrics.features import EffLite0
from eval.metrics.images import open_images
from eval.quality import FD, KID, open_reference, quality
from eval.tables.plots import cost_against_quality, sample_rows
from experiments.demo_report import report
from runs.cli import command
from runs.errors import UserError
from runs.families import build, example_inputs, load_config, load_unet, rows_per_image
from runs.files import ROOT, write_atomically, write_json
from runs.prompts import read_prompts
from runs.provenance import provenance
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


def judge(model: Model, folder: Path, uncached: Path, extractor: EffLite0) -> dict:
    """Distances to the real images, and to the uncached images of the same seeds."""
    samples = open_images(folder)
    samples.description = str(folder.relative_to(ROOT))         # for the record, which is read on other machines too
    reference, held_out = open_reference(f"emoji:{model.groups}", samples.size)
    result = {"quality": quality(samples, reference, extractor, held_out, with_floors=folder == uncached)}
    if folder != uncached:
        result["fidelity"] = fidelity(samples, open_images(uncached), extractor)
    return result | {"run": samples.run()}


def time_arms(model: Model, arms: list[Arm], quick: bool) -> dict:
    """Seconds of a full and of a cached step, in turns, and from them the seconds of a run of every arm."""
    config = load_config(model.config)
    unet = place(load_unet(config, ROOT / config.checkpoint), "cpu", torch.float32)
    batch_size = 32
    x, t, *context = example_inputs(config, batch_size * rows_per_image(config), "cpu")
    inputs = (torch.randn_like(x), t + 500, *context)
    timings = time_steps(unet, inputs, {"cached": DeepCache(config.sampler.branch, [0])}, 5 if quick else 20)
    full, ratio = timings["full"], timings["cached"].ratio(timings["full"])
    # The cost of a run in full steps. The ratio is taken round by round, so that times when the machine is busy cancel.
    cost = {arm.name: len(arm.full_steps) + (arm.steps - len(arm.full_steps)) * ratio for arm in arms}
    return {"batch_size": batch_size, "threads": torch.get_num_threads(),
            "full": full.to_json(), "cached": timings["cached"].to_json(), "ratio": ratio,
            "images_per_second": {name: batch_size / (value * full.median) for name, value in cost.items()},
            "speedup": {name: cost["uncached"] / value for name, value in cost.items()}}


def pictures(model: Model, arms: list[Arm], results: dict[str, dict], folder: Path, samples: Path) -> None:
    """samples_MODEL.png and cost_quality_MODEL.png."""
    shown = [arm for arm in arms if arm.family != "fewer steps" and arm.name != "n2"]
    rows = [(arm.label, next(open_images(samples / arm.name).batches(SHOWN))) for arm in shown]
    sample_rows(rows, folder / f"samples_{model.name}.png")

    def interval(result: dict, measure: str, scale: float = 1.0) -> list[float]:
        value = result["quality"][measure]
        return [scale * v for v in (value["value"], *value["interval"])]

    points = []
    for arm in arms:
        if arm.family != "ablation":
            result = results[arm.name]
            points.append({"family": arm.family, "label": arm.label, "cost": giga(result["macs"]["hook"]),
                           "fd": interval(result, FD), "kid": interval(result, KID, 1e3),
                           "psnr": result["fidelity"]["psnr"]["mean"] if "fidelity" in result else None})
    cost_against_quality(points, folder / f"cost_quality_{model.name}.png",
                         [("fd", "FD-EffLite0 (lower is better)"), ("kid", "KID-EffLite0 x 1000 (lower is better)"),
                          ("psnr", "PSNR to uncached, dB (higher is better)")])


def arms_of(model: Model, quick: bool) -> tuple[list[Arm], Macs, Macs]:
    """The arms of a model and the MACs of its full and cached steps, for one image."""
    config = load_config(model.config)
    rows = rows_per_image(config)
    full, cached = (Macs(*(rows * value for value in macs))
                    for macs in step_macs(build(config), example_inputs(config), config.sampler.branch))
    return plan(model, cached.hook / full.hook, quick), full, cached


def section(model: Model, folder: Path) -> str | None:
    """A model's part of table.md, from its results in `folder`; None where there are none."""
    def read(name: str) -> dict:
        return json.loads((folder / model.name / f"{name}.json").read_text())

    if not (folder / model.name / "timing.json").is_file():
        return None
    timing = read("timing")
    results = {arm: read(arm) for arm in timing["speedup"]}
    return f"## {model.title}\n\n" + report(results, timing, timing["provenance"])


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

    where, extractor = provenance("cpu"), EffLite0()
    for model, (arms, full, cached) in plans.items():
        print(f"{model.name}: timing full and cached steps", flush=True)
        timing = time_arms(model, arms, args.quick)
        (folder / model.name).mkdir(parents=True, exist_ok=True)
        write_json(folder / model.name / "timing.json", {"kind": "throughput", **timing, "provenance": where})
        results, root = {}, samples / model.name
        for arm in tqdm(arms, desc=f"judging {model.name}", unit="arm"):
            macs = average(full, cached, arm.full_steps, arm.steps)
            results[arm.name] = {"kind": "demo", "arm": arm.name, "label": arm.label, "steps": arm.steps,
                                 "full_steps": arm.full_steps,
                                 "macs": {"hook": macs.hook * arm.steps, "fc": macs.fc * arm.steps, "per": "image"},
                                 **judge(model, root / arm.name, root / "uncached", extractor), "provenance": where}
            write_json(folder / model.name / f"{arm.name}.json", results[arm.name])
        pictures(model, arms, results, folder, root)
    table = "\n".join(filter(None, (section(model, folder) for model in MODELS)))
    write_atomically(folder / "table.md", lambda temporary: temporary.write_text(table))
    print(f"\n{table}\nwrote {folder.relative_to(ROOT)}/: table.md, pictures, one JSON per arm")


if __name__ == "__main__":
    main()
