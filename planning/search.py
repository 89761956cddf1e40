"""Finds the plan that makes the best images for a budget, for one model: which sampler, how many steps, what each
network call computes, and what of the rest is reused or forecast.

    python -m planning.search --config configs/ldm_emoji.yaml --calls 12 --seeds 1000-1031 --held-out-seeds 2000-2063 \\
        --out plan.json
    python -m ldm.sample --config configs/ldm_emoji.yaml --plan plan.json --seeds 0-63 --out samples/plan

Best is what comes nearest to the converged images of the same seeds (UniPC, 200 trailing steps), in dB of the latents.
First it is measured what a gap in computing a level costs; dynamic programming makes schedules of that for every number
of steps; real runs of ever fewer of them on ever more seeds, then small changes of the best, decide. Fewer steps
without caching, by every sampler, and the papers' uniform schedules always take part. The plan is chosen on the
held-out seeds; the report, OUT.search.json, is of other seeds again.

What is measured is kept in a folder beside the plan: after a kill the same command goes on, and comes to the same plan.
Searches for other budgets of the same model may share it (--work).
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caching.deepcache import DeepCache
from caching.fitted import BOUND
from caching.plan import PlanCache
from caching.plan_file import Plan
from eval.cost.runs import costs_of
from eval.metrics.intervals import mean_estimate
from planning.candidates import Prices, Trial
from planning.distances import CONVERGED, SPACING, Distances
from planning.fitting import check_out
from planning.gaps import GapMeasurements
from planning.tournament import Tournament
from runs import arguments, results
from runs.cli import command
from runs.errors import UserError
from runs.families import family_named_by
from runs.files import write_json
from runs.image_model import config_among, spec_of
from runs.machine import Machine
from runs.provenance import provenance
from runs.results import Metric, Result
from runs.seeds import format_seeds, parse_seeds
from runs.spec import Run, RunSpec

SAMPLERS = ("unipc", "dpmpp", "ddim")
LEVELS = 3                  # the cheapest ones, among which plans choose
GUIDANCE_RANGE = 1.5        # a plan is taken to hold for guidance up to so many times as much, or as little
MEASURED = "PSNR of the latents to the converged ones, dB"


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
    budget.add_argument("--calls", type=float, help="the budget: the multiply-accumulates of so many full network "
                                                    "calls per image; fractions count")
    budget.add_argument("--macs", type=float, metavar="G",
                        help="the budget: 10^9 multiply-accumulates per image (the `macs` of eval.macs; both rows of "
                             "guidance included)")
    budget.add_argument("--speedup", type=float, metavar="X",
                        help="the budget: 1/X of the multiply-accumulates of the config's own uncached run")
    search.add_argument("--seeds", required=True, help="runs to learn from")
    search.add_argument("--held-out-seeds", required=True, help="runs to choose on")
    search.add_argument("--report-seeds", help="runs to report on (default: as many as the held-out ones, after them)")
    search.add_argument("--attempts", type=int, default=80, help="changes of the best plans to try (default: 80)")
    search.add_argument("--converged-steps", type=int, default=200, help="of the run to come near to (default: 200)")
    search.add_argument("--out", type=Path, required=True, help="plan to write, .json")
    search.add_argument("--work", type=Path, help="folder of what is measured (default: OUT.work)")
    arguments.add(parser, Machine)
    if config is not None:
        parser.set_defaults(batch_size=family_named_by(config).batch_size)
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


def prices_of(run: Run, args: argparse.Namespace) -> Prices:
    """The budget in full calls, and what cached ones cost. run: the config's own. Raises UserError."""
    costs = costs_of(run)
    if args.calls is not None:
        budget = args.calls
    elif args.macs is not None:
        budget = args.macs * 1e9 / (costs.full.hook * run.rows_per_image)
    else:
        budget = run.calls / args.speedup if args.speedup > 0 else 0.0
    if not 2 <= budget <= run.config.diffusion.num_timesteps:
        raise UserError(f"the budget must be 2 full network calls per image or more, and no more than there are "
                        f"timesteps; this is {budget:.3g}")
    branches = range(min(LEVELS, run.unet.num_branches))
    return Prices(budget, {branch: costs.calls(DeepCache(branch, [0]), 2)[1].hook / costs.full.hook
                           for branch in branches})


def plan_of(trial: Trial, distances: Distances, run: Run, distance: dict[str, Any], notes: dict[str, Any]) -> Plan:
    """The file of what was found. run: the trial's, without its caching."""
    costs, calls = costs_of(run), list(trial.run.calls)
    of_calls = costs.calls(PlanCache(calls), len(calls))
    settings = distances.model.settings | run.sampler.settings
    guidance = None
    if "guidance" in settings:
        guidance = [run.guidance / GUIDANCE_RANGE, run.guidance * GUIDANCE_RANGE]
    return Plan({key: settings[key] for key in BOUND}, guidance, calls,
                {name: sum(getattr(one, name) for one in of_calls) for name in ("hook", "fc")},
                costs.full._asdict(), distance, notes)


def report(chosen: Trial, arms: list[Trial], distances: Distances, seeds: list[int]) -> dict[str, Metric]:
    """The distances of the plan and of all other arms on the same seeds, and the paired differences."""
    ours = distances.of(chosen.run, seeds)
    found = {"plan": Metric.of(mean_estimate(ours))}
    for arm in arms:
        theirs = distances.of(arm.run, seeds)
        found[arm.kind] = Metric.of(mean_estimate(theirs))
        found[f"plan less {arm.kind}"] = Metric.of(mean_estimate(ours - theirs))
    return found


def about(trial: Trial, prices: Prices) -> dict[str, Any]:
    """What the report says of a candidate."""
    return {"kind": trial.kind, "sampler": trial.run.sampler, "steps": trial.run.steps, "order": trial.order,
            "full_calls": prices.of(trial.depths), "branches": list(trial.depths)}


def check(args: argparse.Namespace) -> None:
    """Refuse options that cannot be. Raises UserError."""
    check_out(args.out, ".json")
    if args.compile or args.cuda_graphs:
        raise UserError("--compile and --cuda-graphs are for sampling: runs here are short and all different")
    if args.attempts < 0 or args.converged_steps < 2:
        raise UserError("--attempts must be 0 or more, --converged-steps 2 or more")


@command
def main() -> None:
    args, started = build_parser(sys.argv[1:]).parse_args(), time.time()
    check(args)
    family, seeds = family_named_by(args.config), Seeds.chosen(args)
    spec = spec_of(args, family)
    own = spec.open()
    prices, machine = prices_of(own, args), arguments.chosen(Machine, args)
    own.family.open(own, machine).check_seeds([*seeds.learn, *seeds.choose, *seeds.report])
    print(f"{own.config.name}: {prices.budget:.4g} full network calls per image; the config's own run has {own.calls}",
          flush=True)
    distances = Distances(spec, machine, args.work or args.out.with_suffix(".work"), args.converged_steps)
    measured = GapMeasurements(distances, sorted(prices.cached), seeds.learn[:8])
    samplers = tuple(dict.fromkeys([*SAMPLERS, own.default_sampler]))
    found = Tournament(distances, measured, prices, samplers, seeds.learn, args.attempts).run()
    scores = {trial: distances.of(trial.run, seeds.choose).mean() for trial in found}
    chosen = max(found, key=scores.__getitem__)
    arms = [trial for trial in found if trial.kind != "plan"]

    metrics = report(chosen, arms, distances, seeds.report)
    notes = {"budget": prices.budget, "learnt_on": format_seeds(seeds.learn), "chosen_on": format_seeds(seeds.choose),
             "kind": chosen.kind, "order": chosen.order}
    mean = metrics["plan"]
    distance = {"what": MEASURED, "converged": f"{CONVERGED}, {args.converged_steps} {SPACING} steps",
                "seeds": format_seeds(seeds.report), "mean": mean.value, "interval": mean.interval}
    run = distances.run(chosen.run.sampler, chosen.run.steps)
    plan = plan_of(chosen, distances, run, distance, notes)
    details = {**notes, "reported_on": format_seeds(seeds.report), "chosen": about(chosen, prices),
               "arms": [about(trial, prices) for trial in arms]}
    results.write(args.out.with_suffix(".search.json"), Result(
        "plan search", run.config.name, run.told, len(seeds.report), metrics,
        hashes={"checkpoint": plan.run["checkpoint_sha256"], "plan": plan.sha256},
        provenance=provenance(distances.model.device), details=details).stamped(started))
    write_json(args.out, plan.to_json())
    print(f"{len(seeds.report)} seeds that nothing was chosen on; {MEASURED}, 95% intervals:")
    for name, one in metrics.items():
        print("{:40} {:7.2f} [{:.2f}, {:.2f}]".format(name, *one.bounds))
    print(f"{args.out}: {chosen.run.sampler}, {chosen.run.steps} steps, {plan.cost:.2f} full calls "
          f"({chosen.depths.count(None)} calls compute everything)")


if __name__ == "__main__":
    main()
