"""Trains Clockwork's adaptor (arXiv 2312.08128) for one model, sampler, clock and branch, on unrolled runs.

    python -m lab.fit.train_adaptor --config configs/ldm_emoji.yaml --sampler unipc --steps 50 --clock 4 \\
        --seeds 1000-1063 --held-out-seeds 2000-2031 --out adaptor.safetensors
    python -m ldm.sample --config configs/ldm_emoji.yaml --sampler unipc --steps 50 --clock 4 \\
        --adaptor adaptor.safetensors --seeds 0-63 --out samples/clockwork

The network is frozen, and teaches on the path of the run that goes on with the adaptor (lab/fit/adaptor_training.py).
The report, OUT.adaptor.json, has the distances to the uncached run on the held-out seeds, of the identity and of what
was learnt, and paired differences. The options are those of the model's sample command.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch

from lab.fit.adaptor_training import AdaptorTraining
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
from run import arguments, results
from run.cli import command
from run.image_model import ImageModel
from run.provenance import provenance
from run.results import Result
from run.seeds import format_seeds
from run.weights import save_tensors
from unet_caching.errors import UserError, as_user_error
from unet_caching.methods.adaptor import AdaptorFile
from unet_caching.methods.clockwork import Clockwork, PlannedClockwork
from unet_caching.trace import positions


def build_parser(words: list[str]) -> argparse.ArgumentParser:
    """The command line of the model that the config among the words names."""
    parser = fit_parser(__doc__, words)
    about = parser.add_argument_group("the training")
    about.add_argument("--channels", type=arguments.whole, default=16,
                       help="channels of the adaptor's bottleneck (default: %(default)s)")
    about.add_argument("--lr", type=arguments.finite, default=3e-3,
                       help="Adam's at the start; it falls to 0 (default: %(default)s)")
    about.add_argument("--passes", type=arguments.whole, default=1,
                       help="how often the seeds are met (default: %(default)s)")
    about.add_argument("--out", type=Path, required=True, help="adaptor to write, .safetensors")
    return parser


def check(args: argparse.Namespace, model: ImageModel) -> PlannedClockwork:
    """Clockwork in the run that is to be trained. Raises UserError for options that cannot be."""
    check_out(args.out, ".safetensors")
    if args.channels < 1 or args.passes < 1 or not args.lr > 0:
        raise UserError(f"--channels and --passes must be 1 or more and --lr above 0, got {args.channels}, "
                        f"{args.passes} and {args.lr:g}")
    clockwork = model.run.caching.of(PlannedClockwork)
    if clockwork is None or clockwork.adaptor is not None or len(model.run.caching.methods) > 1:
        raise UserError("what is trained is the adaptor of a clock: give --clock, and neither --adaptor nor other "
                        "caching options")
    if model.dtype != torch.float32:
        raise UserError("adaptors are trained in float32: leave out --dtype")
    return clockwork


def fit(model: ImageModel, clockwork: PlannedClockwork, seeds: list[int], batch_size: int, width: int = 16,
        lr: float = 3e-3, passes: int = 1) -> tuple[AdaptorFile, AdaptorTraining]:
    """An adaptor for a loaded model's run, learnt from runs of some seeds; and how that went."""
    unet = own_unet(model)
    feature = positions(model.run.asked)[clockwork.branch].shape
    steps = torch.tensor(model.sampler.call_timesteps(), device=model.device)
    torch.manual_seed(0)                        # the inner convolution starts at random
    training = AdaptorTraining(unet, clockwork.branch, clockwork.full_steps, feature[1], width,
                               unet.embedding(steps).float(), lr)
    for batch, report in training_batches(list(seeds) * passes, batch_size, model, training.optimizer, lr):
        model.latents(batch, training.policy(), training, report)
    weights = {name: value.detach().cpu() for name, value in training.adaptor.state_dict().items()}
    notes = {"seeds": format_seeds(seeds), "lr": lr, "batch_size": batch_size, "passes": passes,
             "iterations": len(training.losses)}
    made_for = model.settings | {"fingerprint": model.run.fingerprint}
    made = AdaptorFile(made_for, clockwork.branch, clockwork.full_steps, weights, training.table().cpu(), notes)
    return made, training


@command
def main() -> None:
    args, started = build_parser(sys.argv[1:]).parse_args(), time.time()
    seeds, held_out = apart(args)
    model = open_model(args)
    clockwork = check(args, model)
    with as_user_error():
        model.check_seeds([*seeds, *held_out])
    model.load()
    with frozen(model.unet) as weights_sha256:
        made, training = fit(model, clockwork, seeds, args.batch_size, args.channels, args.lr, args.passes)
    save_tensors(made.tensors(), args.out, made.metadata())
    trained_s = round(time.time() - started, 3)

    learned = PlannedClockwork.of_file(clockwork, args.out)
    found = held_out_distances(model, {"identity": partial(Clockwork, clockwork.branch, clockwork.full_steps),
                                       "learned": lambda: learned.policy(model.device, model.dtype)},
                               held_out, args.batch_size)
    report = args.out.with_suffix(".adaptor.json")
    thirds = len(training.losses) // 3 or 1
    results.write(report, Result(
        "adaptor", model.settings["model"], model.settings | {"cache": learned.settings}, len(held_out), found,
        hashes={"checkpoint": model.settings["checkpoint_sha256"], "weights": weights_sha256},
        provenance=provenance(model.device),
        details={**made.notes, "held_out_seeds": format_seeds(held_out), "trained_s": trained_s,
                 "parameters": sum(value.numel() for value in made.weights.values()),
                 "loss, last third": sum(loss for loss, _ in training.losses[-thirds:]) / thirds,
                 "loss of the identity there": sum(loss for _, loss in training.losses[-thirds:]) / thirds}
    ).stamped(started))
    print(distances_table(found, held_out))
    print(f"{args.out} and {report}")


if __name__ == "__main__":
    main()
