"""DDPM as other programs know it (run/families.py). What takes seconds to import is imported when it is called."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from ddpm.config import Config
from ddpm.unet import UNet
from run.families import Family
from run.image_model import ImageModel
from run.machine import Machine
from run.spec import Run
from run.weights import sha256


def load_unet(config: Config, path: Path) -> UNet:
    from ddpm import checkpoint
    return checkpoint.load_unet(config, path)


def open_model(run: Run, machine: Machine) -> ImageModel:
    from ddpm.model import DDPM
    return DDPM(run, machine)


def theirs(config: Config, unet: UNet) -> nn.Module:
    from ddpm.diffusers_layout import diffusers_unet
    return diffusers_unet(config, unet)


def settings(run: Run) -> dict[str, Any]:
    return {"unet": asdict(run.config.unet)}


FAMILY = Family(
    name="ddpm", command="ddpm.sample", schema=Config, batch_size=64,
    unet=lambda config: UNet(**vars(config.unet)),
    shapes=lambda config: [(config.unet.in_channels, config.unet.resolution, config.unet.resolution)],
    resolution=lambda config: config.unet.resolution,
    load_unet=load_unet, open=open_model, settings=settings, checkpoint_sha256=sha256, theirs=theirs, judge="fid",
    references={"ddpm_cifar10": Path("data/references/cifar10.npz"),
                "ddpm_bedroom": Path("data/references/lsun_bedroom.npz"),
                "ddpm_church": Path("data/references/lsun_church.npz")})
