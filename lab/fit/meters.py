"""Meters tell what changes between the calls of a run, and how much.

A meter is a caching policy that looks at every value and reuses none: `unet(x, t, cache=meter.at(step))`, and
`meter.reset()` after each batch.
"""

from collections.abc import Callable, Collection, Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.fit.fit import batches
from run.image_model import ImageModel
from unet_caching.methods.adaptive import relative_change
from unet_caching.policy import Policy


class ChangeMeter(Policy):
    """How much some values change from call to call (Block Caching, arXiv 2312.03209, its L1rel), row by row."""

    def __init__(self, keys: Collection[Hashable]):
        self.batches: dict[Hashable, list[Tensor]] = {key: [] for key in keys}
        self.reset()

    def reset(self) -> None:
        """Put the changes of the batch to those of the others."""
        for key, calls in getattr(self, "calls", {}).items():
            self.batches[key].append(torch.stack(calls, 1))
        self.calls: dict[Hashable, list[Tensor]] = {}
        self.previous: dict[Hashable, Tensor] = {}

    def __call__(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        value = compute()
        if key in self.batches:
            change = relative_change(value, self.previous.get(key, value))
            self.calls.setdefault(key, []).append(change.cpu())
            self.previous[key] = value
        return value

    def changes(self) -> dict[Hashable, Tensor]:
        """The change of each value from the call before, by its key: float32 [rows of all batches, calls]; 0 for the
        first."""
        return {key: torch.cat(batches) for key, batches in self.batches.items()}


def changes_of(model: ImageModel, keys: Collection[Hashable], seeds: Sequence[int], batch_size: int
               ) -> dict[Hashable, Tensor]:
    """How much values change in the uncached runs of a loaded model (`ChangeMeter.changes`)."""
    meter = ChangeMeter(keys)
    for batch, report in batches(seeds, batch_size, "changes", model):
        model.latents(batch, meter, report=report)
        meter.reset()
    return meter.changes()


class SimilarityMeter(Policy):
    """Cosine similarity between all pairs of steps of the feature that DeepCache reuses (arXiv 2312.00858, Figure 2).

    branches: 0-based skips. Holds every step's feature in half precision: measure few images at a time.
    """

    def __init__(self, branches: Collection[int]):
        self.sums: dict[int, Tensor] = {}
        self.rows = 0
        self.features: dict[int, list[Tensor]] = {branch: [] for branch in branches}

    def reset(self) -> None:
        rows = 0
        for branch, features in self.features.items():
            steps = torch.stack(features, dim=1).float()                                # [batch, steps, numbers]
            self.sums[branch] = self.sums.get(branch, 0) + (steps @ steps.mT).double().sum(0).cpu()
            rows = len(steps)
            features.clear()
        self.rows += rows

    def __call__(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        value = compute()
        if key in self.features:
            self.features[key].append(F.normalize(value.float().flatten(1), dim=1).half())
        return value

    def similarities(self) -> dict[int, Tensor]:
        """The similarities at each branch: float64 [steps, steps], averaged over the rows of all batches."""
        return {branch: sums / self.rows for branch, sums in self.sums.items()}
