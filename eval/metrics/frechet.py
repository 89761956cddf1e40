"""The Frechet distance of Gaussians (Heusel et al., arXiv 1706.08500), and the means and covariances that it takes."""

import contextlib
import warnings
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from eval.metrics.intervals import Estimate, jackknife

GROUPS = 20                 # of the jackknife


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Small eigenproblems on several threads spend their time waiting for each other: with a busy core next door, that
    of 1280 dimensions took 41 s on two threads and 0.7 s on one. NumPy's BLAS cannot be told so; torch's can."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Frechet:
    """Frechet distance from one Gaussian to others: |mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)), in float64.

    mu: [d]; cov: [d, d], symmetric. With S S' = cov1 and T T' = cov2 the trace of (cov1 cov2)^(1/2) is the sum of the
    singular values of S' T. Where both have full rank they are the roots of the eigenvalues of S' cov2 S, which is four
    times quicker; those of a singular one would be rounding errors, whose roots are large: 2e-5 of the distance, as
    with SciPy's sqrtm.
    """

    @one_thread()
    def __init__(self, mu: np.ndarray, cov: np.ndarray):
        self.mu, self.cov = (torch.tensor(a, dtype=torch.float64) for a in (mu, cov))
        self.root, self.full = _root(self.cov)

    @one_thread()
    def __call__(self, mu: np.ndarray, cov: np.ndarray) -> float:
        other_mu, other_cov = (torch.tensor(a, dtype=torch.float64) for a in (mu, cov))
        other_root, full = _root(other_cov)
        if self.full and full:
            product = self.root.T @ other_cov @ self.root
            shared = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
        else:
            shared = torch.linalg.svdvals(self.root.T @ other_root).sum()
        return (((self.mu - other_mu) ** 2).sum() + self.cov.trace() + other_cov.trace() - 2 * shared).item()


def _root(cov: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """(S [d, rank] with S S' = cov, whether the rank is full)."""
    root, singular = torch.linalg.cholesky_ex(cov)
    noise = len(cov) * torch.finfo(cov.dtype).eps       # of the largest, what rounding leaves of a zero
    if not singular and root.diagonal().square().min() > noise * cov.diagonal().max():
        return root, True
    values, vectors = torch.linalg.eigh(cov)            # six times slower
    kept = values > noise * values.max().clamp(min=0)
    return vectors[:, kept] * values[kept].sqrt(), False


def frechet_distance(mu1: np.ndarray, cov1: np.ndarray, mu2: np.ndarray, cov2: np.ndarray) -> float:
    """The Frechet distance of two Gaussians, each mu [d] and cov [d, d]."""
    return Frechet(mu1, cov1)(mu2, cov2)


@one_thread()
def mean_and_covariance(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [d] and unbiased covariance [d, d] of features [n, d] in memory, in float64."""
    x = torch.tensor(features, dtype=torch.float64)
    centred = x - x.mean(0)
    return x.mean(0).numpy(), (centred.T @ centred / (len(x) - 1)).numpy()


def warn_of_few(features: np.ndarray) -> None:
    """Warn where the covariance of features [n, d] is singular."""
    n, d = features.shape
    if n <= d:
        warnings.warn(f"{n} images for {d} dimensions: the covariance is singular and the Frechet distance mostly "
                      "bias: use more images or fewer dimensions", stacklevel=3)


class Moments:
    """Sums from which means and covariances of all images, and of all but a group, follow; in float64.

    parts: float32 [any, d] in a fixed order, read one by one: memory does not grow with the images. groups: so many
    equal ones, to which the images are dealt at random, the same way each time.
    Sums are taken about the first part's mean, so that nothing cancels.
    """

    def __init__(self, parts: Iterable[np.ndarray], groups: int = 1):
        rng = np.random.default_rng(0)
        for i, part in enumerate(parts):
            x = torch.from_numpy(part).double()
            if not i:
                self.origin, d = x.mean(0), x.shape[1]
                self.counts, self.sums, self.products = (
                    torch.zeros(groups, *shape, dtype=torch.float64) for shape in ((), (d,), (d, d)))
            x -= self.origin
            group = torch.from_numpy(rng.permutation(len(x)) % groups)
            for g in range(groups):
                some = x[group == g]
                self.counts[g] += len(some)
                self.sums[g] += some.sum(0)
                self.products[g].addmm_(some.T, some)
        self.total = self.counts.sum(0), self.sums.sum(0), self.products.sum(0)

    @property
    def count(self) -> int:
        """Images."""
        return int(self.total[0])

    def statistics(self, without: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Mean [d] and unbiased covariance [d, d] of all images, or of those outside one group."""
        n, s, p = self.total
        if without is not None:
            n, s, p = n - self.counts[without], s - self.sums[without], p - self.products[without]
        mean = s / n
        return (self.origin + mean).numpy(), ((p - n * torch.outer(mean, mean)) / (n - 1)).numpy()


def frechet_of_parts(parts: Iterable[np.ndarray], mu: np.ndarray, sigma: np.ndarray, groups: int = GROUPS) -> Estimate:
    """Frechet distance of any number of features to known statistics; its error by a delete-a-group jackknife.

    groups: how many, in turn left out; fewer than 2: no error (nan). The reference is held fixed. The error is of the
    choice of the images alone; the distance's bias from their finite number, which falls with it, is not in it.
    """
    moments = Moments(parts, max(1, groups))
    distance = Frechet(mu, sigma)
    left = [distance(*moments.statistics(g)) for g in range(groups)
            if groups > 1 and 0 < moments.counts[g] < moments.count - 1]
    return Estimate(distance(*moments.statistics()), jackknife(left), len(left) - 1)
