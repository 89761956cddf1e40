"""Plan files for a model: what binds a plan to it, and what its calls cost there."""

from collections.abc import Mapping, Sequence
from typing import Any

from eval.cost.runs import costs_of
from run.spec import Run
from unet_caching.files.fitted import BOUND
from unet_caching.files.plan_file import Plan
from unet_caching.methods.plan import Call, PlanCache


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
