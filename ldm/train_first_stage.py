"""Train a small autoencoder on the emoji images: the first stage of the latent model.

    python -m ldm.train_first_stage --config configs/ldm_emoji.yaml --out checkpoints/train_ldm_first_stage

Stop it whenever you like; the same command goes on where it stopped. While it trains, the latents are continuous, with
a little noise added, so that the decoder forgives what quantisation and diffusion will do to them. At the end they are
scaled to mean 0 and variance 1 (LDM's scale factor is then 1, as for the published VQ-f4) and the codebook is fitted to
them by k-means. It writes the EMA weights, in float16 and under the published names, to OUT/first_stage.safetensors.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.family import FAMILY
from ldm.first_stage import build, decode, encode, normalise, published_state_dict
from run.cli import command
from run.libraries import diffusers
from run.machine import Device
from run.psnr import psnr
from run.training import emoji
from run.training.loop import Loss, train
from run.training.program import Training, begin, mirrored, parameters, to_float, write_weights
from unet_caching.options import option


@dataclass(frozen=True)
class Options(Training):
    config: Path = option(Path("configs/ldm_emoji.yaml"), "with a `train_first_stage` section (default: %(default)s)")
    data: Path = option(emoji.FOLDER, "folder with emoji_SIZE.webp and index.csv")


def reconstruction_loss(noise: float, penalty: float, autocast: bool) -> Loss[diffusers.VQModel]:
    """The absolute error of the pixels and of their differences to the right and below, which keep edges sharp."""
    def loss(vq: diffusers.VQModel, batch: Tensor, generator: torch.Generator) -> Tensor:
        x = to_float(mirrored(batch, generator))
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=autocast):
            z = vq.encode(x).latents.float()
            noisy = z + noise * torch.randn(z.shape, generator=generator, device=z.device)
            y = vq.decode(noisy, force_not_quantize=True).sample.float()
        edges = sum(F.l1_loss(y.diff(dim=d), x.diff(dim=d)) for d in (-1, -2))
        return F.l1_loss(y, x) + edges + penalty * z.square().mean()
    return loss


def reconstruction_psnr(vq: diffusers.VQModel, images: Tensor, quantize: bool) -> float:
    """Decibels, of reconstructions clamped to [-1, 1], over all images at once."""
    errors = [(decode(vq, encode(vq, to_float(x)), quantize).clamp(-1, 1) - to_float(x)).square().mean(dim=(1, 2, 3))
              for x in images.split(64)]
    return float(psnr(torch.cat(errors).mean().item(), span=2))


def fit_codebook(codes: Tensor, vectors: Tensor, generator: torch.Generator, rounds: int = 8) -> None:
    """k-means in place: codes [n_embed, channels] become centres of vectors [many, channels]; none is left unused."""
    codes.copy_(vectors[torch.randperm(len(vectors), generator=generator)[:len(codes)]])
    for _ in range(rounds):
        nearest = torch.cat([torch.cdist(part, codes).argmin(1) for part in vectors.split(2048)])
        count = torch.bincount(nearest, minlength=len(codes))
        sums = torch.zeros_like(codes).index_add_(0, nearest, vectors)
        codes.copy_(sums / count.clamp(min=1)[:, None])
        empty = (count == 0).nonzero()[:, 0]
        codes[empty] = vectors[torch.randperm(len(vectors), generator=generator)[:len(empty)]]


@torch.no_grad()
def finish(vq: diffusers.VQModel, images: Tensor, held_out: Tensor, target: Path) -> None:
    """Standardise the latents, fit the codebook, print how good the result is, and write it."""
    vectors = torch.cat([encode(vq, to_float(x)) for x in images.split(64)]).permute(0, 2, 3, 1).flatten(0, 2)
    generator = torch.Generator().manual_seed(0)
    some = torch.randperm(len(vectors), generator=generator)[:12 * vq.config.num_vq_embeddings]
    mean, deviation = vectors.mean(0), vectors.std(0)
    normalise(vq, mean, deviation)
    vectors = (vectors - mean) / deviation
    fit_codebook(vq.quantize.embedding.weight, vectors[some.to(vectors.device)], generator)
    weights = published_state_dict(vq)
    vq.load_state_dict({name: value.half().float() for name, value in vq.state_dict().items()})
    print(f"held-out PSNR {reconstruction_psnr(vq, held_out, quantize=False):.2f} dB continuous, "
          f"{reconstruction_psnr(vq, held_out, quantize=True):.2f} dB quantised")
    write_weights(weights, target)


@command
def main(options: Options, where: Device) -> None:
    device = where.prepare()
    config = FAMILY.load_config(options.config)
    settings, sizes = begin(config.train_first_stage, options.config, "train_first_stage"), config.first_stage
    vq = build(**vars(sizes))

    def load(split: str) -> Tensor:
        images, _ = emoji.load(sizes.resolution, split, folder=options.data)
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)

    images, held_out = load("train"), load("held-out")
    print(f"{len(images)} images of {sizes.resolution} pixels, {config.latent_size}x{config.latent_size}x"
          f"{sizes.z_channels} latents, {parameters(vq)}")
    ema = train(vq, reconstruction_loss(settings.noise, settings.penalty, settings.bf16), images, settings.loop,
                options.out, where.device)
    finish(ema, images, held_out, options.out / "first_stage.safetensors")


if __name__ == "__main__":
    main()
