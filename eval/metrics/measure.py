"""What a metric is to the programs that print, keep, tabulate and draw it. eval/metrics/registry.py lists them all."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from eval.metrics.extract import Features
from eval.metrics.frechet import mean_and_covariance
from run.results import Metric
from unet_caching.errors import UserError


@dataclass(frozen=True)
class Measure:
    """A number with a name in results (run/results.py)."""
    name: str
    column: str | None = None       # in the papers' tables (configs/papers/*.yaml); None where they have none
    heading: str = ""               # of that column,
    decimals: int = 2               # how it is shown there,
    scale: float = 1                # and what a value is multiplied by
    higher: bool = False            # whether that is better


@dataclass(frozen=True, kw_only=True)
class PairMeasure(Measure):
    """How like an image is to its partner of the same seed."""
    key: str                        # in the JSON of eval.fidelity
    label: str                      # with its unit


@dataclass(frozen=True, kw_only=True)
class PixelMeasure(PairMeasure):
    """The same, of the pixels alone."""
    of: Callable[[np.ndarray, np.ndarray], np.ndarray]      # float64 [n] of uint8 [n, height, width, 3] twice
    smallest: int = 1                                       # pixels that a side must have

    def check_size(self, size: tuple[int, int]) -> None:
        """Raises UserError for images (height, width) that are too small."""
        if min(size) < self.smallest:
            raise UserError(f"{self.name} needs images of at least {self.smallest} pixels a side, these have "
                            f"{size[1]}x{size[0]}")


class Unavailable(Exception):
    """Why a score cannot be had of these sets."""


class Sets(NamedTuple):
    """Inception features of the images that are judged, and what is known of real ones."""
    samples: Features
    known: Mapping[str, tuple[np.ndarray, np.ndarray]] | None       # real images' (mean, covariance) by layer
    real: Features | None = None                                    # of real images, where they are there

    def statistics(self, layer: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean [d] and covariance [d, d] of the real images: of their features where they are not known."""
        if self.known is not None:
            return self.known[layer]
        assert self.real is not None        # a reference has the one or the other
        return mean_and_covariance(self.real.parts(layer))


@dataclass(frozen=True)
class SetMeasure:
    """Numbers of two sets of Inception features that are found together."""
    measures: tuple[Measure, ...]
    of: Callable[[Sets], list[Metric]]                  # one for each of them, in order; raises Unavailable
    commands: tuple[str, ...] = ("adm",)                # of eval/, which print them
    slow: str = ""                                      # what is said while they are computed


def shown(metric: Metric, digits: int = 4, scale: float = 1) -> str:
    """'3.3712 +- 0.0312': the value and half its 95% interval."""
    error = "" if metric.interval is None else f" +- {scale * (metric.interval[1] - metric.interval[0]) / 2:.{digits}f}"
    return f"{scale * metric.value:.{digits}f}{error}"
