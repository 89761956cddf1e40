"""Caching in U-Nets whose layers are quantised or stored in another number format: as without it, and as the package's.

torchao and bitsandbytes are no requirements: what needs them is skipped where they are not installed.
"""

import logging

import pytest
import torch
from test_pipelines import build_xl, by_helper, run_xl
from test_sd_pipeline import build, parts, run  # noqa: F401  one is a fixture
from torch import nn

from unet_caching.pipelines.enable import enable_deepcache


def torchao_int8(unet: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    quantization.quantize_(unet, quantization.Int8WeightOnlyConfig())


def torchao_int8_activations(unet: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    quantization.quantize_(unet, quantization.Int8DynamicActivationInt8WeightConfig())


def bitsandbytes(unet: nn.Module, kind: str, **options) -> None:
    layers = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").nn
    for module in list(unet.modules()):
        for name, layer in module.named_children():
            if type(layer) is nn.Linear:
                other = getattr(layers, kind)(layer.in_features, layer.out_features, layer.bias is not None, **options)
                other.load_state_dict(layer.state_dict())
                setattr(module, name, other.to("cpu"))


def torch_int8(unet: nn.Module) -> None:
    torch.ao.quantization.quantize_dynamic(unet, {nn.Linear}, torch.qint8, inplace=True)


def layerwise_casting(unet: nn.Module) -> None:
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


WAYS = {"torchao, int8 weights": torchao_int8, "torchao, int8 weights and activations": torchao_int8_activations,
        "bitsandbytes, 8 bits": lambda unet: bitsandbytes(unet, "Linear8bitLt", has_fp16_weights=False),
        "bitsandbytes, 4 bits": lambda unet: bitsandbytes(unet, "Linear4bit"),
        "torch, int8": torch_int8, "layerwise casting": layerwise_casting}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("make", "call"), [(build, run), (build_xl, run_xl)], ids=["SD", "SDXL"])
def test_quantised_layers(parts, caplog, make, call, way):  # noqa: F811
    pipe = make(parts)
    before = call(pipe)
    WAYS[way](pipe.unet)
    plain = call(pipe)
    assert not torch.equal(plain, before)               # they act
    with enable_deepcache(pipe, interval=1):
        assert torch.equal(call(pipe), plain)
    theirs = by_helper(pipe, 1, 3, call)
    with enable_deepcache(pipe, interval=3, branch=1), caplog.at_level(logging.INFO, "unet_caching"):
        assert torch.equal(call(pipe), theirs) and not torch.equal(theirs, plain)
    assert "caching in 6 network calls" in caplog.text
    assert torch.equal(call(pipe), plain)
