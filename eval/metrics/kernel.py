"""The kernel distance (KID; Binkowski et al., arXiv 1801.01401): the unbiased squared MMD with kernel (x.y / d + 1)^3.

Its expectation does not depend on the number of images, which the Frechet distance's does. Two estimates of the same
number: over all pairs of images, and, as the literature prints it, over random subsets of 1000.
"""

import numpy as np
import torch

_BLOCK = 1024       # rows of a kernel matrix held at a time
_SUBSETS, _SIZE = 100, 1000


def kernel_distances(x: np.ndarray, wx: np.ndarray, y: np.ndarray, wy: np.ndarray) -> np.ndarray:
    """KID [R] over all pairs, of the subsets wx (bool [n, R]) of x [n, d] with those wy (bool [m, R or 1]) of y [m, d].

    Zero on average for equal distributions at any sizes, so it may be negative.
    """
    def within(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        count, itself = w.sum(0), ((x * x).sum(1) / x.shape[1] + 1) ** 3
        return (_pair_sums(x, w, x, w) - itself @ w) / (count * (count - 1))

    a, b, wa, wb = (torch.tensor(one, dtype=torch.float64) for one in (x, y, wx, wy))
    across = _pair_sums(a, wa, b, wb) / (wa.sum(0) * wb.sum(0))
    return (within(a, wa) + within(b, wb) - 2 * across).numpy()


def _kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _pair_sums(x: torch.Tensor, wx: torch.Tensor, y: torch.Tensor, wy: torch.Tensor) -> torch.Tensor:
    """sum_ij wx[i, r] k(x_i, y_j) wy[j, r] for every r, a block of the kernel matrix at a time."""
    total = torch.zeros(1, dtype=x.dtype)
    for i in range(0, len(x), _BLOCK):
        rows = sum(_kernel(x[i:i + _BLOCK], y[j:j + _BLOCK]) @ wy[j:j + _BLOCK] for j in range(0, len(y), _BLOCK))
        total = total + (wx[i:i + _BLOCK] * rows).sum(0)
    return total


def kid_of_subsets(samples: np.ndarray, reference: np.ndarray) -> tuple[float, float, int]:
    """KID of features [n, d] and [m, d] as it is usually printed: torch-fidelity's.

    Over 100 random subsets of 1000 images of each (of all images where there are fewer): (mean, deviation of a subset,
    images of a subset).
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
    size = min(_SIZE, len(samples), len(reference))
    kid = kid_features_to_metric(torch.from_numpy(samples).double(), torch.from_numpy(reference).double(),
                                   kid_subsets=_SUBSETS, kid_subset_size=size, verbose=False)
    return kid[KEY_METRIC_KID_MEAN], kid[KEY_METRIC_KID_STD], size
