"""What a metric is to the programs that print, keep, tabulate and draw it. eval/metrics/registry.py lists them all."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from eval.metrics.extract import Features
from eval.metrics.frechet import Moments
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

    @property
    def better(self) -> str:
        """'higher' or 'lower'."""
        return "higher" if self.higher else "lower"


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


class Sets:
    """Inception features of the images that are judged, and what is known of real ones.

    statistics: the real images' (mean, covariance) by layer; of their features where they are not known. real: their
    features, or vectors [n, d] of layer pool; None where there are none. groups: of the jackknife.
    """

    def __init__(self, samples: Features, statistics: Mapping[str, tuple[np.ndarray, np.ndarray]] | None,
                 real: Features | np.ndarray | None, groups: int):
        self.samples, self.known, self.real, self.groups = samples, statistics, real, groups

    def statistics(self, layer: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean [d] and covariance [d, d] of the real images."""
        if self.known is not None:
            return self.known[layer]
        if self.real is None or isinstance(self.real, np.ndarray):
            raise Unavailable("no statistics of real images")
        return Moments(self.real.parts(layer)).statistics()

    @cached_property
    def vectors(self) -> np.ndarray:
        """Layer pool of the samples, float32 [n, d]."""
        return self.samples.all("pool")

    @cached_property
    def real_vectors(self) -> np.ndarray:
        """Layer pool of real images, float32 [n, d]. Raises Unavailable."""
        if self.real is None:
            raise Unavailable("no features of real images")
        return self.real if isinstance(self.real, np.ndarray) else self.real.all("pool")


class Score(NamedTuple):
    """A number of two sets."""
    metric: Metric
    line: str                           # the same on the screen
    details: dict[str, Any] = {}        # noqa: RUF012  never changed; what else there is to say, JSON-compatible


@dataclass(frozen=True)
class SetMeasure:
    """Numbers of two sets of Inception features that are found together."""
    measures: tuple[Measure, ...]
    of: Callable[[Sets], list[Score]]                   # one for each of them, in order; raises Unavailable
    commands: tuple[str, ...] = ("adm",)                # of eval/, which print them
    labels: Mapping[str, str] = field(default_factory=dict)       # what the screen says of each instead of its name
    slow: str = ""                                      # what is said while they are computed


def shown(metric: Metric, digits: int = 4, scale: float = 1) -> str:
    """'3.3712 +- 0.0312': the value and half its 95% interval."""
    error = "" if metric.interval is None else f" +- {scale * (metric.interval[1] - metric.interval[0]) / 2:.{digits}f}"
    return f"{scale * metric.value:.{digits}f}{error}"
