"""Plan files for a model: what binds a plan to it, what its calls cost there; and plans of another model.

    python -m lab.plans transfer --plan checkpoints/plans/sd_emoji_18.json --config configs/sd_v15.yaml --out plan.json
    python -m stable_diffusion.sample --config configs/sd_v15.yaml --plan plan.json --prompts prompts.txt --out plan

transfer is for who has no time for a search: the same steps, timesteps, depths and forecasts, at the other model's own
cost; docs/planning.md says what is known of how well that does. Nothing is measured on the other model: its weights and
its guidance may be any. Depths are branches, counted from the outside, which both models must have.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eval.cost.runs import costs_of
from lab.fit.fit import check_out
from run.files import write_json
from run.spec import Run, RunSpec
from unet_caching.errors import UserError, as_user_error
from unet_caching.files.fitted import BOUND
from unet_caching.files.plan_file import SAMPLING, Plan
from unet_caching.methods.plan import Call, PlanCache
from unet_caching.options import required


def bound_plan(run: Run, settings: Mapping[str, Any], calls: Sequence[Call], guidance: list[float] | None,
               distance: dict[str, Any] | None, notes: dict[str, Any]) -> Plan:
    """The plan of these calls for a model.

    run: with the sampler, steps and timesteps of the plan, and without caching. settings: of the model, as far as plans
    are bound to it (`files.fitted.BOUND`); any weights will do where they do not name some. The rest: see `Plan`.
    """
    costs = costs_of(run)
    of_calls = costs.calls(PlanCache(calls), len(calls))
    return Plan({**{key: settings.get(key) for key in BOUND}, "fingerprint": run.fingerprint}, guidance, list(calls),
                {name: sum(getattr(one, name) for one in of_calls) for name in ("hook", "fc")},
                costs.full._asdict(), distance, notes)


def transferred(plan: Plan, config: Path) -> Plan:
    """The plan for the model of a config. Raises UserError where that has too few branches, or no such timesteps."""
    run = RunSpec.of(config, **{key: plan.run[key] for key in SAMPLING}, eta=None).open()
    _ = run.sampler
    if plan.deepest >= run.unet.num_branches:
        raise UserError(f"the plan has branch {plan.deepest}, {run.config.name} has branches 0 to "
                        f"{run.unet.num_branches - 1}")
    settings = {"model": run.config.name, "unet": asdict(run.config.unet), **run.sampler.settings}
    notes = {**plan.notes, "found_on": plan.run["model"], "found_sha256": plan.sha256}
    return bound_plan(run, settings, plan.calls, None, None, notes)


@dataclass(frozen=True)
class Transfer:
    plan: Path = required("of another model")
    config: Path = required("of the model to write it for, configs/*.yaml")
    out: Path = required("plan to write, .json")


def transfer(options: Transfer) -> None:
    """Write a plan of one model for another."""
    check_out(options.out, ".json")
    with as_user_error():
        plan = Plan.load(options.plan)
    made = transferred(plan, options.config)
    write_json(options.out, made.to_json())
    print(f"{options.out}: {made.run['model']}, {made.run['sampler']}, {made.run['steps']} steps, {made.cost:.2f} full "
          f"calls ({plan.cost:.2f} on {plan.run['model']}); not measured on this model")
