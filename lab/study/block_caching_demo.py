"""DeepCache and Block Caching at equal MACs, on the models that are shipped here.

    python -m scripts.block_caching_demo                        DDPM and LDM
    python -m scripts.block_caching_demo --models ddpm --remake

Two budgets, about 0.5 and 0.3 of the uncached MACs: exactly what DeepCache costs at the interval that comes nearest.
Every other arm is given as much. First, what is not there of checkpoints/block_caching/ is made, by lab.fit (changes,
block-schedule and scale-shift), on seeds that are not sampled; these commands are printed. Then all arms
start from the same seeds. Images go to samples/block_caching/MODEL/ARM, results to results/block_caching/.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from eval.cost.macs import giga
from eval.cost.runs import macs_per_step
from eval.metrics.registry import MEASURES
from eval.tables.page import Page, Section
from eval.tables.page import write as write_page
from eval.tables.text import markdown
from lab.fit.block_schedule import ScheduleMaker
from lab.fit.changes import BlockChanges
from lab.fit.teacher import MEASURES as DISTANCES
from lab.study import demo, pages
from lab.study.arms import Arm, Given
from lab.study.demo_report import distances, distances_of, pairs, panels
from lab.study.equal_cost import at_equal_cost
from lab.study.runner import judge_all, python, sample_on_all_cores
from run import results
from run.cli import command
from run.files import ROOT
from run.results import Result
from run.spec import RunSpec

FILES = Path("checkpoints/block_caching")
BUDGETS = (0.5, 0.3)
SEEDS = 64, 32, 32              # measured, learnt from, judged on; the paper measures 64 runs


def make(line: list[str], out: Path) -> None:
    """Something that lab.fit writes to `out`. Raises UserError where it fails."""
    line = ["-m", "lab.fit", *line, "--out", str(out)]
    print("python", *line, flush=True)
    python(line, line[2])


class Files:
    """Schedules and scale-shift files of one model, made where they are absent."""

    def __init__(self, model: demo.Model, images: int, remake: bool):
        self.name, self.remake = model.name, remake
        (ROOT / FILES).mkdir(parents=True, exist_ok=True)
        # Every third of the seeds that are not sampled: measured, learnt from, judged on.
        end = images + 3 * max(SEEDS)
        condition = model.condition(end)
        if model.prompts is not None:
            end = condition["images_per_prompt"] * len(demo.read_prompts(ROOT / model.prompts))
        unused = range(images, end)
        stride = len(unused) // max(SEEDS)
        self.seeds = [",".join(str(seed) for seed in unused[i::stride][:n]) for i, n in enumerate(SEEDS)]
        # Small networks only wait for a second thread.
        self.run = [*RunSpec.of(model.config, steps=model.steps, **condition).words(), "--device", "cpu", "--threads",
                    "1"]

    def path(self, name: str, suffix: str = ".json") -> Path:
        return FILES / f"{self.name}_{name}{suffix}"

    def made(self, path: Path, *words: str, last: Path | None = None) -> Path:
        """`path`, written by lab.fit, and `last` after it, unless all is there."""
        if self.remake or not ((ROOT / path).is_file() and (ROOT / (last or path)).is_file()):
            make(list(words), path)
        return path

    def changes(self) -> BlockChanges:
        path = self.made(self.path("changes"), "changes", *self.run, "--seeds", self.seeds[0])
        return BlockChanges.load(ROOT / path)

    def schedule(self, name: str, *words: str) -> Path:
        return self.made(self.path(name), "block-schedule", "--changes", str(self.path("changes")), *words)

    def scale_shift(self, name: str) -> Path:
        return self.made(self.path(name, ".safetensors"), "scale-shift", *self.run, "--block-schedule",
                         str(self.path(name)),
                         "--seeds", self.seeds[1], "--held-out-seeds", self.seeds[2],
                         last=self.path(name, ".scale_shift.json"))


def plan(model: demo.Model, given: Given, files: Files) -> Iterator[Arm]:
    """The arms of a model, the uncached one first; makes the files that they need."""
    changes, center = files.changes(), round(demo.CENTER * model.steps)

    def arm(name: str, label: str, style: str, **options: Any) -> Arm:
        return model.arm(given, "block caching demo", name, label, style, demo.others(), **options)

    def scheduled(name: str, label: str, style: str, *words: str) -> Iterator[Arm]:
        path = files.schedule(name, *words)
        yield arm(name, label, style, block_schedule=path)
        yield arm(f"{name}_scale_shift", f"{label}, scale-shift", style if style == "transformers only" else
                  "block caching, scale-shift", block_schedule=path, scale_shift=files.scale_shift(name))

    whole = arm("uncached", "no cache", "uncached")

    def of_full(arm: Arm) -> float:
        return macs_per_step(arm.run).hook / macs_per_step(whole.run).hook

    yield whole
    yield from scheduled("transformer", "transformers, delta 0.5", "transformers only", "--kinds", "transformer",
                         "--delta", "0.5")
    for budget in BUDGETS:
        uniform = min((arm(f"n{n}", f"N={n}", "uniform", interval=n) for n in range(2, model.steps // 2)),
                      key=lambda one: abs(of_full(one) - budget))
        n, fraction = uniform.run.caching.settings["interval"], of_full(uniform)
        yield uniform
        yield arm(f"n{n}_centered", f"N={n} non-uniform", "non-uniform", interval=n, schedule="centered", center=center,
                  power=demo.POWER)
        percent, words = round(100 * budget), ("--kinds", "all", "--macs", f"{fraction:.6f}")
        yield from scheduled(f"all_{percent}", f"blocks {fraction:.2f}", "block caching", *words)

        # Together: more full steps than DeepCache alone has, paid for by the blocks outside its level; at the
        # outermost branch that leaves them a tenth of the budget to choose with.
        more, branch = max(2, round(2 * n / 3)), whole.run.config.sampler.branch
        for at in range(branch + (more == n), whole.run.unet.num_branches):
            level = arm("level", "", "", interval=more, branch=at).run
            maker = ScheduleMaker(changes, "all", level.deepcache)
            if maker.macs({key: [0] for key in maker.measured}).hook <= 0.9 * fraction * maker.full.hook:
                name, where = f"together_{percent}", "" if at == branch else f" at branch {at}"
                path = files.schedule(name, *words, "--interval", str(more), "--branch", str(at))
                yield arm(name, f"N={more}{where} and blocks", "together", interval=more, branch=at,
                          block_schedule=path)
                break
        fewer = round(fraction * model.steps)
        yield arm(f"steps{fewer}", f"{whole.run.sampler.name.upper()} {fewer}", "fewer steps", steps=fewer)


def rows(arms: Sequence[Result]) -> list[tuple[str, ...]]:
    """The table of some arms, the uncached one first; a dash where there is nothing to compare with."""
    names, whole = distances_of(arms), arms[0].details["macs_per_image"]["macs"]
    found: list[tuple[str, ...]] = [("arm", "MACs per image, G", "of uncached",
                                     *(MEASURES[name].heading for name in names))]
    for arm in arms:
        macs = arm.details["macs_per_image"]["macs"]
        found.append((arm.details["label"], f"{giga(macs):.2f}", f"{macs / whole:.3f}", *distances(arm, names)))
    return [(*row, *pair[:2]) for row, pair in zip(found, pairs(arms), strict=True)]


def section(model: demo.Model, folder: Path) -> str | None:
    """A model's part of table.md, from its results in `folder`; None where there are none."""
    arms = sorted((arm for _, arm in results.read_all(folder / model.name)), key=lambda arm: arm.details["place"])
    return "\n".join([f"## {model.title}", "", *markdown(rows(arms)), "", *learnt(model), ""]) if arms else None


def learnt(model: demo.Model) -> list[str]:
    """What scale-shift does on the seeds that it was judged on."""
    rows = [("schedule", "distance to uncached of", "without", "with scale-shift", "difference, 95% interval")]
    for path in sorted((ROOT / FILES).glob(f"{model.name}_*.safetensors")):
        found = results.read(path.with_suffix(".scale_shift.json"))
        for measure in DISTANCES:
            plain, adjusted, difference = (
                found.metrics[f"{measure}, {arm}"] for arm in ("plain", "adjusted", "adjusted less plain"))
            rows.append((path.stem, measure, f"{plain.value:.4f}", f"{adjusted.value:.4f}",
                         "{:.4f} [{:.4f}, {:.4f}]".format(*difference.bounds)))
    return markdown(rows)


@command
def main() -> None:
    parser = demo.parser_of(__doc__, "128")
    parser.add_argument("--remake", action="store_true", help="make schedules and scale-shift files anew")
    parser.set_defaults(images=128, models=["ddpm", "ldm"])         # sd takes the longest by far
    args = parser.parse_args()
    given, text = demo.given_by(args, "block_caching"), ""
    sections: list[Section] = []
    for model in (model for model in demo.MODELS if model.name in args.models):
        arms = list(plan(model, given, Files(model, args.images, args.remake)))
        sample_on_all_cores(arms)
        found = judge_all(arms)
        charts = panels(found.values())
        at_equal_cost([demo.point(arm, found[arm.name]) for arm in arms],
                      given.results / f"equal_cost_{model.name}.png", charts)
        demo.show_samples(arms, given.results / f"samples_{model.name}.png")
        text = demo.write_table(demo.MODELS, given.results, section)
        shown = [demo.plot(arms, found, *panel) for panel in charts]
        sections.append(pages.section(model.title, [], rows([*found.values()]), shown, arms))
        write_page(Page("Block Caching and DeepCache at equal cost", [
            "Every arm of a model starts from the same seeds."], sections, pages.made_by(
                "python -m scripts.block_caching_demo")), given.results / "index.html")
    print(f"\n{text}\nwrote {given.results}/: index.html, table.md, pictures, one JSON per arm; charts and curves are "
          f"in {FILES}/")


if __name__ == "__main__":
    main()
