"""Finds the plan that makes the best images for a budget, for one model: which sampler, how many steps, what each
network call computes, and what of the rest is reused or forecast.

    python -m lab.plans.search --config configs/ldm_emoji.yaml --calls 12 --seeds 1000-1031 \\
        --held-out-seeds 2000-2063 --out plan.json
    python -m ldm.sample --config configs/ldm_emoji.yaml --plan plan.json --seeds 0-63 --out samples/plan

Best is what comes nearest to the converged images of the same seeds (UniPC, 100 trailing steps), in dB of the latents.
First it is measured what a gap in computing a level costs; dynamic programming makes schedules of that for several
numbers of steps; real runs of ever fewer of them on ever more seeds, then small changes of the best, decide. Fewer
steps without caching, by every sampler, and uniform schedules, reused and forecast, always take part. The plan is
chosen on the held-out seeds; the report, OUT.search.json and OUT.html to look at, is of other seeds again.

It says first how many network calls it will make at most and how long they take. What is measured is kept in a folder
beside the plan: after a kill the same command goes on, and comes to the same plan, with any number of processes.
Searches for other budgets of the same model may share it (--work).
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from eval.cost.runs import costs_of
from eval.cost.timing import interleave
from eval.metrics.intervals import mean_estimate
from lab.fit.fit import check_out, own_unet
from lab.plans import search_page
from lab.plans.candidates import PLAN, Prices, Trial
from lab.plans.distances import Distances, numbers, read_work
from lab.plans.gaps import GapMeasurements
from lab.plans.judge import CONVERGED, SPACING, Grid, Judge, run_of
from lab.plans.plans import bound_plan
from lab.plans.tournament import Tournament
from run import arguments, results
from run.cli import command
from run.families import example_inputs, family_named_by
from run.files import write_json
from run.image_model import config_among, spec_of
from run.machine import Machine, check_counts
from run.provenance import provenance
from run.results import Metric, Result
from run.seeds import format_seeds, parse_seeds
from run.spec import Run, RunSpec
from unet_caching.errors import UserError
from unet_caching.files.plan_file import Plan
from unet_caching.methods.deepcache import DeepCache
from unet_caching.nest import no_cache

SAMPLERS = ("unipc", "dpmpp", "dpmpp3", "deis", "ddim")
LEVELS = 3                  # the cheapest ones, among which plans choose
GUIDANCE_RANGE = 1.5        # a plan is taken to hold for guidance up to so many times as much, or as little
MEASURED = "PSNR of the latents to the converged ones, dB"
GAP_SEEDS = 8
NOTED = 10                  # what was tried on few seeds and is reported, of each kind


def build_parser(words: list[str]) -> argparse.ArgumentParser:
    """The command line of the model that the config among the words names."""
    config = config_among(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True,
                        help="configs/*.yaml" + (": brings more options" if config is None else ""))
    if config is not None:
        family = family_named_by(config)
        spec = RunSpec(family.name, config, condition=family.condition())
        for part in (spec.condition, spec.network):
            arguments.add(parser, type(part), family.flags)
    search = parser.add_argument_group("the search")
    budget = search.add_mutually_exclusive_group(required=True)
    budget.add_argument("--calls", type=arguments.finite,
                        help="the budget: the multiply-accumulates of so many full network calls per image; fractions "
                             "count")
    budget.add_argument("--macs", type=arguments.finite, metavar="G",
                        help="the budget: 10^9 multiply-accumulates per image (the `macs` of eval.macs; both rows of "
                             "guidance included)")
    budget.add_argument("--speedup", type=arguments.finite, metavar="X",
                        help="the budget: 1/X of the multiply-accumulates of the config's own uncached run")
    budget.add_argument("--seconds", type=arguments.finite, metavar="S",
                        help="the budget: seconds of network time per image on this machine, where cached steps take "
                             "more than their share of multiply-accumulates")
    search.add_argument("--seeds", required=True, help="runs to learn from")
    search.add_argument("--held-out-seeds", required=True, help="runs to choose on")
    search.add_argument("--report-seeds", help="runs to report on (default: as many as the held-out ones, after them)")
    search.add_argument("--attempts", type=arguments.whole, default=48,
                        help="changes of the best plan to try (default: 48)")
    search.add_argument("--converged-steps", type=arguments.whole, default=100,
                        help="of the run to come near to (default: 100)")
    search.add_argument("--jobs", type=arguments.whole, default=1,
                        help="processes that measure side by side, --threads each (default: 1)")
    search.add_argument("--out", type=Path, required=True, help="plan to write, .json")
    search.add_argument("--work", type=Path, help="folder of what is measured (default: OUT.work)")
    arguments.add(parser, Machine)
    if config is not None:
        parser.set_defaults(batch_size=min(16, family_named_by(config).batch_size), threads=1)
    return parser


@dataclass
class Seeds:
    """The three sets of seeds. Raises UserError where two of them share one, or one is too small to compare on."""
    learn: list[int]
    choose: list[int]
    report: list[int]

    @classmethod
    def chosen(cls, args: argparse.Namespace) -> "Seeds":
        learn, choose = parse_seeds(args.seeds), parse_seeds(args.held_out_seeds)
        after = max(*learn, *choose) + 1
        report = parse_seeds(args.report_seeds) if args.report_seeds else list(range(after, after + len(choose)))
        for name, seeds in (("--seeds", learn), ("--held-out-seeds", choose), ("--report-seeds", report)):
            if len(seeds) < 4:
                raise UserError(f"{name} must be 4 or more, to compare runs on them, got {len(seeds)}")
        for one, other in ((learn, choose), (learn, report), (choose, report)):
            if both := set(one) & set(other):
                raise UserError(f"seed {min(both)} is in two of --seeds, --held-out-seeds and --report-seeds: take "
                                "others")
        return cls(learn, choose, report)

    @property
    def all(self) -> list[int]:
        return [*self.learn, *self.choose, *self.report]


@dataclass
class _Times:
    """A file of `StepTimes.kept`."""
    full: float
    cached: dict[str, float]


@dataclass(frozen=True)
class StepTimes:
    """Network time on this machine. full: seconds of a full call for one image. cached: branch -> the time of a cached
    call that forecasts, in full ones."""
    full: float
    cached: dict[int, float]

    @classmethod
    def measured(cls, distances: Distances, branches: list[int]) -> "StepTimes":
        size = distances.machine.batch_size
        inputs = example_inputs(distances.run.config, size * distances.run.rows_per_image, distances.model.device,
                                distances.run.dtype)
        unet, policies = own_unet(distances.model), {branch: DeepCache(branch, [0, 2], 1) for branch in branches}
        with torch.inference_mode():
            for policy in policies.values():
                unet(*inputs, cache=policy.at(0))
        timings = interleave({-1: lambda: unet(*inputs, cache=no_cache), **{
            branch: partial(lambda policy: unet(*inputs, cache=policy.at(1)), policy)
            for branch, policy in policies.items()}}, distances.model.device, repeats=5, warmup=1)
        full = timings[-1]
        return cls(full.median / size, {branch: timings[branch].ratio(full) for branch in branches})

    @classmethod
    def kept(cls, distances: Distances, branches: list[int]) -> "StepTimes":
        """As first measured, so that a search that goes on has the same budget."""
        about = f"branches{'_'.join(map(str, branches))}_batch{distances.machine.batch_size}"
        file = distances.made("times") / f"{about}.json"
        if not file.is_file():
            write_json(file, asdict(cls.measured(distances, branches)))
        content = read_work(file, _Times)
        cached = {branch: float(content["cached"][str(branch)]) for branch in numbers(file, content["cached"])}
        if cached.keys() != set(branches) or min(content["full"], *cached.values()) <= 0:
            raise UserError(f"{file} is damaged: it should have times above 0 of a full call and of the branches "
                            f"{branches}; delete it, and the same command measures again")
        return cls(float(content["full"]), cached)


def branches_of(run: Run) -> list[int]:
    """The levels among which plans choose."""
    return list(range(min(LEVELS, run.unet.num_branches)))


def prices_of(run: Run, args: argparse.Namespace, times: StepTimes | None = None) -> Prices:
    """The budget in full calls, and what cached ones cost. run: the config's own. times: where the budget is seconds.

    Raises UserError.
    """
    costs = costs_of(run)
    cached = {branch: costs.calls(DeepCache(branch, [0]), 2)[1].hook / costs.full.hook for branch in branches_of(run)}
    if args.calls is not None:
        budget = args.calls
    elif args.macs is not None:
        budget = args.macs * 1e9 / (costs.full.hook * run.rows_per_image)
    elif args.speedup is not None:
        budget = run.calls / args.speedup if args.speedup > 0 else 0.0
    else:
        assert times is not None
        budget, cached = args.seconds / times.full, times.cached
    if not 2 <= budget <= run.config.diffusion.num_timesteps:
        raise UserError(f"the budget must be 2 full network calls per image or more, and no more than there are "
                        f"timesteps; this is {budget:.3g}"
                        + ("" if times is None else f" at {1e3 * times.full:.3g} ms each"))
    return Prices(budget, cached)


def plan_of(trial: Trial, distances: Distances, run: Run, distance: dict[str, Any], notes: dict[str, Any]) -> Plan:
    """The file of what was found. run: the trial's, without its caching."""
    settings, guidance = distances.on(run).settings, None
    if "guidance" in settings:
        guidance = [run.guidance / GUIDANCE_RANGE, run.guidance * GUIDANCE_RANGE]
    return bound_plan(run, settings, trial.run.calls, guidance, distance, notes)


def report(chosen: Trial, arms: list[Trial], judge: Judge, seeds: list[int]) -> dict[str, Metric]:
    """The distances of the plan and of all other arms on the same seeds, and the paired differences."""
    ours, *theirs = judge.measure([chosen.run, *(arm.run for arm in arms)], seeds, "the report")
    found = {"plan": Metric.of(mean_estimate(ours))}
    for arm, psnr in zip(arms, theirs, strict=True):
        found[arm.kind] = Metric.of(mean_estimate(psnr))
        found[f"plan less {arm.kind}"] = Metric.of(mean_estimate(ours - psnr))
    return found


def noted(ranked: Iterable[tuple[Trial, float]]) -> Iterator[tuple[Trial, float]]:
    """Of what was tried on few seeds, the best first: so many of each kind as a report keeps."""
    met = Counter[str]()
    for trial, mean in ranked:
        met[trial.kind] += 1
        if met[trial.kind] <= NOTED:
            yield trial, mean


def about(trial: Trial, prices: Prices) -> dict[str, Any]:
    """What the report says of a candidate."""
    return {"kind": trial.kind, "sampler": trial.run.sampler, **trial.run.grid._asdict(), "order": trial.order,
            "full_calls": prices.of(trial.depths), "branches": list(trial.depths)}


def check(args: argparse.Namespace) -> None:
    """Refuse options that cannot be. Raises UserError."""
    check_out(args.out, ".json")
    check_counts(jobs=args.jobs)
    if args.compile or args.cuda_graphs:
        raise UserError("--compile and --cuda-graphs are for sampling: runs here are short and all different")
    if args.attempts < 0 or args.converged_steps < 2:
        raise UserError("--attempts must be 0 or more, --converged-steps 2 or more")
    if args.seconds is not None and not args.seconds > 0:
        raise UserError(f"--seconds must be more than 0, got {args.seconds:g}")


def announce(tournament: Tournament, seeds: Seeds, times: StepTimes, jobs: int) -> None:
    """Say how much there is to compute, before it begins."""
    prices, distances = tournament.prices, tournament.judge.distances
    others = (6 * len(seeds.choose) + 4 * (len(seeds.report) + search_page.SEEN)) * prices.budget
    calls = (len(distances.missing(seeds.all)) * distances.run.calls + tournament.network_calls() + others)
    print(f"{prices.budget:.4g} full network calls per image, {distances.run.calls} for a converged one: at most "
          f"{calls:,.0f} of them, of one image each, take about {calls * times.full / jobs / 60:.2g} minutes at "
          f"{1e3 * times.full:.3g} ms in {jobs} process{'es' if jobs > 1 else ''}; what was measured before is not "
          "measured again", flush=True)


@command
def main() -> None:
    args, started = build_parser(sys.argv[1:]).parse_args(), time.time()
    check(args)
    family, seeds = family_named_by(args.config), Seeds.chosen(args)
    spec = spec_of(args, family)
    own, machine = spec.open(), arguments.chosen(Machine, args)
    if args.seconds is None:
        prices_of(own, args)                    # which may be refused, before the weights are read
    own.family.open(own, machine).check_seeds(seeds.all)
    distances = Distances(run_of(spec, CONVERGED, Grid(args.converged_steps)), machine,
                          args.work or args.out.with_suffix(".work"))
    times = (StepTimes.measured if args.seconds is None else StepTimes.kept)(distances, branches_of(own))
    prices = prices_of(own, args, times)
    judge = Judge(spec, distances)
    with judge.processes(args.jobs, machine):
        measured = GapMeasurements(judge, sorted(prices.cached), seeds.learn[:GAP_SEEDS])
        samplers = tuple(dict.fromkeys([*SAMPLERS, own.default_sampler]))
        tournament = Tournament(judge, measured, prices, samplers, seeds.learn, args.attempts)
        announce(tournament, seeds, times, args.jobs)
        judge.converge(seeds.learn)
        found = tournament.run()
        judge.converge(seeds.choose)
        scores = judge.measure([trial.run for trial in found], seeds.choose, "choosing")
        chosen = max(zip(found, scores, strict=True), key=lambda pair: pair[1].mean())[0]
        arms = [trial for trial in found if trial.kind != PLAN]
        judge.converge(seeds.report)
        metrics = report(chosen, arms, judge, seeds.report)

    notes = {"budget": prices.budget, "learnt_on": format_seeds(seeds.learn), "chosen_on": format_seeds(seeds.choose),
             "kind": chosen.kind, "order": chosen.order}
    found_mean = metrics["plan"]
    distance = {"what": MEASURED, "converged": f"{CONVERGED}, {args.converged_steps} {SPACING} steps",
                "seeds": format_seeds(seeds.report), "mean": found_mean.value, "interval": found_mean.interval}
    run = judge.run(chosen.run.sampler, chosen.run.grid)
    plan = plan_of(chosen, distances, run, distance, notes)
    details = {**notes, "reported_on": format_seeds(seeds.report), "chosen": about(chosen, prices),
               "arms": [about(trial, prices) for trial in arms],
               "on_few_seeds": [{"kind": trial.kind, "sampler": trial.run.sampler, **trial.run.grid._asdict(),
                                 "order": trial.order, "full": trial.depths.count(None), "mean": round(mean, 2)}
                                for trial, mean in noted(tournament.first)]}
    results.write(args.out.with_suffix(".search.json"), Result(
        "plan search", run.config.name, run.told, len(seeds.report), metrics,
        hashes={"checkpoint": plan.run["checkpoint_sha256"], "plan": plan.sha256},
        provenance=provenance(distances.model.device), details=details).stamped(started))
    write_json(args.out, plan.to_json())
    search_page.report(metrics, chosen, arms, judge, prices, seeds.report, args.out, sys.argv[1:])
    print(f"{len(seeds.report)} seeds that nothing was chosen on; {MEASURED}, 95% intervals:")
    for name, one in metrics.items():
        print("{:40} {:7.2f} [{:.2f}, {:.2f}]".format(name, *one.bounds))
    print(f"{args.out}: {chosen.kind}, {chosen.run.sampler}, {chosen.run.grid.steps} steps, {plan.cost:.2f} full calls "
          f"({chosen.depths.count(None)} calls compute everything); to look at: {args.out.with_suffix('.html')}")


if __name__ == "__main__":
    main()
