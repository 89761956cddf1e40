"""Learn the scale and shift of residuals that Block Caching reuses (arXiv 2312.03209).

    python -m lab.fit scale-shift --config configs/ddpm_emoji.yaml --block-schedule half.json --seeds 1000-1031 \\
        --held-out-seeds 2000-2031 --out half.safetensors
    python -m ddpm.sample --config configs/ddpm_emoji.yaml --block-schedule half.json --scale-shift half.safetensors ...

A reused residual is scaled and shifted per channel. In the paper a linear layer computes both from the timestep
embedding. The layers start as the identity. They are trained on the path of a run that reuses residuals, so that each
adjusted residual equals the one that the network computes there (`Distiller`). Nothing else is trained.

The layers only see the timestep. So a run of given steps needs one scale and shift per step, residual and channel: the
file is that table. The default solves for it in closed form, without the layers (`LeastSquares`).

The paper does not state the loss, the optimiser, its learning rate, the batch size, and the direction of its index t.
Here the loss is that of `Distiller`, which weighs residuals of all sizes alike, and Adam takes one step per network
call. t counts network calls: a change belongs to the later of two. Other choices: results/block_caching/study/table.md.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lab.fit.fit import Fit, batches, embeddings, own_unet, with_file
from lab.fit.teacher import OnRunsPath, Student, Values
from run.image_model import ImageModel
from run.seeds import format_seeds
from unet_caching.errors import UserError
from unet_caching.keep import Adjustment, Keep
from unet_caching.methods.block_caching import BlockCachingMethod, ScaleShiftTable
from unet_caching.nest import Network
from unet_caching.options import option
from unet_caching.policy import Policy
from unet_caching.trace import positions


class Distiller(Student):
    """Trains one linear layer per residual, from the timestep embedding to the scale and shift of its channels, at
    every network call that reuses a residual.

    The loss is the squared error relative to the teacher's squared value, the mean over the reused residuals; `losses`
    has the loss without adjustment beside it. channels: of each residual, by name. embeddings: of each network call,
    float32 [calls, emb_channels].
    """

    def __init__(self, unet: Network, schedule: Mapping[str, Sequence[int]], channels: Mapping[str, int],
                 embeddings: Tensor, lr: float):
        super().__init__(unet)
        self.schedule, self.channels, self.embeddings = schedule, channels, embeddings
        layers = {name: nn.Linear(embeddings.shape[1], 2 * channels[name]) for name in schedule}
        self.layers = {name: layer.to(embeddings.device) for name, layer in layers.items()}
        parameters = [value for layer in layers.values() for value in layer.parameters()]
        for value in parameters:
            nn.init.zeros_(value)               # the identity
        self.optimizer = torch.optim.Adam(parameters, lr)
        self.losses = []

    def policy(self) -> Keep:
        return Keep(self.schedule)

    def meet(self, cache: Policy, wanted: Values, predict: Callable[[], Tensor]) -> Tensor:
        assert isinstance(cache, Keep)
        if wanted:
            with torch.enable_grad():
                loss = self._loss(self.adjustment(cache.step), cache, wanted)
                self.descend(loss)
            self.losses.append((loss.item(), self._loss({}, cache, wanted).item()))
            cache.adjustment = in_dtype_of(wanted, self.adjustment(cache.step))
        return predict()

    def adjustment(self, step: int) -> Adjustment:
        """The scale and shift of the residuals at a network call."""
        pairs = {name: layer(self.embeddings[step]).chunk(2) for name, layer in self.layers.items()}
        return {name: (1 + scale, shift) for name, (scale, shift) in pairs.items()}

    @torch.no_grad()
    def table(self) -> list[Adjustment]:
        """The adjustments of all network calls."""
        return [self.adjustment(step) for step in range(len(self.embeddings))]

    @staticmethod
    def _loss(adjustment: Adjustment, cache: Keep, wanted: Values) -> Tensor:
        cache.adjustment = adjustment
        errors = [(cache.reuse(key) - value.float()).square().mean() / value.float().square().mean()
                  for key, value in wanted.items()]
        return torch.stack(errors).mean()


class LeastSquares(OnRunsPath):
    """Solves for the scale and shift of each step in closed form, when the run reaches the step.

    For a fixed step the embedding is fixed, too. The best scale and shift of a channel are then a least-squares line
    through the pairs (reused value, teacher's value) of all pixels of all images. One run of a batch gives all of them.
    ridge: weight of scale 1 against the data, in mean variances of the reused values over the channels.
    `table`: the adjustments of all network calls.
    """

    def __init__(self, unet: Network, ridge: float = 1e-2):
        super().__init__(unet)
        self.ridge = ridge
        self.table: list[Adjustment] = []

    def meet(self, cache: Policy, wanted: Values, predict: Callable[[], Tensor]) -> Tensor:
        assert isinstance(cache, Keep)
        cache.adjustment = {}
        self.table.append({key: best_line(cache.reuse(key), value, self.ridge) for key, value in wanted.items()})
        cache.adjustment = in_dtype_of(wanted, self.table[-1])
        return predict()


def in_dtype_of(values: Values, adjustment: Adjustment) -> Adjustment:
    """The part of an adjustment that applies to some values, in their number format."""
    return {key: (scale.to(values[key].dtype), shift.to(values[key].dtype))
            for key, (scale, shift) in adjustment.items() if key in values}


def best_line(value: Tensor, wanted: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The least-squares scale and shift of each channel from `value` to `wanted`: float32 [channels] each."""
    x, y = (a.float().movedim(1 if a.ndim == 4 else -1, 0).flatten(1) for a in (value, wanted))   # [channels, n]
    (x, x_mean), (y, y_mean) = ((a - a.mean(1, keepdim=True), a.mean(1)) for a in (x, y))
    variance, covariance = x.square().mean(1), (x * y).mean(1)
    towards_1 = (ridge * variance.mean()).clamp(min=torch.finfo(torch.float32).tiny)
    scale = (covariance + towards_1) / (variance + towards_1)
    return scale, y_mean - scale * x_mean


@dataclass(frozen=True)
class ScaleShiftFit(Fit):
    title = "the training"
    file = ScaleShiftTable
    caching = True
    method: str = option("least-squares", "least-squares (default): solved step by step while all --seeds run as one "
                                          "batch; adam: the paper's linear layers on the timestep embedding, an "
                                          "optimiser step per network call, in batches of --batch-size",
                         choices=("least-squares", "adam"))
    lr: float = option(1e-3, "adam: learning rate at the start; it falls to 0 (default: %(default)s)")
    ridge: float = option(1e-2, "least-squares: pull towards the identity (default: %(default)s)")

    def check(self, model: ImageModel) -> None:
        if not self.lr > 0 or not self.ridge >= 0:
            raise UserError(f"--lr must be above 0 and --ridge 0 or more, got {self.lr:g} and {self.ridge:g}")
        blocks = model.run.caching.of(BlockCachingMethod)
        if blocks is None or blocks.table is not None or len(model.run.caching.methods) > 1:
            raise UserError("scale and shift are fitted to a block schedule: give --block-schedule, without "
                            "--scale-shift and other caching options")
        if all(len(steps) == blocks.schedule.calls for steps in blocks.computed.values()):
            raise UserError("the block schedule computes everything: there is nothing to adjust")

    def fit(self, model: ImageModel, seeds: list[int], batch_size: int) -> ScaleShiftTable:
        blocks = model.run.caching.of(BlockCachingMethod)
        assert blocks is not None
        schedule = blocks.schedule
        if self.method == "adam":
            values = positions(model.run.trace)
            channels = {name: values[name].shape[1 if len(values[name].shape) == 4 else -1] for name in schedule.blocks}
            distiller = Distiller(own_unet(model), schedule.blocks, channels, embeddings(model), self.lr)
            distiller.learn(model, seeds, batch_size)
            table, notes = distiller.table(), {"lr": self.lr, "batch_size": batch_size,
                                               "iterations": len(distiller.losses)}
        else:
            solver = LeastSquares(own_unet(model), self.ridge)
            for batch, report in batches(seeds, len(seeds), "solving", model):      # one run of all seeds
                model.latents(batch, Keep(schedule.blocks), solver, report)
            table, notes = solver.table, {"ridge": self.ridge}
        made = ScaleShiftTable.of(table, schedule)
        made.notes = {"method": self.method, "seeds": format_seeds(seeds), **notes}
        return made

    def arms(self, model: ImageModel, path: Path) -> Mapping[str, Callable[[], Policy]]:
        return {"plain": with_file(model), "adjusted": with_file(model, scale_shift=path)}
