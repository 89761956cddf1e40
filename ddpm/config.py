"""The YAML files of configs/ for DDPM, checked against this schema: an unknown or missing key is an error."""

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from run.settings import read_yaml
from run.training.loop import TrainConfig
from unet_caching.samplers.diffusion import Diffusion


@dataclass
class Unet:
    """Arguments of `ddpm.unet.UNet`."""
    resolution: int
    in_channels: int
    out_channels: int
    ch: int
    ch_mult: list[int]
    num_res_blocks: int
    attn_resolutions: list[int]


@dataclass
class Sampler:
    """The paper's sampling settings: the defaults of `ddpm.sample`."""
    steps: int = 100
    timesteps: str = "uniform"      # unet_caching.samplers.ddim.SPACINGS
    eta: float = 0.0
    branch: int = 2
    images: int = 50_000            # seeds 0 to images - 1


@dataclass
class Train:
    """Data and settings of `ddpm.train`."""
    group: str | None = None        # one group of data/emoji/index.csv, or all
    dropout: float = 0.0
    bf16: bool = True
    start: str | None = None        # weights to go on from, in the layout of `checkpoint`; None: random ones
    loop: TrainConfig = field(default_factory=TrainConfig)


@dataclass
class Config:
    """One model."""
    name: str
    unet: Unet
    diffusion: Diffusion
    checkpoint: str                 # path, relative to the repository
    sampler: Sampler = field(default_factory=Sampler)
    md5: str | None = None          # of the published checkpoint file
    train: Train | None = None

    def alphas_cumprod(self) -> Tensor:
        """The alpha_bar of each timestep: float32 [num_timesteps]."""
        return self.diffusion.alphas_cumprod()


def load_config(path: Path) -> Config:
    """Read one YAML file. Raises UserError that names the key which is unknown, missing or of the wrong type."""
    return read_yaml(path, Config)
