"""What the training programs share around the loop: options, the config's section, the objective, weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from run.training.loop import Section
from run.weights import save_tensors
from unet_caching.errors import UserError
from unet_caching.options import required
from unet_caching.samplers.diffusion import training_target

Part = TypeVar("Part", bound=Section)


@dataclass(frozen=True)
class Training:
    """Where a training program writes."""
    title: ClassVar[str] = "the training run"
    out: Path = required("its folder; resumed if it has one")


def begin(section: Part | None, path: Path, name: str = "train") -> Part:
    """The section of a config that says how a model is trained, once its seed is set. Raises UserError without one."""
    if section is None:
        raise UserError(f"{path} has no {name} section: it is a published model")
    torch.manual_seed(section.loop.seed)
    return section


def to_float(images: Tensor) -> Tensor:
    """uint8 -> -1..1."""
    return images.float() / 127.5 - 1


def mirrored(batch: Tensor, generator: torch.Generator) -> Tensor:
    """A batch of images, each mirrored at random."""
    flip = torch.rand(len(batch), generator=generator, device=batch.device) < 0.5
    return torch.where(flip[:, None, None, None], batch.flip(-1), batch)


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


def parameters(model: nn.Module) -> str:
    """How many parameters a model has, in words."""
    return f"{sum(value.numel() for value in model.parameters()):,} parameters"


def of_latents(latents: Tensor) -> str:
    """The shape and the spread of latents, in words."""
    return (f"latents {list(latents.shape[1:])} of mean {latents.mean():.3f} and deviation {latents.std():.3f}")


def write_weights(tensors: Mapping[str, Tensor], target: Path) -> None:
    """Write tensors in float16, and say so."""
    save_tensors({name: value.half() for name, value in tensors.items()}, target)
    print(f"wrote {target}, {target.stat().st_size / 2**20:.1f} MiB")
