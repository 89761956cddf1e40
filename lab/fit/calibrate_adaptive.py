"""Calibrates the rule by which each image decides when its deep feature is computed (unet_caching/methods/adaptive.py).

    python -m lab.fit.calibrate_adaptive --config configs/ldm_emoji.yaml --sampler unipc --steps 50 --calls 18 \\
        --seeds 1000-1031 --held-out-seeds 2000-2031 --out adaptive.json
    python -m ldm.sample --config configs/ldm_emoji.yaml --sampler unipc --steps 50 --adaptive adaptive.json \\
        --seeds 0-63 --out samples/adaptive

Uncached runs tell how much what is watched, and the feature, change from call to call, and with that the threshold at
which they would have cost the budget, --calls, on average, in multiply-accumulates of full network calls. An image that
reuses goes another way than an uncached one, so the rule is then run on the same seeds, and the threshold moved until
that costs the budget. What it costs on the held-out seeds is reported as it comes out, with the distance to the
uncached run, beside evenly spread full steps. The options are those of the model's sample command.
"""

import argparse
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eval.cost.macs import step_macs
from eval.metrics.intervals import mean_estimate
from lab.fit.fitting import apart, batches, check_out, distances_table, fit_parser, held_out_distances, open_model
from run import arguments, results
from run.cli import command
from run.families import example_inputs
from run.files import write_json
from run.image_model import ImageModel
from run.provenance import provenance
from run.results import Metric, Result
from run.seeds import format_seeds
from unet_caching.errors import UserError, as_user_error
from unet_caching.files.fitted import bound
from unet_caching.methods.adaptive import AdaptiveCache, AdaptiveRule, relative_change
from unet_caching.methods.block_cache import outside, residual_names
from unet_caching.methods.deepcache import DeepCache
from unet_caching.policy import Policy

TRIES = 5           # thresholds that are run before the nearest is taken


def build_parser(words: list[str]) -> argparse.ArgumentParser:
    """The command line of the model that the config among the words names."""
    parser = fit_parser(__doc__, words, caching=False)
    about = parser.add_argument_group("the rule")
    about.add_argument("--adaptive-branch", type=arguments.whole, default=1,
                       help="0-based skip whose inner level is cached; the first has no block to watch (default: "
                            "%(default)s)")
    about.add_argument("--calls", type=arguments.finite, required=True, help="the budget")
    about.add_argument("--out", type=Path, required=True, help="rule to write, .json")
    return parser


class RowChanges(Policy):
    """How much some values change from call to call: `changes`, by key float32 [rows, calls]. Reuses nothing."""

    def __init__(self, keys: Sequence[Hashable]):
        self.found: dict[Hashable, list[Tensor]] = {key: [] for key in keys}
        self.previous: dict[Hashable, Tensor] = {}

    def __call__(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        value = compute()
        if key in self.found:
            self.found[key].append(relative_change(value, self.previous.get(key, value)).cpu())
            self.previous[key] = value
        return value

    @property
    def changes(self) -> dict[Hashable, np.ndarray]:
        return {key: torch.stack(values, 1).numpy() for key, values in self.found.items()}


def decided(changes: np.ndarray, threshold: float) -> np.ndarray:
    """Which calls the rule makes full: changes [rows, calls] -> bool [rows, calls]. The first is always."""
    full, sums = np.zeros(changes.shape, bool), np.zeros(len(changes))
    full[:, 0] = True
    for step in range(1, changes.shape[1]):
        sums = sums + changes[:, step]
        full[:, step] = sums > threshold
        sums[full[:, step]] = 0
    return full


def threshold_for(changes: np.ndarray, full_calls: float) -> float:
    """The threshold at which the rule makes so many full calls on average. changes: [rows, calls]. By bisection."""
    low, high = 0.0, float(changes.sum(1).max())
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if decided(changes, middle).sum(1).mean() > full_calls else (low, middle)
    return high


def fit(model: ImageModel, branch: int, calls: float, seeds: list[int], batch_size: int) -> AdaptiveRule:
    """The rule of a loaded model's run. calls: the budget, in full calls. Raises UserError where it cannot be had."""
    unet, total = model.run.unet, model.sampler.calls
    whole, cached = step_macs(unet, example_inputs(model.config), branch)
    ratio = cached.hook / whole.hook
    full_calls = (calls - total * ratio) / (1 - ratio)
    if not 1 <= full_calls < total:
        raise UserError(f"{total} calls, one to all of them full, cost {1 + (total - 1) * ratio:.2f} to {total}: "
                        f"--calls {calls:g} is outside")
    watched = outside(residual_names(unet, "all"), unet.num_branches, branch)[0]
    seen: dict[Hashable, list[np.ndarray]] = {watched: [], branch: []}
    for batch, report in batches(seeds, batch_size, "changes", model):
        meter = RowChanges(list(seen))
        model.latents(batch, meter, report=report)
        for key, values in meter.changes.items():
            seen[key].append(values)
    inputs, features = (np.concatenate(seen[key]) for key in (watched, branch))
    factors = [round(float(factor), 6) for factor in (0.0, *(features.mean(0)[1:] / inputs.mean(0)[1:]))]

    def run(threshold: float) -> np.ndarray:
        return full_on(model, AdaptiveCache(branch, watched, factors, threshold, [0]), seeds, batch_size)

    threshold, full = settled(lambda wanted: round(threshold_for(inputs * factors, wanted), 6), run, full_calls)
    counts = full.sum(-1)
    typical = full.reshape(-1, total)[np.abs(counts - counts.mean()).argmin()]
    return AdaptiveRule(bound(model.settings | {"fingerprint": model.run.fingerprint}), branch, watched, factors,
                        threshold, np.flatnonzero(typical).tolist(),
                        {"seeds": format_seeds(seeds), "budget": calls, "cached call": ratio,
                         "full calls": float(counts.mean())})


def settled(threshold_of: Callable[[float], float], run: Callable[[float], np.ndarray], full_calls: float
            ) -> tuple[float, np.ndarray]:
    """The threshold at which real runs make nearest to so many full calls on average, and which calls those are.

    threshold_of: a first guess for a number of full calls. run: what a threshold makes full, bool [..., calls]. Each
    try guesses for as many more as the one before came out short of; the last is within half a percent or `TRIES`th.
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
    """Which calls a rule makes full: bool [1 or the halves of guidance, seeds, calls]."""
    found = []
    for batch, report in batches(seeds, batch_size, "costs", model):
        model.latents(batch, policy, report=report)
        found.append(torch.stack(policy.decided, 1).view(-1, len(batch), model.sampler.calls).cpu().numpy())
        policy.reset()
    return np.concatenate(found, axis=1)


def spent_on(model: ImageModel, rule: AdaptiveRule, seeds: list[int], batch_size: int) -> np.ndarray:
    """What the rule costs each seed, in full calls, as it comes out: float64 [seeds]."""
    share = full_on(model, rule.policy(), seeds, batch_size).mean(0)        # of the rows of a seed, by call
    return (share + rule.measured["cached call"] * (1 - share)).sum(1)


@command
def main() -> None:
    args, started = build_parser(sys.argv[1:]).parse_args(), time.time()
    check_out(args.out, ".json")
    seeds, held_out = apart(args)
    model = open_model(args)
    if not 1 <= args.adaptive_branch < model.run.unet.num_branches:
        raise UserError(f"--adaptive-branch must be from 1 to {model.run.unet.num_branches - 1} for this model, got "
                        f"{args.adaptive_branch}")
    with as_user_error():
        model.check_seeds([*seeds, *held_out])
    model.load()
    rule = fit(model, args.adaptive_branch, args.calls, seeds, args.batch_size)
    trained_s = round(time.time() - started, 3)
    spent = spent_on(model, rule, held_out, args.batch_size)
    rule.measured |= {"held_out_seeds": format_seeds(held_out), "spent": {
        "mean": float(spent.mean()), "least": float(spent.min()), "most": float(spent.max())}}
    write_json(args.out, rule.to_json())

    total, whole = model.sampler.calls, len(rule.typical)
    even = sorted({step * total // whole for step in range(whole)})
    found = held_out_distances(model, {
        "evenly": partial(DeepCache, rule.branch, even),
        "adaptive": rule.policy}, held_out, args.batch_size)
    found["full calls, as it came out"] = Metric.of(mean_estimate(spent))
    report = args.out.with_suffix(".adaptive.json")
    results.write(report, Result(
        "adaptive", model.settings["model"], model.settings, len(held_out), found,
        hashes={"checkpoint": model.settings["checkpoint_sha256"], "rule": rule.sha256},
        provenance=provenance(model.device), details={**rule.measured, "trained_s": trained_s, "evenly": even}
    ).stamped(started))
    print(distances_table(found, held_out))
    print(f"the budget, {args.calls:g} full calls, came out as {spent.mean():.2f} ({spent.min():.2f} to "
          f"{spent.max():.2f})")
    print(f"{args.out} and {report}")


if __name__ == "__main__":
    main()
