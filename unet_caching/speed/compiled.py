"""Networks that go through torch.compile."""

import torch
from torch import Tensor, nn

from unet_caching.nest import Cache, Network, no_cache
from unet_caching.speed.packed import waiting


def compiled(network: nn.Module, graphs: int) -> Network:
    """The network through torch.compile, with room for that many graphs: beyond its own limit it falls back or fails.

    One more is for a first step, which finds no values yet. Where there is no compiler the network is returned as it
    is, and a line says so.
    """
    if missing := missing_compiler(next(network.parameters()).device):
        print(f"torch.compile: not here, {missing}; going on without", flush=True)
        return network
    limits = torch._dynamo.config           # which count the graphs of all networks of a class together
    limits.recompile_limit += graphs + 1
    limits.accumulated_recompile_limit += graphs + 1
    print(f"torch.compile: {graphs} graph{'s' if graphs > 1 else ''}, one for each set of reused values", flush=True)
    return PackedFirst(network) if waiting(network) else torch.compile(network, fullgraph=True)


class PackedFirst(nn.Module):
    """A compiled network that runs once as it is before, for its convolutions to be packed (speed/packed.py)."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.compiled = network, torch.compile(network, fullgraph=True)

    def forward(self, *args: Tensor, cache: Cache = no_cache) -> Tensor:
        if waiting(self.network):
            self.network(*args)
        return self.compiled(*args, cache=cache)


def missing_compiler(device: torch.device) -> str | None:
    """Why torch.compile cannot make code for a device here; None where it can."""
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler  # here: they take seconds
        from torch._inductor.exc import InvalidCxxCompiler
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return "there is no C++ compiler (g++ or clang++; $CXX names another)"
    elif device.type == "cuda" and not torch.utils._triton.has_triton():
        return "the package triton is missing, or too new for this GPU"
    return None


def compile_seconds() -> float:
    """Seconds that compiling has taken in this process."""
    return torch._dynamo.utils.calculate_time_spent().get("entire_frame_compile", 0.0)
