"""Load and save DDPM weights under their published names.

The public checkpoints (of the PyTorch DDIM code, which DeepCache's release uses) count levels from the outermost:
`down.1.block.0`, `mid.attn_1`, `up.1.block.2`. The same weights are published for diffusers' UNet2DModel under other
names (google/ddpm-cifar10-32, google/ddpm-ema-bedroom-256, google/ddpm-ema-church-256). Our U-Net is a nest of blocks,
so names are rewritten by rule. Every tensor is kept.
"""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ddpm.config import Config
from ddpm.unet import UNet
from run.libraries import diffusers
from run.weight_files import file_sha256, named, open_weights
from run.weights import in_todays_names, load_strict
from unet_caching.errors import as_user_error
from unet_caching.samplers.diffusion import Diffusion

checkpoint_sha256 = file_sha256
_MIDDLE = {"0": "block_1", "1": "attn_1", "2": "block_2"}
_OUTSIDE = {"embed.0": "temb.dense.0", "embed.2": "temb.dense.1", "input_blocks.0.0": "conv_in",
            "out.0": "norm_out", "out.2": "conv_out"}


def published_name(name: str, num_levels: int, num_res_blocks: int) -> str:
    """The published name of one of our tensors: 'input_blocks.4.0.conv1.weight' -> 'down.1.block.0.conv1.weight'."""
    for ours, theirs in _OUTSIDE.items():
        if name.startswith(f"{ours}."):
            return theirs + name[len(ours):]
    if match := re.fullmatch(r"middle_block\.(\d)\.(.+)", name):
        return f"mid.{_MIDDLE[match[1]]}.{match[2]}"
    match = re.fullmatch(r"(input|output)_blocks\.(\d+)\.\d\.(.+)", name)
    assert match, f"{name} is not a tensor of this U-Net"
    side, block, leaf = match.groups()
    if side == "input":     # after conv_in, each level has its ResNet blocks and then a downsampling
        level, i = divmod(int(block) - 1, num_res_blocks + 1)
        part, samples = f"down.{level}", "downsample"
    else:                   # from the innermost level outwards
        level, i = divmod(int(block), num_res_blocks + 1)
        part, samples = f"up.{num_levels - 1 - level}", "upsample"
    if leaf.startswith("conv."):                    # only down- and upsampling have a layer called `conv`
        return f"{part}.{samples}.{leaf}"
    return f"{part}.{'attn' if leaf.split('.')[0] in ('norm', 'q', 'k', 'v', 'proj_out') else 'block'}.{i}.{leaf}"


def published_state_dict(unet: UNet) -> dict[str, Tensor]:
    """The U-Net's tensors under their published names."""
    return {published_name(name, unet.num_levels, unet.num_res_blocks): value
            for name, value in unet.state_dict().items()}


def diffusers_name(published: str, num_levels: int) -> str:
    """The name in diffusers' UNet2DModel: 'down.1.attn.0.q.bias' -> 'down_blocks.1.attentions.0.to_q.bias'.

    diffusers counts the decoder's levels from the innermost.
    """
    def level(match: re.Match[str]) -> str:
        return f"{match[1]}_blocks.{match[2] if match[1] == 'down' else num_levels - 1 - int(match[2])}"

    rules: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
        (r"temb\.dense\.0", "time_embedding.linear_1"), (r"temb\.dense\.1", "time_embedding.linear_2"),
        (r"norm_out", "conv_norm_out"), (r"mid\.block_1", "mid_block.resnets.0"),
        (r"mid\.block_2", "mid_block.resnets.1"), (r"mid\.attn_1", "mid_block.attentions.0"),
        (r"(down|up)\.(\d+)", level),
        (r"\.block\.(\d+)", r".resnets.\1"), (r"\.attn\.(\d+)", r".attentions.\1"),
        (r"\.(down|up)sample\.", r".\1samplers.0."), (r"temb_proj", "time_emb_proj"),
        (r"nin_shortcut", "conv_shortcut"), (r"(attentions\.\d+)\.norm", r"\1.group_norm"),
        (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."), (r"(attentions\.\d+)\.proj_out", r"\1.to_out.0")]
    for pattern, theirs in rules:
        published = re.sub(pattern, theirs, published)
    return published


def load_state_dict(unet: UNet, state_dict: dict[str, Tensor]) -> None:
    """Load tensors with their published names, or with the names of diffusers' UNet2DModel.

    Raises UserError that names every missing, extra or misshapen tensor; then the U-Net is unchanged.
    """
    def published(name: str) -> str:
        return published_name(name, unet.num_levels, unet.num_res_blocks)

    if any(name.startswith("down_blocks.") for name in state_dict):
        convolutions = {name: value[:, :, None, None] if ".attentions." in name and value.ndim == 2 else value
                        for name, value in in_todays_names(state_dict).items()}
        load_strict(unet, convolutions, lambda name: diffusers_name(published(name), unet.num_levels))
    else:
        load_strict(unet, state_dict, published)


def load_checkpoint(unet: UNet, path: Path, diffusion: Diffusion | None = None, ema: bool | None = None) -> None:
    """Load a checkpoint file, safetensors or a pickle.

    The public EMA files hold only the tensors. The DDIM training code writes a list [weights, optimizer, epoch, step,
    EMA weights], of which the last entry is taken. diffusion, ema: as in `run.weight_files.open_weights`.
    Raises UserError for a file that is missing, damaged, unsafe or another model's.
    """
    tensors = open_weights(path, "DDPM", diffusion, ema).tensors
    with named(path):
        load_state_dict(unet, tensors)


def load_unet(config: Config, path: Path, ema: bool | None = None) -> UNet:
    """The U-Net of a config with the weights of a checkpoint file, in evaluation mode, float32 on the CPU.

    Raises UserError for sizes that are not possible, and as `load_checkpoint` does.
    """
    with as_user_error(f"{config.name}: "):
        unet = UNet(**vars(config.unet))
    load_checkpoint(unet, path, config.diffusion, ema)
    return unet.eval().requires_grad_(False)


def diffusers_unet(config: Config, unet: UNet) -> nn.Module:
    """diffusers' U-Net with the weights of ours. Its attention has linear layers instead of 1x1 convolutions."""
    sizes = config.unet
    attends = [sizes.resolution >> level in sizes.attn_resolutions for level in range(len(sizes.ch_mult))]
    with torch.device("meta"):
        theirs = diffusers.UNet2DModel(
            sample_size=sizes.resolution, in_channels=sizes.in_channels, out_channels=sizes.out_channels,
            layers_per_block=sizes.num_res_blocks, block_out_channels=[sizes.ch * mult for mult in sizes.ch_mult],
            down_block_types=["AttnDownBlock2D" if level else "DownBlock2D" for level in attends],
            up_block_types=["AttnUpBlock2D" if level else "UpBlock2D" for level in reversed(attends)],
            downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6, attention_head_dim=None)
    theirs.load_state_dict(diffusers_state_dict(unet), assign=True)
    return theirs.eval().requires_grad_(False)


def diffusers_state_dict(unet: UNet) -> dict[str, Tensor]:
    """The U-Net's tensors under the names of diffusers' UNet2DModel, with attention weights as linear layers."""
    tensors = {}
    for published, value in published_state_dict(unet).items():
        name = diffusers_name(published, unet.num_levels)
        tensors[name] = value[:, :, 0, 0] if "attentions" in name and value.ndim == 4 else value
    return tensors
