"""A latent diffusion model from seeds and classes to images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm import first_stage
from ldm.checkpoint import load_checkpoint
from ldm.condition import ClassCondition
from ldm.config import Config
from run.folder import RunFolder, quoted, to_uint8
from run.image_model import ImageModel
from run.labels import Labels, read_names
from run.machine import Machine
from run.spec import Run
from unet_caching.speed.accelerate import place

DECODED_AT_ONCE = 8     # images; decoding more at once would take more memory than the U-Net does


def names_of_classes(config: Config) -> list[str] | None:
    """The names of the classes in the order of the labels, from the config's file or from its training images.

    None without either. Raises UserError for another number of names than of classes.
    """
    if config.class_names is not None:
        return read_names(Path(config.class_names), config.num_classes)
    return None if config.train is None else config.trained_classes(config.train)


class LDM(ImageModel[Config, ClassCondition]):
    """A class-conditional model in the latents of a first stage."""

    def __init__(self, run: Run, machine: Machine):
        super().__init__(run, machine)
        self.labels = Labels.parse(self.condition.labels, self.config.num_classes)
        self.names = names_of_classes(self.config)

    def read(self, checkpoint: Path) -> None:
        model = load_checkpoint(self.config, checkpoint, **self.run.weights)
        self.unet = place(model.unet, self.device, self.dtype)
        self.classes = model.classes.to(self.device, self.dtype)
        # In float32 for every --dtype: half precision would choose other codes, and it runs only once per image.
        self.first_stage = place(model.first_stage, self.device)

    def context(self, seeds: Sequence[int]) -> Sequence[Tensor]:
        label = torch.tensor([self.labels.of(seed) for seed in seeds], device=self.device)
        if self.run.guidance != 1:
            label = torch.cat([torch.full_like(label, self.config.num_classes), label])
        return [self.classes(label)[:, None]]                           # [batch, 1 token, context_dim]

    def decode(self, latents: Tensor) -> np.ndarray:
        parts = latents.split(DECODED_AT_ONCE)
        return np.concatenate([to_uint8(first_stage.decode(self.first_stage, part)) for part in parts])

    def describe(self, seeds: Sequence[int]) -> list[str]:
        return [self.labels.describe(seeds)]

    def write_listing(self, folder: RunFolder) -> None:
        def line(seed: int) -> str:
            label = self.labels.of(seed)
            return f"{seed},{label}" + (f",{quoted(self.names[label])}" if self.names else "")

        folder.write_listing("images.csv", "seed,label,class" if self.names else "seed,label", line)


MODEL = LDM
