"""Networks with torch.compile."""

import torch
from torch import Tensor, nn

from unet_caching.nest import Cache, Network, no_cache
from unet_caching.speed.packed import waiting


def compiled(network: nn.Module, graphs: int) -> Network:
    """The compiled network. This raises torch.compile's limit on graphs, beyond which it falls back or fails.

    The limit grows by `graphs`, and by one for the first step, which has no values to reuse. Without a compiler the
    network is returned unchanged, and a line is printed.
    """
    if missing := missing_compiler(next(network.parameters()).device):
        print(f"torch.compile: not here, {missing}; going on without", flush=True)
        return network
    limits = torch._dynamo.config           # they count the graphs of all networks of a class together
    limits.recompile_limit += graphs + 1
    limits.accumulated_recompile_limit += graphs + 1
    print(f"torch.compile: {graphs} graph{'s' if graphs > 1 else ''}, one for each set of reused values", flush=True)
    return PackedFirst(network) if waiting(network) else torch.compile(network, fullgraph=True)


class PackedFirst(nn.Module):
    """A compiled network that first runs once uncompiled, which packs its convolutions (speed/packed.py)."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.compiled = network, torch.compile(network, fullgraph=True)

    def forward(self, *args: Tensor, cache: Cache = no_cache) -> Tensor:
        if waiting(self.network):
            self.network(*args)
        return self.compiled(*args, cache=cache)


def missing_compiler(device: torch.device) -> str | None:
    """Why torch.compile cannot make code for a device; None if it can."""
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler  # here, because they take seconds to import
        from torch._inductor.exc import InvalidCxxCompiler
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return "there is no C++ compiler (g++ or clang++; $CXX names another)"
    elif device.type == "cuda" and not torch.utils._triton.has_triton():
        return "the package triton is missing, or too new for this GPU"
    return None


def compile_seconds() -> float:
    """The seconds that compiling has taken in this process."""
    return torch._dynamo.utils.calculate_time_spent().get("entire_frame_compile", 0.0)
