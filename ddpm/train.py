"""Train a small DDPM on the emoji images of data/emoji/.

    python -m ddpm.train --config configs/ddpm_emoji.yaml --out checkpoints/train_ddpm_emoji

Stop it whenever you like; the same command goes on where it stopped. It writes the EMA weights, in float16 and under
the published DDPM names, to OUT/ddpm_emoji.safetensors, beside a log (log.jsonl) and sample grids (grid-IMAGES.png).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ddpm.checkpoint import load_checkpoint, published_state_dict
from ddpm.config import load_config
from ddpm.unet import UNet
from run.cli import command
from run.folder import to_uint8
from run.machine import Device
from run.training import emoji
from run.training.loop import Grid, Loss, train
from run.training.objective import denoising_error
from unet_caching.errors import UserError, as_user_error
from unet_caching.options import option, required
from unet_caching.samplers.ddim import ddim, uniform_timesteps
from unet_caching.samplers.diffusion import predicted_noise
from unet_caching.samplers.noise import SeededNoise


def squared_error(alphas: Tensor, prediction: str, autocast: bool) -> Loss[UNet]:
    """The squared error of the prediction for batches of images, mirrored at random."""
    def loss(model: UNet, batch: Tensor, generator: torch.Generator) -> Tensor:
        flip = torch.rand(len(batch), generator=generator, device=batch.device) < 0.5
        x0 = torch.where(flip[:, None, None, None], batch.flip(-1), batch).float() / 127.5 - 1
        return denoising_error(model, x0, alphas, prediction, generator, autocast)
    return loss


def sample_grid(alphas: Tensor, prediction: str, shape: Sequence[int], steps: int, count: int = 50) -> Grid[UNet]:
    """A function of the EMA network that samples the images of seeds 0..count-1."""
    def grid(unet: UNet) -> np.ndarray:
        device = alphas.device
        x = SeededNoise(range(count), device)(shape)

        def predict(x: Tensor, t: int, step: int) -> Tensor:
            return predicted_noise(prediction, unet(x, torch.full((len(x),), t, device=device)), x, alphas[t])

        return to_uint8(ddim(predict, x, uniform_timesteps(steps, len(alphas)), alphas.cpu()))
    return grid


@dataclass(frozen=True)
class Options:
    config: Path = option(Path("configs/ddpm_emoji.yaml"), "with a `train` section (default: %(default)s)")
    out: Path = required("folder of the training run; resumed if it has one")


@command
def main(args: Options, where: Device) -> None:
    where.prepare()

    config = load_config(args.config)
    settings = config.train
    if settings is None:
        raise UserError(f"{args.config} has no train section: it is a published model")
    torch.manual_seed(settings.loop.seed)
    with as_user_error(f"{args.config}: "):
        unet = UNet(**vars(config.unet), dropout=settings.dropout)
        if settings.start is not None:
            load_checkpoint(unet, Path(settings.start))
        tiles, rows = emoji.load(config.unet.resolution, "train", settings.group)
    images = torch.from_numpy(tiles).permute(0, 3, 1, 2).contiguous().to(where.device)
    alphas = config.alphas_cumprod().to(where.device)
    print(f"{len(rows)} images, {sum(p.numel() for p in unet.parameters()):,} parameters")

    prediction = config.diffusion.prediction
    ema = train(unet, squared_error(alphas, prediction, settings.bf16), images, settings.loop, args.out,
                sample_grid(alphas, prediction, images.shape[1:], steps=50), where.device)
    target = args.out / f"{config.name}.safetensors"
    weights = {name: value.half().contiguous().cpu() for name, value in published_state_dict(ema).items()}
    save_file(weights, f"{target}.tmp")
    os.replace(f"{target}.tmp", target)
    print(f"wrote {target}, {target.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
