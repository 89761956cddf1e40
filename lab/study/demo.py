"""The whole demo of DeepCache on the models that are shipped here: `python -m scripts.demo --full`.

Samples every arm, judges it, times it, draws it; results/demo/ holds what came of it. lab/study/demo_short.py is the
demo without `--full`, and has the command.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from eval.cost.macs import giga
from eval.cost.runs import macs_per_step
from eval.metrics import incmixed5
from eval.metrics.images import open_images
from eval.metrics.registry import MEASURES
from eval.tables.page import Page, Section
from eval.tables.page import write as write_page
from eval.tables.plots import cost_against_quality, sample_rows
from eval.tables.render import speed_of
from eval.tables.svg import Line, Mark, Plot
from lab.study import pages
from lab.study.arms import Arm, Given
from lab.study.demo_report import arm_rows, panels, report
from lab.study.runner import FEWEST, judged, sampled, time_steps
from run import results
from run.files import ROOT, write_atomically
from run.prompts import read_prompts
from run.results import Result
from run.spec import RunSpec
from unet_caching.errors import UserError

POWER = 1.4                                 # of the non-uniform arms, with the center at 40 % of the steps: about where
CENTER = 0.4                                # the paper has them for LDM and SD; not tuned here
SHOWN = 16                                  # images per row of the pictures


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

    def arm(self, given: Given, kind: str, name: str, label: str, style: str, others: tuple[str, ...] = (),
            **options: Any) -> Arm:
        """An arm of so many steps, unless the options have others. others: extractors that judge it, too."""
        images = given.images or self.images
        run = RunSpec.of(self.config, **{"steps": self.steps, **self.condition(images), **options}).open()
        folder, result = given.samples / self.name / name, given.results / self.name / f"{name}.json"
        return Arm(label, run, images, folder, kind, result, given.machine, style=style, others=others)


MODELS = (Model("ddpm", Path("configs/ddpm_emoji.yaml"), "DDPM in pixels, branch 2", 100, 256, (2, 3, 5, 10)),
          Model("ldm", Path("configs/ldm_emoji.yaml"), "LDM in latents, by class, guidance 1.5, branch 0", 50, 256,
                (2, 3, 5, 10)),
          Model("sd", Path("configs/sd_emoji.yaml"), "Stable Diffusion's layout, by prompt, guidance 4, branch 1", 50,
                192, (2, 5), Path("data/emoji/prompts.txt")))


def others() -> tuple[str, ...]:
    """The extractors beside EffLite0 whose files are there (scripts/download.sh fetches them)."""
    return ("incmixed5",) if incmixed5.ARCHIVE.is_file() else ()


def plan(model: Model, given: Given) -> list[Arm]:
    """The arms of a model, the uncached one first."""
    def arm(name: str, label: str, style: str, **options: Any) -> Arm:
        return model.arm(given, "demo", name, label, style, others(), **options)

    def fewer(name: str, style: str, steps: int) -> Arm:
        return arm(name, f"{whole.run.sampler.name.upper()} {steps}", style, steps=steps)

    intervals, center = model.intervals, round(CENTER * model.steps)
    whole = arm("uncached", "no cache", "uncached")
    uniform = [arm(f"n{n}", f"N={n}", "uniform", interval=n) for n in intervals]
    arms = [whole, *uniform]
    arms += [arm(f"n{n}_centered", f"N={n} non-uniform", "non-uniform", interval=n, schedule="centered", center=center,
                 power=POWER) for n in intervals if n >= 5]
    of_full = [macs_per_step(cached.run).hook / macs_per_step(whole.run).hook for cached in uniform]
    arms += [fewer(f"equal{n}", "fewer steps", round(model.steps * fraction))
             for n, fraction in zip(intervals, of_full, strict=True)]
    arms.append(fewer(f"{whole.run.sampler.name}10", "ablation", 10))
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
               for name in result.metrics if name in MEASURES}}


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


def parser_of(doc: str | None, images: str, batch_size: str = "32") -> argparse.ArgumentParser:
    """The options that the demos share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=[model.name for model in MODELS],
                        help="only these; the table keeps the results of the others")
    parser.add_argument("--images", type=int, help=f"images per arm (default: {images})")
    parser.add_argument("--batch-size", type=int, default=32, help=f"images at a time (default: {batch_size})")
    parser.add_argument("--samples", type=Path, help="folder of the images (default: in samples)")
    parser.add_argument("--results", type=Path, help="folder of the numbers (default: in results)")
    return parser


def given_by(args: argparse.Namespace, name: str, fewest: int = FEWEST) -> Given:
    """What the options of `parser_of` say. name: of the folders, by default. Raises UserError."""
    if args.images is not None and args.images < fewest:
        raise UserError(f"--images must be {fewest} or more for the distances to mean something, got {args.images}")
    return Given(args.images, args.samples or Path("samples") / name, args.results or Path("results") / name,
                 machine={"batch_size": args.batch_size, "device": "cpu", "threads": 1})


def plot(arms: Sequence[Arm], found: Mapping[str, Result], name: str, label: str) -> Plot:
    """A measure of the arms against their cost."""
    lines: dict[str, list[Mark]] = {}
    for arm in arms:
        if name in found[arm.name].metrics and arm.style != "ablation":
            value, low, high = (MEASURES[name].scale * value for value in found[arm.name].metrics[name].bounds)
            cost = giga(found[arm.name].details["macs_per_image"]["macs"])
            lines.setdefault(arm.style, []).append(pages.mark(arm, cost, (value, low, high)))
    return Plot(label, "MACs per image, G", label, [Line(style, sorted(marks, key=lambda one: one.x))
                                                    for style, marks in lines.items()])


def section_of_page(model: Model, arms: Sequence[Arm], found: Mapping[str, Result], given: Given) -> Section:
    """A model's part of the page. found: the results of its arms, by name."""
    rows = arm_rows(dict(found), results.read(given.results / model.name / "timing.json"))
    shown = sorted(arms, key=lambda arm: arm.style == "fewer steps")            # the first of them have pictures
    return pages.section(model.title, [], rows, [plot(arms, found, *panel) for panel in panels(found.values())], shown)


def run_full(models: Sequence[Model], given: Given) -> None:
    """Sample, judge, time and draw all arms of some models, and go on where that stopped. Raises UserError."""
    plans = {model: plan(model, given) for model in models}
    found: dict[Model, dict[str, Result]] = {model: {} for model in models}
    sections: list[Section] = []
    with closing(sampled([arm for arms in plans.values() for arm in arms])) as done:
        for arm in done:
            model, arms = next((model, arms) for model, arms in plans.items() if arm in arms)
            found[model][arm.name] = judged(arm, arms)
            if len(found[model]) == len(arms):
                finish(model, arms, found[model], given)
                sections.append(section_of_page(model, arms, found[model], given))
                write_page(Page("DeepCache on small models", ["Every arm of a model starts from the same seeds."],
                                sections, pages.made_by("python -m scripts.demo --full")), given.results / "index.html")
    print(f"\n{(given.results / 'table.md').read_text()}\nwrote {given.results}/: index.html, table.md, pictures, one "
          "JSON per arm")


def finish(model: Model, arms: Sequence[Arm], found: Mapping[str, Result], given: Given) -> None:
    """Time the arms of a model that is judged; write its pictures, and the table of all that are."""
    time_arms(arms, given.results / model.name / "timing.json", 20)
    show_samples([arm for arm in arms if arm.style != "fewer steps" and arm.name != "n2"],
                 given.results / f"samples_{model.name}.png")
    cost_against_quality([point(arm, found[arm.name]) for arm in arms if arm.style != "ablation"],
                         given.results / f"cost_quality_{model.name}.png", panels(found.values()))
    write_table(MODELS, given.results, section)
