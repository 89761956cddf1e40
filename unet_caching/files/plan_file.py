"""Files of plans (JSON): what each network call of a run computes, reuses and forecasts (methods/plan.py), with what
that costs and how near it comes to a converged run. A plan belongs to one model, sampler, number of steps, spacing of
timesteps and range of guidance, and is refused by any other run.

Errors are ValueErrors here, which say what was wrong with which file.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from unet_caching.files.fitted import BOUND, refuse_other_run
from unet_caching.files.schema import read_json
from unet_caching.forecast import Damping
from unet_caching.methods.deepcache import PlannedDeepCache
from unet_caching.methods.plan import Call, PlanCache, check_calls
from unet_caching.options import MethodOptions, Planned, RunShape, option

KIND, FORMAT = "plan", 1
HIGHEST_ORDER = 3           # a forecast beyond it only amplifies what is not smooth
SAMPLING = ("sampler", "steps", "timesteps")


@dataclass
class Plan:
    """What each network call does, and which runs that was made for.

    run: the settings under `files.fitted.BOUND`, a checkpoint_sha256 of None stands for any weights, and where it is
    known the fingerprint of the U-Net, by which pipelines know it (`files.fitted.fingerprint`). guidance: the
    least and the most that it is taken to hold for; None where the model has none. macs: {"hook", "fc"} of all network
    calls of an image, one row of the batch; macs_full: of one call that computes everything. distance: how near images
    come to a converged run, {"mean", "interval", ...}; None where that was not measured. notes: how it came about.
    """
    run: dict[str, Any]
    guidance: list[float] | None
    calls: list[Call]
    macs: dict[str, float]
    macs_full: dict[str, float]
    distance: dict[str, Any] | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """The digest of what decides the pixels."""
        content = {"run": self.run, "calls": [[call.branch, *call.damping] for call in self.calls]}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def cost(self) -> float:
        """Its MACs (hook) in those of full network calls."""
        return self.macs["hook"] / self.macs_full["hook"]

    @property
    def deepest(self) -> int:
        """The deepest branch of its cached calls."""
        return max((call.branch for call in self.calls if call.branch is not None), default=0)

    def to_json(self) -> dict[str, Any]:
        """What `load` reads."""
        return {"kind": KIND, "format": FORMAT, "sha256": self.sha256, "run": self.run, "guidance": self.guidance,
                "full_calls": self.cost, "macs": self.macs, "macs_full": self.macs_full, "distance": self.distance,
                "notes": self.notes,
                "calls": [{"branch": call.branch, "damping": list(call.damping)} for call in self.calls]}

    @classmethod
    def load(cls, path: Path | str) -> "Plan":
        """Read a file. Raises ValueError where it is missing, damaged, changed by hand, or holds what cannot be."""
        if not Path(path).is_file():
            raise ValueError(f"no plan {path}: python -m lab.plans search makes one")
        content = read_json(path)
        if not isinstance(content, dict) or (content.get("kind"), content.get("format")) != (KIND, FORMAT):
            raise ValueError(f"{path} is no plan of format {FORMAT}")
        fault = _fault(content)
        if fault:
            raise ValueError(f"{path} is damaged: {fault}")
        calls = [Call(call["branch"], tuple(map(float, call["damping"]))) for call in content["calls"]]
        try:
            check_calls(calls)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        plan = cls(content["run"], content["guidance"], calls, content["macs"], content["macs_full"],
                   content["distance"], content["notes"])
        if content.get("sha256") != plan.sha256:
            raise ValueError(f"{path} has been changed since it was made: its sha256 does not fit")
        return plan

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse a run of other settings than it was made for; those not known yet may be left out.

        Raises ValueError that says what differs.
        """
        refuse_other_run("the plan was made", {key: self.run[key] for key in BOUND}, settings)
        own, other = self.run.get("fingerprint"), settings.get("fingerprint")
        if own is not None and other is not None and own != other:
            raise ValueError(f"the plan was made for another U-Net, {self.run['model']}: the widths of its layers are "
                             "others than this one's")
        guidance = settings.get("guidance")
        if self.guidance is not None and guidance is not None:
            least, most = self.guidance
            if not least <= guidance <= most:
                raise ValueError(f"the plan was made for another run: guidance {least:g} to {most:g} there, "
                                 f"{guidance:g} here")


def _number(value: object, least: float = -math.inf) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= least


def _fault(content: Mapping[str, Any]) -> str | None:
    """What is wrong with the JSON of a plan; None where nothing is."""
    kinds: dict[str, Any] = {"run": dict, "guidance": list | None, "calls": list, "macs": dict, "macs_full": dict,
                             "distance": dict | None, "notes": dict}
    for key, kind in kinds.items():
        if key not in content:
            return f"it has no {key}"
        if not isinstance(content[key], kind):
            return f"{key} is {content[key]!r}"
    missing = [key for key in BOUND if key not in content["run"]]
    if missing:
        return f"it does not say for which {', '.join(missing)} it was made"
    for key, kind in (("model", str), ("unet", dict), ("sampler", str), ("steps", int), ("timesteps", str)):
        if not isinstance(content["run"][key], kind):
            return f"its run has {key} {content['run'][key]!r}"
    guidance = content["guidance"]
    if guidance is not None and not (len(guidance) == 2 and all(_number(value, 0) for value in guidance)
                                     and guidance[0] <= guidance[1]):
        return f"guidance is {guidance!r}, and should be the least and the most"
    for key in ("macs", "macs_full"):
        macs = content[key]
        if macs.keys() != {"hook", "fc"} or not all(_number(value, 1) for value in macs.values()):
            return f"{key} is {macs!r}, and should be hook and fc"
    return next((f"call {step} {fault}" for step, call in enumerate(content["calls"])
                 if (fault := _call_fault(call))), None)


def _call_fault(call: object) -> str | None:
    if not isinstance(call, dict) or call.keys() != {"branch", "damping"}:
        return f"is {call!r}, and should be branch and damping"
    branch, damping = call["branch"], call["damping"]
    if branch is not None and (not isinstance(branch, int) or isinstance(branch, bool)):
        return f"has branch {branch!r}, and should have a whole number or null"
    if not isinstance(damping, list) or len(damping) > HIGHEST_ORDER or not all(map(_number, damping)):
        return f"has damping {damping!r}, and should have up to {HIGHEST_ORDER} finite numbers"
    return None


class PlannedPlan(Planned):
    """A plan in a run."""
    fitted = True

    def __init__(self, plan: Plan, file: Path):
        self.plan = plan
        branches = [call.branch for call in plan.calls]
        self.settings = {"full_steps": [step for step, branch in enumerate(branches) if branch is None],
                         "plan": {"sha256": plan.sha256, "branches": branches,
                                  "damping": [list(call.damping) for call in plan.calls]}}
        self.name = [f"plan_{Path(file).stem}"]
        cached = Counter(branch for branch in branches if branch is not None)
        self.summary = (f"a plan of {plan.cost:.2f} full calls ("
                        + ", ".join([f"{branches.count(None)} full",
                                     *(f"{n} at branch {branch}" for branch, n in sorted(cached.items()))]) + ")")

    def policy(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> PlanCache:
        return PlanCache(self.plan.calls)

    def extrapolate(self, order: int, damping: Damping, calls: int) -> None:
        raise ValueError("a plan says itself what each call forecasts: leave out --forecast")

    def check(self, settings: Mapping[str, Any]) -> None:
        self.plan.check(settings)


@dataclass(frozen=True)
class PlanOptions(MethodOptions):
    """A plan for all network calls, with the sampler, steps and timesteps that it was made for."""
    title = "caching (a plan: what each network call computes, found for a budget by lab.plans search)"
    plan: Path | None = option(None, "a file that was made for this model. Sampler, steps and timesteps are the "
                                     "plan's, unless given", metavar="FILE")

    def sampling(self) -> Mapping[str, Any]:
        return {} if self.plan is None else {key: Plan.load(self.plan).run[key] for key in SAMPLING}

    def planned(self, shape: RunShape, before: Sequence[Planned]) -> PlannedPlan | None:
        if self.plan is None:
            return None
        if before:
            other = "--interval" if isinstance(before[0], PlannedDeepCache) else "--block-schedule"
            raise ValueError(f"a plan says itself what each call computes: leave out {other}")
        plan = Plan.load(self.plan)
        plan.check({"steps": shape.steps})
        if len(plan.calls) != shape.calls:
            raise ValueError(f"the plan {self.plan} has {len(plan.calls)} network calls, this run makes {shape.calls}")
        if plan.deepest >= shape.num_branches:
            raise ValueError(f"the plan {self.plan} was made for another model: it has branch {plan.deepest}, this one "
                             f"branches 0 to {shape.num_branches - 1}")
        return PlannedPlan(plan, self.plan)
