"""The MACs of BK-SDM's U-Nets (Kim et al., arXiv 2305.15798), which are Stable Diffusion with blocks removed.

Sizes: the config.json files of github Nota-NetsPresso/BK-SDM, src/unet_config; all else is Stable Diffusion v1's.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from eval.cost.macs import Macs, count

_SIZES: dict[str, dict[str, Any]] = {
    "base": {"layers_per_block": 1},
    "small": {"layers_per_block": 1, "mid_block_type": None},
    "tiny": {"layers_per_block": 1, "mid_block_type": None, "block_out_channels": (320, 640, 1280),
             "down_block_types": ("CrossAttnDownBlock2D",) * 3, "up_block_types": ("CrossAttnUpBlock2D",) * 3},
}


def build(size: str) -> nn.Module:
    """diffusers' U-Net of a size, base, small or tiny, on the meta device. Raises KeyError for any other."""
    from diffusers import UNet2DConditionModel  # here: the import takes seconds
    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, in_channels=4, out_channels=4, cross_attention_dim=768,
                                    attention_head_dim=8, **_SIZES[size])


def size_of(layout: Mapping[str, Any]) -> str | None:
    """The size of a U-Net by its diffusers config in run.json; None for any other U-Net."""
    def layers(config: Mapping[str, Any]) -> tuple[Any, ...]:
        return (config.get("layers_per_block", 2), config.get("mid_block_type", "UNetMidBlock2DCrossAttn"),
                tuple(config.get("block_out_channels", (320, 640, 1280, 1280))))

    return next((size for size, config in _SIZES.items() if layers(config) == layers(layout)), None)


@cache
def step_macs(size: str) -> Macs:
    """The MACs of one step for a 512x512 image and 77 tokens of text, one row of the batch."""
    unet = build(size)
    with torch.device("meta"):
        x, t, context = torch.zeros(1, 4, 64, 64), torch.zeros(1, dtype=torch.long), torch.zeros(1, 77, 768)
    return count(lambda: unet(x, t, context))
