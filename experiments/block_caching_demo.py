"""DeepCache and Block Caching at equal MACs, on the models that are shipped here.

    python -m scripts.block_caching_demo                        DDPM and LDM
    python -m scripts.block_caching_demo --models ddpm --remake

Two budgets, about 0.5 and 0.3 of the uncached MACs: exactly what DeepCache costs at the interval that comes nearest.
Every other arm is given as much. First, what is not there of checkpoints/block_caching/ is made, by the verbs measure,
schedule and train of scripts.block_caching, on seeds that are not sampled; these commands are printed. Then all arms
start from the same seeds. Images go to samples/block_caching/MODEL/ARM, results to results/block_caching/.
"""

import argparse
import math
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from caching.block_schedule import BlockSchedule
from caching.deepcache import DeepCacheOptions, PlannedDeepCache
from caching.options import RunShape
from eval.cost.macs import Macs, average, giga
from eval.metrics.features import EffLite0
from eval.metrics.images import open_images
from eval.quality import FD, KID
from eval.tables.plots import sample_rows
from experiments import demo
from experiments.demo_report import markdown, shown, with_error
from planning.block_caching import ARMS, MEASURES, metric_name
from planning.block_changes import BlockChanges, ScheduleMaker
from planning.block_plots import at_equal_cost
from runs import results
from runs.cli import command
from runs.errors import UserError
from runs.families import load_config, rows_per_image
from runs.files import write_atomically
from runs.prompts import read_prompts
from runs.results import Result

ROOT = demo.ROOT
FILES = ROOT / "checkpoints" / "block_caching"
BUDGETS = (0.5, 0.3)
MEASURED, TRAINED, HELD_OUT = 64, 32, 32        # seeds; the paper measures 64 runs
HEAD = ("arm", "MACs per image, G", "of uncached", "FD-EffLite0", "KID-EffLite0 x 1000", "PSNR to uncached, dB", "SSIM")


class Arm(NamedTuple):
    """One way to sample; macs: per network call and row. The fields of `scripts.demo.Arm` that sampling needs."""
    name: str
    label: str
    family: str                 # a key of eval.tables.plots.STYLE
    macs: Macs
    calls: int
    options: list[str]          # of the sample command


class Files:
    """Schedules and scale-shift files of one model, made where they are absent."""

    def __init__(self, model: demo.Model, images: int, remake: bool):
        self.model, self.remake = model, remake
        FILES.mkdir(parents=True, exist_ok=True)
        # Every third of the seeds that are not sampled: measured, learnt from, judged on.
        unused = range(images, images + 3 * max(MEASURED, TRAINED, HELD_OUT))
        self.common = ["--config", str(model.config.relative_to(ROOT)), "--steps", str(model.steps), "--device", "cpu",
                       "--threads", "1"]                # small networks only wait for a second one
        if model.prompts is not None:
            prompts = len(read_prompts(model.prompts))
            each = math.ceil(unused.stop / prompts)
            unused = range(images, each * prompts)
            self.common += ["--prompts", str(model.prompts.relative_to(ROOT)), "--images-per-prompt", str(each)]
        stride = len(unused) // max(MEASURED, TRAINED, HELD_OUT)
        self.seeds = [",".join(str(seed) for seed in unused[i::stride][:n])
                      for i, n in enumerate((MEASURED, TRAINED, HELD_OUT))]

    def path(self, name: str, suffix: str = ".json") -> Path:
        return FILES / f"{self.model.name}_{name}{suffix}"

    def make(self, path: Path, *words: str) -> Path:
        """Run a verb of scripts.block_caching that writes `path`, and last its report, unless all is there."""
        last = path.with_suffix(".scale_shift.json") if path.suffix == ".safetensors" else path
        if self.remake or not (path.is_file() and last.is_file()):
            words = ["-m", "scripts.block_caching", *words, "--out", str(path.relative_to(ROOT))]
            print("python", *words, flush=True)
            if subprocess.run([sys.executable, *words], cwd=ROOT).returncode:
                raise UserError(f"this failed: python {' '.join(words)}")
        return path

    def changes(self) -> BlockChanges:
        return BlockChanges.load(self.make(self.path("changes"), "measure", *self.common, "--seeds", self.seeds[0]))

    def schedule(self, name: str, *words: str) -> Path:
        changes = str(self.path("changes").relative_to(ROOT))
        return self.make(self.path(name), "schedule", "--changes", changes, *words)

    def scale_shift(self, name: str) -> Path:
        return self.make(self.path(name, ".safetensors"), "train", *self.common, "--schedule",
                         str(self.path(name).relative_to(ROOT)), "--seeds", self.seeds[1],
                         "--held-out-seeds", self.seeds[2])


def arms_of(model: demo.Model, files: Files) -> list[Arm]:
    """The arms of a model, the uncached one first; makes the files that they need."""
    changes, config = files.changes(), load_config(model.config)
    steps, calls, branch = model.steps, changes.calls, config.sampler.branch
    full, cached = Macs(*changes.macs_full), Macs(*changes.macs_cached[branch])

    def deepcache(n: int, schedule: str = "uniform", center: int | None = None, at: int = branch) -> PlannedDeepCache:
        options = DeepCacheOptions(n, at, schedule, center, None if center is None else demo.POWER)
        return options.plan(RunShape(steps, calls, len(changes.macs_cached), branch), ())

    def macs(level: PlannedDeepCache) -> Macs:
        return average(full, cached, level.full_steps, calls)

    def scheduled(path: Path, name: str, label: str, family: str) -> list[Arm]:
        cost = Macs(**BlockSchedule.load(path).macs)
        run = ["--steps", str(steps), "--block-schedule", str(path.relative_to(ROOT))]
        table = files.scale_shift(name)
        return [Arm(name, label, family, cost, calls, run),
                Arm(f"{name}_scale_shift", f"{label}, scale-shift", family if family == "transformers only" else
                    "block caching, scale-shift", cost, calls, [*run, "--scale-shift", str(table.relative_to(ROOT))])]

    arms = [Arm("uncached", "no cache", "uncached", full, calls, ["--steps", str(steps)])]
    path = files.schedule("transformer", "--kinds", "transformer", "--delta", "0.5")
    arms += scheduled(path, "transformer", "transformers, delta 0.5", "transformers only")
    center = round(demo.CENTER * steps)
    for budget in BUDGETS:
        n = min(range(2, steps // 2), key=lambda n: abs(macs(deepcache(n)).hook / full.hook - budget))
        uniform = macs(deepcache(n))
        fraction = uniform.hook / full.hook
        run = ["--steps", str(steps), "--interval", str(n)]
        arms.append(Arm(f"n{n}", f"N={n}", "uniform", uniform, calls, run))
        plan = deepcache(n, "centered", center)
        arms.append(Arm(f"n{n}_centered", f"N={n} non-uniform", "non-uniform", macs(plan), calls,
                        [*run, "--schedule", "centered", "--center", str(center), "--power", str(demo.POWER)]))
        name = f"all_{round(100 * budget)}"
        path = files.schedule(name, "--kinds", "all", "--macs", f"{fraction:.6f}")
        arms += scheduled(path, name, f"blocks {fraction:.2f}", "block caching")

        # Together: more full steps than DeepCache alone has, paid for by the blocks outside its level; at the
        # outermost branch that leaves them a tenth of the budget to choose with.
        more = max(2, round(2 * n / 3))
        for at in range(branch + (more == n), len(changes.macs_cached)):
            maker = ScheduleMaker(changes, "all", deepcache(more, at=at))
            if maker.macs({key: [0] for key in maker.measured}).hook <= 0.9 * uniform.hook:
                name = f"together_{round(100 * budget)}"
                options = ["--interval", str(more), "--branch", str(at)]
                path = files.schedule(name, "--kinds", "all", "--macs", f"{fraction:.6f}", *options)
                level = "" if at == branch else f" at branch {at}"
                arms.append(Arm(name, f"N={more}{level} and blocks", "together",
                                maker.macs(BlockSchedule.load(path).blocks), calls,
                                ["--steps", str(steps), *options, "--block-schedule", str(path.relative_to(ROOT))]))
                break
        fewer = round(fraction * steps)
        arms.append(Arm(f"steps{fewer}", f"{model.sampler} {fewer}", "fewer steps", full,
                        fewer + calls - steps, ["--steps", str(fewer)]))
    return arms


def row(arm: Result, whole: float) -> tuple[str, ...]:
    """A line of the table; a dash where there is nothing to compare with."""
    macs = arm.details["macs_per_image"]["macs"]
    return (arm.details["label"], f"{giga(macs):.2f}", f"{macs / whole:.3f}", with_error(arm.metrics[FD]),
            with_error(arm.metrics[KID], 1e3), shown(arm, "PSNR", 1), shown(arm, "SSIM", 3))


def section(model: demo.Model, folder: Path) -> str | None:
    """A model's part of table.md, from its results in `folder`; None where there are none."""
    arms = sorted((arm for _, arm in results.read_all(folder / model.name)), key=lambda arm: arm.details["place"])
    if not arms:
        return None
    table = markdown([HEAD, *(row(arm, arms[0].details["macs_per_image"]["macs"]) for arm in arms)])
    return "\n".join([f"## {model.title}", "", *table, "", *learnt(model), ""])


def learnt(model: demo.Model) -> list[str]:
    """What scale-shift does on the seeds that it was judged on."""
    rows = [("schedule", "distance to uncached of", "without", "with scale-shift", "difference, 95% interval")]
    for path in sorted(FILES.glob(f"{model.name}_*.safetensors")):
        found = results.read(path.with_suffix(".scale_shift.json"))
        for measure in MEASURES:
            plain, adjusted, difference = (found.metrics[metric_name(measure, arm)] for arm in ARMS)
            low, high = difference.interval
            rows.append((path.stem, measure, f"{plain.value:.4f}", f"{adjusted.value:.4f}",
                         f"{difference.value:.4f} [{low:.4f}, {high:.4f}]"))
    return markdown(rows)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=[model.name for model in demo.MODELS], default=["ddpm", "ldm"],
                        help="default: ddpm ldm; the table keeps the results of others. sd takes the longest by far")
    parser.add_argument("--images", type=int, default=128, help="per arm (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="images at a time (default: %(default)s)")
    parser.add_argument("--remake", action="store_true", help="make schedules and scale-shift files anew")
    args = parser.parse_args()
    if args.images < 80:
        raise UserError(f"--images must be 80 or more for the distances to mean something, got {args.images}")
    samples, folder = ROOT / "samples" / "block_caching", ROOT / "results" / "block_caching"
    extractor = EffLite0()
    for model in demo.MODELS:
        if model.name not in args.models:
            continue
        root, files = samples / model.name, Files(model, args.images, args.remake)
        arms = arms_of(model, files)
        for i, arm in enumerate(arms):
            print(f"[{i + 1}/{len(arms)}] {model.name}: {arm.label}", flush=True)
            demo.sample(model, arm, root / arm.name, args.images, args.batch_size)
        rows, points = rows_per_image(load_config(model.config)), []
        for place, arm in enumerate(tqdm(arms, desc=f"judging {model.name}", unit="arm")):
            result = demo.judge("block caching demo", model, arm.macs,
                                Macs(*(value * arm.calls * rows for value in arm.macs)), root / arm.name,
                                root / "uncached", extractor, arm=arm.name, label=arm.label, place=place)
            results.write(folder / model.name / f"{arm.name}.json", result)
            points.append(demo.point(arm.family, result))
        at_equal_cost(points, folder / f"equal_cost_{model.name}.png", demo.PANELS)
        sample_rows([(arm.label, next(open_images(root / arm.name).batches(demo.SHOWN))) for arm in arms],
                    folder / f"samples_{model.name}.png")
        text = "\n".join(filter(None, (section(model, folder) for model in demo.MODELS)))
        write_atomically(folder / "table.md", lambda temporary, text=text: temporary.write_text(text))
    print(f"\n{text}\nwrote {folder.relative_to(ROOT)}/: table.md, pictures, one JSON per arm; charts and curves are "
          f"in {FILES.relative_to(ROOT)}/")


if __name__ == "__main__":
    main()
