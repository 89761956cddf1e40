"""LDM as other programs know it (run/families.py)."""

from pathlib import Path

from ldm.condition import ClassCondition
from ldm.config import Config
from ldm.unet import UNet
from run.families import Family


def shapes(config: Config) -> list[tuple[int, ...]]:
    size = config.latent_size
    return [(config.unet.in_channels, size, size), (1, config.unet.context_dim)]        # one token: the class


FAMILY = Family(
    name="ldm", package="ldm", schema=Config, condition=ClassCondition, batch_size=32,
    unet=lambda config: UNet(**vars(config.unet)), shapes=shapes,
    resolution=lambda config: config.first_stage.resolution,
    judge="adm", references={"ldm_cin256": Path("data/references/VIRTUAL_imagenet256_labeled.npz")})
