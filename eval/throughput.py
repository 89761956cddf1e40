"""Wall-clock time of full and cached steps: the only place of the project where anything is timed.

    python -m eval.throughput --config configs/ddpm_cifar10.yaml --branch 1 2 3 --batch-size 8 --threads 1
    python -m eval.throughput --config configs/ddpm_emoji.yaml --interval 2 3 5 10 --out results/throughput/emoji.json
    python -m eval.throughput --config configs/ldm_cin256.yaml --branch 0 --batch-size 1 --threads 1
    python -m eval.throughput --config configs/sd_v15.yaml --forecast 0 1 2 --batch-size 1 --threads 1
    python -m eval.throughput compare --threads 1       beside diffusers and the PyPI package
    python -m eval.throughput grid FILE                 of such a file: interval x branch x forecast, in Markdown
    python -m eval.throughput run --config configs/ldm_cin256.yaml --interval 5 --forecast 1      any run, any policy
    python -m eval.throughput --config configs/sd_v15.yaml --block-schedule configs/block_schedules/*.json

Only the U-Net runs, on random weights unless --checkpoint is given, and nothing is written meanwhile. All variants
take turns in one process, so that a busy machine slows them alike: trust the ratios, which are medians over the rounds,
before the seconds. What to expect is the ratio of the MACs.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.cost.run_timing import table as table_of_run
from eval.cost.run_timing import time_run
from eval.cost.timing import measure, measure_schedules
from eval.tables import grid
from run import arguments, results
from run.cli import command
from run.families import (
    Config,
    at_resolution,
    build,
    example_inputs,
    family_named_by,
    load_config,
    load_unet,
    rows_per_image,
)
from run.image_model import add_run, check_compiled, config_among, kinds_of_calls, spec_of
from run.machine import Machine, check_counts, prepare_device
from run.provenance import provenance
from run.results import Result
from run.spec import DTYPES
from unet_caching.errors import UserError, as_user_error
from unet_caching.files.block_schedule import BlockSchedule
from unet_caching.policy import Together
from unet_caching.speed.accelerate import accelerated, place


def schedules_table(result: dict) -> str:
    """What `measure_schedules` found, for people."""
    lines = [f"a full step: {1e3 * result['full']['median']:.2f} ms", "",
             f"{'schedule':44}{'kinds of steps':>15}{'images/s':>10}{'speed-up':>10}{'by macs':>9}{'macs_fc':>9}"]
    for row in result["schedules"]:
        name = row["name"] + (", scale-shift" if row["scale_shift"] else "")
        lines.append(f"{name:44}{len(row['sets']):15}{row['images_per_second']:10.4g}{row['speedup']:10.2f}"
                     f"{row['macs_speedup']:9.2f}{row['macs_fc_speedup']:9.2f}")
    return "\n".join(lines)


def variant(row: dict) -> str:
    """The name of a branch and the order of its forecast."""
    return f"branch {row['branch']}" + (f", order {row['forecast']}" if row["forecast"] else "")


def table(result: dict) -> str:
    """What `measure` found, for people."""
    full = result["full"]
    lines = ["cached / full: time, macs, macs_fc",
             f"{'step':18}{'median ms':>10}{'quartiles':>18}{'time':>8}{'macs':>8}{'macs_fc':>9}"]
    for name, row in (("full", full), *((variant(row), row) for row in result["branches"])):
        low, high = (1e3 * value for value in row["quartiles"])
        lines.append(f"{name:18}{1e3 * row['median']:10.2f}{f'{low:.2f}-{high:.2f}':>18}{row.get('ratio', 1):8.3f}"
                     f"{row.get('macs_ratio', 1):8.3f}{row.get('macs_fc_ratio', 1):9.3f}"
                     + (f"    peak {row['peak_bytes'] / 2**20:.0f} MiB" if row["peak_bytes"] else ""))
    lines += ["", f"{'run':30}{'images/s':>10}{'speed-up':>10}{'by macs':>9}",
              f"{'no caching':30}{full['images_per_second']:10.4g}{1:10.2f}{1:9.2f}"]
    for row in result["runs"]:
        name = f"{variant(row)}, N = {row['interval']}"
        lines.append(f"{name:30}{row['images_per_second']:10.4g}{row['speedup']:10.2f}{row['macs_speedup']:9.2f}")
    return "\n".join(lines)


def add_timing_options(parser: argparse.ArgumentParser) -> None:
    """--repeats, --warmup, --out."""
    parser.add_argument("--repeats", type=arguments.whole, default=20, help="timed rounds (default: %(default)s)")
    parser.add_argument("--warmup", type=arguments.whole, default=2,
                        help="untimed rounds before them (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the result, written after the timing")


def random_inputs(config: Config, rows: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """What the U-Net takes before `cache`."""
    noise = torch.Generator().manual_seed(0)
    return [torch.randn(value.shape, generator=noise).to(device, dtype) if value.is_floating_point() else value + 500
            for value in example_inputs(config, rows, device, dtype)]


def time_a_run(words: Sequence[str]) -> None:
    """`eval.throughput run`: the kinds of network calls that a run has, whatever its caching."""
    config = config_among(words)
    if config is None:
        raise UserError("eval.throughput run needs --config, which brings the options of a run")
    family, started = family_named_by(config), time.time()
    parser = argparse.ArgumentParser(prog="eval.throughput run", description=time_a_run.__doc__)
    add_run(parser, family)
    arguments.add(parser, Machine)
    add_timing_options(parser)
    args = parser.parse_args(words)
    run, machine = spec_of(args, family).open(), arguments.chosen(Machine, args)
    run.refuse_foreign(run.told | {"unet": asdict(run.config.unet)})
    check_compiled(run, machine)
    device = machine.prepare()
    torch.manual_seed(0)
    checkpoint = run.spec.network.checkpoint
    unet = place(load_unet(run.config, checkpoint) if checkpoint else build(run.config, "cpu"), device, run.dtype)
    found = accelerated(unet, machine.compile, machine.cuda_graphs, kinds_of_calls(run))
    rows, where = machine.batch_size * run.rows_per_image, provenance(device)
    inputs = random_inputs(run.config, rows, device, run.dtype)
    with as_user_error():
        result = time_run(run, found.network, inputs, lambda: run.caching.policy(device, run.dtype) or Together(),
                          args.repeats, args.warmup)
    print(f"{run.config.name}, {run.name}: batch {machine.batch_size} ({rows} rows), {where['device_name']}\n"
          f"{table_of_run(result)}")
    if args.out:
        settings = {**run.told, "batch_size": machine.batch_size, "rows": rows, "repeats": args.repeats,
                    "warmup": args.warmup, "weights": str(checkpoint) if checkpoint else "random", **found.in_use}
        results.write(args.out, Result("throughput", run.config.name, settings, throughput=result, provenance=where
                                       ).stamped(started))
        print(f"wrote {args.out}")


def time_steps(words: Sequence[str]) -> None:
    """Without a verb: full and cached steps, and whole runs made of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="configs/*.yaml")
    parser.add_argument("--checkpoint", type=Path, help="weights (default: random; they do not change the time)")
    parser.add_argument("--branch", type=arguments.whole, nargs="+",
                        help="0-based skips (default: the paper's for this model)")
    parser.add_argument("--interval", type=arguments.whole, nargs="+", default=[2, 3, 5, 10],
                        help="N of 1:N of the whole runs (default: 2 3 5 10)")
    parser.add_argument("--forecast", type=arguments.whole, nargs="+", default=[0], metavar="ORDER",
                        help="time cached steps that forecast, with these orders; 0 = reuse (default)")
    parser.add_argument("--steps", type=arguments.whole,
                        help="network calls per image of the whole runs (default: the config's)")
    parser.add_argument("--block-schedule", type=Path, nargs="+", metavar="FILE",
                        help="time Block Caching by these schedules instead, each without and with scale-shift")
    parser.add_argument("--resolution", type=arguments.whole, metavar="PIXELS",
                        help="of the images (default: the config's)")
    parser.add_argument("--batch-size", type=arguments.whole, default=8,
                        help="images at a time; with guidance each takes two rows of the batch (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu, cuda, cuda:1 (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the network (default: %(default)s)")
    parser.add_argument("--threads", type=arguments.whole, help="CPU threads (default: all cores)")
    add_timing_options(parser)
    args = parser.parse_args(words)

    started = time.time()
    check_counts(batch_size=args.batch_size)
    config, device = load_config(args.config), prepare_device(args.device, args.threads)
    sized = {} if args.resolution is None else {"resolution": args.resolution}
    if sized:
        config = at_resolution(config, args.resolution)
    dtype = DTYPES[args.dtype]
    if device.type == "meta":
        raise UserError("--device meta computes nothing that could be timed: use cpu or cuda")
    schedules = {}
    for path in args.block_schedule or ():
        with as_user_error():
            schedules[path.stem] = BlockSchedule.load(path)
            schedules[path.stem].check({"model": config.name, "unet": asdict(config.unet)})
    branches = list(dict.fromkeys(args.branch or [config.sampler.branch]))
    steps = config.sampler.steps if args.steps is None else args.steps
    torch.manual_seed(0)
    unet: Any = place(load_unet(config, args.checkpoint) if args.checkpoint else build(config, "cpu"), device, dtype)
    rows = args.batch_size * rows_per_image(config)
    inputs = random_inputs(config, rows, device, dtype)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)      # fails before the work, where it fails
    where = provenance(device)
    settings = {"batch_size": args.batch_size, "rows": rows, "dtype": args.dtype, "repeats": args.repeats,
                "warmup": args.warmup, "weights": str(args.checkpoint) if args.checkpoint else "random", **sized}
    guided = f" ({rows} rows with guidance)" if rows != args.batch_size else ""
    print(f"{config.name}: batch {args.batch_size}{guided}, {args.dtype}, {where['device']} ({where['device_name']}), "
          f"{where['threads']} CPU threads, {args.repeats} rounds", flush=True)
    rounds = args.repeats, args.warmup, rows_per_image(config), build(config).to(dtype)
    kind = "throughput"
    if schedules:
        result = measure_schedules(unet, inputs, schedules, *rounds)
        print(schedules_table(result))
    else:
        orders = list(dict.fromkeys(args.forecast))
        kind = "throughput" if orders == [0] else "throughput of forecasts"     # no table of the papers shows those
        result = measure(unet, inputs, branches, args.interval, steps, *rounds, orders)
        print(table(result))
    if args.out:
        results.write(args.out, Result(kind, config.name, settings, throughput=result, provenance=where
                                       ).stamped(started))
        print(f"wrote {args.out}")


@command
def main() -> None:
    if sys.argv[1:2] == ["compare"]:
        from eval.cost import compare_speed  # which imports diffusers
        compare_speed.run(sys.argv[2:])
    elif sys.argv[1:2] == ["grid"]:
        grid.run(sys.argv[2:])
    elif sys.argv[1:2] == ["run"]:
        time_a_run(sys.argv[2:])
    else:
        time_steps(sys.argv[1:])


if __name__ == "__main__":
    main()
