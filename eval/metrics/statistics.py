"""Numbers of two sets of features and how sure they are: what eval.adm and eval.fid share.

Features are read part by part: memory does not grow with the number of images, but for precision, recall and KID, which
need the vectors themselves (820 MB for 100,000 images). What torch-fidelity computes is left to it.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_part

from eval.metrics.distances import Estimate, Frechet

GROUPS = 20                 # of the jackknife
SPLIT = 5000                # images per block of the Inception Score (ADM's evaluator)
NEIGHBOURS = 3              # of precision and recall
_PR_ROWS = 1000             # of the distance matrix held at a time: 200 MB against 50,000 images, and as much to sort
_KID_SUBSETS, _KID_SIZE = 100, 1000


class Moments:
    """Sums from which means and covariances of all images, and of all but a group, follow; in float64.

    parts: float32 [any, d] in a fixed order. groups: so many equal ones, to which the images are dealt at random, the
    same way each time.
    Sums are taken about the first part's mean, so that nothing cancels.
    """

    def __init__(self, parts: Iterable[np.ndarray], groups: int = 1):
        rng, self.origin = np.random.default_rng(0), None
        for part in parts:
            x = torch.from_numpy(part).double()
            if self.origin is None:
                d = x.shape[1]
                self.origin = x.mean(0)
                self.counts = torch.zeros(groups, dtype=torch.float64)
                self.sums = torch.zeros(groups, d, dtype=torch.float64)
                self.products = torch.zeros(groups, d, d, dtype=torch.float64)
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


def frechet(parts: Iterable[np.ndarray], mu: np.ndarray, sigma: np.ndarray, groups: int = GROUPS) -> Estimate:
    """Frechet distance of features to a reference's mean and covariance; its error by a delete-a-group jackknife.

    groups: how many, in turn left out; fewer than 2: no error (nan). The reference is held fixed. The error is of the
    choice of the images alone; the distance's bias from their finite number, which falls with it, is not in it.
    """
    moments = Moments(parts, max(1, groups))
    distance = Frechet(mu, sigma)
    left = [distance(*moments.statistics(g)) for g in range(groups)
            if groups > 1 and 0 < moments.counts[g] < moments.count - 1]
    return Estimate(distance(*moments.statistics()), jackknife(left))


def jackknife(values: list[float]) -> float:
    """Standard error of an estimate from its values with one of g equal groups left out in turn; nan for fewer than 2.

    ((g - 1) / g sum (value - mean)^2)^(1/2): of a mean of g groups, exactly its usual standard error.
    """
    g = len(values)
    return float(np.sqrt((g - 1) * np.var(values))) if g > 1 else float("nan")


class InceptionScore(NamedTuple):
    """mean: over the blocks. deviation: of the blocks (ddof 0, as usually printed). blocks: their scores."""
    mean: float
    deviation: float
    blocks: list[float]

    @property
    def estimate(self) -> Estimate:
        """With the standard error of the mean over blocks; nan for a single block."""
        n = len(self.blocks)
        return Estimate(self.mean, float(np.std(self.blocks, ddof=1) / np.sqrt(n)) if n > 1 else float("nan"))


def inception_score(parts: Iterable[np.ndarray], split: int = SPLIT) -> InceptionScore:
    """exp of the mean KL divergence of p(y|x) from p(y), in consecutive blocks, as ADM's evaluator (torch-fidelity).

    parts: logits [any, classes] in the order of the images. Nothing is shuffled and the last block may be shorter, so
    the score depends on the order: of images sorted by class it is far lower.
    """
    scores = [isc_features_to_metric(torch.from_numpy(block), splits=1, shuffle=False)[KEY_METRIC_ISC_MEAN]
              for block in _blocks(parts, split)]
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)), scores)


def _blocks(parts: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    held: list[np.ndarray] = []
    for part in parts:
        while len(part):
            taken = part[:size - sum(map(len, held))]
            held.append(taken)
            part = part[len(taken):]
            if sum(map(len, held)) == size:
                yield np.concatenate(held)
                held = []
    if held:
        yield np.concatenate(held)


class Share(NamedTuple):
    """A share of `of` images."""
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


def precision_recall(samples: np.ndarray, reference: np.ndarray) -> tuple[Share, Share]:
    """Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991) of features [n, d] and [m, d], k = 3.

    torch-fidelity's, on float32 distances, a block of rows at a time. precision: samples inside a ball of a reference
    image; recall: reference images inside a ball of a sample. Their errors are over the images that are counted
    (samples; reference images), the balls held fixed. Needs more than k images on both sides.
    """
    x, y = torch.from_numpy(samples), torch.from_numpy(reference)
    precision, recall = calculate_precision_recall_part(x, y, NEIGHBOURS, _PR_ROWS)
    return Share(precision, len(x)), Share(recall, len(y))


class Kid(NamedTuple):
    """mean and deviation over the subsets; the deviation is of a subset, not of the mean. size: images of a subset."""
    mean: float
    deviation: float
    size: int


def kid(samples: np.ndarray, reference: np.ndarray) -> Kid:
    """Kernel distance (Binkowski et al., arXiv 1801.01401) of features [n, d] and [m, d]: torch-fidelity's, unbiased.

    100 subsets of 1000 images of each (of all images where there are fewer), kernel (x.y / d + 1)^3. Its expectation
    does not depend on the number of images, which FID's does.
    """
    size = min(_KID_SIZE, len(samples), len(reference))
    found = kid_features_to_metric(torch.from_numpy(samples).double(), torch.from_numpy(reference).double(),
                                   kid_subsets=_KID_SUBSETS, kid_subset_size=size, verbose=False)
    return Kid(found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD], size)
