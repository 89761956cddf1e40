"""The teacher of fits is the frozen network itself, on the path of a run that caches; and distances from it."""

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.metrics.intervals import mean_estimate
from lab.fit.fit import batches
from run.image_model import ImageModel
from run.results import Metric
from unet_caching.keep import Keep
from unet_caching.nest import Network
from unet_caching.policy import Policy

MEASURES = ("feature", "latents", "pixels")
OUTPUT = "output"           # the key of the network's output among its values
Values = Mapping[Any, Tensor]       # by key


class OnRunsPath:
    """Stands in for the U-Net while a run samples with a caching policy: `network(x, t, *context, cache=...)`, as
    `unet_caching.samplers.samplers.noise_predictor` calls it.

    At each network call the teacher computes, from the run's own input, the values that the student reuses. Subclasses
    compare them, learn from them, or change the policy; then the student predicts.
    """

    def __init__(self, unet: Network):
        self.unet = unet

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, *context: Tensor, cache: Policy) -> Tensor:
        wanted: dict[Any, Tensor] = {}
        keys = self.taught(cache)

        def teacher(key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
            value = compute()
            if key in keys:
                wanted[key] = value
            return value

        if keys:
            output = self.unet(x, t, *context, cache=teacher)
            wanted |= {OUTPUT: output} if OUTPUT in keys else {}
        return self.meet(cache, wanted, lambda: self.unet(x, t, *context, cache=cache))

    def taught(self, cache: Policy) -> Collection[Hashable]:
        """The keys of the values that the teacher computes at this call, or OUTPUT; none: it does not run.

        By default the values that the call reuses; none if the policy does not know them beforehand.
        """
        return cache.reused if isinstance(cache, Keep) else ()

    def meet(self, cache: Policy, wanted: Values, predict: Callable[[], Tensor]) -> Tensor:
        """The output that the run continues with. wanted: the teacher's values by key; empty if it did not run.
        predict: computes the student's output with the policy."""
        raise NotImplementedError


class Student(OnRunsPath):
    """Learns while runs are sampled with its `policy`, by an optimiser step at network calls."""
    optimizer: torch.optim.Optimizer
    losses: list[tuple[float, float]]       # of every call that it learns from, with a number to compare to

    def policy(self) -> Policy:
        """A fresh policy for a batch, with the parameters learned so far."""
        raise NotImplementedError

    def update(self) -> None:
        """Called after every batch."""

    def descend(self, loss: Tensor) -> None:
        """Take an optimiser step."""
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def learn(self, model: ImageModel, seeds: Sequence[int], batch_size: int, falls_by: float = 1.0) -> None:
        """Learn from runs. The learning rate falls linearly, by the share `falls_by` of its start."""
        groups, met = [(group, group["lr"]) for group in self.optimizer.param_groups], 0
        for batch, report in batches(seeds, batch_size, "training", model):
            for group, lr in groups:
                group["lr"] = lr * (1 - falls_by * met / len(seeds))
            model.latents(batch, self.policy(), self, report)
            self.update()
            met += len(batch)


class Comparison(OnRunsPath):
    """The error of reused values against the values that the network would compute there.

    `errors`: for every call that reuses values, the mean over them of |reused - computed|_2 / |computed|_2, float32
    [batch].
    """

    def __init__(self, unet: Network):
        super().__init__(unet)
        self.errors: list[Tensor] = []

    def meet(self, cache: Policy, wanted: Values, predict: Callable[[], Tensor]) -> Tensor:
        if wanted:
            assert isinstance(cache, Keep)
            errors = [relative_distance(cache.reuse(key), value) for key, value in wanted.items()]
            self.errors.append(torch.stack(errors).mean(0))
        return predict()


def held_out_distances(model: ImageModel, arms: Mapping[str, Callable[[], Policy]], seeds: Sequence[int],
                       batch_size: int) -> dict[str, Metric]:
    """The distances of policies to the network without caching, on the same seeds, by "measure, arm".

    arms: functions that return a fresh policy. feature: the relative distance of reused values from the values that the
    network would compute there, the mean over calls and values; only if the policy knows them beforehand. latents: the
    relative distance of the final latents. pixels: root mean square, of 255. Each has a 95 % interval over the seeds.
    So have the paired differences between each arm and the one before, "measure, arm less arm before".
    """
    found: dict[str, list[float]] = defaultdict(list)
    for batch, report in batches(seeds, batch_size, "judging", model, work=1 + len(arms)):
        exact = model.latents(batch, report=report)
        images = model.decode(exact).astype(np.float32)
        for arm, make in arms.items():
            comparison = Comparison(model.unet)
            latents = model.latents(batch, make(), comparison, report)
            if comparison.errors:
                of_rows = torch.stack(comparison.errors).mean(0)                    # both halves of guidance
                found[f"feature, {arm}"] += of_rows.view(-1, len(batch)).mean(0).tolist()
            found[f"latents, {arm}"] += relative_distance(latents, exact).tolist()
            errors = np.square(model.decode(latents) - images).mean(axis=(1, 2, 3))
            found[f"pixels, {arm}"] += np.sqrt(errors).tolist()
    values = {name: np.array(of_seeds) for name, of_seeds in found.items()}
    for measure in MEASURES:
        for before, after in pairwise(arms):
            names = f"{measure}, {before}", f"{measure}, {after}"
            if all(name in values for name in names):
                values[f"{names[1]} less {before}"] = values[names[1]] - values[names[0]]
    return {name: Metric.of(mean_estimate(of_seeds)) for name, of_seeds in values.items()}


def relative_distance(value: Tensor, exact: Tensor) -> Tensor:
    """|value - exact|_2 / |exact|_2 of each row: [batch, ...] -> float32 [batch]."""
    value, exact = value.float().flatten(1), exact.float().flatten(1)
    return (value - exact).norm(dim=1) / exact.norm(dim=1)
