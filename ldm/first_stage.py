"""The autoencoder between images and latents: VQ-f4 of the public LDM, as diffusers' VQModel."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.config import FirstStage
from run.libraries import diffusers
from run.weight_files import named, open_weights
from run.weights import load_strict

PREFIX = "first_stage_model."       # in a whole checkpoint


def build(resolution: int, ch: int, ch_mult: Sequence[int], num_res_blocks: int, z_channels: int,
          n_embed: int) -> diffusers.VQModel:
    """An untrained VQModel from the arguments of the public configuration. Codes have z_channels entries."""
    levels = len(ch_mult)
    return diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(ch * mult for mult in ch_mult), layers_per_block=num_res_blocks,
        latent_channels=z_channels, sample_size=resolution, num_vq_embeddings=n_embed)


@torch.no_grad()
def encode(vq: diffusers.VQModel, images: Tensor) -> Tensor:
    """Images [batch, 3, height, width] in -1..1 -> latents [batch, z_channels, height / f, width / f].

    These are the latents before quantisation, which the diffusion model works on.
    """
    return vq.encode(images).latents


@torch.no_grad()
def decode(vq: diffusers.VQModel, latents: Tensor, quantize: bool = True) -> Tensor:
    """Latents -> images, about -1..1. quantize: first replace each latent by the nearest code, as LDM does."""
    return vq.decode(latents, force_not_quantize=not quantize).sample


@torch.no_grad()
def normalise(vq: diffusers.VQModel, mean: Tensor, deviation: Tensor) -> None:
    """Fold (latents - mean) / deviation, [z_channels] each, into the 1x1 convolutions around the latents."""
    vq.quant_conv.weight /= deviation[:, None, None, None]
    vq.quant_conv.bias.sub_(mean).div_(deviation)
    vq.post_quant_conv.bias += vq.post_quant_conv.weight[:, :, 0, 0] @ mean
    vq.post_quant_conv.weight *= deviation[None, :, None, None]


_SHARED = {"norm_out": "conv_norm_out", "mid.block_1": "mid_block.resnets.0", "mid.block_2": "mid_block.resnets.1",
           "mid.attn_1": "mid_block.attentions.0"}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def published_name(name: str, levels: int) -> str:
    """The published name of one of diffusers' tensors, without the prefix of a whole checkpoint.

    'decoder.up_blocks.0.resnets.1.conv_shortcut.weight' -> 'decoder.up.2.block.1.nin_shortcut.weight': published names
    count the levels from the outermost in the decoder, too.
    """
    name = name.replace("conv_shortcut", "nin_shortcut")
    for theirs, ours in _SHARED.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    for theirs, ours in _ATTENTION.items():
        name = name.replace(f".attn_1.{ours}.", f".attn_1.{theirs}.")
    name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
    name = name.replace(".resnets.", ".block.")
    return name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")


def published_state_dict(vq: diffusers.VQModel) -> dict[str, Tensor]:
    """The model's tensors under their published names, with attention weights as 1x1 convolutions."""
    levels = len(vq.config.block_out_channels)
    tensors = {published_name(name, levels): value for name, value in vq.state_dict().items()}
    return {name: value[:, :, None, None] if _is_projection(name) and value.ndim == 2 else value
            for name, value in tensors.items()}


def load_state_dict(vq: diffusers.VQModel, state_dict: dict[str, Tensor]) -> None:
    """Load tensors with their published names, with or without `first_stage_model.`.

    Raises UserError that names every missing, extra or misshapen tensor; then the model is unchanged.
    """
    state_dict = {name.removeprefix(PREFIX): value for name, value in state_dict.items()}
    flat = {name: value[:, :, 0, 0] if _is_projection(name) and value.shape[2:] == (1, 1) else value
            for name, value in state_dict.items()}
    load_strict(vq, flat, lambda name: published_name(name, len(vq.config.block_out_channels)))


def load(sizes: FirstStage, path: Path) -> diffusers.VQModel:
    """A first stage with its weights, in evaluation mode. path: a whole checkpoint, or a file of the first stage.

    Raises UserError that names the file.
    """
    vq = build(**vars(sizes))
    tensors = open_weights(path, "first stage").tensors
    with named(path):
        load_state_dict(vq, {name: value for name, value in tensors.items() if name.startswith(PREFIX)} or tensors)
    return vq.eval().requires_grad_(False)


def _is_projection(name: str) -> bool:
    """Whether a published name is an attention weight: a 1x1 convolution, in diffusers a linear layer."""
    return re.search(r"\.attn_1\.(q|k|v|proj_out)\.weight$", name) is not None
