"""The U-Net of Stable Diffusion 1.x and 2.x (Rombach et al., arXiv 2112.10752) and of SDXL (Podell et al., arXiv
2307.01952): LDM's, attending to a text's tokens.

What differs from LDM-4-G (ldm/unet.py) are sizes, and:
- attention has 8 heads in 1.x; heads of 64 channels, and linear layers around each transformer, in 2.x and SDXL;
- cross-attention is at the outer levels, not at the innermost one; in SDXL at the inner ones, not at the outermost one,
  and in several transformer blocks in a row;
- its norms are plain ones, and the papers' MACs count them all.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm import unet
from unet_caching.nest import Cache, Cond, nested_forward, no_cache

SIZES, SIZE_CHANNELS = 6, 256       # what SDXL is told of sizes, and the sinusoids of each of these numbers


class UNet(unet.UNet):
    """Stable Diffusion's noise (or v) predictor in the latent space. Arguments and call as in `ldm.unet.UNet`.

    v1.5: UNet(4, 4, 320, (1, 2, 4, 4), 2, (4, 2, 1), num_heads=8, context_dim=768).
    in_channels: 4; 9 for inpainting (latents, mask, masked latents), 5 with depth.
    """

    @staticmethod
    def norm(channels: int) -> nn.GroupNorm:
        return nn.GroupNorm(32, channels)


class XLUNet(UNet):
    """SDXL's, whose blocks know of the text as a whole and of sizes, too, beside the timestep.

    adm_in_channels: those of a text's summary, and SIZE_CHANNELS for each of SIZES numbers.
    Called `unet(x, t, context, pooled, sizes, cache)`: pooled [batch, adm_in_channels - SIZES * SIZE_CHANNELS]; sizes
    [batch, SIZES] in pixels: height and width of the original, top and left of the crop, height and width of the target
    (the paper's Section 2.2).
    """

    def __init__(self, *args: Any, adm_in_channels: int, **others: Any):
        super().__init__(*args, **others)
        emb = 4 * self.model_channels
        self.label_emb = nn.Sequential(nn.Sequential(nn.Linear(adm_in_channels, emb), nn.SiLU(), nn.Linear(emb, emb)))

    # What it is given beside x and t comes in one row, before the cache.
    def forward(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor,    # type: ignore[override]
                sizes: Tensor, cache: Cache = no_cache) -> Tensor:
        sinusoids = unet.timestep_embedding(sizes.flatten(), SIZE_CHANNELS)                  # [batch SIZES, channels]
        added = torch.cat([pooled, sinusoids.view(len(pooled), -1).to(pooled.dtype)], dim=1)  # [batch, adm_in_channels]
        cond = Cond(self.embedding(t) + self.label_emb(added), context, cache)
        h = nested_forward(x, self.input_blocks, self.middle_block, self.output_blocks, cond)
        return self.out(h)


def make(arguments: Mapping[str, Any]) -> UNet:
    """The U-Net of these arguments: SDXL's where they are. Raises ValueError."""
    return (XLUNet if "adm_in_channels" in arguments else UNet)(**arguments)
