"""Adaptive caching: it is decided for each image, during its run, when its deep feature is computed again.

The rule is TeaCache's (arXiv 2411.19108), moved from transformers to U-Nets. The output of the encoder's first residual
block is computed on every call anyway. Its relative change from call to call, times a factor, estimates how much the
deep feature changes. Calibration runs give a factor for each call. The estimates are summed. When the sum exceeds a
threshold, the feature is computed and the sum starts again at zero.

Each row of a batch decides only by its own values, so one seed gives one image in any batch. A batch runs the whole
U-Net as soon as one row needs it, and the other rows keep their features. So the rule saves time in small batches. The
cost of a run is known only afterwards. Before, it is estimated by the calibration run nearest to the mean (`typical`).

A rule belongs to one model, sampler and number of steps.
"""

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from unet_caching.files.fitted import Fitted
from unet_caching.files.schema import AtLeast
from unet_caching.methods.block_caching import outside
from unet_caching.options import Method, MethodOptions, RunShape, option
from unet_caching.policy import Policy


@dataclass
class AdaptiveRule(Fitted):
    """When the deep feature of an image is computed."""
    kind = "adaptive rule"
    maker = "python -m lab.fit adaptive"
    branch: Annotated[int, AtLeast(0)]                  # the skip whose inner level is cached
    watched: str                                        # the name of the residual whose changes are summed
    factors: list[Annotated[float, AtLeast(0)]]         # by call: the feature's change per change of that residual
    threshold: Annotated[float, AtLeast(0)]             # for the sum of changes
    typical: list[int]              # the full steps of the calibration run nearest to the mean

    def fault(self) -> str | None:
        typical, calls = self.typical, len(self.factors)
        if typical != sorted(set(typical)) or typical[:1] != [0] or typical[-1] >= calls:
            return f"its typical full steps must ascend from 0 and stay below {calls}, got {typical}"
        return None

    def bounds(self) -> dict[str, Any]:
        return {**self.made_for, "calls": len(self.factors)}

    def policy(self) -> "AdaptiveCache":
        """A fresh cache with this rule."""
        return AdaptiveCache(self.branch, self.watched, self.factors, self.threshold, self.typical)


class AdaptiveCache(Policy):
    """Each row computes the feature at skip `branch` when the changes of the watched residual sum to more than a
    threshold, and reuses it otherwise.

    watched, factors, threshold: as in `AdaptiveRule`. full_steps: used only on the meta device, where tensors have no
    values.

    `unet(x, t, cache=cache.at(step))` runs step `step`. `decided`: for each call since the start, which rows computed
    the feature, bool [rows]. Raises RuntimeError for a network that asks for the feature before the watched residual.
    """

    def __init__(self, branch: int, watched: str, factors: Sequence[float], threshold: float,
                 full_steps: Collection[int]):
        self.branch, self.watched, self.factors = branch, watched, factors
        self.threshold, self.full_steps = threshold, frozenset(full_steps)
        self.reset()

    def reset(self) -> None:
        """Drop all values, after the last step of a batch."""
        self.step = 0
        self.feature: Tensor | None = None
        self.seen: Tensor | None = None         # the watched residual on the last call
        self.sums: Tensor | None = None         # float32 [rows], of changes since the row's feature was computed
        self.watched_on: int | None = None      # the call of `seen`
        self.decided: list[Tensor] = []

    def at(self, step: int) -> "AdaptiveCache":
        self.step = step
        if step == 0:
            self.reset()
        return self

    def owns(self, key: Hashable) -> bool:
        return key in (self.branch, self.watched)

    def __call__(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        if key == self.watched:
            return self._watch(compute())
        if key == self.branch:
            return self._level(compute)
        return compute()

    def _watch(self, value: Tensor) -> Tensor:
        if self.seen is None or self.sums is None:
            self.sums = torch.zeros(len(value), device=value.device)
        elif self.watched_on != self.step:
            self.sums = self.sums + self.factors[self.step] * relative_change(value, self.seen)
        self.seen, self.watched_on = value, self.step
        return value

    def _level(self, compute: Callable[[], Tensor]) -> Tensor:
        if self.sums is None or self.watched_on != self.step:
            raise RuntimeError(f"the U-Net asked for the level at branch {self.branch} before {self.watched}, which "
                               "decides whether it is computed")
        wanted = torch.ones_like(self.sums, dtype=torch.bool) if self.feature is None else self.sums > self.threshold
        if wanted.is_meta:
            every, none = self.step in self.full_steps, self.step not in self.full_steps
        else:
            every, none = bool(wanted.all()), not bool(wanted.any())
        if self.feature is None or every:
            self.feature = compute()
        elif not none:
            self.feature = torch.where(wanted[:, None, None, None], compute(), self.feature)
        self.sums = torch.where(wanted, 0.0, self.sums)
        self.decided.append(wanted)
        return self.feature

    @property
    def kept(self) -> dict[Hashable, Tensor]:
        found = {"feature": self.feature, "seen": self.seen, "sums": self.sums}
        return {key: value for key, value in found.items() if value is not None}

    @kept.setter
    def kept(self, values: Mapping[Hashable, Tensor]) -> None:
        self.feature, self.seen, self.sums = (values.get(key) for key in ("feature", "seen", "sums"))


def relative_change(value: Tensor, previous: Tensor) -> Tensor:
    """|value - previous|_1 / |value|_1 of each row: [batch, ...] -> [batch]; 0 without a change."""
    value, previous = value.float().flatten(1), previous.float().flatten(1)
    change, size = (value - previous).abs().sum(1), value.abs().sum(1)
    return torch.where(change == 0, 0.0, change / size)


class AdaptiveMethod(Method):
    """An adaptive rule in a run."""
    system = "adaptive"
    online = True

    def __init__(self, rule: AdaptiveRule, file: Path):
        self.rule, self.files = rule, (rule,)
        self.settings = {"full_steps": rule.typical, "adaptive": {
            "sha256": rule.sha256, "branch": rule.branch, "threshold": rule.threshold}}
        self.name = [f"adaptive_{Path(file).stem}"]
        self.summary = f"adaptive at branch {rule.branch}, threshold {rule.threshold:.4g}, full calls are an estimate"

    def policy(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> AdaptiveCache:
        return self.rule.policy()

    def check_network(self, channels: Mapping[Hashable, int]) -> None:
        for key in (self.rule.watched, self.rule.branch):
            if key not in channels:
                raise ValueError(f"the adaptive rule names {key}, which this U-Net does not have")


@dataclass(frozen=True)
class AdaptiveOptions(MethodOptions):
    """A rule that decides for each image."""
    title = "caching (adaptive: when to compute is decided for each image)"
    rare = True
    adaptive: Path | None = option(None, "a rule that lab.fit adaptive made for this run", metavar="FILE")

    def bind(self, shape: RunShape, others: Sequence[Method]) -> AdaptiveMethod | None:
        if self.adaptive is None:
            return None
        if others:
            raise ValueError("--adaptive decides what is computed: leave out the other caching options")
        rule = AdaptiveRule.load(self.adaptive)
        rule.check({"steps": shape.steps, "calls": shape.calls})
        if rule.branch >= shape.num_branches or not outside([rule.watched], shape.num_branches, rule.branch):
            raise ValueError(f"{self.adaptive} was made for another model: {rule.watched} is not outside the level at "
                             f"branch {rule.branch} of {shape.num_branches}")
        return AdaptiveMethod(rule, self.adaptive)
