"""Calibrate the rule by which each image decides when its deep feature is computed (unet_caching/methods/adaptive.py).

    python -m lab.fit adaptive --config configs/ldm_emoji.yaml --sampler unipc --steps 50 --calls 18 \\
        --seeds 1000-1031 --held-out-seeds 2000-2031 --out adaptive.json
    python -m ldm.sample --config configs/ldm_emoji.yaml --sampler unipc --steps 50 --adaptive adaptive.json \\
        --seeds 0-63 --out samples/adaptive

The rule watches the first residual block. Once its output has changed enough since the last full call, the deep feature
is computed again. Uncached runs give the first threshold. The rule is then run on the same seeds, and the threshold is
moved until the mean cost is the budget: --calls, in full network calls by multiply-accumulates. The report has the cost
on the held-out seeds, and the distance to the uncached run, beside evenly spread full steps.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from eval.cost.runs import costs_of
from eval.metrics.intervals import mean_estimate
from lab.fit.changes import changes_of
from lab.fit.fit import Fit, batches, bisected, evenly, with_file
from run.image_model import ImageModel
from run.results import Metric
from run.seeds import format_seeds
from unet_caching.errors import UserError
from unet_caching.methods.adaptive import AdaptiveCache, AdaptiveRule
from unet_caching.methods.block_caching import outside, residual_names
from unet_caching.methods.deepcache import DeepCache
from unet_caching.options import option, required
from unet_caching.policy import Policy

TRIES = 5           # thresholds to run before the nearest is taken


def decided(changes: np.ndarray, threshold: float) -> np.ndarray:
    """Which calls are full by the rule: changes [rows, calls] -> bool [rows, calls]. The first call always is."""
    full, sums = np.zeros(changes.shape, bool), np.zeros(len(changes))
    full[:, 0] = True
    for step in range(1, changes.shape[1]):
        sums = sums + changes[:, step]
        full[:, step] = sums > threshold
        sums[full[:, step]] = 0
    return full


def threshold_for(changes: np.ndarray, full_calls: float) -> float:
    """The threshold at which the rule makes `full_calls` full calls on average. changes: [rows, calls]."""
    return bisected(lambda threshold: decided(changes, threshold).sum(1).mean() <= full_calls,
                    float(changes.sum(1).max()), 0.0, 50)


def settled(threshold_of: Callable[[float], float], run: Callable[[float], np.ndarray], full_calls: float
            ) -> tuple[float, np.ndarray]:
    """The threshold at which the mean number of full calls in real runs is nearest to `full_calls`, and those calls.

    threshold_of: guesses the threshold for a number of full calls. run: the full calls at a threshold, bool [...,
    calls]. Each try corrects the number by the last error. It ends within half a percent, or after `TRIES` tries.
    """
    tried, wanted = [], full_calls
    for _ in range(TRIES):
        threshold = threshold_of(wanted)
        full = run(threshold)
        off = full.sum(-1).mean() - full_calls
        tried.append((abs(off), threshold, full))
        if abs(off) <= 0.005 * full_calls:
            break
        wanted -= off
    _, threshold, full = min(tried, key=lambda one: one[0])
    return threshold, full


def full_on(model: ImageModel, policy: AdaptiveCache, seeds: list[int], batch_size: int) -> np.ndarray:
    """Which calls are full by a rule: bool [1 or the halves of guidance, seeds, calls]."""
    found = []
    for batch, report in batches(seeds, batch_size, "costs", model):
        model.latents(batch, policy, report=report)
        found.append(torch.stack(policy.decided, 1).view(-1, len(batch), model.sampler.calls).cpu().numpy())
        policy.reset()
    return np.concatenate(found, axis=1)


def spent_on(model: ImageModel, rule: AdaptiveRule, seeds: list[int], batch_size: int) -> np.ndarray:
    """The cost of each seed with the rule, in full calls: float64 [seeds]."""
    share = full_on(model, rule.policy(), seeds, batch_size).mean(0)        # of the rows of a seed, by call
    return (share + rule.notes["cached call"] * (1 - share)).sum(1)


@dataclass(frozen=True)
class AdaptiveFit(Fit):
    title = "the rule"
    file = AdaptiveRule
    calls: float = required("the budget, in full network calls")
    adaptive_branch: int = option(1, "0-based skip whose inner level is cached; the first has no block to watch "
                                     "(default: %(default)s)")

    def check(self, model: ImageModel) -> None:
        most = model.run.unet.num_branches - 1
        if not 1 <= self.adaptive_branch <= most:
            raise UserError(f"--adaptive-branch must be from 1 to {most} for this model, got {self.adaptive_branch}")
        self.full_calls(model)

    def full_calls(self, model: ImageModel) -> tuple[float, float]:
        """The number of full calls within the budget, and the cost of a cached call. Raises UserError."""
        costs, total = costs_of(model.run), model.sampler.calls
        ratio = costs.cached(self.adaptive_branch).hook / costs.full.hook
        found = (self.calls - total * ratio) / (1 - ratio)
        if not 1 <= found < total:
            raise UserError(f"--calls must be from {1 + (total - 1) * ratio:.2f} (one full) to {total} (all full), "
                            f"got {self.calls:g}")
        return found, ratio

    def fit(self, model: ImageModel, seeds: list[int], batch_size: int) -> AdaptiveRule:
        unet, branch, total = model.run.unet, self.adaptive_branch, model.sampler.calls
        full_calls, ratio = self.full_calls(model)
        watched = outside(residual_names(unet, "all"), unet.num_branches, branch)[0]
        changes = changes_of(model, [watched, branch], seeds, batch_size)
        inputs, features = changes[watched].numpy(), changes[branch].numpy()
        factors = [round(float(factor), 6) for factor in (0.0, *(features.mean(0)[1:] / inputs.mean(0)[1:]))]

        def run(threshold: float) -> np.ndarray:
            return full_on(model, AdaptiveCache(branch, watched, factors, threshold, [0]), seeds, batch_size)

        threshold, full = settled(lambda wanted: round(threshold_for(inputs * factors, wanted), 6), run, full_calls)
        counts = full.sum(-1)
        typical = full.reshape(-1, total)[np.abs(counts - counts.mean()).argmin()]
        return AdaptiveRule(model.run.made_for(model.settings["checkpoint_sha256"]), branch, watched, factors,
                            threshold, np.flatnonzero(typical).tolist(),
                            notes={"seeds": format_seeds(seeds), "budget": self.calls, "cached call": ratio,
                                   "full calls": float(counts.mean())})

    def measure(self, model: ImageModel, made: AdaptiveRule, seeds: list[int], batch_size: int) -> dict[str, Metric]:
        """The cost with the rule, which is only known after runs."""
        spent = spent_on(model, made, seeds, batch_size)
        made.notes |= {"held_out_seeds": format_seeds(seeds), "spent": {
            "mean": float(spent.mean()), "least": float(spent.min()), "most": float(spent.max())}}
        return {"full calls, as it came out": Metric.of(mean_estimate(spent))}

    def arms(self, model: ImageModel, path: Path) -> Mapping[str, Callable[[], Policy]]:
        made = AdaptiveRule.load(path)
        return {"evenly": partial(DeepCache, made.branch, evenly(model.sampler.calls, len(made.typical))),
                "adaptive": with_file(model, adaptive=path)}
