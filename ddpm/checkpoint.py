"""Loading and saving DDPM weights under their published names.

The public checkpoints (pytorch DDIM code, used by DeepCache's release) name levels from the outermost:
`down.1.block.0`, `mid.attn_1`, `up.1.block.2`. Our U-Net is a nest of blocks, so names are rewritten by rule; every
tensor is kept.
"""

import re
from pathlib import Path

from torch import Tensor

from ddpm.config import Config
from ddpm.unet import UNet
from runs.errors import UserError, as_user_error
from runs.weights import load_strict, read_tensors

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
    assert match, f"{name} is no tensor of this U-Net"
    side, block, leaf = match.groups()
    if side == "input":     # after conv_in, each level has its ResNet blocks and then a downsampling
        level, i = divmod(int(block) - 1, num_res_blocks + 1)
        part, samples = f"down.{level}", "downsample"
    else:                   # from the innermost level out
        level, i = divmod(int(block), num_res_blocks + 1)
        part, samples = f"up.{num_levels - 1 - level}", "upsample"
    if leaf.startswith("conv."):                    # only the layers that resample have a bare `conv`
        return f"{part}.{samples}.{leaf}"
    return f"{part}.{'attn' if leaf.split('.')[0] in ('norm', 'q', 'k', 'v', 'proj_out') else 'block'}.{i}.{leaf}"


def published_state_dict(unet: UNet) -> dict[str, Tensor]:
    """The U-Net's tensors under their published names."""
    return {published_name(name, unet.num_levels, unet.num_res_blocks): value
            for name, value in unet.state_dict().items()}


def load_state_dict(unet: UNet, state_dict: dict[str, Tensor]) -> None:
    """Load tensors given under their published names.

    Raises UserError that names every missing, extra or misshapen tensor; the U-Net is left untouched then.
    """
    load_strict(unet, state_dict, lambda name: published_name(name, unet.num_levels, unet.num_res_blocks))


def load_checkpoint(unet: UNet, path: Path) -> None:
    """Load a whole checkpoint file: .safetensors, or .ckpt / .pt / .pth holding the EMA weights.

    The public EMA files hold the tensors alone. The DDIM training code writes a list [weights, optimizer, epoch, step,
    EMA weights]; its last entry is taken. A `module.` prefix of data-parallel training is dropped.
    Raises UserError for a file that is missing, damaged, unsafe or of another model.
    """
    load_state_dict(unet, ema_weights(read_tensors(path), path))


def load_unet(config: Config, path: Path) -> UNet:
    """The U-Net of a config with the weights of a checkpoint file, in evaluation mode, float32 on the CPU.

    Raises UserError for sizes that cannot be, and as `load_checkpoint`.
    """
    with as_user_error(f"{config.name}: "):
        unet = UNet(**vars(config.unet))
    load_checkpoint(unet, path)
    return unet.eval().requires_grad_(False)


def ema_weights(content: object, path: Path) -> dict[str, Tensor]:
    """The EMA weights in the content of a checkpoint file. Raises UserError where there are none."""
    if isinstance(content, list):
        if len(content) < 5 or not isinstance(content[-1], dict):
            raise UserError(f"{path} is a list of {len(content)} parts without EMA weights at its end: the DDIM "
                            "training code writes [weights, optimizer, epoch, step, EMA weights]")
        content = content[-1]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} does not hold named tensors, as a DDPM checkpoint does")
    return {name.removeprefix("module."): value for name, value in content.items()}
