"""How much a run saves: the exact multiply-accumulates of its calls, with attention. They are counted in PyTorch's
dispatcher, in one call of each kind, without running anything else."""

from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

FULL = "full"           # the kind of a call that computes everything


class Meter:
    """Counts the network calls of a run. Calls of one kind in one place compute the same."""

    def __init__(self, unet: nn.Module):
        compiled = any("_orig_mod" in module._modules or vars(module).get("_compiled_call_impl") is not None
                       for module in unet.modules())
        self.fault = "the U-Net is compiled" if compiled else ""        # why calls are not counted
        self.macs: dict[Hashable, int] = {}
        self.calls: list[tuple[tuple[int, torch.Size], Hashable]] = []

    def call(self, place: tuple[int, torch.Size], kind: Hashable) -> AbstractContextManager:
        """The context of a network call. place: its number in its step, and its shape. kind: None if unknown."""
        key = place, len(self.calls) if kind is None else kind
        self.calls.append(key)
        return nullcontext() if self.fault or key in self.macs else Counter(self, key)

    def report(self, settings: str) -> str:
        """One line about what the run did and saved."""
        begin = f"caching in {len(self.calls)} network calls"
        if self.fault:
            return f"{begin}: {settings}; multiply-accumulates were not counted ({self.fault})"
        full, each = [self.macs[place, FULL] for place, _ in self.calls], [self.macs[key] for key in self.calls]
        shapes = [shape for (_, shape), _ in self.calls]
        row, rows = "video" if len(shapes[0]) > 4 else "image", 1e9 * sum(shape[0] for shape in shapes)
        return (f"{begin}, {sum(map(int.__eq__, full, each))} of them full: {settings}; {sum(each) / rows:.1f} of "
                f"{sum(full) / rows:.1f} GMACs per call and {row}: {sum(full) / sum(each):.2f} times as fast by them")


class Counter(TorchDispatchMode):
    """Counts the multiply-accumulates of matrix products, convolutions and attention."""

    def __init__(self, meter: Meter, key: Hashable):
        super().__init__()
        self.meter, self.key = meter, key
        meter.macs[key] = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name, known = kwargs or {}, function._schema.name, flop_registry.get(function._overloadpacket)
        attention = name.startswith("aten::_scaled_dot_product")
        if known is None and not attention:
            with self:                      # in inference mode composite operations arrive undivided
                out = function.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = function(*args, **kwargs)
        if known is not None:
            self.meter.macs[self.key] += known(*args, **kwargs, out_val=out) // 2
        elif attention:
            self.meter.macs[self.key] += sdpa_flop_count(*(value.shape for value in args[:3])) // 2
        elif not name.startswith(("aten::", "prim")) or any(word in name for word in ("mm", "conv", "linear")):
            self.meter.fault = f"{name} is not known"
        return out
