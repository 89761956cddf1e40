"""The registry of samplers. Every command knows the samplers in SOLVERS; no other file names them.

DDIM is ours; the others are schedulers of diffusers in one loop. The loop gives them the predicted noise, even if the
network predicts v. So the multistep rule of PLMS combines noises, as in its paper; diffusers' scheduler would combine
the v of different timesteps. For the other samplers it makes no difference.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from unet_caching.samplers.diffusion import Diffusion, Predict, alpha_at
from unet_caching.samplers.timesteps import LISTS, SPACINGS, final_alpha, is_listed, listed, make_timesteps

Progress = Callable[[int, Tensor], None]
Noise = Callable[[Sequence[int]], Tensor]


@dataclass(frozen=True)
class Solver:
    """A sampler without settings. about: its description in --help."""
    name: str
    about: str
    takes_eta: ClassVar[bool] = False
    takes_lists: ClassVar[bool] = True

    @property
    def spacings(self) -> Sequence[str]:
        """The names of the spacings of timesteps that it takes."""
        raise NotImplementedError

    def spacing(self, of_config: str) -> str:
        """The default spacing: the config's if the sampler takes it, else Stable Diffusion's."""
        return of_config if of_config in self.spacings or is_listed(of_config) else "leading"

    def calls(self, steps: int) -> int:
        """Network calls of a run."""
        return steps

    def check(self, steps: int, spacing: str, betas: Tensor) -> None:
        """Raise a ValueError for a spacing or number of steps that it does not take. betas: [num_timesteps]."""
        raise NotImplementedError

    def run(self, predict: Predict, x: Tensor, steps: int, spacing: str, diffusion: Diffusion, eta: float = 0.0,
            noise: Noise | None = None, progress: Progress | None = None) -> Tensor:
        """Sample x_0 from x_T.

        x: [batch, channels, height, width], standard normal. noise: draws per image, needed for eta > 0.
        progress: called after each network call with (step, x). Raises ValueError as `check` does.
        """
        raise NotImplementedError


@torch.no_grad()
def ddim(predict: Predict, x: Tensor, timesteps: Sequence[float], alphas_cumprod: Tensor, eta: float = 0.0,
         noise: Noise | None = None, final_alpha: float = 1.0, progress: Progress | None = None) -> Tensor:
    """Sample x_0 from x_T by DDIM (Song et al., arXiv 2010.02502), over any list of timesteps.

    predict(x, t, step) -> the predicted noise; t is the timestep, step = 0, 1, ... the number of the network call.
    x: [batch, channels, height, width], standard normal. timesteps: ascending; run from the last to the first.
    alphas_cumprod: [num_timesteps]. final_alpha: alpha_bar of the end point, 1 for a clean image.
    eta: 0 = deterministic, 1 = the variance of DDPM (Equation 16). noise: draws per image; eta > 0 without it raises
    ValueError. progress: called after each step with (step, x).
    """
    bars = torch.tensor([final_alpha, *(alpha_at(alphas_cumprod, t).item() for t in timesteps)], dtype=torch.float64)
    if noise is None and eta > 0:
        raise ValueError("eta above 0 needs noise to draw from")
    for step, i in enumerate(reversed(range(len(timesteps)))):
        alpha, alpha_next = bars[i + 1].item(), bars[i].item()
        sigma = eta * ((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)) ** 0.5         # Equation 16

        eps = predict(x, timesteps[i], step)
        x0 = (x - (1 - alpha) ** 0.5 * eps) / alpha ** 0.5                              # Equation 12: predicted x_0,
        x = alpha_next ** 0.5 * x0 + (1 - alpha_next - sigma ** 2) ** 0.5 * eps         # direction to x_t,
        if noise is not None and sigma > 0:
            x = x + sigma * noise(x.shape[1:])                                          # random noise
        if progress:
            progress(step, x)
    return x


class Ddim(Solver):
    """DDIM, over any timesteps."""
    takes_eta = True

    @property
    def spacings(self) -> Sequence[str]:
        return tuple(SPACINGS)

    def spacing(self, of_config: str) -> str:
        return of_config

    def check(self, steps: int, spacing: str, betas: Tensor) -> None:
        make_timesteps(spacing, steps, len(betas))

    def run(self, predict: Predict, x: Tensor, steps: int, spacing: str, diffusion: Diffusion, eta: float = 0.0,
            noise: Noise | None = None, progress: Progress | None = None) -> Tensor:
        alphas = diffusion.alphas_cumprod()
        timesteps = make_timesteps(spacing, steps, len(alphas))
        return ddim(predict, x, timesteps, alphas, eta, noise, final_alpha(spacing, alphas), progress)


# Our names of spacings -> diffusers' arguments. 'leading': multiples of num_timesteps // (num_steps + 1), plus one,
# without the lowest. 'linspace': diffusers' default with the scheduler_config.json published with Stable Diffusion
# v1.5. 'trailing': see `unet_caching.samplers.timesteps.trailing_timesteps`.
MULTISTEP: Mapping[str, Mapping[str, Any]] = {
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "linspace": {"timestep_spacing": "linspace"},
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"timestep_spacing": "trailing"},         # samplers/timesteps.py
    "ays": {"timestep_spacing": "trailing"}}


@dataclass(frozen=True)
class OfDiffusers(Solver):
    """A sampler that is a scheduler of diffusers.

    scheduler: the name of its class, imported when first needed, because diffusers takes seconds to import.
    arguments: of the class. by_spacing: further arguments for each spacing.
    """
    scheduler: str
    arguments: Mapping[str, Any]
    by_spacing: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: MULTISTEP)

    @property
    def spacings(self) -> Sequence[str]:
        return tuple(self.by_spacing)

    def build(self, kind: type, spacing: str, betas: Tensor, **more: Any) -> Any:
        """An object of diffusers' class, or of a subclass, `kind`. more: further arguments."""
        arguments = {**self.arguments, **self.by_spacing["trailing" if is_listed(spacing) else spacing], **more}
        return kind(len(betas), trained_betas=betas.tolist(), **arguments)

    def make(self, steps: int, spacing: str, betas: Tensor) -> Any:
        """diffusers' scheduler with its timesteps: descending, one for each network call.

        betas: float32 [num_timesteps]. Raises ValueError for a spacing or a number of steps that it does not take.
        """
        import diffusers

        own = self.own_timesteps(spacing, steps, betas)
        self.check_steps(steps, spacing if own is None else "trailing", len(betas))
        made = self.build(getattr(diffusers, self.scheduler), spacing, betas)
        made.set_timesteps(steps)
        if own is not None:
            set_listed(made, own)
        if hasattr(made, "set_begin_index"):
            made.set_begin_index(0)
        timesteps = made.timesteps.tolist()
        if len(timesteps) != self.calls(steps) or not 0 <= min(timesteps) <= max(timesteps) < len(betas):
            # The rounding of 61 trailing timesteps of 1000 makes 62, down to -1; 999 leading ones begin with 1000.
            raise ValueError(f"{self.name} cannot take {steps} {spacing} timesteps of {len(betas)}: diffusers makes "
                             f"{len(timesteps)} of them, from {max(timesteps)} to {min(timesteps)}")
        return made

    def own_timesteps(self, spacing: str, steps: int, betas: Tensor) -> list[float] | None:
        """The timesteps that replace diffusers', ascending; None if diffusers' are used. Raises ValueError."""
        if self.takes_lists and is_listed(spacing):
            return listed(spacing, steps, len(betas))
        return LISTS[spacing](steps, betas) if spacing in LISTS and spacing in self.by_spacing else None

    def check_steps(self, steps: int, spacing: str, num_timesteps: int) -> None:
        """Raise a ValueError for a spacing or number of steps that no noise schedule has."""
        if spacing not in self.by_spacing:
            known = (" or " if len(self.by_spacing) == 2 else ", ").join(self.by_spacing)
            raise ValueError(f"{self.name} takes timesteps {known}{', or a list' if self.takes_lists else ''}, "
                             f"got {spacing[:40]!r}")
        if not 1 <= steps < num_timesteps:
            raise ValueError(f"the number of steps must be from 1 to {num_timesteps - 1}, got {steps}")

    def check(self, steps: int, spacing: str, betas: Tensor) -> None:
        self.make(steps, spacing, betas)

    @torch.no_grad()
    def run(self, predict: Predict, x: Tensor, steps: int, spacing: str, diffusion: Diffusion, eta: float = 0.0,
            noise: Noise | None = None, progress: Progress | None = None) -> Tensor:
        betas = diffusion.betas()
        rule, own = self.make(steps, spacing, betas), self.own_timesteps(spacing, steps, betas)
        timesteps = rule.timesteps.tolist() if own is None else own[::-1]
        if x.dtype == torch.float64:            # for the tables of samplers/table.py
            rule.sigmas = torch.cat([_sigmas(rule.alphas_cumprod.double(), timesteps), rule.sigmas[-1:]])
        for step, t in enumerate(timesteps):
            x = rule.step(predict(x, t, step), t, x).prev_sample
            if progress:
                progress(step, x)
        return x


def set_listed(scheduler: Any, timesteps: Sequence[float]) -> None:
    """Set any timesteps, ascending, in a multistep scheduler of diffusers, after its set_timesteps for as many.

    This sets the same attributes as set_timesteps; few of the schedulers take a list.
    """
    own, device = list(timesteps)[::-1], scheduler.timesteps.device
    scheduler.timesteps, scheduler.num_inference_steps = torch.tensor(own, device=device), len(own)
    levels = _sigmas(scheduler.alphas_cumprod, own)
    scheduler.sigmas = torch.cat([levels.to(scheduler.sigmas), scheduler.sigmas[-1:]]).float()


def _sigmas(alphas: Tensor, timesteps: Sequence[float]) -> Tensor:
    at = torch.stack([alpha_at(alphas, t) for t in timesteps])
    return ((1 - at) / at) ** 0.5


class Plms(OfDiffusers):
    """PLMS: its first step takes two network calls, so the second timestep comes twice. All steps are equally long."""
    takes_lists: ClassVar[bool] = False

    def calls(self, steps: int) -> int:
        return steps + (steps > 1)

    def check_steps(self, steps: int, spacing: str, num_timesteps: int) -> None:
        super().check_steps(steps, spacing, num_timesteps)
        if spacing == "trailing" and num_timesteps % steps:
            # All steps of the scheduler are num_timesteps // num_steps long, for any timesteps.
            raise ValueError(f"plms with trailing timesteps needs a number of steps that divides {num_timesteps}, "
                             f"got {steps}")


def _dpm_solver(order: int) -> dict[str, Any]:
    return {"solver_order": order, "algorithm_type": "dpmsolver++", "solver_type": "midpoint",
            "lower_order_final": True, "final_sigmas_type": "zero"}


# Where runs end: 'leading' of DDIM and PLMS, and always DEIS, at the noise of timestep 0; all others at a clean image.
SOLVERS: Mapping[str, Solver] = {one.name: one for one in (
    # Song et al., arXiv 2010.02502
    Ddim("ddim", "DDIM"),
    # Liu et al., arXiv 2202.09778: the sampler of Stable Diffusion v1's tables. Each spacing has its own end point.
    Plms("plms", "PLMS", "PNDMScheduler", {"skip_prk_steps": True},
         {"leading": {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False},
          "trailing": {"timestep_spacing": "trailing", "set_alpha_to_one": True}}),
    # Lu et al., arXiv 2211.01095, second order, multistep; the last step is of first order (and the one before, below
    # 15 steps).
    OfDiffusers("dpmpp", "DPM-Solver++ (2M)", "DPMSolverMultistepScheduler", _dpm_solver(2)),
    # Zhao et al., arXiv 2302.04867, with the corrector B_2(h) = e^h - 1; the last step is of first order.
    OfDiffusers("unipc", "UniPC of order 2", "UniPCMultistepScheduler",
                {"solver_order": 2, "solver_type": "bh2", "predict_x0": True, "lower_order_final": True,
                 "final_sigmas_type": "zero"}),
    OfDiffusers("dpmpp3", "DPM-Solver++ of order 3", "DPMSolverMultistepScheduler", _dpm_solver(3)),
    # Zhang and Chen, arXiv 2204.13902; exponential integrators with polynomials in log rho.
    OfDiffusers("deis", "DEIS of order 3", "DEISMultistepScheduler",
                {"solver_order": 3, "solver_type": "logrho", "lower_order_final": True}),
)}


def solver(name: str) -> Solver:
    """The sampler of this name. Raises ValueError for a name that is not in SOLVERS."""
    if name not in SOLVERS:
        raise ValueError(f"unknown sampler {name!r}: choose from {', '.join(SOLVERS)}")
    return SOLVERS[name]
