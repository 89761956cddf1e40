"""Exact multiply-accumulates of a U-Net's steps, counted on the meta device."""

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from unet_caching.methods.deepcache import DeepCache
from unet_caching.nest import Cache
from unet_caching.policy import Policy
from unet_caching.trace import Asked, metered, reused


class Macs(NamedTuple):
    """Multiply-accumulates in both conventions; whole numbers for one step, fractions for an average."""
    hook: float
    fc: float


def _hook_macs(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> int:
    """The MACs of one layer in the released code's convention (github horseee/DeepCache, 1691a3a)."""
    if isinstance(module, nn.Conv2d):
        products = out.numel() * module.in_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
        return products + (out.numel() if module.bias is not None else 0)
    if isinstance(module, nn.Linear):       # the bias once for each layer, however many rows the input has
        return inputs[0].numel() * module.out_features + (module.out_features if module.bias is not None else 0)
    if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):        # the released counter goes by exact class, which
        return 2 * inputs[0].numel() if type(module) in (nn.GroupNorm, nn.LayerNorm) else 0     # leaves GroupNorm32 out
    if next(module.parameters(recurse=False), None) is not None:
        raise TypeError(f"no rule for the MACs of {type(module).__name__}, which has weights")
    return 0                                # activations, resampling, and containers, whose layers count themselves


@contextmanager
def counting() -> Iterator[Callable[[], Macs]]:
    """Count the MACs of the block's computations: yields a function that returns the count so far.

    Attention is exact in `fc` on the meta device, where it is two matrix products; fused CPU kernels are not counted.
    Raises TypeError for a layer with weights if the hook convention has no rule for it.
    """
    total = 0

    def add(module: nn.Module, args: tuple, out: Tensor) -> None:
        nonlocal total
        total += _hook_macs(module, args, out)

    handle = register_module_forward_hook(add)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            yield lambda: Macs(total, counter.get_total_flops() // 2)
    finally:
        handle.remove()


def count(forward: Callable[[], object]) -> Macs:
    """The MACs of what `forward()` computes, layers called outside any network included (see `counting`)."""
    with counting() as so_far:
        forward()
        return so_far()


def on_meta(unet: nn.Module, inputs: Sequence[Tensor]) -> Callable[[Cache], Tensor]:
    """A function `cache -> unet(*inputs, cache=cache)` on the meta device, wherever `unet` and `inputs` are."""
    weights = {name: value.to("meta") for name, value in unet.state_dict().items()}
    inputs = tuple(value.to("meta") for value in inputs)

    @torch.no_grad()
    def forward(cache: Cache) -> Tensor:
        return functional_call(unet, weights, inputs, {"cache": cache})
    return forward


class Costs(NamedTuple):
    """The cost of a full network call and of its parts."""
    full: Macs
    values: dict[Hashable, Macs]        # by cache key: what a call saves by reusing the value
    asked: list[Asked]                  # see `unet_caching.trace`

    def calls(self, policy: Policy | None, num_calls: int) -> list[Macs]:
        """The MACs of every network call of a run under a caching policy, which is on the meta device.

        A call costs as much as a full one, minus the values that it reuses, plus what the policy itself computes.
        """
        if policy is None:
            return [self.full] * num_calls
        macs: list[Macs] = []
        known: dict[Hashable, Macs] = {}        # by the policy's pattern: many calls of a run share one
        with counting() as so_far:
            before = so_far()
            for keys in reused(self.asked, policy, num_calls):
                pattern = policy.pattern
                if pattern is None or pattern not in known:
                    now, saved = so_far(), [self.values[key] for key in keys]
                    known[pattern] = Macs(*(full - sum(parts) + n - b for full, *parts, n, b in
                                            zip(self.full, *saved, now, before, strict=True)))
                    before = now
                macs.append(known[pattern])
        return macs

    def cached(self, branch: int) -> Macs:
        """The MACs of DeepCache's cached step."""
        return self.calls(DeepCache(branch, [0]), 2)[1]


def costs(unet: nn.Module, inputs: Sequence[Tensor]) -> Costs:
    """Count a full call, on the meta device.

    inputs: the U-Net's arguments before `cache`, (x, t) or (x, t, context); their values do not matter. The MACs are
    those of the whole batch.
    """
    with counting() as so_far:
        asked, counts = metered(on_meta(unet, inputs), so_far)
        values = {key: Macs(*(b - a for a, b in zip(before, after, strict=True)))
                  for key, (before, after) in counts.items()}
        return Costs(so_far(), values, asked)


def branch_macs(unet: nn.Module, inputs: Sequence[Tensor], branches: Iterable[int]) -> tuple[Macs, dict[int, Macs]]:
    """The MACs of a full step, and of DeepCache's cached step at each branch. inputs: as in `costs`."""
    counted = costs(unet, inputs)
    return counted.full, {branch: counted.cached(branch) for branch in branches}


def mean(calls: Sequence[Macs]) -> Macs:
    """The average of several calls."""
    return Macs(*(sum(values) / len(calls) for values in zip(*calls, strict=True)))


def schedule_macs(full: Macs, residuals: Mapping[str, Macs], schedule: Mapping[str, Collection[int]],
                  num_steps: int) -> Macs:
    """The MACs per step of a run in which each residual of `schedule` is computed only on its own steps.

    full: the MACs of a full step. residuals: the MACs of each residual. No residual may lie inside another one.
    """
    def mean(convention: str) -> float:
        saved = sum((num_steps - len(steps)) * getattr(residuals[name], convention)
                    for name, steps in schedule.items())
        return getattr(full, convention) - saved / num_steps
    return Macs(mean("hook"), mean("fc"))


def giga(macs: float) -> float:
    """The MACs in units of 10**9."""
    return macs / 1e9
