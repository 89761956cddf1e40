"""The YAML files of configs/ for Stable Diffusion, checked against this schema: unknown or missing keys are errors."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

import ldm.config
from run.settings import read_yaml
from run.training.loop import TrainConfig
from unet_caching.samplers import diffusion


@dataclass
class Unet(ldm.config.Unet):
    """Arguments of `stable_diffusion.unet.UNet`."""
    num_head_channels: int | None = None
    linear_projections: bool = False


@dataclass
class XL:
    """What SDXL has beside: arguments of `stable_diffusion.unet.XLUNet`. Its text encoders are two, side by side."""
    transformer_depth: list[int]
    adm_in_channels: int


@dataclass
class Diffusion(diffusion.Diffusion):
    """Stable Diffusion's noise schedule, unless the config says otherwise."""
    beta_schedule: str = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012


@dataclass
class Sampler:
    """The paper's sampling settings: the defaults of `stable_diffusion.sample`."""
    sampler: str = "plms"               # plms, ddim, dpmpp
    steps: int = 50
    timesteps: str = "leading"          # unet_caching.samplers.samplers.TIMESTEPS
    guidance: float = 7.5
    branch: int = 1


@dataclass
class Train:
    """Data and settings of `stable_diffusion.train`."""
    groups: list[str]                   # of data/emoji/index.csv
    drop_text: float = 0.1              # fraction of the captions that become the empty one
    drop_style: float = 0.5             # fraction of the others that do not say the style of the artwork
    dropout: float = 0.0
    bf16: bool = True
    loop: TrainConfig = field(default_factory=TrainConfig)


@dataclass
class Config:
    """One model. The folder or file at `checkpoint` must be of just these sizes and this noise schedule."""
    name: str
    unet: Unet
    resolution: int                     # of the images, in pixels
    downsampling: int                   # of the autoencoder: latents have resolution / downsampling pixels
    tokens: int                         # of a text, padded
    checkpoint: str                     # a diffusers folder or one CompVis file; relative to the repository
    diffusion: Diffusion = field(default_factory=Diffusion)
    sampler: Sampler = field(default_factory=Sampler)
    train: Train | None = None
    xl: XL | None = None                # SDXL's, and what makes it one

    @property
    def unet_arguments(self) -> dict[str, Any]:
        """All arguments of the U-Net."""
        return vars(self.unet) | ({} if self.xl is None else vars(self.xl))

    @property
    def latent_size(self) -> int:
        """Width and height of the latents."""
        return self.resolution // self.downsampling

    def alphas_cumprod(self) -> Tensor:
        """The alpha_bar of each timestep: float32 [num_timesteps]."""
        return self.diffusion.alphas_cumprod()


def load_config(path: Path) -> Config:
    """Read one YAML file. Raises UserError that names the key which is unknown, missing or of the wrong type."""
    return read_yaml(path, Config)
