"""Models that make an image from a seed: what each of them must offer, and the sample command that they share."""

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
    """The model of a run, with everything but the caching that decides the image of a seed.

    The constructor does what needs no weights; `load` reads the weights and adds the checkpoint's sha256 to the
    settings. Both raise UserError.
    """
    images: int                 # the default number of seeds
    shape: tuple[int, ...]      # of the latents of an image
    unet: nn.Module             # after `load`: on its device, in its dtype
    kind_of_weights: dict       # after `load`: what run.json says of a checkpoint with EMA and plain weights

    def __init__(self, run: Run, machine: Machine):
        self.run, self.sampler, self.settings = run, run.sampler, dict(run.settings)
        # The family that opens the model has these types.
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
            "weights": f"{own} weights; the checkpoint also has {other} ones (--ema {flag})"}

    @abstractmethod
    def read(self, checkpoint: Path) -> None:
        """Read the weights of a checkpoint and place them on the device."""

    def noise(self, seeds: Sequence[int], draws: SeededNoise) -> Tensor:
        """What sampling starts from: float32 [seeds, *shape]."""
        return draws(self.shape)

    def context(self, seeds: Sequence[int]) -> Sequence[Tensor]:
        """The network's inputs beside x and t; with guidance for the doubled batch [uncond, cond]."""
        return ()

    @torch.no_grad()
    def start(self, seeds: Sequence[int], policy: Policy | None = None, network: Network | None = None
              ) -> tuple[Predict, Tensor, SeededNoise]:
        """The noise predictor of a batch of seeds, their x_T, and their noise for later steps.

        policy, network: as in `latents`.
        """
        draws = SeededNoise(seeds, self.device)
        x, context = self.noise(seeds, draws), self.context(seeds)
        return noise_predictor(network or self.unet, self.config.diffusion, self.dtype, policy, context,
                               self.run.guidance), x, draws

    @torch.no_grad()
    def latents(self, seeds: Sequence[int], policy: Policy | None = None, network: Network | None = None,
                report: Callable[[float], None] | None = None) -> Tensor:
        """The result of sampling for each seed: float32 [seeds, *shape]. Raises UserError if it is not finite.

        policy: a fresh caching policy; None computes everything. network: used instead of the U-Net.
        report: called with the finished fraction of the network calls.
        """
        predict, x, draws = self.start(seeds, policy, network)
        return check_finite(self.sampler.run(predict, x, draws, report))

    @abstractmethod
    def decode(self, latents: Tensor) -> np.ndarray:
        """The images of latents: uint8 [seeds, height, width, 3]."""

    def check_seeds(self, seeds: Sequence[int]) -> None:            # few models have anything to check
        """Raise a UserError for a seed that has no image."""

    def describe(self, seeds: Sequence[int]) -> list[str]:
        """Lines to print before sampling."""
        return []

    def write_listing(self, folder: RunFolder) -> None:             # nor to list
        """Write a CSV file about the images in the folder, if there is anything to say."""

    def policy(self) -> Policy | None:
        """A fresh caching policy of the run; None without caching."""
        return self.run.caching.policy(self.device, self.dtype)


def open_model(run: Run, machine: Machine) -> ImageModel:
    """The model of a run: its package's module `model` exports the class as MODEL. Raises UserError."""
    return importlib.import_module(f"{run.family.package}.model").MODEL(run, machine)


def check_compiled(run: Run, machine: Machine) -> None:
    """Raise a UserError if a run is to be compiled whose schedule depends on the image."""
    if machine.compile and any(method.online for method in run.caching.methods):
        raise UserError("--compile needs a schedule that is known beforehand, but here it depends on the image: leave "
                        "out --compile")


def fill(model: ImageModel, seeds: Sequence[int], out: Path, machine: Machine, last: bool = False) -> int:
    """Sample the missing images of a folder; returns how many were made.

    last: whether the program ends after this call; then a request to stop that came after the last image is ignored.
    Raises UserError, and Stopped if a signal asked to stop.
    """
    run = model.run
    check_compiled(run, machine)
    run.refuse_foreign(model.settings)          # as far as possible before the weights are read
    model.check_seeds(seeds)
    with StopRequest() as stop:
        model.load()
        run.refuse_foreign(model.settings)
        network = accelerated(model.unet, machine.compile, machine.cuda_graphs,
                              len(set(run.reused)) if machine.compile else 1)       # graphs: one per kind of call
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
        print(f"{len(missing)} images are still missing: other processes are sampling them")
    for line in network.report():
        print(line)
    return made


def summary(run: Run, out: Path, wanted: int, made: int) -> str:
    """The last line of a sample command."""
    caching = ", ".join(method.summary for method in run.caching.methods) or "no caching"
    return (f"{out}: {wanted} images asked for, {made} made now; {run.full_calls} full of {run.calls} network calls, "
            f"{caching}")


_SAMPLING = """
One image per seed, the same for any batch size or number of processes. After a stop, the same command goes on. Several
of them, or torchrun, share the seeds. SIGUSR1 and SIGTERM stop the command after its batch, with exit code 75.
"""


@dataclass(frozen=True)
class Images:
    """What a sample command makes."""
    title: ClassVar[str] = "the images"
    out: Path = required("folder; existing images are kept", metavar="FOLDER")
    seeds: str | None = option(None, "like 0-9,20 (default: as many as the paper)")


def sample_command(family: Family, doc: str | None) -> Callable[[], None]:
    """The sample command of a family, which fills a folder with the images of a run."""
    @command
    def main() -> None:
        spec, images, machine = parse_run(f"{doc}{_SAMPLING}", Images, Machine, family=family)
        run = spec.open()
        model = open_model(run, machine)
        seeds = list(range(model.images)) if images.seeds is None else parse_seeds(images.seeds)
        made = fill(model, seeds, images.out, machine, last=True)
        print(summary(run, images.out, len(seeds), made))
    return main
