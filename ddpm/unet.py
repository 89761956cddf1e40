"""The U-Net of DDPM (Ho et al., arXiv 2006.11239), as in the public CIFAR-10 and LSUN checkpoints."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet_caching.nest import Block, Cache, Cond, Residual, nested_forward, no_cache
from unet_caching.unet import NestedUNet


def timestep_embedding(t: Tensor, channels: int) -> Tensor:
    """Sines, then cosines, of t at frequencies from 1 to 1/10000: [batch] -> [batch, channels]."""
    half = channels // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(exponents * -(math.log(10000) / (half - 1)))
    angles = t.float()[:, None] * frequencies                            # [batch, half]
    return torch.cat([angles.sin(), angles.cos()], dim=1)                # [batch, channels]


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(Residual):
    def __init__(self, in_channels: int, out_channels: int, emb_channels: int, dropout: float):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.temb_proj = nn.Linear(emb_channels, out_channels)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def shortcut(self, x: Tensor) -> Tensor:
        return self.nin_shortcut(x)

    def residual(self, x: Tensor, cond: Cond) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))                            # [batch, out, height, width]
        h = h + self.temb_proj(cond.emb)[:, :, None, None]
        return self.conv2(self.dropout(F.silu(self.norm2(h))))


class AttentionBlock(Residual):
    """Self-attention over the pixels, with one head and 1x1 convolutions as projections."""
    kind = "transformer"

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def residual(self, x: Tensor, cond: Cond) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))   # [batch, pixels, ch]
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halves height and width. It pads only below and to the right, as in the published checkpoints."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class UNet(NestedUNet):
    """DDPM's noise predictor.

    resolution: height and width of the images, in pixels. ch, ch_mult: channels of level i are ch * ch_mult[i].
    attn_resolutions: sizes in pixels at which attention follows each ResNet block; the middle always has it.

    `unet(x, t, cache)`: x [batch, in_channels, resolution, resolution], t [batch] -> [batch, out_channels, ...].
    `num_branches`: the number of skip connections; branch is from 0 to num_branches - 1.
    Raises ValueError for sizes that cannot be halved often enough, and for channels that 32 groups do not divide.
    """

    def __init__(self, resolution: int, in_channels: int, out_channels: int, ch: int, ch_mult: Sequence[int],
                 num_res_blocks: int, attn_resolutions: Sequence[int], dropout: float = 0.0):
        super().__init__()
        if resolution % 2 ** (len(ch_mult) - 1):
            raise ValueError(f"resolution {resolution} cannot be halved {len(ch_mult) - 1} times, "
                             f"as ch_mult {list(ch_mult)} asks")
        if ch % 32:
            raise ValueError(f"ch must be a multiple of 32 (GroupNorm has 32 groups), got {ch}")
        self.ch, self.num_levels, self.num_res_blocks = ch, len(ch_mult), num_res_blocks
        emb = 4 * ch
        self.embed = nn.Sequential(nn.Linear(ch, emb), nn.SiLU(), nn.Linear(emb, emb), nn.SiLU())

        def res_block(in_channels: int, out_channels: int, level: int) -> Block:
            block = Block(ResnetBlock(in_channels, out_channels, emb, dropout))
            if resolution >> level in attn_resolutions:
                block.append(AttentionBlock(out_channels))
            return block

        self.add_blocks(nn.Conv2d(in_channels, ch, 3, padding=1), [ch * mult for mult in ch_mult], num_res_blocks,
                        res_block, Downsample, lambda channels: Block(
                            ResnetBlock(channels, channels, emb, dropout), AttentionBlock(channels),
                            ResnetBlock(channels, channels, emb, dropout)))
        width = ch * ch_mult[0]
        self.out = nn.Sequential(group_norm(width), nn.SiLU(), nn.Conv2d(width, out_channels, 3, padding=1))

    def embedding(self, t: Tensor) -> Tensor:
        """The embedding of the timestep: [batch] -> [batch, 4 ch], activated once for all blocks."""
        sinusoid = timestep_embedding(t, self.ch)                                            # [batch, ch]
        return self.embed(sinusoid.to(next(self.embed.parameters()).dtype))

    def forward(self, x: Tensor, t: Tensor, cache: Cache = no_cache) -> Tensor:
        cond = Cond(self.embedding(t), cache=cache)
        h = nested_forward(x, self.input_blocks, self.middle_block, self.output_blocks, cond)
        return self.out(h)
