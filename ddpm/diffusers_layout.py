"""A DDPM's weights in the layout of diffusers' UNet2DModel."""

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from ddpm.checkpoint import diffusers_name, published_state_dict
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
    found = {}
    for published, value in published_state_dict(unet).items():
        name = diffusers_name(published, unet.num_levels)
        found[name] = value[:, :, 0, 0] if "attentions" in name and value.ndim == 4 else value
    return found
