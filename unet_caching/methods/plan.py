"""A run as a plan: which blocks each network call computes, and which values it reuses or forecasts.

A call computes everything, or only the blocks down to a branch b: 0..b of encoder and decoder. At b it takes the inner
level's last value, or a forecast of it (forecast.py). Calls of different depths may follow each other in any order, so
several levels are kept at once. A call refreshes the levels that it computes, 0..b-1; the levels from b on stay
unchanged.

A plan belongs to one model, sampler, number of steps, spacing of timesteps and range of guidance.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from unet_caching.files.fitted import Fitted
from unet_caching.files.schema import AtLeast
from unet_caching.forecast import Forecast
from unet_caching.keep import Keep
from unet_caching.methods.deepcache import DeepCacheMethod
from unet_caching.options import Method, MethodOptions, RunShape, option
from unet_caching.samplers.table import Table
from unet_caching.samplers.timesteps import is_listed

HIGHEST_ORDER = 3           # higher orders only amplify what is not smooth
SAMPLING = ("sampler", "steps", "timesteps")


@dataclass(frozen=True)
class Call:
    """What one network call does."""
    # None computes everything; b computes down to skip b, and reuses or forecasts the inner level.
    branch: int | None = None
    # A weight per term of the forecast, so its order is their number: () is reuse, (1.0,) is linear. Terms that need
    # more values than have been computed so far have no effect.
    damping: tuple[float, ...] = ()

    def refreshes(self, level: int) -> bool:
        """Whether the call computes the level at this skip."""
        return self.branch is None or level < self.branch


def check_calls(calls: Sequence[Call]) -> None:
    """Raise a ValueError for calls that are not a plan. It names the wrong call."""
    if not calls:
        raise ValueError("a plan needs at least one network call")
    if calls[0].branch is not None:
        raise ValueError("call 0 of a plan must compute everything: there is nothing to reuse yet")
    for step, call in enumerate(calls):
        if call.branch is not None and call.branch < 0:
            raise ValueError(f"call {step} of the plan: a branch must be 0 or more, got {call.branch}")
        if call.branch is None and call.damping:
            raise ValueError(f"call {step} of the plan computes everything: there is nothing to forecast")
        if len(call.damping) > HIGHEST_ORDER:
            raise ValueError(f"call {step} of the plan has {len(call.damping)} terms of a forecast, but may have at "
                             f"most {HIGHEST_ORDER}")


class PlanCache(Keep):
    """Compute, reuse and forecast as a plan says, call by call.

    `unet(x, t, cache=cache.at(step))` runs network call `step`. Between calls one tensor is held for each level that
    some call reuses, and one more for each order of its forecasts. Raises ValueError for calls that are not a plan;
    RuntimeError for a call that the plan does not have, or that would reuse a value that was never computed.
    """

    def __init__(self, calls: Sequence[Call]):
        check_calls(calls)
        self.calls = tuple(calls)
        levels = sorted({call.branch for call in calls if call.branch is not None})
        super().__init__({level: [step for step, call in enumerate(calls) if call.refreshes(level)]
                          for level in levels}, {level: _forecast(calls, level) for level in levels})

    def at(self, step: int) -> "PlanCache":
        if not 0 <= step < len(self.calls):
            raise RuntimeError(f"the plan has {len(self.calls)} network calls, and none for call {step}")
        super().at(step)
        return self


def _forecast(calls: Sequence[Call], level: int) -> Forecast:
    """The forecast of a level on the calls of a plan that reuse it. On all others it is not used."""
    damping = [call.damping if call.branch == level else () for call in calls]
    order = max(map(len, damping))
    return Forecast(order, [[*one, *[0.0] * (order - len(one))] for one in damping])


@dataclass
class Plan(Fitted):
    """What each network call does, and the runs that the plan is for."""
    kind = "plan"
    maker = "python -m lab.plans search"
    calls: list[Call]
    guidance: list[float] | None        # the least and the most that the plan is for; None: a model without guidance
    macs: dict[str, Annotated[float, AtLeast(1)]]           # "hook", "fc": all calls of an image, one row of the batch
    macs_full: dict[str, Annotated[float, AtLeast(1)]]      # of one call that computes everything
    solver: Table | None = None         # the learned solver; None: the sampler's

    @property
    def cost(self) -> float:
        """The plan's MACs (hook) in full network calls."""
        return self.macs["hook"] / self.macs_full["hook"]

    @property
    def deepest(self) -> int:
        """The deepest branch of the cached calls."""
        return max((call.branch for call in self.calls if call.branch is not None), default=0)

    def fault(self) -> str | None:
        try:
            check_calls(self.calls)
            if self.solver is not None:
                self.solver.check(len(self.calls))
        except ValueError as error:
            return str(error)
        if self.solver is not None and not is_listed(self.made_for["timesteps"]):
            return f"a solver goes with a list of timesteps, not with {self.made_for['timesteps']}"
        guidance = self.guidance
        if guidance is not None and not (len(guidance) == 2 and 0 <= guidance[0] <= guidance[1]):
            return f"guidance is {guidance!r}, and should be the least and the most"
        wrong = [macs for macs in (self.macs, self.macs_full) if macs.keys() != {"hook", "fc"}]
        return f"MACs are {wrong[0]!r}, and should be hook and fc" if wrong else super().fault()

    def check(self, settings: Mapping[str, Any]) -> None:
        super().check(settings)
        guidance = settings.get("guidance")
        if self.guidance is not None and guidance is not None:
            least, most = self.guidance
            if not least <= guidance <= most:
                raise ValueError(f"the plan was made for another run: guidance {least:g} to {most:g} there, "
                                 f"{guidance:g} here")


class PlanMethod(Method):
    """A plan in a run."""

    def __init__(self, plan: Plan, file: Path):
        self.plan, self.files = plan, (plan,)
        branches = [call.branch for call in plan.calls]
        self.settings = {"full_steps": [step for step, branch in enumerate(branches) if branch is None],
                         "plan": {"sha256": plan.sha256, "branches": branches,
                                  "damping": [list(call.damping) for call in plan.calls]}}
        self.name = [f"plan_{Path(file).stem}"]
        cached = Counter(branch for branch in branches if branch is not None)
        self.summary = (f"a {'plan' if plan.solver is None else 'learned plan'} of {plan.cost:.2f} full calls ("
                        + ", ".join([f"{branches.count(None)} full",
                                     *(f"{n} at branch {branch}" for branch, n in sorted(cached.items()))]) + ")")

    def policy(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> PlanCache:
        return PlanCache(self.plan.calls)

    def extrapolate(self, forecast: Forecast, calls: int) -> None:
        raise ValueError("the plan has a forecast for each call: leave out --forecast")


@dataclass(frozen=True)
class PlanOptions(MethodOptions):
    """A plan for all network calls, with the sampler, steps and timesteps that it was made for."""
    title = "caching (a plan: what each network call computes)"
    plan: Path | None = option(None, "a plan by lab.plans for this model and a budget; "
                                     "brings sampler, steps and timesteps", metavar="FILE")

    def sampling(self) -> Mapping[str, Any]:
        if self.plan is None:
            return {}
        plan = Plan.load(self.plan)
        return {key: plan.made_for[key] for key in SAMPLING} | {"table": plan.solver}

    def bind(self, shape: RunShape, others: Sequence[Method]) -> PlanMethod | None:
        if self.plan is None:
            return None
        if others:
            other = "--interval" if isinstance(others[0], DeepCacheMethod) else "--block-schedule"
            raise ValueError(f"the plan says what each call computes: leave out {other}")
        plan = Plan.load(self.plan)
        plan.check({"steps": shape.steps})
        if len(plan.calls) != shape.calls:
            raise ValueError(f"the plan {self.plan} has {len(plan.calls)} network calls, this run makes {shape.calls}")
        if plan.deepest >= shape.num_branches:
            raise ValueError(f"the plan {self.plan} was made for another model: it has branch {plan.deepest}, this "
                             f"model has branches 0 to {shape.num_branches - 1}")
        return PlanMethod(plan, self.plan)
