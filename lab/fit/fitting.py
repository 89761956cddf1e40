"""The common part of programs that fit something to a model: their options, the model, its U-Net, batches of runs, and
how near to the uncached runs of held-out seeds what they made comes."""

import argparse
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from eval.metrics.intervals import mean_estimate
from lab.fit.runs_path import ForecastErrors
from lab.fit.scale_shift import relative_distance
from run import arguments
from run.families import family_named_by
from run.image_model import ImageModel, add_run, config_among, spec_of
from run.machine import Machine
from run.results import Metric
from run.seeds import in_batches, parse_seeds
from unet_caching.errors import UserError
from unet_caching.methods.deepcache import DeepCache
from unet_caching.nest import NestedUNet
from unet_caching.policy import Policy


def fit_parser(doc: str | None, words: Sequence[str], caching: bool = True) -> argparse.ArgumentParser:
    """The command line of a program that fits something to runs of the model that a config among the words names.

    caching: whether it takes the caching options. The seeds are --seeds and --held-out-seeds (`apart`).
    """
    config = config_among(words)
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if config is None:
        parser.add_argument("--config", type=Path, required=True, help="configs/*.yaml; brings more options")
    else:
        add_run(parser, family_named_by(config), caching)
    about = parser.add_argument_group("the runs")
    about.add_argument("--seeds", required=True, help="to learn from; others than the held-out ones")
    about.add_argument("--held-out-seeds", required=True, help="to judge on")
    arguments.add(parser, Machine)
    if config is not None:
        parser.set_defaults(batch_size=family_named_by(config).batch_size)
    return parser


def apart(args: argparse.Namespace) -> tuple[list[int], list[int]]:
    """The seeds to learn from and those to judge on. Raises UserError where one is both."""
    seeds, held_out = parse_seeds(args.seeds), parse_seeds(args.held_out_seeds)
    if both := set(seeds) & set(held_out):
        raise UserError(f"seed {min(both)} is to be learnt from and held out: take other seeds")
    return seeds, held_out


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
        for batch in in_batches(seeds, size):
            def report(done: float, step: int = len(batch)) -> None:
                bar.update(step)
            yield batch, report


def training_batches(seeds: Sequence[int], size: int, model: ImageModel, optimizer: torch.optim.Optimizer, lr: float,
                     falls_by: float = 1.0) -> Iterator[tuple[list[int], Callable[[float], None]]]:
    """`batches` of runs to learn from: over them the learning rate falls in a line, by a share of `lr`."""
    met = 0
    for batch, report in batches(seeds, size, "training", model):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - falls_by * met / len(seeds))
        yield batch, report
        met += len(batch)


def weights_sha256(network: nn.Module) -> str:
    """The hex digest of a network's weights, packed ones included."""
    digest = hashlib.sha256()
    for name, value in network.named_parameters():
        dense = value.detach().to_dense() if value.is_mkldnn else value.detach()
        digest.update(name.encode())
        digest.update(dense.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def frozen(network: nn.Module) -> Iterator[str]:
    """Make sure that a network's weights are the same after what is done inside: yields their digest.

    Raises RuntimeError where they are not, or could learn.
    """
    before = weights_sha256(network)
    yield before
    if weights_sha256(network) != before or any(value.requires_grad for value in network.parameters()):
        raise RuntimeError("the network was to be frozen, and it has changed")


def held_out_distances(model: ImageModel, arms: Mapping[str, Callable[[], Policy]], seeds: Sequence[int],
                       batch_size: int) -> dict[str, Metric]:
    """The distances of policies to the network without caching, on the same seeds, by "measure, arm".

    arms: functions that return a fresh policy. feature, of DeepCache's policies: between what cached steps see and what
    the network would compute there, relative, mean over the steps. latents: between what sampling ends on, relative.
    Each has a 95 % interval over the seeds, and so have the paired differences of each arm to the one before it.
    """
    found: dict[str, list[float]] = {}
    for batch, report in batches(seeds, batch_size, "judging", model, work=1 + len(arms)):
        exact = model.latents(batch, report=report)
        for arm, make in arms.items():
            policy = make()
            errors = ForecastErrors(model.unet) if isinstance(policy, DeepCache) else None
            latents = model.latents(batch, policy, errors, report)
            if errors is not None:
                of_rows = torch.stack(errors.errors).mean(0)                    # both halves of guidance
                found.setdefault(f"feature, {arm}", []).extend(of_rows.view(-1, len(batch)).mean(0).tolist())
            found.setdefault(f"latents, {arm}", []).extend(relative_distance(latents, exact).tolist())
    metrics = {name: np.array(values) for name, values in found.items()}
    for before, after in zip(arms, list(arms)[1:], strict=False):
        for measure in ("feature", "latents"):
            if f"{measure}, {before}" in found and f"{measure}, {after}" in found:
                metrics[f"{measure}, {after} less {before}"] = metrics[f"{measure}, {after}"] - metrics[
                    f"{measure}, {before}"]
    return {name: Metric.of(mean_estimate(values)) for name, values in metrics.items()}


def distances_table(found: Mapping[str, Metric], held_out: Sequence[int]) -> str:
    """What `held_out_distances` found, for people."""
    return "\n".join([f"{len(held_out)} held-out seeds; distance to the network without caching, 95% intervals:",
                      *("{:32} {:.4f} [{:.4f}, {:.4f}]".format(name, *one.bounds) for name, one in found.items())])
