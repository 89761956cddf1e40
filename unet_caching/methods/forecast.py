"""Forecasting as a caching method: the values that a run's other methods keep are extrapolated, not reused."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from unet_caching.forecast import Forecast
from unet_caching.options import Method, MethodOptions, RunShape, option


class ForecastMethod(Method):
    """A forecast in a run. It has no policy: the policies of the other methods forecast."""

    def __init__(self, order: int, damping: float):
        # weights_sha256: of fitted weights, which no longer exist; kept because run.json of older folders has the key.
        self.settings = {"forecast": {"order": order, "damping": damping, "weights_sha256": None}}
        self.name = [f"forecast{order}", *([f"damped{damping:g}"] if damping != 1 else [])]
        self.summary = f"forecast of order {order}" + (", damped" if damping != 1 else "")

    def policy(self, device: torch.device | str, dtype: torch.dtype) -> None:
        return None


@dataclass(frozen=True)
class ForecastOptions(MethodOptions):
    """Whether cached values are extrapolated, and how far."""
    title = "caching (forecast: extrapolate cached values; not in the papers)"
    forecast: int = option(0, "order of the polynomial (default: 0, reuse)", metavar="ORDER")
    forecast_damping: float = option(1.0, "share of the extrapolation (default: 1)", metavar="W")

    def bind(self, shape: RunShape, others: Sequence[Method]) -> ForecastMethod | None:
        order, damping = self.forecast, self.forecast_damping
        forecast = Forecast(order, 1.0 if order == 0 else damping)          # checks both
        if order == 0:
            if damping != 1:
                raise ValueError("--forecast-damping needs --forecast with an order of 1 or more")
            return None
        if not others:
            raise ValueError("--forecast needs an --interval of 2 or more, or --block-schedule: it extrapolates cached "
                             "values")
        for method in others:
            method.extrapolate(forecast, shape.calls)
        return ForecastMethod(order, damping)
