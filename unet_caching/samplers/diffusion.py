"""The noise schedule of a network, and whether it predicts the noise or v."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# predict(x, t, step) -> the predicted noise. step = 0, 1, ... is the number of the network call, t its timestep: a
# number, or a tensor without dimensions if it is learned.
Predict = Callable[[Tensor, Any, int], Tensor]


def make_betas(schedule: str, num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """The betas, the noise that each timestep adds: float32 [num_timesteps].

    schedule: 'linear' (Ho et al., arXiv 2006.11239: the betas grow linearly), 'scaled_linear' (LDM, Stable Diffusion:
    their square roots grow linearly) or 'cosine' (Nichol and Dhariwal, arXiv 2102.09672, Equation 17, without
    beta_start and beta_end). Raises ValueError for any other name.
    """
    if schedule == "linear":
        betas = torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
    elif schedule == "scaled_linear":
        betas = torch.linspace(beta_start ** 0.5, beta_end ** 0.5, num_timesteps, dtype=torch.float64) ** 2
    elif schedule == "cosine":
        t = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    else:
        raise ValueError(f"unknown beta schedule {schedule!r}: choose linear, scaled_linear or cosine")
    return betas.float()


def at_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas with zero terminal SNR: no image is left at the last timestep (Lin et al., arXiv 2305.08891, Algorithm 1).

    The last alpha_bar is 2^-24, as in diffusers' schedulers, so that its root can be divided by.
    """
    root = (1 - betas.double()).cumprod(0).sqrt()
    bars = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    bars[-1] = 2.0 ** -24
    return (1 - bars / torch.cat([bars.new_ones(1), bars[:-1]])).float()


def alpha_at(alphas: Tensor, t: float | Tensor) -> Tensor:
    """Alpha_bar at a timestep. Between whole timesteps log(alpha / (1 - alpha)) is interpolated linearly.

    alphas: [num_timesteps]. Differentiable if t is a tensor without dimensions.
    """
    if not isinstance(t, Tensor) and t == int(t):
        return alphas[int(t)]
    low = min(int(t), len(alphas) - 2)
    log_snr = torch.logit(alphas[low:low + 2].double())
    return torch.sigmoid(torch.lerp(log_snr[0], log_snr[1], t - low)).to(alphas.dtype)


PREDICTIONS = {"noise": "epsilon", "v": "v_prediction"}        # our name -> diffusers'


def predicted_noise(prediction: str, output: Tensor, x: Tensor, alpha: Tensor | float) -> Tensor:
    """Convert a network's output to noise, at a noise level alpha = alphas_cumprod[t].

    prediction: 'noise' (Ho et al.) or 'v' = sqrt(alpha) noise - sqrt(1 - alpha) x_0 (Salimans and Ho,
    arXiv 2202.00512).
    """
    return output if prediction == "noise" else alpha ** 0.5 * output + (1 - alpha) ** 0.5 * x


def clean_image(x: Tensor, noise: Tensor, alpha: Tensor | float) -> Tensor:
    """The clean image in x without its noise, at a noise level alpha = alphas_cumprod[t]."""
    return (x - (1 - alpha) ** 0.5 * noise) / alpha ** 0.5


def guided(output: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): doubled batch [uncond, cond] -> [batch, ...].

    guidance: the scale; 1 gives the conditional output, 0 the unconditional one.
    """
    uncond, cond = output.chunk(2)
    return uncond + guidance * (cond - uncond)


def training_target(prediction: str, x0: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """The target of the network's output in training: the noise, or v (see `predicted_noise`)."""
    return noise if prediction == "noise" else alpha ** 0.5 * noise - (1 - alpha) ** 0.5 * x0


@dataclass
class Diffusion:
    """The `diffusion` section of a config: the noise schedule and prediction that its network was trained for.

    Raises ValueError for an unknown prediction, and for a network that predicts noise at zero terminal SNR.
    """
    beta_schedule: str = "linear"
    num_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    prediction: str = "noise"           # noise, v
    zero_terminal_snr: bool = False     # use the betas of `at_zero_terminal_snr`

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"unknown prediction {self.prediction!r}: choose from {', '.join(PREDICTIONS)}")
        if self.zero_terminal_snr and self.prediction == "noise":
            raise ValueError("zero_terminal_snr needs prediction: v, since the noise then says nothing of the image")

    def betas(self) -> Tensor:
        """The noise that each timestep adds: float32 [num_timesteps]. Raises ValueError for an unknown schedule."""
        betas = make_betas(self.beta_schedule, self.num_timesteps, self.beta_start, self.beta_end)
        return at_zero_terminal_snr(betas) if self.zero_terminal_snr else betas

    def alphas_cumprod(self) -> Tensor:
        """The product of (1 - beta) up to each timestep: float32 [num_timesteps]. Raises ValueError as `betas` does."""
        # The released DDPM code has betas and products in float32, and its trajectories depend on that.
        return (1 - self.betas()).cumprod(0)
