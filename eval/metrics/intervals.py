"""Error bars of means over images."""

import math

import numpy as np
from scipy.special import ndtr, stdtrit  # scipy.stats takes a second to import


def mean_estimate(values: np.ndarray, seed: int = 0, repeats: int = 1000, groups: np.ndarray | None = None) -> dict:
    """The mean of values [n], by the percentile bootstrap: {mean, stderr, interval (95 %)}; each None if n is 0.

    groups: [n], the group of each value, such as its prompt; whole groups are drawn. For few values the quantiles are
    moved outwards, so that normal values get Student's interval (Hesterberg, The American Statistician 69(4), 2015).
    With the quantiles at 2.5 % the interval would cover the mean of 5 normal values in 81 % of cases.
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
