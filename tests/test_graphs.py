"""Recorded network calls, replayed by PyTorch's tracer, to which Python is as invisible as to a CUDA graph; and how
many graphs torch.compile makes. Whatever a cache keeps: features, residuals, their forecasts and adjustments."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ddpm.unet import UNet
from unet_caching.forecast import Forecast
from unet_caching.keep import Keep, joined
from unet_caching.methods.block_caching import outside, residual_names
from unet_caching.methods.deepcache import DeepCache, ZeroedCache
from unet_caching.methods.plan import Call, PlanCache
from unet_caching.speed.accelerate import accelerated
from unet_caching.speed.graphs import RecordedNetwork, cuda_recorder

CALLS = 7
FULL = [0, 1, 3, 5]
DAMPING = [0.1 * step for step in range(CALLS)]
TWO_DEPTHS = [Call(), Call(), Call(1, (1.0,)), Call(0), Call(), Call(0, (0.5, 0.2)), Call(1)]


def record(run):
    """Like a CUDA graph: fixed tensors in, the same tensor out, no Python."""
    traced = make_fx(run)()
    output = traced().clone()
    return output, lambda: output.copy_(traced())


def policies(unet: UNet) -> dict:
    names = residual_names(unet)
    blocks = {name: {0, 2, 3} if i % 2 else {0, 3} for i, name in enumerate(names)}
    around = outside(residual_names(unet, "all"), unet.num_branches, 1)[:2]
    biases = {name: torch.ones_like(unet.get_parameter(f"{name}.norm.bias" if name in names else f"{name}.conv2.bias"))
              for name in (*names, *around)}
    adjust = [{} if step == 4 else {name: (2 * one, one / 2) for name, one in biases.items()} for step in range(CALLS)]
    return {"none": lambda: None, "deepcache": lambda: DeepCache(1, [0, 3]), "zeroed": lambda: ZeroedCache(1, [0, 3]),
            "blocks": lambda: Keep(blocks), "adjusted": lambda: Keep(blocks, adjust=adjust),
            "order 2": lambda: DeepCache(1, FULL, 2, DAMPING),
            "forecast blocks": lambda: Keep(blocks, Forecast(1)), "plan": lambda: PlanCache(TWO_DEPTHS),
            "together": lambda: joined(DeepCache(1, FULL, 1), Keep({name: {0, 1, 2} for name in around}, Forecast(1),
                                                                   adjust))}


def inputs(step: int, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    noise = torch.Generator().manual_seed(step)
    return torch.randn(rows, 3, 8, 8, generator=noise), torch.full((rows,), 500 - step)


@pytest.mark.parametrize("name", ["none", "deepcache", "zeroed", "adjusted", "order 2", "forecast blocks", "plan",
                                  "together"])
@torch.no_grad()
def test_replays_are_the_network(unet, name):
    """In fixed buffers, in which older values move up by one; a kind of call is recorded once for each shape."""
    make, patterns = policies(unet)[name], set()
    fast = RecordedNetwork(unet, record)
    for rows in (2, 2, 1) if name == "deepcache" else (2, 2):
        ours, expected = make(), make()
        for step in range(CALLS):
            caches = [{} if policy is None else {"cache": policy.at(step)} for policy in (ours, expected)]
            patterns.add((rows, None if expected is None else expected.pattern))
            assert torch.allclose(fast(*inputs(step, rows), **caches[0]), unet(*inputs(step, rows), **caches[1]),
                                  atol=1e-5)
        if ours is not None:
            assert ours.kept.keys() == expected.kept.keys()
            assert all(torch.allclose(ours.kept[key], value, atol=1e-5) for key, value in expected.kept.items())
    assert len(fast.recordings) == len(patterns)


@pytest.mark.parametrize(("name", "graphs"), [("deepcache", 2), ("order 2", 2), ("plan", 3),
                                              ("forecast blocks", 3)])
@torch.no_grad()
def test_compiles_to_a_graph_for_each_kind_of_call(unet, name, graphs):
    from torch._dynamo.testing import CompileCounter
    torch.compiler.reset()
    counter, make = CompileCounter(), policies(unet)[name]
    compiled = torch.compile(unet, fullgraph=True, backend=counter)
    for _ in range(2):
        ours, expected = make(), make()
        for step in range(CALLS):
            assert torch.allclose(compiled(*inputs(step), ours.at(step)), unet(*inputs(step), expected.at(step)),
                                  atol=1e-5)
    assert counter.frame_count == graphs


@torch.no_grad()
def test_results_stay_when_the_next_come_and_values_from_elsewhere_are_used(unet):
    fast = RecordedNetwork(unet, record)
    first = fast(*inputs(0))
    copy = first.clone()
    assert not torch.equal(fast(*inputs(1)), first) and torch.equal(first, copy)
    for _ in range(2):
        caches = [DeepCache(0, [0]) for _ in range(2)]
        for cache in caches:
            unet(*inputs(0), cache=cache.at(0))            # a full step that is not recorded
        expected = unet(*inputs(1), cache=caches[0].at(1))
        assert torch.allclose(fast(*inputs(1), cache=caches[1].at(1)), expected, atol=1e-5)


class Last:
    """Reuses the last output of the middle level on every other step; says nothing of its pattern."""
    pattern = None

    def at(self, step: int) -> "Last":
        self.step = step
        return self

    def __call__(self, key, compute):
        if key == 3 and self.step % 2 == 0:
            self.value = compute()
        return self.value if key == 3 else compute()


@torch.no_grad()
def test_steps_of_an_unknown_kind_are_not_recorded(unet):
    fast, ours, expected = RecordedNetwork(unet, record), Last(), Last()
    for step in range(2):
        assert torch.equal(fast(*inputs(step), cache=ours.at(step)), unet(*inputs(step), cache=expected.at(step)))
    assert not fast.recordings


def test_without_a_gpu_goes_on(unet, capsys):
    found = accelerated(unet, compile=False, cuda_graphs=True, graphs=2)
    assert found.network is unet and found.in_use == {"compile": False, "cuda_graphs": False}
    assert capsys.readouterr().out == "CUDA graphs: not here, the device is cpu; going on without\n"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["none", "deepcache", "zeroed", "blocks", "adjusted", "order 2", "forecast blocks",
                                  "together", "plan"])
@torch.no_grad()
def test_cuda_graphs(unet, name):
    unet = unet.cuda()
    make = policies(unet)[name]
    fast = RecordedNetwork(unet, cuda_recorder())
    for _ in range(2):
        ours, expected = make(), make()
        for step in range(CALLS):
            on_gpu = [value.cuda() for value in inputs(step)]
            caches = [{} if policy is None else {"cache": policy.at(step)} for policy in (ours, expected)]
            assert torch.allclose(fast(*on_gpu, **caches[0]), unet(*on_gpu, **caches[1]), atol=1e-4)
