"""The Frechet distance of Gaussians (Heusel et al., arXiv 1706.08500), and the means and covariances that it takes."""

import contextlib
import warnings
from collections.abc import Iterable, Iterator

import numpy as np
import torch


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: in a small eigenproblem, several threads spend their time waiting for each other.

    In 1280 dimensions, beside a busy core, two threads took 41 s and one took 0.7 s. NumPy's BLAS has no such switch.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def frechet_distance(mu1: np.ndarray, cov1: np.ndarray, mu2: np.ndarray, cov2: np.ndarray) -> float:
    """|mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)), float64, of means [d] and symmetric covariances [d, d].

    With S S' = cov1 and T T' = cov2 the trace of (cov1 cov2)^(1/2) is the sum of the singular values of S' T. If both
    covariances have full rank, these are the roots of the eigenvalues of S' cov2 S, which is four times quicker. If one
    is singular, some of those eigenvalues are rounding errors, and their roots are large: 2e-5 of the distance, as with
    SciPy's sqrtm.
    """
    mu, other_mu, cov, other_cov = (torch.tensor(a, dtype=torch.float64) for a in (mu1, mu2, cov1, cov2))
    (root, full), (other_root, other_full) = _root(cov), _root(other_cov)
    if full and other_full:
        product = root.T @ other_cov @ root
        shared = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    else:
        shared = torch.linalg.svdvals(root.T @ other_root).sum()
    return (((mu - other_mu) ** 2).sum() + cov.trace() + other_cov.trace() - 2 * shared).item()


def _root(cov: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """(S [d, rank] with S S' = cov, whether the rank is full)."""
    root, singular = torch.linalg.cholesky_ex(cov)
    noise = len(cov) * torch.finfo(cov.dtype).eps       # of the largest: how large rounding makes a zero
    if not singular and root.diagonal().square().min() > noise * cov.diagonal().max():
        return root, True
    values, vectors = torch.linalg.eigh(cov)            # six times slower
    kept = values > noise * values.max().clamp(min=0)
    return vectors[:, kept] * values[kept].sqrt(), False


@one_thread()
def mean_and_covariance(parts: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The mean [d] and unbiased covariance [d, d], in float64, of features that come in parts [any, d].

    Memory does not grow with the images. Sums are taken about the first part's mean, so that nothing cancels.
    """
    count, origin, sums, products = 0, *(torch.zeros(1, dtype=torch.float64) for _ in range(3))
    for part in parts:
        x = torch.tensor(part, dtype=torch.float64)
        origin = origin if count else x.mean(0)
        x -= origin
        count, sums, products = count + len(x), sums + x.sum(0), products + x.T @ x
    mean = sums / count
    return (origin + mean).numpy(), ((products - count * torch.outer(mean, mean)) / (count - 1)).numpy()


def warn_of_few(features: np.ndarray) -> None:
    """Warn if the covariance of features [n, d] is singular."""
    n, d = features.shape
    if n <= d:
        warnings.warn(f"{n} images for {d} dimensions: the covariance is singular and the Frechet distance mostly "
                      "bias: use more images or fewer dimensions", stacklevel=3)
