"""Stable Diffusion as other programs know it (run/families.py). Slow imports wait until they are needed."""

from pathlib import Path
from typing import Any

from torch import nn

from run.families import Family
from run.image_model import ImageModel
from run.machine import Machine
from run.spec import Run
from stable_diffusion.condition import TextCondition
from stable_diffusion.config import Config
from stable_diffusion.unet import SIZE_CHANNELS, SIZES, UNet, make


def load_unet(config: Config, path: Path) -> UNet:
    from stable_diffusion import checkpoint
    return checkpoint.load_unet(config, path)


def open_model(run: Run, machine: Machine) -> ImageModel:
    from stable_diffusion.model import StableDiffusion
    return StableDiffusion(run, machine)


def theirs(config: Config, unet: UNet) -> nn.Module:
    from ldm.diffusers_layout import diffusers_unet
    return diffusers_unet(config.unet_arguments, unet)


def shapes(config: Config) -> list[tuple[int, ...]]:
    found = [(config.unet.in_channels, config.latent_size, config.latent_size),
             (config.tokens, config.unet.context_dim)]
    return found if config.xl is None else [*found, (config.xl.adm_in_channels - SIZES * SIZE_CHANNELS,), (SIZES,)]


def settings(run: Run) -> dict[str, Any]:
    from stable_diffusion import model
    return model.settings(run)


def checkpoint_sha256(path: Path) -> str:
    from stable_diffusion import checkpoint
    return checkpoint.checkpoint_sha256(path)


FAMILY = Family(
    name="sd", aliases=("sdxl",), command="stable_diffusion.sample", schema=Config, condition=TextCondition,
    batch_size=8, flags={"checkpoint": "model"},
    unet=lambda config: make(config.unet_arguments), shapes=shapes,
    resolution=lambda config: config.resolution,
    load_unet=load_unet, open=open_model, settings=settings, checkpoint_sha256=checkpoint_sha256,
    theirs=theirs, judge="clip_score",
    references={"sd_v15": Path("data/references/coco_val2017.npz")})
