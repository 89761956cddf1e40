"""The registry of models: each package of PACKAGES exports one FAMILY, and nothing else names the packages."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from run.files import ROOT, stamp
from run.settings import load_yaml, read_yaml
from unet_caching.errors import UserError, one_line
from unet_caching.options import option
from unet_caching.samplers.diffusion import Diffusion
from unet_caching.unet import NestedUNet

PACKAGES = ("ddpm", "ldm", "stable_diffusion")


@dataclass(kw_only=True)
class Sampling:
    """The paper's settings of a model: the defaults of its sample command."""
    sampler: str = "ddim"
    steps: int
    timesteps: str
    eta: float = 0.0
    guidance: float | None = None       # None: the model is not guided
    branch: int
    images: int = 50_000                # seeds 0 to images - 1


@dataclass(kw_only=True)
class Config:
    """One model, as a YAML file of configs/ describes it. Each family adds its own fields."""
    name: str
    unet: Any                           # a dataclass of the U-Net's arguments
    checkpoint: str                     # path, relative to the repository
    diffusion: Diffusion = field(default_factory=Diffusion)
    sampler: Sampling

    @property
    def unet_arguments(self) -> dict[str, Any]:
        """All arguments of the U-Net."""
        return vars(self.unet)


Schema = TypeVar("Schema", bound=Config)
Net = TypeVar("Net", bound=NestedUNet)


@dataclass(frozen=True)
class Condition:
    """What an image shows, as far as an option decides it. Families with such options add fields.

    Raises UserError for options that do not go together.
    """
    title: ClassVar[str] = "what is sampled"

    def name(self) -> tuple[list[str], list[str]]:
        """The first and the last parts of a sample folder's name."""
        return [], []

    def check(self, config: Any) -> None:
        """Raise a UserError if a model of this config cannot show this."""

    def settings(self, config: Any) -> dict[str, Any]:
        """What run.json says of the model and of what is shown, as far as this is known without weights."""
        return {"unet": asdict(config.unet)}


@dataclass(frozen=True)
class Guided(Condition):
    """The option of a model with classifier-free guidance."""
    guidance: float | None = option(None, "classifier-free guidance; 1 = none")

    def name(self) -> tuple[list[str], list[str]]:
        return [], [] if self.guidance is None else [f"guidance{self.guidance:g}"]


@dataclass(frozen=True)
class Family(Generic[Schema, Net]):
    """A model package as other programs know it.

    Its modules `checkpoint` and `model` take seconds to import, so they are imported when first needed.
    """
    name: str                                           # the first word of its configs' names
    package: str
    schema: type[Schema]                                # of its configs
    unet: Callable[[Schema], Net]                       # random weights, on torch's default device; raises ValueError
    shapes: Callable[[Schema], list[tuple[int, ...]]]   # of the U-Net's inputs but t, for one image
    resolution: Callable[[Schema], int]                 # pixels of a side
    batch_size: int                                     # default of --batch-size
    judge: str                                          # the evaluator of the papers' tables, a command of eval/
    references: Mapping[str, Path] = field(default_factory=dict)    # what the evaluator compares with, by model name
    condition: type[Condition] = Condition
    flags: Mapping[str, str] = field(default_factory=dict)          # option -> flag, for flags with another name
    aliases: Sequence[str] = ()                         # other first words of its configs' names

    @property
    def command(self) -> str:
        """The module of its sample command."""
        return f"{self.package}.sample"

    def load_config(self, path: Path | str) -> Schema:
        """Read a config file. Raises UserError for a wrong key."""
        return read_yaml(find_config(path), self.schema)

    def checkpoint_sha256(self, path: Path, **weights: Any) -> str:
        """The digest of the weights, for run.json. Raises UserError."""
        return self.checkpoint.checkpoint_sha256(path, **weights)

    def theirs(self, config: Schema, unet: Net) -> nn.Module:
        """diffusers' U-Net with the weights of ours."""
        return self.checkpoint.diffusers_unet(config, unet)

    @property
    def checkpoint(self) -> Any:
        """The package's module `checkpoint`."""
        return importlib.import_module(f"{self.package}.checkpoint")


@cache
def families() -> dict[str, Family]:
    """All families, by name."""
    known = [importlib.import_module(f"{package}.family").FAMILY for package in PACKAGES]
    return {family.name: family for family in known}


def find_config(path: Path | str) -> Path:
    """Find a config file by its path, its path in the repository, or its name in configs/. Raises UserError."""
    for candidate in (Path(path), ROOT / path, ROOT / "configs" / f"{path}.yaml"):
        if candidate.is_file():
            return candidate
    raise UserError(f"no config file {path}")


def family_named_by(path: Path | str) -> Family:
    """The family of a config file, by the first word of the `name` in it. Raises UserError."""
    file = find_config(path)
    return families()[_named_by(file, *stamp(file))]


@cache
def _named_by(path: Path, *seen: int) -> str:
    name = load_yaml(path).get("name")
    words = {word: known for known in families().values() for word in (known.name, *known.aliases)}
    known = words.get(str(name).split("_")[0])
    if known is None:
        prefixes = " or ".join(f"{word}_" for word in words)
        raise UserError(f"{path}: the name must start with {prefixes}, got {name!r}")
    return known.name


def load_config(path: Path | str) -> Config:
    """Read a config file of any family. Raises UserError for a wrong key."""
    return family_named_by(path).load_config(path)


def at_resolution(config: Config, pixels: int) -> Config:
    """The config for square images of another size. Raises UserError for a size that its networks cannot have."""
    downsampling = getattr(config, "downsampling", None)
    if downsampling is None:
        raise UserError(f"{config.name} makes only images of {family(config).resolution(config)} pixels")
    unit = downsampling * 2 ** (len(config.unet.channel_mult) - 1)
    if pixels < unit or pixels % unit:
        raise UserError(f"{config.name} makes images of a multiple of {unit} pixels, got {pixels}")
    return replace(config, resolution=pixels)       # type: ignore[call-arg]  # a config with `downsampling` has it


def family(config: Config) -> Family:
    """The family of a config."""
    return next(known for known in families().values() if type(config) is known.schema)


def build(config: Config, device: torch.device | str = "meta") -> NestedUNet:
    """The U-Net of a config in evaluation mode, with random weights (none on the meta device). Raises UserError."""
    try:
        with torch.device(device):
            return family(config).unet(config).eval().requires_grad_(False)
    except (ValueError, RuntimeError, TypeError, IndexError, ArithmeticError) as error:
        raise UserError(f"{config.name}: no such U-Net can be built: {one_line(error)[:200]}") from None


def load_unet(config: Config, path: Path, **weights: Any) -> NestedUNet:
    """The U-Net of a config with the weights of a checkpoint, in evaluation mode, float32 on the CPU.

    weights: which of the checkpoint's weights, as `run.spec.Run.weights` says. Raises UserError.
    """
    return family(config).checkpoint.load_unet(config, path, **weights)


def example_inputs(config: Config, batch_size: int = 1, device: torch.device | str = "meta",
                   dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Inputs of the U-Net of a config, all zeros: (x, t) or (x, t, context)."""
    x, *context = (torch.zeros(batch_size, *shape, device=device, dtype=dtype)
                   for shape in family(config).shapes(config))
    return x, torch.zeros(batch_size, device=device, dtype=torch.long), *context


def rows_per_image(config: Config) -> int:
    """Rows of the network's batch per image, by the config: 2 with classifier-free guidance, else 1.

    The papers' MACs count one row.
    """
    return 1 if config.sampler.guidance in (None, 1) else 2
