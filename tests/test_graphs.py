"""Recorded network calls, replayed by PyTorch's tracer, to which Python is as invisible as to a CUDA graph."""


import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ldm.unet import UNet
from unet_caching.keep import Keep, joined
from unet_caching.methods.block_caching import outside, residual_names
from unet_caching.methods.deepcache import DeepCache, ZeroedCache
from unet_caching.speed.accelerate import accelerated
from unet_caching.speed.graphs import RecordedNetwork, cuda_recorder


def record(run):
    """Like a CUDA graph: fixed tensors in, the same tensor out, no Python."""
    traced = make_fx(run)()
    output = traced().clone()
    return output, lambda: output.copy_(traced())


@pytest.fixture
def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(4, 4, 32, (1, 2), 1, (1, 2), num_heads=2, context_dim=16).eval().requires_grad_(False)


def policies(unet: UNet) -> dict:
    names = residual_names(unet)
    blocks = {name: {0, 2, 3} if i % 2 else {0, 3} for i, name in enumerate(names)}
    around = outside(names, unet.num_branches, 1)
    biases = {name: unet.get_parameter(f"{name}.norm.bias") for name in names}
    adjust = [{} if step == 4 else {name: (torch.rand_like(bias), torch.rand_like(bias))
                                    for name, bias in biases.items()} for step in range(5)]
    return {"none": lambda: None, "deepcache": lambda: DeepCache(1, [0, 3]), "zeroed": lambda: ZeroedCache(1, [0, 3]),
            "blocks": lambda: Keep(blocks), "adjusted": lambda: Keep(blocks, adjust=adjust),
            "together": lambda: joined(DeepCache(1, [0, 3]), Keep({name: {0, 2} for name in around}, adjust=adjust))}


@pytest.mark.parametrize("name, kinds", [("none", 1), ("deepcache", 2), ("zeroed", 2), ("blocks", 3), ("adjusted", 4),
                                         ("together", 5)])
@torch.no_grad()
def test_replays_are_the_network(unet, name, kinds):
    make = policies(unet)[name]
    fast = RecordedNetwork(unet, record)
    for rows in (2, 2, 1):                                  # two batches, and one of another size
        ours, expected = make(), make()
        for step in range(5):
            inputs = torch.randn(rows, 4, 8, 8), torch.full((rows,), 500 - step), torch.randn(rows, 5, 16)
            caches = [{} if policy is None else {"cache": policy.at(step)} for policy in (ours, expected)]
            assert torch.allclose(fast(*inputs, **caches[0]), unet(*inputs, **caches[1]), atol=1e-5)
        if ours is not None:
            assert ours.kept.keys() == expected.kept.keys()
    assert len(fast.recordings) == 2 * kinds


@torch.no_grad()
def test_results_stay_when_the_next_come(unet):
    fast, inputs = RecordedNetwork(unet, record), (torch.full((1,), 5), torch.randn(1, 5, 16))
    first = fast(torch.zeros(1, 4, 8, 8), *inputs)
    copy = first.clone()
    assert not torch.equal(fast(torch.ones(1, 4, 8, 8), *inputs), first) and torch.equal(first, copy)


@torch.no_grad()
def test_values_from_elsewhere_are_used(unet):
    fast = RecordedNetwork(unet, record)
    for _ in range(2):
        inputs = torch.randn(1, 4, 8, 8), torch.full((1,), 5), torch.randn(1, 5, 16)
        caches = [DeepCache(0, [0]) for _ in range(2)]
        for cache in caches:
            unet(*inputs, cache=cache.at(0))            # a full step that is not recorded
        expected = unet(*inputs, cache=caches[0].at(1))
        assert torch.allclose(fast(*inputs, cache=caches[1].at(1)), expected, atol=1e-5)


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
        inputs = torch.randn(1, 4, 8, 8), torch.full((1,), 5), torch.randn(1, 5, 16)
        assert torch.equal(fast(*inputs, cache=ours.at(step)), unet(*inputs, cache=expected.at(step)))
    assert not fast.recordings and ours.value is not expected.value


def test_without_a_gpu_goes_on(unet, capsys):
    found = accelerated(unet, compile=False, cuda_graphs=True, graphs=2)
    assert found.network is unet and found.in_use == {"compile": False, "cuda_graphs": False}
    assert capsys.readouterr().out == "CUDA graphs: not here, the device is cpu; going on without\n"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["none", "deepcache", "blocks", "adjusted", "together"])
@torch.no_grad()
def test_cuda_graphs(unet, name):
    unet = unet.cuda()
    make = policies(unet)[name]
    fast = RecordedNetwork(unet, cuda_recorder())
    for _ in range(2):
        ours, expected = make(), make()
        for step in range(5):
            inputs = (torch.randn(2, 4, 8, 8, device="cuda"), torch.full((2,), 500 - step, device="cuda"),
                      torch.randn(2, 5, 16, device="cuda"))
            caches = [{} if policy is None else {"cache": policy.at(step)} for policy in (ours, expected)]
            assert torch.allclose(fast(*inputs, **caches[0]), unet(*inputs, **caches[1]), atol=1e-4)
