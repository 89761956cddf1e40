"""Learn the timesteps, the solver and the damping of forecasts of a run together, through its sampler, with the network
frozen.

The learned numbers are added to a plan: to the coefficients of its solver (samplers/table.py), its timesteps and the
damping of each forecast (methods/plan.py). The loss is the mean over the seeds of the logarithm of the mean squared
error between the run's result and the converged image, which is their PSNR. LD3 (arXiv 2405.15506) and S4S (arXiv
2502.17423) learn timesteps and solvers like this; here forecasts of nested features are part of the run.
"""

import hashlib
import math
from collections.abc import Callable, Hashable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from unet_caching.files.whole import write_and_move
from unet_caching.forecast import newton_terms
from unet_caching.methods.plan import SAMPLING, Call, Plan, PlanCache
from unet_caching.nest import Network
from unet_caching.policy import Policy
from unet_caching.samplers.diffusion import Diffusion, Predict
from unet_caching.samplers.table import Table, multistep, table_of

SMALLEST = 0.02         # the least share of an image that counts as new beside others (`Learned.orient`)
# start(seeds, policy) -> the noise predictor for these seeds, with the policy as its cache, and their x_T.
Start = Callable[[Sequence[int], Policy | None], tuple[Predict, Tensor]]


@dataclass(frozen=True)
class Solved:
    """A run in numbers that can be learned: [calls] timesteps, the solver's table, and what each call computes."""
    timesteps: tuple[float, ...]
    table: Table
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Learning:
    """The settings of learning."""
    iterations: int = 100
    batch_size: int = 8             # seeds of an iteration
    # The highest learning rate. With 1, a step of all coefficients changes images by as much as they differ from the
    # converged ones.
    lr: float = 0.5
    times_lr: float = 20.0          # the rates of the timesteps, in tens of timesteps, and of the damping, as multiples
    damping_lr: float = 10.0        # of a coefficient's
    warmup: int = 10                # iterations in which learning rates rise
    last: int | None = None         # the number of predictions whose coefficients each row of q learns; None: all
    judged_every: int = 20          # iterations between two evaluations on the held-out seeds


class LearnedPlan(PlanCache):
    """The cache of a plan whose damping is a tensor, [calls, highest order]."""

    def __init__(self, calls: Sequence[Call], damping: Tensor):
        super().__init__(calls)
        self.damping = damping

    def at(self, step: int) -> "LearnedPlan":
        super().at(step)
        branch = self.calls[step].branch
        if self.weights is not None and branch is not None:
            held = self.held[branch]
            terms = torch.tensor(newton_terms(step, held.calls)).to(self.damping)
            self.weights = torch.zeros_like(self.weights)
            self.weights[held.place, :len(terms)] = (self.damping[step, :len(terms)] @ terms).to(self.weights)
        return self


class Recomputed:
    """A network whose activations are computed again for gradients, so that memory holds those of one call at a time.

    Its call is the network's, with a policy. Tensors that the policy keeps are not computed again.
    """

    def __init__(self, network: Network):
        self.network = network

    def __call__(self, x: Tensor, t: Tensor, *context: Tensor, cache: Policy) -> Tensor:
        if not torch.is_grad_enabled():
            return self.network(x, t, *context, cache=cache)
        as_now, before, after = copy(cache), cache.kept, list[Hashable]()

        def call(x: Tensor, t: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
            policy = copy(as_now)           # by the time of the gradients the run's policy is at another call
            policy.kept = dict(zip(before, kept, strict=True))
            output = self.network(x, t, *context, cache=policy)
            after[:] = policy.kept
            return output, *policy.kept.values()

        output, *kept = checkpoint(call, x, t, *before.values(), use_reentrant=False, preserve_rng_state=False)
        cache.kept = dict(zip(after, kept, strict=True))
        return output


def _rows(rows: Sequence[Sequence[float]]) -> Tensor:
    """Rows as a matrix; shorter rows end with zeros."""
    most = max(map(len, rows))
    return torch.tensor([[*row, *[0.0] * (most - len(row))] for row in rows], dtype=torch.float64)


class Learned(nn.Module):
    """The learned numbers that are added to a run, in float64 and 0 at first.

    q: [calls, last], along `basis`. times: [calls], in tens of timesteps; that of the first call stays 0. damping:
    [calls, highest order].
    """

    def __init__(self, run: Solved, last: int | None = None):
        super().__init__()
        n, self.calls = len(run.calls), run.calls
        self.p0, self.t0 = _rows([run.table.p, run.timesteps])
        self.q0, self.damping0 = _rows(run.table.q), _rows([call.damping for call in run.calls])
        self.last = n if last is None else min(last, n)
        self.register_buffer("basis", torch.zeros(n, self.last, n, dtype=torch.float64))
        self.q = nn.Parameter(torch.zeros(n, self.last, dtype=torch.float64))
        self.times = nn.Parameter(torch.zeros(n, dtype=torch.float64))
        self.damping = nn.Parameter(torch.zeros_like(self.damping0))

    def solved(self) -> tuple[Tensor, Tensor]:
        """The learned timesteps and q."""
        return self.t0 + 10 * self.times, self.q0 + torch.einsum("ik,ikj->ij", self.q, self.basis)

    @torch.no_grad()
    def keep_order(self) -> None:
        """Keep each timestep within almost half of its first distance to each neighbour, so that they stay in order."""
        gaps = 0.049 * (self.t0[:-1] - self.t0[1:])
        least = F.pad(-gaps, (0, 1), value=-self.t0[-1].item() / 10)
        self.times.copy_(torch.minimum(torch.maximum(self.times, least), F.pad(gaps, (1, 0))))
        self.times[0] = 0

    def orient(self, gram: Tensor) -> None:
        """Choose the basis of q: the clean image that a call predicts, then the new part of the image before it, and so
        on. A unit of each changes x equally. Neighbouring images are almost equal. So along the images themselves, a
        step that is small enough for their sum would hardly change their differences.

        gram: inner products of a run's images, scaled so that the last one has length 1, [calls, calls].
        """
        for step, rows in enumerate(self.get_buffer("basis")):
            places = [*range(step, max(-1, step - self.last), -1)]
            part = gram[places][:, places]
            part = part + SMALLEST ** 2 * gram[step, step] * torch.eye(len(places))
            rows[:len(places), places] = torch.linalg.inv(torch.linalg.cholesky(part))

    def policy(self) -> LearnedPlan:
        """A fresh cache with the learned damping."""
        return LearnedPlan(self.calls, self.damping0 + self.damping)

    def sample(self, start: Start, seeds: Sequence[int], alphas: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The results of the run for these seeds, and D of each call. alphas: [num_timesteps]."""
        predict, x = start(seeds, self.policy())
        timesteps, q = self.solved()
        return multistep(predict, x, timesteps, self.p0, q, alphas)

    def values(self) -> Solved:
        """The run as learned so far."""
        timesteps, q = self.solved()
        damping = (self.damping0 + self.damping).tolist()
        return Solved(tuple(round(t, 4) for t in timesteps.tolist()),
                      Table(tuple(self.p0.tolist()), tuple(tuple(row[:i + 1]) for i, row in enumerate(q.tolist()))),
                      tuple(Call(call.branch, tuple(row[:len(call.damping)]))
                            for call, row in zip(self.calls, damping, strict=True)))


def solved(plan: Plan, diffusion: Diffusion) -> Solved:
    """The run of a plan. Raises ValueError for a plan whose sampler has no table."""
    sampler, steps, listed = (plan.made_for[key] for key in SAMPLING)
    timesteps, own = table_of(sampler, steps, listed, diffusion)
    return Solved(tuple(timesteps), plan.solver or own, tuple(plan.calls))


def learned_plan(plan: Plan, outcome: "Outcome", notes: dict[str, Any]) -> Plan:
    """The plan that learning makes from a plan, at the same cost."""
    run = outcome.run
    timesteps = ",".join(f"{t:.4f}".rstrip("0").rstrip(".") for t in run.timesteps)
    gain = {"iteration": outcome.iteration, "chosen by, dB": round(outcome.judged[outcome.iteration], 3)}
    return replace(plan, made_for=plan.made_for | {"timesteps": timesteps}, calls=[*run.calls], solver=run.table,
                   known_as=None, notes=plan.notes | {"learned": notes | gain, "learned_from": plan.sha256})


@dataclass(frozen=True)
class Outcome:
    """The result of learning. run: the best one on the held-out seeds, which may be the run before learning. iteration:
    that of the best run. judged: dB gained on the held-out seeds, by iteration.
    """
    run: Solved
    iteration: int
    judged: dict[int, float]


class Learner:
    """Learns a run. converged: the target images of seeds. alphas: [num_timesteps].

    state: a file that is written after each iteration, and from which the same learning resumes. about: everything else
    that decides the result. Raises ValueError if the state belongs to other learning.
    """

    def __init__(self, run: Solved, start: Start, alphas: Tensor, converged: Callable[[Sequence[int]], Tensor],
                 seeds: Sequence[int], held_out: Sequence[int], options: Learning, state: Path,
                 about: str = ""):
        self.run, self.start, self.alphas, self.converged = run, start, alphas, converged
        self.seeds, self.held_out, self.options, self.state = seeds, held_out, options, state
        self.learned = Learned(run, options.last)
        self.optimizer = torch.optim.Adam([
            {"params": [self.learned.q], "times": 1.0}, {"params": [self.learned.times], "times": options.times_lr},
            {"params": [self.learned.damping], "times": options.damping_lr}], betas=(0.9, 0.95))
        self.iteration, self.best = 0, (0, self._copy())
        self.judged = dict[int, float]()            # error on the held-out seeds, dB
        self.about = hashlib.sha256(repr((run, list(seeds), list(held_out), options, about)).encode()).hexdigest()
        if state.is_file():
            self._go_on(torch.load(state, weights_only=True))
        else:
            self._orient()

    def learn(self, title: str | None = None) -> Outcome:
        """Learn to the end. title: of a progress bar; None: no bar."""
        total = self.options.iterations
        with tqdm(total=total, initial=self.iteration, desc=title, unit="iteration", disable=title is None) as bar:
            while True:
                last = self.iteration == total
                if self.iteration not in self.judged and (last or self.iteration % self.options.judged_every == 0):
                    self._judge()
                    self._save()
                bar.set_postfix_str(f"{self.gain(self.best[0]):+.2f} dB on held-out seeds")
                if last:
                    break
                self._step()
                self._save()
                bar.update()
        self.learned.load_state_dict(self.best[1])
        run = self.learned.values() if self.best[0] else self.run
        return Outcome(run, self.best[0], {one: self.gain(one) for one in self.judged})

    def gain(self, iteration: int) -> float:
        """dB gained on the held-out seeds since the start."""
        return self.judged[0] - self.judged[iteration]

    @torch.no_grad()
    def _orient(self) -> None:
        _, clean = self.learned.sample(self.start, self.seeds[:self.options.batch_size], self.alphas)
        rows = torch.stack(clean).flatten(1).double().cpu()
        self.learned.orient(rows @ rows.T / rows[-1].square().sum())

    def _step(self) -> None:
        options, size = self.options, min(self.options.batch_size, len(self.seeds))
        epoch, place = divmod(self.iteration, len(self.seeds) // size)
        batch = np.random.RandomState(epoch).permutation(self.seeds)[place * size:][:size].tolist()
        share = min(1.0, (self.iteration + 1) / options.warmup)
        share *= 0.5 + 0.5 * math.cos(math.pi * self.iteration / options.iterations)
        share *= 10 ** (self.judged[0] / 20) / self.learned.get_buffer("basis").any(-1).sum().item() ** 0.5
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * group["times"] * share
        self.optimizer.zero_grad()
        self._error(batch).backward()
        self.optimizer.step()
        self.learned.keep_order()
        self.iteration += 1

    def _error(self, seeds: Sequence[int]) -> Tensor:
        """The mean over the seeds of 10 log10 (squared error / squared norm of the converged image)."""
        found, _ = self.learned.sample(self.start, seeds, self.alphas)
        wanted = self.converged(seeds).to(found)
        errors = (found - wanted).square().flatten(1).sum(1) / wanted.square().flatten(1).sum(1)
        return 10 * errors.log10().mean()

    @torch.no_grad()
    def _judge(self) -> None:
        size = self.options.batch_size
        parts = [self.held_out[i:i + size] for i in range(0, len(self.held_out), size)]
        error = sum(self._error(part).item() * len(part) for part in parts) / len(self.held_out)
        self.judged[self.iteration] = error if math.isfinite(error) else math.inf
        if self.judged[self.iteration] < self.judged[self.best[0]]:
            self.best = self.iteration, self._copy()

    def _copy(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.learned.state_dict().items()}

    def _save(self) -> None:
        state = {"about": self.about, "iteration": self.iteration, "learned": self.learned.state_dict(),
                 "optimizer": self.optimizer.state_dict(), "best": self.best, "judged": self.judged}
        write_and_move(self.state, lambda temporary: torch.save(state, temporary))

    def _go_on(self, state: dict) -> None:
        if state["about"] != self.about:
            raise ValueError(f"{self.state} was learned with other settings: delete it, or name another place")
        self.iteration, self.best, self.judged = state["iteration"], tuple(state["best"]), state["judged"]
        self.learned.load_state_dict(state["learned"])
        self.optimizer.load_state_dict(state["optimizer"])
