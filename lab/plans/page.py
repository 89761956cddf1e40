"""The page of a search: the plan beside the runs that it was compared with, on seeds that nothing was chosen on."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from eval.tables.calls import calls_of
from eval.tables.page import Page, Section, pictures_among, write
from eval.tables.svg import Line, Mark, Plot
from lab.plans.candidates import Prices
from lab.plans.judge import Candidate, Judge
from run.results import Metric
from run.seeds import format_seeds, in_batches
from unet_caching.methods.plan import PlanCache

SEEN = 8                    # seeds with images
UNIT = "dB to converged"


def images(found: Mapping[str, Candidate], judge: Judge, seeds: Sequence[int]) -> dict[str, np.ndarray]:
    """Of the converged run and of candidates, by name: uint8 [seeds, height, width, 3]."""
    distances = judge.distances

    def of(make: Callable[[list[int]], np.ndarray]) -> np.ndarray:
        return np.concatenate([make(batch) for batch in in_batches(seeds, distances.machine.batch_size)])

    model = distances.model
    made = {"converged": of(lambda batch: model.decode(distances.converged(batch, None).to(model.device)))}
    for name, one in found.items():
        model = distances.on(judge.run(one.sampler, one.grid))
        made[name] = of(lambda batch: model.decode(model.latents(batch, PlanCache(one.calls))))
    return made


def write_page(metrics: Mapping[str, Metric], found: Sequence[Candidate], judge: Judge, prices: Prices,
               seeds: Sequence[int], out: Path, words: Sequence[str]) -> None:
    """Write the page beside a plan, which is the first that was found. words: of the search's command line."""
    rows: list[tuple[str, ...]] = [("run", "full calls, by the budget", "calls", f"{UNIT}, mean",
                                    "the plan less that, dB")]
    lines = []
    named = {str(one): one for one in found}
    for number, one in enumerate(found):
        cost, of_all = prices.of(one.depths), metrics["plan" if not number else one.kind]
        less = metrics.get(f"plan less {one.kind}")
        rows.append((f"{'' if number else 'found: '}{one}", f"{cost:.2f}", str(len(one.calls)),
                     "{:.2f} [{:.2f}, {:.2f}]".format(*of_all.bounds),
                     "-" if less is None or not number else "{:+.2f} [{:+.2f}, {:+.2f}]".format(*less.bounds)))
        note = f"{of_all.value:.2f} dB at {cost:.2f} full calls\nseeds {format_seeds(seeds)}"
        lines.append(Line(str(one), [Mark(cost, *of_all.bounds, note)]))
    wanted = list(seeds)[:SEEN]
    run = judge.distances.run
    sample = ["python", "-m", run.family.command, "--config", str(run.spec.config), "--plan", str(out)]
    section = Section(
        run.spec.config.stem, [f"A budget of {prices.budget:.4g} full calls; {len(seeds)} seeds that nothing was "
                                 f"chosen on: {format_seeds(seeds)}."],
        rows, [Plot("Cost against distance", "full calls per image", UNIT, lines)],
        pictures_among(images(named, judge, wanted), wanted),
        {name: calls_of(judge.run(one.sampler, one.grid), one.calls) for name, one in named.items()},
        {"sample with the plan": shlex.join(sample)})
    write(Page(f"Plan {out.stem}", ["What comes nearest to the converged images of the same seeds for this budget."],
               [section], [f"Made by `{shlex.join(['python', '-m', 'lab.plans', 'search', *words])}`."]),
          out.with_suffix(".html"))
