"""LDM as other programs know it (runs/families.py). What takes seconds to import is imported when it is called."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from caching.options import option
from ldm.config import Config
from ldm.unet import UNet
from runs.families import Condition, Family
from runs.image_model import ImageModel
from runs.machine import Machine
from runs.spec import Run


@dataclass(frozen=True)
class ClassCondition(Condition):
    """Which class each image shows."""
    guidance: float | None = option(None, "classifier-free guidance; 1 = none, anything else doubles the batch")
    labels: str = option("balanced", "balanced (default): seed mod the number of classes; random: uniform, from the "
                                     "seed; or a list like 207,360 or 0-9, taken in turn")

    def name(self) -> tuple[list[str], list[str]]:
        return [], [] if self.guidance is None else [f"guidance{self.guidance:g}"]


def shapes(config: Config) -> list[tuple[int, ...]]:
    size = config.first_stage.resolution // 2 ** (len(config.first_stage.ch_mult) - 1)
    return [(config.unet.in_channels, size, size), (1, config.unet.context_dim)]        # one token: the class


def load_unet(config: Config, path: Path) -> nn.Module:
    from ldm.checkpoint import load_checkpoint
    return load_checkpoint(config, path).unet


def open_model(run: Run, machine: Machine) -> ImageModel:
    from ldm.model import LDM
    return LDM(run, machine)


def theirs(config: Config, unet: nn.Module) -> nn.Module:
    from ldm.diffusers_layout import diffusers_unet
    return diffusers_unet(config, unet)


FAMILY = Family(
    name="ldm", command="ldm.sample", schema=Config, condition=ClassCondition, batch_size=32,
    unet=lambda config: UNet(**vars(config.unet)), shapes=shapes,
    resolution=lambda config: config.first_stage.resolution,
    load_unet=load_unet, open=open_model, theirs=theirs, judge="adm", packed=True,
    references={"ldm_cin256": Path("data/references/VIRTUAL_imagenet256_labeled.npz")})
