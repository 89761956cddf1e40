"""The U-Net of Stable Diffusion 1.x and 2.x (Rombach et al., arXiv 2112.10752): LDM's, attending to a text's tokens.

What differs from LDM-4-G (ldm/unet.py) are sizes, and:
- attention has 8 heads in 1.x; heads of 64 channels, and linear layers around each transformer, in 2.x;
- cross-attention is at the outer levels, not at the innermost one;
- its norms are plain ones, and the papers' MACs count them all.
"""

from torch import nn

from ldm import unet


class UNet(unet.UNet):
    """Stable Diffusion's noise (or v) predictor in the latent space. Arguments and call as in `ldm.unet.UNet`.

    v1.5: UNet(4, 4, 320, (1, 2, 4, 4), 2, (4, 2, 1), num_heads=8, context_dim=768).
    in_channels: 4; 9 for inpainting (latents, mask, masked latents), 5 with depth.
    """

    @staticmethod
    def norm(channels: int) -> nn.GroupNorm:
        return nn.GroupNorm(32, channels)
