"""The registry of models: each package of PACKAGES exports one FAMILY, and nothing else names the packages."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from run.files import ROOT, stamp
from run.settings import load_yaml, read_yaml
from unet_caching.errors import UserError, one_line
from unet_caching.nest import NestedUNet
from unet_caching.samplers.diffusion import Diffusion

if TYPE_CHECKING:
    from run.image_model import ImageModel
    from run.machine import Machine
    from run.spec import Run

PACKAGES = ("ddpm", "ldm", "stable_diffusion")


class Config(Protocol):
    """What the configs of all families say. Each family has a schema of its own for them, a dataclass.

    unet: arguments of its U-Net. sampler: the paper's settings, steps, timesteps, branch and more.
    """
    name: str
    checkpoint: str
    unet: Any
    sampler: Any

    @property
    def diffusion(self) -> Diffusion:
        """What the network was trained for."""


Schema = TypeVar("Schema", bound=Config)
Net = TypeVar("Net", bound=NestedUNet)


@dataclass(frozen=True)
class Condition:
    """What an image shows, beside what its seed decides. Families with a choice there add fields (options.py).

    Raises UserError for options that do not go together.
    """
    title: ClassVar[str] = "what is sampled"

    def name(self) -> tuple[list[str], list[str]]:
        """The parts of a sample folder's name that come first, and those that come last."""
        return [], []


@dataclass(frozen=True)
class Family(Generic[Schema, Net]):
    """All that other programs need of a model package.

    name: the first word of its configs' names; aliases: others. command: the module of its sample command. schema: the
    dataclass of its configs. condition: its own options. flags: the flags of options that have not the option's name.
    batch_size: how many images at a time, unless the user says more.
    unet(config): the U-Net with random weights, on the device that is in force; raises ValueError.
    shapes(config): the shapes of x and, where there is one, of the context, for one image.
    resolution(config): the pixels of a side. load_unet(config, path): the U-Net with the weights of a checkpoint, on
    the CPU. open(run, machine): the whole model. theirs(config, unet): diffusers' U-Net on the very weights of ours.
    settings(run): what run.json says of a run, sampler and dtype aside, as far as it is known without weights.
    checkpoint_sha256(path): what it says of the weights.
    judge: the evaluator of the papers' tables, a command of eval/. packed: whether it reads an npz. references: what it
    compares with, by the model's name.
    """
    name: str
    command: str
    schema: type[Schema]
    unet: Callable[[Schema], Net]
    shapes: Callable[[Schema], list[tuple[int, ...]]]
    resolution: Callable[[Schema], int]
    load_unet: Callable[[Schema, Path], Net]
    open: Callable[["Run", "Machine"], "ImageModel"]
    settings: Callable[["Run"], dict[str, Any]]
    checkpoint_sha256: Callable[[Path], str]
    theirs: Callable[[Schema, Net], nn.Module]
    batch_size: int
    judge: str
    condition: type[Condition] = Condition
    flags: Mapping[str, str] = field(default_factory=dict)
    references: Mapping[str, Path] = field(default_factory=dict)
    packed: bool = False
    aliases: Sequence[str] = ()


@cache
def families() -> dict[str, Family]:
    """All families, by name."""
    found = [importlib.import_module(f"{package}.family").FAMILY for package in PACKAGES]
    return {family.name: family for family in found}


def find_config(path: Path | str) -> Path:
    """A config file: the path as it is, or below the repository, or the name of one in configs/. Raises UserError."""
    for candidate in (Path(path), ROOT / path, ROOT / "configs" / f"{path}.yaml"):
        if candidate.is_file():
            return candidate
    raise UserError(f"no config file {path}")


def family_named_by(path: Path | str) -> Family:
    """The family whose config a file is, by the first word of its name. Raises UserError."""
    file = find_config(path)
    return families()[_named_by(file, *stamp(file))]


@cache
def _named_by(path: Path, *seen: int) -> str:
    name = load_yaml(path).get("name")
    words = {word: family for family in families().values() for word in (family.name, *family.aliases)}
    known = words.get(str(name).split("_")[0])
    if known is None:
        prefixes = " or ".join(f"{word}_" for word in words)
        raise UserError(f"{path}: the name must start with {prefixes} to say whose config this is, got {name!r}")
    return known.name


def load_config(path: Path | str, family: Family | None = None) -> Config:
    """Read a config file of a family; None: that which its name says. Raises UserError for a key that is wrong."""
    return read_yaml(find_config(path), (family or family_named_by(path)).schema)


def at_resolution(config: Config, pixels: int) -> Config:
    """A config for square images of another size. Raises UserError for one that its networks cannot have."""
    downsampling = getattr(config, "downsampling", None)
    if downsampling is None:
        raise UserError(f"{config.name} is made for images of {family(config).resolution(config)} pixels alone")
    unit = downsampling * 2 ** (len(config.unet.channel_mult) - 1)
    if pixels < unit or pixels % unit:
        raise UserError(f"{config.name} makes images of a multiple of {unit} pixels, got {pixels}")
    return cast(Config, replace(cast(Any, config), resolution=pixels))


def family(config: Config) -> Family:
    """The family whose config it is."""
    return next(known for known in families().values() if type(config) is known.schema)


def build(config: Config, device: torch.device | str = "meta") -> NestedUNet:
    """The U-Net of a config, in evaluation mode, with random weights (none on the meta device). Raises UserError."""
    try:
        with torch.device(device):
            return family(config).unet(config).eval().requires_grad_(False)
    except (ValueError, RuntimeError, TypeError, IndexError, ArithmeticError) as error:
        raise UserError(f"{config.name}: no such U-Net can be built: {one_line(error)[:200]}") from None


def load_unet(config: Config, path: Path) -> NestedUNet:
    """The U-Net of a config with the weights of a checkpoint, on the CPU. Raises UserError."""
    return family(config).load_unet(config, path)


def example_inputs(config: Config, batch_size: int = 1, device: torch.device | str = "meta",
                   dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Zeros of the shapes that the U-Net of a config takes: (x, t), or (x, t, context)."""
    x, *context = (torch.zeros(batch_size, *shape, device=device, dtype=dtype)
                   for shape in family(config).shapes(config))
    return x, torch.zeros(batch_size, device=device, dtype=torch.long), *context


def rows_per_image(config: Config) -> int:
    """How many rows of the network's batch an image takes, by the config: 2 with classifier-free guidance, else 1.

    The papers' MACs count one row.
    """
    return 1 if getattr(config.sampler, "guidance", 1) == 1 else 2
