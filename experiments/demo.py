"""DeepCache on the models that are shipped here, end to end: sample every arm, judge it, time it, draw it.

    python -m scripts.demo              about half an hour on 2 cores
    python -m scripts.demo --quick      about five minutes: fewer images, steps and arms

All arms of a model start from the same seeds, so their images can be compared one by one. Images go to
samples/demo/MODEL/ARM, results to results/demo/ (demo_quick with --quick). A second run reuses the images.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eval.cost.macs import giga
from eval.cost.runs import macs_per_step
from eval.metrics.images import open_images
from eval.metrics.registry import MEASURES
from eval.quality import FD, KID
from eval.tables.plots import cost_against_quality, sample_rows
from eval.tables.render import speed_of
from experiments.arms import Arm, Given
from experiments.demo_report import report
from experiments.runner import judge_all, sample_on_all_cores, time_steps
from runs import results
from runs.cli import command
from runs.errors import UserError
from runs.files import ROOT, write_atomically
from runs.prompts import read_prompts
from runs.results import Result
from runs.spec import RunSpec

POWER = 1.4                                 # of the non-uniform arms, with the center at 40 % of the steps: about where
CENTER = 0.4                                # the paper has them for LDM and SD; not tuned here
SHOWN = 16                                  # images per row of the pictures
PANELS = [(name, f"{heading} ({MEASURES[name].better} is better)") for name, heading in (
    (FD, MEASURES[FD].heading), (KID, MEASURES[KID].heading), ("PSNR", "PSNR to uncached, dB"))]


class Model(NamedTuple):
    """A model of a demo. name: of its folders. images: per arm. intervals: N of the caching arms. prompts: a file, for
    a model that takes them."""
    name: str
    config: Path
    title: str
    steps: int
    images: int
    intervals: tuple[int, ...]
    prompts: Path | None = None

    def condition(self, images: int) -> dict[str, Any]:
        """The options that say what so many images show."""
        if self.prompts is None:
            return {}
        prompts = len(read_prompts(ROOT / self.prompts))
        return {"prompts": self.prompts, "images_per_prompt": math.ceil(images / prompts)}

    def arm(self, given: Given, kind: str, name: str, label: str, style: str, **options: Any) -> Arm:
        """An arm of so many steps, unless the options have others."""
        images = given.images or self.images
        run = RunSpec.of(self.config, **{"steps": self.steps, **self.condition(images), **options}).open()
        folder, result = given.samples / self.name / name, given.results / self.name / f"{name}.json"
        return Arm(label, run, images, folder, kind, result, given.machine, style=style)


MODELS = (Model("ddpm", Path("configs/ddpm_emoji.yaml"), "DDPM in pixels, branch 2", 100, 256, (2, 3, 5, 10)),
          Model("ldm", Path("configs/ldm_emoji.yaml"), "LDM in latents, by class, guidance 1.5, branch 0", 50, 256,
                (2, 3, 5, 10)),
          Model("sd", Path("configs/sd_emoji.yaml"), "Stable Diffusion's layout, by prompt, guidance 4, branch 1", 50,
                192, (2, 5), Path("data/emoji/prompts.txt")))


def plan(model: Model, given: Given, quick: bool) -> list[Arm]:
    """The arms of a model, the uncached one first."""
    def arm(name: str, label: str, style: str, **options: Any) -> Arm:
        return model.arm(given, "demo", name, label, style, **options)

    def fewer(name: str, style: str, steps: int) -> Arm:
        return arm(name, f"{whole.run.sampler_name.upper()} {steps}", style, steps=steps)

    intervals, center = ((5, 10) if quick else model.intervals), round(CENTER * model.steps)
    whole = arm("uncached", "no cache", "uncached")
    uniform = [arm(f"n{n}", f"N={n}", "uniform", interval=n) for n in intervals]
    arms = [whole, *uniform]
    if not quick:
        arms += [arm(f"n{n}_centered", f"N={n} non-uniform", "non-uniform", interval=n, schedule="centered",
                     center=center, power=POWER) for n in intervals if n >= 5]
        of_full = [macs_per_step(cached.run).hook / macs_per_step(whole.run).hook for cached in uniform]
        arms += [fewer(f"equal{n}", "fewer steps", round(model.steps * fraction))
                 for n, fraction in zip(intervals, of_full, strict=True)]
    arms.append(fewer(f"{whole.run.sampler_name}10", "ablation", 10))
    arms.append(arm("n10_zeroed", "N=10, cache zeroed", "ablation", interval=10, zero_cache=True))
    return arms


def time_arms(arms: Sequence[Arm], path: Path, rounds: int) -> None:
    """Time a full and a cached step, in turns, and from them a run of every arm, as a result at `path`."""
    path.unlink(missing_ok=True)
    time_steps(arms, path, ["--batch-size", "32", "--device", "cpu", "--repeats", str(rounds)])
    timing = results.read(path)
    speeds = {arm.name: speed_of([(path, timing)], arm.run, arms[0].run.calls) for arm in arms}
    details = {key: {name: getattr(speed, key) for name, speed in speeds.items() if speed}
               for key in ("images_per_second", "speedup")}
    results.write(path, dataclasses.replace(timing, details=details))


def point(arm: Arm, result: Result) -> dict[str, Any]:
    """What the charts of cost against quality show of an arm."""
    return {"family": arm.style, "label": arm.label, "cost": giga(result.details["macs_per_image"]["macs"]),
            **{name: [MEASURES[name].scale * value for value in result.metrics[name].bounds]
               for name, _ in PANELS if name in result.metrics}}


def show_samples(arms: Sequence[Arm], path: Path) -> None:
    """The first images of some arms, a row each."""
    sample_rows([(arm.label, next(open_images(arm.folder).batches(SHOWN))) for arm in arms], path)


def section(model: Model, folder: Path) -> str | None:
    """A model's part of table.md, from its results in `folder`; None where there are none."""
    timing = folder / model.name / "timing.json"
    if not timing.is_file():
        return None
    found = {result.details["arm"]: result for path, result in results.read_all(folder / model.name) if path != timing}
    in_order = dict(sorted(found.items(), key=lambda pair: pair[1].details["place"]))
    return f"## {model.title}\n\n" + report(in_order, results.read(timing))


def write_table(models: Sequence[Model], folder: Path, section: Callable[[Model, Path], str | None]) -> str:
    """Write table.md of the results in a folder."""
    text = "\n".join(filter(None, (section(model, folder) for model in models)))
    write_atomically(folder / "table.md", lambda temporary: temporary.write_text(text))
    return text


def parser_of(doc: str | None, images: str) -> argparse.ArgumentParser:
    """The options that the demos share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=[model.name for model in MODELS],
                        help="only these; the table keeps the results of the others")
    parser.add_argument("--images", type=int, help=f"images per arm (default: {images})")
    parser.add_argument("--batch-size", type=int, default=32, help="images at a time (default: %(default)s)")
    parser.add_argument("--samples", type=Path, help="folder of the images (default: in samples)")
    parser.add_argument("--results", type=Path, help="folder of the numbers (default: in results)")
    return parser


def given_by(args: argparse.Namespace, name: str) -> Given:
    """What the options of `parser_of` say. name: of the folders, by default. Raises UserError."""
    if args.images is not None and args.images < 80:
        raise UserError(f"--images must be 80 or more for the distances to mean something, got {args.images}")
    return Given(args.images, args.samples or Path("samples") / name, args.results or Path("results") / name,
                 machine={"batch_size": args.batch_size, "device": "cpu", "threads": 1})


@command
def main() -> None:
    parser = parser_of(__doc__, "256, of the slowest model 192; 80 with --quick")
    parser.add_argument("--quick", action="store_true", help="fewer images, steps and arms: about five minutes")
    args = parser.parse_args()
    given = given_by(args, "demo_quick" if args.quick else "demo")
    models = [model for model in MODELS if args.models is None or model.name in args.models]
    if args.quick:
        models = [model._replace(images=80, steps=min(50, model.steps)) for model in models]
    plans = {model: plan(model, given, args.quick) for model in models}
    sample_on_all_cores([arm for arms in plans.values() for arm in arms])
    for model, arms in plans.items():
        time_arms(arms, given.results / model.name / "timing.json", 5 if args.quick else 20)
        found = judge_all(arms)
        show_samples([arm for arm in arms if arm.style != "fewer steps" and arm.name != "n2"],
                     given.results / f"samples_{model.name}.png")
        cost_against_quality([point(arm, found[arm.name]) for arm in arms if arm.style != "ablation"],
                             given.results / f"cost_quality_{model.name}.png", PANELS)
    table = write_table(MODELS, given.results, section)
    print(f"\n{table}\nwrote {given.results}/: table.md, pictures, one JSON per arm")


if __name__ == "__main__":
    main()
