"""Learning-to-Cache (arXiv 2406.01733) on U-Nets: how much of each residual is computed on each network call.

A router beta in [0, 1] for each residual and call mixes what the network computes with what was kept of it:

    beta * computed + (1 - beta) * kept

With the network frozen the routers learn to be small: the loss is the squared error of the network's output per squared
output of the network that computes everything, plus lambda times the computed share of the multiply-accumulates. They
start at 1, which is the run without caching, to the last bit. Rounded, they are an ordinary block schedule.
The paper trains on every second step, for transformers, from noised images; here it is while runs are sampled, the
teacher on the student's path, and on every second call or on all but the first. Where all may reuse, betas of
neighbouring calls are near each other, so that rounding each by itself would compute a residual on all of them and then
never again: there a beta is how often it is computed (`spread`).
"""

import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn

from unet_caching.nest import Network
from unet_caching.policy import Policy

PACE = 4.0              # how fast lambda moves: the change of its logarithm for twice the share that a run may have


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

    `network(x, t, *context, cache=router.at(step))`, as `samplers.samplers.noise_predictor` calls it. The run goes on
    with what the student predicted.

    costs: multiply-accumulates of each residual, by name; full: of a whole call. trained: the calls that may reuse.
    calls: of a run. lam: lambda at the start. budget: the multiply-accumulates that a run is to have. What it may have
    falls from everything to that over the first half of `runs`; after each, lambda rises where the betas have more and
    falls where they have less. None: lambda stays.
    `betas`: [calls] of [residuals]. `losses`: (error, computed share) of every call that is trained.
    """

    def __init__(self, unet: Network, costs: Mapping[str, float], full: float, trained: Collection[int], calls: int,
                 lr: float, lam: float, budget: float | None = None, runs: int = 1):
        self.unet, self.names, self.full = unet, list(costs), full
        self.costs = torch.tensor([costs[name] for name in self.names]) / full
        self.betas = [nn.Parameter(torch.ones(len(self.names)), requires_grad=step in trained) for step in range(calls)]
        self.optimizer = torch.optim.Adam([beta for beta in self.betas if beta.requires_grad], lr, betas=(0.5, 0.9))
        self.lam, self.runs, self.done = lam, runs, 0
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
        return output.detach()

    def update(self) -> None:
        """Move lambda, after every run."""
        self.done += 1
        if self.budget is not None:
            more = max(0.0, 1 - 2 * self.done / self.runs) * (len(self.betas) - self.budget)
            self.lam *= math.exp(PACE * (self.share / (self.budget + more) - 1))


def least(names: Sequence[str], calls: int, costs: Mapping[str, float], full: float, always: Collection[int] = (0,),
          budget: float | None = None) -> float:
    """The multiply-accumulates of a run that computes only on `always`. Raises ValueError if a budget is less."""
    spent = calls * full - (calls - len(always)) * sum(costs[name] for name in names)
    if budget is not None and spent > budget:
        raise ValueError(f"{calls} calls that compute as little as they can cost {spent / full:.2f} full calls, more "
                         f"than {budget / full:.2f}: take fewer steps, or a larger budget")
    return spent


def rounded(names: Sequence[str], betas: Sequence[Tensor], costs: Mapping[str, float], full: float,
            always: Collection[int] = (0,), budget: float | None = None) -> dict[str, list[int]]:
    """The block schedule of betas: for each residual the calls that compute it.

    always: the calls that compute everything; 0 must be one.

    Computed is what has a beta of 1/2 or more, or, within a budget of multiply-accumulates of a run, what has the
    largest betas, the earlier call first, until the next one would exceed it. costs, full: as in `RouterTraining`.
    Raises ValueError as `least` does.
    """
    calls = len(betas)
    ranked = sorted(((beta, step, name) for step, of_step in enumerate(betas) if step not in always
                     for name, beta in zip(names, of_step.tolist(), strict=True)), key=lambda one: (-one[0], one[1]))
    blocks = {name: sorted(always) for name in names}
    spent = least(names, calls, costs, full, always, budget)
    for beta, step, name in ranked:
        if beta < 0.5 if budget is None else spent + costs[name] > budget:
            break
        spent += costs[name]
        blocks[name].append(step)
    return {name: sorted(steps) for name, steps in blocks.items()}


def spread(names: Sequence[str], betas: Sequence[Tensor], costs: Mapping[str, float], full: float,
           budget: float | None = None) -> dict[str, list[int]]:
    """The block schedule that computes each residual as often as its betas say; all calls but the first may reuse.

    Computed is a residual on call 0, and whenever the sum of its betas since then comes to another half, one and a
    half, two and a half and so on. Within a budget of multiply-accumulates of a run all betas are scaled (up to 1), as
    far as it allows. costs, full: as in `RouterTraining`. Raises ValueError as `least` does.
    """
    rates, prices = torch.stack(list(betas[1:])).double(), torch.tensor([costs[name] for name in names]).double()
    rest = math.inf if budget is None else budget - least(names, len(betas), costs, full, budget=budget)

    def computed(scale: float) -> Tensor:
        """[calls but the first, residuals]"""
        met = ((scale * rates).clamp(max=1).cumsum(0) + 0.5 + 1e-9).floor()
        return met.diff(dim=0, prepend=torch.zeros_like(met[:1])) > 0

    low, high = (1.0, 1.0) if budget is None else (0.0, 1e3)
    for _ in range(60):
        scale = (low + high) / 2
        low, high = (scale, high) if (computed(scale) * prices).sum().item() <= rest else (low, scale)
    chosen = computed(low)
    return {name: [0, *(chosen[:, place].nonzero().flatten() + 1).tolist()] for place, name in enumerate(names)}
