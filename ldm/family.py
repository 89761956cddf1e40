"""LDM as other programs know it (run/families.py). What takes seconds to import is imported when it is called."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from torch import nn

from ldm.condition import ClassCondition
from ldm.config import Config
from ldm.unet import UNet
from run.families import Family
from run.image_model import ImageModel
from run.labels import Labels
from run.machine import Machine
from run.spec import Run


def shapes(config: Config) -> list[tuple[int, ...]]:
    size = config.first_stage.resolution // 2 ** (len(config.first_stage.ch_mult) - 1)
    return [(config.unet.in_channels, size, size), (1, config.unet.context_dim)]        # one token: the class


def load_unet(config: Config, path: Path) -> UNet:
    from ldm.checkpoint import load_checkpoint
    return load_checkpoint(config, path).unet


def open_model(run: Run, machine: Machine) -> ImageModel:
    from ldm.model import LDM
    return LDM(run, machine)


def theirs(config: Config, unet: UNet) -> nn.Module:
    from ldm.diffusers_layout import diffusers_unet
    return diffusers_unet(vars(config.unet), unet)


def settings(run: Run) -> dict[str, Any]:
    config, asked = cast(Config, run.config), cast(ClassCondition, run.spec.condition)
    labels = Labels.parse(asked.labels, config.num_classes)
    return {"unet": asdict(config.unet), "first_stage": asdict(config.first_stage), "num_classes": labels.num_classes,
            "guidance": run.guidance, "labels": labels.rule, "first_stage_dtype": "fp32"}


def checkpoint_sha256(path: Path) -> str:
    from ldm import checkpoint
    return checkpoint.checkpoint_sha256(path)


FAMILY = Family(
    name="ldm", command="ldm.sample", schema=Config, condition=ClassCondition, batch_size=32,
    unet=lambda config: UNet(**vars(config.unet)), shapes=shapes,
    resolution=lambda config: config.first_stage.resolution,
    load_unet=load_unet, open=open_model, settings=settings, checkpoint_sha256=checkpoint_sha256,
    theirs=theirs, judge="adm", packed=True,
    references={"ldm_cin256": Path("data/references/VIRTUAL_imagenet256_labeled.npz")})
