"""How much a run saves: exact multiply-accumulates of the very U-Net that it runs, attention's included.

They are counted on a copy without numbers, on the meta device: with its adapters, for the shapes of this run. The hooks
by which eval.cost.macs counts are of all modules of the process; here other threads may be at work.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from unet_caching.nest import Cache
from unet_caching.pipelines.forward import argument_names, cached_forward
from unet_caching.pipelines.parts import Caching
from unet_caching.policy import Policy
from unet_caching.trace import metered, reused


class _Counter(TorchDispatchMode):
    """Counts the operations of matrix products and convolutions in this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **kwargs or {})
        count = flop_registry.get(function._overloadpacket)
        if count is not None:
            self.macs += count(*args, **kwargs or {}, out_val=out) // 2
        return out


def run_macs(unet: nn.Module, args: tuple, kwargs: dict, policy: Policy | None, asked: frozenset[str],
             calls: int) -> tuple[int, list[int]]:
    """The multiply-accumulates of a call that computes everything, and of each call of a run; for the whole batch.

    args, kwargs: of one network call. policy: for the meta device. asked: the residuals that it may keep.
    Raises whatever a copy of the U-Net on the meta device raises.
    """
    numbers = {id(value): _empty(value) for value in (*unet.parameters(), *unet.buffers())}
    on_meta = copy.deepcopy(unet, numbers)
    args, kwargs = tree_map_only(Tensor, lambda value: value.to("meta"), (args, kwargs))
    with torch.no_grad(), _Counter() as counter:
        def forward(cache: Cache) -> object:
            return cached_forward(on_meta, argument_names(unet), Caching(cache, asked), *args, **kwargs)

        asked_for, counts = metered(forward, lambda: counter.macs)
        full = counter.macs
    if policy is None:
        return full, [full] * calls
    values = {key: after - before for key, (before, after) in counts.items()}
    return full, [full - sum(values[key] for key in keys) for keys in reused(asked_for, policy, calls)]


def _empty(value: Tensor) -> Tensor:
    empty = torch.empty_like(value, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(value, nn.Parameter) else empty
