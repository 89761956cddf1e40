"""A U-Net as nested levels, with one place where a feature can be reused.

    level_k(x) = up_k(cat(level_{k+1}(s_k), s_k))        s_k = down_k(x)

The plain forward and every cached forward are the same lines. They ask a cache for each value that it may keep, and
give it a function that computes the value. DeepCache keeps the result of one level, Block Caching keeps residuals.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Cache = Callable[[Hashable, Callable[[], Tensor]], Tensor]
Network = Callable[..., Tensor]         # network(x, t, *context, cache=cache): a U-Net, or a function that replaces it
WHOLE = -1                              # the key of the result of all levels, which the output head takes


def no_cache(key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
    """The cache that keeps nothing: it computes every value."""
    return compute()


class Cond(NamedTuple):
    """What every block needs besides its input.

    emb: [batch, channels], the embedding of the timestep, and of what else the model adds to it.
    context: [batch, tokens, channels] for cross-attention, or None.
    cache: `cache(key, compute) -> Tensor`. The key of a residual is its module's name. The key of a level is the skip
        index k whose decoder block concatenates the level's result.
    """
    emb: Tensor
    context: Tensor | None = None
    cache: Cache = no_cache


class Residual(nn.Module):
    """x -> shortcut(x) + residual(x). The residual is what Block Caching reuses.

    Subclasses define `residual(x, cond)`, and `shortcut` if the input needs a projection.
    `key` is the module's name in its U-Net, set by `name_residuals`. `kind` is "resnet", or "transformer" for a whole
    transformer. The attention layers inside a transformer may be cached, too, as "attention".
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
    """Doubles height and width, or resizes to `size`, which is one less for a level of odd size."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        factor = 2.0 if size is None else None
        return self.conv(F.interpolate(x, size=size, scale_factor=factor, mode="nearest"))


class Block(nn.Sequential):
    """Layers in sequence. Residual ones also get the conditioning, an upsampling its height and width."""

    # nn.Sequential's own forward takes only one argument.
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
    """Run a U-Net up to its output head. Encoder part k makes skip k, and decoder part k takes it.

    up: each gets the inner level, the skip, and the height and width of the level above, to which it returns.
    control: what a ControlNet (arXiv 2302.05543) adds to each skip as the decoder takes it, in the order of the skips,
    and last to the middle's output; or None.
    Source: DeepCache (arXiv 2312.00858), Section 3.2. If a level is reused, only the parts around it run.
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
    """Run a U-Net whose output block -1-k concatenates the output of input block k, which is skip k.

    x: [batch, in_channels, height, width] -> [batch, channels, height, width], before the output head. Any height and
    width are possible: each level returns the size of its input.
    """
    def down(block: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: block(x, cond)

    def up(block: nn.Module) -> Callable[[Tensor, Tensor, torch.Size], Tensor]:
        return lambda inner, skip, size: block(torch.cat([inner, skip], dim=1), cond, size)

    return nest(x, [down(block) for block in input_blocks], down(middle_block),
                [up(block) for block in reversed(output_blocks)], cond.cache)
