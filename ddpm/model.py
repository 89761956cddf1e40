"""A DDPM from seeds to images."""

from pathlib import Path

import numpy as np
from torch import Tensor

from ddpm.checkpoint import load_unet
from ddpm.config import Config
from run.families import Condition
from run.folder import to_uint8
from run.image_model import ImageModel
from run.weights import check_md5
from unet_caching.speed.accelerate import place


class DDPM(ImageModel[Config, Condition]):
    """An unconditional model of pixels: its latents are the images."""

    def read(self, checkpoint: Path) -> None:
        if self.config.md5 and self.run.spec.network.checkpoint is None:
            check_md5(checkpoint, self.config.md5)      # first, so that a truncated download is reported as one
        self.unet = place(load_unet(self.config, checkpoint, **self.run.weights), self.device, self.dtype)

    def decode(self, latents: Tensor) -> np.ndarray:
        return to_uint8(latents)


MODEL = DDPM
