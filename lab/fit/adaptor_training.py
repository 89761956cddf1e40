"""Clockwork's adaptor, trained on unrolled runs: the teacher is the frozen network on the student's path."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lab.fit.runs_path import OnRunsPath
from unet_caching.methods.adaptor import ROWS, Adaptor
from unet_caching.methods.clockwork import Clockwork
from unet_caching.methods.deepcache import DeepCache
from unet_caching.nest import Network


class TimeConditioning(nn.Module):
    """Rows of the table from the timestep embedding: [emb_channels] and the feature's age in calls -> [3, width]."""

    def __init__(self, emb_channels: int, width: int):
        super().__init__()
        self.layer = nn.Linear(emb_channels, ROWS * width)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, emb: Tensor, age: int) -> Tensor:
        scale, shift, gain = self.layer(emb).chunk(ROWS)
        return torch.stack([1 + scale, shift, age * (1 + gain)])


class AdaptorTraining(OnRunsPath):
    """Trains an adaptor by an optimiser step at every cached step of the runs that it stands in.

    There the network computes, from the student's own input, the feature that the student does without; the loss is the
    squared error of what the adaptor makes of the last one, per squared feature. Then the student goes on with it.
    channels: of the feature. width: of the bottleneck. embeddings: of the timestep of each network call, float32
    [calls, emb_channels]. `policy()` is what the runs must take.
    `losses`: (loss before the optimiser step, loss of the identity) of every cached step.
    """

    def __init__(self, unet: Network, branch: int, full_steps: Sequence[int], channels: int, width: int,
                 embeddings: Tensor, lr: float):
        super().__init__(unet)
        self.branch, self.full_steps, self.embeddings = branch, list(full_steps), embeddings
        self.adaptor = Adaptor(channels, width).to(embeddings.device)
        self.conditioning = TimeConditioning(embeddings.shape[1], width).to(embeddings.device)
        self.optimizer = torch.optim.Adam([*self.adaptor.parameters(), *self.conditioning.parameters()], lr)
        self.losses: list[tuple[float, float]] = []

    def policy(self) -> Clockwork:
        """A fresh one for a batch, with the adaptor as it is by then."""
        return Clockwork(self.branch, self.full_steps, self.adaptor)

    def meet(self, cache: DeepCache, wanted: Tensor) -> None:
        assert isinstance(cache, Clockwork) and cache.feature is not None
        feature, wanted, size = cache.feature.float(), wanted.float(), wanted.float().square().mean()
        with torch.enable_grad():
            made = self.adaptor(feature, self.row(cache.step, cache.age))
            loss = (made - wanted).square().mean() / size
            self.optimizer.zero_grad()
            loss.backward()
        self.optimizer.step()
        self.losses.append((loss.item(), ((feature - wanted).square().mean() / size).item()))
        cache.row = self.row(cache.step, cache.age).detach()

    def row(self, step: int, age: int) -> Tensor:
        """What the adaptor is told at a network call."""
        return self.conditioning(self.embeddings[step], age)

    @torch.no_grad()
    def table(self) -> Tensor:
        """The row of every network call, float32 [calls, 3, width]."""
        ages = [step - max(full for full in self.full_steps if full <= step) for step in range(len(self.embeddings))]
        return torch.stack([self.row(step, age) for step, age in enumerate(ages)])
