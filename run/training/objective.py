"""The objective that every denoiser here is trained on."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from unet_caching.samplers.diffusion import training_target


def denoising_error(network: Callable[[Tensor, Tensor], Tensor], x0: Tensor, alphas_cumprod: Tensor, prediction: str,
                    generator: torch.Generator, bf16: bool) -> Tensor:
    """The squared error of the predicted noise (Ho et al., arXiv 2006.11239, Equation 14), or v, at uniform timesteps.

    network(x_t, t) -> its output, under autocast to bfloat16 where `bf16`; t: int64 [batch].
    x0: [batch, channels, height, width], clean; alphas_cumprod: [timesteps], on its device.
    """
    device = x0.device
    t = torch.randint(0, len(alphas_cumprod), (len(x0),), generator=generator, device=device)
    noise = torch.randn(x0.shape, generator=generator, device=device)
    alpha = alphas_cumprod[t][:, None, None, None]
    x_t = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        output = network(x_t, t)
    return F.mse_loss(output.float(), training_target(prediction, x0, noise, alpha))
