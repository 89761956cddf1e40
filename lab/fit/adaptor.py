"""Learn Clockwork's adaptor (arXiv 2312.08128) for one model, sampler, clock and branch, on unrolled runs.

    python -m lab.fit adaptor --config configs/ldm_emoji.yaml --sampler unipc --steps 50 --clock 4 \\
        --seeds 1000-1063 --held-out-seeds 2000-2031 --out adaptor.safetensors
    python -m ldm.sample --config configs/ldm_emoji.yaml --sampler unipc --steps 50 --clock 4 \\
        --adaptor adaptor.safetensors --seeds 0-63 --out samples/clockwork

The frozen network is the teacher, on the path of the run with the adaptor. The report compares the learned adaptor with
the identity.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lab.fit.fit import Fit, check_float32, embeddings, own_unet, with_file
from lab.fit.teacher import Student, Values
from run.image_model import ImageModel
from run.seeds import format_seeds
from unet_caching.errors import UserError
from unet_caching.methods.clockwork import ROWS, Adaptor, AdaptorFile, Clockwork, ClockworkMethod
from unet_caching.nest import Network
from unet_caching.options import option
from unet_caching.policy import Policy
from unet_caching.trace import positions


class TimeConditioning(nn.Module):
    """Rows of the table: timestep embedding [emb_channels] and the feature's age in calls -> [3, width]."""

    def __init__(self, emb_channels: int, width: int):
        super().__init__()
        self.layer = nn.Linear(emb_channels, ROWS * width)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, emb: Tensor, age: int) -> Tensor:
        scale, shift, gain = self.layer(emb).chunk(ROWS)
        return torch.stack([1 + scale, shift, age * (1 + gain)])


class AdaptorStudent(Student):
    """Trains an adaptor at every cached call.

    The loss is the squared error of the adaptor's output for the last feature, relative to the squared feature of the
    teacher; `losses` has the identity's beside it. channels: of the feature. width: of the bottleneck. embeddings: of
    each network call, float32 [calls, emb_channels].
    """

    def __init__(self, unet: Network, branch: int, full_steps: Sequence[int], channels: int, width: int,
                 embeddings: Tensor, lr: float):
        super().__init__(unet)
        self.branch, self.full_steps, self.embeddings = branch, list(full_steps), embeddings
        self.adaptor = Adaptor(channels, width).to(embeddings.device)
        self.conditioning = TimeConditioning(embeddings.shape[1], width).to(embeddings.device)
        self.optimizer = torch.optim.Adam([*self.adaptor.parameters(), *self.conditioning.parameters()], lr)
        self.losses = []

    def policy(self) -> Clockwork:
        return Clockwork(self.branch, self.full_steps, self.adaptor)

    def meet(self, cache: Policy, wanted: Values, predict: Callable[[], Tensor]) -> Tensor:
        assert isinstance(cache, Clockwork)
        if wanted:
            feature, exact = cache.held[self.branch].value, wanted[self.branch].float()
            assert feature is not None
            feature, size = feature.float(), exact.square().mean()
            with torch.enable_grad():
                loss = (self.adaptor(feature, self.row(cache.step)) - exact).square().mean() / size
                self.descend(loss)
            self.losses.append((loss.item(), ((feature - exact).square().mean() / size).item()))
            cache.row = self.row(cache.step).detach()
        return predict()

    def row(self, step: int) -> Tensor:
        """The row of the table at a network call."""
        return self.conditioning(self.embeddings[step], step - max(full for full in self.full_steps if full <= step))

    @torch.no_grad()
    def table(self) -> Tensor:
        """The rows of all network calls, float32 [calls, 3, width]."""
        return torch.stack([self.row(step) for step in range(len(self.embeddings))])


@dataclass(frozen=True)
class AdaptorFit(Fit):
    title = "the training"
    file = AdaptorFile
    caching = True
    channels: int = option(16, "channels of the adaptor's bottleneck (default: %(default)s)", least=1)
    lr: float = option(3e-3, "Adam's learning rate at the start; it falls to 0 (default: %(default)s)")
    passes: int = option(1, "passes through the seeds (default: %(default)s)", least=1)

    def check(self, model: ImageModel) -> None:
        if not self.lr > 0:
            raise UserError(f"--lr must be above 0, got {self.lr:g}")
        clockwork = model.run.caching.of(ClockworkMethod)
        if clockwork is None or clockwork.adaptor is not None or len(model.run.caching.methods) > 1:
            raise UserError("an adaptor is trained for a clock: give --clock, without --adaptor and other caching "
                            "options")
        check_float32(model)

    def fit(self, model: ImageModel, seeds: list[int], batch_size: int) -> AdaptorFile:
        clockwork = model.run.caching.of(ClockworkMethod)
        assert clockwork is not None
        channels = positions(model.run.trace)[clockwork.branch].shape[1]
        torch.manual_seed(0)                    # the inner convolution has random initial weights
        student = AdaptorStudent(own_unet(model), clockwork.branch, clockwork.full_steps, channels, self.channels,
                                 embeddings(model), self.lr)
        student.learn(model, seeds * self.passes, batch_size)
        weights = {name: value.detach().cpu() for name, value in student.adaptor.state_dict().items()}
        last = student.losses[-(len(student.losses) // 3 or 1):]
        notes = {"seeds": format_seeds(seeds), "lr": self.lr, "batch_size": batch_size, "passes": self.passes,
                 "iterations": len(student.losses), "parameters": sum(value.numel() for value in weights.values()),
                 "loss, last third": sum(loss for loss, _ in last) / len(last),
                 "loss of the identity there": sum(loss for _, loss in last) / len(last)}
        return AdaptorFile(model.run.made_for(model.settings["checkpoint_sha256"]), clockwork.branch,
                           clockwork.full_steps, tensors={**weights, "table": student.table().cpu()}, notes=notes)

    def arms(self, model: ImageModel, path: Path) -> Mapping[str, Callable[[], Policy]]:
        return {"identity": with_file(model), "learned": with_file(model, adaptor=path)}
