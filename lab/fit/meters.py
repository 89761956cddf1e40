"""Meters tell what changes between the steps of a run, and how much.

A meter is a caching policy that looks at every value and reuses none: `unet(x, t, cache=meter.at(step))`, and
`meter.reset()` after each batch.
"""

from collections.abc import Callable, Collection, Hashable

import torch
import torch.nn.functional as F
from torch import Tensor

from unet_caching.methods.adaptive import relative_change
from unet_caching.policy import Policy


class ChangeMeter(Policy):
    """How much each residual changes from step to step (Block Caching, arXiv 2312.03209, its L1rel).

    names: the residuals that are measured. num_steps: network calls of a run.
    """

    def __init__(self, names: Collection[str], num_steps: int):
        self.sums = {name: torch.zeros(num_steps, dtype=torch.float64) for name in names}
        self.rows = {name: torch.zeros(num_steps, dtype=torch.long) for name in names}
        self.reset()

    def reset(self) -> None:
        self.previous: dict[str, Tensor] = {}

    def at(self, step: int) -> "ChangeMeter":
        self.step = step
        return self

    def __call__(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        value = compute()
        if key in self.sums:
            if key in self.previous:
                self.sums[key][self.step] += relative_change(value, self.previous[key]).double().sum().cpu()
                self.rows[key][self.step] += len(value)
            self.previous[key] = value
        return value

    def changes(self) -> dict[str, list[float]]:
        """The change of each residual from step t - 1 to t, averaged over the rows of all batches; 0 for step 0.

        Raises RuntimeError when a step has not been measured.
        """
        unmeasured = [name for name, rows in self.rows.items() if not rows[1:].all()]
        if unmeasured:
            raise RuntimeError(f"not every step of {unmeasured[0]} was measured")
        return {name: (sums / self.rows[name].clamp(min=1)).tolist() for name, sums in self.sums.items()}


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

    def at(self, step: int) -> "SimilarityMeter":
        return self

    def __call__(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        value = compute()
        if key in self.features:
            self.features[key].append(F.normalize(value.float().flatten(1), dim=1).half())
        return value

    def similarities(self) -> dict[int, Tensor]:
        """The similarities at each branch: float64 [steps, steps], averaged over the rows of all batches."""
        return {branch: sums / self.rows for branch, sums in self.sums.items()}
