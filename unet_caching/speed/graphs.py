"""Network calls recorded once and replayed: on a GPU that saves the time of launching their hundreds of kernels."""

import time
from collections.abc import Callable, Hashable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from unet_caching.nest import Cache, Network, no_cache
from unet_caching.policy import Policy

Record = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], object]]]


class Recording(NamedTuple):
    """What a replay reads and writes. kept: the buffers of all that the cache keeps after it."""
    inputs: list[Tensor]
    output: Tensor
    replay: Callable[[], object]
    kept: dict[Hashable, Tensor]


class _KeepsNothing(Policy):
    """`no_cache` as a policy: all its calls do the same."""
    pattern = ()


class RecordedNetwork(nn.Module):
    """A network of which each kind of step is recorded when it first comes: with DeepCache two, full and cached steps.

    Called as the network is. What a cache keeps between steps lies in buffers of this object, the same for all batches,
    since a replay reads and writes where the recording did. Inputs of other shapes are recorded on their own. Steps
    of which it is not known what they do (their cache has no `pattern`) run as ever.

    record: takes a function without arguments -> (its output, a function that runs it again into the same output).
    `seconds`: what recording has taken.
    """

    def __init__(self, network: Network, record: Record):
        super().__init__()
        self.network, self.record = network, record
        self.recordings: dict[Hashable, Recording] = {}
        self.kept: dict[Hashable, dict[Hashable, Tensor]] = {}      # for each set of input shapes, the buffers
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

        run()       # what comes up once, new buffers among it, is not part of the recording
        output, replay = self.record(run)
        return Recording(inputs, output, replay, dict(policy.kept))


def move_kept(policy: Policy, buffers: dict[Hashable, Tensor]) -> None:
    """Move what a policy keeps into buffers, by name and shape, which are made where there are none yet."""
    kept = dict(policy.kept)
    for name, value in kept.items():
        place = name, value.shape           # policies differ in how many weights their forecasts have
        if place not in buffers:
            buffers[place] = value.clone()
        elif value is not buffers[place]:
            buffers[place].copy_(value)
        kept[name] = buffers[place]
    policy.kept = kept


def cuda_recorder() -> Record:
    """Make recordings that are CUDA graphs and share one pool of memory."""
    pool = torch.cuda.graph_pool_handle()

    def record(run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
        side = torch.cuda.Stream()                      # as PyTorch asks: some warm-up outside the default stream
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
    """The network with CUDA graphs on a GPU; elsewhere the network as it is, and a line that says so."""
    if device.type != "cuda":
        print(f"CUDA graphs: not here, the device is {device}; going on without", flush=True)
        return network
    return RecordedNetwork(network, cuda_recorder())
