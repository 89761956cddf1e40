"""The YAML files of configs/ for DDPM, checked against this schema: an unknown or missing key is an error."""

from dataclasses import dataclass, field

from run import families
from run.training import loop


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


@dataclass(kw_only=True)
class Sampling(families.Sampling):
    steps: int = 100
    timesteps: str = "uniform"
    branch: int = 2


@dataclass(kw_only=True)
class Train(loop.Section):
    """Of `lab.train`."""
    group: str | None = None        # one group of data/emoji/index.csv, or all
    dropout: float = 0.0
    start: str | None = None        # weights to go on from, in the layout of `checkpoint`; None: random ones


@dataclass(kw_only=True)
class Config(families.Config):
    unet: Unet
    sampler: Sampling = field(default_factory=Sampling)
    md5: str | None = None          # of the published checkpoint file
    train: Train | None = None
