"""Models that make images of seeds: what each must offer, and the sample command that all of them share."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from run.cli import command
from run.families import Condition, Config, Family
from run.folder import RunFolder, check_finite, missing_seeds
from run.machine import Machine
from run.provenance import provenance
from run.seeds import parse_seeds
from run.spec import Run, parse_run
from run.stopping import Stopped, StopRequest
from run.weight_files import ema_of
from unet_caching.errors import UserError
from unet_caching.nest import Network
from unet_caching.options import option, required
from unet_caching.policy import Policy
from unet_caching.samplers.diffusion import Predict
from unet_caching.samplers.noise import SeededNoise
from unet_caching.samplers.samplers import noise_predictor
from unet_caching.speed.accelerate import accelerated

Schema = TypeVar("Schema", bound=Config)
Shown = TypeVar("Shown", bound=Condition)


class ImageModel(ABC, Generic[Schema, Shown]):
    """A run's model with all that decides the image of a seed, caching aside.

    Made from a run, which is checked, and a machine; that does everything which needs no weights. `load` reads them.
    Both raise UserError. Its settings are the run's; `load` adds the checkpoint's sha256.
    """
    images: int                 # how many seeds are meant by default
    shape: tuple[int, ...]      # of the latents of an image
    unet: nn.Module             # once it is loaded: on its device, in its dtype
    kind_of_weights: dict       # likewise: what run.json says of a checkpoint that has EMA and plain ones

    def __init__(self, run: Run, machine: Machine):
        self.run, self.sampler, self.settings = run, run.sampler, dict(run.settings)
        # As the family says that opens the model.
        self.config, self.condition = cast(Schema, run.config), cast(Shown, run.spec.condition)
        self.device, self.dtype = machine.prepare(), run.dtype
        self.images, self.shape = run.config.sampler.images, run.family.shapes(run.config)[0]

    def load(self) -> None:
        """Read the weights."""
        run = self.run
        self.read(run.checkpoint)
        self.settings["checkpoint_sha256"] = run.family.checkpoint_sha256(run.checkpoint, **run.weights)
        ema = ema_of(run.weights.get("unet", run.checkpoint), run.weights.get("ema"))
        own, other, flag = ("EMA", "plain", "no") if ema else ("plain", "EMA", "yes")
        self.kind_of_weights = {} if ema is None else {
            "weights": f"{own} weights; the checkpoint has {other} ones, too (--ema {flag})"}

    @abstractmethod
    def read(self, checkpoint: Path) -> None:
        """Read the weights of a checkpoint, and place them on the device."""

    def noise(self, seeds: Sequence[int], draws: SeededNoise) -> Tensor:
        """What sampling starts from: float32 [seeds, *shape]."""
        return draws(self.shape)

    def context(self, seeds: Sequence[int]) -> Sequence[Tensor]:
        """What the network is given beside x and t; with guidance of the doubled batch [uncond, cond]."""
        return ()

    @torch.no_grad()
    def start(self, seeds: Sequence[int], policy: Policy | None = None, network: Network | None = None
              ) -> tuple[Predict, Tensor, SeededNoise]:
        """What predicts the noise in the runs of some seeds, their x_T, and further draws. policy, network: as below.
        """
        draws = SeededNoise(seeds, self.device)
        x, context = self.noise(seeds, draws), self.context(seeds)
        return noise_predictor(network or self.unet, self.config.diffusion, self.dtype, policy, context,
                               self.run.guidance), x, draws

    @torch.no_grad()
    def latents(self, seeds: Sequence[int], policy: Policy | None = None, network: Network | None = None,
                report: Callable[[float], None] | None = None) -> Tensor:
        """What sampling ends on, for each seed: float32 [seeds, *shape]. Raises UserError where it is not finite.

        policy: a fresh caching policy; None computes everything. network: what takes the place of the U-Net.
        report: called with the fraction of the network calls that is done.
        """
        predict, x, draws = self.start(seeds, policy, network)
        return check_finite(self.sampler.run(predict, x, draws, report))

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


def open_model(run: Run, machine: Machine) -> ImageModel:
    """The model of a run, of which its package's `model` module exports the class as MODEL. Raises UserError."""
    return importlib.import_module(f"{run.family.package}.model").MODEL(run, machine)


def kinds_of_calls(run: Run) -> int:
    """How many different sets of values the network calls of a run reuse: as many graphs does compiling make."""
    return len(set(run.reused))


def check_compiled(run: Run, machine: Machine) -> None:
    """Refuse to compile a run whose calls decide themselves what they compute. Raises UserError."""
    if machine.compile and any(method.online for method in run.caching.methods):
        raise UserError("--compile needs a schedule that is known beforehand, and here each image decides what is "
                        "computed: leave it out")


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
        folder = RunFolder(out, model.settings, provenance(model.device) | network.in_use | model.kind_of_weights,
                           run.spec.to_json())
        for line in [*model.kind_of_weights.values(), *model.describe(seeds)]:
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


def summary(run: Run, out: Path, wanted: int, made: int) -> str:
    """The last line of a sample command."""
    caching = ", ".join(method.summary for method in run.caching.methods) or "no caching"
    return (f"{out}: {wanted} images asked for, {made} made now; {run.full_calls} full of {run.calls} network calls, "
            f"{caching}")


_SAMPLING = """
One image per seed, the same for any batch size or number of processes. The same command goes on after a stop; several
of them share the seeds, as does torchrun. SIGUSR1 and SIGTERM stop it after its batch, with exit code 75.
"""


@dataclass(frozen=True)
class Images:
    """What a sample command makes."""
    title: ClassVar[str] = "the images"
    out: Path = required("folder; images that are there are kept", metavar="FOLDER")
    seeds: str | None = option(None, "like 0-9,20 (default: as many as the paper)")


def sample_command(family: Family, doc: str | None) -> Callable[[], None]:
    """The sample command of a family: it fills a folder with the images of a run, as the command line says."""
    @command
    def main() -> None:
        spec, images, machine = parse_run(f"{doc}{_SAMPLING}", Images, Machine, family=family)
        run = spec.open()
        model = open_model(run, machine)
        seeds = list(range(model.images)) if images.seeds is None else parse_seeds(images.seeds)
        made = fill(model, seeds, images.out, machine, last=True)
        print(summary(run, images.out, len(seeds), made))
    return main
