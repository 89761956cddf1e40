"""Run a study: sample, measure, tabulate, draw. The same command goes on where it stopped.

    python -m lab.study forecast_ldm                    a file of configs/studies, or the path of another
    python -m lab.study systems_ldm --list              its arms, and which images and records exist
    python -m lab.study systems_ldm --make              first make the files that its arms need
    python -m lab.study systems_ldm --only 18 --only near       one budget, one measure
    python -m lab.study demo_short --jobs 2             two processes, one thread each
    python -m lab.study table12_branch --share 2/8      a share of the arms, for one of many machines
    python -m lab.study forecast_ldm --render           only write the results so far

The results are in results/NAME/: table.md, pictures, records.jsonl and a page to look at (index.html). Several
processes, on several machines with one disk, may run a study at once.
"""

import os
import sys
from dataclasses import dataclass, replace
from typing import ClassVar

from eval.cost.macs import giga
from eval.cost.runs import macs_per_image
from eval.metrics.registry import EXTRACTORS
from eval.tables.arms import Arm, Given
from eval.tables.study import Part, Study, missing
from eval.tables.text import align
from lab.study.bench import Bench
from lab.study.measures import FEWEST
from lab.study.papers import disk
from lab.study.report import make_images, render
from lab.study.rows import cost_of
from lab.study.runner import Pair, carry_out, end_with_parent, supervise
from lab.study.tables import Shown, open_benches
from run.cli import command
from run.seeds import format_seeds, parse_seeds
from unet_caching.errors import UserError
from unet_caching.options import option, required


@dataclass(frozen=True)
class Options:
    title: ClassVar[str] = "the study"
    study: str = required("a file of configs/studies by its name, or a path", word=True)
    list: bool = option(False, "print the arms and what is missing; do nothing", one_of="what")
    render: bool = option(False, "only write the results so far", one_of="what")
    make: bool = option(False, "first make the missing fitted files", one_of="what")
    only: tuple[str, ...] = option((), "only arms with this label, kind, budget (like 18) or model, or only this "
                                       "measure; repeatable", action="append", metavar="WORD")
    share: str | None = option(None, "only sample and measure this share of the arms; the command without it does the "
                                     "rest, and writes the results", metavar="INDEX/COUNT")
    seeds: str | None = option(None, "instead of the study's")
    jobs: int = option(1, "processes; several have one thread each; 0: one for each core (default: %(default)s)",
                       least=0)
    worker: bool = option(False, "be one of several processes: write no results, and end when stdin is closed")


def narrowed(part: Part, options: Options, given: Given) -> Part:
    """A part with the user's seeds, and only with the measures that --only names, if it names any. Other studies are
    shown only with the study's own seeds, which are theirs."""
    seeds = parse_seeds(part.seeds if options.seeds is None else options.seeds)
    if given.images:
        seeds = [*seeds, *range(seeds[-1] + 1, seeds[-1] + 1 + given.images)][:given.images]
    named = [kind for kind in part.measure if kind in options.only]
    also = part.also if format_seeds(seeds) == part.seeds else []
    return replace(part, seeds=format_seeds(seeds), measure=named or part.measure, also=also,
                   chosen_on=min(part.chosen_on, len(seeds) // 2), twice=min(part.twice, len(seeds)))


def names_of(arm: Arm) -> set[str]:
    """The words of --only that an arm matches."""
    budget = {str(arm.entry.budget), f"{arm.entry.budget} calls"} if arm.entry.budget else set()
    return {arm.label, arm.entry.kind, arm.run.name, arm.run.config.name, *budget}


def chosen(benches: list[Bench], options: Options) -> list[Pair]:
    """The arms to run; the arms to compare with come first. Raises UserError for a word that matches no arm."""
    pairs = [(bench, arm) for bench in benches for arm in bench.all]
    measures = {kind for bench in benches for kind in bench.part.measure}
    only = set(options.only) - measures
    known = {name for bench in benches for arm in bench.arms for name in names_of(arm)}
    if unknown := only - known:
        raise UserError(f"--only {unknown.pop()!r} is not an arm, budget or measure of this study: see --list")
    wanted = {arm.name for bench in benches for arm in bench.arms if not only or names_of(arm) & only}
    beside = {id(arm) for bench in benches for arm in (bench.setup.whole, *bench.setup.converged)}
    pairs = [pair for pair in pairs if id(pair[1]) in beside or pair[1].name in wanted]
    if options.share is None:
        return pairs
    index, _, count = options.share.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise UserError(f"--share must be INDEX/COUNT with INDEX from 1 to COUNT, like 2/8, got {options.share!r}")
    return pairs[int(index) - 1::int(count)]


def listing(benches: list[Bench]) -> str:
    """A line per arm."""
    lines = [["arm", "run", "full / calls", "cost, calls", "MACs/image G", "images there", "measured"]]
    for bench in benches:
        for arm in bench.arms:
            why_not = {kind: bench.record(arm, kind)[1] for kind in bench.kinds(arm)}
            lacking = "; ".join(f"{kind}: {why}" for kind, why in why_not.items() if why)
            there = f"{arm.present:,} of {arm.images:,}" if bench.looks_at_images else "-"
            lines.append([arm.entry.kind or arm.label, arm.run.name, f"{arm.run.full_calls} / {arm.run.calls}",
                          f"{cost_of(arm.run):.2f}", f"{giga(macs_per_image(arm.run).hook):.4f}", there,
                          lacking or "yes"])
    return align(lines)


def check(benches: list[Bench], pairs: list[Pair], listing: bool) -> None:
    """Print what cannot be judged. Raises UserError if a file is missing that sampling needs."""
    todo = [(bench, arm) for bench, arm in pairs if not bench.complete(arm)]
    lacking = list(dict.fromkeys(thing for _, arm in todo for thing in arm.missing_for_sampling()))
    unjudged = dict.fromkeys(thing for _, arm in pairs for thing in arm.missing_for_judging())
    print("".join(f"not judged without: {thing}\n" for thing in unjudged), end="", flush=True)
    few = min(len(bench.seeds) for bench in benches)
    if few < FEWEST and any("quality" in bench.part.measure for bench in benches):
        print(f"{few} images are few: FD is left out below {FEWEST}", flush=True)
    if listing:
        print("".join(f"missing: {thing}\n" for thing in lacking), end="")
        return
    for name in {name for bench, _ in todo for name in bench.part.extractors}:
        EXTRACTORS[name]()                          # raises UserError if its file is missing
    if lacking:
        raise UserError(f"missing: {'; '.join(lacking)}")


def run(study: Study, benches: list[Bench], pairs: list[Pair], options: Options, given: Given) -> None:
    """Sample and measure what is missing; several processes also write the results so far from time to time."""
    claims, folder = given.samples / "claims" / f"{study.name}.claims", given.results / study.name
    todo = [(bench, arm) for bench, arm in pairs if not bench.complete(arm)]
    if options.worker:
        end_with_parent()
        carry_out(todo, claims)
        return
    jobs = options.jobs or min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    if jobs == 1:
        carry_out(todo, claims, wait=options.share is None)
    elif todo:
        print(f"look at {folder / 'index.html'} at any time; Ctrl-C stops, and the same command goes on", flush=True)
        words = ["-m", "lab.study", *sys.argv[1:], "--worker"]
        supervise(todo, words, jobs, lambda: render(study, benches, folder))
    if options.share is None:
        for bench in benches:
            bench.time({arm.name for _, arm in pairs})


@command
def main(options: Options, given: Given) -> None:
    study, benches = open_benches(options.study, given, lambda part: narrowed(part, options, given))
    given.check_one_model({bench.setup.whole.run.config.name for bench in benches})
    if options.make:
        for bench in benches:
            bench.make()
    for entry in (entry for bench in benches for entry in bench.left_out):
        print(f"left out: {entry}, there is no {missing(entry)[0]}", flush=True)
    pairs = chosen(benches, options)
    if options.list:
        with_images = [arm for bench, arm in pairs if bench.looks_at_images]
        print(f"{listing(benches)}\n\n{disk(with_images, given.samples)}")
        check(benches, pairs, listing=True)
        return
    if not options.render:
        check(benches, pairs, listing=False)
        run(study, benches, pairs, options, given)
        if options.worker or options.share:
            return
        for bench in benches:
            make_images(study, Shown(bench))
    print(render(study, benches, given.results / study.name))


if __name__ == "__main__":
    main()
