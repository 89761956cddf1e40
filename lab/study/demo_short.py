"""Caching, forecasts and fewer steps at equal cost, on the models that are shipped here: sample, judge, time, look.

    python -m scripts.demo              three to five minutes on 2 cores
    python -m scripts.demo --full       about 40 minutes: all that results/demo/ holds (lab/study/demo.py)

All arms of a model start from the same seeds, so their images can be compared one by one. Table, pictures and a page to
look at (index.html) are written anew after every arm: what is there when it is stopped can be read, and the same
command goes on. Images go to samples/demo_short/MODEL/ARM, the rest to results/demo_short/ (demo with --full).
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from eval.cost.runs import in_full_calls
from eval.metrics.images import open_images
from eval.metrics.intervals import mean_estimate
from eval.quality import KID
from eval.tables.page import Page, Section
from eval.tables.page import write as write_page
from eval.tables.plots import sample_rows
from eval.tables.render import speed_of
from eval.tables.svg import Line, Plot
from eval.tables.text import markdown
from lab.study import demo, pages
from lab.study.arms import Arm, Given
from lab.study.demo import Model
from lab.study.runner import in_this_process, judged, minus_uncached, sampled, time_steps, times_paths
from run import results
from run.cli import command
from run.files import write_atomically
from run.results import Metric, Result

IMAGES = {"ldm": 40, "sd": 24, "ddpm": 24}      # of each arm; the model comes first whose images cost least
TITLES = {"ldm": "Latent model, by class", "sd": "Text model, by prompt", "ddpm": "Pixel model"}
PLANS = {"ldm": Path("checkpoints/plans/ldm_emoji_12.json")}
STEPS, INTERVAL, FEWEST = 50, 3, 8
SOLVER = {"sampler": "unipc", "timesteps": "trailing"}
HEAD = ("arm", "cost, full calls", "speed-up by MACs", "measured", "PSNR to no cache, dB", "less fewer steps, dB",
        "KID-EffLite0 less no cache, x 1000")
Found = Mapping[str, Result]        # by the name of the arm, of one model


def calls(arm: Arm) -> float:
    """The cost of an image: full network calls that have as many multiply-accumulates."""
    return _calls(arm.run)


_calls = cache(in_full_calls)       # the table and the page ask again after every arm


def plan(model: Model, given: Given) -> list[Arm]:
    """The arms of a model, the uncached one first: at one third of its calls reuse, forecast and fewer steps; at the
    cost of a plan, where one is shipped, that and fewer steps."""
    def arm(name: str, label: str, style: str, **options: Any) -> Arm:
        return model.arm(given, "demo", name, label, style, **options)

    def fewer(other: Arm) -> Arm:
        steps = round(calls(other))
        return arm(f"unipc{steps}", f"{steps} steps", "fewer steps", steps=steps, **SOLVER)

    cached = {"branch": 0, "interval": INTERVAL, **SOLVER}
    reuse = arm(f"n{INTERVAL}", f"DeepCache, N={INTERVAL}", "uniform", **cached)
    arms = [arm("uncached", f"no cache, {STEPS} steps", "uncached", **SOLVER), reuse,
            arm(f"n{INTERVAL}_forecast", f"forecast, N={INTERVAL}", "forecast", forecast=1, **cached), fewer(reuse)]
    if model.name in PLANS:
        planned = arm("plan", "plan", "plan", steps=None, plan=PLANS[model.name])
        arms += [planned, fewer(planned)]
    return arms


def rival(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """The run of fewer steps at the cost of a cached one."""
    near = [other for other in arms if other.style == "fewer steps" and abs(calls(other) - calls(arm)) < 1]
    return near[0] if near and arm.style not in ("fewer steps", "uncached") else None


def decibels(result: Result) -> np.ndarray:
    """PSNR to the uncached image of each seed: float64 [seeds]; very much where they are the same."""
    near = result.details["fidelity"]["per_image"]["psnr"]
    return np.array([100.0 if value is None else value for value in near])


def beside(arm: Arm, arms: Sequence[Arm], found: Found) -> Metric | None:
    """How much nearer to the uncached images than fewer steps at its cost, dB, paired by seed."""
    other = rival(arm, arms)
    if other is None or arm.name not in found or other.name not in found:
        return None
    return Metric.of(mean_estimate(decibels(found[arm.name]) - decibels(found[other.name])))


def shown(metric: Metric | None, form: str, scale: float = 1) -> str:
    """A number and its interval, or a dash."""
    return "-" if metric is None else f"{{:{form}}} [{{:{form}}}, {{:{form}}}]".format(
        *(scale * value for value in metric.bounds))


def row(arm: Arm, arms: Sequence[Arm], found: Found, speedups: Mapping[str, float]) -> tuple[str, ...]:
    """A line of the table; dashes for what is not known yet."""
    metrics = found[arm.name].metrics if arm.name in found else {}
    return (arm.label, f"{calls(arm):.1f}", f"{calls(arms[0]) / calls(arm):.2f}x",
            f"{speedups[arm.name]:.2f}x" if arm.name in speedups else "-", shown(metrics.get("PSNR"), ".1f"),
            shown(beside(arm, arms, found), "+.1f"), shown(metrics.get(minus_uncached(KID)), "+.0f", 1e3))


def sentence(arm: Arm, arms: Sequence[Arm], found: Found) -> str | None:
    """How a cached run compares with fewer steps; None where that is not known yet."""
    gain, other = beside(arm, arms, found), rival(arm, arms)
    if gain is None or other is None:
        return None
    value, low, high = gain.bounds
    start = f"At the cost of {calls(arm):.1f} full calls, {arm.label}: {abs(value):.1f} dB "
    if low <= 0 <= high:
        return f"{start}from {other.label}, which may be chance."
    near, far = sorted((abs(low), abs(high)))
    return (f"{start}{'nearer to' if value > 0 else 'further from'} the uncached images than {other.label} "
            f"({near:.1f} to {far:.1f}).")


def section(model: Model, arms: Sequence[Arm], found: Found, speedups: Mapping[str, float]) -> Section:
    """A model's part of the page."""
    lines: dict[str, list] = {}
    for arm in arms:
        if arm.name in found and "PSNR" in found[arm.name].metrics:
            mark = pages.mark(arm, calls(arm), found[arm.name].metrics["PSNR"].bounds, " dB")
            lines.setdefault({"uniform": "DeepCache (reuse)"}.get(arm.style, arm.style), []).append(mark)
    drawn = Plot("Cost against distance", "full network calls per image, by MACs", "PSNR to no cache, dB",
                 [Line(name, sorted(marks, key=lambda one: one.x)) for name, marks in lines.items()])
    waiting = len(arms) - len(found)
    text = [f"{arms[0].images} images per arm, {STEPS} UniPC steps without cache."
            + (f" {waiting} of {len(arms)} arms are still to come." if waiting else ""),
            *filter(None, (sentence(arm, arms, found) for arm in arms))]
    rows = [HEAD, *(row(arm, arms, found, speedups) for arm in arms)]
    about = {arm.label: f"{calls(arm):.1f} full calls, {shown(found[arm.name].metrics.get('PSNR'), '.1f')} dB"
             for arm in arms[1:] if arm.name in found}
    return pages.section(TITLES[model.name], text, rows, [drawn], arms, about)


def page(sections: Sequence[Section]) -> Page:
    """All of it, with how to read it."""
    lead = ["Every arm of a model starts from the same seeds. DeepCache runs the whole U-Net on one call in "
            f"{INTERVAL} and reuses one deep feature on the others; the forecast extrapolates that feature; fewer "
            "steps spend the same multiply-accumulates on a shorter uncached run.",
            "PSNR is to the uncached image of the same seed: it tells what the shortcut changed. KID is a kernel "
            "distance to the training images on EfficientNet-Lite0 features, and its difference to the uncached run's "
            "tells whether that did harm. Brackets: 95 % intervals."]
    return Page("Caching, forecasts and fewer steps at equal cost", lead, sections,
                pages.made_by("python -m scripts.demo"))


def write(sections: Sequence[Section], folder: Path) -> str:
    """Write table and page of what there is; returns the table."""
    text = "\n".join(f"## {one.title}\n\n" + "\n".join([*markdown(one.rows), "", *one.text, ""]) for one in sections)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "table.md", lambda path: path.write_text(text))
    write_page(page(sections), folder / "index.html")
    return text


def draw(arms: Sequence[Arm], path: Path) -> None:
    """The first images of the arms that are there, each above eight times its difference to the uncached ones."""
    seen: list[tuple[str, np.ndarray]] = []
    for arm in arms:
        images = next(open_images(arm.folder).batches(12))
        seen.append((arm.label, images))
        if len(seen) > 1:
            change = 8 * abs(images.astype(int) - seen[0][1])
            seen.append(("difference x 8", (255 - change.clip(0, 255)).astype(np.uint8)))
    sample_rows(seen, path)


def times_of(arms: Sequence[Arm], given: Given) -> Path:
    return given.results / "times" / f"{arms[0].run.config.name}.json"


def known_speedups(arms: Sequence[Arm], given: Given) -> dict[str, float]:
    """The measured speed-up of each arm whose time is known."""
    there = [(path, results.read(path)) for path in times_paths(times_of(arms, given), arms) if path.is_file()]
    speeds = {arm.name: speed_of(there, arm.run, arms[0].run.calls) for arm in arms}
    return {name: speed.speedup for name, speed in speeds.items() if speed}


def run(plans: Mapping[Model, list[Arm]], given: Given) -> None:
    """Sample and judge arm by arm, then time the steps; what there is can be looked at all along. Raises UserError."""
    found: dict[Model, dict[str, Result]] = {model: {} for model in plans}
    sections = {model: section(model, arms, {}, {}) for model, arms in plans.items()}

    def update(model: Model) -> str:
        arms = plans[model]
        sections[model] = section(model, arms, found[model], known_speedups(arms, given))
        return write(list(sections.values()), given.results)

    text = write(list(sections.values()), given.results)
    print(f"look at {given.results / 'index.html'} at any time; Ctrl-C stops, and the same command goes on", flush=True)
    with closing(sampled([arm for arms in plans.values() for arm in arms])) as done:
        for arm in done:
            model, arms = next((model, arms) for model, arms in plans.items() if arm in arms)
            found[model][arm.name] = judged(arm, arms, floors=False)
            update(model)
            draw([one for one in arms if one.name in found[model]], given.results / f"samples_{model.name}.png")
            if arm.style == "fewer steps":
                said = [sentence(one, arms, found[model]) for one in arms if rival(one, arms) == arm]
                tqdm.write("\n".join(filter(None, said)))
    print("timing full and cached steps, some seconds for each model", flush=True)
    for model, arms in plans.items():
        words = ["--batch-size", "8", "--device", "cpu", "--threads", "1", "--repeats", "5", "--warmup", "1"]
        time_steps(arms, times_of(arms, given), words, in_this_process)
        text = update(model)
    print(f"\n{text}\nwrote {given.results}/: index.html (open it in a browser), table.md, pictures, one JSON per arm")


@command
def main() -> None:
    parser = demo.parser_of(__doc__, "48, 32, 32; with --full 256, of the slowest model 192", "8; with --full 32")
    parser.set_defaults(batch_size=None)
    parser.add_argument("--full", action="store_true", help="all that results/demo/ holds: about 40 minutes")
    args = parser.parse_args()
    args.batch_size = args.batch_size or (32 if args.full else 8)       # small ones, so that the bar moves
    chosen = [model for model in demo.MODELS if args.models is None or model.name in args.models]
    if args.full:
        demo.run_full(chosen, demo.given_by(args, "demo"))
        return
    given = demo.given_by(args, "demo_short", FEWEST)
    models = [model._replace(images=IMAGES[model.name], steps=STEPS)
              for model in sorted(chosen, key=lambda model: list(IMAGES).index(model.name))]
    run({model: plan(model, given) for model in models}, given)


if __name__ == "__main__":
    main()
