"""The YAML files of configs/ for Stable Diffusion, checked against this schema: unknown or missing keys are errors."""

from dataclasses import dataclass, field
from typing import Any

import ldm.config
from run import families
from run.training import loop
from unet_caching.errors import UserError
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


@dataclass(kw_only=True)
class Sampling(families.Sampling):
    sampler: str = "plms"
    steps: int = 50
    timesteps: str = "leading"
    guidance: float | None = 7.5
    branch: int = 1


@dataclass(kw_only=True)
class Train(loop.Section):
    """Of `lab.train`."""
    groups: list[str]                   # of data/emoji/index.csv
    drop_text: float = 0.1              # fraction of the captions that become the empty one
    drop_style: float = 0.5             # fraction of the others that do not say the style of the artwork
    dropout: float = 0.0


@dataclass(kw_only=True)
class Config(families.Config):
    """The folder or file at `checkpoint` must be of just these sizes and this noise schedule."""
    unet: Unet
    resolution: int                     # of the images, in pixels
    downsampling: int                   # of the autoencoder: latents have resolution / downsampling pixels
    tokens: int                         # of a text, padded
    diffusion: Diffusion = field(default_factory=Diffusion)
    sampler: Sampling = field(default_factory=Sampling)
    train: Train | None = None
    xl: XL | None = None                # SDXL's, and what makes it one

    @property
    def unet_arguments(self) -> dict[str, Any]:
        return vars(self.unet) | ({} if self.xl is None else vars(self.xl))

    def check_text_to_image(self) -> None:
        """Raises UserError where the network takes an image besides the prompt."""
        if self.unet.in_channels != self.unet.out_channels:
            raise UserError(f"{self.name} takes {self.unet.in_channels} channels and predicts "
                            f"{self.unet.out_channels}: it needs an image besides the prompt; a diffusers pipeline for "
                            "that gives it one, and enable_deepcache caches there")

    @property
    def latent_size(self) -> int:
        """Width and height of the latents."""
        return self.resolution // self.downsampling
