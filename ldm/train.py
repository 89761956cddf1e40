"""Train a small class-conditional latent diffusion model on the emoji images of data/emoji/.

    python -m ldm.train --first-stage checkpoints/train_ldm_first_stage/first_stage.safetensors \\
                        --out checkpoints/train_ldm_emoji

Stop it whenever you like; the same command goes on where it stopped. It writes the EMA weights of the U-Net and the
class embedder together with the first stage, in float16 and in the layout of the public checkpoints, to
OUT/ldm_emoji.safetensors, beside a log (log.jsonl).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm import first_stage
from ldm.checkpoint import Model, published_state_dict
from ldm.config import Config, Train
from ldm.family import FAMILY
from ldm.unet import UNet
from run.cli import command
from run.machine import Device
from run.training import emoji
from run.training.loop import Loss, train
from run.training.program import Training, begin, denoising_error, of_latents, parameters, to_float, write_weights
from unet_caching.options import option, required


@dataclass(frozen=True)
class Options(Training):
    config: Path = option(Path("configs/ldm_emoji.yaml"), "with a `train` section (default: %(default)s)")
    first_stage: Path = required("what ldm.train_first_stage wrote")


class Conditional(nn.Module):
    """The U-Net and the class embedder, trained together."""

    def __init__(self, unet: UNet, classes: nn.Embedding):
        super().__init__()
        self.unet, self.classes = unet, classes

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self.unet(x, t, self.classes(labels)[:, None])


def squared_error(config: Config, settings: Train, latents: Tensor, labels: Tensor) -> Loss[Conditional]:
    """The squared error of the prediction for batches of indices into `latents`."""
    alphas = config.diffusion.alphas_cumprod().to(latents.device)
    prediction = config.diffusion.prediction

    def loss(model: Conditional, batch: Tensor, generator: torch.Generator) -> Tensor:
        unconditional = torch.rand(len(batch), generator=generator, device=batch.device) < settings.drop_label
        label = torch.where(unconditional, config.num_classes, labels[batch])
        return denoising_error(lambda x, t: model(x, t, label), latents[batch], alphas, prediction, generator,
                               settings.bf16)
    return loss


@command
def main(options: Options, where: Device) -> None:
    device = where.prepare()
    config = FAMILY.load_config(options.config)
    settings = begin(config.train, options.config)
    vq = first_stage.load(config.first_stage, options.first_stage).to(device)
    unet = UNet(**vars(config.unet), dropout=settings.dropout)
    model = Conditional(unet, nn.Embedding(config.num_classes + 1, config.unet.context_dim))

    # Each image twice, as it is and mirrored, encoded once; training draws indices.
    names = config.trained_classes(settings)
    images, rows = emoji.load_groups(config.first_stage.resolution, "train", settings.groups)
    labels = torch.tensor([names.index(f"{row.group}, {row.style}") for row in rows])
    pixels = torch.cat([images, images.flip(-1)]).split(64)
    latents = torch.cat([first_stage.encode(vq, to_float(part.to(device))) for part in pixels])
    print(f"{len(images)} images of {config.num_classes} classes, {of_latents(latents)}, {parameters(model)}")

    ema = train(model, squared_error(config, settings, latents, labels.repeat(2).to(device)),
                torch.arange(len(latents), device=device), settings.loop, options.out, where.device)
    write_weights(published_state_dict(Model(ema.unet, vq, ema.classes)), options.out / f"{config.name}.safetensors")


if __name__ == "__main__":
    main()
