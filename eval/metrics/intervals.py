"""Error bars of means over images."""

import math

import numpy as np
from scipy.special import ndtr, stdtrit  # scipy.stats takes a second to import


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
