"""Plan files for a model: a plan's binding to its model, the cost of its calls, and the transfer to another model.

    python -m lab.plans transfer --plan checkpoints/plans/sd_emoji_18.json --config configs/sd_v15.yaml --out plan.json
    python -m stable_diffusion.sample --config configs/sd_v15.yaml --plan plan.json --prompts prompts.txt --out plan

transfer saves the time of a search: the other model gets the same steps, timesteps, depths and forecasts, at its own
cost. docs/planning.md says how well that works. A learned solver can only go to models with the same noise schedule.
Nothing is measured on the other model, so the plan holds for any weights and any guidance. Depths are branches, counted
from the outside, which both models must have.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval.cost.runs import costs_of
from lab.fit.fit import check_out
from run.spec import Run, RunSpec
from unet_caching.errors import UserError, as_user_error
from unet_caching.methods.plan import SAMPLING, Call, Plan, PlanCache
from unet_caching.options import required

GUIDANCE_RANGE = 1.5        # a plan is assumed to hold for guidance scales up to this factor larger or smaller


def guidance_range(run: Run) -> list[float] | None:
    """The smallest and the largest guidance scale for which a run's plan is assumed to hold."""
    if run.config.sampler.guidance is None:
        return None
    return [run.guidance / GUIDANCE_RANGE, run.guidance * GUIDANCE_RANGE]


def bound_plan(run: Run, checkpoint_sha256: str | None, calls: Sequence[Call], guidance: list[float] | None,
               notes: dict[str, Any]) -> Plan:
    """The plan of these calls for a model.

    run: with the sampler, steps and timesteps of the plan, and without caching. checkpoint_sha256: of its weights;
    None: for any weights. The rest: see `Plan`.
    """
    costs = costs_of(run)
    of_calls = costs.calls(PlanCache(calls), len(calls))
    macs = {name: sum(getattr(one, name) for one in of_calls) for name in ("hook", "fc")}
    return Plan(run.made_for(checkpoint_sha256), list(calls), guidance, macs, costs.full._asdict(), notes=notes)


def transferred(plan: Plan, config: Path) -> Plan:
    """The plan for the model of a config.

    Raises UserError if the model has too few branches, no such timesteps, or another noise schedule than a learned
    solver needs.
    """
    run = RunSpec.of(config, **{key: plan.made_for[key] for key in SAMPLING}, eta=None).open()
    _ = run.sampler
    if plan.deepest >= run.unet.num_branches:
        raise UserError(f"the plan has branch {plan.deepest}, and {run.config.name} has branches 0 to "
                        f"{run.unet.num_branches - 1}: take another plan")
    own = run.spec.config.with_name(f"{plan.made_for['model']}.yaml")
    if plan.solver is not None and not (own.is_file() and _same_noise(RunSpec.of(own).open(), run)):
        raise UserError(f"the plan's solver was learned for the noise schedule of {own.stem}, which {run.config.name} "
                        "is not known to have: take the plan that it was learned from")
    notes = {**plan.notes, "distance": None, "found_on": plan.made_for["model"], "found_sha256": plan.sha256}
    return replace(bound_plan(run, None, plan.calls, None, notes), solver=plan.solver)


def _same_noise(run: Run, other: Run) -> bool:
    one, two = (each.config.diffusion.alphas_cumprod() for each in (run, other))
    return one.shape == two.shape and bool((one - two).abs().max() < 1e-6)


@dataclass(frozen=True)
class Transfer:
    plan: Path = required("plan of another model")
    config: Path = required("config of the model to write it for, configs/*.yaml")
    out: Path = required("plan to write, .json")


def transfer(options: Transfer) -> None:
    """Write a plan of one model for another."""
    check_out(options.out, ".json")
    with as_user_error():
        plan = Plan.load(options.plan)
    made = transferred(plan, options.config)
    made.save(options.out)
    model, sampler, steps = (made.made_for[key] for key in ("model", "sampler", "steps"))
    print(f"{options.out}: {model}, {sampler}, {steps} steps, {made.cost:.2f} full calls ({plan.cost:.2f} on "
          f"{plan.made_for['model']}); not measured on this model")
