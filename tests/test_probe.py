"""Private operators of PyTorch that fail or give something else: sampling goes on with PyTorch's own layers."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from unet_caching.methods.deepcache import DeepCache
from unet_caching.samplers.diffusion import Diffusion
from unet_caching.samplers.solvers import ddim
from unet_caching.samplers.timesteps import uniform_timesteps
from unet_caching.speed import packed, probe
from unet_caching.speed.accelerate import place

pytestmark = pytest.mark.skipif(not packed.packable(nn.Linear(1, 1)), reason="nothing is packed here")
OPERATORS = "_reorder_linear_weight", "_linear_pointwise", "_reorder_convolution_weight", "_convolution_pointwise"
FAST = packed.Linear, packed.Conv2d, packed.PerPixel, packed.GEGLU, packed.TokenAttention


@pytest.fixture(autouse=True)
def asked_anew():
    probe.usable.cache_clear()
    yield
    probe.usable.cache_clear()


def sampled(unet: nn.Module) -> Tensor:
    noise = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 8, 8, generator=noise), torch.randn(2, 5, 16, generator=noise)
    cache, dtype = DeepCache(1, [0, 2]), next(unet.parameters()).dtype

    def predict(x: Tensor, t: int, step: int) -> Tensor:
        return unet(x.to(dtype), torch.full((2,), t), context.to(dtype), cache=cache.at(step)).float()

    with torch.no_grad():
        return ddim(predict, x, uniform_timesteps(4), Diffusion("linear").alphas_cumprod())


def raises(*args: object) -> Tensor:
    raise RuntimeError("needs a CPU\nthat this is not")


def off(function):
    return lambda *args: function(*args) * 1.001


def reshaped(function):
    return lambda *args: function(*args)[None]


@pytest.mark.parametrize("name, change, says", [
    *((name, off, "is off by") for name in OPERATORS), (OPERATORS[1], reshaped, "has another shape"),
    *((name, lambda function: raises, "needs a CPU that this is not") for name in OPERATORS[1:3])])
def test_operators_that_fail_are_not_used(monkeypatch, capsys, latent_unet, name, change, says):
    expected = sampled(latent_unet)
    monkeypatch.setattr(torch.ops.mkldnn, name, change(getattr(torch.ops.mkldnn, name)))
    networks = [place(copy.deepcopy(latent_unet), "cpu") for _ in range(2)]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith("packed weights: not here, ") and says in lines[0], lines
    assert not any(isinstance(module, FAST) for network in networks for module in network.modules())
    assert torch.allclose(sampled(networks[0]), expected, atol=1e-4)


def test_operators_that_are_absent_are_not_used(monkeypatch, capsys, latent_unet):
    expected = sampled(latent_unet)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    network = place(copy.deepcopy(latent_unet), "cpu")
    assert "has no attribute" in capsys.readouterr().out
    assert torch.allclose(sampled(network), expected, atol=1e-4)


def test_each_dtype_is_asked_for_itself(monkeypatch, capsys, latent_unet):
    expected = sampled(latent_unet)
    linear = torch.ops.mkldnn._linear_pointwise

    def only_float32(x: Tensor, *args: object) -> Tensor:
        return linear(x, *args) if x.dtype == torch.float32 else raises()

    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", only_float32)
    half = place(copy.deepcopy(latent_unet), "cpu", torch.bfloat16)
    assert len(capsys.readouterr().out.splitlines()) == 1 and not any(isinstance(m, FAST) for m in half.modules())
    assert torch.allclose(sampled(half), expected, atol=0.1 * expected.abs().max().item())
    full = place(copy.deepcopy(latent_unet), "cpu", torch.float32)
    assert not capsys.readouterr().out and {type(module) for module in full.modules()} >= set(FAST)
    assert torch.allclose(sampled(full), expected, atol=1e-4)
