"""Find the plan with the best images for a budget, for one model: the sampler, the number of steps, what each network
call computes, and what it reuses or forecasts.

    python -m lab.plans search --config configs/ldm_emoji.yaml --calls 12 --seeds 1000-1031 \\
        --held-out-seeds 2000-2063 --out plan.json
    python -m ldm.sample --config configs/ldm_emoji.yaml --plan plan.json --seeds 0-63 --out samples/plan

The best plan is the one whose images come nearest to the converged images of the same seeds (UniPC, 100 trailing
steps), in dB of the latents. The search has three stages. It measures the error of every gap between computed calls.
Dynamic programming turns these errors into schedules. Real runs then decide, of ever fewer schedules on ever more
seeds, and small changes of the best are tried. Fewer steps without caching and uniform schedules always take part. The
plan is chosen on the held-out seeds; the report, OUT.search.json, uses other seeds.

The search begins by printing how many network calls it makes at most, and how long they take. Measurements are kept in
a folder beside the plan. After a kill the same command goes on and comes to the same plan, with any number of
processes. Searches for other budgets of the same model may share the folder (--work).
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from eval.cost.runs import costs_of
from eval.cost.timing import interleave
from eval.metrics.intervals import mean_estimate
from lab.fit.fit import check_out, check_runs, own_unet
from lab.plans.candidates import PLAN, Prices
from lab.plans.distances import Distances
from lab.plans.gaps import GapMeasurements
from lab.plans.judge import CONVERGED, SPACING, Candidate, Grid, Judge, run_of
from lab.plans.plans import bound_plan, guidance_range
from lab.plans.tournament import Tournament
from run import results
from run.families import Condition, example_inputs, family_named_by
from run.image_model import open_model
from run.machine import Machine
from run.provenance import provenance
from run.results import Metric, Result
from run.seeds import format_seeds, parse_seeds
from run.spec import NetworkOptions, Run, config_among, parse_run
from unet_caching.errors import UserError
from unet_caching.methods.deepcache import DeepCache
from unet_caching.methods.plan import Plan
from unet_caching.options import option, required

SAMPLERS = ("unipc", "dpmpp", "dpmpp3", "deis", "ddim")
LEVELS = 3                  # the cheapest ones, among which plans choose
MEASURED = "PSNR of the latents to the converged ones, dB"
GAP_SEEDS = 8
NOTED = 10                  # reported candidates of each kind that were only tried on few seeds


@dataclass(frozen=True)
class SeedOptions:
    """The seeds to learn from, to choose on and to report on."""
    title: ClassVar[str] = "the runs"
    seeds: str = required("seeds to learn from")
    held_out_seeds: str = required("seeds to choose on")
    report_seeds: str | None = option(None, "seeds to report on (default: as many as the held-out ones, after them)")
    converged_steps: int = option(100, "steps of the converged run (default: 100)", least=2)


@dataclass(frozen=True)
class Options(SeedOptions):
    title: ClassVar[str] = "the search"
    out: Path = required("plan to write, .json")
    calls: float | None = option(None, "the budget: the multiply-accumulates of X full network calls per image, "
                                       "which may be a fraction", one_of="budget")
    macs: float | None = option(None, "the budget: 10^9 multiply-accumulates per image (the `macs` of eval.macs; both "
                                      "rows of guidance included)", metavar="G", one_of="budget")
    speedup: float | None = option(None, "the budget: 1/X of the multiply-accumulates of the config's own uncached run",
                                   metavar="X", one_of="budget")
    attempts: int = option(48, "changes of the best plan to try (default: 48)", least=0)
    jobs: int = option(1, "processes that measure at once, each with --threads (default: 1)", least=1)
    work: Path | None = option(None, "folder of measurements (default: OUT.work)")

    def prices(self, run: Run) -> Prices:
        """The budget in full calls, and the cost of cached calls. run: the config's own. Raises UserError."""
        costs = costs_of(run)
        levels = range(min(LEVELS, run.unet.num_branches))
        cached = {branch: costs.calls(DeepCache(branch, [0]), 2)[1].hook / costs.full.hook for branch in levels}
        if self.calls is not None:
            budget = self.calls
        elif self.macs is not None:
            budget = self.macs * 1e9 / (costs.full.hook * run.rows_per_image)
        elif self.speedup is not None:
            budget = run.calls / self.speedup if self.speedup > 0 else 0.0
        else:
            raise UserError("name the budget with --calls, --macs or --speedup")
        if not 2 <= budget <= run.config.diffusion.num_timesteps:
            raise UserError(f"the budget must be from 2 to {run.config.diffusion.num_timesteps} full network calls per "
                            f"image, got {budget:.3g}")
        return Prices(budget, cached)


class Seeds(NamedTuple):
    """The three sets of seeds."""
    learn: list[int]
    choose: list[int]
    report: list[int]

    @classmethod
    def of(cls, options: SeedOptions, machine: Machine) -> "Seeds":
        """The seeds of the options. Raises UserError if two sets share a seed or one is too small; and as `check_runs`.
        """
        learn, choose = parse_seeds(options.seeds), parse_seeds(options.held_out_seeds)
        after = max(*learn, *choose) + 1
        report = parse_seeds(options.report_seeds) if options.report_seeds else [*range(after, after + len(choose))]
        for name, seeds in (("--seeds", learn), ("--held-out-seeds", choose), ("--report-seeds", report)):
            if len(seeds) < 4:
                raise UserError(f"{name} must be 4 or more, to compare runs on them, got {len(seeds)}")
        check_runs(machine, seeds=learn, held_out_seeds=choose, report_seeds=report)
        return cls(learn, choose, report)


def announce(tournament: Tournament, seeds: Seeds, jobs: int) -> None:
    """Print how much there is to compute, before it begins."""
    budget, distances = tournament.prices.budget, tournament.judge.distances
    size, unet = distances.machine.batch_size, own_unet(distances.model)
    inputs = example_inputs(distances.run.config, size * distances.run.rows_per_image, distances.model.device,
                            distances.run.dtype)
    seconds = interleave({"full": lambda: unet(*inputs)}, distances.model.device, 5, 1)["full"].median / size
    others = (6 * len(seeds.choose) + 4 * len(seeds.report)) * budget
    calls = len(distances.missing([*chain(*seeds)])) * distances.run.calls + tournament.network_calls() + others
    print(f"{budget:.4g} full network calls per image, {distances.run.calls} for a converged one: at most "
          f"{calls:,.0f} of them, of one image each, take about {calls * seconds / jobs / 60:.2g} minutes at "
          f"{1e3 * seconds:.3g} ms in {jobs} process{'es' if jobs > 1 else ''}; what was measured before is not "
          "measured again", flush=True)


def noted(found: Sequence[Candidate], first: Sequence[tuple[Candidate, float]], prices: Prices) -> list[dict[str, Any]]:
    """The candidates for the report: the plan, what it is compared with, and of each kind the nearest on few seeds."""
    means, met = dict(first), Counter[str]()
    tried = list(found)
    for candidate, _ in first:
        met[candidate.kind] += 1
        tried += [candidate] if met[candidate.kind] <= NOTED and candidate not in found else []
    return [{"kind": one.kind, "sampler": one.sampler, **one.grid._asdict(), "order": one.order,
             "full_calls": round(prices.of(one.depths), 4), "branches": list(one.depths),
             "few_seeds": round(means[one], 2) if one in means else None} for one in tried]


def search(words: Sequence[str]) -> None:
    """Search, with the options of a command line."""
    started, config = time.time(), config_among(words)
    usual = {"threads": 1} | ({"batch_size": min(16, family_named_by(config).batch_size)} if config else {})
    spec, options, machine = parse_run(__doc__, Options, Machine, words=words, parts=(Condition, NetworkOptions),
                                       defaults=usual, prog="python -m lab.plans search")
    check_out(options.out, ".json")
    seeds, own = Seeds.of(options, machine), spec.open()
    prices = options.prices(own)
    open_model(own, machine).check_seeds([*chain(*seeds)])
    judge = Judge(Distances(run_of(spec, CONVERGED, Grid(options.converged_steps)), machine,
                            options.work or options.out.with_suffix(".work")))
    samplers = tuple(dict.fromkeys([*SAMPLERS, own.config.sampler.sampler]))
    measured = GapMeasurements(judge, sorted(prices.cached), seeds.learn[:GAP_SEEDS])
    tournament = Tournament(judge, measured, prices, samplers, seeds.learn, options.attempts)
    announce(tournament, seeds, options.jobs)
    with judge.processes(options.jobs):
        found, metrics = decide(tournament, seeds)
    notes = {"budget": prices.budget, "learnt_on": format_seeds(seeds.learn), "chosen_on": format_seeds(seeds.choose),
             "kind": found[0].kind, "order": found[0].order}
    plan = plan_of(found[0], judge, metrics["plan"], seeds.report, notes)
    details = {**notes, "reported_on": format_seeds(seeds.report), "reported": len(found),
               "candidates": noted(found, tournament.first, prices)}
    results.write(options.out.with_suffix(".search.json"), Result(
        "plan search", own.config.name, judge.run(found[0].sampler, found[0].grid).brief, len(seeds.report), metrics,
        hashes={"checkpoint": plan.made_for["checkpoint_sha256"], "plan": plan.sha256}, details=details,
        provenance=provenance(judge.distances.model.device)).stamped(started))
    plan.save(options.out)
    print(f"{len(seeds.report)} seeds that nothing was chosen on; {MEASURED}, 95% intervals:")
    for name, one in metrics.items():
        print("{:40} {:7.2f} [{:.2f}, {:.2f}]".format(name, *one.bounds))
    print(f"{options.out}: {found[0]}, {plan.cost:.2f} full calls ({found[0].depths.count(None)} calls compute "
          "everything)")


def decide(tournament: Tournament, seeds: Seeds) -> tuple[list[Candidate], dict[str, Metric]]:
    """The plan and the runs that it is compared with; their distances on the report's seeds, and how much nearer the
    plan is, paired by seed."""
    judge = tournament.judge
    judge.converge(seeds.learn)
    best = tournament.run()
    judge.converge(seeds.choose)
    scores = judge.measure(best, seeds.choose, "choosing")
    chosen = max(zip(best, scores, strict=True), key=lambda pair: pair[1].mean())[0]
    found = [chosen, *(one for one in best if one.group != PLAN)]
    judge.converge(seeds.report)
    ours, *theirs = judge.measure(found, seeds.report, "the report")
    metrics = {"plan": Metric.of(mean_estimate(ours))}
    for other, psnr in zip(found[1:], theirs, strict=True):
        metrics[other.kind] = Metric.of(mean_estimate(psnr))
        metrics[f"plan less {other.kind}"] = Metric.of(mean_estimate(ours - psnr))
    return found, metrics


def plan_of(chosen: Candidate, judge: Judge, metric: Metric, seeds: list[int], notes: dict[str, Any]) -> Plan:
    """The plan of the chosen candidate. metric: its distance on some seeds."""
    run = judge.run(chosen.sampler, chosen.grid)
    return bound_plan(run, judge.distances.checkpoint_sha256, chosen.calls, guidance_range(run),
                      {**notes, "distance": distance_note(metric, judge, seeds)})


def distance_note(metric: Metric, judge: Judge, seeds: list[int]) -> dict[str, Any]:
    """The note on a plan's distance in its file."""
    return {"what": MEASURED, "converged": f"{CONVERGED}, {judge.distances.run.steps} {SPACING} steps",
            "seeds": format_seeds(seeds), "mean": metric.value, "interval": metric.interval}
