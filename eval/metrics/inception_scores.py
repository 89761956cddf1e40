"""Scores of Inception features: FID, sFID, IS, precision and recall. torch-fidelity computes the last three.

Features are read in parts, so memory does not grow with the number of images. Precision and recall are the exception:
they need the vectors themselves (820 MB for 100,000 images).
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from eval.metrics.frechet import frechet_distance, mean_and_covariance
from eval.metrics.measure import Measure, SetMeasure, Sets, Unavailable
from run.results import Metric

SPLIT = 5000                # images per block of the Inception Score (ADM's evaluator)
NEIGHBOURS = 3              # k of precision and recall
_PR_ROWS = 1000             # rows of the distance matrix in memory: 200 MB for 50,000 images, and as much to sort them


def inception_score(parts: Iterable[np.ndarray], split: int = SPLIT) -> list[float]:
    """The Inception Score of each consecutive block of images, as in ADM's evaluator: exp of the mean KL(p(y|x), p(y)).

    parts: logits [any, classes] in the order of the images. Nothing is shuffled and the last block may be shorter. So
    the score depends on the order: it is far lower for images that are sorted by class.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
    return [isc_features_to_metric(torch.from_numpy(block), splits=1, shuffle=False)[KEY_METRIC_ISC_MEAN]
            for block in _blocks(parts, split)]


def in_order(parts: Iterable[np.ndarray], split: int = SPLIT) -> list[str]:
    """A note if the images come in the order of their classes, so that a block shows only some classes.

    log IS of all images is the mean over blocks of log IS + KL(p(y) of the block, p(y) of all images). In random order
    the mean divergence is below (classes - 1) / (2 split), 0.1. With a tenth of the classes in each block it is log 10.
    """
    blocks = [(len(block), torch.from_numpy(block).double().softmax(1).mean(0)) for block in _blocks(parts, split)]
    sizes, means = torch.tensor([size for size, _ in blocks]), torch.stack([mean for _, mean in blocks])
    shares = sizes.double() / sizes.sum()
    divergence = float(shares @ torch.xlogy(means, means / (shares @ means)).sum(1))
    return [f"the images come in the order of their classes: IS, over blocks of {split} in that order as in ADM's "
            f"evaluator, is lower by a factor of {np.exp(divergence):.1f} than of images in random order: shuffle "
            "them to compare with numbers of shuffled images"] if divergence > 0.3 else []


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


def precision_recall(samples: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991) of features [n, d] and [m, d], k = 3.

    torch-fidelity's, on float32 distances, a block of rows at a time. precision: the share of samples inside a ball of
    a reference image; recall: the share of reference images inside a ball of a sample. Both sets need over k images.
    """
    from torch_fidelity.metric_prc import calculate_precision_recall_part
    return calculate_precision_recall_part(torch.from_numpy(samples), torch.from_numpy(reference), NEIGHBOURS, _PR_ROWS)


def _frechet(layer: str) -> Callable[[Sets], list[Metric]]:
    def of(sets: Sets) -> list[Metric]:
        return [Metric(frechet_distance(*mean_and_covariance(sets.samples.parts(layer)), *sets.statistics(layer)))]
    return of


def _inception_score(sets: Sets) -> list[Metric]:
    blocks = inception_score(sets.samples.parts("logits"))
    error = float(np.std(blocks, ddof=1) / np.sqrt(len(blocks))) if len(blocks) > 1 else None
    return [Metric(float(np.mean(blocks)), stderr=error)]


def _precision_recall(sets: Sets) -> list[Metric]:
    if sets.real is None:
        raise Unavailable("no real images")
    x, y = sets.samples.all("pool"), sets.real.all("pool")
    if min(len(x), len(y)) <= NEIGHBOURS:
        raise Unavailable(f"they need more than {NEIGHBOURS} images")
    return [Metric(share) for share in precision_recall(x, y)]


FID = SetMeasure((Measure("FID", "fid", "FID"),), _frechet("pool"), ("adm", "fid"))
SFID = SetMeasure((Measure("sFID", "sfid", "sFID"),), _frechet("spatial"))
IS = SetMeasure((Measure("IS", "is", "IS", higher=True),), _inception_score)
PRECISION_RECALL = SetMeasure((Measure("precision", "precision", "precision", scale=100, higher=True),
                               Measure("recall", "recall", "recall", scale=100, higher=True)), _precision_recall,
                              slow=" (minutes on a CPU)")
