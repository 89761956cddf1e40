"""DeepCache (arXiv 2312.00858): compute one deep feature on some steps, and reuse or forecast it on all others."""

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unet_caching.forecast import Damping, Forecast
from unet_caching.keep import Keep
from unet_caching.options import Method, MethodOptions, RunShape, ScheduledMethod, option
from unet_caching.schedules import RULES, full_steps


class DeepCache(Keep):
    """Compute the feature at skip `branch` on the full steps, and reuse it on all others.

    branch: 0-based skip index; 0 = conv_in reuses most, the last one reuses only the middle block.
    full_steps: indices of the network calls that run the whole U-Net (see `unet_caching.schedules`), with 0.
    forecast: the order of the polynomial through the last full steps (unet_caching/forecast.py); 0 is reuse, as in the
    paper. damping: of the forecast, for all network calls or for each.

    `unet(x, t, cache=cache.at(step))` runs step `step`. Raises ValueError for a negative branch, full steps without 0,
    or an order that needs more full steps; RuntimeError for a cached step without a feature.
    """

    def __init__(self, branch: int, full_steps: Collection[int], forecast: int = 0, damping: Damping = 1.0):
        if branch < 0:
            raise ValueError(f"branch must be 0 or more (0 = the skip of conv_in), got {branch}")
        if 0 not in full_steps:
            raise ValueError("full_steps must contain 0: the first step has nothing to reuse")
        super().__init__({branch: full_steps}, Forecast(forecast, damping))
        self.branch = branch

    @property
    def feature(self) -> Tensor | None:
        """The feature of the last full step, which cached steps reuse; None before the first."""
        return self.held[self.branch].value


class ZeroedCache(DeepCache):
    """The ablation of the paper's Table 5: cached steps see zeros instead of the feature."""

    def reuse(self, key: Hashable) -> Tensor:
        return torch.zeros_like(super().reuse(key))


class DeepCacheMethod(ScheduledMethod):
    """DeepCache in a run, at a branch and with full steps."""

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
        self.computed = {branch: self.full_steps}

    def policy(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> DeepCache:
        return self.kind(self.branch, self.full_steps, self.forecast.order, self.forecast.damping)

    def extrapolate(self, forecast: Forecast, calls: int) -> None:
        if self.kind is ZeroedCache:
            raise ValueError("--zero-cache is an ablation of reuse: leave out --forecast")
        super().extrapolate(forecast, calls)


@dataclass(frozen=True)
class DeepCacheOptions(MethodOptions):
    """Which steps are full, and which feature the others reuse."""
    title = "caching (DeepCache)"
    interval: int = option(1, "one full step in every N (default: 1, no caching)")
    branch: int | None = option(None, "0-based skip; 0 caches most (default: the paper's)")
    schedule: str = option("uniform", f"which steps are full: {', '.join(RULES)} (default: uniform)",
                           choices=tuple(RULES), metavar="NAME")
    center: int | None = option(None, "centered: the step around which full steps gather")
    power: float | None = option(None, "centered, released-ldm: how quickly they thin out")
    zero_cache: bool = option(False, "reuse zeros instead (ablation of Table 5)")

    def bind(self, shape: RunShape, others: Sequence[Method]) -> DeepCacheMethod | None:
        branch = shape.branch if self.branch is None else self.branch
        if not (isinstance(branch, int) and 0 <= branch < shape.num_branches):
            raise ValueError(f"--branch must be from 0 to {shape.num_branches - 1} for this model, got {branch}")
        steps = full_steps(self.schedule, shape.steps, self.interval, self.center, self.power)
        if self.interval == 1:
            if self.zero_cache:
                raise ValueError("--zero-cache needs an --interval of 2 or more: it zeros the cached feature")
            return None
        return DeepCacheMethod(self, branch, steps, shape)
