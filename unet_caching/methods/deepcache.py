"""DeepCache (arXiv 2312.00858): compute one deep feature on some steps, reuse it on all others, or forecast it."""

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unet_caching.forecast import Damping, Forecast, History, check_order, forecast, on_device, usable
from unet_caching.options import MethodOptions, Planned, RunShape, option
from unet_caching.policy import Policy
from unet_caching.schedules import RULES, full_steps


class DeepCache(Policy):
    """Compute the feature at skip `branch` on the full steps, reuse it on all others.

    branch: 0-based skip index; 0 = conv_in reuses most, the last one reuses the middle block alone.
    full_steps: indices of the network calls that run the whole U-Net (see `unet_caching.schedules`); 0 must be one.
    forecast: the order of the polynomial through the last full steps (`forecast`); 0 is reuse, as in the paper.
    damping: of the forecast, for all network calls or for each.

    `unet(x, t, cache=cache.at(step))` runs step `step`. Between steps one tensor is held, `cache.feature`, and one more
    for each order. Raises ValueError for a negative branch, full steps without 0, or an order that they can never feed;
    RuntimeError for a cached step with no feature.
    """

    def __init__(self, branch: int, full_steps: Collection[int], forecast: int = 0, damping: Damping = 1.0):
        if branch < 0:
            raise ValueError(f"branch must be 0 or more (0 = the skip of conv_in), got {branch}")
        if 0 not in full_steps:
            raise ValueError("full_steps must contain 0: the first step has nothing to reuse")
        check_order(forecast, usable(full_steps))
        self.branch = branch
        self.full_steps = frozenset(full_steps)
        self.forecast = Forecast(forecast, damping)
        self.history = History(self.forecast.order)
        self.feature: Tensor | None = None
        self.weights: Tensor | None = None
        self.full = True

    def at(self, step: int) -> "DeepCache":
        """Choose what the next network call does: a plain bool and tensors, set outside any compiled region."""
        self.step, self.full = step, step in self.full_steps
        self.weights = None
        if self.full:
            self.history.before_full(step, self.feature)
        elif self.feature is None:
            raise RuntimeError(f"step {step} is a cached step, but there is no feature to reuse: no full step has run "
                               f"since the start, or the U-Net has no branch {self.branch}")
        elif self.forecast.order:
            self.history.before_cached(self.feature)
            self.weights = on_device(self.forecast.weights(step, self.history.steps), self.feature)
        return self

    def reset(self) -> None:
        """Let go of all features, after the last step of a batch."""
        self.feature = self.weights = None
        self.full = True
        self.history.reset()

    def owns(self, key: Hashable) -> bool:
        return key == self.branch

    @property
    def pattern(self) -> Hashable:
        """Equal for steps that compute, keep and reuse the same."""
        return type(self).__name__, self.branch, self.full, self.forecast.order

    @property
    def kept(self) -> dict[Hashable, Tensor]:
        """What is kept between steps, by key. To assign to it puts other tensors in its place."""
        if self.feature is None:
            return {}
        found = self.history.kept(self.branch) | {self.branch: self.feature}
        return found if self.weights is None else found | {(self.branch, "weights"): self.weights}

    @kept.setter
    def kept(self, values: Mapping[Hashable, Tensor]) -> None:
        self.feature = values.get(self.branch)
        self.weights = values.get((self.branch, "weights"))
        self.history.put(self.branch, values)

    def reuse(self) -> Tensor:
        """What a cached step sees in place of the feature."""
        assert self.feature is not None     # `at` has seen to it
        if self.weights is None:
            return self.feature
        return forecast(self.feature, self.history.older, self.weights)

    def __call__(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        if key != self.branch:
            return compute()
        if not self.full:
            return self.reuse()
        self.feature = compute()
        return self.feature


class ZeroedCache(DeepCache):
    """The ablation of the paper's Table 5: cached steps see zeros instead of the feature."""

    def reuse(self) -> Tensor:
        return torch.zeros_like(super().reuse())


class PlannedDeepCache(Planned):
    """DeepCache at a branch, with the full steps of a run."""

    def __init__(self, options: "DeepCacheOptions", branch: int, steps: Sequence[int], shape: RunShape):
        self.kind = ZeroedCache if options.zero_cache else DeepCache
        self.branch, self.full_steps = branch, list(steps)
        self.settings = {"interval": options.interval, "branch": branch, "schedule": options.schedule,
                         "center": options.center, "power": options.power, "zero_cache": options.zero_cache,
                         "full_steps": self.full_steps}
        self.name = [f"{options.schedule}_n{options.interval}",
                     *([f"c{options.center}"] if options.center is not None else []),
                     *([f"p{options.power:g}"] if options.power is not None else []),
                     *([f"branch{branch}"] if branch != shape.branch else []),
                     *(["zeroed"] if options.zero_cache else [])]
        self.summary = f"branch {branch}"
        self.forecast: tuple[int, Damping] = 0, 1.0

    def policy(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> DeepCache:
        return self.kind(self.branch, self.full_steps, *self.forecast)

    def extrapolate(self, order: int, damping: Damping, calls: int) -> None:
        if self.settings["zero_cache"]:
            raise ValueError("--zero-cache is an ablation of reuse: leave out --forecast")
        check_order(order, usable(self.full_steps, calls))
        self.forecast = order, damping


@dataclass(frozen=True)
class DeepCacheOptions(MethodOptions):
    """Which steps are full, and what the others reuse."""
    title = "caching (DeepCache)"
    interval: int = option(1, "N of 1:N: one full step in every N; 1 = no caching (default)")
    branch: int | None = option(None, "0-based skip that is recomputed last; 0 = conv_in caches most (default: the "
                                      "paper's for this model)")
    schedule: str = option("uniform", "which steps are full (default: uniform)", choices=tuple(RULES))
    center: int | None = option(None, "centered: the step around which full steps gather")
    power: float | None = option(None, "centered and released-ldm: how quickly they thin out")
    zero_cache: bool = option(False, "ablation of the paper's Table 5: reuse zeros instead of the feature")

    def planned(self, shape: RunShape, before: Sequence[Planned]) -> PlannedDeepCache | None:
        branch = shape.branch if self.branch is None else self.branch
        if not 0 <= branch < shape.num_branches:
            raise ValueError(f"--branch must be from 0 to {shape.num_branches - 1} for this model, got {branch}")
        steps = full_steps(self.schedule, shape.steps, self.interval, self.center, self.power)
        if self.interval == 1:
            if self.zero_cache:
                raise ValueError("--zero-cache needs an --interval of 2 or more: without caching there is nothing to "
                                 "zero")
            return None
        return PlannedDeepCache(self, branch, steps, shape)
