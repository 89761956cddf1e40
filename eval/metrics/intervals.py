"""Error bars: of means over images, and of estimates that are not means."""

import math
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr, stdtrit  # scipy.stats takes a second to import

from run.results import Metric


class Estimate(NamedTuple):
    """A number and its standard error over draws of as many generated images; nan where it is not known.

    freedom: degrees of freedom of the error; of one from few groups or blocks, their number less one.
    """
    value: float
    stderr: float
    freedom: float = math.inf

    def json(self) -> dict:
        """With a 95% interval: normal, or Student's where the error itself is from few values."""
        half = self.stderr * (1.96 if math.isinf(self.freedom) else float(stdtrit(self.freedom, 0.975)))
        return {"value": self.value, "stderr": self.stderr, "interval": [self.value - half, self.value + half]}

    @property
    def metric(self) -> Metric:
        """As results have it; without an interval where the error is not known."""
        return Metric(self.value) if np.isnan(self.stderr) else Metric.of(self.json())


class Share(NamedTuple):
    """A share of `of` images that are drawn independently of what they are looked for in."""
    value: float
    of: int

    @property
    def stderr(self) -> float:
        """Binomial."""
        return float(np.sqrt(self.value * (1 - self.value) / self.of))

    @property
    def interval(self) -> list[float]:
        """95 %, Wilson's: within [0, 1], and not of width zero at its ends."""
        z2 = 1.96 ** 2 / self.of
        centre, half = self.value + z2 / 2, np.sqrt(z2 * self.value * (1 - self.value) + z2 ** 2 / 4)
        return [max(0.0, float((centre - half) / (1 + z2))), min(1.0, float((centre + half) / (1 + z2)))]

    @property
    def metric(self) -> Metric:
        """As results have it."""
        return Metric(self.value, self.interval, self.stderr)


def jackknife(values: list[float]) -> float:
    """Standard error of an estimate from its values with one of g equal groups left out in turn; nan for fewer than 2.

    ((g - 1) / g sum (value - mean)^2)^(1/2): of a mean of g groups, exactly its usual standard error.
    """
    g = len(values)
    return float(np.sqrt((g - 1) * np.var(values))) if g > 1 else float("nan")


def mean_estimate(values: np.ndarray, seed: int = 0, repeats: int = 1000, groups: np.ndarray | None = None) -> dict:
    """{mean, stderr, interval} of values [n]: the standard deviation of resampled means, and the 95% interval by the
    percentile bootstrap; each None of nothing.

    groups: [n], what belongs together, such as the images of one prompt; whole groups are drawn. Of paired
    differences it is the interval of their mean. Of few values the quantiles are as far out as makes the interval that
    of Student where the values are normal (Hesterberg, The American Statistician 69(4), 2015): those of 2.5 % would
    cover 81 % of 5 normal values' means.
    """
    if not len(values):
        return dict.fromkeys(("mean", "stderr", "interval"))
    rng = np.random.default_rng(seed)
    if groups is None:
        n = len(values)
        means = np.array([values[rng.integers(0, n, n)].mean() for _ in range(repeats)])
    else:
        _, index = np.unique(groups, return_inverse=True)
        sums, counts = np.bincount(index, values), np.bincount(index)
        n = len(sums)
        draws = (rng.integers(0, n, n) for _ in range(repeats))
        means = np.array([sums[chosen].sum() / counts[chosen].sum() for chosen in draws])
    tail = ndtr(math.sqrt(n / (n - 1)) * stdtrit(n - 1, 0.025)) if n > 1 else 0.025
    return {"mean": float(values.mean()), "stderr": float(means.std()),
            "interval": [float(q) for q in np.quantile(means, (tail, 1 - tail))]}
