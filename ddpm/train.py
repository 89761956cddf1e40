"""Train a small DDPM on the emoji images of data/emoji/.

    python -m ddpm.train --config configs/ddpm_emoji.yaml --out checkpoints/train_ddpm_emoji

Stop it whenever you like; the same command goes on where it stopped. It writes the EMA weights, in float16 and under
the published DDPM names, to OUT/ddpm_emoji.safetensors, beside a log (log.jsonl).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ddpm.checkpoint import load_checkpoint, published_state_dict
from ddpm.family import FAMILY
from ddpm.unet import UNet
from run.cli import command
from run.machine import Device
from run.training import emoji
from run.training.loop import Loss, train
from run.training.program import Training, begin, denoising_error, mirrored, parameters, to_float, write_weights
from unet_caching.errors import as_user_error
from unet_caching.options import option
from unet_caching.samplers.diffusion import Diffusion


@dataclass(frozen=True)
class Options(Training):
    config: Path = option(Path("configs/ddpm_emoji.yaml"), "with a `train` section (default: %(default)s)")


def squared_error(diffusion: Diffusion, bf16: bool, device: str) -> Loss[UNet]:
    """The squared error of the prediction for batches of images, mirrored at random."""
    alphas = diffusion.alphas_cumprod().to(device)

    def loss(model: UNet, batch: Tensor, generator: torch.Generator) -> Tensor:
        x0 = to_float(mirrored(batch, generator))
        return denoising_error(model, x0, alphas, diffusion.prediction, generator, bf16)
    return loss


@command
def main(options: Options, where: Device) -> None:
    where.prepare()
    config = FAMILY.load_config(options.config)
    settings, diffusion = begin(config.train, options.config), config.diffusion
    with as_user_error(f"{options.config}: "):
        unet = UNet(**vars(config.unet), dropout=settings.dropout)
        if settings.start is not None:
            load_checkpoint(unet, Path(settings.start))
        tiles, rows = emoji.load(config.unet.resolution, "train", settings.group)
    images = torch.from_numpy(tiles).permute(0, 3, 1, 2).contiguous().to(where.device)
    print(f"{len(rows)} images, {parameters(unet)}")
    ema = train(unet, squared_error(diffusion, settings.bf16, where.device), images, settings.loop, options.out,
                where.device)
    write_weights(published_state_dict(ema), options.out / f"{config.name}.safetensors")


if __name__ == "__main__":
    main()
