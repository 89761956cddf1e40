"""The schema of Stable Diffusion's YAML files in configs/: an unknown or missing key is an error."""

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
    """The further arguments of `stable_diffusion.unet.XLUNet`. A config with them is SDXL's, with two text encoders."""
    transformer_depth: list[int]
    adm_in_channels: int


@dataclass
class Diffusion(diffusion.Diffusion):
    """Stable Diffusion's noise schedule by default."""
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
    """The settings of `lab.train`."""
    groups: list[str]                   # of data/emoji/index.csv
    drop_text: float = 0.1              # fraction of the captions that become empty
    drop_style: float = 0.5             # fraction of the other captions that leave out the style of the artwork
    dropout: float = 0.0


@dataclass(kw_only=True)
class Config(families.Config):
    """The folder or file at `checkpoint` must have exactly these sizes and this noise schedule."""
    unet: Unet
    resolution: int                     # of the images, in pixels
    downsampling: int                   # of the autoencoder: latents have resolution / downsampling pixels
    tokens: int                         # of a padded text
    diffusion: Diffusion = field(default_factory=Diffusion)
    sampler: Sampling = field(default_factory=Sampling)
    train: Train | None = None
    xl: XL | None = None                # None: not SDXL

    @property
    def unet_arguments(self) -> dict[str, Any]:
        return vars(self.unet) | ({} if self.xl is None else vars(self.xl))

    def check_text_to_image(self) -> None:
        """Raise a UserError if the network takes an image besides the prompt."""
        if self.unet.in_channels != self.unet.out_channels:
            raise UserError(f"{self.name} takes {self.unet.in_channels} channels and predicts "
                            f"{self.unet.out_channels}: it needs an image besides the prompt; use a diffusers pipeline "
                            "that takes one, in which enable_deepcache caches")

    @property
    def latent_size(self) -> int:
        """Width and height of the latents."""
        return self.resolution // self.downsampling
