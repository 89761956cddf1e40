"""Scores of Inception features: FID, sFID, IS, precision and recall, KID. What torch-fidelity computes is left to it.

Features are read part by part: memory does not grow with the number of images, but for precision, recall and KID, which
need the vectors themselves (820 MB for 100,000 images).
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from eval.metrics.frechet import frechet_of_parts
from eval.metrics.intervals import Estimate, Share, jackknife
from eval.metrics.kernel import kid_of_subsets
from eval.metrics.measure import Measure, Score, SetMeasure, Sets, Unavailable, shown
from run.results import Metric

SPLIT = 5000                # images per block of the Inception Score (ADM's evaluator)
NEIGHBOURS = 3              # of precision and recall
_NEAR = 64                  # neighbours of a sample among which those outside a group are looked for
_PR_ROWS = 1000             # of the distance matrix held at a time: 200 MB against 50,000 images, and as much to sort


def inception_score(parts: Iterable[np.ndarray], split: int = SPLIT) -> list[float]:
    """exp of the mean KL divergence of p(y|x) from p(y) of each consecutive block, as ADM's evaluator (torch-fidelity).

    parts: logits [any, classes] in the order of the images. Nothing is shuffled and the last block may be shorter, so
    the score depends on the order: of images sorted by class it is far lower.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
    return [isc_features_to_metric(torch.from_numpy(block), splits=1, shuffle=False)[KEY_METRIC_ISC_MEAN]
            for block in _blocks(parts, split)]


def mean_of_blocks(scores: list[float]) -> Estimate:
    """With the standard error of the mean; nan for a single block."""
    n = len(scores)
    error = float(np.std(scores, ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    return Estimate(float(np.mean(scores)), error, n - 1)


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


def precision_recall(samples: np.ndarray, reference: np.ndarray, groups: int = 0) -> tuple[Share, Estimate]:
    """Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991) of features [n, d] and [m, d], k = 3.

    torch-fidelity's, on float32 distances, a block of rows at a time. precision: samples inside a ball of a reference
    image; recall: reference images inside a ball of a sample. Their errors are over draws of the samples, the reference
    held fixed: of precision a binomial one, of recall, whose balls move with the samples, a jackknife over so many
    groups of them (fewer than 2: no error). Needs more than k images on both sides.
    """
    from torch_fidelity.metric_prc import calculate_precision_recall_part
    x, y = torch.from_numpy(samples), torch.from_numpy(reference)
    precision, recall = calculate_precision_recall_part(x, y, NEIGHBOURS, _PR_ROWS)
    left = _recalls_without(x, y, groups)
    return Share(precision, len(x)), Estimate(recall, jackknife(left), len(left) - 1)


def _recalls_without(x: Tensor, y: Tensor, groups: int) -> list[float]:
    """Recall of x [n, d] in y [m, d] with each of so many equal groups of x, dealt at random, left out in turn.

    A sample's ball reaches to its nearest neighbours outside the group, which are among its `_NEAR` nearest of all.
    """
    group = torch.from_numpy(np.random.default_rng(0).permutation(len(x)) % max(groups, 1))
    if groups < 2 or len(x) < groups or int((group != 0).sum()) <= NEIGHBOURS:
        return []
    radii = []
    for rows in x.split(_PR_ROWS):
        near, index = torch.cdist(rows, x).topk(min(len(x), _NEAR), largest=False)      # the first of them is itself
        inside = torch.stack([group[index] != g for g in range(groups)])
        inside[:, :, 0] = True
        place = (inside.cumsum(2) == NEIGHBOURS + 1).int().argmax(2)
        radii.append(near.expand(groups, -1, -1).gather(2, place[:, :, None])[:, :, 0])
    radius = torch.cat(radii, 1)                                                         # [groups, n]
    inside_some = torch.zeros(groups, dtype=torch.float64)
    for rows in y.split(_PR_ROWS):
        distances = torch.cdist(rows, x)
        for g in range(groups):
            inside_some[g] += ((distances <= radius[g]) & (group != g)).any(1).sum()
    return (inside_some / len(y)).tolist()


# As eval.adm and eval.fid print and keep them.

def _frechet(layer: str) -> Callable[[Sets], list[Score]]:
    def of(sets: Sets) -> list[Score]:
        metric = frechet_of_parts(sets.samples.parts(layer), *sets.statistics(layer), sets.groups).metric
        return [Score(metric, shown(metric))]
    return of


def _inception_score(sets: Sets) -> list[Score]:
    blocks = inception_score(sets.samples.parts("logits"))
    metric, deviation = mean_of_blocks(blocks).metric, float(np.std(blocks))       # as usually printed
    return [Score(metric, f"{shown(metric, 2)}   ({len(blocks)} blocks in order, deviation {deviation:.2f})",
                  {"deviation": deviation, "blocks": blocks, "images_per_block": SPLIT,
                   "order": "as the samples lie, not shuffled"})]


def _precision_recall(sets: Sets) -> list[Score]:
    x, y = sets.vectors, sets.real_vectors
    if min(len(x), len(y)) <= NEIGHBOURS:
        raise Unavailable(f"they need more than {NEIGHBOURS} images")
    precision, recall = (one.metric for one in precision_recall(x, y, sets.groups))
    if not recall.stderr:       # no group changes it, as where it is 0: that says nothing of its error
        recall = Metric(recall.value)
    elif recall.interval:
        recall.interval = [min(max(end, 0.0), 1.0) for end in recall.interval]
    return [Score(metric, shown(metric)) for metric in (precision, recall)]


def _kid(sets: Sets) -> list[Score]:
    mean, deviation, size = kid_of_subsets(sets.vectors, sets.real_vectors)
    return [Score(Metric(mean), f"{1000 * mean:.4f}   (deviation of a subset of {size}: {1000 * deviation:.4f})",
                  {"deviation": deviation, "images_per_subset": size, "against": "the features of real images"})]


FID = SetMeasure((Measure("FID", "fid", "FID"),), _frechet("pool"), ("adm", "fid"))
SFID = SetMeasure((Measure("sFID", "sfid", "sFID"),), _frechet("spatial"))
IS = SetMeasure((Measure("IS", "is", "IS", higher=True),), _inception_score)
PRECISION_RECALL = SetMeasure((Measure("precision", "precision", "precision", scale=100, higher=True),
                               Measure("recall", "recall", "recall", scale=100, higher=True)), _precision_recall,
                              slow=" (minutes on a CPU)")
KID = SetMeasure((Measure("KID"),), _kid, ("adm", "fid"), labels={"KID": "KID x 1000"})
