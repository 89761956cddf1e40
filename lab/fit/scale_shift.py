"""Scale-shift adjustment of reused residuals (Block Caching, arXiv 2312.03209).

A reused residual is multiplied and shifted per channel, by amounts that a linear layer makes of the timestep embedding.
The layers start as the identity and learn from the network itself: a student run that reuses residuals meets, at every
step, a teacher that computes all of them from the student's own input, and each reused residual, once adjusted, is to
equal the teacher's. Nothing else is trained, and teacher and student are one network (`Distiller`).

The layers see nothing but the timestep: all that a run of given steps needs of them is one scale and shift per step,
residual and channel. That table is what is kept, and what `methods.block_cache.BlockCache` takes. It can be solved for
in closed form as well, without the layers (`LeastSquares`).

The paper leaves open the loss, the optimiser, its learning rate, the batch, and the direction of its index t. Here: the
error of `Distiller`, which weighs residuals of all sizes alike; Adam; one step per network call; and t counts the
network calls, so that a change belongs to the later one of two. What else was tried, and how little most of it matters:
results/block_caching/study/table.md. The index does matter, by a tenth of the distance, with either sign.
"""

from collections.abc import Callable, Hashable, Mapping

import torch
from torch import Tensor, nn

from unet_caching.methods.block_cache import Adjustment, BlockCache
from unet_caching.nest import NestedUNet, Network


class ScaleShift(nn.Module):
    """One linear layer per residual, from the timestep embedding to the scale and shift of its channels.

    channels: how many each residual has, by name. emb_channels: how many the embedding has. It starts as the identity.
    """

    def __init__(self, channels: Mapping[str, int], emb_channels: int):
        super().__init__()
        self.names = list(channels)
        layers = [nn.Linear(emb_channels, 2 * width) for width in channels.values()]
        for layer in layers:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.layers = nn.ModuleList(layers)

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
    """The cache of the teacher: computes everything, and notes those of the residuals that are wanted."""

    def __init__(self, names: frozenset[str]):
        self.names = names
        self.values: dict[str, Tensor] = {}

    def __call__(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        value = compute()
        if key in self.names:
            self.values[key] = value
        return value


class _OnStudentsPath:
    """Stands in for the U-Net while a run samples with a `BlockCache`: the teacher computes, from the student's input,
    what the student reuses; then the student predicts.

    `network(x, t, *context, cache=cache.at(step))`, as `unet_caching.samplers.samplers.noise_predictor` calls it.
    """

    def __init__(self, unet: Network):
        self.unet = unet

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, *context: Tensor, cache: BlockCache) -> Tensor:
        teacher = _Recorder(cache.reused)
        if cache.reused:
            self.unet(x, t, *context, cache=teacher)
        self.meet(t, cache, teacher.values)
        return self.unet(x, t, *context, cache=cache)

    def meet(self, t: Tensor, cache: BlockCache, wanted: Mapping[str, Tensor]) -> None:
        """Look at, or set, `cache.adjustment`. wanted: what the reused residuals should be; empty where none is."""
        raise NotImplementedError


class Distiller(_OnStudentsPath):
    """Trains a `ScaleShift` by an optimiser step at every network call that reuses something.

    The loss is the mean over the reused residuals of the squared error per squared teacher value.
    `losses`: (loss before the optimiser step, loss without adjustment) of every such call.
    """

    def __init__(self, unet: NestedUNet, scale_shift: ScaleShift, optimizer: torch.optim.Optimizer):
        super().__init__(unet)
        self.embedding = unet.embedding
        self.scale_shift, self.optimizer = scale_shift, optimizer
        self.losses: list[tuple[float, float]] = []

    def meet(self, t: Tensor, cache: BlockCache, wanted: Mapping[str, Tensor]) -> None:
        emb = self.embedding(t[:1])[0].float()                                          # [emb_channels]
        if wanted:
            with torch.enable_grad():
                loss = self._loss(self.scale_shift(emb), cache, wanted)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
            self.losses.append((loss.item(), self._loss({}, cache, wanted).item()))
        dtype = self.embedding(t[:1]).dtype
        cache.adjustment = {name: (scale.to(dtype), shift.to(dtype))
                            for name, (scale, shift) in self.scale_shift(emb).items()}

    @staticmethod
    def _loss(adjustment: Adjustment, cache: BlockCache, wanted: Mapping[str, Tensor]) -> Tensor:
        cache.adjustment = adjustment
        errors = [(cache.reuse(key) - value.float()).square().mean() / value.float().square().mean()
                  for key, value in wanted.items()]
        return torch.stack(errors).mean()


class LeastSquares(_OnStudentsPath):
    """Solves for the scale and shift of each step in closed form, as the run that it stands in comes to the step.

    For a fixed step the embedding is fixed too, and the best scale and shift of a channel are those of a line through
    the pairs (reused value, teacher's value) of all pixels of all images: no training. One run of a batch gives all.
    ridge: weight of scale 1 against the data, in mean variances of the reused values over the channels.
    `table`: what each network call does to the residuals that it reuses.
    """

    def __init__(self, unet: Network, ridge: float = 1e-2):
        super().__init__(unet)
        self.ridge = ridge
        self.table: list[Adjustment] = []

    def meet(self, t: Tensor, cache: BlockCache, wanted: Mapping[str, Tensor]) -> None:
        cache.adjustment = {}
        self.table.append({key: best_line(cache.reuse(key), value, self.ridge) for key, value in wanted.items()})
        cache.adjustment = {key: (scale.to(wanted[key].dtype), shift.to(wanted[key].dtype))
                            for key, (scale, shift) in self.table[-1].items()}


def best_line(value: Tensor, wanted: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Scale and shift of each channel that bring `value` nearest to `wanted` in squares: float32 [channels] each."""
    x, y = (a.float().movedim(1 if a.ndim == 4 else -1, 0).flatten(1) for a in (value, wanted))   # [channels, n]
    (x, x_mean), (y, y_mean) = ((a - a.mean(1, keepdim=True), a.mean(1)) for a in (x, y))
    variance, covariance = x.square().mean(1), (x * y).mean(1)
    towards_1 = (ridge * variance.mean()).clamp(min=torch.finfo(torch.float32).tiny)
    scale = (covariance + towards_1) / (variance + towards_1)
    return scale, y_mean - scale * x_mean


class Comparison(_OnStudentsPath):
    """How far reused residuals, adjusted as the run's cache says, are from those that the network would compute.

    `errors`: for every network call that reuses something |reused - computed|_2 / |computed|_2, float32 [batch], the
    mean over its reused residuals.
    """

    def __init__(self, unet: Network):
        super().__init__(unet)
        self.errors: list[Tensor] = []

    def meet(self, t: Tensor, cache: BlockCache, wanted: Mapping[str, Tensor]) -> None:
        if wanted:
            self.errors.append(torch.stack([relative_distance(cache.reuse(key), value)
                                            for key, value in wanted.items()]).mean(0))


def relative_distance(value: Tensor, exact: Tensor) -> Tensor:
    """|value - exact|_2 / |exact|_2 of each row: [batch, ...] -> float32 [batch]."""
    value, exact = value.float().flatten(1), exact.float().flatten(1)
    return (value - exact).norm(dim=1) / exact.norm(dim=1)
