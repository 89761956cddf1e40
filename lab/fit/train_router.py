"""Learns which blocks a run computes (Learning-to-Cache, arXiv 2406.01733), for one model, sampler and number of steps.

    python -m lab.fit.train_router --config configs/ldm_emoji.yaml --sampler unipc --steps 30 --every-second \\
        --calls 18 --seeds 1000-1063 --held-out-seeds 2000-2031 --out routed.json
    python -m ldm.sample --config configs/ldm_emoji.yaml --sampler unipc --steps 30 --block-schedule routed.json \\
        --seeds 0-63 --out samples/routed

The network is frozen (lab/fit/router.py). With --calls, a budget in multiply-accumulates of full network calls per
image, lambda is moved until the routers have it, and they are rounded to within it; otherwise lambda stays. With
--every-second what is rounded up is computed; without, a router is how often its block is. The result is an ordinary
block schedule. The report, OUT.router.json, has the distances to the uncached run on the held-out seeds: of this
schedule, of one at the same budget that computes all blocks on evenly spread calls, and the paired difference. The
options are those of the model's sample command.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from eval.cost.macs import Macs, residual_macs, schedule_macs
from lab.fit.block_changes import summary
from lab.fit.fitting import (
    apart,
    check_out,
    distances_table,
    fit_parser,
    frozen,
    held_out_distances,
    open_model,
    own_unet,
    training_batches,
)
from lab.fit.router import RouterTraining, least, rounded, spread
from run import arguments, results
from run.cli import command
from run.families import example_inputs, load_unet
from run.files import write_json
from run.image_model import ImageModel
from run.provenance import provenance
from run.results import Result
from run.seeds import format_seeds
from unet_caching.errors import UserError, as_user_error
from unet_caching.files.block_schedule import BlockSchedule
from unet_caching.files.fitted import BOUND
from unet_caching.methods.block_cache import KINDS, BlockCache, residual_names


def build_parser(words: list[str]) -> argparse.ArgumentParser:
    """The command line of the model that the config among the words names."""
    parser = fit_parser(__doc__, words, caching=False)
    about = parser.add_argument_group("the training")
    about.add_argument("--kinds", choices=KINDS, default="all", help="of blocks that are routed (default: %(default)s)")
    about.add_argument("--every-second", action="store_true",
                       help="only every second call may reuse, as in the paper (default: all but the first)")
    about.add_argument("--calls", type=arguments.finite, help="the budget (default: none)")
    about.add_argument("--lam", type=arguments.finite, default=1e-3,
                       help="lambda, of the computed share; with --calls, at the start (default: %(default)s)")
    about.add_argument("--lr", type=arguments.finite, default=0.1,
                       help="Adam's at the start; it falls to a tenth (default: %(default)s)")
    about.add_argument("--out", type=Path, required=True, help="block schedule to write, .json")
    return parser


def even_blocks(names: Sequence[str], costs: Mapping[str, float], full: float, calls: int, budget: float
                ) -> dict[str, list[int]]:
    """All blocks on evenly spread calls, as many as the budget allows, the first among them."""
    saved = sum(costs[name] for name in names)
    count = max(1, min(calls, int((budget - calls * (full - saved)) / saved + 1e-9)))
    steps = sorted({step * calls // count for step in range(count)})
    return {name: steps for name in names}


def fit(model: ImageModel, names: Sequence[str], costs: Mapping[str, float], full: float, seeds: list[int],
        batch_size: int, every_second: bool, lam: float, lr: float, budget: float | None) -> RouterTraining:
    """Train the routers of a loaded model's run. costs: of the names, and full: multiply-accumulates."""
    calls = model.sampler.calls
    # One whose weights are not packed, since those have no gradients (unet_caching/speed/packed.py).
    unet = load_unet(model.config, model.run.checkpoint).to(model.device).eval().requires_grad_(False)
    with frozen(unet):
        training = RouterTraining(unet, {name: costs[name] for name in names}, full,
                                  range(1, calls, 2) if every_second else range(1, calls), calls, lr, lam, budget,
                                  runs=-(-len(seeds) // batch_size))
        for batch, report in training_batches(seeds, batch_size, model, training.optimizer, lr, falls_by=0.9):
            model.latents(batch, training.policy(), training, report)
            training.update()
    return training


def schedule_of(model: ImageModel, kinds: str, blocks: dict[str, list[int]], full: Macs, macs: Mapping[str, Macs],
                notes: dict) -> BlockSchedule:
    """Blocks as a block schedule of the model's run."""
    return BlockSchedule({key: model.settings[key] for key in BOUND}, model.sampler.calls, kinds, None, blocks, notes,
                         schedule_macs(full, macs, blocks, model.sampler.calls)._asdict(), full._asdict())


@command
def main() -> None:
    args, started = build_parser(sys.argv[1:]).parse_args(), time.time()
    check_out(args.out, ".json")
    seeds, held_out = apart(args)
    if not args.lr > 0 or not args.lam >= 0:
        raise UserError(f"--lr must be above 0 and --lam 0 or more, got {args.lr:g} and {args.lam:g}")
    model = open_model(args)
    if model.dtype != torch.float32:
        raise UserError("routers are trained in float32: leave out --dtype")
    full, macs = residual_macs(model.run.unet, example_inputs(model.config))
    with as_user_error():
        names = residual_names(model.run.unet, args.kinds)
        model.check_seeds([*seeds, *held_out])
    costs, calls = {name: macs[name].hook for name in names}, model.sampler.calls
    budget = None if args.calls is None else args.calls * full.hook
    always = range(0, calls, 2) if args.every_second else (0,)
    with as_user_error():                       # refuses, before any work, a budget that cannot be had
        least(names, calls, costs, full.hook, always, budget)
    model.load()
    own_unet(model)

    training = fit(model, names, costs, full.hook, seeds, args.batch_size, args.every_second, args.lam, args.lr, budget)
    betas = [beta.detach().cpu() for beta in training.betas]
    blocks = (rounded(names, betas, costs, full.hook, always, budget) if args.every_second
              else spread(names, betas, costs, full.hook, budget))
    about = {
        "seeds": format_seeds(seeds), "every_second": args.every_second, "lambda": training.lam, "lr": args.lr,
        "batch_size": args.batch_size, "iterations": len(training.losses), "budget": args.calls,
        "calls before rounding": round(training.share, 4)}
    schedule = schedule_of(model, args.kinds, blocks, full, macs, {"system": "Learning-to-Cache", "training": about})
    write_json(args.out, schedule.to_json())
    trained_s = round(time.time() - started, 3)

    even = even_blocks(names, costs, full.hook, calls, schedule.macs["hook"] * calls)
    found = held_out_distances(model, {"evenly": partial(BlockCache, even), "routed": partial(BlockCache, blocks)},
                               held_out, args.batch_size)
    report = args.out.with_suffix(".router.json")
    results.write(report, Result(
        "router", model.settings["model"], model.settings, len(held_out), found,
        hashes={"checkpoint": model.settings["checkpoint_sha256"], "schedule": schedule.sha256},
        provenance=provenance(model.device),
        details={**about, "held_out_seeds": format_seeds(held_out), "trained_s": trained_s,
                 "full_calls": schedule.macs["hook"] * calls / full.hook, "even": even[names[0]],
                 "betas": {name: [round(beta[i].item(), 4) for beta in betas] for i, name in enumerate(names)}}
    ).stamped(started))
    print("\n".join([*list(summary(schedule))[:2], *list(summary(schedule))[-2:]]))
    print(distances_table(found, held_out))
    print(f"{args.out} and {report}")


if __name__ == "__main__":
    main()
