"""Train a small class-conditional latent diffusion model on the emoji images of data/emoji/.

    python -m ldm.train --first-stage checkpoints/train_ldm_first_stage/first_stage.safetensors \\
                        --out checkpoints/train_ldm_emoji

Stop it whenever you like; the same command goes on where it stopped. It writes the EMA weights of the U-Net and the
class embedder together with the first stage, in float16 and in the layout of the public checkpoints, to
OUT/ldm_emoji.safetensors, beside a log (log.jsonl) and sample grids (grid-IMAGES.png, one row per class).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import VQModel
from torch import Tensor, nn

from ldm import first_stage
from ldm.checkpoint import Model, published_state_dict
from ldm.config import Config, Train, load_config
from ldm.unet import UNet
from run.cli import command
from run.folder import to_uint8
from run.machine import Device
from run.training import emoji
from run.training.loop import Grid, Loss, train
from run.training.objective import denoising_error
from run.weights import read_tensors, save_tensors, tensors_of
from unet_caching.errors import UserError
from unet_caching.options import option, required
from unet_caching.samplers.ddim import ddim, offset_timesteps
from unet_caching.samplers.diffusion import guided, predicted_noise
from unet_caching.samplers.noise import SeededNoise


class Conditional(nn.Module):
    """The U-Net and the class embedder, trained together."""

    def __init__(self, unet: UNet, classes: nn.Embedding):
        super().__init__()
        self.unet, self.classes = unet, classes

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self.unet(x, t, self.classes(labels)[:, None])


def load_images(config: Config, groups: Sequence[str], split: str) -> tuple[Tensor, Tensor]:
    """The images of groups, uint8 [n, 3, size, size], and their labels [n]. Raises UserError for other classes."""
    images, rows = emoji.load_groups(config.first_stage.resolution, split, groups)
    names = emoji.class_names(groups, rows)
    if len(names) != config.num_classes:
        raise UserError(f"num_classes is {config.num_classes}, but the groups have {len(names)} classes: {names}")
    return images, torch.tensor([names.index(f"{row.group}, {row.style}") for row in rows])


def squared_error(config: Config, settings: Train, latents: Tensor, labels: Tensor) -> Loss[Conditional]:
    """The squared error of the prediction for batches of indices into `latents`."""
    alphas = config.alphas_cumprod().to(latents.device)
    prediction = config.diffusion.prediction

    def loss(model: Conditional, batch: Tensor, generator: torch.Generator) -> Tensor:
        unconditional = torch.rand(len(batch), generator=generator, device=batch.device) < settings.drop_label
        label = torch.where(unconditional, config.num_classes, labels[batch])
        return denoising_error(lambda x, t: model(x, t, label), latents[batch], alphas, prediction, generator,
                               settings.bf16)
    return loss


def sample_grid(config: Config, vq: VQModel, shape: torch.Size, steps: int = 50, columns: int = 10
                ) -> Grid[Conditional]:
    """A function of the EMA networks that samples `columns` images of every class, with the configured guidance."""
    alphas = config.alphas_cumprod()
    count = columns * config.num_classes

    def grid(model: Conditional) -> np.ndarray:
        device = next(model.parameters()).device
        labels = torch.arange(count, device=device) // columns
        both = torch.cat([torch.full_like(labels, config.num_classes), labels])

        def predict(x: Tensor, t: int, step: int) -> Tensor:
            output = model(torch.cat([x, x]), torch.full((2 * count,), t, device=device), both)
            return predicted_noise(config.diffusion.prediction, guided(output, config.sampler.guidance), x, alphas[t])

        x = SeededNoise(range(count), device)(shape)
        x = ddim(predict, x, offset_timesteps(steps, len(alphas)), alphas, final_alpha=alphas[0].item())
        return to_uint8(first_stage.decode(vq, x))
    return grid


@dataclass(frozen=True)
class Options:
    config: Path = option(Path("configs/ldm_emoji.yaml"), "with a `train` section (default: %(default)s)")
    first_stage: Path = required("what ldm.train_first_stage wrote")
    out: Path = required("folder of the training run; resumed if it has one")


@command
def main(args: Options, where: Device) -> None:
    where.prepare()

    config = load_config(args.config)
    settings = config.train
    if settings is None:
        raise UserError(f"{args.config} has no train section: it is a published model")
    torch.manual_seed(settings.loop.seed)
    vq = first_stage.build(**vars(config.first_stage))
    first_stage.load_state_dict(vq, tensors_of(read_tensors(args.first_stage), args.first_stage, "first stage"))
    vq = vq.eval().requires_grad_(False).to(where.device)
    unet = UNet(**vars(config.unet), dropout=settings.dropout)
    model = Conditional(unet, nn.Embedding(config.num_classes + 1, config.unet.context_dim))

    # Each image twice, as it is and mirrored, encoded once; training draws indices.
    images, labels = load_images(config, settings.groups, "train")
    pixels = torch.cat([images, images.flip(-1)]).split(64)
    latents = torch.cat([first_stage.encode(vq, x.to(where.device).float() / 127.5 - 1) for x in pixels])
    print(f"{len(images)} images of {config.num_classes} classes, latents {list(latents.shape[1:])} of mean "
          f"{latents.mean():.3f} and deviation {latents.std():.3f}, "
          f"{sum(p.numel() for p in model.parameters()):,} parameters")

    ema = train(model, squared_error(config, settings, latents, labels.repeat(2).to(where.device)),
                torch.arange(len(latents), device=where.device), settings.loop, args.out,
                sample_grid(config, vq, latents.shape[1:]), where.device)
    target = args.out / f"{config.name}.safetensors"
    whole = Model(ema.unet, vq, ema.classes)
    save_tensors({name: value.half() for name, value in published_state_dict(whole).items()}, target)
    print(f"wrote {target}, {target.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
