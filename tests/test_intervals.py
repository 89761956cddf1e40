"""Every interval that is printed, by simulation: of draws of images, how many of the 95 % intervals hold the truth.

The truth is the mean over the draws: what an interval is of is a number at so many images, the reference held fixed.
"""

from statistics import fmean

import numpy as np
import pytest

from eval.metrics import inception_scores
from eval.metrics.frechet import frechet_of_parts
from eval.metrics.intervals import mean_estimate, mean_interval
from eval.metrics.measure import Sets
from eval.metrics.small_sets import FrechetInBasis, KernelDistance

DRAWS = 100


def coverage(found, truth=None):
    """Of (value, [low, high]) of many draws, the share of intervals that hold the truth."""
    truth = fmean(value for value, _ in found) if truth is None else truth
    return fmean(low <= truth <= high for _, (low, high) in found)


class Known:
    """Features as the evaluators read them."""

    def __init__(self, values):
        self.values = values.astype(np.float32)

    def all(self, layer):
        return self.values

    def parts(self, layer):
        return [self.values]


def draws(seed, n, d, scale=1.0, shift=0.0):
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(n, d)) * scale + shift).astype(np.float32) for _ in range(DRAWS)]


@pytest.mark.parametrize("shift, scale", [(0, 1), (1, 0.8)])
def test_precision_and_recall(shift, scale):
    real = np.random.default_rng(0).normal(size=(400, 6)).astype(np.float32)
    found = [inception_scores.PRECISION_RECALL.of(Sets(Known(x), None, real, 20))
             for x in draws(1, 150, 6, scale, shift)]
    for which in range(2):
        metrics = [scores[which].metric for scores in found]
        assert coverage([(one.value, one.interval) for one in metrics]) >= 0.89
        half = fmean(one.interval[1] - one.interval[0] for one in metrics) / 2
        assert half < 1.6 * 1.96 * np.std([one.value for one in metrics])       # nor by being useless


@pytest.mark.parametrize("blocks", [2, 5, 10])
def test_inception_score(monkeypatch, blocks):
    monkeypatch.setattr(inception_scores, "SPLIT", 20)
    found = [inception_scores.inception_score([2 * x], 20).estimate.metric for x in draws(2, 20 * blocks, 5)]
    assert 0.89 <= coverage([(one.value, one.interval) for one in found]) <= 0.99


def test_frechet_distance_by_the_jackknife():
    found = [frechet_of_parts([x], np.zeros(5), np.eye(5)).metric for x in draws(3, 200, 5, 1.2, 0.3)]
    assert coverage([(one.value, one.interval) for one in found]) >= 0.89


@pytest.mark.parametrize("kind", [FrechetInBasis, KernelDistance])
def test_distances_of_small_sets(kind):
    distance = kind(np.random.default_rng(4).normal(size=(300, 6)), 4)
    found = [distance.estimate(x, 30).metric for x in draws(5, 80, 6, 1.3, 0.4)]
    assert coverage([(one.value, one.interval) for one in found]) >= 0.89


@pytest.mark.parametrize("n, groups", [(8, None), (20, None), (40, np.arange(40) // 4)])
def test_means(n, groups):
    """Normal values; those of one group half alike."""
    rng, found = np.random.default_rng(6), []
    for seed in range(250):
        values = rng.normal(size=n) + (0 if groups is None else rng.normal(size=10)[groups])
        found.append(mean_interval(values, seed, 200, groups))
    assert 0.91 <= coverage(found, 0) <= 0.985


def test_means_of_skewed_values():
    """Errors and feature distances have a long tail on one side; their means and those of paired differences."""
    rng, alone, paired = np.random.default_rng(7), [], []
    for seed in range(250):
        shared, one, other = rng.exponential(size=(3, 64))
        alone.append(mean_interval(one, seed, 200))
        found = mean_estimate(2 * one + shared - (other + shared), seed, 200)
        paired.append((found["mean"], found["interval"]))
    assert 0.91 <= coverage(alone, 1) <= 0.985 and 0.91 <= coverage(paired, 1) <= 0.985


@pytest.mark.parametrize("kind", [FrechetInBasis, KernelDistance])
def test_paired_differences_of_small_sets(kind):
    """Of runs that do differ: images of a seed share most of what varies."""
    distance, rng = kind(np.random.default_rng(8).normal(size=(300, 6)), 4), np.random.default_rng(9)
    found = []
    for _ in range(DRAWS):
        common, *own = rng.normal(size=(3, 80, 6))
        x, y = (1.2 * (0.9 * common + 0.44 * z) for z in own)
        found.append(distance.difference(x + 0.3, y, 30).metric)
    assert coverage([(one.value, one.interval) for one in found]) >= 0.89
