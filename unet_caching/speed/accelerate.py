"""Makes a network ready for a device, and faster on it where that was asked for."""

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
    """Make a network ready for inference: on its device, in its dtype (None: as it is), in the layout that is fastest.

    On a CPU with oneDNN that is one which only its kernels read: the network can no longer be moved or saved
    (speed/packed.py), and the process keeps the memory that it frees from now on (speed/memory.py).
    """
    network.eval().requires_grad_(False)
    network.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in the stubs
    if packable(network):
        network = cast(Placed, pack(network))       # only a layer alone becomes another object
    if torch.device(device).type == "cpu":
        keep_freed_memory()     # not earlier: what is freed while weights are loaded is better returned
    return network


@dataclass(frozen=True)
class Accelerated:
    """A network called as the U-Net is. in_use: which of torch.compile and CUDA graphs it goes through here."""
    network: Network
    in_use: dict[str, bool]

    def report(self) -> list[str]:
        """The lines that tell the user what was made on the way."""
        lines = []
        if isinstance(self.network, RecordedNetwork):
            lines.append(f"CUDA graphs: {len(self.network.recordings)}, recorded in {self.network.seconds:.1f} s")
        if self.in_use["compile"]:
            lines.append(f"torch.compile took {compile_seconds():.0f} s, once for all batches")
        return lines


def accelerated(unet: nn.Module, compile: bool, cuda_graphs: bool, graphs: int) -> Accelerated:
    """Let the network go through what --compile and --cuda-graphs ask for.

    graphs: how many different sets of values the network calls of a run reuse.
    """
    inner: Network = compiled(unet, graphs) if compile else unet
    network = recorded(inner, next(unet.parameters()).device) if cuda_graphs else inner
    return Accelerated(network, {"compile": inner is not unet, "cuda_graphs": network is not inner})
