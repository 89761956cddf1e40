"""What the sample commands of all models share with the program of Block Caching: from seeds to images."""

import argparse
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from caching.nested import Policy
from runs.folder import RunFolder, missing_seeds
from runs.options import chosen_seeds, plan_cache, summary
from runs.provenance import provenance
from runs.stopping import Stopped, StopRequest
from sampling.samplers import Sampler
from speed.compiled import compile_seconds
from speed.graphs import RecordedNetwork, accelerated


class ImageModel(ABC):
    """A model with all that decides the image of a seed, caching aside.

    Made from parsed options; that checks everything which needs no weights. `load` reads them. Both raise UserError.
    After construction there are
        sampler
        device, dtype       of the network
        branch              default of --branch
        num_branches        skips of the U-Net
        images              how many seeds --seeds means by default
        settings            for run.json; `load` adds the checkpoint's sha256
    and after `load`
        unet                on its device, in its dtype.
    """
    sampler: Sampler
    device: torch.device
    dtype: torch.dtype
    branch: int
    num_branches: int
    images: int
    settings: dict
    unet: nn.Module

    @abstractmethod
    def load(self) -> None:
        """Read the weights."""

    @abstractmethod
    def latents(self, seeds: Sequence[int], policy: Policy | None = None, network: nn.Module | None = None,
                report: Callable[[float], None] | None = None) -> Tensor:
        """What sampling ends on, for each seed: float32 [seeds, channels, height, width].

        policy: a fresh caching policy; None computes everything. network: what takes the place of the U-Net, called as
        network(x, t, *context, cache=cache). report: called with the fraction of the network calls that is done.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> np.ndarray:
        """Their images: uint8 [seeds, height, width, 3]."""

    def check_seeds(self, seeds: Sequence[int]) -> None:            # noqa: B027  few models have anything to check
        """Raises UserError for a seed that has no image."""

    def describe(self, seeds: Sequence[int]) -> list[str]:
        """What the user is told before sampling, a line each."""
        return []

    def write_listing(self, run: RunFolder) -> None:                # noqa: B027  nor to list
        """A CSV file about the images that are there, where there is anything to say."""


def sample_images(args: argparse.Namespace, model: ImageModel) -> None:
    """What the sample commands do: fill the folder --out, with the caching that was asked for."""
    plan = plan_cache(args, model.sampler.steps, model.num_branches, model.branch)
    plan.check(model.settings)                  # before the weights are read, as far as it can be known,
    seeds = chosen_seeds(args, model.images)
    model.check_seeds(seeds)
    with StopRequest() as stop:
        model.load()
        plan.check(model.settings)              # and after
        network, in_use = accelerated(model.unet, args, plan.graphs(model.sampler.calls))
        run = RunFolder(args.out, model.settings | {"cache": plan.settings}, provenance(model.device) | in_use)
        for line in model.describe(seeds):
            print(line, flush=True)

        def sample(seeds: list[int], report: Callable[[float], None]) -> np.ndarray:
            return model.decode(model.latents(seeds, plan.make(model.device, model.dtype), network, report))

        made = run.fill(seeds, args.batch_size, sample, lambda: stop.asked)
        model.write_listing(run)
    missing = missing_seeds(run.path, seeds)
    if stop.asked and missing:
        raise Stopped(f"{len(seeds) - len(missing)} of {len(seeds)} images are there")
    if missing:
        print(f"{len(missing)} images are not there yet: other processes are at them")
    if isinstance(network, RecordedNetwork):
        print(f"CUDA graphs: {len(network.recordings)}, recorded in {network.seconds:.1f} s")
    if in_use["compile"]:
        print(f"torch.compile took {compile_seconds():.0f} s, once for all batches")
    print(summary(args, seeds, made, model.sampler, plan))
