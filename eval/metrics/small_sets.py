"""Distances of sets of hundreds of images, with error bars, and the distance of real images from real images.

Each has a reference. A distance defines `of_subsets`; errors, paired differences and floors follow from it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from eval.metrics.frechet import frechet_distance, mean_and_covariance, one_thread, warn_of_few
from eval.metrics.measure import Measure
from unet_caching.errors import UserError

_BLOCK = 1024       # rows of a kernel matrix held at a time


class SmallSetDistance(ABC):
    """A distance of sets of features [n, D] to reference features [m, D].

    dims: the most directions it may use. extractor: the name of the network behind the features.
    """

    def __init__(self, reference: np.ndarray, dims: int, extractor: str = "EffLite0"):
        self.reference, self.measure = reference, self.named(extractor)
        self.about: dict[str, Any] = {"dims": reference.shape[1]}       # what else the JSON says

    @staticmethod
    @abstractmethod
    def named(extractor: str) -> Measure:
        """The measure on the features of an extractor."""

    @abstractmethod
    def of_subsets(self, x: np.ndarray, wx: np.ndarray, wy: np.ndarray) -> np.ndarray:
        """The distances [R] of subsets wx (bool [n, R]) of features x [n, D] from subsets wy (bool [m, R] or [m, 1]) of
        the reference."""

    def look_at(self, samples: np.ndarray) -> None:                 # noqa: B027  most distances have no warning
        """Warn if there are too few samples."""

    def estimate(self, samples: np.ndarray, repeats: int = 200, seed: int = 0) -> dict[str, Any]:
        """The distance of features [n, D], with its error over draws of n images: {value, stderr, interval (95 %)}.

        The reference is held fixed.
        """
        _needs_two(samples, self.reference)
        self.look_at(samples)
        return self._with_error(repeats, seed, samples)

    def difference(self, samples: np.ndarray, against: np.ndarray, repeats: int = 200, seed: int = 0
                   ) -> dict[str, Any]:
        """The distance of `samples` minus the distance of `against`. Both are features [n, D]; row i has the same seed.

        The standard error is over draws of n seeds, each with its image in both runs: every subset leaves out the same
        seeds of both. What two images of a seed share moves both distances alike, so it drops out of the difference.
        Errors of two independent runs would count it twice. The rise of a Frechet distance with fewer images drops out,
        too, if the covariances are alike. The reference is held fixed.
        """
        _needs_two(samples, against)
        if len(samples) != len(against):
            raise ValueError(f"{len(samples)} and {len(against)} images cannot be paired")
        return self._with_error(repeats, seed, samples, against)

    def _with_error(self, repeats: int, seed: int, samples: np.ndarray, against: np.ndarray | None = None
                    ) -> dict[str, Any]:
        """The value of all n images; its standard error from random subsets of 80 % of them, drawn WITHOUT replacement.

        A bootstrap (with replacement) repeats images. An unbiased kernel estimate leaves out the pairs of an image with
        itself; copies bring them back and push every resample up. In a covariance, copies lower the number of distinct
        images, and the Frechet distance rises. Subsets have no copies. By the delete-d jackknife (Shao and Wu 1989) the
        mean of `keep` out of n has variance s^2 / keep * (1 - keep / n), which is s^2 / n times (n - keep) / keep.
        Compared with 60 real draws of 256 emoji, the error is right for KID (0.0096; real 0.0088) and a third too large
        for FD in 64 dimensions (5.4; real 3.9; bootstrap 6.1).
        """
        n = len(samples)
        keep = min(max(2, round(0.8 * n)), n - 1) if n > 2 else n
        chosen = np.hstack([np.ones((n, 1), bool), _draw(n, keep, repeats, np.random.default_rng(seed))])
        values = self.of_subsets(samples, chosen, _whole(self.reference))
        if against is not None:
            values = values - self.of_subsets(against, chosen, _whole(self.reference))
        stderr = float(np.std(values[1:]) * np.sqrt(keep / (n - keep))) if n > keep else float("nan")
        value, half = float(values[0]), 1.96 * stderr
        return {"value": value, "stderr": stderr, "interval": [value - half, value + half]}


class FrechetInBasis(SmallSetDistance):
    """The Frechet distance within the first `dims` principal directions of the reference.

    With fewer images than dimensions it is mostly bias. It falls as n grows, for equal distributions too: compare only
    numbers of equal n and m. Raises UserError unless dims < m and <= D.
    """

    @one_thread()
    def __init__(self, reference: np.ndarray, dims: int, extractor: str = "EffLite0"):
        super().__init__(reference, dims, extractor)
        n, full = reference.shape
        if not 1 <= dims <= min(n - 1, full):
            raise UserError(f"{dims} PCA dimensions of {n} reference images with {full} features: "
                            f"choose 1 to {min(n - 1, full)}")
        self.mean, cov = mean_and_covariance([reference])
        values, vectors = torch.linalg.eigh(torch.from_numpy(cov))      # ascending
        self.directions = vectors[:, -dims:].flip(1)                    # [D, dims], orthonormal
        self.about = {"dims": dims, "explained": (values[-dims:].sum() / values.sum()).item()}  # share of variance

    def project(self, features: np.ndarray) -> np.ndarray:
        """[n, D] -> float64 [n, dims]."""
        return ((torch.tensor(features, dtype=torch.float64) - torch.from_numpy(self.mean)) @ self.directions).numpy()

    @staticmethod
    def named(extractor: str) -> Measure:
        return Measure(f"FD-{extractor}", f"fd_{extractor.lower()}", f"FD-{extractor}", 1)

    def of_subsets(self, x: np.ndarray, wx: np.ndarray, wy: np.ndarray) -> np.ndarray:
        low, reference = self.project(x), self.project(self.reference)
        against = [mean_and_covariance([reference[w]]) for w in wy.T]
        return np.array([frechet_distance(*mean_and_covariance([low[w]]), *against[r % len(against)])
                         for r, w in enumerate(wx.T)])

    def look_at(self, samples: np.ndarray) -> None:
        for features in (samples, self.reference):
            warn_of_few(self.project(features))


class KernelDistance(SmallSetDistance):
    """The kernel distance (KID; Binkowski et al., arXiv 1801.01401): the unbiased squared MMD with the kernel
    (x.y / d + 1)^3, on all images and all dimensions at once.

    Its expectation does not depend on the number of images; the Frechet distance's does. Other implementations average
    over random subsets of 100 or 1000 images, which estimate the same number with more noise.
    """

    @staticmethod
    def named(extractor: str) -> Measure:
        return Measure(f"KID-{extractor}", f"kid_{extractor.lower()}", f"KID-{extractor} x 1000", 1, scale=1000)

    def of_subsets(self, x: np.ndarray, wx: np.ndarray, wy: np.ndarray) -> np.ndarray:
        return kernel_distances(x, wx, self.reference, wy)


def kernel_distances(x: np.ndarray, wx: np.ndarray, y: np.ndarray, wy: np.ndarray) -> np.ndarray:
    """The KID [R], over all pairs, of subsets wx (bool [n, R]) of x [n, d] and wy (bool [m, R or 1]) of y [m, d].

    Its average is zero for equal distributions of any sizes, so it may be negative.
    """
    def within(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        count, itself = w.sum(0), ((x * x).sum(1) / x.shape[1] + 1) ** 3
        return (_pair_sums(x, w, x, w) - itself @ w) / (count * (count - 1))

    a, b, wa, wb = (torch.tensor(one, dtype=torch.float64) for one in (x, y, wx, wy))
    across = _pair_sums(a, wa, b, wb) / (wa.sum(0) * wb.sum(0))
    return (within(a, wa) + within(b, wb) - 2 * across).numpy()


def _pair_sums(x: torch.Tensor, wx: torch.Tensor, y: torch.Tensor, wy: torch.Tensor) -> torch.Tensor:
    """sum_ij wx[i, r] k(x_i, y_j) wy[j, r] for every r, a block of the kernel matrix at a time."""
    total = torch.zeros(1, dtype=x.dtype)
    for i in range(0, len(x), _BLOCK):
        rows = sum((x[i:i + _BLOCK] @ y[j:j + _BLOCK].T / x.shape[1] + 1) ** 3 @ wy[j:j + _BLOCK]
                   for j in range(0, len(y), _BLOCK))
        total = total + (wx[i:i + _BLOCK] * rows).sum(0)
    return total


def real_floor(distances: Sequence[SmallSetDistance], samples: np.ndarray, held_out: np.ndarray | None = None,
               repeats: int = 100, seed: int = 0) -> dict:
    """The distance of real images from real images, and of the samples at exactly the same sizes. All features: [n, D].

    distances: all with the same reference. With held_out, n = min(len(held_out), len(samples)) held-out images are
    compared with the whole reference. Without, the reference is split at random: n images, at most half and at most as
    many as there are samples, are compared with the rest. Every number is the mean over `repeats` draws of n images,
    with its 2.5% and 97.5% quantiles. If all held-out images are drawn, it is their distance with its 95% interval. If
    all samples are drawn, their range shows only the choice of the reference, not their own error. A split has the same
    subjects on both sides, held-out images other subjects: the first floor is a little low, the second a little high.
    Returns {kind, n, reference_n, and by the name of each distance {samples, real}}.
    """
    rng, reference = np.random.default_rng(seed), distances[0].reference
    real = reference if held_out is None else held_out
    n = min(len(reference) // 2 if held_out is None else len(held_out), len(samples))
    taken = _draw(len(real), n, repeats, rng)
    left = ~taken if held_out is None else _whole(reference)
    _needs_two(real[:n], reference[n if held_out is None else 0:])
    drawn = _draw(len(samples), n, repeats, rng)
    floor: dict[str, Any] = {"kind": "split" if held_out is None else "held-out", "n": n,
                             "reference_n": int(left[:, 0].sum())}
    for distance in distances:
        numbers = floor[distance.measure.name] = {"samples": _spread(distance.of_subsets(samples, drawn, left))}
        if held_out is not None and n == len(held_out):         # every draw is the whole set
            estimate = distance.estimate(held_out, repeats, seed)
            numbers["real"] = {"mean": estimate["value"], "range": estimate["interval"]}
        else:
            numbers["real"] = _spread(distance.of_subsets(real, taken, left))
    return floor


def nearest_distances(features: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The Euclidean distance [n] of features [n, D] to the nearest reference image.

    A sample that is much nearer to a training image than held-out images are is a copy of that image.
    """
    _needs_two(reference)
    from scipy.spatial.distance import cdist  # here: it takes half a second
    return np.concatenate([cdist(np.asarray(features[first:first + 256], np.float64),
                                 np.asarray(reference, np.float64)).min(1) for first in range(0, len(features), 256)])


def _whole(features: np.ndarray) -> np.ndarray:
    return np.ones((len(features), 1), bool)


def _draw(n: int, keep: int, repeats: int, rng: np.random.Generator) -> np.ndarray:
    chosen = np.zeros((n, repeats), bool)
    for r in range(repeats):
        chosen[rng.permutation(n)[:keep], r] = True
    return chosen


def _spread(values: np.ndarray) -> dict:
    return {"mean": float(values.mean()), "range": [float(q) for q in np.quantile(values, (0.025, 0.975))]}


def _needs_two(*sets: np.ndarray) -> None:
    for features in sets:
        if len(features) < 2:
            raise UserError(f"a distance of sets needs at least 2 images, got {len(features)}")
