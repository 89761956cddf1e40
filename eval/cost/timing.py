"""The wall-clock time of full and cached steps, all variants taking turns."""

import gc
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from eval.cost.macs import average, branch_macs, residual_macs, schedule_macs
from unet_caching.errors import UserError
from unet_caching.files.block_schedule import BlockSchedule
from unet_caching.methods.block_cache import BlockCache
from unet_caching.methods.deepcache import DeepCache
from unet_caching.nest import NestedUNet, no_cache
from unet_caching.policy import Policy
from unet_caching.schedules import uniform
from unet_caching.speed.packed import pack, packable

Name = TypeVar("Name", bound=Hashable)
PRODUCT = 2048, 1280, 1280      # rows, inner, columns: sizes as in Stable Diffusion's inner levels


class Timing(NamedTuple):
    """Seconds of one step: one value per round, in the order of the rounds, which all variants share."""
    seconds: list[float]
    peak_bytes: int | None = None       # of accelerator memory while it ran; None on a CPU

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    def ratio(self, other: "Timing") -> float:
        """The median over the rounds of this step's time as a fraction of the other's."""
        return round(float(np.median(np.divide(self.seconds, other.seconds))), 6)

    def to_json(self) -> dict:
        low, median, high = np.percentile(self.seconds, [25, 50, 75]).round(8).tolist()
        return {"median": median, "quartiles": [low, high], "min": min(self.seconds), "rounds": self.seconds,
                "peak_bytes": self.peak_bytes}


@torch.inference_mode()
def interleave(variants: Mapping[Name, Callable[[], object]], device: torch.device | str, repeats: int = 20,
               warmup: int = 2) -> dict[Name, Timing]:
    """Time functions that take turns: each runs once per round, for `warmup` untimed and `repeats` timed rounds.

    device: what to wait for before the clock is read. Raises ValueError for fewer than one repeat or warm-up round.
    """
    if repeats < 1 or warmup < 1:
        raise ValueError(f"at least one timed and one warm-up round are needed, got {repeats} and {warmup}")
    device = torch.device(device)
    synchronize = torch.get_device_module(device).synchronize
    seconds: dict[Name, list[float]] = {name: [] for name in variants}
    peaks: dict[Name, int | None] = dict.fromkeys(variants)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(-warmup, repeats):
            for name, run in variants.items():
                if device.type == "cuda" and turn < 0:
                    torch.cuda.reset_peak_memory_stats(device)
                synchronize()
                start = time.perf_counter()
                run()
                synchronize()
                elapsed = time.perf_counter() - start
                if turn >= 0:
                    seconds[name].append(round(elapsed, 8))     # files keep no digits that mean nothing
                elif device.type == "cuda":
                    peaks[name] = torch.cuda.max_memory_allocated(device)
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(seconds[name], peaks[name]) for name in variants}


def packed_product(device: torch.device | str, dtype: torch.dtype) -> Callable[[], Tensor]:
    """One product of matrices of PRODUCT's sizes, as fast as is known here: with packed weights where the sample
    commands pack them. Its speed is what a network's is measured by: the peak that a processor reaches."""
    rows, inner, columns = PRODUCT
    layer: nn.Module = nn.Linear(inner, columns, bias=False).to(device, dtype)
    if packable(layer):
        layer = pack(layer)
    x = torch.randn(rows, inner).to(device, dtype)
    return lambda: layer(x)


def gflops(macs: float, seconds: float) -> float:
    """10^9 floating-point operations per second, of which a multiply-accumulate is two."""
    return 2e-9 * macs / seconds


def time_steps(unet: nn.Module, inputs: Sequence[Tensor], policies: Mapping[str, Policy], repeats: int = 20,
               warmup: int = 2) -> dict[str, Timing]:
    """Time a full step of a U-Net ("full") and the cached step of each policy (under its own name).

    inputs: what the U-Net takes before `cache`: (x, t) or (x, t, context), on its device.
    policies: step 0 must be a full and step 1 a cached step of each, as in DeepCache(branch, [0]).
    """
    def cached(policy: Policy) -> Callable[[], Tensor]:
        unet(*inputs, cache=policy.at(0))
        return lambda: unet(*inputs, cache=policy.at(1))

    with torch.inference_mode():
        variants = {name: cached(policy) for name, policy in policies.items()}
    return interleave({"full": lambda: unet(*inputs, cache=no_cache), **variants}, inputs[0].device, repeats, warmup)


def measure(unet: NestedUNet, inputs: Sequence[Tensor], branches: Sequence[int], intervals: Sequence[int],
            num_steps: int, repeats: int = 20, warmup: int = 2, rows_per_image: int = 1,
            plain: nn.Module | None = None, orders: Sequence[int] = (0,)) -> dict[str, Any]:
    """Time DeepCache at `branches`, with the MACs (batch 1) beside, and derive whole runs with uniform schedules.

    orders: of the forecast, each at every branch; 0 is reuse. They have the same MACs, and one more value to keep for
    each order (feature_bytes).
    plain: the U-Net to count the MACs of, where the weights of the other are packed.
    rows_per_image: rows of the inputs that make one image; 2 with guidance, whose two halves share a batch.
    Returns JSON-compatible {full, branches: [per branch and order], runs: [each of these at each interval]}; images/s
    are of the network alone. Raises UserError for a branch or an interval that does not exist, or no repeats.
    """
    images = len(inputs[0]) / rows_per_image
    for branch in branches:
        if not 0 <= branch < unet.num_branches:
            raise UserError(f"--branch must be from 0 to {unet.num_branches - 1} for this model, got {branch}")
    try:
        schedules = {interval: uniform(num_steps, interval) for interval in intervals}
        # Step 0 is full, step 1 cached; the others are there for the order.
        caches = {(branch, order): DeepCache(branch, [0, *range(2, 2 + order)], order)
                  for branch in branches for order in orders}
        timings = time_steps(unet, inputs, {str(key): cache for key, cache in caches.items()}, repeats, warmup)
    except ValueError as error:
        raise UserError(str(error)) from None
    full_macs, cached_macs = branch_macs(unet if plain is None else plain, [value[:1] for value in inputs], branches)
    full = timings["full"]
    result: dict[str, Any] = {
        "full": {**full.to_json(), "macs": full_macs.hook, "macs_fc": full_macs.fc}, "branches": [], "runs": []}
    for (branch, order), cache in caches.items():
        cached, macs = timings[str((branch, order))], cached_macs[branch]
        result["branches"].append({
            "branch": branch, "forecast": order, **cached.to_json(), "ratio": cached.ratio(full),
            "macs": macs.hook, "macs_fc": macs.fc,
            "macs_ratio": macs.hook / full_macs.hook, "macs_fc_ratio": macs.fc / full_macs.fc,
            "feature_bytes": sum(value.nbytes for value in cache.kept.values())})
    result["full"]["images_per_second"] = images / (num_steps * full.median)
    for branch, order in caches:
        for interval, full_steps in schedules.items():
            k, cached = len(full_steps), timings[str((branch, order))]
            macs = average(full_macs, cached_macs[branch], full_steps, num_steps)
            result["runs"].append({
                "branch": branch, "forecast": order, "interval": interval, "steps": num_steps, "full_steps": k,
                "images_per_second": images / (k * full.median + (num_steps - k) * cached.median),
                "speedup": num_steps / (k + (num_steps - k) * cached.ratio(full)),
                "macs": macs.hook, "macs_fc": macs.fc, "macs_speedup": full_macs.hook / macs.hook})
    return result


class ReusedSet(NamedTuple):
    """Residuals that some steps of a schedule reuse, and how many steps those are."""
    names: frozenset[str]
    steps: int

    def policy(self, adjusted: bool, unet: nn.Module, inputs: Sequence[Tensor]) -> BlockCache:
        """Computes them on step 0 and reuses them on step 1, multiplied and shifted (by nothing) where `adjusted`."""
        policy = BlockCache({name: [0] for name in self.names})
        if adjusted:
            unet(*inputs, cache=policy.at(0))
            channels = {str(name): value.shape[1 if value.ndim == 4 else -1] for name, value in policy.values.items()}
            dtype, device = inputs[0].dtype, inputs[0].device
            policy.adjust = [{}, {name: (torch.ones(width, dtype=dtype, device=device),
                                         torch.zeros(width, dtype=dtype, device=device))
                                  for name, width in channels.items()}]
        return policy


def reused_sets(schedule: BlockSchedule) -> list[ReusedSet]:
    """The different sets of residuals that the steps of a schedule reuse, the commonest first."""
    found = Counter(frozenset(name for name, steps in schedule.blocks.items() if step not in steps)
                    for step in range(schedule.calls))
    return [ReusedSet(*pair) for pair in found.most_common()]


def measure_schedules(unet: nn.Module, inputs: Sequence[Tensor], schedules: Mapping[str, BlockSchedule],
                      repeats: int = 20, warmup: int = 2, rows_per_image: int = 1, plain: nn.Module | None = None
                      ) -> dict:
    """Time Block Caching: a step of each set of residuals that `schedules` reuse, without and with scale-shift.

    schedules: by name. plain: as `measure` takes it. Returns JSON-compatible {full, schedules: [per schedule and
    with_scale_shift]}, with the MACs (batch 1) of the whole runs beside their times; images/s are of the network
    alone. Raises UserError for no repeats.
    """
    sets = {name: reused_sets(schedule) for name, schedule in schedules.items()}
    distinct = list(dict.fromkeys(one.names for found in sets.values() for one in found if one.names))
    with torch.inference_mode():
        policies = {f"{i}{'+' * adjusted}": ReusedSet(names, 0).policy(adjusted, unet, inputs)
                    for i, names in enumerate(distinct) for adjusted in (False, True)}
    try:
        timings = time_steps(unet, inputs, policies, repeats, warmup)
    except ValueError as error:
        raise UserError(str(error)) from None
    full = timings["full"]
    macs_full, residuals = residual_macs(unet if plain is None else plain, [value[:1] for value in inputs])
    images = len(inputs[0]) / rows_per_image
    result: dict[str, Any] = {
        "full": {**full.to_json(), "macs": macs_full.hook, "macs_fc": macs_full.fc}, "schedules": []}
    for name, schedule in schedules.items():
        macs = schedule_macs(macs_full, residuals, schedule.blocks, schedule.calls)
        for adjusted in (False, True):
            ratios, seconds = [], 0.0
            for one in sets[name]:
                timing = timings[f"{distinct.index(one.names)}{'+' * adjusted}"] if one.names else full
                ratios.append({"reused": len(one.names), "steps": one.steps, "ratio": timing.ratio(full)})
                seconds += one.steps * timing.median
            result["schedules"].append({
                "name": name, "sha256": schedule.sha256, "sampler": schedule.run["sampler"],
                "steps": schedule.run["steps"], "calls": schedule.calls, "scale_shift": adjusted, "sets": ratios,
                "seconds": seconds, "images_per_second": images / seconds,
                "speedup": schedule.calls / sum(one["steps"] * one["ratio"] for one in ratios),
                "macs": macs.hook, "macs_fc": macs.fc, "macs_speedup": macs_full.hook / macs.hook,
                "macs_fc_speedup": macs_full.fc / macs.fc})
    return result
