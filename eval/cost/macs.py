"""Exact multiply-accumulates of a U-Net's steps, counted on the meta device."""

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from caching.deepcache import DeepCache
from caching.nested import Cache, Policy


class Macs(NamedTuple):
    """Multiply-accumulates in both conventions; whole numbers for one step, fractions for an average."""
    hook: float
    fc: float


def _hook_macs(module: nn.Module, x: Tensor, out: Tensor) -> int:
    """MACs of one layer in the released code's convention (github horseee/DeepCache, 1691a3a)."""
    if isinstance(module, nn.Conv2d):
        products = out.numel() * module.in_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
        return products + (out.numel() if module.bias is not None else 0)
    if isinstance(module, nn.Linear):       # the bias once for each layer, however many rows x has
        return x.numel() * module.out_features + (module.out_features if module.bias is not None else 0)
    if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):        # the released counter goes by exact class, which
        return 2 * x.numel() if type(module) in (nn.GroupNorm, nn.LayerNorm) else 0     # leaves GroupNorm32 out
    if next(module.parameters(recurse=False), None) is not None:
        raise TypeError(f"no rule for the MACs of {type(module).__name__}, which has weights of its own")
    return 0                                # activations, resampling, and containers, whose layers count themselves


@contextmanager
def counting() -> Iterator[Callable[[], Macs]]:
    """Count the MACs of what runs inside: yields a function that tells how many it were so far.

    Attention is exact in `fc` on the meta device, where it is two matrix products; fused CPU kernels are not counted.
    Raises TypeError for a layer with weights that the hook convention has no rule for.
    """
    total = 0

    def add(module: nn.Module, args: tuple, out: Tensor) -> None:
        nonlocal total
        total += _hook_macs(module, args[0] if args else None, out)

    handle = register_module_forward_hook(add)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            yield lambda: Macs(total, counter.get_total_flops() // 2)
    finally:
        handle.remove()


def count(forward: Callable[[], object]) -> Macs:
    """MACs of what `forward()` computes, layers called outside any network included (see `counting`)."""
    with counting() as so_far:
        forward()
        return so_far()


def on_meta(unet: nn.Module, inputs: Sequence[Tensor]) -> Callable[[Cache], Tensor]:
    """`cache -> unet(*inputs, cache=cache)` on the meta device, wherever `unet` and `inputs` are."""
    weights = {name: value.to("meta") for name, value in unet.state_dict().items()}
    inputs = tuple(value.to("meta") for value in inputs)

    @torch.no_grad()
    def forward(cache: Cache) -> Tensor:
        return functional_call(unet, weights, inputs, {"cache": cache})
    return forward


def branch_macs(unet: nn.Module, inputs: Sequence[Tensor], branches: Iterable[int]) -> tuple[Macs, dict[int, Macs]]:
    """MACs of a full step, and of DeepCache's cached step at each branch; divide by the batch size of `inputs`.

    inputs: what the U-Net takes before `cache`: (x, t) or (x, t, context); their values do not matter.
    """
    forward, features, cached = on_meta(unet, inputs), {}, {}

    def keep(key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        features[key] = compute()
        return features[key]

    full = count(lambda: forward(keep))
    for branch in branches:
        cache = DeepCache(branch, [0])
        cache.feature = features[branch]        # as a full step leaves it, without running one for each branch
        cached[branch] = count(lambda cache=cache: forward(cache.at(1)))
    return full, cached


def step_macs(unet: nn.Module, inputs: Sequence[Tensor], branch: int) -> tuple[Macs, Macs]:
    """`branch_macs` of one branch: (full, cached)."""
    full, cached = branch_macs(unet, inputs, [branch])
    return full, cached[branch]


def average(full: Macs, cached: Macs, full_steps: Collection[int], num_steps: int) -> Macs:
    """MACs per step of a run: (k F + (T - k) C) / T with k full steps of T."""
    k = len(full_steps)
    return Macs(*((k * f + (num_steps - k) * c) / num_steps for f, c in zip(full, cached, strict=True)))


def run_macs(unet: nn.Module, inputs: Sequence[Tensor], policy: Policy, num_steps: int) -> Macs:
    """MACs per step of a run under any caching policy, by counting each of its steps."""
    forward = on_meta(unet, inputs)
    steps = [count(lambda step=step: forward(policy.at(step))) for step in range(num_steps)]
    return Macs(*(sum(values) / num_steps for values in zip(*steps, strict=True)))


def residual_macs(unet: nn.Module, inputs: Sequence[Tensor]) -> tuple[Macs, dict[str, Macs]]:
    """MACs of a full step, and of each residual in it: what a step saves that reuses the residual."""
    residuals: dict[str, Macs] = {}
    with counting() as so_far:
        def cache(key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
            before, value = so_far(), compute()
            if isinstance(key, str):
                residuals[key] = Macs(*(b - a for a, b in zip(before, so_far(), strict=True)))
            return value

        on_meta(unet, inputs)(cache)
        return so_far(), residuals


def schedule_macs(full: Macs, residuals: Mapping[str, Macs], schedule: Mapping[str, Collection[int]],
                  num_steps: int) -> Macs:
    """MACs per step of a run in which each residual of `schedule` is computed on its own steps only.

    full, residuals: of `residual_macs`. No residual of the schedule may lie inside another one.
    """
    def mean(convention: str) -> float:
        saved = sum((num_steps - len(steps)) * getattr(residuals[name], convention)
                    for name, steps in schedule.items())
        return getattr(full, convention) - saved / num_steps
    return Macs(mean("hook"), mean("fc"))


def giga(macs: float) -> float:
    return macs / 1e9
