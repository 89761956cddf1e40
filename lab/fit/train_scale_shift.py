"""The scale and shift of reused residuals: learnt on some runs, judged on others (`scripts.block_caching train`)."""

import argparse
import time
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from eval.cost.macs import on_meta
from eval.metrics.intervals import mean_estimate
from lab.fit.fitting import apart, batches, check_out, open_model, own_unet, training_batches
from lab.fit.scale_shift import Comparison, Distiller, LeastSquares, ScaleShift, relative_distance
from run import results
from run.families import Config, example_inputs
from run.image_model import ImageModel
from run.provenance import provenance
from run.results import Metric, Result
from run.seeds import format_seeds
from run.weights import save_tensors
from unet_caching.errors import UserError, as_user_error
from unet_caching.files.block_schedule import (
    BlockSchedule,
    block_cache,
    load_scale_shift,
    scale_shift_metadata,
    scale_shift_tensors,
)
from unet_caching.methods.block_cache import Adjustment, BlockCache

MEASURES = ("residuals", "latents", "pixels")
ARMS = ("plain", "adjusted", "adjusted minus plain")


def on_example(unet: nn.Module, config: Config, read: Callable[[Hashable, Tensor], None]) -> None:
    """Show every value that a cache is asked for in a network call, on the meta device, to read(key, value)."""
    def cache(key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        value = compute()
        read(key, value)
        return value
    on_meta(unet, example_inputs(config))(cache)


def by_adam(model: ImageModel, schedule: BlockSchedule, seeds: list[int], args: argparse.Namespace
            ) -> tuple[list[Adjustment], dict]:
    """The paper's way: linear layers on the timestep embedding, learning while batches of runs are unrolled."""
    channels = {}

    def read(key: Hashable, value: Tensor) -> None:
        if key in schedule.blocks:
            channels[key] = value.shape[1 if value.ndim == 4 else -1]
    on_example(model.run.unet, model.config, read)
    steps = torch.tensor(model.sampler.call_timesteps(), device=model.device)
    unet = own_unet(model)
    embeddings = unet.embedding(steps).float()
    scale_shift = ScaleShift(channels, embeddings.shape[1]).to(model.device)
    optimizer = torch.optim.Adam(scale_shift.parameters(), args.lr)
    distiller = Distiller(unet, scale_shift, optimizer)
    for batch, report in training_batches(seeds, args.batch_size, model, optimizer, args.lr):
        model.latents(batch, BlockCache(schedule.blocks), distiller, report)
    return scale_shift.table(embeddings), {"lr": args.lr, "batch_size": args.batch_size,
                                           "iterations": len(distiller.losses)}


def by_least_squares(model: ImageModel, schedule: BlockSchedule, seeds: list[int], args: argparse.Namespace
                     ) -> tuple[list[Adjustment], dict]:
    """The closed form, solved in one run of all seeds as one batch."""
    solver = LeastSquares(own_unet(model), args.ridge)
    for batch, report in batches(seeds, len(seeds), "solving", model):
        model.latents(batch, BlockCache(schedule.blocks), solver, report)
    return solver.table, {"ridge": args.ridge}


METHODS = {"least-squares": by_least_squares, "adam": by_adam}


def metric_name(measure: str, arm: str) -> str:
    """The name of one of MEASURES of one of ARMS in the report of `train`."""
    return f"{measure}, {arm}"


def held_out_distances(model: ImageModel, schedule: BlockSchedule, table: Sequence[Adjustment], seeds: list[int],
                       batch_size: int) -> dict[str, Metric]:
    """The distances to the uncached network with and without the adjustment, on the same seeds, by `metric_name`.

    They are means over the seeds, and their difference, each with a 95% interval. residuals: from reused ones to those
    that the network would compute, relative, mean over calls and residuals. latents: between what sampling ends on,
    relative. pixels: root mean square, of 255.
    """
    found: dict[str, dict[str, list[float]]] = {arm: {measure: [] for measure in MEASURES} for arm in ARMS[:2]}
    for batch, report in batches(seeds, batch_size, "judging", model, work=3):
        exact = model.latents(batch, report=report)
        images = model.decode(exact).astype(np.float32)
        for arm, of_arm in (("plain", None), ("adjusted", table)):
            comparison = Comparison(model.unet)
            policy = block_cache(schedule.blocks, of_arm, model.device, model.dtype)
            latents = model.latents(batch, policy, comparison, report)
            errors = torch.stack(comparison.errors).mean(0)                     # [rows], both halves of guidance
            found[arm]["residuals"] += errors.view(-1, len(batch)).mean(0).tolist()
            found[arm]["latents"] += relative_distance(latents, exact).tolist()
            difference = np.square(model.decode(latents) - images).mean(axis=(1, 2, 3))
            found[arm]["pixels"] += np.sqrt(difference).tolist()

    metrics = {}
    for measure in MEASURES:
        plain, adjusted = (np.array(found[arm][measure]) for arm in ARMS[:2])
        for arm, values in zip(ARMS, (plain, adjusted, adjusted - plain), strict=True):
            metrics[metric_name(measure, arm)] = Metric.of(mean_estimate(values))
    return metrics


def train(args: argparse.Namespace) -> None:
    started = time.time()
    check_out(args.out, ".safetensors")
    if not args.lr > 0 or not args.ridge >= 0:
        raise UserError(f"--lr must be above 0 and --ridge 0 or more, got {args.lr:g} and {args.ridge:g}")
    seeds, held_out = apart(args)
    with as_user_error():
        schedule = BlockSchedule.load(args.block_schedule)
    if all(len(steps) == schedule.calls for steps in schedule.blocks.values()):
        raise UserError(f"{args.block_schedule} computes everything: there is nothing to adjust")
    model = open_model(args)
    with as_user_error():
        schedule.check(model.settings)
        model.check_seeds([*seeds, *held_out])
        model.load()
        schedule.check(model.settings)

    table, notes = METHODS[args.method](model, schedule, seeds, args)
    notes = {"method": args.method, "seeds": format_seeds(seeds), **notes}
    save_tensors(scale_shift_tensors(table, schedule), args.out, scale_shift_metadata(schedule, notes))
    found = held_out_distances(model, schedule, load_scale_shift(args.out, schedule), held_out, args.batch_size)
    report = args.out.with_suffix(".scale_shift.json")          # not .json, which the schedule may be called
    hashes = {"checkpoint": model.settings["checkpoint_sha256"], "schedule": schedule.sha256}
    results.write(report, Result("scale-shift", model.settings["model"], model.settings, len(held_out), found,
                                 hashes=hashes, provenance=provenance(model.device),
                                 details={**notes, "held_out_seeds": format_seeds(held_out)}).stamped(started))
    print(f"{len(held_out)} held-out seeds; distance to the network without caching, 95% intervals:")
    for measure in MEASURES:
        print(f"{measure:10}" + "".join("  {} {:.4f} [{:.4f}, {:.4f}]".format(
            arm, *found[metric_name(measure, arm)].bounds) for arm in ARMS))
    print(f"{args.out} and {report}")
