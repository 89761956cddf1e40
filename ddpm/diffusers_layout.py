"""A DDPM's weights in the layout of diffusers' UNet2DModel."""

import re
from collections.abc import Callable

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from ddpm.checkpoint import published_state_dict
from ddpm.config import Config
from ddpm.unet import UNet


def diffusers_unet(config: Config, unet: UNet) -> nn.Module:
    """diffusers' U-Net on the very weights of ours, but those of attention, which are linear layers there."""
    sizes = config.unet
    attends = [sizes.resolution >> level in sizes.attn_resolutions for level in range(len(sizes.ch_mult))]
    with torch.device("meta"):
        theirs = UNet2DModel(
            sample_size=sizes.resolution, in_channels=sizes.in_channels, out_channels=sizes.out_channels,
            layers_per_block=sizes.num_res_blocks, block_out_channels=[sizes.ch * mult for mult in sizes.ch_mult],
            down_block_types=["AttnDownBlock2D" if level else "DownBlock2D" for level in attends],
            up_block_types=["AttnUpBlock2D" if level else "UpBlock2D" for level in reversed(attends)],
            downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6, attention_head_dim=None)
    theirs.load_state_dict(diffusers_state_dict(unet), assign=True)
    return theirs.eval().requires_grad_(False)


def diffusers_state_dict(unet: UNet) -> dict[str, Tensor]:
    """The tensors of a U-Net under the names of diffusers' UNet2DModel, whose attention has linear layers."""
    def level(match: re.Match[str]) -> str:
        return f"{match[1]}_blocks.{match[2] if match[1] == 'down' else unet.num_levels - 1 - int(match[2])}"

    rules: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
        (r"temb\.dense\.0", "time_embedding.linear_1"), (r"temb\.dense\.1", "time_embedding.linear_2"),
        (r"norm_out", "conv_norm_out"), (r"mid\.block_1", "mid_block.resnets.0"),
        (r"mid\.block_2", "mid_block.resnets.1"), (r"mid\.attn_1", "mid_block.attentions.0"),
        (r"(down|up)\.(\d+)", level),
        (r"\.block\.(\d+)", r".resnets.\1"), (r"\.attn\.(\d+)", r".attentions.\1"),
        (r"\.(down|up)sample\.", r".\1samplers.0."), (r"temb_proj", "time_emb_proj"),
        (r"nin_shortcut", "conv_shortcut"), (r"(attentions\.\d+)\.norm", r"\1.group_norm"),
        (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."), (r"(attentions\.\d+)\.proj_out", r"\1.to_out.0")]
    found = {}
    for name, value in published_state_dict(unet).items():
        for pattern, theirs in rules:
            name = re.sub(pattern, theirs, name)
        found[name] = value[:, :, 0, 0] if "attentions" in name and value.ndim == 4 else value
    return found
