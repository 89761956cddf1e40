"""Load Stable Diffusion 1.x, 2.x and SDXL from a diffusers folder, or from one file in the authors' layout (1.x, SDXL).

The modules of our U-Net have the authors' names. diffusers' names are derived from its structure, for any size.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm import first_stage
from ldm.diffusers_layout import differences, diffusers_names
from ldm.diffusers_layout import diffusers_unet as diffusers_unet
from run.libraries import diffusers, transformers
from run.weight_files import file_sha256, named
from run.weights import in_todays_names, load_strict, sha256
from stable_diffusion.config import Config
from stable_diffusion.parts import (
    UNET,
    Folder,
    OneFile,
    Part,
    check_scheduler,
    compare,
    digests_alone,
    existing,
    read_alone,
    read_dict,
)
from stable_diffusion.text import clip, minilm, minilm_folder, of_one_file
from stable_diffusion.unet import SIZE_CHANNELS, SIZES, UNet, make
from unet_caching.errors import UserError


class Second(NamedTuple):
    """SDXL's second text encoder. zeros: an empty negative prompt becomes zeros, not the encoding of the empty text."""
    text_encoder: transformers.CLIPTextModelWithProjection
    tokenizer: transformers.PreTrainedTokenizerBase
    zeros: bool


class Model(NamedTuple):
    """The networks of a checkpoint. unet: ours, or diffusers' with `diffusers_unet`. second: only SDXL's."""
    unet: UNet | diffusers.UNet2DConditionModel
    vae: diffusers.AutoencoderKL | diffusers.VQModel
    text_encoder: transformers.CLIPTextModel | transformers.BertModel
    tokenizer: transformers.PreTrainedTokenizerBase
    second: Second | None = None


def load_state_dict(unet: UNet, state_dict: Mapping[str, Tensor]) -> None:
    """Load tensors in the CompVis layout, with or without `model.diffusion_model.`, or in diffusers' layout.

    Raises UserError that names every missing, extra or misshapen tensor, in the layout of the file; then the U-Net is
    unchanged.
    """
    state_dict = {name.removeprefix(UNET): value for name, value in state_dict.items()}
    names = diffusers_names(unet)
    in_diffusers = len(state_dict.keys() & set(names.values())) > len(state_dict.keys() & names.keys())
    load_strict(unet, state_dict, names.__getitem__ if in_diffusers else str)


KL_F8 = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
         "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "sample_size": 512}
SCALES = 0.18215, 0.13025       # of the latents of 1.x and of SDXL
_VAES = {"AutoencoderKL": diffusers.AutoencoderKL, "VQModel": diffusers.VQModel}
_IMAGES = {9: "for inpainting: diffusers' StableDiffusionInpaintPipeline takes",
           8: "for edits by instruction: diffusers' StableDiffusionInstructPix2PixPipeline takes",
           7: "for upscaling: diffusers' StableDiffusionUpscalePipeline takes",
           5: "with depth: diffusers' StableDiffusionDepth2ImgPipeline takes"}


def load_checkpoint(config: Config, path: Path, diffusers_unet: bool = False, ema: bool | None = None,
                    unet: Path | None = None, vae: Path | None = None) -> Model:
    """Build all networks with the weights at `path`, in evaluation mode, float32 on the CPU, and the tokenizer.

    path: a diffusers folder, or one file of 1.x or SDXL in the authors' layout. A folder has model_index.json, unet/,
    vae/, text_encoder/, tokenizer/ and scheduler/, SDXL's also text_encoder_2/ and tokenizer_2/. Its weights are
    safetensors or pickles, whole or in shards, in float32 or, failing that, float16. The tokenizer of a file comes from
    a folder tokenizer/ beside it, or else is CLIP's. Weights in float32 are memory-mapped.
    diffusers_unet: build a folder's U-Net with diffusers' class, whatever its layout, as pruned ones need.
    ema: take EMA or plain weights of the U-Net (`run.weight_files`). unet, vae: other files or folders to take these
    networks from.
    Raises UserError for files that are missing, damaged, unsafe or of another model than `config` says.
    """
    others = {name: where for name, where in (("unet", unet), ("vae", vae)) if where is not None}
    source = _open(config, Path(path), ema, others)
    parts = {"unet": _unet_part(config, source, ema, unet),
             "vae": source.part("vae") if vae is None else read_alone("vae", vae)}
    build = _diffusers_unet if diffusers_unet else _unet
    model = Model(build(config, parts["unet"]), _vae(config, parts["vae"]), *_texts(config, source))
    _check_sizes(config, model, path)
    for network in (model.unet, model.vae, model.text_encoder, *([model.second.text_encoder] if model.second else [])):
        network.float().eval().requires_grad_(False)
    return model


def load_unet(config: Config, path: Path, ema: bool | None = None, unet: Path | None = None, vae: Path | None = None
              ) -> UNet:
    """Only the U-Net of `load_checkpoint`. Raises UserError."""
    source = None if unet else _open(config, Path(path), ema, {"vae": vae} if vae else {})
    return _unet(config, _unet_part(config, source, ema, unet)).float().eval().requires_grad_(False)


def checkpoint_sha256(path: Path, ema: bool | None = None, unet: Path | None = None, vae: Path | None = None) -> str:
    """The hex digest of what `load_checkpoint` reads: a file, or a folder's configs, weights and tokenizer."""
    path, others = existing(Path(path)), {name: one for name, one in (("unet", unet), ("vae", vae)) if one is not None}
    lines = [line for name, one in others.items() for line in digests_alone(name, one, ema if name == "unet" else None)]
    if not path.is_dir():
        own = file_sha256(path, None if unet else ema)
        return _digest([f"{own}  {path.name}\n", *lines]) if lines else own
    folder = Folder(path, None if unet else ema, others)
    own_lines = [f"{sha256(file)}  {file.relative_to(path)}\n" for file in folder.files()]
    if not folder.texts:
        own_lines += [f"{sha256(minilm_folder() / name)}  {name}\n" for name in ("model.safetensors", "vocab.txt")]
    return _digest(own_lines + lines)


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _open(config: Config, path: Path, ema: bool | None, others: Mapping[str, Path]) -> Folder | OneFile:
    """Open a checkpoint. others: the networks that are taken from elsewhere, and from where. Raises UserError."""
    ema = None if "unet" in others else ema
    if not existing(path).is_dir():
        return OneFile(path, config, ema, others)
    folder = Folder(path, ema, others)
    folder.check(config)
    return folder


def _check_sizes(config: Config, model: Model, path: Path) -> None:
    """Raise a UserError if the networks do not fit together as the config says."""
    vae, second = model.vae.config, model.second
    texts = [(model.text_encoder.config, model.tokenizer)]
    texts += [] if second is None else [(second.text_encoder.config, second.tokenizer)]
    sizes = [("downsampling of the autoencoder", 2 ** (len(vae.block_out_channels) - 1), config.downsampling),
             ("latent_channels of the autoencoder", vae.latent_channels, config.unet.out_channels),
             ("latents_mean of the autoencoder", getattr(vae, "latents_mean", None), None),
             ("shift_factor of the autoencoder", getattr(vae, "shift_factor", None) or None, None),
             ("width of the text encoder", sum(text.hidden_size for text, _ in texts), config.unet.context_dim)]
    for text, tokenizer in texts:
        most, known = text.max_position_embeddings, text.vocab_size
        if tokenizer.model_max_length > 10 ** 6:        # the tokenizer's files do not say
            tokenizer.model_max_length = min(most, config.tokens)
        sizes += [("model_max_length of the tokenizer", tokenizer.model_max_length, config.tokens),
                  ("max_position_embeddings of the text encoder", most, max(most, config.tokens)),
                  ("vocabulary of the tokenizer", len(tokenizer), min(len(tokenizer), known))]
    if second is not None and config.xl is not None:
        sizes.append(("projection_dim of text_encoder_2", second.text_encoder.config.projection_dim,
                      config.xl.adm_in_channels - SIZES * SIZE_CHANNELS))
    compare(config, path, sizes)


def _unet_part(config: Config, source: Folder | OneFile | None, ema: bool | None, path: Path | None) -> Part:
    """The U-Net of a checkpoint, or the one at `path`. Raises UserError for a U-Net that takes an image."""
    if path is not None and (path / "scheduler").is_dir():
        check_scheduler(config, path)
    part = source.part("unet") if path is None and source else read_alone("unet", path or Path(), config.diffusion, ema)
    first = next((part.tensors[name] for name in ("conv_in.weight", "input_blocks.0.0.weight") if name in part.tensors),
                 None)
    channels = config.unet.in_channels if first is None or first.ndim != 4 else first.shape[1]
    if channels in _IMAGES and channels != config.unet.in_channels:
        raise UserError(f"{part.weights}: its U-Net takes {channels} channels, {_IMAGES[channels]} it, and "
                        "enable_deepcache caches in that pipeline")
    return part


def _unet(config: Config, part: Part) -> UNet:
    if part.config is not None:
        compare(config, part.config, differences(read_dict(part.config), config.unet_arguments))
    with named(part.weights), torch.device("meta"):
        unet = make(config.unet_arguments)
        load_state_dict(unet, part.tensors)
    return unet


def _diffusers_unet(config: Config, part: Part) -> diffusers.UNet2DConditionModel:
    if part.config is None:
        raise UserError(f"{part.weights} is a file: --diffusers-unet needs a diffusers folder, which has the U-Net's "
                        "config")
    sizes, content = config.unet, read_dict(part.config)
    expected = {"in_channels": sizes.in_channels, "out_channels": sizes.out_channels,
                "cross_attention_dim": sizes.context_dim,
                "addition_embed_type": None if config.xl is None else "text_time"}
    compare(config, part.config, ((key, content.get(key), value) for key, value in expected.items()))
    with named(part.config), torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(content)
    with named(part.weights):
        load_strict(unet, part.tensors, str)
    return unet


def _vae(config: Config, part: Part) -> diffusers.AutoencoderKL | diffusers.VQModel:
    """The autoencoder, from tensors with diffusers' names, today's or older ones, or with the authors'."""
    known = {"_class_name": "AutoencoderKL", **KL_F8, "scaling_factor": SCALES[config.xl is not None]}
    content: dict[str, Any] = known if part.config is None else read_dict(part.config)
    if content.get("_class_name") not in _VAES:
        raise UserError(f"{part.config}: _class_name is {content.get('_class_name')!r} and should be "
                        f"{' or '.join(_VAES)}")
    with named(part.config or part.weights), torch.device("meta"):
        vae = _VAES[content["_class_name"]].from_config(content)
    with named(part.weights):
        if any(name.startswith("decoder.up.") for name in part.tensors):
            first_stage.load_state_dict(vae, part.tensors)
        else:
            load_strict(vae, in_todays_names(part.tensors), str)
    return vae


def _texts(config: Config, source: Folder | OneFile) -> tuple[Any, Any, Second | None]:
    """The first text encoder, its tokenizer, and SDXL's second text encoder."""
    if not source.texts:
        return *minilm(config.tokens), None
    kinds = transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection
    found = []
    for name, kind in zip(source.texts, kinds, strict=False):
        part = source.part(name)
        with named(part.weights):
            sizes, tensors = (read_dict(part.config), part.tensors) if part.config else of_one_file(part.tensors)
            found.append((clip(sizes, tensors, kind), source.tokenizer(name)))
    return *found[0], Second(*found[1], source.zeros) if len(found) == 2 else None
