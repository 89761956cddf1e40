"""DDPM as other programs know it (run/families.py)."""

from pathlib import Path

from ddpm.config import Config
from ddpm.unet import UNet
from run.families import Family

FAMILY = Family(
    name="ddpm", package="ddpm", schema=Config, batch_size=64,
    unet=lambda config: UNet(**vars(config.unet)),
    shapes=lambda config: [(config.unet.in_channels, config.unet.resolution, config.unet.resolution)],
    resolution=lambda config: config.unet.resolution,
    judge="fid", references={"ddpm_cifar10": Path("data/references/cifar10.npz"),
                             "ddpm_bedroom": Path("data/references/lsun_bedroom.npz"),
                             "ddpm_church": Path("data/references/lsun_church.npz")})
