"""Wall-clock time of full and cached steps.

    python -m eval.throughput --config configs/ddpm_cifar10.yaml --branch 1 2 3 --batch-size 8 --threads 1
    python -m eval.throughput --config configs/ddpm_emoji.yaml --interval 2 3 5 10 --out results/throughput/emoji.json
    python -m eval.throughput --config configs/ldm_cin256.yaml --branch 0 --batch-size 1 --threads 1
    python -m eval.throughput --config configs/sd_v15.yaml --forecast 0 1 2 --batch-size 1 --threads 1
    python -m eval.throughput run --config configs/ldm_cin256.yaml --interval 5 --forecast 1      any run, any policy
    python -m eval.throughput run --config configs/sd_v15.yaml --block-schedule FILE

To compare with diffusers' networks and the PyPI package, in every mode: python -m scripts.machine.
Only the U-Net runs, with random weights unless --checkpoint is given. All kinds of network calls take turns in one
process, so that a busy machine slows them alike. Trust the ratios, medians over the rounds, more than the seconds.
Compare them with the ratios of the MACs.
"""

import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from eval.cost.runs import call_macs, costs_of
from eval.cost.timing import Times, random_inputs, time_runs
from run import arguments, results
from run.cli import command
from run.families import build, load_unet
from run.image_model import check_compiled
from run.machine import Machine
from run.provenance import provenance
from run.results import Result
from run.spec import NetworkOptions, Run, RunSpec, parse_run
from unet_caching.errors import as_user_error
from unet_caching.options import option, required
from unet_caching.speed.accelerate import accelerated, place


@dataclass(frozen=True)
class TimingOptions:
    title: ClassVar[str] = "the timing"
    repeats: int = option(20, "timed rounds (default: %(default)s)", least=1)
    warmup: int = option(2, "untimed rounds at the start (default: %(default)s)", least=1)
    out: Path | None = option(None, "JSON file for the result, written after the timing")


def timed(runs: Sequence[tuple[Mapping[str, Any], Run]], settings: Mapping[str, Any], machine: Machine,
          timing: TimingOptions) -> None:
    """Time all kinds of calls of some runs of one model, print the result, and write it.

    runs: each with the settings that differ between them. settings: of the result, besides the timing's.
    """
    started, run = time.time(), runs[0][1]
    for _, one in runs:
        one.refuse_foreign(one.settings)
        check_compiled(one, machine)
    device, checkpoint = machine.prepare(), run.spec.network.checkpoint
    torch.manual_seed(0)
    unet = load_unet(run.config, checkpoint, **run.weights) if checkpoint else build(run.config, "cpu")
    unet = place(unet, device, run.dtype)
    network = accelerated(unet, machine.compile, machine.cuda_graphs,
                          len({kind for _, one in runs for kind in one.reused}))
    rows, where = machine.batch_size * run.rows_per_image, provenance(device)
    guided = f" ({rows} rows with guidance)" if rows != machine.batch_size else ""
    print(f"{run.config.name}: batch {machine.batch_size}{guided}, {run.spec.network.dtype}, {where['device']} "
          f"({where['device_name']}), {where['threads']} CPU threads, {timing.repeats} rounds", flush=True)
    with as_user_error():
        timings = time_runs([one for _, one in runs], network.network,
                            random_inputs(run.family.shapes(run.config), rows, device, run.dtype), timing.repeats,
                            timing.warmup)
    times = Times(timings, settings.get("cache"))
    timings["runs"] = [{**about, **of_run(one, times, machine.batch_size)} for about, one in runs]
    print(table(timings))
    if timing.out:
        settings = {**settings, "batch_size": machine.batch_size, "rows": rows, "dtype": run.spec.network.dtype,
                    "repeats": timing.repeats, "warmup": timing.warmup,
                    "weights": str(checkpoint) if checkpoint else "random", **network.in_use}
        results.write(timing.out, Result("throughput", run.config.name, settings, throughput=timings, provenance=where
                                         ).stamped(started))
        print(f"wrote {timing.out}")


def of_run(run: Run, times: Times, batch_size: int) -> dict[str, Any]:
    """The time and the speed-up of a run, by the times and by the MACs of its calls."""
    macs, full, time = call_macs(run), costs_of(run).full, times.of_run(run)
    assert time is not None         # all of its kinds were timed
    return {"calls": run.calls, "seconds": time.seconds, "images_per_second": batch_size / time.seconds,
            "speedup": run.calls / time.full_calls, "macs_speedup": run.calls * full.hook / sum(m.hook for m in macs),
            "macs_fc_speedup": run.calls * full.fc / sum(m.fc for m in macs)}


def table(timings: Mapping[str, Any]) -> str:
    """The timings as text."""
    full = timings["full"]
    lines = ["of a call, and as a fraction of a full one: time, macs, macs_fc",
             f"{'median ms':>10}{'quartiles':>18}{'time':>8}{'macs':>8}{'macs_fc':>9}  what it reuses"]
    for one in ({"reused": ["nothing"], "order": 0, "ratio": 1.0, **full}, *timings["kinds"]):
        low, high = (1e3 * value for value in one["quartiles"])
        some = ", ".join(one["reused"][:3]) + (f", ... ({len(one['reused'])})" if len(one["reused"]) > 3 else "")
        some = f"the level at branch {some}" if some.isdigit() else some or "nothing"
        lines.append(f"{1e3 * one['median']:10.2f}{f'{low:.2f}-{high:.2f}':>18}{one['ratio']:8.3f}"
                     f"{one['macs'] / full['macs']:8.3f}{one['macs_fc'] / full['macs_fc']:9.3f}  {some}"
                     + (f", forecast of order {one['order']}" if one["order"] else "")
                     + (f", peak {one['peak_bytes'] / 2**20:.0f} MiB" if one["peak_bytes"] else ""))
    lines += ["", f"{'':34}{'images/s':>10}{'speed-up':>10}{'by macs':>9}{'by macs_fc':>12}"]
    for one in timings["runs"]:
        name = f"the run: {one['calls']} calls"
        if "interval" in one:
            order = f", order {one['forecast']}" if one["forecast"] else ""
            name = f"branch {one['branch']}{order}, N = {one['interval']}"
        lines.append(f"{name:34}{one['images_per_second']:10.4g}{one['speedup']:9.2f}x{one['macs_speedup']:8.2f}x"
                     f"{one['macs_fc_speedup']:11.2f}x")
    return "\n".join(lines)


def time_a_run(words: Sequence[str]) -> None:
    """`eval.throughput run`: time all kinds of network calls of a run, with any caching."""
    spec, machine, timing = parse_run(time_a_run.__doc__, Machine, TimingOptions, words=words,
                                      defaults={"batch_size": 8}, prog="python -m eval.throughput run")
    run = spec.open()
    timed([({}, run)], run.brief, machine, timing)


@dataclass(frozen=True)
class Steps:
    """Full and cached steps, and whole runs of them."""
    config: Path = required("configs/*.yaml")
    branch: tuple[int, ...] = option((), "0-based skips (default: the paper's for this model)")
    interval: tuple[int, ...] = option((2, 3, 5, 10), "N of 1:N of the whole runs (default: 2 3 5 10)")
    forecast: tuple[int, ...] = option((0,), "orders of the cached steps' forecasts; 0 = reuse (default)",
                                       metavar="ORDER")
    steps: int | None = option(None, "network calls per image of the whole runs (default: the config's)")


def time_steps(options: Steps, network: NetworkOptions, machine: Machine, timing: TimingOptions) -> None:
    spec = RunSpec.of(options.config, steps=options.steps, **vars(network))
    runs, branches = [], dict.fromkeys(options.branch or [spec.open().config.sampler.branch])
    for branch, order, interval in itertools.product(branches, dict.fromkeys(options.forecast), options.interval):
        run = spec.having(branch=branch, interval=interval, forecast=order if interval > 1 else 0).open()
        runs.append(({"branch": branch, "forecast": order, "interval": interval, "steps": run.steps}, run))
    timed(runs, {}, machine, timing)


@command
def main() -> None:
    if sys.argv[1:2] == ["run"]:
        time_a_run(sys.argv[2:])
    else:
        arguments.call(time_steps)


if __name__ == "__main__":
    main()
