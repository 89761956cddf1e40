"""Files of weights in all layouts in which they are found: each loads and gives the same model, or ends in one line."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel
from weight_cases import CLIP, CONFIG, KL, LOADS, REFUSED, SD1, Place, Tensors, shadows

from ddpm import checkpoint as ddpm
from ddpm.unet import UNet as Pixels
from ldm import first_stage
from ldm.diffusers_layout import diffusers_arguments
from run.weight_files import ema_of
from run.weights import sha256
from stable_diffusion import checkpoint
from stable_diffusion.checkpoint import Model, checkpoint_sha256, load_checkpoint, load_unet
from stable_diffusion.config import XL, Config, Diffusion, Unet
from stable_diffusion.parts import FIRST_STAGE, TEXT, UNET
from stable_diffusion.pipeline import load_pipeline
from stable_diffusion.text import clip_tokenizer
from unet_caching.errors import UserError

PIXELS = {"resolution": 8, "in_channels": 3, "out_channels": 3, "ch": 32, "ch_mult": [1], "num_res_blocks": 1,
          "attn_resolutions": []}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small model as diffusers and transformers write it, in the layout of the public folders."""
    path = tmp_path_factory.mktemp("small") / "folder"
    torch.manual_seed(0)
    UNet2DConditionModel(**diffusers_arguments(SD1)).save_pretrained(path / "unet")
    AutoencoderKL(**KL).save_pretrained(path / "vae")
    CLIPTextModel(CLIPTextConfig(**CLIP)).save_pretrained(path / "text_encoder")
    clip_tokenizer().save_pretrained(path / "tokenizer")
    PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(path / "scheduler")
    (path / "model_index.json").write_text(json.dumps({
        "_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"]}))
    return path


@pytest.fixture(scope="module")
def model(folder) -> Model:
    return load_checkpoint(CONFIG, folder)


@pytest.fixture(scope="module")
def tensors(model) -> Tensors:
    return published_state_dict(model)


def published_state_dict(model: Model) -> Tensors:
    """The tensors of all networks, as one file of 1.x holds them."""
    text = {name.removeprefix("text_model."): value for name, value in model.text_encoder.state_dict().items()}
    parts = {UNET: model.unet.state_dict(), FIRST_STAGE: first_stage.published_state_dict(model.vae),
             f"{TEXT}transformer.text_model.": text}
    return {prefix + name: value.contiguous() for prefix, part in parts.items() for name, value in part.items()}


@pytest.fixture
def place(folder, tensors, tmp_path, monkeypatch) -> Place:
    monkeypatch.setattr(checkpoint, "KL_F8", KL)        # what is known of 1.x's, small
    return Place(tmp_path, folder, tensors)


def equal(first: Tensors, second: Tensors) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def same(first: Model, second: Model) -> bool:
    """Whether all weights, constants and tokens are equal, and as they should be after loading."""
    for network in (*first[:3], *second[:3]):
        assert not network.training
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in network.parameters())
    buffers = (dict(model.text_encoder.named_buffers()) for model in (first, second))
    tokens = [model.tokenizer(["", "a cat in a hat"], padding="max_length") for model in (first, second)]
    return tokens[0] == tokens[1] and equal(*buffers) and all(
        equal(a.state_dict(), b.state_dict()) for a, b in zip(first[:3], second[:3], strict=True))


def changed(**changes) -> Config:
    return Config(**vars(CONFIG) | changes)


def given(made: Path | dict) -> dict:
    return made if isinstance(made, dict) else {"path": made}


@pytest.mark.parametrize("case", LOADS)
def test_it_loads_and_is_the_same(place, model, case):
    how = given(LOADS[case](place))
    loaded = load_checkpoint(CONFIG, **how)
    assert same(loaded, model) and loaded.vae.config.scaling_factor == 0.18215
    assert equal(load_unet(CONFIG, **how).state_dict(), model.unet.state_dict())
    assert len(checkpoint_sha256(**how)) == 64


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_in_one_line(place, case):
    make, words = REFUSED[case]
    how = given(make(place))
    with pytest.raises(UserError) as error:
        load_checkpoint(CONFIG, **how)
    line = str(error.value)
    assert all(word in line for word in words) and "\n" not in line and str(place.path) in line, line


def test_ema_weights_are_taken_where_they_are_asked_for(place, model):
    file = place.plus(shadows(place))
    loaded = load_checkpoint(CONFIG, file, ema=True)
    assert equal(loaded.unet.state_dict(), {name: value + 1 for name, value in model.unet.state_dict().items()})
    assert equal(loaded.vae.state_dict(), model.vae.state_dict())
    assert [ema_of(file), ema_of(file, True), ema_of(place.whole)] == [False, True, None]
    assert checkpoint_sha256(file) == checkpoint_sha256(file, ema=False) == sha256(file)
    assert checkpoint_sha256(file, ema=True) != sha256(file)
    apart = load_checkpoint(CONFIG, place.whole, ema=True, unet=file)
    assert same(apart, loaded) and len({checkpoint_sha256(place.whole, ema, file) for ema in (None, False, True)}) == 2


def test_half_precision_comes_out_in_float32(place):
    halves = {name: value.half() for name, value in place.tensors.items()}
    loaded = load_unet(CONFIG, place.file(halves)).state_dict()
    assert all(torch.equal(value, halves[UNET + name].float()) for name, value in loaded.items())


def test_digest_of_a_folder(place):
    copy, digest = place.folder(), checkpoint_sha256(place.whole)
    (copy / "notes.txt").write_text("not read")
    (copy / "unet" / "diffusion_pytorch_model.non_ema.safetensors").write_text("not read")
    assert checkpoint_sha256(copy) == digest != checkpoint_sha256(copy, ema=False)
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"quant_conv.bias": tensors["quant_conv.bias"] + 1}, file)
    assert checkpoint_sha256(copy) != digest != checkpoint_sha256(copy, vae=place.whole) != checkpoint_sha256(copy)


@pytest.mark.parametrize(("changes", "words"), [
    ({"downsampling": 8}, "downsampling of the autoencoder is 2 and should be 8"),
    ({"unet": Unet(**SD1 | {"linear_projections": True})}, "use_linear_projection is False"),
    ({"unet": Unet(**SD1 | {"in_channels": 9})}, "in_channels is 4 and should be 9"),
    ({"xl": XL([1, 1], 1552)}, "StableDiffusionPipeline is not a pipeline of SDXL")])
def test_a_config_of_another_model_is_refused(folder, changes, words):
    with pytest.raises(UserError) as error:
        load_checkpoint(changed(**changes), folder)
    assert words in str(error.value)


def test_a_config_of_v_takes_what_says_so(place, model):
    diffusion = Diffusion(prediction="v", zero_terminal_snr=True)
    config = changed(diffusion=diffusion)
    assert diffusion.alphas_cumprod()[-1] < 1e-7 < 1e-3 < diffusion.alphas_cumprod()[-2] * 1e4
    file = place.plus({"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0),
                       "alphas_cumprod": diffusion.alphas_cumprod()}, metadata={"ss_v_parameterization": "True"})
    assert same(load_checkpoint(config, file), model)
    with pytest.raises(UserError, match=r"predicts noise .*the config says v"):
        load_checkpoint(config, place.plus({}, metadata={"prediction_type": "epsilon"}))
    with pytest.raises(ValueError, match="prediction: v"):
        Diffusion(zero_terminal_snr=True)


def test_a_network_that_takes_an_image_loads_and_makes_no_pipeline(place):
    config = changed(unet=Unet(**SD1 | {"in_channels": 9}))
    file = place.plus({f"{UNET}input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)})
    assert load_checkpoint(config, file).unet(*(torch.zeros(1, *shape) for shape in ((9, 16, 16), (), (77, 16)))
                                              ).shape == (1, 4, 16, 16)
    with pytest.raises(UserError, match="takes 9 channels and predicts 4"):
        load_pipeline(config, file)


def test_files_of_1x_are_no_sdxl(place):
    config = changed(xl=XL([1, 1], 1552))
    with pytest.raises(UserError, match=r"Stable Diffusion 1\.x's, not SDXL's"):
        load_checkpoint(config, place.plus({}))


# DDPM's

def test_ddpm_takes_either_weights_of_a_training_checkpoint(place):
    torch.manual_seed(0)
    plain, ema = ({f"module.{name}": value for name, value in ddpm.published_state_dict(Pixels(**PIXELS)).items()}
                  for _ in range(2))
    path = place.file([plain, {"state": {}, "param_groups": []}, 12, 3456, ema], "ckpt.pth")
    for asked, wanted in ((None, ema), (True, ema), (False, plain)):
        unet = Pixels(**PIXELS)
        ddpm.load_checkpoint(unet, path, ema=asked)
        assert equal({f"module.{name}": value for name, value in ddpm.published_state_dict(unet).items()}, wanted)
    assert ddpm.checkpoint_sha256(path) == ddpm.checkpoint_sha256(path, True) != ddpm.checkpoint_sha256(path, False)


@pytest.mark.parametrize(("content", "words"), [
    ([{}, {}, 12, 3456], ["a list of 4 parts without EMA weights"]), ({"param_groups": [], "state": {}}, ["optimiser"]),
    ({"epoch": 3}, ["named tensors"]), (torch.zeros(3), ["named tensors"]), ([], ["a list of 0 parts"]),
    (7, ["named tensors"]), (None, ["it is a folder; name the file in it"])])
def test_ddpm_refuses_what_it_cannot_use(place, content, words):
    path = place.path if content is None else place.file(content, "x.ckpt")
    with pytest.raises(UserError) as error:
        ddpm.load_checkpoint(Pixels(**PIXELS), path)
    assert all(word in str(error.value) for word in [str(path), *words]) and "\n" not in str(error.value)
