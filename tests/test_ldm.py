"""LDM's networks against the authors' released code, and its checkpoints in the public layouts."""

import gzip
import json
import os
import sys
import types

import pytest
import torch
from conftest import HERE, Golden, relative_error
from diffusers import VQModel
from safetensors.torch import save_file
from torch import nn

from eval.cost.macs import branch_macs
from ldm import first_stage
from ldm.checkpoint import (
    CLASSES,
    UNET,
    Model,
    checkpoint_sha256,
    convert,
    load_checkpoint,
    load_state_dict,
    published_state_dict,
    split,
)
from ldm.config import Config, FirstStage, Unet
from ldm.unet import ResBlock, SpatialTransformer, UNet
from run.families import load_config
from run.weights import sha256
from unet_caching.errors import UserError
from unet_caching.nest import WHOLE, Residual

CONFIGS = HERE.parent / "configs"
TOLERANCE = 2e-5        # of the largest magnitude; the authors' own noise floor is 3e-6
SMALL = Config(
    name="small", num_classes=10, checkpoint="",
    unet=Unet(in_channels=3, out_channels=3, model_channels=32, channel_mult=[1, 2, 2], num_res_blocks=2,
              attention_resolutions=[4, 2], num_heads=1, context_dim=16),
    first_stage=FirstStage(resolution=64, ch=32, ch_mult=[1, 2, 2], num_res_blocks=1, z_channels=3, n_embed=64))


def published(name: str) -> dict[str, list[int]]:
    keys = json.loads(gzip.decompress((HERE / "formats" / f"keys_{name}.json.gz").read_bytes()))["keys"]
    return {key: shape for key, (shape, _) in keys.items()}


def empty(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("ldm_small")


@pytest.fixture(scope="module")
def model(golden, tmp_path_factory) -> Model:
    """The golden networks, by way of a whole checkpoint file."""
    path = tmp_path_factory.mktemp("golden") / "model.safetensors"
    save_file(golden.weights, path)
    return load_checkpoint(SMALL, path)


# The released code's outputs; those of the U-Net are in test_goldens.py

def test_noise_schedule(golden):
    assert torch.allclose(SMALL.diffusion.alphas_cumprod(), golden.io["sched.alphas_cumprod"], rtol=1e-5, atol=0)


def test_class_embeddings(model, golden):
    io = golden.io
    assert torch.equal(model.classes(io["cond.labels"])[:, None], io["cond.c"])
    assert torch.equal(model.classes(io["cond.uncond_labels"])[:, None], io["cond.uc"])
    assert (io["cond.uncond_labels"] == SMALL.num_classes).all()


def test_decoding(model, golden):
    io = golden.io
    assert relative_error(first_stage.decode(model.first_stage, io["decode.z"]), io["decode.image"]) < TOLERANCE
    assert relative_error(first_stage.decode(model.first_stage, io["decode.z"], quantize=False),
                          io["decode.image_not_quantized"]) < TOLERANCE
    assert relative_error(io["decode.image"], io["decode.image_not_quantized"]) > 0.01     # quantisation is on


# What the goldens are too coarse to tell

def test_epsilons(model):
    for name, module in model.unet.named_modules():
        if isinstance(module, nn.GroupNorm):
            inside_transformer = isinstance(model.unet.get_submodule(name.rpartition(".")[0]), SpatialTransformer)
            assert module.eps == (1e-6 if inside_transformer else 1e-5), name
        if isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-5, name
    norms = [module for module in model.first_stage.modules() if isinstance(module, nn.GroupNorm)]
    assert norms and all(module.eps == 1e-6 for module in norms)


def test_residuals_go_through_the_cache(model):
    asked = []

    def cache(key, compute):
        asked.append(key)
        return compute()

    residuals = [name for name, module in model.unet.named_modules() if isinstance(module, Residual)]
    assert sum(isinstance(model.unet.get_submodule(name), ResBlock) for name in residuals) == 2 * 3 + 2 + 3 * 3
    transformers = [name for name in residuals if isinstance(model.unet.get_submodule(name), SpatialTransformer)]
    residuals += [f"{name}.transformer_blocks.0.attn{i}" for name in transformers for i in (1, 2)]
    with torch.no_grad():
        model.unet(torch.zeros(1, 3, 16, 16), torch.zeros(1), torch.zeros(1, 1, 16), cache)
    assert sorted(key for key in asked if isinstance(key, str)) == sorted(residuals)
    assert [key for key in asked if isinstance(key, int)] == [WHOLE, *range(model.unet.num_branches)]


@pytest.mark.parametrize("wrong", [{"model_channels": 48}, {"num_heads": 5}])
def test_sizes_that_do_not_divide_are_refused(wrong):
    with pytest.raises(ValueError):
        UNet(**vars(SMALL.unet) | wrong)


# Published checkpoints

def test_cin256_keys_load_strictly():
    config = load_config(CONFIGS / "ldm_cin256.yaml")
    with torch.device("meta"):
        unet, vq = UNet(**vars(config.unet)), first_stage.build(**vars(config.first_stage))
    keys = published("ldm_cin256_unet")
    load_state_dict(unet, empty(keys))
    load_state_dict(unet, empty({name.removeprefix(UNET): shape for name, shape in keys.items()}))
    first_stage.load_state_dict(vq, empty(published("ldm_cin256_vqf4")))
    assert sum(parameter.numel() for parameter in unet.parameters()) == 400_920_579
    assert unet.num_branches == 12

    classes = nn.Embedding(config.num_classes + 1, config.unet.context_dim, device="meta")
    shapes = {name: list(value.shape) for name, value in published_state_dict(Model(unet, vq, classes)).items()}
    whole = published("ldm_cin256_v2_full")
    networks = {name: value for name, value in empty(whole).items() if "." in name}      # the others are buffers
    parts = split(networks, "model.ckpt")
    assert {prefix + name for prefix, part in parts.items() for name in part} == shapes.keys()
    assert shapes == {name: shape for name, shape in whole.items() if name in shapes}
    assert shapes == keys | published("ldm_cin256_vqf4") | published("ldm_cin256_classembed")


def test_cin256_config_has_the_papers_settings():
    config = load_config(CONFIGS / "ldm_cin256.yaml")
    assert (config.sampler.steps, config.sampler.eta, config.sampler.guidance, config.sampler.branch) \
        == (250, 0.0, 1.5, 0)
    assert FirstStage(64, 32, [1, 1, 1], 1, 3, 8).downsampling == 4
    assert config.diffusion == SMALL.diffusion             # whose alphas are compared with the released code's


def refused(content: dict, folder, *parts: str) -> None:
    path = folder / "weights.safetensors"
    save_file(content, path)
    with pytest.raises(UserError) as error:
        load_checkpoint(SMALL, path)
    assert all(part in str(error.value) for part in (*parts, "weights.safetensors")), str(error.value)
    assert "\n" not in str(error.value)


def test_wrong_files_are_refused(golden, tmp_path):
    unet_only = {name: value for name, value in golden.weights.items() if name.startswith(UNET)}
    refused(unet_only, tmp_path, "no first_stage_model.*, cond_stage_model.*")
    refused({"conv_in.weight": torch.zeros(1)}, tmp_path, "not a whole LDM checkpoint", "conv_in.weight")
    refused(golden.weights | {f"{CLASSES}embedding.weight": torch.zeros(1001, 16)}, tmp_path, "[1001, 16]", "[11, 16]")
    text = {name: value for name, value in golden.weights.items() if not name.startswith(CLASSES)}
    text[f"{CLASSES}transformer.text_model.final_layer_norm.weight"] = torch.zeros(768)
    refused(text, tmp_path, "not class-conditional", "transformer.text_model", "Stable Diffusion")
    with pytest.raises(UserError, match="no checkpoint"):
        load_checkpoint(SMALL, tmp_path / "none.ckpt")


# MACs at real size, batch 1, one context token: the papers' digits

@pytest.fixture(scope="module")
def macs():
    with torch.device("meta"):
        unet = UNet(**vars(load_config(CONFIGS / "ldm_cin256.yaml").unet)).eval()
        inputs = torch.zeros(1, 3, 64, 64), torch.zeros(1, dtype=torch.long), torch.zeros(1, 1, 512)
    return branch_macs(unet, inputs, range(unet.num_branches))


def in_g(values, digits: int) -> list[float]:
    return [round(value / 1e9, digits) for value in values]


def test_macs_of_a_step(macs):
    full, cached = macs
    assert in_g([full.hook], 4) == [99.8231]
    assert in_g([cached[branch].hook for branch in (0, 1, 2)], 4) == [4.4254, 11.5264, 20.1373]
    assert in_g([cached[branch].hook for branch in range(3, 12)], 3) \
        == [32.564, 45.108, 59.011, 66.291, 73.488, 81.449, 86.421, 91.380, 96.517]


def test_fc_macs_of_a_step(macs):
    full, cached = macs
    assert in_g([full.fc, *(cached[branch].fc for branch in range(4))], 4) \
        == [104.2272, 4.4222, 11.5193, 20.1263, 33.3524]
    # Ours count both products over the single context token, the released code's count has one of them.
    released = [47.497, 63.002, 70.354, 77.699, 85.808, 90.786, 95.760, 100.911]
    assert all(0 < cached[branch].fc / 1e9 - fc < 0.004 for branch, fc in enumerate(released, start=4))


# Lightning pickles

@pytest.fixture
def lightning(golden, monkeypatch) -> dict:
    """What the public file holds: weights, and a callback's class that only pytorch_lightning defines."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setitem(sys.modules, name, module)
    extra = {"betas": torch.zeros(1000), "model_ema.decay": torch.zeros(()), "logvar": torch.zeros(1000),
             "first_stage_model.loss.perceptual_loss.net.weight": torch.zeros(3)}
    return {"epoch": 1, "state_dict": golden.weights | extra, "optimizer_states": [{"state": {}}],
            "callbacks": {module.ModelCheckpoint: {"monitor": "val/loss", "best": torch.tensor(1.0)}}}


def same(model: Model, weights: dict[str, torch.Tensor]) -> bool:
    own = published_state_dict(model)
    return own.keys() == weights.keys() and all(torch.equal(own[name], weights[name]) for name in own)


def test_lightning_pickle(golden, lightning, tmp_path, monkeypatch):
    path, target = tmp_path / "model.ckpt", tmp_path / "model.safetensors"
    torch.save(lightning, path)
    for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        monkeypatch.delitem(sys.modules, name)
    assert same(load_checkpoint(SMALL, path), golden.weights)
    assert convert(path) == convert(target) == target
    assert (tmp_path / "model.safetensors.sha256").read_text() \
        == f"{sha256(target)}  model.safetensors\n{sha256(path)}  model.ckpt\n"
    assert checkpoint_sha256(path) == checkpoint_sha256(target) == sha256(target)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.ckpt", "model.safetensors",
                                                               "model.safetensors.sha256"]


def test_a_conversion_is_of_the_content(golden, lightning, tmp_path):
    """Whatever its date: mv and cp -p keep that."""
    path, target = tmp_path / "model.ckpt", tmp_path / "model.safetensors"
    torch.save(lightning, path)
    before = convert(path).stat()
    path.touch()
    assert convert(path).stat().st_ino == before.st_ino                     # once
    (tmp_path / "model.safetensors.sha256").write_text(f"{sha256(target)}  model.safetensors\n")
    assert convert(path).stat().st_ino != before.st_ino                     # the note does not say of what it was made
    changed = golden.weights | {f"{CLASSES}embedding.weight": torch.ones(11, 16)}
    torch.save({"state_dict": changed}, path)
    os.utime(path, (1, 1))
    assert same(load_checkpoint(SMALL, path), changed) and checkpoint_sha256(path) == sha256(target)
    target.write_bytes(b"mine")
    with pytest.raises(UserError, match="in the way"):
        load_checkpoint(SMALL, path)
    assert target.read_bytes() == b"mine"


def test_ema_weights_of_a_pickle(golden, tmp_path):
    path = tmp_path / "model.ckpt"
    shadows = {f"model_ema.{name.removeprefix('model.').replace('.', '')}": value + 1
               for name, value in golden.weights.items() if name.startswith(UNET)}
    torch.save({"state_dict": golden.weights | shadows}, path)
    ema = {name: value + 1 if name.startswith(UNET) else value for name, value in golden.weights.items()}
    for asked, wanted in ((None, golden.weights), (False, golden.weights), (True, ema)):
        assert same(load_checkpoint(SMALL, path, asked), wanted)
    assert checkpoint_sha256(path) == checkpoint_sha256(path, False) != checkpoint_sha256(path, True)


# The first stage in diffusers

def test_first_stage_keeps_its_weights_through_published_names():
    torch.manual_seed(0)
    ours, again = (first_stage.build(32, 32, [1, 2], 1, 3, 16) for _ in range(2))
    tensors = first_stage.published_state_dict(ours)
    assert {"encoder.down.0.downsample.conv.weight", "decoder.up.1.upsample.conv.weight",
            "decoder.up.0.block.0.nin_shortcut.weight", "quantize.embedding.weight"} <= tensors.keys()
    first_stage.load_state_dict(again, {f"first_stage_model.{name}": value for name, value in tensors.items()})
    images = torch.randn(2, 3, 32, 32)
    latents = first_stage.encode(ours, images)
    assert isinstance(ours, VQModel) and latents.shape == (2, 3, 16, 16)
    assert torch.equal(first_stage.encode(again, images), latents)
    assert torch.equal(first_stage.decode(again, latents), first_stage.decode(ours, latents))
