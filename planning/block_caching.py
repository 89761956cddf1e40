"""Block Caching (arXiv 2312.03209) from measurement to samples, for any model and sampler of this project.

    python -m scripts.block_caching measure --config configs/ddpm_emoji.yaml --out changes.json
    python -m scripts.block_caching schedule --changes changes.json --kinds all --macs 0.5 --out half.json
    python -m scripts.block_caching train --config configs/ddpm_emoji.yaml --schedule half.json --seeds 1000-1031 \\
        --held-out-seeds 2000-2031 --out half.safetensors
    python -m ddpm.sample --config configs/ddpm_emoji.yaml --block-schedule half.json --scale-shift half.safetensors ...

measure: how much every residual changes from step to step, and pictures of it. schedule: when each is computed, from a
threshold, or from a budget of MACs. rhythm: the same steps for all, which needs no weights. train: the scale and shift
of reused residuals, judged on other seeds. show: prints and draws a schedule. measure and train take the options of the
model's sample command that say what is sampled; with --config given, --help lists them.
"""

import argparse
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from caching.block_cache import KINDS, Adjustment, BlockCache, residual_names
from caching.block_schedule import (
    BOUND,
    BlockSchedule,
    block_cache,
    load_scale_shift,
    scale_shift_metadata,
    scale_shift_tensors,
)
from caching.deepcache import DeepCacheOptions
from caching.meters import ChangeMeter, SimilarityMeter
from caching.nested import NestedUNet
from caching.options import RunShape
from caching.scale_shift import Comparison, Distiller, LeastSquares, ScaleShift, relative_distance
from eval.cost.macs import branch_macs, on_meta, residual_macs, schedule_macs
from eval.metrics.intervals import mean_estimate
from planning.block_changes import BlockChanges, ScheduleMaker, summary
from planning.block_plots import change_curves, schedule_chart, similarity_maps
from runs import arguments, results
from runs.cli import command
from runs.errors import UserError, as_user_error
from runs.families import Config, example_inputs, family_named_by
from runs.files import write_json
from runs.image_model import ImageModel, add_run, spec_of
from runs.machine import Machine
from runs.provenance import provenance
from runs.results import Metric, Result
from runs.seeds import format_seeds, parse_seeds
from runs.spec import RunSpec, SamplerOptions
from runs.weights import save_tensors

PAPERS_RUNS = "0-63"        # the paper measures 32 prompts with 2 seeds each
PAPERS_DELTA = 0.5          # of its LDM-512


def build_parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """words: of the command line; the config among them decides which options there are."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    config = first.parse_known_args(words)[0].config

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True, metavar="measure | schedule | rhythm | train | show")

    def verb(name: str, run: Callable[[argparse.Namespace], None], what: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=what, description=what, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    def of_model(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
        batch_size = 8
        if config is None:
            parser.add_argument("--config", type=Path, required=True, help="configs/*.yaml; brings more options")
        else:
            family = family_named_by(config)
            add_run(parser, family, caching=False)
            batch_size = family.batch_size
        arguments.add(parser, Machine)
        parser.set_defaults(batch_size=batch_size)
        return parser.add_argument_group("the run")

    measured = verb("measure", measure, "how much each residual changes from step to step: OUT.json and pictures")
    of_model(measured).add_argument("--seeds", default=PAPERS_RUNS,
                                    help="runs to average over (default: %(default)s, as many as the paper)")
    measured.add_argument("--similar", type=int, default=4,
                          help="runs for the similarity of DeepCache's features (default: %(default)s)")
    measured.add_argument("--out", type=Path, required=True, help="JSON to write")

    made = verb("schedule", make_schedule, "when each residual is computed: OUT.json and a chart")
    made.add_argument("--changes", type=Path, required=True, help="what measure wrote")
    made.add_argument("--kinds", choices=KINDS, default="transformer",
                      help="of blocks that are cached (default: %(default)s, as in the paper)")
    aim = made.add_mutually_exclusive_group()
    aim.add_argument("--delta", type=float, help=f"the threshold (default: {PAPERS_DELTA}, the paper's)")
    aim.add_argument("--macs", type=float, help="the smallest threshold that leaves at most this fraction of the MACs")
    aim.add_argument("--speedup", type=float, help="the same as --macs 1/SPEEDUP")
    made.add_argument("--out", type=Path, required=True, help="JSON to write")
    arguments.add(made, DeepCacheOptions)

    given = verb("rhythm", make_rhythm, "all residuals computed on the same given steps, for any weights: OUT.json")
    given.add_argument("--config", type=Path, required=True, help="configs/*.yaml")
    arguments.add(given, SamplerOptions)
    given.add_argument("--computed", required=True, metavar="STEPS",
                       help="steps that compute, like 0,5,9,13,17; 0 must be one")
    given.add_argument("--kinds", choices=KINDS, default="transformer",
                       help="of blocks that are cached (default: %(default)s, as in the paper)")
    given.add_argument("--out", type=Path, required=True, help="JSON to write")

    trained = verb("train", train, "scale and shift of reused residuals: OUT.safetensors and OUT.scale_shift.json")
    run = of_model(trained)
    run.add_argument("--seeds", required=True, help="runs to learn from, each met once; others than the held-out ones")
    run.add_argument("--held-out-seeds", required=True, help="runs to judge on")
    trained.add_argument("--schedule", dest="block_schedule", type=Path, required=True, help="a block schedule")
    trained.add_argument("--method", choices=METHODS, default="least-squares",
                         help="least-squares (default): solved step by step while all --seeds run as one batch; "
                              "adam: the paper's linear layers on the timestep embedding, a step per network call, in "
                              "batches of --batch-size")
    trained.add_argument("--lr", type=float, default=1e-3,
                         help="adam: at the start; it falls to 0 (default: %(default)s)")
    trained.add_argument("--ridge", type=float, default=1e-2,
                         help="least-squares: pull towards the identity (default: %(default)s)")
    trained.add_argument("--out", type=Path, required=True, help="scale-shift file to write, .safetensors")

    shown = verb("show", show, "print a schedule and draw its chart")
    shown.add_argument("block_schedule", type=Path, metavar="SCHEDULE")
    shown.add_argument("--out", type=Path, help="the chart, .png")
    return parser


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


def own(model: ImageModel) -> NestedUNet:
    """The U-Net of a model. Raises UserError for one of another layout, of which nothing can be cached."""
    if not isinstance(model.unet, NestedUNet):
        raise UserError("--diffusers-unet is for sampling without caching: there is nothing to measure or to fit")
    return model.unet


def batches(seeds: Sequence[int], size: int, title: str, model: ImageModel, work: int = 1
            ) -> Iterator[tuple[list[int], Callable[[float], None]]]:
    """Go through batches under a progress bar: (seeds, what is told the progress of each of the `work` runs)."""
    with tqdm(total=len(seeds) * work * model.sampler.calls, desc=title, unit="call") as bar:
        for first in range(0, len(seeds), size):
            batch = list(seeds[first:first + size])

            def report(done: float, step: int = len(batch)) -> None:
                bar.update(step)
            yield batch, report


def on_example(unet: nn.Module, config: Config, read: Callable[[Hashable, Tensor], None]) -> None:
    """Show every value that a cache is asked for in a network call, on the meta device, to read(key, value)."""
    def cache(key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        value = compute()
        read(key, value)
        return value
    on_meta(unet, example_inputs(config))(cache)


def measure(args: argparse.Namespace) -> None:
    check_out(args.out, ".json")
    seeds, model = parse_seeds(args.seeds), open_model(args)
    if args.similar < 0:
        raise UserError(f"--similar must be 0 or more, got {args.similar}")
    model.check_seeds(seeds)
    model.load()
    kinds = {name: str(module.kind) for name, module in own(model).named_modules() if getattr(module, "kind", None)}
    meter = ChangeMeter(kinds, model.sampler.calls)
    for batch, report in batches(seeds, args.batch_size, "changes", model):
        model.latents(batch, meter, report=report)
        meter.reset()
    similar = SimilarityMeter(range(model.run.unet.num_branches))
    for batch, report in batches(seeds[:args.similar], 2, "similarity", model):
        model.latents(batch, similar, report=report)
        similar.reset()

    inputs = example_inputs(model.config)
    plain = model.run.unet
    macs_full, macs = residual_macs(plain, inputs)
    _, cached = branch_macs(plain, inputs, range(model.run.unet.num_branches))
    changes = meter.changes()
    where = {"seeds": format_seeds(seeds), "settings": model.settings, "provenance": provenance(model.device)}
    found = BlockChanges({key: model.settings[key] for key in BOUND}, model.sampler.calls, where,
                         {name: {"kind": kind, "changes": changes[name], "macs": list(macs[name])}
                          for name, kind in kinds.items()},
                         list(macs_full), [list(cached[branch]) for branch in range(model.run.unet.num_branches)])
    found.save(args.out)
    for kind in sorted(set(kinds.values())):
        change_curves(found.of_kinds(kind), args.out.with_name(f"{args.out.stem}_{kind}.png"))
    if args.similar:
        similarity_maps(similar.similarities(), args.out.with_name(f"{args.out.stem}_similarity.png"))
    print(f"{args.out}: changes of {len(kinds)} residuals over {model.sampler.calls} network calls, "
          f"mean of {len(seeds)} runs; pictures beside it")


def make_schedule(args: argparse.Namespace) -> None:
    check_out(args.out, ".json")
    changes = BlockChanges.load(args.changes)
    branches = len(changes.macs_cached)
    with as_user_error():
        shape = RunShape(changes.run["steps"], changes.calls, branches, 0)
        level = arguments.chosen(DeepCacheOptions, args).plan(shape, ())
    if level is not None and args.branch is None:
        raise UserError("--interval needs --branch here")
    maker = ScheduleMaker(changes, args.kinds, level)
    if args.speedup is not None and not args.speedup >= 1:
        raise UserError(f"--speedup must be 1 or more, got {args.speedup:g}")
    fraction = args.macs if args.speedup is None else 1 / args.speedup
    if fraction is None:
        schedule = maker.make(PAPERS_DELTA if args.delta is None else args.delta)
    else:
        schedule = maker.make(maker.delta_for(fraction))
    write_json(args.out, schedule.to_json())
    schedule_chart(schedule.blocks, schedule.calls, args.out.with_suffix(".png"))
    print("\n".join(summary(schedule)))
    if level is not None:
        mean = maker.macs(schedule.blocks)
        print(f"with DeepCache, {len(level.full_steps)} full steps, branch {level.branch}: "
              f"{mean.hook / maker.full.hook:.4f} of the MACs ({mean.fc / maker.full.fc:.4f} with attention)")
    print(f"{args.out} and {args.out.with_suffix('.png')}")


def make_rhythm(args: argparse.Namespace) -> None:
    check_out(args.out, ".json")
    run = RunSpec.of(args.config, **vars(arguments.chosen(SamplerOptions, args))).open()
    config, sampler, unet = run.config, run.sampler, run.unet
    steps = sorted(parse_seeds(args.computed, "--computed"))
    if steps[0] != 0 or steps[-1] >= sampler.calls:
        raise UserError(f"--computed must contain 0 and stay below the {sampler.calls} network calls, got "
                        f"{args.computed}")
    full, residuals = residual_macs(unet, example_inputs(config))
    blocks = {name: steps for name in residual_names(unet, args.kinds)}
    made_for = {"model": config.name, "unet": asdict(config.unet), "checkpoint_sha256": None, **sampler.settings}
    schedule = BlockSchedule({key: made_for[key] for key in BOUND}, sampler.calls, args.kinds, None, blocks,
                             {"rhythm": "given, not measured"},
                             schedule_macs(full, residuals, blocks, sampler.calls)._asdict(), full._asdict())
    write_json(args.out, schedule.to_json())
    print("\n".join([*summary(schedule), str(args.out)]))


def show(args: argparse.Namespace) -> None:
    if args.out is not None:
        check_out(args.out, ".png")
    with as_user_error():
        schedule = BlockSchedule.load(args.block_schedule)
    print("\n".join(summary(schedule)))
    if args.out is not None:
        schedule_chart(schedule.blocks, schedule.calls, args.out)


def by_adam(model: ImageModel, schedule: BlockSchedule, seeds: list[int], args: argparse.Namespace
            ) -> tuple[list[Adjustment], dict]:
    """The paper's way: linear layers on the timestep embedding, learning while batches of runs are unrolled."""
    channels = {}

    def read(key: Hashable, value: Tensor) -> None:
        if key in schedule.blocks:
            channels[key] = value.shape[1 if value.ndim == 4 else -1]
    on_example(model.run.unet, model.config, read)
    steps = torch.tensor(model.sampler.call_timesteps(), device=model.device)
    unet = own(model)
    embeddings = unet.embedding(steps).float()
    scale_shift = ScaleShift(channels, embeddings.shape[1]).to(model.device)
    optimizer = torch.optim.Adam(scale_shift.parameters(), args.lr)
    distiller = Distiller(unet, scale_shift, optimizer)
    met = 0
    for batch, report in batches(seeds, args.batch_size, "training", model):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 - met / len(seeds))
        model.latents(batch, BlockCache(schedule.blocks), distiller, report)
        met += len(batch)
    return scale_shift.table(embeddings), {"lr": args.lr, "batch_size": args.batch_size,
                                           "iterations": len(distiller.losses)}


def by_least_squares(model: ImageModel, schedule: BlockSchedule, seeds: list[int], args: argparse.Namespace
                     ) -> tuple[list[Adjustment], dict]:
    """The closed form, solved in one run of all seeds as one batch."""
    solver = LeastSquares(own(model), args.ridge)
    for batch, report in batches(seeds, len(seeds), "solving", model):
        model.latents(batch, BlockCache(schedule.blocks), solver, report)
    return solver.table, {"ridge": args.ridge}


METHODS = {"least-squares": by_least_squares, "adam": by_adam}


MEASURES = ("residuals", "latents", "pixels")
ARMS = ("plain", "adjusted", "adjusted minus plain")


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
    seeds, held_out = parse_seeds(args.seeds), parse_seeds(args.held_out_seeds)
    if both := set(seeds) & set(held_out):
        raise UserError(f"seed {min(both)} is to be learnt from and held out: take other seeds")
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
        shown = []
        for arm in ARMS:
            one = found[metric_name(measure, arm)]
            low, high = one.interval or (one.value, one.value)
            shown.append(f"  {arm} {one.value:.4f} [{low:.4f}, {high:.4f}]")
        print(f"{measure:10}{''.join(shown)}")
    print(f"{args.out} and {report}")


@command
def main() -> None:
    args = build_parser(sys.argv[1:]).parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
