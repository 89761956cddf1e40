"""A metric, for the programs that print, keep, tabulate and draw it. eval/metrics/registry.py lists them all."""

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
    column: str | None = None       # its column in the papers' tables (configs/papers/*.yaml), if they have one
    heading: str = ""               # of that column
    decimals: int = 2               # in that column
    scale: float = 1                # factor of a value in that column
    higher: bool = False            # whether higher is better


@dataclass(frozen=True, kw_only=True)
class PairMeasure(Measure):
    """The likeness of two images of the same seed."""
    key: str                        # in the JSON of eval.fidelity
    label: str                      # with the unit


@dataclass(frozen=True, kw_only=True)
class PixelMeasure(PairMeasure):
    """A measure of pairs that is computed from their pixels."""
    of: Callable[[np.ndarray, np.ndarray], np.ndarray]      # uint8 [n, height, width, 3] twice -> float64 [n]
    smallest: int = 1                                       # the fewest pixels of a side

    def check_size(self, size: tuple[int, int]) -> None:
        """Raises UserError for images (height, width) that are too small."""
        if min(size) < self.smallest:
            raise UserError(f"{self.name} needs images of at least {self.smallest} pixels a side, these have "
                            f"{size[1]}x{size[0]}")


class Unavailable(Exception):
    """Why a score cannot be computed for these sets."""


class Sets(NamedTuple):
    """Inception features of the images that are judged, and of real ones."""
    samples: Features
    known: Mapping[str, tuple[np.ndarray, np.ndarray]] | None       # real images' (mean, covariance) by layer
    real: Features | None = None                                    # real images' features, if there are images

    def statistics(self, layer: str) -> tuple[np.ndarray, np.ndarray]:
        """The mean [d] and covariance [d, d] of the real images, computed from their features if not known."""
        if self.known is not None:
            return self.known[layer]
        assert self.real is not None        # a reference has statistics or images
        return mean_and_covariance(self.real.parts(layer))


@dataclass(frozen=True)
class SetMeasure:
    """Measures of two sets of Inception features that are computed together."""
    measures: tuple[Measure, ...]
    of: Callable[[Sets], list[Metric]]                  # one metric for each measure, in order; raises Unavailable
    commands: tuple[str, ...] = ("adm",)                # the commands of eval/ that print them
    slow: str = ""                                      # a note while they are computed


def shown(metric: Metric, digits: int = 4, scale: float = 1) -> str:
    """'3.3712 +- 0.0312': the value and half its 95% interval."""
    error = "" if metric.interval is None else f" +- {scale * (metric.interval[1] - metric.interval[0]) / 2:.{digits}f}"
    return f"{scale * metric.value:.{digits}f}{error}"
