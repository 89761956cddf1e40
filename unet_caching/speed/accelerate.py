"""Make a network ready for a device, and faster on it with torch.compile and CUDA graphs."""

from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import nn

from unet_caching.nest import Network
from unet_caching.speed.compiled import compile_seconds, compiled
from unet_caching.speed.graphs import RecordedNetwork, recorded
from unet_caching.speed.memory import keep_freed_memory
from unet_caching.speed.packed import pack, packable

Placed = TypeVar("Placed", bound=nn.Module)


def place(network: Placed, device: torch.device | str, dtype: torch.dtype | None = None) -> Placed:
    """Make a network ready for inference: on its device, in its dtype (None: unchanged), in the fastest layout.

    On a CPU with oneDNN only oneDNN's kernels can read this layout, so the network can no longer be moved or saved
    (speed/packed.py). On a CPU the process also keeps the memory that it frees from now on (speed/memory.py).
    """
    network.eval().requires_grad_(False)
    network.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in the stubs
    if packable(network):
        network = cast(Placed, pack(network))       # another object only if the network is a single layer
    if torch.device(device).type == "cpu":
        keep_freed_memory()     # not earlier, so that the memory freed while loading weights is returned
    return network


@dataclass(frozen=True)
class Accelerated:
    """A network with the call of the U-Net. in_use: whether it uses torch.compile and CUDA graphs."""
    network: Network
    in_use: dict[str, bool]

    def report(self) -> list[str]:
        """Lines for the user about graphs and compiling."""
        lines = []
        if isinstance(self.network, RecordedNetwork):
            lines.append(f"CUDA graphs: {len(self.network.recordings)}, recorded in {self.network.seconds:.1f} s")
        if self.in_use["compile"]:
            lines.append(f"torch.compile took {compile_seconds():.0f} s, once for all batches")
        return lines


def accelerated(unet: nn.Module, compile: bool, cuda_graphs: bool, graphs: int) -> Accelerated:
    """The network with torch.compile and CUDA graphs, as --compile and --cuda-graphs say.

    graphs: the number of different sets of values that the network calls of a run reuse.
    """
    inner: Network = compiled(unet, graphs) if compile else unet
    network = recorded(inner, next(unet.parameters()).device) if cuda_graphs else inner
    return Accelerated(network, {"compile": inner is not unet, "cuda_graphs": network is not inner})
