"""Scale-shift adjustment of reused residuals (Block Caching, arXiv 2312.03209).

A reused residual is multiplied and shifted per channel, by amounts that a linear layer makes of the timestep embedding.
The layers start as the identity and learn from the network itself: a student run that reuses residuals meets, at every
step, a teacher that computes all of them from the student's own input, and each reused residual, once adjusted, is to
equal the teacher's. Nothing else is trained, and teacher and student are one network.

The layers see nothing but the timestep: all that a run of given steps needs of them is one scale and shift per step,
residual and channel. That table is what is kept, and what `caching.block_cache.BlockCache` takes.
"""

from collections.abc import Callable, Collection, Hashable, Mapping

import torch
from torch import Tensor, nn

from caching.block_cache import Adjustment, BlockCache


class ScaleShift(nn.Module):
    """One linear layer per residual, from the timestep embedding to the scale and shift of its channels.

    channels: of each residual, by name. emb_channels: of the timestep embedding. It starts as the identity.
    """

    def __init__(self, channels: Mapping[str, int], emb_channels: int):
        super().__init__()
        self.names = list(channels)
        self.layers = nn.ModuleList(nn.Linear(emb_channels, 2 * width) for width in channels.values())
        for layer in self.layers:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, emb: Tensor) -> Adjustment:
        """emb [..., emb_channels] -> for each residual (scale, shift), each [..., channels]."""
        found = {}
        for name, layer in zip(self.names, self.layers, strict=True):
            scale, shift = layer(emb).chunk(2, dim=-1)
            found[name] = (1 + scale, shift)
        return found

    @torch.no_grad()
    def table(self, embeddings: Tensor) -> list[Adjustment]:
        """embeddings [steps, emb_channels] -> what each step does to the residuals that it reuses."""
        return [self(emb) for emb in embeddings]


class _Recorder:
    """The cache of the teacher: computes everything, and notes the residuals that the student does not."""

    def __init__(self, names: Collection[str]):
        self.names = names
        self.values: dict[str, Tensor] = {}

    def __call__(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        value = compute()
        if key in self.names:
            self.values[key] = value
        return value


class Distiller:
    """Stands in for the U-Net while a run samples with a `BlockCache`, and trains a `ScaleShift` on the way.

    `distiller(x, t, *context, cache=cache.at(step))` returns what the student predicts, after one optimiser step on the
    residuals that it reuses here. The loss is the mean over them of the squared error per squared teacher value.
    `losses`: (step, loss before the optimiser step, loss without adjustment) of every call that reused something.
    """

    def __init__(self, unet: nn.Module, scale_shift: ScaleShift, optimizer: torch.optim.Optimizer):
        self.unet, self.scale_shift, self.optimizer = unet, scale_shift, optimizer
        self.losses: list[tuple[float, float]] = []

    def __call__(self, x: Tensor, t: Tensor, *context: Tensor, cache: BlockCache) -> Tensor:
        emb = self.unet.embedding(t[:1])[0]                                             # [emb_channels]
        if cache.reused:
            teacher = _Recorder(cache.reused)
            with torch.no_grad():
                self.unet(x, t, *context, cache=teacher)
            with torch.enable_grad():
                loss = self._loss(self.scale_shift(emb), cache, teacher.values)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
            self.losses.append((loss.item(), self._loss({}, cache, teacher.values).item()))
        with torch.no_grad():
            cache.adjustment = self.scale_shift(emb)
            return self.unet(x, t, *context, cache=cache)

    @staticmethod
    def _loss(adjustment: Adjustment, cache: BlockCache, wanted: Mapping[str, Tensor]) -> Tensor:
        cache.adjustment = adjustment
        errors = [(cache.reuse(key) - value).square().mean() / value.square().mean() for key, value in wanted.items()]
        return torch.stack(errors).mean()
