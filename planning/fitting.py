"""The common part of programs that fit something to a model: the model, its U-Net, batches of runs, what is written."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from caching.nested import NestedUNet
from runs import arguments
from runs.errors import UserError
from runs.families import family_named_by
from runs.image_model import ImageModel, spec_of
from runs.machine import Machine


def check_out(path: Path, suffix: str) -> None:
    """Refuse a file that could not be written. Raises UserError."""
    if path.suffix != suffix or not path.absolute().parent.is_dir():
        raise UserError(f"--out must be a {suffix} file in a folder that is there, got {path}")


def open_model(args: argparse.Namespace) -> ImageModel:
    """The model that the options ask for, without its weights. Raises UserError."""
    if args.compile or args.cuda_graphs:
        raise UserError("--compile and --cuda-graphs are for sampling: every network call is looked at here")
    family = family_named_by(args.config)
    return family.open(spec_of(args, family).open(), arguments.chosen(Machine, args))


def own_unet(model: ImageModel) -> NestedUNet:
    """The U-Net of a loaded model. Raises UserError for one of another layout, which nothing can be fitted to."""
    if not isinstance(model.unet, NestedUNet):
        raise UserError("--diffusers-unet is for sampling without caching: there is nothing to measure or to fit")
    return model.unet


def batches(seeds: Sequence[int], size: int, title: str | None, model: ImageModel, work: int = 1
            ) -> Iterator[tuple[list[int], Callable[[float], None]]]:
    """Go through batches under a progress bar: (seeds, what is told the progress of each of the `work` runs).

    title: of the bar; None: there is none.
    """
    with tqdm(total=len(seeds) * work * model.sampler.calls, desc=title, unit="call",
              disable=title is None or not seeds) as bar:
        for first in range(0, len(seeds), size):
            batch = list(seeds[first:first + size])

            def report(done: float, step: int = len(batch)) -> None:
                bar.update(step)
            yield batch, report
