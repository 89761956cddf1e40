"""The U-Net of latent diffusion (Rombach et al., arXiv 2112.10752), as in the public LDM-4-G checkpoint cin256-v2."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet_caching.nest import Block, Cache, Cond, Residual, nested_forward, no_cache
from unet_caching.unet import NestedUNet


def timestep_embedding(t: Tensor, channels: int) -> Tensor:
    """Cosines, then sines, of t at frequencies from 1 to nearly 1/10000: [batch] -> [batch, channels]."""
    half = channels // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(exponents * -(math.log(10000) / half))
    angles = t.float()[:, None] * frequencies                            # [batch, half]
    return torch.cat([angles.cos(), angles.sin()], dim=1)                # [batch, channels]


class GroupNorm32(nn.GroupNorm):
    """The norm of ResNet blocks and of the output head. The released code also has a class of its own for it. That
    code's MAC counter goes by exact class, so it leaves this norm out, and the papers' numbers depend on that.
    """

    def __init__(self, channels: int):
        super().__init__(32, channels)


class ResBlock(Residual):
    def __init__(self, in_channels: int, out_channels: int, emb_channels: int, dropout: float,
                 norm: Callable[[int], nn.Module] = GroupNorm32):
        super().__init__()
        self.in_layers = nn.Sequential(norm(in_channels), nn.SiLU(),
                                       nn.Conv2d(in_channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(norm(out_channels), nn.SiLU(),
                                        nn.Dropout(dropout) if dropout else nn.Identity(),
                                        nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip_connection = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def shortcut(self, x: Tensor) -> Tensor:
        return self.skip_connection(x)

    def residual(self, x: Tensor, cond: Cond) -> Tensor:
        h = self.in_layers(x)                                            # [batch, out, height, width]
        h = h + self.emb_layers(cond.emb)[:, :, None, None]
        return self.out_layers(h)


class Attention(nn.Module):
    """Attention from x to the context, or to x itself without a context."""
    key, kind = "", "attention"

    def __init__(self, channels: int, num_heads: int, context_channels: int):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels), nn.Identity())    # published as to_out.0

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)        # [batch, heads, tokens, width]
                   for tokens in (self.to_q(x), self.to_k(context), self.to_v(context)))
        h = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(h.transpose(1, 2).flatten(2))                             # [batch, tokens, channels]


class GEGLU(nn.Module):
    """One half of a projection times the GELU (exact, not the tanh approximation) of the other half."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    def __init__(self, channels: int, num_heads: int, context_dim: int):
        super().__init__()
        self.attn1 = Attention(channels, num_heads, channels)
        self.ff = FeedForward(channels)
        self.attn2 = Attention(channels, num_heads, context_dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))

    def forward(self, x: Tensor, cond: Cond) -> Tensor:
        x = x + cond.cache(self.attn1.key, lambda: self.attn1(self.norm1(x)))
        x = x + cond.cache(self.attn2.key, lambda: self.attn2(self.norm2(x), cond.context))
        return x + self.ff(self.norm3(x))


class SpatialTransformer(Residual):
    """Transformer blocks over the pixels of a feature map, between two 1x1 convolutions or two linear layers."""
    kind = "transformer"

    def __init__(self, channels: int, num_heads: int, context_dim: int, linear: bool = False, depth: int = 1):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, num_heads, context_dim)
                                                for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.linear = linear

    def residual(self, x: Tensor, cond: Cond) -> Tensor:
        h = self.norm(x)
        if not self.linear:
            h = self.proj_in(h)
        tokens = h.flatten(2).transpose(1, 2)                            # [batch, pixels, channels]
        if self.linear:
            tokens = self.proj_in(tokens)
        for block in self.transformer_blocks:
            tokens = block(tokens, cond)
        if self.linear:
            tokens = self.proj_out(tokens)
        h = tokens.transpose(1, 2).reshape(x.shape)
        return h if self.linear else self.proj_out(h)


class Downsample(nn.Module):
    """Halves height and width."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class UNet(NestedUNet):
    """LDM's noise predictor in the latent space.

    model_channels, channel_mult: channels of level i are model_channels * channel_mult[i].
    attention_resolutions: downsampling factors (1 = the latents' size) at which a SpatialTransformer follows each
    ResNet block; the middle always has one. context_dim: channels of each context token.
    num_heads: of every attention. num_head_channels: the width of a head, instead of a fixed number of heads.
    linear_projections: whether a SpatialTransformer's projections are linear layers instead of 1x1 convolutions.
    transformer_depth: transformer blocks per SpatialTransformer, by level; the middle's as the last. None: 1.

    `unet(x, t, context, cache)`: x [batch, in_channels, height, width], t [batch], context
    [batch, tokens, context_dim] -> [batch, out_channels, height, width].
    Modules have the published names. `num_branches`: the number of skip connections; branch is from 0 to
    num_branches - 1.
    Raises ValueError for channels that 32 groups or the heads do not divide, and for a wrong number of depths.
    """
    norm: Callable[[int], nn.Module] = GroupNorm32      # of ResNet blocks and of the output head

    def __init__(self, in_channels: int, out_channels: int, model_channels: int, channel_mult: Sequence[int],
                 num_res_blocks: int, attention_resolutions: Sequence[int], num_heads: int, context_dim: int,
                 num_head_channels: int | None = None, linear_projections: bool = False, dropout: float = 0.0,
                 transformer_depth: Sequence[int] | None = None):
        super().__init__()
        if model_channels % 32:
            raise ValueError(f"model_channels must be a multiple of 32 (GroupNorm has 32 groups), got {model_channels}")
        divisor, what = ((num_heads, f"{num_heads} heads do") if num_head_channels is None else
                         (num_head_channels, f"heads of {num_head_channels} channels do"))
        if any(model_channels * mult % divisor for mult in channel_mult):
            raise ValueError(f"{what} not divide model_channels {model_channels} times {channel_mult}")
        depths = [1] * len(channel_mult) if transformer_depth is None else list(transformer_depth)
        if len(depths) != len(channel_mult):
            raise ValueError(f"transformer_depth {depths} and channel_mult {list(channel_mult)} must have equal length")
        self.model_channels, emb = model_channels, 4 * model_channels
        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb), nn.SiLU(), nn.Linear(emb, emb))

        def transformer(channels: int, level: int) -> SpatialTransformer:
            heads = num_heads if num_head_channels is None else channels // num_head_channels
            return SpatialTransformer(channels, heads, context_dim, linear_projections, depths[level])

        def res_block(in_channels: int, out_channels: int, level: int) -> Block:
            block = Block(ResBlock(in_channels, out_channels, emb, dropout, self.norm))
            if 2 ** level in attention_resolutions:
                block.append(transformer(out_channels, level))
            return block

        widths = [model_channels * mult for mult in channel_mult]
        self.add_blocks(nn.Conv2d(in_channels, model_channels, 3, padding=1), widths, num_res_blocks, res_block,
                        Downsample, lambda channels: Block(
                            ResBlock(channels, channels, emb, dropout, self.norm), transformer(channels, -1),
                            ResBlock(channels, channels, emb, dropout, self.norm)))
        self.out = nn.Sequential(self.norm(widths[0]), nn.SiLU(), nn.Conv2d(widths[0], out_channels, 3, padding=1))

    def embedding(self, t: Tensor) -> Tensor:
        """The embedding of the timestep: [batch] -> [batch, 4 model_channels]."""
        sinusoid = timestep_embedding(t, self.model_channels)                            # [batch, model_channels]
        return self.time_embed(sinusoid.to(next(self.time_embed.parameters()).dtype))

    def forward(self, x: Tensor, t: Tensor, context: Tensor, cache: Cache = no_cache) -> Tensor:
        cond = Cond(self.embedding(t), context, cache)
        h = nested_forward(x, self.input_blocks, self.middle_block, self.output_blocks, cond)
        return self.out(h)
