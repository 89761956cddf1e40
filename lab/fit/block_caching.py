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
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from eval.cost.macs import branch_macs, residual_macs, schedule_macs
from lab.fit.block_changes import BlockChanges, ScheduleMaker, summary
from lab.fit.block_plots import change_curves, schedule_chart, similarity_maps
from lab.fit.fitting import batches, check_out, open_model, own_unet
from lab.fit.meters import ChangeMeter, SimilarityMeter
from lab.fit.train_scale_shift import METHODS, train
from run import arguments
from run.cli import command
from run.families import example_inputs, family_named_by
from run.files import write_json
from run.image_model import add_run, config_among
from run.machine import Machine
from run.provenance import provenance
from run.seeds import format_seeds, parse_seeds
from run.spec import RunSpec, SamplerOptions
from unet_caching.errors import UserError, as_user_error
from unet_caching.files.block_schedule import (
    BOUND,
    BlockSchedule,
)
from unet_caching.methods.block_cache import KINDS, residual_names
from unet_caching.methods.deepcache import DeepCacheOptions
from unet_caching.options import RunShape

PAPERS_RUNS = "0-63"        # the paper measures 32 prompts with 2 seeds each
PAPERS_DELTA = 0.5          # of its LDM-512


def build_parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """words: of the command line; the config among them decides which options there are."""
    config = config_among(words)

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
    measured.add_argument("--similar", type=arguments.whole, default=4,
                          help="runs for the similarity of DeepCache's features (default: %(default)s)")
    measured.add_argument("--out", type=Path, required=True, help="JSON to write")

    made = verb("schedule", make_schedule, "when each residual is computed: OUT.json and a chart")
    made.add_argument("--changes", type=Path, required=True, help="what measure wrote")
    made.add_argument("--kinds", choices=KINDS, default="transformer",
                      help="of blocks that are cached (default: %(default)s, as in the paper)")
    aim = made.add_mutually_exclusive_group()
    aim.add_argument("--delta", type=arguments.finite, help=f"the threshold (default: {PAPERS_DELTA}, the paper's)")
    aim.add_argument("--macs", type=arguments.finite,
                     help="the smallest threshold that leaves at most this fraction of the MACs")
    aim.add_argument("--speedup", type=arguments.finite, help="the same as --macs 1/SPEEDUP")
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
    trained.add_argument("--lr", type=arguments.finite, default=1e-3,
                         help="adam: at the start; it falls to 0 (default: %(default)s)")
    trained.add_argument("--ridge", type=arguments.finite, default=1e-2,
                         help="least-squares: pull towards the identity (default: %(default)s)")
    trained.add_argument("--out", type=Path, required=True, help="scale-shift file to write, .safetensors")

    shown = verb("show", show, "print a schedule and draw its chart")
    shown.add_argument("block_schedule", type=Path, metavar="SCHEDULE")
    shown.add_argument("--out", type=Path, help="the chart, .png")
    return parser


def measure(args: argparse.Namespace) -> None:
    check_out(args.out, ".json")
    seeds, model = parse_seeds(args.seeds), open_model(args)
    if args.similar < 0:
        raise UserError(f"--similar must be 0 or more, got {args.similar}")
    model.check_seeds(seeds)
    model.load()
    kinds = {name: module.kind for name, module in own_unet(model).named_modules() if getattr(module, "kind", None)}
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
    unknown = next((name for name, values in changes.items() if not np.isfinite(values).all()), None)
    if unknown is not None:
        raise UserError(f"the changes of {unknown} are not finite: an overflow of the number format (use --dtype fp32 "
                        "or bf16), or damaged weights")
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
        level = arguments.chosen(DeepCacheOptions, args).planned(shape, ())
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


@command
def main() -> None:
    args = build_parser(sys.argv[1:]).parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
