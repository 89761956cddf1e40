"""The names and sizes of LDM's and Stable Diffusion's U-Nets in diffusers, derived from their structure."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.unet import Downsample, ResBlock, SpatialTransformer, UNet
from run.families import Config
from run.libraries import diffusers
from unet_caching.nest import Upsample

_RES_BLOCK = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
              "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}


def diffusers_names(unet: UNet) -> dict[str, str]:
    """Our tensor names -> diffusers', from the structure of this U-Net.

    'input_blocks.4.0.in_layers.2.weight' -> 'down_blocks.1.resnets.0.conv1.weight' in v1.5. A level of the encoder
    ends with its downsampling, a level of the decoder with its upsampling. ResNet blocks and transformers are counted
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
    """The U-Net's tensors, not copied, under diffusers' names."""
    names = diffusers_names(unet)
    return {names[name]: value for name, value in unet.state_dict().items()}


_DOWN = {True: "CrossAttnDownBlock2D", False: "DownBlock2D"}        # with cross-attention, without
_UP = {True: "CrossAttnUpBlock2D", False: "UpBlock2D"}
_NO_DIFFERENCE = ("sample_size", "dropout", "upcast_attention", "addition_embed_type_num_heads")    # to the output


def differences(config: Mapping, arguments: Mapping) -> list[tuple[str, object, object]]:
    """Where a config of diffusers' UNet2DConditionModel differs from our UNet of these arguments.

    Returns (key, its value, expected value) for each difference. Missing keys have diffusers' defaults.
    """
    parameters = inspect.signature(diffusers.UNet2DConditionModel).parameters
    known = {name: parameter.default for name, parameter in parameters.items()}
    expected = known | diffusers_arguments(arguments) | {"_class_name": "UNet2DConditionModel"}
    values = known | {key: value for key, value in config.items() if key in expected or not key.startswith("_")}
    return [(key, value, expected.get(key)) for key, value in values.items() if key not in _NO_DIFFERENCE
            and (_one(value) or None) != (_one(expected.get(key)) or None)]


def diffusers_arguments(arguments: Mapping) -> dict:
    """The arguments of diffusers' UNet2DConditionModel that correspond to those of our UNet.

    Despite its name, attention_head_dim is the number of heads in diffusers: 8 in 1.x, (5, 10, 20, 20) in 2.x.
    """
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
            **({} if arguments.get("adm_in_channels") is None else {
                "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
                "transformer_layers_per_block": list(arguments["transformer_depth"]),
                "projection_class_embeddings_input_dim": arguments["adm_in_channels"]})}


def _one(value: object) -> object:
    """The entry of a list whose entries are all equal; any other value unchanged."""
    if not isinstance(value, list | tuple):
        return value
    return value[0] if value and value.count(value[0]) == len(value) else list(value)


def diffusers_unet(config: Config, unet: UNet, **more: Any) -> diffusers.UNet2DConditionModel:
    """diffusers' U-Net with the weights of ours. config: LDM's or Stable Diffusion's. more: arguments of its class."""
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(**diffusers_arguments(config.unet_arguments), **more)
    theirs.load_state_dict(diffusers_state_dict(unet), assign=True)
    return theirs.eval().requires_grad_(False)
