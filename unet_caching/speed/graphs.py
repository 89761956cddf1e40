"""Network calls recorded once and replayed, which saves the launch time of hundreds of kernels on a GPU."""

import time
from collections.abc import Callable, Hashable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from unet_caching.nest import Cache, Network, no_cache
from unet_caching.policy import Policy

Record = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], object]]]


class Recording(NamedTuple):
    """A recorded call, with the buffers that a replay reads and writes. kept: those of the policy after the call."""
    inputs: list[Tensor]
    output: Tensor
    replay: Callable[[], object]
    kept: dict[Hashable, Tensor]


class _KeepsNothing(Policy):
    """`no_cache` as a policy, whose calls are all alike."""
    pattern = ()


class RecordedNetwork(nn.Module):
    """A network with a recording of each kind of step: with DeepCache two, full and cached steps.

    Its call is the network's. A replay reads and writes the same memory as the recording. So the tensors that a policy
    keeps between steps are moved into buffers of this object, for all batches. Inputs of other shapes have their own
    recordings. Steps whose policy has no `pattern` are not recorded.

    record: takes a function without arguments -> (its output, a function that runs it again into the same output).
    `seconds`: the time that recording has taken.
    """

    def __init__(self, network: Network, record: Record):
        super().__init__()
        self.network, self.record = network, record
        self.recordings: dict[Hashable, Recording] = {}
        self.kept: dict[Hashable, dict[Hashable, Tensor]] = {}      # the buffers, for each set of input shapes
        self.seconds = 0.0

    def forward(self, *args: Tensor, cache: Cache = no_cache) -> Tensor:
        policy = _KeepsNothing() if cache is no_cache else cast(Policy, cache)
        pattern = getattr(policy, "pattern", None)
        if pattern is None:
            return self.network(*args, cache=cache)
        shapes = tuple((x.shape, x.dtype) for x in args)
        buffers = self.kept.setdefault(shapes, {})
        move_kept(policy, buffers)
        if (pattern, shapes) not in self.recordings:
            start = time.perf_counter()
            self.recordings[pattern, shapes] = self._recording(args, cache, policy, buffers)
            self.seconds += time.perf_counter() - start
        recording = self.recordings[pattern, shapes]
        for static, x in zip(recording.inputs, args, strict=True):
            static.copy_(x)
        recording.replay()
        policy.kept = recording.kept
        return recording.output.clone()

    def _recording(self, args: tuple[Tensor, ...], cache: Cache, policy: Policy, buffers: dict[Hashable, Tensor]
                   ) -> Recording:
        inputs = [x.clone() for x in args]

        def run() -> Tensor:
            output = self.network(*inputs, cache=cache)
            move_kept(policy, buffers)
            return output

        run()       # so that one-time work, like new buffers, is not recorded
        output, replay = self.record(run)
        return Recording(inputs, output, replay, dict(policy.kept))


def move_kept(policy: Policy, buffers: dict[Hashable, Tensor]) -> None:
    """Move the tensors that a policy keeps into buffers, by name and shape. Missing buffers are made."""
    kept = dict(policy.kept)
    for name, value in kept.items():
        place = name, value.shape           # policies have different numbers of forecast weights
        if place not in buffers:
            buffers[place] = value.clone()
        elif value is not buffers[place]:
            buffers[place].copy_(value)
        kept[name] = buffers[place]
    policy.kept = kept


def cuda_recorder() -> Record:
    """A recorder that makes CUDA graphs with one shared pool of memory."""
    pool = torch.cuda.graph_pool_handle()

    def record(run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
        side = torch.cuda.Stream()                      # PyTorch requires a warm-up outside the default stream
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            output = run()
        return output, graph.replay
    return record


def recorded(network: Network, device: torch.device) -> Network:
    """The network with CUDA graphs on a GPU; on other devices the network unchanged, and a line is printed."""
    if device.type != "cuda":
        print(f"CUDA graphs: not here, the device is {device}; going on without", flush=True)
        return network
    return RecordedNetwork(network, cuda_recorder())
