"""The schema of DDPM's YAML files in configs/: an unknown or missing key is an error."""

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
    """The settings of `lab.train`."""
    group: str | None = None        # a group of data/emoji/index.csv; None: all
    dropout: float = 0.0
    start: str | None = None        # weights to start from, in the layout of `checkpoint`; None: random weights


@dataclass(kw_only=True)
class Config(families.Config):
    unet: Unet
    sampler: Sampling = field(default_factory=Sampling)
    md5: str | None = None          # of the published checkpoint file
    train: Train | None = None
