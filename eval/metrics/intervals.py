"""Error bars of means over images."""

import numpy as np


def mean_interval(values: np.ndarray, seed: int = 0, repeats: int = 1000, groups: np.ndarray | None = None
                  ) -> tuple[float | None, list[float] | None]:
    """The mean of values [n] and its 95% interval by the percentile bootstrap; (None, None) of nothing.

    groups: [n], what belongs together, such as the images of one prompt; whole groups are drawn. Of paired
    differences it is the interval of their mean.
    """
    if not len(values):
        return None, None
    means = _resampled_means(values, seed, repeats, groups)
    return float(values.mean()), [float(q) for q in np.quantile(means, (0.025, 0.975))]


def mean_estimate(values: np.ndarray, seed: int = 0, repeats: int = 1000, groups: np.ndarray | None = None) -> dict:
    """{mean, stderr, interval} of values [n]: as mean_interval, and the standard deviation of the resampled means."""
    mean, interval = mean_interval(values, seed, repeats, groups)
    return {"mean": mean, "stderr": float(_resampled_means(values, seed, repeats, groups).std()), "interval": interval}


def _resampled_means(values: np.ndarray, seed: int, repeats: int, groups: np.ndarray | None) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if groups is None:
        return np.array([values[rng.integers(0, len(values), len(values))].mean() for _ in range(repeats)])
    _, index = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(index, values), np.bincount(index)
    draws = (rng.integers(0, len(sums), len(sums)) for _ in range(repeats))
    return np.array([sums[chosen].sum() / counts[chosen].sum() for chosen in draws])
