"""DeepCache on the shipped DDPM, end to end: sample every arm, judge it, time it, write a table and pictures.

    python -m scripts.demo              about 12 minutes on 2 cores
    python -m scripts.demo --quick      two minutes: fewer images, fewer arms

All arms start from the same seeds, so their images can be compared one by one. Images go to samples/demo/ARM, results
to results/demo/ (results/demo_quick/ with --quick). A second run reuses the images that are there.
"""

import argparse
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
from ddpm.checkpoint import load_checkpoint
from ddpm.config import load_config
from eval.features import EffLite0
from eval.fidelity import fidelity
from eval.images import open_images
from eval.macs import average, build, example_inputs, giga, step_macs
from eval.plots import cost_against_quality, sample_rows
from eval.quality import FD, KID, open_reference, quality
from eval.throughput import time_steps
from sampling.cli import command
from sampling.options import place
from sampling.provenance import provenance
from sampling.runs import write_atomically, write_json
from sampling.settings import UserError
from scripts.demo_report import report

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "ddpm_emoji.yaml"
CENTER, POWER = 40, 1.4         # of the non-uniform arms, in 100 steps; as the paper has for LDM and SD, not tuned
SHOWN = 16                      # images per row of the picture


class Arm(NamedTuple):
    """One way to sample: `steps` network calls, of which `full_steps` are full."""
    name: str
    label: str
    family: str                 # a key of eval.plots.STYLE
    steps: int
    full_steps: list[int]
    options: list[str]          # of ddpm.sample


def plan(steps: int, ratio: float, quick: bool) -> list[Arm]:
    """The arms of the demo, the uncached one first. ratio: MACs of a cached step over those of a full one."""
    arms = [Arm("uncached", "no cache", "uncached", steps, list(range(steps)), [])]
    intervals = (3, 5, 10) if quick else (2, 3, 5, 10)
    for n in intervals:
        arms.append(Arm(f"n{n}", f"N={n}", "uniform", steps, uniform(steps, n), ["--interval", str(n)]))
    for n in () if quick else (5, 10):
        arms.append(Arm(f"n{n}_centered", f"N={n} non-uniform", "non-uniform", steps, centered(steps, n, CENTER, POWER),
                        ["--interval", str(n), "--schedule", "centered",
                         "--center", str(CENTER), "--power", str(POWER)]))
    for n in () if quick else intervals:
        k = math.ceil(steps / n)
        fewer = round(k + (steps - k) * ratio)
        arms.append(Arm(f"ddim{fewer}", f"DDIM {fewer}", "fewer steps", fewer, list(range(fewer)),
                        ["--steps", str(fewer)]))
    arms.append(Arm("ddim10", "DDIM 10", "ablation", 10, list(range(10)), ["--steps", "10"]))
    arms.append(Arm("n10_zeroed", "N=10, cache zeroed", "ablation", steps, uniform(steps, 10),
                    ["--interval", "10", "--zero-cache"]))
    return arms


def sample(arm: Arm, folder: Path, images: int, batch_size: int) -> None:
    """Run ddpm.sample for one arm; it keeps what is there.

    One process with one thread per core: for a small network that is quicker than one process with all threads.
    """
    command = [sys.executable, "-m", "ddpm.sample", "--config", str(CONFIG.relative_to(ROOT)),
               "--seeds", f"0-{images - 1}", "--batch-size", str(batch_size), "--out", str(folder.relative_to(ROOT)),
               "--device", "cpu", "--threads", "1", *arm.options]
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


def judge(folder: Path, uncached: Path, extractor: EffLite0) -> dict:
    """Distances to the real images, and to the uncached images of the same seeds."""
    samples = open_images(folder)
    reference, held_out = open_reference(f"emoji:{load_config(CONFIG).train.group}", samples.size)
    result = {"quality": quality(samples, reference, extractor, held_out)}
    if folder != uncached:
        result["fidelity"] = fidelity(samples, open_images(uncached), extractor)
    return result | {"run": samples.run()}


def time_arms(arms: list[Arm], branch: int, quick: bool) -> dict:
    """Seconds of a full and of a cached step, in turns, and from them the seconds of a run of every arm."""
    config = load_config(CONFIG)
    unet = build(config, "cpu")
    load_checkpoint(unet, ROOT / config.checkpoint)
    unet = place(unet, "cpu", torch.float32)
    x, t = example_inputs(config, batch_size=32, device="cpu")
    timings = time_steps(unet, (torch.randn_like(x), t + 500), {"cached": DeepCache(branch, [0])}, 8 if quick else 20)
    full, ratio = timings["full"], timings["cached"].ratio(timings["full"])
    # The cost of a run in full steps. The ratio is taken round by round, so that times when the machine is busy cancel.
    cost = {arm.name: len(arm.full_steps) + (arm.steps - len(arm.full_steps)) * ratio for arm in arms}
    return {"batch_size": len(x), "full": full.to_json(), "cached": timings["cached"].to_json(), "ratio": ratio,
            "images_per_second": {name: len(x) / (value * full.median) for name, value in cost.items()},
            "speedup": {name: cost["uncached"] / value for name, value in cost.items()}}


def pictures(arms: list[Arm], results: dict[str, dict], folder: Path, samples: Path) -> None:
    """samples.png and cost_quality.png."""
    shown = [arm for arm in arms if arm.name in ("uncached", "n2", "n3", "n5", "n5_centered", "n10", "n10_centered",
                                                 "ddim10", "n10_zeroed")]
    rows = [(arm.label, next(open_images(samples / arm.name).batches(SHOWN))) for arm in shown]
    sample_rows(rows, folder / "samples.png")

    def interval(result: dict, measure: str, scale: float = 1.0) -> list[float]:
        value = result["quality"][measure]
        return [scale * v for v in (value["value"], *value["interval"])]

    points = [{"family": arm.family, "label": arm.label, "cost": giga(results[arm.name]["macs"]["hook"]),
               "fd": interval(results[arm.name], FD), "kid": interval(results[arm.name], KID, 1e3),
               "psnr": results[arm.name]["fidelity"]["psnr"]["mean"] if "fidelity" in results[arm.name] else None}
              for arm in arms if arm.family != "ablation"]
    cost_against_quality(points, folder / "cost_quality.png",
                         [("fd", "FD-EffLite0 (lower is better)"), ("kid", "KID-EffLite0 x 1000 (lower is better)"),
                          ("psnr", "PSNR to uncached, dB (higher is better)")])


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer images and arms: two minutes")
    parser.add_argument("--images", type=int, help="images per arm (default: 256, or 96 with --quick)")
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    images = args.images or (96 if args.quick else 256)
    if images < 80:
        raise UserError(f"--images must be 80 or more for the distances to mean something, got {images}")

    config = load_config(CONFIG)
    branch, steps = config.sampler.branch, config.sampler.steps
    full, cached = step_macs(build(config), example_inputs(config), branch)
    arms = plan(steps, cached.hook / full.hook, args.quick)
    name = "demo_quick" if args.quick else "demo"
    samples, folder = ROOT / "samples" / name, ROOT / "results" / name
    for i, arm in enumerate(arms):
        print(f"[{i + 1}/{len(arms)}] {arm.label}: {len(arm.full_steps)} full of {arm.steps} steps", flush=True)
        sample(arm, samples / arm.name, images, args.batch_size)

    print("timing full and cached steps", flush=True)
    where, timing = provenance("cpu"), time_arms(arms, branch, args.quick)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "timing.json", {"kind": "throughput", **timing, "provenance": where})
    results, extractor = {}, EffLite0()
    for arm in tqdm(arms, desc="judging", unit="arm"):
        macs = average(full, cached, arm.full_steps, arm.steps)
        results[arm.name] = {"kind": "demo", "arm": arm.name, "label": arm.label, "steps": arm.steps,
                             "full_steps": arm.full_steps,
                             "macs": {"hook": macs.hook * arm.steps, "fc": macs.fc * arm.steps, "per": "image"},
                             **judge(samples / arm.name, samples / "uncached", extractor), "provenance": where}
        write_json(folder / f"{arm.name}.json", results[arm.name])
    table = report(results, timing, where)
    write_atomically(folder / "table.md", lambda temporary: temporary.write_text(table))
    pictures(arms, results, folder, samples)
    print(f"\n{table}\nwrote {folder.relative_to(ROOT)}/: table.md, samples.png, cost_quality.png, one JSON per arm")


if __name__ == "__main__":
    main()
