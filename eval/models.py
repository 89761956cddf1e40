"""Any model of the project by its config file: its U-Net and the inputs that this takes, for counting and timing.

Which package a config belongs to is told by the first word of its `name`: ddpm_..., ldm_..., sd_...
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from yaml import YAMLError

import ddpm.config
import ddpm.unet
import ldm.config
import ldm.unet
import stable_diffusion.config
import stable_diffusion.unet
from runs.errors import UserError, one_line

Config: TypeAlias = ddpm.config.Config | ldm.config.Config | stable_diffusion.config.Config


class Family(NamedTuple):
    """What a package offers. shapes(config): of x and, where there is one, of the context, for one image."""
    config: type
    load_config: Callable[[Path], Config]
    unet: type[nn.Module]
    shapes: Callable[[Config], list[tuple[int, ...]]]
    load_unet: Callable[[Config, Path], nn.Module]      # with the weights of a checkpoint, on the CPU


def _ddpm_shapes(config: ddpm.config.Config) -> list[tuple[int, ...]]:
    return [(config.unet.in_channels, config.unet.resolution, config.unet.resolution)]


def _ldm_shapes(config: ldm.config.Config) -> list[tuple[int, ...]]:
    size = config.first_stage.resolution // 2 ** (len(config.first_stage.ch_mult) - 1)
    return [(config.unet.in_channels, size, size), (1, config.unet.context_dim)]        # one token: the class


def _sd_shapes(config: stable_diffusion.config.Config) -> list[tuple[int, ...]]:
    return [(config.unet.in_channels, config.latent_size, config.latent_size),
            (config.tokens, config.unet.context_dim)]


def _load_ddpm(config: ddpm.config.Config, path: Path) -> nn.Module:
    from ddpm.checkpoint import load_checkpoint
    unet = build(config, "cpu")
    load_checkpoint(unet, path)
    return unet


def _load_ldm(config: ldm.config.Config, path: Path) -> nn.Module:
    from ldm.checkpoint import load_checkpoint  # here: it imports diffusers, which takes seconds
    return load_checkpoint(config, path).unet


def _load_sd(config: stable_diffusion.config.Config, path: Path) -> nn.Module:
    from stable_diffusion.checkpoint import load_unet  # here: it imports diffusers, which takes seconds
    return load_unet(config, path)


FAMILIES = {"ddpm": Family(ddpm.config.Config, ddpm.config.load_config, ddpm.unet.UNet, _ddpm_shapes, _load_ddpm),
            "ldm": Family(ldm.config.Config, ldm.config.load_config, ldm.unet.UNet, _ldm_shapes, _load_ldm),
            "sd": Family(stable_diffusion.config.Config, stable_diffusion.config.load_config,
                         stable_diffusion.unet.UNet, _sd_shapes, _load_sd)}


def load_config(path: Path) -> Config:
    """Read a config file of any package. Raises UserError for a name of no package, or a key that is wrong."""
    if not Path(path).is_file():
        raise UserError(f"no config file {path}")
    try:
        content = OmegaConf.load(path)
    except (OmegaConfBaseException, YAMLError, OSError, ValueError) as error:
        raise UserError(f"{path}: {one_line(error)}") from None
    name = content.get("name") if OmegaConf.is_dict(content) else None
    known = FAMILIES.get(str(name).split("_")[0])
    if known is None:
        prefixes = " or ".join(f"{prefix}_" for prefix in FAMILIES)
        raise UserError(f"{path}: the name must start with {prefixes} to say whose config this is, got {name!r}")
    return known.load_config(path)


def family(config: Config) -> str:
    """The prefix of a config's name: 'ddpm', 'ldm' or 'sd'."""
    return next(name for name, known in FAMILIES.items() if isinstance(config, known.config))


def build(config: Config, device: torch.device | str = "meta") -> nn.Module:
    """The U-Net of a config, in evaluation mode, with random weights (none on the meta device). Raises UserError."""
    try:
        with torch.device(device):
            return FAMILIES[family(config)].unet(**vars(config.unet)).eval().requires_grad_(False)
    except ValueError as error:
        raise UserError(f"{config.name}: {error}") from None


def load_unet(config: Config, path: Path) -> nn.Module:
    """The U-Net of a config with the weights of a checkpoint, on the CPU. Raises UserError."""
    return FAMILIES[family(config)].load_unet(config, path)


def example_inputs(config: Config, batch_size: int = 1, device: torch.device | str = "meta",
                   dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Zeros of the shapes that the U-Net of a config takes: (x, t), or (x, t, context)."""
    x, *context = (torch.zeros(batch_size, *shape, device=device, dtype=dtype)
                   for shape in FAMILIES[family(config)].shapes(config))
    return x, torch.zeros(batch_size, device=device, dtype=torch.long), *context


def rows_per_image(config: Config) -> int:
    """How many rows of the network's batch an image takes: 2 with classifier-free guidance, else 1.

    The papers' MACs count one row.
    """
    return 1 if getattr(config.sampler, "guidance", 1) == 1 else 2
