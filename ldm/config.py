"""The schema of LDM's YAML files in configs/: an unknown or missing key is an error."""

from dataclasses import dataclass, field

from run import families
from run.training import loop
from run.training.emoji import class_names
from unet_caching.errors import UserError
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

    @property
    def downsampling(self) -> int:
        """The number of pixels per latent, in each direction."""
        return 2 ** (len(self.ch_mult) - 1)


@dataclass
class Diffusion(diffusion.Diffusion):
    """LDM's noise schedule by default."""
    beta_schedule: str = "scaled_linear"
    beta_start: float = 0.0015
    beta_end: float = 0.0195


@dataclass(kw_only=True)
class Sampling(families.Sampling):
    steps: int = 250
    timesteps: str = "offset"
    guidance: float | None = 1.5
    branch: int = 0


@dataclass(kw_only=True)
class TrainFirstStage(loop.Section):
    """The settings of `lab.train first-stage`, which trains on all emoji."""
    noise: float = 0.05                 # standard deviation of noise that training adds to the latents
    penalty: float = 1e-3               # weight of the mean squared latent, so that latents do not outgrow the noise


@dataclass(kw_only=True)
class Train(loop.Section):
    """The settings of `lab.train`."""
    groups: list[str]                   # of data/emoji/index.csv; a class is a group in one style
    drop_label: float = 0.1             # fraction of the labels that become the unconditional one
    dropout: float = 0.0


@dataclass(kw_only=True)
class Config(families.Config):
    """Labels are 0 to num_classes - 1; label num_classes is the unconditional one."""
    unet: Unet
    first_stage: FirstStage
    num_classes: int
    class_names: str | None = None      # text file with a name per label, only for listings
    diffusion: Diffusion = field(default_factory=Diffusion)
    sampler: Sampling = field(default_factory=Sampling)
    train_first_stage: TrainFirstStage | None = None
    train: Train | None = None

    @property
    def latent_size(self) -> int:
        """Width and height of the latents."""
        return self.first_stage.resolution // self.first_stage.downsampling

    def trained_classes(self, train: Train) -> list[str]:
        """The names of the classes of the training images. Raises UserError if they are not num_classes many."""
        names = class_names(train.groups)
        if len(names) != self.num_classes:
            raise UserError(f"num_classes is {self.num_classes}, but the groups have {len(names)} classes: {names}")
        return names

    def check_sizes(self) -> None:
        """Raise a UserError if the U-Net and the first stage do not fit together."""
        stage, within = self.first_stage, 2 ** (len(self.unet.channel_mult) - 1)
        if not self.unet.in_channels == self.unet.out_channels == stage.z_channels:
            raise UserError(f"the U-Net has {self.unet.in_channels} channels in and {self.unet.out_channels} out, the "
                            f"latents have {stage.z_channels}")
        if stage.resolution % (stage.downsampling * within):
            raise UserError(f"images of {stage.resolution} pixels cannot be downsampled by {stage.downsampling} in the "
                            f"first stage and by {within} in the U-Net")
