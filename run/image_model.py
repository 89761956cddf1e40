"""Models that make images of seeds: what each must offer, and the sample command that all of them share."""

import argparse
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, cast

import numpy as np
from torch import Tensor, nn

from run import arguments
from run.families import Condition, Config, Family, family_named_by
from run.folder import RunFolder, missing_seeds
from run.machine import Machine
from run.provenance import provenance
from run.seeds import parse_seeds
from run.spec import Run, RunSpec
from run.stopping import Stopped, StopRequest
from unet_caching.errors import UserError
from unet_caching.nest import Network
from unet_caching.options import option, required
from unet_caching.policy import Policy
from unet_caching.speed.accelerate import accelerated

Schema = TypeVar("Schema", bound=Config)
Shown = TypeVar("Shown", bound=Condition)


class ImageModel(ABC, Generic[Schema, Shown]):
    """A run's model with all that decides the image of a seed, caching aside.

    Made from a run, which is checked, and a machine; that does everything which needs no weights. `load` reads them.
    Both raise UserError. After construction there are
        run, config, condition, sampler
        device, dtype       of the network
        images              how many seeds are meant by default
        settings            for run.json; `load` adds the checkpoint's sha256
    and after `load`
        unet                on its device, in its dtype.
    """
    images: int
    settings: dict
    unet: nn.Module

    def __init__(self, run: Run, machine: Machine):
        self.run, self.sampler = run, run.sampler
        # As the family says that opens the model.
        self.config, self.condition = cast(Schema, run.config), cast(Shown, run.spec.condition)
        self.device, self.dtype = machine.prepare(), run.dtype

    @abstractmethod
    def load(self) -> None:
        """Read the weights."""

    @abstractmethod
    def latents(self, seeds: Sequence[int], policy: Policy | None = None, network: Network | None = None,
                report: Callable[[float], None] | None = None) -> Tensor:
        """What sampling ends on, for each seed: float32 [seeds, channels, height, width].

        policy: a fresh caching policy; None computes everything. network: what takes the place of the U-Net.
        report: called with the fraction of the network calls that is done.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> np.ndarray:
        """The images of latents: uint8 [seeds, height, width, 3]."""

    def check_seeds(self, seeds: Sequence[int]) -> None:            # few models have anything to check
        """Refuse a seed that has no image. Raises UserError."""

    def describe(self, seeds: Sequence[int]) -> list[str]:
        """The lines that the user is told before sampling."""
        return []

    def write_listing(self, folder: RunFolder) -> None:             # nor to list
        """Write a CSV file about the images that are there, where there is anything to say."""

    def policy(self) -> Policy | None:
        """A fresh caching policy of the run, or None without caching."""
        return self.run.caching.policy(self.device, self.dtype)


def kinds_of_calls(run: Run) -> int:
    """How many different sets of values the network calls of a run reuse: as many graphs does compiling make."""
    return len(set(run.reused))


def check_compiled(run: Run, machine: Machine) -> None:
    """Refuse to compile a run whose calls decide themselves what they compute. Raises UserError."""
    if machine.compile and any(method.online for method in run.caching.methods):
        raise UserError("--compile is for calls that are known beforehand, and this run decides while it goes on what "
                        "each computes: leave it out")


def fill(model: ImageModel, seeds: Sequence[int], out: Path, machine: Machine, last: bool = False) -> int:
    """Fill a sample folder with the images of the seeds that are not there yet; returns how many were made.

    last: whether the program ends then, so that nothing is left to stop where all images are there. Raises UserError,
    and Stopped where a batch system asked for it.
    """
    run = model.run
    check_compiled(run, machine)
    run.refuse_foreign(model.settings)          # before the weights are read, as far as it can be known,
    model.check_seeds(seeds)
    with StopRequest() as stop:
        model.load()
        run.refuse_foreign(model.settings)      # and after
        network = accelerated(model.unet, machine.compile, machine.cuda_graphs,
                              kinds_of_calls(run) if machine.compile else 1)
        folder = RunFolder(out, model.settings | {"cache": run.caching.settings},
                           provenance(model.device) | network.in_use)
        for line in model.describe(seeds):
            print(line, flush=True)

        def sample(seeds: list[int], report: Callable[[float], None]) -> np.ndarray:
            return model.decode(model.latents(seeds, model.policy(), network.network, report))

        made = folder.fill(seeds, machine.batch_size, sample, lambda: stop.asked)
        model.write_listing(folder)
    missing = missing_seeds(folder.path, seeds)
    if stop.asked and (missing or not last):
        raise Stopped(f"{len(seeds) - len(missing)} of {len(seeds)} images are there")
    if missing:
        print(f"{len(missing)} images are not there yet: other processes are at them")
    for line in network.report():
        print(line)
    return made


def summary(run: Run, out: Path, asked: int, made: int) -> str:
    """The last line of a sample command."""
    line = f"{out}: {asked} images asked for, {made} made now; {run.full_calls} full of {run.calls} network calls, "
    return line + (", ".join(method.summary for method in run.caching.methods) or "no caching")


@dataclass(frozen=True)
class ConfigFile:
    """The model that a command line is about."""
    title: ClassVar[str] = "the model"
    config: Path = required("configs/*.yaml; brings more options")


@dataclass(frozen=True)
class Images:
    """What a sample command makes."""
    title: ClassVar[str] = "the images"
    out: Path = required("sample folder; images that are there are kept")
    seeds: str | None = option(None, "one image per seed: 0-49999 or 0-9,20 (default: as many as the paper; as there "
                                     "are prompts)")


def config_among(words: Sequence[str]) -> Path | None:
    """The config that a command line names, before its other options, which that decides, are known."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    return first.parse_known_args(words)[0].config


def parse_run(doc: str | None, *kinds: type, family: Family | None = None, words: Sequence[str] | None = None,
              parts: Sequence[type] | None = None, defaults: Mapping[str, Any] | None = None,
              prog: str | None = None) -> list[Any]:
    """The RunSpec that a command line asks for, and an object of each of other dataclasses of options.

    family: whose config it takes; None: of any, and --config says which. parts: the options of a run that the command
    has, by their dataclasses (None: all). defaults: of this command, instead of the options' own; --batch-size has the
    family's. Raises UserError.
    """
    words = sys.argv[1:] if words is None else words
    config = config_among(words) if family is None else None
    if family is None and config is None:       # which ends in an error or in a help of what is known
        arguments.parse(doc, ConfigFile, *kinds, words=words, defaults=defaults, prog=prog)
    family = family_named_by(cast(Path, config)) if family is None else family
    usual = RunSpec(family.name, Path(), condition=family.condition())
    own = [type(part) for part in usual.parts if parts is None or isinstance(part, tuple(parts))]
    first, *found = arguments.parse(doc, ConfigFile, *own, *kinds, words=words, flags=family.flags, prog=prog,
                                    defaults={"batch_size": family.batch_size, **(defaults or {})})
    said = {name: value for part in found[:len(own)] for name, value in vars(part).items()}
    return [replace(usual, config=first.config).having(**said), *found[len(own):]]


def add_run(parser: argparse.ArgumentParser, family: Family, caching: bool = True) -> None:
    """Add --config and the options of a run to a command line; those of its caching on request."""
    parser.add_argument("--config", type=Path, required=True, help=f"configs/{family.name}_*.yaml")
    spec = RunSpec(family.name, Path(), condition=family.condition())
    for part in spec.parts:
        if caching or part not in spec.caching:
            arguments.add(parser, type(part), family.flags)


def spec_of(args: argparse.Namespace, family: Family) -> RunSpec:
    """The run that a command line of `add_run` asks for. Raises UserError."""
    default = RunSpec(family.name, args.config, condition=family.condition())
    return default.having(**{name: getattr(args, name) for part in default.parts
                             for name in arguments.names(part) if hasattr(args, name)})


def sample_command(family: Family, doc: str | None) -> None:
    """Fill a folder with the images of a run, as the command line says: the sample command of a family."""
    spec, images, machine = parse_run(doc, Images, Machine, family=family)
    model = family.open(spec.open(), machine)
    seeds = list(range(model.images)) if images.seeds is None else parse_seeds(images.seeds)
    made = fill(model, seeds, images.out, machine, last=True)
    print(summary(model.run, images.out, len(seeds), made))
