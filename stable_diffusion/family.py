"""Stable Diffusion as other programs know it (run/families.py)."""

from pathlib import Path

from run.families import Family
from stable_diffusion.condition import TextCondition
from stable_diffusion.config import Config
from stable_diffusion.unet import SIZE_CHANNELS, SIZES, make


def shapes(config: Config) -> list[tuple[int, ...]]:
    inputs = [(config.unet.in_channels, config.latent_size, config.latent_size),
              (config.tokens, config.unet.context_dim)]
    return inputs if config.xl is None else [*inputs, (config.xl.adm_in_channels - SIZES * SIZE_CHANNELS,), (SIZES,)]


FAMILY = Family(
    name="sd", aliases=("sdxl",), package="stable_diffusion", schema=Config, condition=TextCondition, batch_size=8,
    flags={"checkpoint": "model"},
    unet=lambda config: make(config.unet_arguments), shapes=shapes,
    resolution=lambda config: config.resolution,
    judge="clip_score", references={"sd_v15": Path("data/references/coco_val2017.npz")})
