"""The names and sizes of LDM's and Stable Diffusion's U-Net in diffusers, which follow from its structure by rule."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.unet import Downsample, ResBlock, SpatialTransformer, UNet
from run.families import Config
from run.libraries import diffusers
from unet_caching.errors import UserError
from unet_caching.nest import Upsample

_RES_BLOCK = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
              "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}


def diffusers_names(unet: UNet) -> dict[str, str]:
    """Our tensor names -> diffusers', from the structure of this U-Net.

    'input_blocks.4.0.in_layers.2.weight' -> 'down_blocks.1.resnets.0.conv1.weight' in v1.5: a level of the encoder
    ends with its downsampling, one of the decoder with its upsampling; ResNet blocks and transformers are counted
    within a level.
    """
    modules = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
               "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
               "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"}
    for side, theirs in (("input_blocks", "down_blocks.{}"), ("middle_block", "mid_block"),
                         ("output_blocks", "up_blocks.{}")):
        level = resnets = attentions = 0
        for name, module in unet.get_submodule(side).named_modules(prefix=side):
            place = theirs.format(level)
            if isinstance(module, ResBlock):
                modules |= {f"{name}.{part}": f"{place}.resnets.{resnets}.{new}" for part, new in _RES_BLOCK.items()}
                resnets += 1
            elif isinstance(module, SpatialTransformer):
                modules[name] = f"{place}.attentions.{attentions}"
                attentions += 1
            elif isinstance(module, Downsample | Upsample):
                modules |= {f"{name}.op": f"{place}.downsamplers.0.conv", f"{name}.conv": f"{place}.upsamplers.0.conv"}
                level, resnets, attentions = level + 1, 0, 0

    def rename(tensor: str) -> str:
        module = tensor
        while module not in modules:
            module = module.rpartition(".")[0]
        return modules[module] + tensor.removeprefix(module)
    return {tensor: rename(tensor) for tensor in unet.state_dict()}


def diffusers_state_dict(unet: UNet) -> dict[str, Tensor]:
    """The U-Net's own tensors, not copies, under diffusers' names."""
    names = diffusers_names(unet)
    return {names[name]: value for name, value in unet.state_dict().items()}


_DOWN = {True: "CrossAttnDownBlock2D", False: "DownBlock2D"}        # with cross-attention, without
_UP = {True: "CrossAttnUpBlock2D", False: "UpBlock2D"}
_READ = ("in_channels", "out_channels", "block_out_channels", "layers_per_block", "cross_attention_dim",
         "attention_head_dim", "use_linear_projection", "down_block_types", "up_block_types")
_READ_XL = ("transformer_layers_per_block", "projection_class_embeddings_input_dim")
_XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
_NO_DIFFERENCE = ("sample_size", "dropout", "upcast_attention", "addition_embed_type_num_heads")     # to the function


def unet_arguments(config: Mapping) -> dict:
    """The arguments of our UNet for a config of diffusers' UNet2DConditionModel; SDXL's own only where it is one.

    attention_head_dim is the number of heads there, whatever its name says: 8 in 1.x, (5, 10, 20, 20) in 2.x.
    Raises UserError, naming key and value, for a config of another architecture: each key that changes the function
    must have diffusers' default, which is Stable Diffusion's.
    """
    parameters = inspect.signature(diffusers.UNet2DConditionModel).parameters
    known = {name: parameter.default for name, parameter in parameters.items()}
    given = known | {key: _one(value) for key, value in config.items() if not key.startswith("_")}
    if config.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        raise UserError(f"{config['_class_name']} is not the U-Net of Stable Diffusion, which is UNet2DConditionModel")
    xl = given["addition_embed_type"] == "text_time"
    expected, read = known | (_XL if xl else {}), (*_READ, *(_READ_XL if xl else ()), *_NO_DIFFERENCE)
    other = [f"{key} is {value!r} and should be {expected.get(key)!r}" for key, value in given.items()
             if key not in read and (value or None) != (expected.get(key) or None)]
    if other:
        raise UserError(f"not the U-Net of {'SDXL' if xl else 'Stable Diffusion 1.x or 2.x'}: {'; '.join(other)}")

    channels = config.get("block_out_channels", known["block_out_channels"])
    if not isinstance(channels, list | tuple) or any(width % channels[0] for width in channels):
        raise UserError(f"block_out_channels is {channels} and should be multiples of the first")
    levels = len(channels)
    downs, ups, heads = (_per_level(given[key], levels)
                         for key in ("down_block_types", "up_block_types", "attention_head_dim"))
    attends = [name == _DOWN[True] for name in downs]
    if len(downs) != levels or downs != [_DOWN[level] for level in attends] \
            or ups != [_UP[level] for level in reversed(attends)]:
        raise UserError(f"not the U-Net of Stable Diffusion 1.x or 2.x: down_block_types {downs}, up_block_types {ups}")
    width = channels[0] // heads[0]
    if len(set(heads)) > 1 and heads != [channel // width for channel in channels]:
        raise UserError(f"attention_head_dim is {heads}: neither the number of heads nor their width is the same "
                        "everywhere")
    for key in ("layers_per_block", "cross_attention_dim", *(("projection_class_embeddings_input_dim",) * xl)):
        if not isinstance(given[key], int):
            raise UserError(f"{key} is {given[key]!r} and should be one number")
    return {"in_channels": given["in_channels"], "out_channels": given["out_channels"], "model_channels": channels[0],
            "channel_mult": [width // channels[0] for width in channels], "num_res_blocks": given["layers_per_block"],
            "attention_resolutions": [2 ** level for level in reversed(range(levels)) if attends[level]],
            "num_heads": heads[0], "context_dim": given["cross_attention_dim"],
            "num_head_channels": width if len(set(heads)) > 1 else None,
            "linear_projections": given["use_linear_projection"],
            **({"transformer_depth": _per_level(given["transformer_layers_per_block"], levels),
                "adm_in_channels": given["projection_class_embeddings_input_dim"]} if xl else {})}


def diffusers_arguments(arguments: Mapping) -> dict:
    """The arguments of diffusers' UNet2DConditionModel for those of our UNet: the inverse of `unet_arguments`."""
    channels = [arguments["model_channels"] * mult for mult in arguments["channel_mult"]]
    attends = [2 ** level in arguments["attention_resolutions"] for level in range(len(channels))]
    width = arguments.get("num_head_channels")
    return {"in_channels": arguments["in_channels"], "out_channels": arguments["out_channels"],
            "block_out_channels": channels, "layers_per_block": arguments["num_res_blocks"],
            "down_block_types": [_DOWN[level] for level in attends],
            "up_block_types": [_UP[level] for level in reversed(attends)],
            "cross_attention_dim": arguments["context_dim"],
            "attention_head_dim": [c // width for c in channels] if width else arguments["num_heads"],
            "use_linear_projection": arguments.get("linear_projections", False),
            **({} if arguments.get("adm_in_channels") is None else _XL | {
                "transformer_layers_per_block": list(arguments["transformer_depth"]),
                "projection_class_embeddings_input_dim": arguments["adm_in_channels"]})}


def _one(value: object) -> object:
    """The entry of a list that has the same one for each level; any other value as it is."""
    return value[0] if isinstance(value, list | tuple) and value and value.count(value[0]) == len(value) else value


def _per_level(value: object, levels: int) -> list:
    """One entry for each level."""
    return list(value) if isinstance(value, list | tuple) else [value] * levels


def diffusers_unet(config: Config, unet: UNet, **more: Any) -> diffusers.UNet2DConditionModel:
    """diffusers' U-Net on the very weights of ours. config: of LDM or Stable Diffusion. more: for its class."""
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(**diffusers_arguments(config.unet_arguments), **more)
    theirs.load_state_dict(diffusers_state_dict(unet), assign=True)
    return theirs.eval().requires_grad_(False)
