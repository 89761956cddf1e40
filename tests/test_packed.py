"""Packed weights: the same results to rounding, in eager and compiled networks."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from torch import nn
from torch._inductor.exc import InvalidCxxCompiler

from ddpm import unet as ddpm
from ldm import unet as ldm
from unet_caching.methods.deepcache import DeepCache
from unet_caching.speed import attention, packed
from unet_caching.speed.accelerate import place
from unet_caching.speed.compiled import compile_seconds, compiled
from unet_caching.speed.probe import unusable

pytestmark = pytest.mark.skipif(not packed.packable(nn.Linear(1, 1)), reason="oneDNN packs weights on x86 CPUs alone")
needs_bfloat16 = pytest.mark.skipif(unusable(torch.bfloat16) is not None, reason=str(unusable(torch.bfloat16)))


def tiny_ddpm() -> tuple[nn.Module, tuple]:
    unet = ddpm.UNet(resolution=16, in_channels=3, out_channels=3, ch=32, ch_mult=[1, 2], num_res_blocks=1,
                     attn_resolutions=[16])
    return unet, (torch.randn(2, 3, 16, 16), torch.full((2,), 500))


def tiny_ldm() -> tuple[nn.Module, tuple]:
    unet = ldm.UNet(4, 4, 32, (1, 2), 1, (1, 2), num_heads=2, context_dim=16)
    return unet, (torch.randn(2, 4, 16, 16), torch.full((2,), 500), torch.randn(2, 5, 16))


@pytest.mark.parametrize("make", [tiny_ddpm, tiny_ldm])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@torch.no_grad()
def test_placed_network_predicts_the_same(make, dtype, limit):
    torch.manual_seed(0)
    unet, (x, *rest) = make()
    expected = unet.eval()(x, *rest)
    unet = place(unet, "cpu", dtype)
    if dtype == torch.float32:
        attends = packed.PixelAttention if make is tiny_ddpm else packed.TokenAttention
        assert {type(module) for module in unet.modules()} >= {packed.Linear, packed.Conv2d, packed.PerPixel, attends}
    rest = [value.to(dtype) if value.is_floating_point() else value for value in rest]
    assert relative_error(unet(x.to(dtype), *rest), expected) < limit
    cache = DeepCache(1, [0])
    for step in (0, 1):         # at the same x, what is reused is what would be computed
        assert relative_error(unet(x.to(dtype), *rest, cache=cache.at(step)), expected) < limit


@pytest.mark.parametrize("tokens, keys, scale, shift", [        # powers of 2 over- and underflow
    (256, 256, 1, 0), (300, 1000, 10, 0), (200, 1024, 1, 80), (8, 300, 1, -80), (300, 8, 10, 80)])
@torch.no_grad()
def test_attention(monkeypatch, tokens, keys, scale, shift):
    monkeypatch.setattr(attention, "SCORES", 2**17)        # several parts, the last one smaller
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, n, 3, 24).transpose(1, 2) for n in (tokens, keys, keys))
    query *= scale
    query[..., 0], key[..., 0] = 1, shift * 24**0.5      # a shift of all scores changes nothing
    found = attention.rowwise_attention(query, key, value)
    assert found.shape == query.shape
    key[..., 0] = 0
    expected = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    assert torch.allclose(found.double(), expected, atol=2e-5 * max(1, abs(shift) / 8))


@needs_bfloat16
@pytest.mark.parametrize("scale, shift", [(4, 0), (10, 80), (1, -80)])
@torch.no_grad()
def test_attention_in_bfloat16(scale, shift):
    """Rounding the scores alone would cost 0.013 at a scale of 4."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 500, 3, 24).transpose(1, 2).bfloat16() for _ in range(3))
    query *= scale
    query[..., 0], key[..., 0] = 1, shift * 24**0.5
    found = attention.rowwise_attention(query, key, value)
    key[..., 0] = 0
    expected = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    assert (found.double() - expected).norm() < 0.008 * expected.norm()


@torch.no_grad()
def test_attention_of_few_products_is_pytorchs():
    query, key, value = torch.randn(3, 1, 2, 20, 8)
    assert torch.equal(attention.attention(query, key, value), F.scaled_dot_product_attention(query, key, value))


@torch.no_grad()
def test_attention_passes_on_what_is_not_finite():
    query, key, value = torch.randn(3, 1, 1, 32, 8)
    query[0, 0, 3, 2] = torch.nan
    found = attention.rowwise_attention(query, key, value)
    assert found[0, 0, 3].isnan().all() and found[0, 0, 4:].isfinite().all()


@pytest.mark.parametrize("layer, shape", [
    (ldm.GEGLU(6, 10), (5, 6)), (nn.Linear(5, 7, bias=False), (3, 5)), *((nn.Conv2d(4, 6, 3, **options), (4, 9, 8))
    for options in (dict(stride=2, padding=1), dict(padding=2, dilation=2), dict(groups=2), dict(padding="same"),
                    dict(padding=1, padding_mode="circular")))])
@torch.no_grad()
def test_layers_of_all_kinds(layer, shape):
    x = torch.randn(2, *shape)
    expected = layer(x)
    fast = packed.pack(layer)
    assert torch.allclose(fast(x), expected, atol=1e-5)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")       # its shapes as the compiler sees them
    assert torch.allclose(compiled(x), expected, atol=1e-5)


def test_half_precision_and_other_devices_are_left_alone():
    assert not packed.packable(nn.Linear(1, 1).half())
    assert not packed.packable(nn.Linear(1, 1, device="meta"))
    assert not packed.packable(nn.ReLU())


def test_without_a_compiler_goes_on(monkeypatch, capsys):
    def search() -> str:
        raise InvalidCxxCompiler
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", search)
    network = nn.Linear(1, 1)
    assert compiled(network, 2) is network
    assert "no C++ compiler" in capsys.readouterr().out


@torch.no_grad()
def test_packed_network_compiles_to_two_graphs(monkeypatch):
    """Traced as for the real compiler, whose C++ would take a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    torch.manual_seed(0)
    unet, inputs = tiny_ldm()
    network = compiled(place(copy.deepcopy(unet), "cpu"), 2)
    unet = place(unet, "cpu")
    counted, caches = torch._dynamo.utils.counters, [DeepCache(1, [0, 2]) for _ in range(2)]
    before = counted["stats"]["unique_graphs"]
    for step in range(4):
        expected = unet(*inputs, cache=caches[1].at(step))
        assert relative_error(network(*inputs, cache=caches[0].at(step)), expected) < 1e-5
    assert counted["stats"]["unique_graphs"] - before == 2
    assert not packed.waiting(network.network)          # the first call packed the convolutions
    assert compile_seconds() > 0
