"""Learn which blocks a run computes (Learning-to-Cache, arXiv 2406.01733), for one model, sampler and number of steps.

    python -m lab.fit router --config configs/ldm_emoji.yaml --sampler unipc --steps 30 --every-second --calls 18 \\
        --seeds 1000-1063 --held-out-seeds 2000-2031 --out routed.json
    python -m ldm.sample --config configs/ldm_emoji.yaml --sampler unipc --steps 30 --block-schedule routed.json \\
        --seeds 0-63 --out samples/routed

Each residual has a router beta in [0, 1] for each network call. It mixes the computed residual with the kept one:

    beta * computed + (1 - beta) * kept

The network is frozen, and only the routers are trained. The loss is the relative squared error of the network's output,
plus lambda times the computed share of the multiply-accumulates. The routers start at 1: the run without caching, to
the last bit. Rounded, they are an ordinary block schedule. With --calls, a budget in full network calls per image,
lambda is moved until the rounded routers cost the budget; otherwise lambda stays.

The paper trains transformers, from noised images, on every second step. Here runs are sampled while the routers are
trained. Every second call may reuse (--every-second), or all but the first. In the latter case, betas of neighbouring
calls are nearly equal, and rounding each would compute a residual on all of these calls or on none. So a beta is taken
as the frequency with which the residual is computed (`spread`).

The report compares the schedule with one at the same budget that computes all blocks on evenly spread calls.
"""

import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from eval.cost.runs import costs_of
from lab.fit.block_schedule import schedule_of
from lab.fit.fit import Fit, bisected, check_float32, evenly, frozen, with_file
from lab.fit.teacher import OUTPUT, Student, Values
from run.families import load_unet
from run.image_model import ImageModel
from run.seeds import format_seeds
from unet_caching.errors import UserError
from unet_caching.keep import Keep
from unet_caching.methods.block_caching import KINDS, BlockSchedule, residual_names
from unet_caching.nest import Network
from unet_caching.options import option
from unet_caching.policy import Policy

PACE = 4.0              # how fast lambda moves: the change of its logarithm at twice the allowed share


class Router(Policy):
    """Mixes each computed residual with its kept value, by betas.

    names: the residuals, in the order of the columns of `betas` [network calls, residuals]. Other residuals are always
    computed; on the first call all are. The mixed value is kept.
    """

    def __init__(self, names: Sequence[str], betas: Sequence[Tensor]):
        self.places = {name: place for place, name in enumerate(names)}
        self.betas = betas
        self.reset()

    def reset(self) -> None:
        """Drop all values, after the last step of a batch."""
        self.step = 0
        self.values: dict[Hashable, Tensor] = {}

    def at(self, step: int) -> "Router":
        self.step = step
        return self

    def __call__(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        value = compute()
        if not isinstance(key, str) or key not in self.places:
            return value
        if key in self.values:
            beta = self.betas[self.step][self.places[key]]
            value = torch.lerp(self.values[key], value, beta.to(value))
        self.values[key] = value.detach()
        return value


class Budget:
    """The multiply-accumulates of a run, at most `spent` (None: without a limit).

    costs: of each residual, by name. full: of a full call. calls: in a run.
    """

    def __init__(self, costs: Mapping[str, float], full: float, calls: int, spent: float | None = None):
        self.costs, self.full, self.calls, self.spent = costs, full, calls, spent
        self.names, self.saved = list(costs), sum(costs.values())

    def least(self, always: Collection[int] = (0,)) -> float:
        """The MACs of a run that computes residuals only on the calls `always`. Raises ValueError above the budget."""
        least = self.calls * self.full - (self.calls - len(always)) * self.saved
        if self.spent is not None and least > self.spent:
            raise ValueError(f"{self.calls} calls cost at least {least / self.full:.2f} full calls, more than the "
                             f"budget of {self.spent / self.full:.2f}: take fewer steps, or a larger budget")
        return least

    def rounded(self, betas: Sequence[Tensor], always: Collection[int] = (0,)) -> dict[str, list[int]]:
        """The block schedule of betas: for each residual the calls that compute it, including all of `always`.

        Without a budget, betas of at least 1/2 are computed. With a budget, the largest betas are computed, the earlier
        call first, until the next one would exceed the budget. Raises ValueError as `least`.
        """
        ranked = sorted(((beta, step, name) for step, of_step in enumerate(betas) if step not in always
                         for name, beta in zip(self.names, of_step.tolist(), strict=True)),
                        key=lambda one: (-one[0], one[1]))
        blocks = {name: sorted(always) for name in self.names}
        total = self.least(always)
        for beta, step, name in ranked:
            if beta < 0.5 if self.spent is None else total + self.costs[name] > self.spent:
                break
            total += self.costs[name]
            blocks[name].append(step)
        return {name: sorted(steps) for name, steps in blocks.items()}

    def spread(self, betas: Sequence[Tensor]) -> dict[str, list[int]]:
        """The block schedule that computes each residual as often as its betas say; all calls but the first may reuse.

        A residual is computed on call 0, and whenever the sum of its betas since then passes 1/2, 3/2, 5/2 and so on.
        With a budget, all betas are first scaled (up to 1) to fill it. Raises ValueError as `least`.
        """
        rates = torch.stack(list(betas[1:])).double()
        prices = torch.tensor(list(self.costs.values())).double()
        rest = math.inf if self.spent is None else self.spent - self.least()

        def computed(scale: float) -> Tensor:
            """[calls but the first, residuals]"""
            met = ((scale * rates).clamp(max=1).cumsum(0) + 0.5 + 1e-9).floor()
            return met.diff(dim=0, prepend=torch.zeros_like(met[:1])) > 0

        chosen = computed(1.0 if self.spent is None else bisected(
            lambda scale: (computed(scale) * prices).sum().item() <= rest, 0.0, 1e3))
        return {name: [0, *(chosen[:, i].nonzero().flatten() + 1).tolist()] for i, name in enumerate(self.names)}

    def even(self) -> dict[str, list[int]]:
        """All residuals on evenly spread calls, from the first on, as many as the budget allows."""
        assert self.spent is not None
        count = int((self.spent - self.calls * (self.full - self.saved)) / self.saved + 1e-9)
        return dict.fromkeys(self.names, evenly(self.calls, max(1, min(self.calls, count))))


class RouterStudent(Student):
    """Trains the betas of a `Router` at every call that may reuse. Runs go on with the router's output.

    The loss is the error of the output plus lambda times the computed share; `losses` has both. trained: the calls that
    may reuse. lam: lambda at the start. With a budget, the allowed share falls from everything to the budget over the
    first half of `runs`. After each run, lambda rises if the betas' share is larger and falls if it is smaller. Without
    a budget, lambda stays. `betas`: [calls] of [residuals].
    """

    def __init__(self, unet: Network, budget: Budget, trained: Collection[int], lr: float, lam: float, runs: int = 1):
        super().__init__(unet)
        self.budget, self.lam, self.runs, self.done = budget, lam, runs, 0
        self.costs = torch.tensor(list(budget.costs.values())) / budget.full
        self.betas = [nn.Parameter(torch.ones(len(budget.names)), requires_grad=step in trained)
                      for step in range(budget.calls)]
        self.optimizer = torch.optim.Adam([beta for beta in self.betas if beta.requires_grad], lr, betas=(0.5, 0.9))
        self.losses = []

    def policy(self) -> Router:
        return Router(self.budget.names, self.betas)

    @property
    def share(self) -> float:
        """The cost of a run with the betas, in full calls."""
        saved = sum(((1 - beta.detach()) * self.costs.to(beta.device)).sum().item() for beta in self.betas[1:])
        return len(self.betas) - saved

    def taught(self, cache: Policy) -> Collection[Hashable]:
        assert isinstance(cache, Router)
        return (OUTPUT,) if self.betas[cache.step].requires_grad and cache.values else ()

    def meet(self, cache: Policy, wanted: Values, predict: Callable[[], Tensor]) -> Tensor:
        assert isinstance(cache, Router)
        if not wanted:
            return predict()
        beta, exact = self.betas[cache.step], wanted[OUTPUT].float()
        with torch.enable_grad():
            output = predict()
            error = (output.float() - exact).square().mean() / exact.square().mean()
            share = (beta * self.costs.to(beta.device)).sum()
            self.descend(error + self.lam * share)
        beta.clamp_(0, 1)
        self.losses.append((error.item(), share.item()))
        return output.detach()

    def update(self) -> None:
        """Move lambda, after every run."""
        self.done += 1
        if self.budget.spent is not None:
            spent = self.budget.spent / self.budget.full
            more = max(0.0, 1 - 2 * self.done / self.runs) * (len(self.betas) - spent)
            self.lam *= math.exp(PACE * (self.share / (spent + more) - 1))


@dataclass(frozen=True)
class RouterFit(Fit):
    title = "the training"
    file = BlockSchedule
    kinds: str = option("all", "the kind of blocks with routers (default: %(default)s)", choices=KINDS)
    every_second: bool = option(False, "only every second call may reuse, as in the paper (default: all but the first)")
    calls: float | None = option(None, "the budget, in full network calls (default: none)")
    lam: float = option(1e-3, "lambda, the weight of the computed share; with --calls, at the start (default: "
                              "%(default)s)")
    lr: float = option(0.1, "Adam's learning rate at the start; it falls to a tenth (default: %(default)s)")

    def check(self, model: ImageModel) -> None:
        if not self.lr > 0 or not self.lam >= 0:
            raise UserError(f"--lr must be above 0 and --lam 0 or more, got {self.lr:g} and {self.lam:g}")
        check_float32(model)
        self.budget(model).least(self.always(model))        # raises ValueError if the budget is too small

    def budget(self, model: ImageModel) -> Budget:
        costs = costs_of(model.run)
        names = residual_names(model.run.unet, self.kinds)
        return Budget({name: costs.values[name].hook for name in names}, costs.full.hook, model.sampler.calls,
                      None if self.calls is None else self.calls * costs.full.hook)

    def always(self, model: ImageModel) -> Collection[int]:
        """The calls that compute everything."""
        return range(0, model.sampler.calls, 2) if self.every_second else (0,)

    def fit(self, model: ImageModel, seeds: list[int], batch_size: int) -> BlockSchedule:
        budget, always = self.budget(model), self.always(model)
        trained = [step for step in range(1, budget.calls) if step not in always]
        # Without packed weights, which have no gradients (unet_caching/speed/packed.py).
        unet = load_unet(model.config, model.run.checkpoint, **model.run.weights).to(model.device)
        with frozen(unet):
            student = RouterStudent(unet, budget, trained, self.lr, self.lam, runs=-(-len(seeds) // batch_size))
            student.learn(model, seeds, batch_size, falls_by=0.9)
        betas = [beta.detach().cpu() for beta in student.betas]
        blocks = budget.rounded(betas, always) if self.every_second else budget.spread(betas)
        notes = {"system": "Learning-to-Cache", "seeds": format_seeds(seeds), "every_second": self.every_second,
                 "lambda": student.lam, "lr": self.lr, "batch_size": batch_size, "iterations": len(student.losses),
                 "budget": self.calls, "calls before rounding": round(student.share, 4)}
        made = schedule_of(model.run, model.settings["checkpoint_sha256"], self.kinds, blocks, notes)
        notes["full_calls"] = made.macs["hook"] * budget.calls / budget.full
        return made

    def arms(self, model: ImageModel, path: Path) -> Mapping[str, Callable[[], Policy]]:
        made, budget = BlockSchedule.load(path), self.budget(model)
        budget.spent = made.macs["hook"] * budget.calls
        return {"evenly": partial(Keep, budget.even()), "routed": with_file(model, block_schedule=path)}
