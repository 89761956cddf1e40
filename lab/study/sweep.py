"""Sweeps: every combination of some settings, sampled, judged, timed, and drawn as quality against cost.

    python -m scripts.sweep --config configs/sweeps/ddpm_emoji_interval_branch.yaml --list        its points
    python -m scripts.sweep --config configs/sweeps/ddpm_emoji_interval_branch.yaml               run it, or go on
    python -m scripts.sweep --config configs/sweeps/ddpm_emoji_interval_branch.yaml --share 2/8   a share of the points
    python -m scripts.sweep --config configs/sweeps/ddpm_emoji_interval_branch.yaml --render      draw what is there

A sweep is a YAML file:

    images: 256                 of each point: seeds 0 to 255
    prompts: FILE               for Stable Diffusion; also images_per_prompt (1 unless given)
    dtype: fp16                 of the network (fp32 unless given)
    extractors: [incmixed5]     that judge models which were trained here, beside EffLite0
    converged: {sampler: unipc, steps: 100, timesteps: trailing}    a run without caching of so many steps that twice as
                                many change nothing: the error of each point to it is a column, where they change that
                                by 5 % at most; both runs are sampled for it
    grids:                      each is all combinations of its axes
    - {model: ddpm_emoji, interval: [2, 3, 5, 10], branch: all}
    - {model: ddpm_emoji, interval: 10, schedule: centered, center: [30, 50], power: [1.2, 1.4]}

Axes: model (a name in configs/, or a path), and any option of the sample commands for sampler and caching, such as
interval, branch (a 0-based skip, or all), schedule, center, power, steps, sampler, block_schedule (a file of
lab.fit). The first point of a model, which its others are compared
with, is always its uncached run, with the first sampler, steps and timesteps of its first grid. A point is sampled into
samples/MODEL/ under the name that the table scripts give these settings, and judged into results/runs/: models that
were trained here against their training images and the uncached run (eval.quality, eval.fidelity), others as in the
papers' tables, where the evaluator's files are given. Full and cached steps are timed once for each model. Table,
pictures and a page to look at (index.html) go to results/sweeps/NAME/.
"""

import argparse
import dataclasses
import difflib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from eval.cost.macs import giga
from eval.cost.runs import macs_per_image
from eval.metrics.features import EffLite0
from eval.metrics.registry import EXTRACTORS
from eval.tables.current import trained_on
from eval.tables.text import align
from lab.study import sweep_page, sweep_report
from lab.study.arms import Arm, Given, of_run
from lab.study.plan import add_options, check, check_one_model, disk, given_by
from lab.study.runner import FEWEST, judge, sample, time_steps, uncached_of
from run import arguments
from run.cli import command
from run.families import family_named_by
from run.files import ROOT
from run.prompts import read_prompts
from run.settings import read_yaml
from run.spec import DTYPES, RunSpec, SamplerOptions
from unet_caching.errors import UserError
from unet_caching.methods.plan import SAMPLING
from unet_caching.registry import METHODS

OTHERS = tuple(name for name, kind in EXTRACTORS.items() if kind is not EffLite0)
MOST_POINTS, MOST_CALLS = 2000, 500_000      # of a sweep: points, and network calls of an image of each
KIND = "sweep"          # of the results of the models that are trained here
_WORDS = {int: "whole numbers", float: "numbers", str: "names", Path: "files", bool: "true or false"}


class Axis(NamedTuple):
    """What an axis holds: its type, and its choices where there are few."""
    kind: type
    choices: tuple[str, ...] = ()

    def takes(self, value: Any) -> bool:
        """Whether a file of sweeps may say this."""
        if self.kind is bool or isinstance(value, bool):
            return self.kind is bool and isinstance(value, bool)
        return isinstance(value, {float: (int, float), Path: (str,)}.get(self.kind, (self.kind,)))


@cache
def axes() -> dict[str, Axis]:
    """The model, and all options of the sampler and of the caching methods, by name."""
    return {"model": Axis(str), **options_of(*METHODS, SamplerOptions)}


@dataclass
class Sweep:
    """A sweep file. grids: axis -> a value or several."""
    images: int
    grids: list[dict[str, Any]]
    prompts: str | None = None
    images_per_prompt: int = 1
    dtype: str = "fp32"
    extractors: list[str] = field(default_factory=list)
    converged: dict[str, Any] = field(default_factory=dict)


def read_sweep(path: Path) -> Sweep:
    """Raises UserError that names the file, the grid and the axis that is wrong."""
    sweep = read_yaml(path, Sweep)
    if sweep.images < 3 or sweep.images_per_prompt < 1:
        raise UserError(f"{path}: images must be 3 or more and images_per_prompt 1 or more")
    if sweep.dtype not in DTYPES:
        raise UserError(f"{path}: dtype must be one of {', '.join(DTYPES)}, got {sweep.dtype!r}")
    if unknown := [name for name in sweep.extractors if name not in OTHERS]:
        raise UserError(f"{path}: extractors has no {unknown[0]!r}: beside EffLite0 there is {', '.join(OTHERS)}")
    for axis, value in sweep.converged.items():
        check_axis(f"{path}, converged", str(axis), [value], options_of(SamplerOptions))
    if sweep.converged and "steps" not in sweep.converged:
        raise UserError(f"{path}: converged says no steps, like 100")
    if not sweep.grids:
        raise UserError(f"{path}: grids is empty: a sweep needs at least one, like {{model: ddpm_emoji, interval: 5}}")
    for number, grid in enumerate(sweep.grids, 1):
        for axis, values in lists_of(grid).items():
            check_axis(f"{path}, grid {number}", str(axis), values)
        if "model" not in grid:
            raise UserError(f"{path}, grid {number} names no model")
    return sweep


def options_of(*parts: Any) -> dict[str, Axis]:
    """All options of some dataclasses of them (unet_caching/options.py), by name."""
    return {one.name: Axis(arguments.kind(part, one.name), tuple(one.metadata["choices"]))
            for part in parts for one in dataclasses.fields(part)}


def check_axis(where: str, axis: str, given: list, among: Mapping[str, Axis] | None = None) -> None:
    """Raises UserError for an axis or a value that there is not. among: which there are (default: those of sweeps)."""
    there = among or axes()
    known = there.get(axis)
    if known is None:
        near = difflib.get_close_matches(axis, there, 1)
        raise UserError(f"{where} has no {'axis' if among is None else 'option'} {axis!r}: "
                        + (f"is it {near[0]}? " if near else "") + f"There are {', '.join(there)}")
    if not given:
        raise UserError(f"{where}: {axis} has no values")
    for value in given:
        if axis == "branch" and value == "all":
            continue
        if not known.takes(value):
            raise UserError(f"{where}: {axis} takes {_WORDS[known.kind]}, got {value!r}")
        if known.choices and value not in known.choices:
            raise UserError(f"{where}: {axis} has no {value!r}: choose from {', '.join(known.choices)}")


def lists_of(grid: dict[str, Any]) -> dict[str, list]:
    """The values of each axis; one that stands alone is a list of one."""
    return {axis: values if isinstance(values, list) else [values] for axis, values in grid.items()}


def every(lists: dict[str, list]) -> Iterator[dict[str, Any]]:
    """All combinations of one value of each axis; that of the last axis changes first."""
    return (dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values()))


def combinations(grid: dict[str, Any], seen: set[Path]) -> Iterator[dict[str, Any]]:
    """The points of a grid: one value of each axis, `branch: all` spelt out.

    Those of a model that is not among the `seen` ones begin with its uncached run.
    """
    lists = lists_of(grid)
    for model in lists.pop("model"):
        path = config_of(model)
        if path not in seen:
            yield {"model": path, **{axis: lists[axis][0] for axis in ("sampler", "steps", "timesteps")
                                       if axis in lists}}
            seen.add(path)
        skips = RunSpec.of(path).open().unet.num_branches
        of_model = lists | ({"branch": list(range(skips))} if "all" in lists.get("branch", []) else {})
        for values in every(of_model):
            yield {"model": path, **values}


def with_common(common: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of all runs and those of one: but for what a plan brings itself."""
    brought = SAMPLING if options.get("plan") else ()
    return {key: value for key, value in common.items() if key not in brought} | dict(options)


def config_of(model: str) -> Path:
    """Where the config of a model is. Raises UserError."""
    path = Path(model) if model.endswith(".yaml") else Path("configs") / f"{model}.yaml"
    if not (ROOT / path).is_file():
        known = ", ".join(sorted(path.stem for path in (ROOT / "configs").glob("*.yaml")))
        raise UserError(f"no model {model!r}: there are {known}, or give the path of a config")
    return path


def make_points(sweep: Sweep, path: Path, said: Given) -> list[Arm]:
    """The points of a sweep, none twice, checked as far as that goes without weights. Raises UserError."""
    found: dict[tuple[str, str], Arm] = {}
    seen: set[Path] = set()
    calls, asked = 0, sum(math.prod(map(len, lists_of(grid).values())) for grid in sweep.grids)
    if asked > MOST_POINTS:
        raise UserError(f"{path}: its grids have {asked:,} points: at most {MOST_POINTS:,} can be planned")
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
                arm = of_run(run, label, sweep.images, KIND if trained_on(run.config) else run.family.judge, said)
                arm = replace(arm, others=tuple(sweep.extractors))
                check_point(arm)
            except UserError as error:
                raise UserError(f"{path}, grid {number}, {values['model']}, {label}: {error}") from None
            calls += run.calls
            if calls > MOST_CALLS:
                raise UserError(f"{path}, grid {number}: its points have more than {MOST_CALLS:,} network calls per "
                                "image together, too many to plan: take fewer points or steps")
            same = found.setdefault((run.config.name, run.name), arm).run
            if same.spec.config != run.spec.config or same.caching.settings != run.caching.settings:
                raise UserError(f"{path}, grid {number}: two different points would share {arm.folder}; give the "
                                "models, or the files of their block schedules, names of their own")
    return with_converged(list(found.values()), sweep, path, said) if sweep.converged else list(found.values())


def with_converged(arms: Sequence[Arm], sweep: Sweep, path: Path, said: Given) -> list[Arm]:
    """The points with the runs that they are compared with, those of models that are trained here. Raises UserError."""
    found: dict[str, tuple[Arm, ...]] = {}
    for arm in arms:
        if arm.kind != KIND or arm.run.config.name in found:
            continue
        options = {"sampler": None, "steps": None, "timesteps": None, "eta": None} | sweep.converged
        try:
            runs = [replace(arm.run.spec, caching=tuple(method() for method in METHODS)).having(
                **options | {"steps": times * sweep.converged["steps"]}).open() for times in (1, 2)]
            found[arm.run.config.name] = tuple(of_run(run, f"converged, {run.steps} steps", sweep.images, KIND, said)
                                               for run in runs if run.sampler.calls)
        except UserError as error:
            raise UserError(f"{path}, converged, {arm.run.config.name}: {error}") from None
        if runs[0].sampler.eta:
            raise UserError(f"{path}: converged has eta {runs[0].sampler.eta}: what is random comes to no image")
    return [replace(arm, converged=found.get(arm.run.config.name, ())) for arm in arms]


def check_point(arm: Arm) -> None:
    """Raises UserError for a sampler, or a block schedule, that does not go with the model."""
    run = arm.run
    run.refuse_foreign({"model": run.config.name, "unet": asdict(run.config.unet), **run.sampler.settings})
    prompts = getattr(run.spec.condition, "prompts", None)
    if prompts and prompts.is_file():
        count = len(read_prompts(prompts))
        if arm.images > count * getattr(run.spec.condition, "images_per_prompt", 1):
            raise UserError(f"{arm.images} images from {count} prompts need an images_per_prompt of "
                            f"{-(-arm.images // count)} or more")


def run(chosen: Sequence[Arm], points: Sequence[Arm]) -> None:
    """Sample and judge what is not there yet, of some of the points."""
    for number, arm in enumerate(chosen, 1):
        if arm.measured() is None:
            print(f"[{number}/{len(chosen)}] {arm.run.config.name}: {arm.label}", flush=True)
            for one in (*arm.converged, arm):
                sample(one)
            judge(arm, uncached_of(arm, points))


def measure_times(points: Sequence[Arm], folder: Path, said: Given, dtype: str) -> None:
    """Time full and cached steps of each model of the sweep, unless that is done."""
    words = list(arguments.words({name: value for name, value in {**said.machine, "dtype": dtype}.items()
                                  if name in ("batch_size", "device", "dtype", "threads")}))
    for model in dict.fromkeys(arm.run.config.name for arm in points):
        own = [arm for arm in points if arm.run.config.name == model]
        time_steps(own, sweep_report.times_path(folder, model), words)


def share_of(points: list[Arm], text: str | None) -> list[Arm]:
    """Every COUNT-th point from the INDEX-th, counted from 1; all without a share. Raises UserError."""
    if text is None:
        return points
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--share must be INDEX/COUNT with INDEX from 1 to COUNT, like 2/8, got {text!r}")
    return points[int(match[1]) - 1::int(match[2])]


def listing(points: Sequence[Arm]) -> str:
    """A line per point."""
    lines = [["point", "", "full / calls", "MACs/image G", "of uncached", "images there", "judged"]]
    wholes: dict[str, float] = {}
    for number, arm in enumerate(points, 1):
        run, macs = arm.run, macs_per_image(arm.run).hook
        whole = wholes.setdefault(run.config.name, macs)        # a model's first point is its uncached run
        lines.append([f"{number}  {run.config.name}", arm.label, f"{run.full_calls} / {run.calls}",
                      f"{giga(macs):.4f}", f"{macs / whole:.3f}", f"{arm.present:,} of {arm.images:,}",
                      arm.why_not() or "yes"])
    return align(lines)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, help="the sweep, a YAML file; configs/sweeps/ has some")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--list", action="store_true", help="print the points and what is missing; do nothing")
    mode.add_argument("--share", metavar="INDEX/COUNT",
                      help="only sample and judge this share of the points, without times and pictures: for many "
                           "machines; the command without it does what is left")
    mode.add_argument("--render", action="store_true", help="only draw what is there")
    add_options(parser, images="the sweep's")
    args = parser.parse_args()
    check(args)
    said, sweep = given_by(args), read_sweep(args.config)
    sweep.images, sweep.dtype = said.images or sweep.images, args.dtype or sweep.dtype
    points = make_points(sweep, args.config, said)
    check_one_model(said, {arm.run.config.name for arm in points})
    chosen = share_of(points, args.share)
    folder = args.results / "sweeps" / args.config.stem
    if args.list:
        all_of_them = {one.folder: one for arm in points for one in (*arm.converged, arm)}
        print(f"{listing(points)}\n\n{disk([*all_of_them.values()], args.samples)}")
    if not args.render:
        lacking = list(dict.fromkeys(thing for arm in chosen for thing in arm.missing_for_sampling()))
        unjudged = dict.fromkeys(thing for arm in chosen for thing in arm.missing_for_judging())
        print("".join(f"not judged without: {thing}\n" for thing in unjudged), end="", flush=True)
        if points[0].images < FEWEST:
            print(f"{points[0].images} images are few: FD is left out below {FEWEST}", flush=True)
        if args.list:
            print("".join(f"missing: {thing}\n" for thing in lacking), end="")
            return
        for name in sweep.extractors:
            EXTRACTORS[name]()                          # refuses, if its file is not there
        if lacking and any(arm.measured() is None for arm in chosen):
            raise UserError(f"missing: {'; '.join(lacking)}")
        run(chosen, points)
        if args.share:
            return
        measure_times(points, folder, said, sweep.dtype)
    found = [(arm, arm.measured()) for arm in points]
    print(sweep_report.render(found, folder))
    print(f"to look at: {sweep_page.write(found, folder)}")


if __name__ == "__main__":
    main()
