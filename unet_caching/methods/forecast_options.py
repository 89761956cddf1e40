"""Forecasting as a method of caching: what the others of a run keep is extrapolated instead of reused as it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unet_caching.files.fitted import file_sha256
from unet_caching.files.forecast_weights import ForecastWeights
from unet_caching.forecast import Damping, Forecast
from unet_caching.methods.deepcache import PlannedDeepCache
from unet_caching.options import MethodOptions, Planned, RunShape, option


class PlannedForecast(Planned):
    """A forecast in a run. It has no policy of its own: those of the methods before it forecast."""

    def __init__(self, options: "ForecastOptions", weights: ForecastWeights | None):
        self.weights, self.fitted = weights, weights is not None
        order, damping, file = options.forecast, options.forecast_damping, options.forecast_weights
        self.settings = {"forecast": {"order": order, "damping": damping if weights is None else None,
                                      "weights_sha256": None if file is None else file_sha256(file)}}
        self.name = [f"forecast{order}", *([f"damped{damping:g}"] if damping != 1 else []),
                     *([file.stem] if file is not None else [])]
        self.summary = f"forecast of order {order}" + (", damped" if damping != 1 else "") + (
            ", with fitted weights" if weights is not None else "")

    def policy(self, device: torch.device | str, dtype: torch.dtype) -> None:
        return None

    def check(self, settings: Mapping[str, Any]) -> None:
        if self.weights is not None:
            self.weights.check(settings)


@dataclass(frozen=True)
class ForecastOptions(MethodOptions):
    """Whether what is cached is extrapolated."""
    title = ("caching (forecast: what DeepCache or Block Caching would reuse is extrapolated through its last full "
             "steps; not of the papers)")
    forecast: int = option(0, "order of the polynomial: 0 = reuse, as in the papers (default), 1 = linear, 2 = "
                              "quadratic", metavar="ORDER")
    forecast_damping: float = option(1.0, "share of the extrapolation that is taken; for long gaps less than 1 "
                                          "(default: 1)", metavar="W")
    forecast_weights: Path | None = option(None, "fitted damping of each network call instead: a file that was made "
                                                 "for this model, sampler, schedule and branch", metavar="FILE")

    def planned(self, shape: RunShape, before: Sequence[Planned]) -> PlannedForecast | None:
        order, file = self.forecast, self.forecast_weights
        weights = None if file is None else ForecastWeights.load(file)
        damping: Damping = self.forecast_damping if weights is None else weights.damping
        Forecast(order, 1.0 if order == 0 else self.forecast_damping)           # refuses what is no order or damping
        if order == 0:
            if file is not None or self.forecast_damping != 1:
                raise ValueError("--forecast-damping and --forecast-weights need --forecast, the order")
            return None
        if not before:
            raise ValueError("--forecast needs an --interval of 2 or more, or --block-schedule: without caching there "
                             "is nothing to forecast")
        if weights is not None:
            self._check_fitted(weights, shape, before)
        for method in before:
            method.extrapolate(order, damping, shape.calls)
        return PlannedForecast(self, weights)

    def _check_fitted(self, weights: ForecastWeights, shape: RunShape, before: Sequence[Planned]) -> None:
        if self.forecast_damping != 1:
            raise ValueError("--forecast-damping is for all network calls, --forecast-weights for each: choose one")
        level = before[0]
        if len(before) > 1 or not isinstance(level, PlannedDeepCache):
            raise ValueError("--forecast-weights are fitted to DeepCache's feature: leave out --block-schedule")
        weights.check_cache(level.branch, level.full_steps, self.forecast, shape.calls)
