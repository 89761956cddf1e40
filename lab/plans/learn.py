"""Learn plans by gradient through the sampler: timesteps, solver and forecasts together, with a frozen network.

    python -m lab.plans learn --config configs/ldm_emoji.yaml --plan plan.json --calls 8 12 --seeds 1000-1063 \\
        --held-out-seeds 2000-2031 --out learned
    python -m ldm.sample --config configs/ldm_emoji.yaml --plan learned/plan.json --seeds 0-63 --out samples/learned

With --plan, learning starts from the plans of a search, and keeps what their calls compute. With --calls N, it starts
from N steps without caching, at timesteps that are first fitted to the model; the plan is MODEL_N_steps.json. The loss
is the distance of the images of --seeds to the converged images (unet_caching/learning.py). The iteration that is best
on the held-out seeds is written, which may be the start. The report uses other seeds. After a kill the same command
goes on and finds the same plans.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from eval.metrics.intervals import mean_estimate
from lab.fit.fit import check_float32
from lab.plans.candidates import fewer_steps
from lab.plans.distances import Distances
from lab.plans.judge import CONVERGED, Grid, Judge, run_of
from lab.plans.plans import bound_plan, guidance_range
from lab.plans.search import GAP_SEEDS, MEASURED, SeedOptions, Seeds, distance_note
from lab.plans.timesteps import RULES, trajectory
from run.families import Condition, family_named_by, load_unet
from run.image_model import ImageModel, open_model
from run.machine import Machine
from run.results import Metric
from run.seeds import format_seeds, parse_seeds
from run.spec import NetworkOptions, config_among, parse_run
from unet_caching.errors import UserError, as_user_error
from unet_caching.learning import Learner, Learning, Recomputed, Start, learned_plan, solved
from unet_caching.methods.plan import SAMPLING, Plan
from unet_caching.options import option, required
from unet_caching.policy import Policy
from unet_caching.samplers.diffusion import Predict


@dataclass(frozen=True)
class Options(SeedOptions):
    title: ClassVar[str] = "the learning"
    out: Path = required("folder of the plans to write")
    plan: tuple[Path, ...] = option((), "plans to start from", metavar="FILE")
    calls: tuple[int, ...] = option((), "numbers of steps without caching to learn", metavar="N", least=2)
    iterations: int = option(Learning.iterations, "iterations of Adam for each plan (default: %(default)s)", least=1)
    lr: float = option(Learning.lr, "learning rate (default: %(default)s; unet_caching/learning.py)")
    last: int | None = option(Learning.last, "learn coefficients only for so many of the last predictions (default: "
                                             "all)", least=1)
    jobs: int = option(1, "plans to learn at once, each in a process with --threads (default: 1)", least=1)
    keep_activations: bool = option(False, "a third faster, with the memory of all network calls instead of one")
    work: Path | None = option(None, "folder of measurements (default: OUT/work)")


# The sampler options of the converged run, which a plan has itself.
SAMPLING_OF_PLAN = dict.fromkeys(SAMPLING)


class Task(NamedTuple):
    """One plan to learn."""
    plan: Path | int    # to start from, or a number of steps without caching
    out: Path
    state: Path         # the state of learning so far
    seeds: Seeds
    how: Learning
    options: Options


def start_of(model: ImageModel, keep: bool) -> Start:
    """The function that starts runs of a loaded model. keep: whether to keep the activations of all calls.

    The U-Net is loaded again, since packed weights have no gradients (unet_caching/speed/packed.py).
    """
    unet = load_unet(model.config, model.run.checkpoint, **model.run.weights)
    unet.to(model.device, memory_format=torch.channels_last)    # type: ignore[call-overload]  # not in the stubs
    network = unet if keep else Recomputed(unet)

    def start(seeds: Sequence[int], policy: Policy | None) -> tuple[Predict, Tensor]:
        return model.start(seeds, policy, network if torch.is_grad_enabled() else None)[:2]
    return start


def fitted_steps(judge: Judge, calls: int, seeds: list[int]) -> Plan:
    """The plan of `calls` steps without caching, at the best of the timesteps that are fitted to the model."""
    found = trajectory(judge, seeds[:GAP_SEEDS])
    lists = dict.fromkeys(lists[calls - 1] for rule in RULES if len(lists := found.fitted(rule, calls)) >= calls)
    if not lists:
        raise UserError(f"--calls {calls} is more than the steps of the converged run: take fewer")
    runs = [fewer_steps(CONVERGED, Grid(calls, timesteps), calls) for timesteps in lists]
    scores = judge.measure(runs, seeds, "fitted timesteps")
    best = max(zip(runs, scores, strict=True), key=lambda pair: pair[1].mean())[0]
    run = judge.run(best.sampler, best.grid)
    return bound_plan(run, judge.distances.checkpoint_sha256, best.calls, guidance_range(run), {"budget": calls})


def check_unseen(file: Path, report: Sequence[int]) -> None:
    """Refuse to report on seeds that a plan was found on. Raises UserError."""
    with as_user_error():
        notes = Plan.load(file).notes
    found_on = {seed for said in (notes, notes.get("learned", {})) for key in ("learnt_on", "chosen_on")
                if re.fullmatch(r"[\d,-]+", said.get(key, "")) for seed in parse_seeds(said[key])}
    if seen := found_on.intersection(report):
        raise UserError(f"{file} was found on seeds {format_seeds(found_on)}, and the report would use "
                        f"{format_seeds(seen)} of them: name other seeds with --report-seeds")


def learn_one(judge: Judge, task: Task) -> str:
    """Learn a plan and write it. Returns a line with its distance and gain."""
    distances, seeds, before = judge.distances, task.seeds, task.state.with_suffix(".json")
    with as_user_error():
        plan = fitted_steps(judge, task.plan, seeds.learn) if isinstance(task.plan, int) else Plan.load(task.plan)
        plan.save(before)                   # unchanged, for a run of it
        run = distances.run.spec.having(**SAMPLING_OF_PLAN, plan=before).open()
        distances.check(run)
        diffusion = run.config.diffusion
        start = start_of(distances.on(run), task.options.keep_activations)
        learner = Learner(solved(plan, diffusion), start, diffusion.alphas_cumprod(),
                          lambda some: distances.converged(some, title=None), seeds.learn, seeds.choose, task.how,
                          task.state, str(distances.folder))
        outcome = learner.learn(task.out.stem if task.options.jobs == 1 else None)
        made = learned_plan(plan, outcome, {"learnt_on": format_seeds(seeds.learn),
                                            "chosen_on": format_seeds(seeds.choose)})
        made.save(task.out)
    after = distances.run.spec.having(**SAMPLING_OF_PLAN, plan=task.out).open()
    scores = [distances.of(one, seeds.report) for one in (run, after)]
    distance, gain = (Metric.of(mean_estimate(values)) for values in (scores[1], scores[1] - scores[0]))
    notes = {"distance": distance_note(distance, judge, seeds.report),
             "gain": {"mean": gain.value, "interval": gain.interval}}
    replace(made, notes=made.notes | notes).save(task.out)
    return ("{}: {:.2f} [{:.2f}, {:.2f}] dB".format(task.out, *distance.bounds)
            + ", {:+.2f} [{:+.2f}, {:+.2f}] by what was learned".format(*gain.bounds))


def learn(words: Sequence[str]) -> None:
    """Learn plans, with the options of a command line."""
    config = config_among(words)
    usual = {"threads": 1} | ({"batch_size": min(8, family_named_by(config).batch_size)} if config else {})
    spec, options, machine = parse_run(__doc__, Options, Machine, words=words, parts=(Condition, NetworkOptions),
                                       defaults=usual, prog="python -m lab.plans learn")
    seeds, own = Seeds.of(options, machine), spec.open()
    model = open_model(own, machine)
    check_float32(model)
    model.check_seeds([*chain(*seeds)])
    for plan in options.plan:
        check_unseen(plan, seeds.report)
    outs = {plan: options.out / plan.name for plan in options.plan} | {
        calls: options.out / f"{own.config.name}_{calls}_steps.json" for calls in options.calls}
    if not outs or len(set(outs.values())) < len(outs):
        raise UserError("name what to learn: --plan, plans of different names, or --calls, steps without caching")
    work = options.work or options.out / "work"
    (work / "learning").mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    judge = Judge(Distances(run_of(spec, CONVERGED, Grid(options.converged_steps)), machine, work))
    how = Learning(options.iterations, machine.batch_size, options.lr, last=options.last)
    tasks = [(Task(plan, out, work / "learning" / f"{out.stem}.state", seeds, how, options),)
             for plan, out in outs.items()]
    with judge.processes(options.jobs):
        judge.converge([*chain(*seeds)])
        lines = judge.each(learn_one, tasks, "plans", "plan")
    print(f"{len(seeds.report)} seeds that nothing was learned or chosen on; {MEASURED}, 95% intervals:")
    print("\n".join(lines))
