"""The page of a search: the plan beside the runs that it was compared with, on seeds that nothing was chosen on."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from eval.tables.calls import calls_of
from eval.tables.page import Page, Pictures, Section, pictures_among, write
from eval.tables.svg import Line, Mark, Plot
from lab.plans.candidates import Prices, Trial
from lab.plans.judge import Judge
from run.results import Metric
from run.seeds import format_seeds, in_batches
from unet_caching.methods.plan import PlanCache

SEEN = 8                    # seeds with images
UNIT = "dB to converged"


def named(trial: Trial) -> str:
    return f"{trial.kind}, {trial.run.sampler} {trial.run.grid.steps}"


def pictures(chosen: Trial, arms: Sequence[Trial], judge: Judge, seeds: Sequence[int]) -> list[Pictures]:
    """Images of the converged run, of what was found and of the others, on the first of some seeds."""
    distances, wanted = judge.distances, list(seeds)[:SEEN]

    def images(make: Callable[[list[int]], object]) -> np.ndarray:
        batches = in_batches(wanted, distances.machine.batch_size)
        return np.concatenate([np.asarray(make(batch)) for batch in batches])

    def of(trial: Trial) -> np.ndarray:
        run = judge.run(trial.run.sampler, trial.run.grid)
        model = distances.on(run)
        return images(lambda batch: model.decode(model.latents(batch, PlanCache(trial.run.calls))))

    decode = distances.model.decode
    whole = {"converged": images(lambda batch: decode(distances.converged(batch, None).to(distances.model.device)))}
    return pictures_among(whole | {named(trial): of(trial) for trial in dict.fromkeys([chosen, *arms])}, wanted)


def rows(metrics: Mapping[str, Metric], chosen: Trial, arms: Sequence[Trial], prices: Prices) -> list[tuple[str, ...]]:
    """A row per arm, what was found first."""
    found: list[tuple[str, ...]] = [("run", "full calls, by the budget", "calls", f"{UNIT}, mean",
                                     "the plan less that, dB")]
    for name, trial in (("plan", chosen), *((arm.kind, arm) for arm in arms)):
        less = metrics.get(f"plan less {name}")
        found.append((named(trial) if trial is not chosen else f"found: {named(trial)}",
                      f"{prices.of(trial.depths):.2f}", str(len(trial.run.calls)),
                      "{:.2f} [{:.2f}, {:.2f}]".format(*metrics[name].bounds),
                      "-" if less is None else "{:+.2f} [{:+.2f}, {:+.2f}]".format(*less.bounds)))
    return found


def report(metrics: Mapping[str, Metric], chosen: Trial, arms: Sequence[Trial], judge: Judge, prices: Prices,
           seeds: Sequence[int], out: Path, words: Sequence[str]) -> None:
    """Write the page beside a plan. seeds: that nothing was chosen on. words: of the search's command line."""
    trials = {("plan" if trial is chosen else trial.kind): trial for trial in (chosen, *arms)}
    marks = [Line(named(trial), [Mark(prices.of(trial.depths), *metrics[name].bounds,
                                      f"{metrics[name].value:.2f} dB at {prices.of(trial.depths):.2f} full calls\n"
                                      f"seeds {format_seeds(list(seeds))}")])
             for name, trial in trials.items() if name in metrics]
    command = judge.distances.run.family.command
    section = Section(
        judge.spec.config.stem,
        [f"A budget of {prices.budget:.4g} full calls; {len(seeds)} seeds that nothing was chosen on: "
         f"{format_seeds(list(seeds))}."],
        rows(metrics, chosen, arms, prices), [Plot("Cost against distance", "full calls per image", UNIT, marks)],
        pictures(chosen, arms, judge, seeds),
        {named(trial): calls_of(judge.run(trial.run.sampler, trial.run.grid), trial.run.calls)
         for trial in trials.values()},
        {"sample with the plan": shlex.join(["python", "-m", command, "--config", str(judge.spec.config), "--plan",
                                             str(out)])})
    write(Page(f"Plan {out.stem}", ["What comes nearest to the converged images of the same seeds for this budget."],
               [section], [f"Made by `{shlex.join(['python', '-m', 'lab.plans.search', *words])}`."]),
          out.with_suffix(".html"))
