"""The YAML files of configs/ for LDM, checked against this schema: an unknown or missing key is an error."""

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from run.settings import read_yaml
from run.training.loop import TrainConfig
from unet_caching.samplers import diffusion


@dataclass
class Unet:
    """Arguments of `ldm.unet.UNet`."""
    in_channels: int
    out_channels: int
    model_channels: int
    channel_mult: list[int]
    num_res_blocks: int
    attention_resolutions: list[int]    # downsampling factors
    num_heads: int
    context_dim: int


@dataclass
class FirstStage:
    """Arguments of `ldm.first_stage.build`, under the names of the public configuration."""
    resolution: int                     # of the images, in pixels
    ch: int
    ch_mult: list[int]
    num_res_blocks: int
    z_channels: int
    n_embed: int


@dataclass
class Diffusion(diffusion.Diffusion):
    """LDM's noise schedule, unless the config says otherwise."""
    beta_schedule: str = "scaled_linear"
    beta_start: float = 0.0015
    beta_end: float = 0.0195


@dataclass
class Sampler:
    """The paper's sampling settings: the defaults of `ldm.sample`."""
    steps: int = 250
    timesteps: str = "offset"           # unet_caching.samplers.ddim.SPACINGS
    eta: float = 0.0
    guidance: float = 1.5
    branch: int = 0
    images: int = 50_000                # seeds 0 to images - 1


@dataclass
class TrainFirstStage:
    """Data and settings of `ldm.train_first_stage`: all emoji."""
    noise: float = 0.05                 # standard deviation of what is added to the latents while training
    penalty: float = 1e-3               # weight of the mean squared latent, so that the noise cannot be outgrown
    bf16: bool = True
    loop: TrainConfig = field(default_factory=TrainConfig)


@dataclass
class Train:
    """Data and settings of `ldm.train`."""
    groups: list[str]                   # of data/emoji/index.csv; a class is a group in one style
    drop_label: float = 0.1             # fraction of the labels that become the unconditional one
    dropout: float = 0.0
    bf16: bool = True
    loop: TrainConfig = field(default_factory=TrainConfig)


@dataclass
class Config:
    """One model. Labels are 0 to num_classes - 1; label num_classes is the unconditional one."""
    name: str
    unet: Unet
    first_stage: FirstStage
    num_classes: int
    checkpoint: str                     # path, relative to the repository
    class_names: str | None = None      # text file, a name per line in the order of the labels, for listings only
    diffusion: Diffusion = field(default_factory=Diffusion)
    sampler: Sampler = field(default_factory=Sampler)
    train_first_stage: TrainFirstStage | None = None
    train: Train | None = None

    def alphas_cumprod(self) -> Tensor:
        """The alpha_bar of each timestep: float32 [num_timesteps]."""
        return self.diffusion.alphas_cumprod()


def load_config(path: Path) -> Config:
    """Read one YAML file. Raises UserError that names the key which is unknown, missing or of the wrong type."""
    return read_yaml(path, Config)
