"""Distances and scores of features by other means, and their errors by simulation.

Of draws of images, how many of the 95 % intervals hold the truth: the mean over the draws, since what an interval is of
is a number at so many images, the reference held fixed.
"""

from statistics import fmean

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.kid import poly_mmd

from eval.metrics import inception_scores
from eval.metrics.frechet import frechet_distance, mean_and_covariance, warn_of_few
from eval.metrics.intervals import mean_estimate
from eval.metrics.small_sets import FrechetInBasis, KernelDistance, nearest_distances, real_floor
from unet_caching.errors import UserError

DRAWS = 100
KINDS = pytest.mark.parametrize("kind", [FrechetInBasis, KernelDistance])


def gaussians(rng, n, d):
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)


def draws(seed, n, d, scale=1.0, shift=0.0):
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(n, d)) * scale + shift).astype(np.float32) for _ in range(DRAWS)]


def in_parts(x, size=70):
    return [x[i:i + size] for i in range(0, len(x), size)]


def coverage(found, truth=None):
    """Of (value, [low, high]) of many draws, the share of intervals that hold the truth."""
    truth = fmean(value for value, _ in found) if truth is None else truth
    return fmean(low <= truth <= high for _, (low, high) in found)


def of(found):
    return [(one["value" if "value" in one else "mean"], one["interval"]) for one in found]


# Frechet distances

def test_moments_are_numpys_however_the_features_are_cut():
    x = gaussians(np.random.default_rng(1), 500, 12).astype(np.float32) + 1000
    for size in (70, 500, 1):
        mu, sigma = mean_and_covariance(in_parts(x, size))
        assert np.allclose(mu, x.astype(np.float64).mean(0), rtol=1e-12)
        assert np.allclose(sigma, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-8)


def test_frechet_agrees_with_scipy_and_the_closed_form():
    rng = np.random.default_rng(2)
    x, y = (gaussians(rng, 400, 16).astype(np.float32) for _ in range(2))
    (mu1, cov1), (mu2, cov2) = (mean_and_covariance([a]) for a in (x, y))
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * scipy.linalg.sqrtm(cov1 @ cov2).real)
    assert frechet_distance(mu1, cov1, mu2, cov2) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(mu1, cov1, mu1, cov1) == pytest.approx(0, abs=1e-8 * np.trace(cov1))
    # Covariances that commute.
    turn, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    a, b, mu = rng.uniform(0.1, 4, 6), rng.uniform(0.1, 4, 6), rng.normal(size=6)
    value = frechet_distance(mu, turn * a @ turn.T, np.zeros(6), turn * b @ turn.T)
    assert value == pytest.approx((mu ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-12)


@pytest.mark.parametrize("ranks", [(120, 20), (20, 120), (20, 20), (0, 20)])
def test_frechet_of_singular_covariances_by_the_nuclear_norm(ranks):
    rng = np.random.default_rng(9)
    a, b = (rng.normal(size=(150, rank)) for rank in ranks)
    mu, scale = np.zeros(150), (a ** 2).sum() + (b ** 2).sum()
    expected = scale - 2 * np.linalg.svd(a.T @ b, compute_uv=False).sum()
    assert frechet_distance(mu, a @ a.T, mu, b @ b.T) == pytest.approx(expected, abs=1e-12 * scale)


def test_frechet_of_singular_and_regular_covariances_agree():
    """One by Cholesky, the other by eigenvalues."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(9, 5)), rng.normal(size=(9, 9))
    singular, regular, mu = a @ a.T, b @ b.T, np.zeros(9)
    assert frechet_distance(mu, singular, mu, regular) == pytest.approx(
        frechet_distance(mu, regular, mu, singular), rel=1e-6)
    assert frechet_distance(mu, np.zeros((9, 9)), mu, regular) == pytest.approx(np.trace(regular))


def test_a_basis_is_of_the_directions_of_largest_variance():
    rng = np.random.default_rng(2)
    turn, _ = np.linalg.qr(rng.normal(size=(10, 10)))
    x = (rng.normal(size=(5000, 10)) * [9, 7, 5, *[0.1] * 7]) @ turn.T + 3
    basis = FrechetInBasis(x, 3)
    low = basis.project(x)
    assert np.allclose(np.abs(basis.directions.T.numpy() @ turn[:, :3]), np.eye(3), atol=0.05)
    assert basis.about["explained"] > 0.999 and np.allclose(low.mean(0), 0)
    assert np.allclose(low.std(0), [9, 7, 5], rtol=0.05)


def test_too_few_images_for_the_dimensions_warn_and_too_many_dimensions_are_refused():
    features = np.random.default_rng(0).normal(size=(16, 20))
    with pytest.warns(UserWarning, match="16 images for 20 dimensions"):
        warn_of_few(features)
    with pytest.raises(UserError, match="choose 1 to 15"):
        FrechetInBasis(features, 16)


# Kernel distances

def test_kid_agrees_with_torchmetrics_and_brute_force():
    rng = np.random.default_rng(3)
    x, y = gaussians(rng, 90, 12), gaussians(rng, 70, 12)
    # torchmetrics divides by the size of one set throughout, so its two must be of one size.
    expected = poly_mmd(torch.tensor(x[:70]), torch.tensor(y), degree=3, gamma=None, coef=1.0).item()
    assert KernelDistance(y, 12).estimate(x[:70])["value"] == pytest.approx(expected, rel=1e-10)

    def k(a, b):
        return (a @ b / 12 + 1) ** 3
    brute = (np.mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
             + np.mean([k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
             - 2 * np.mean([k(a, b) for a in x for b in y]))
    assert KernelDistance(y, 12).estimate(x)["value"] == pytest.approx(brute, rel=1e-10)


# Scores

def test_inception_score_by_hand_and_its_dependence_on_order():
    logits = 3 * np.random.default_rng(4).normal(size=(23, 7)).astype(np.float32)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    scores = [np.exp(np.mean(np.sum(b * (np.log(b) - np.log(b.mean(0))), 1))) for b in (p[:10], p[10:20], p[20:])]
    found = inception_scores.inception_score(in_parts(logits, 4), split=10)
    assert found == pytest.approx(scores, rel=1e-10)
    by_class = logits[np.argsort(logits.argmax(1), kind="stable")]
    assert np.mean(inception_scores.inception_score([by_class], split=10)) < 0.8 * np.mean(scores)


def test_images_in_the_order_of_their_classes_are_noticed():
    """As ADM's evaluator would score them: 50 classes of 40, in blocks of 200."""
    labels = np.repeat(np.arange(50), 40)
    logits = 9 * np.eye(50, dtype=np.float32)[labels]
    shuffled = np.random.default_rng(0).permutation(logits)
    assert not inception_scores.in_order(in_parts(shuffled, 4), split=200)
    note, = inception_scores.in_order(in_parts(logits, 4), split=200)
    low, high = (np.mean(inception_scores.inception_score([x], split=200)) for x in (logits, shuffled))
    assert 8 < high / low < 10 and "factor of 9.5" in note


def test_precision_and_recall_by_brute_force(monkeypatch):
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(60, 4)), rng.normal(size=(43, 4)) * 0.8 + 1
    monkeypatch.setattr(inception_scores, "_PR_ROWS", 7)

    def inside(points, balls):
        radii = [sorted(np.linalg.norm(balls - ball, axis=1))[3] for ball in balls]       # itself is the nearest
        return np.mean([any(np.linalg.norm(point - ball) <= r for ball, r in zip(balls, radii, strict=True))
                        for point in points])

    precision, recall = inception_scores.precision_recall(x.astype(np.float32), y.astype(np.float32))
    assert 0.1 < precision < 0.95 and 0.1 < recall < 0.95
    assert (precision, recall) == pytest.approx((inside(x, y), inside(y, x)), abs=1e-6)


# Small sets

@KINDS
def test_intervals_of_distances_of_small_sets(kind):
    distance = kind(np.random.default_rng(4).normal(size=(300, 6)), 4)
    found = [distance.estimate(x, 30) for x in draws(5, 80, 6, 1.3, 0.4)]
    assert coverage(of(found)) >= 0.89
    spread = np.std([one["value"] for one in found])
    assert 0.75 < fmean(one["stderr"] for one in found) / spread < 1.35


@KINDS
def test_paired_differences_of_small_sets(kind):
    """Images of a seed share most of what varies, as cached and uncached ones do: what intervals of two runs miss, the
    paired one finds, and still it is right as often as it should be."""
    rng = np.random.default_rng(7)
    distance, found = kind(rng.normal(size=(300, 6)), 4), []
    for _ in range(DRAWS):
        common, *own = rng.normal(size=(3, 80, 6))
        x, y = (1.2 * (0.95 * common + 0.3 * z) + 0.4 for z in own)
        found.append((distance.difference(x, y, 24), distance.difference(x + 0.1, y, 24)))
    equal, shifted = zip(*found, strict=True)
    assert coverage(of(equal), 0) >= 0.88 and coverage(of(shifted)) >= 0.88
    assert fmean(one["value"] > 1.96 * one["stderr"] for one in shifted) > 0.9
    separate = np.hypot(*(distance.estimate(z, 24)["stderr"] for z in (x + 0.1, y)))
    assert fmean(one["value"] > 1.96 * separate for one in shifted) < 0.4


def test_paired_differences_are_the_differences_of_the_distances():
    rng = np.random.default_rng(8)
    reference, x, y = (gaussians(rng, n, 6) for n in (200, 50, 50))
    for distance in (FrechetInBasis(reference, 3), KernelDistance(reference, 3)):
        of_one = [distance.estimate(z, 5)["value"] for z in (x, y)]
        assert distance.difference(x, y, 5)["value"] == pytest.approx(of_one[0] - of_one[1], rel=1e-9)
        assert distance.difference(x, x, 5) == {"value": 0, "stderr": 0, "interval": [0, 0]}
        with pytest.raises(ValueError, match="50 and 49 images cannot be paired"):
            distance.difference(x, y[:49], 5)


def test_floor_is_at_matched_sizes_and_below_a_different_set():
    rng = np.random.default_rng(5)
    reference, held_out = rng.normal(size=(300, 12)), rng.normal(size=(60, 12))
    distances = FrechetInBasis(reference, 6), KernelDistance(reference, 6)
    same, other = rng.normal(size=(100, 12)), rng.normal(size=(100, 12)) * 1.5 + 0.5
    for real, sizes in ((None, ("split", 100, 200)), (held_out, ("held-out", 60, 300))):
        near, far = (real_floor(distances, samples, real, repeats=40) for samples in (same, other))
        assert (near["kind"], near["n"], near["reference_n"]) == sizes
        for name in (distance.measure.name for distance in distances):
            low, high = near[name]["real"]["range"]
            assert low < near[name]["samples"]["mean"] < high
            assert far[name]["samples"]["range"][0] > far[name]["real"]["range"][1]


def test_nearest_neighbours_find_the_copies():
    rng = np.random.default_rng(6)
    reference = rng.normal(size=(400, 5))
    assert np.allclose(nearest_distances(reference[rng.permutation(400)[:300]] + 1e-3, reference), 1e-3 * 5 ** 0.5)


# Means

@pytest.mark.parametrize("n, groups", [(8, None), (20, None), (40, np.arange(40) // 4)])
def test_intervals_of_means(n, groups):
    """Normal values; those of one group half alike."""
    rng, found = np.random.default_rng(6), []
    for seed in range(250):
        values = rng.normal(size=n) + (0 if groups is None else rng.normal(size=10)[groups])
        found.append(mean_estimate(values, seed, 200, groups))
    assert 0.91 <= coverage(of(found), 0) <= 0.985
    assert mean_estimate(np.empty(0)) == {"mean": None, "stderr": None, "interval": None}
