"""Learning-to-Cache (arXiv 2406.01733) on U-Nets: how much of each residual is computed on each network call.

A router beta in [0, 1] for each residual and call mixes what the network computes with what was kept of it:

    beta * computed + (1 - beta) * kept

With the network frozen the routers learn to be small: the loss is the squared error of the network's output per squared
output of the network that computes everything, plus lambda times the computed share of the multiply-accumulates. They
start at 1, which is the run without caching, to the last bit. Rounded, they are an ordinary block schedule.
The paper trains on every second step, for transformers, from noised images; here it is while runs are sampled, the
teacher on the student's path, and on every second call or on all but the first.
"""

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn

from caching.nested import Network
from caching.policy import Policy


class Router(Policy):
    """Mixes each residual with the value that was kept of it, as betas say.

    names: the residuals, the columns of `betas`, [network calls, residuals]. Others are always computed, and so are all
    on the first call. What is kept is what the call went on with.
    """

    def __init__(self, names: Sequence[str], betas: Sequence[Tensor]):
        self.places = {name: place for place, name in enumerate(names)}
        self.betas = betas
        self.reset()

    def reset(self) -> None:
        """Let go of all values, after the last step of a batch."""
        self.step = 0
        self.values: dict[str, Tensor] = {}

    def at(self, step: int) -> "Router":
        self.step = step
        return self

    def owns(self, key: Hashable) -> bool:
        return key in self.places

    def __call__(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        value = compute()
        if not isinstance(key, str) or key not in self.places:
            return value
        if key in self.values:
            beta = self.betas[self.step][self.places[key]]
            value = torch.lerp(self.values[key], value, beta.to(value))
        self.values[key] = value.detach()
        return value


class RouterTraining:
    """Stands in for the U-Net while a run samples with a `Router`, and trains its betas, a step at every call.

    `network(x, t, *context, cache=router.at(step))`, as `sampling.samplers.noise_predictor` calls it. The run goes on
    with what the student predicted.

    costs: multiply-accumulates of each residual, by name; full: of a whole call. trained: the calls that may reuse.
    calls: of a run. lam: lambda at the start. budget: the multiply-accumulates that a run is to have; lambda rises
    while it has more and falls while it has less, by `pace` of the difference at every call. None: lambda stays.
    `betas`: [calls] of [residuals]. `losses`: (error, computed share) of every call that is trained.
    """

    def __init__(self, unet: Network, costs: Mapping[str, float], full: float, trained: Collection[int], calls: int,
                 lr: float, lam: float, budget: float | None = None, pace: float = 0.05):
        self.unet, self.names, self.full = unet, list(costs), full
        self.costs = torch.tensor([costs[name] for name in self.names]) / full
        self.betas = [nn.Parameter(torch.ones(len(self.names)), requires_grad=step in trained) for step in range(calls)]
        self.optimizer = torch.optim.Adam([beta for beta in self.betas if beta.requires_grad], lr)
        self.lam, self.pace = lam, pace
        self.budget = None if budget is None else budget / full
        self.losses: list[tuple[float, float]] = []

    def policy(self) -> Router:
        """A fresh one for a batch."""
        return Router(self.names, self.betas)

    @property
    def share(self) -> float:
        """The full calls that a run has, as the betas are."""
        saved = sum(((1 - beta.detach()) * self.costs.to(beta.device)).sum().item() for beta in self.betas[1:])
        return len(self.betas) - saved

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, *context: Tensor, cache: Router) -> Tensor:
        beta = self.betas[cache.step]
        if not beta.requires_grad or not cache.values:
            return self.unet(x, t, *context, cache=cache)
        wanted = self.unet(x, t, *context).float()
        with torch.enable_grad():
            output = self.unet(x, t, *context, cache=cache)
            error = (output.float() - wanted).square().mean() / wanted.square().mean()
            share = (beta * self.costs.to(beta.device)).sum()
            loss = error + self.lam * share
            self.optimizer.zero_grad()
            loss.backward()
        self.optimizer.step()
        beta.clamp_(0, 1)
        self.losses.append((error.item(), share.item()))
        if self.budget is not None:
            self.lam *= 1 + self.pace * (self.share / self.budget - 1)
        return output.detach()


def rounded(names: Sequence[str], betas: Sequence[Tensor], costs: Mapping[str, float], full: float,
            always: Collection[int] = (0,), budget: float | None = None) -> dict[str, list[int]]:
    """The block schedule of betas: for each residual the calls that compute it.

    always: the calls that compute everything; 0 must be one.

    Computed is what has a beta of 1/2 or more, or, within a budget of multiply-accumulates of a run, what has the
    largest betas, the earlier call first, until the next one would exceed it. costs, full: as in `RouterTraining`.
    Raises ValueError for a budget that even the least computing exceeds.
    """
    calls = len(betas)
    ranked = sorted(((beta, step, name) for step, of_step in enumerate(betas) if step not in always
                     for name, beta in zip(names, of_step.tolist(), strict=True)), key=lambda one: (-one[0], one[1]))
    blocks = {name: sorted(always) for name in names}
    spent = calls * full - (calls - len(always)) * sum(costs[name] for name in names)
    if budget is not None and spent > budget:
        raise ValueError(f"{calls} calls that compute as little as they can cost {spent / full:.2f} full calls, more "
                         f"than {budget / full:.2f}: take fewer steps, or a larger budget")
    for beta, step, name in ranked:
        if beta < 0.5 if budget is None else spent + costs[name] > budget:
            break
        spent += costs[name]
        blocks[name].append(step)
    return {name: sorted(steps) for name, steps in blocks.items()}
