"""A U-Net as nested levels, with one place where a feature can be reused.

    level_k(x) = up_k(cat(level_{k+1}(s_k), s_k))        s_k = down_k(x)

The plain forward and every cached forward are the same lines: a cache is asked for each value that it may keep,
together with the way to compute it. DeepCache keeps the result of one level, Block Caching keeps residuals.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Cache = Callable[[Hashable, Callable[[], Tensor]], Tensor]
Network = Callable[..., Tensor]         # network(x, t, *context, cache=cache): a U-Net, or what stands in for one
WHOLE = -1                              # the key of all levels together, of which the head makes the output


def no_cache(key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
    """Compute every value: the cache that keeps nothing."""
    return compute()


class Cond(NamedTuple):
    """What every block needs besides its input.

    emb: [batch, channels], the embedding of the timestep (and of whatever else the model adds to it).
    context: [batch, tokens, channels], what cross-attention attends to, or None.
    cache: `cache(key, compute) -> Tensor`. Keys are the skip index k for the inner level that the decoder block of
        skip k concatenates, and the module's name for a residual.
    """
    emb: Tensor
    context: Tensor | None = None
    cache: Cache = no_cache


class Residual(nn.Module):
    """x -> shortcut(x) + residual(x). The residual is what Block Caching reuses.

    Subclasses define `residual(x, cond)`, and `shortcut` where the input needs a projection.
    `key` is the module's name in its U-Net, set by `name_residuals`. `kind`: "resnet", or "transformer" for attention
    with all that surrounds it. The attention layers inside a transformer go through the cache too, as "attention".
    """
    key = ""
    kind = "resnet"

    def shortcut(self, x: Tensor) -> Tensor:
        return x

    def residual(self, x: Tensor, cond: Cond) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, cond: Cond) -> Tensor:
        return self.shortcut(x) + cond.cache(self.key, lambda: self.residual(x, cond))


class Upsample(nn.Module):
    """Double height and width, or go to `size`: one less, where a level of odd size was halved."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        factor = 2.0 if size is None else None
        return self.conv(F.interpolate(x, size=size, scale_factor=factor, mode="nearest"))


class Block(nn.Sequential):
    """Layers in sequence; the residual ones are given the conditioning too, an upsampling its height and width."""

    # nn.Sequential's own forward takes one argument alone.
    def forward(self, x: Tensor, cond: Cond, size: Sequence[int] | None = None) -> Tensor:  # type: ignore[override]
        for layer in self:
            if isinstance(layer, Residual):
                x = layer(x, cond)
            else:
                x = layer(x, size) if isinstance(layer, Upsample) else layer(x)
        return x


def nest(x: Tensor, down: Sequence[Callable[[Tensor], Tensor]], middle: Callable[[Tensor], Tensor],
         up: Sequence[Callable[[Tensor, Tensor, torch.Size], Tensor]], cache: Cache,
         control: Sequence[Tensor] | None = None) -> Tensor:
    """Run a U-Net, before its head, whose encoder part k makes skip k and whose decoder part k takes it.

    up: each is given the inner level, the skip, and the height and width of the level above, which it returns.
    control: what a ControlNet (arXiv 2302.05543) adds to each skip where the decoder takes it, in the order of the
    skips, and then to the middle's output; or None.
    Source: DeepCache (arXiv 2312.00858), Section 3.2: a reused level leaves only the parts around it to run.
    """
    def level(k: int, x: Tensor) -> Tensor:
        if k == len(down):
            return controlled(middle(x), k)
        skip = down[k](x)
        inner = cache(k, lambda: level(k + 1, skip))            # what decoder part k concatenates
        return up[k](inner, controlled(skip, k), x.shape[-2:])

    def controlled(x: Tensor, k: int) -> Tensor:
        return x if control is None else x + control[k]

    return cache(WHOLE, lambda: level(0, x))


def nested_forward(x: Tensor, input_blocks: nn.ModuleList, middle_block: Block, output_blocks: nn.ModuleList,
                   cond: Cond) -> Tensor:
    """Run a U-Net whose output block -1-k concatenates the output of input block k (its skip k). Both are `Block`s.

    x: [batch, in_channels, height, width] -> [batch, channels, height, width], before the head. Any height and width:
    each level returns the size that it was given.
    """
    def down(block: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: block(x, cond)

    def up(block: nn.Module) -> Callable[[Tensor, Tensor, torch.Size], Tensor]:
        return lambda inner, skip, size: block(torch.cat([inner, skip], dim=1), cond, size)

    return nest(x, [down(block) for block in input_blocks], down(middle_block),
                [up(block) for block in reversed(output_blocks)], cond.cache)
