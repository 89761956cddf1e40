"""The U-Net of Stable Diffusion 1.x and 2.x (Rombach et al., arXiv 2112.10752) and of SDXL (Podell et al., arXiv
2307.01952): LDM's, with attention to a text's tokens.

It differs from LDM-4-G (ldm/unet.py) in its sizes and in this:
- attention has 8 heads in 1.x. In 2.x and SDXL heads have 64 channels, and each transformer has linear projections;
- cross-attention is at all levels but the innermost. In SDXL it is at all levels but the outermost, in several
  transformer blocks in a row;
- norms are plain ones, and the papers' MACs count them all.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm import unet
from unet_caching.nest import Cache, Cond, nested_forward, no_cache

SIZES, SIZE_CHANNELS = 6, 256       # the numbers of SDXL's micro-conditioning, and the sinusoids of each


class UNet(unet.UNet):
    """Stable Diffusion's noise (or v) predictor in the latent space. Arguments and call as in `ldm.unet.UNet`.

    v1.5: UNet(4, 4, 320, (1, 2, 4, 4), 2, (4, 2, 1), num_heads=8, context_dim=768).
    in_channels: 4; 9 for inpainting (latents, mask, masked latents), 5 with depth.
    """

    @staticmethod
    def norm(channels: int) -> nn.GroupNorm:
        return nn.GroupNorm(32, channels)


class XLUNet(UNet):
    """SDXL's U-Net, whose blocks also get an embedding of the whole text and of sizes, beside the timestep's.

    adm_in_channels: the channels of the text's pooled embedding, and SIZE_CHANNELS for each of SIZES numbers.
    Called `unet(x, t, context, pooled, sizes, cache)`: pooled [batch, adm_in_channels - SIZES * SIZE_CHANNELS]; sizes
    [batch, SIZES] in pixels: height and width of the original, top and left of the crop, height and width of the target
    (the paper's Section 2.2).
    """

    def __init__(self, *args: Any, adm_in_channels: int, **others: Any):
        super().__init__(*args, **others)
        emb = 4 * self.model_channels
        self.label_emb = nn.Sequential(nn.Sequential(nn.Linear(adm_in_channels, emb), nn.SiLU(), nn.Linear(emb, emb)))

    # All inputs beside x and t come before the cache.
    def forward(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor,    # type: ignore[override]
                sizes: Tensor, cache: Cache = no_cache) -> Tensor:
        sinusoids = unet.timestep_embedding(sizes.flatten(), SIZE_CHANNELS)                  # [batch SIZES, channels]
        added = torch.cat([pooled, sinusoids.view(len(pooled), -1).to(pooled.dtype)], dim=1)  # [batch, adm_in_channels]
        cond = Cond(self.embedding(t) + self.label_emb(added), context, cache)
        h = nested_forward(x, self.input_blocks, self.middle_block, self.output_blocks, cond)
        return self.out(h)


def make(arguments: Mapping[str, Any]) -> UNet:
    """The U-Net of these arguments, SDXL's if they have adm_in_channels. Raises ValueError."""
    return (XLUNet if "adm_in_channels" in arguments else UNet)(**arguments)
