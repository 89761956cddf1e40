"""Fits how much of a forecast each cached step takes (its damping), for one model, sampler and schedule.

    python -m lab.fit.fit_forecast --config configs/ldm_emoji.yaml --steps 50 --interval 5 --forecast 1 \\
        --seeds 1000-1015 --held-out-seeds 2000-2031 --out weights.safetensors
    python -m ldm.sample --config configs/ldm_emoji.yaml --steps 50 --interval 5 --forecast 1 \\
        --forecast-weights weights.safetensors --seeds 0-63 --out samples/fitted

Each cached step has a closed form, against the feature that the network would compute there (methods/forecast_fit.py).
The report, OUT.forecast.json, has the distances to the uncached run on the held-out seeds: of reuse, of the plain
forecast and of the fitted one, and paired differences. The options are those of the model's sample command.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from lab.fit.fitting import apart, batches, check_out, distances_table, fit_parser, held_out_distances
from run import arguments, results
from run.cli import command
from run.families import family_named_by
from run.image_model import ImageModel, spec_of
from run.machine import Machine
from run.provenance import provenance
from run.results import Result
from run.seeds import format_seeds
from run.weights import save_tensors
from unet_caching.errors import UserError
from unet_caching.files.forecast_weights import ForecastWeights
from unet_caching.forecast import Damping
from unet_caching.methods.deepcache import DeepCache, PlannedDeepCache
from unet_caching.methods.forecast_fit import ForecastFit


def build_parser(words: list[str]) -> argparse.ArgumentParser:
    """The command line of the model that the config among the words names."""
    parser = fit_parser(__doc__, words)
    about = parser.add_argument_group("the fit")
    about.add_argument("--ridge", type=arguments.finite, default=1e-2,
                       help="pull towards the plain forecast (default: %(default)s)")
    about.add_argument("--out", type=Path, required=True, help="forecast weights to write, .safetensors")
    return parser


def check(args: argparse.Namespace, model: ImageModel) -> PlannedDeepCache:
    """DeepCache in the run that is to be fitted. Raises UserError for options that cannot be."""
    check_out(args.out, ".safetensors")
    if args.compile or args.cuda_graphs:
        raise UserError("--compile and --cuda-graphs are for sampling: every network call is looked at here")
    if not args.ridge >= 0:
        raise UserError(f"--ridge must be 0 or more, got {args.ridge:g}")
    level = model.run.deepcache
    if level is None or level.forecast[0] == 0 or args.forecast_weights is not None or args.block_schedule is not None:
        raise UserError("what is fitted is a forecast of DeepCache's feature: give --interval and --forecast, and "
                        "neither --forecast-weights nor --block-schedule")
    return level


def fit(model: ImageModel, level: PlannedDeepCache, seeds: Sequence[int], batch_size: int, ridge: float = 1e-2
        ) -> ForecastWeights:
    """The weights of a loaded model's run, learnt from runs of some seeds. level: DeepCache in it, with a forecast."""
    found = ForecastFit(model.unet, level.branch, level.full_steps, level.forecast[0], model.run.calls, ridge)
    for batch, report in batches(seeds, batch_size, "fitting", model):
        model.latents(batch, found.policy(), found, report)
    return ForecastWeights(model.settings, level.branch, level.full_steps, found.damping,
                           {"seeds": format_seeds(seeds), "ridge": ridge})


@command
def main() -> None:
    args, started = build_parser(sys.argv[1:]).parse_args(), time.time()
    family = family_named_by(args.config)
    seeds, held_out = apart(args)
    model = family.open(spec_of(args, family).open(), arguments.chosen(Machine, args))
    level = check(args, model)
    model.check_seeds([*seeds, *held_out])
    model.load()

    weights = fit(model, level, seeds, args.batch_size, args.ridge)
    save_tensors(weights.tensors(), args.out, weights.metadata())
    damping, order = ForecastWeights.load(args.out).damping, level.forecast[0]
    arms: dict[str, tuple[int, Damping]] = {"reuse": (0, 1.0), "plain": (order, 1.0), "fitted": (order, damping)}
    found = held_out_distances(model, {arm: partial(DeepCache, level.branch, level.full_steps, own, damped)
                                       for arm, (own, damped) in arms.items()}, held_out, args.batch_size)
    report_path = args.out.with_suffix(".forecast.json")
    results.write(report_path, Result(
        "forecast weights", model.settings["model"], model.settings | {"cache": model.run.caching.settings},
        len(held_out), found, hashes={"checkpoint": model.settings["checkpoint_sha256"]},
        provenance=provenance(model.device),
        details={**weights.notes, "held_out_seeds": format_seeds(held_out), "damping": asdict(weights)["damping"]}
    ).stamped(started))
    print(distances_table(found, held_out))
    print(f"{args.out} and {report_path}")


if __name__ == "__main__":
    main()
