"""Wall-clock time of full and cached steps: the only place of the project where anything is timed.

    python -m eval.throughput --config configs/ddpm_cifar10.yaml --branch 1 2 3 --batch-size 8 --threads 1
    python -m eval.throughput --config configs/ddpm_emoji.yaml --interval 2 3 5 10 --out results/throughput/emoji.json
    python -m eval.throughput --config configs/ldm_cin256.yaml --branch 0 --batch-size 1 --threads 1
    python -m eval.throughput compare --threads 1       beside diffusers and the PyPI package (eval/compare_speed.py)
    python -m eval.throughput --config configs/sd_v15.yaml --block-schedule configs/block_schedules/*.json

Only the U-Net runs, on random weights unless --checkpoint is given, and nothing is written meanwhile. All variants
take turns in one process, so that a busy machine slows them alike: trust the ratios, which are medians over the rounds,
before the seconds. What to expect is the ratio of the MACs.
"""

import argparse
import gc
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from caching.block_cache import BlockCache
from caching.deepcache import DeepCache
from caching.nested import no_cache
from caching.schedules import uniform
from eval.macs import Policy, average, branch_macs, residual_macs, schedule_macs
from eval.models import build, example_inputs, load_config, load_unet, rows_per_image
from sampling.block_schedule import BlockSchedule
from sampling.cli import command
from sampling.options import DTYPES, place, prepare_device
from sampling.provenance import provenance
from sampling.runs import write_json
from sampling.settings import UserError


class Timing(NamedTuple):
    """Seconds of one step: one value per round, in the order of the rounds, which all variants share."""
    seconds: list[float]
    peak_bytes: int | None = None       # of accelerator memory while it ran; None on a CPU

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    def ratio(self, other: "Timing") -> float:
        """The median over the rounds of this step's time as a fraction of the other's."""
        return float(np.median(np.divide(self.seconds, other.seconds)))

    def to_json(self) -> dict:
        low, median, high = np.percentile(self.seconds, [25, 50, 75]).tolist()
        return {"median": median, "quartiles": [low, high], "min": min(self.seconds), "rounds": self.seconds,
                "peak_bytes": self.peak_bytes}


@torch.inference_mode()
def interleave(variants: Mapping[str, Callable[[], object]], device: torch.device | str, repeats: int = 20,
               warmup: int = 2) -> dict[str, Timing]:
    """Time functions that take turns: each runs once per round, for `warmup` untimed and `repeats` timed rounds.

    device: what to wait for before the clock is read. Raises ValueError for fewer than one repeat or warm-up round.
    """
    if repeats < 1 or warmup < 1:
        raise ValueError(f"at least one timed and one warm-up round are needed, got {repeats} and {warmup}")
    device = torch.device(device)
    synchronize = torch.get_device_module(device).synchronize
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    peaks: dict[str, int | None] = dict.fromkeys(variants)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(-warmup, repeats):
            for name, run in variants.items():
                if device.type == "cuda" and turn < 0:
                    torch.cuda.reset_peak_memory_stats(device)
                synchronize()
                start = time.perf_counter()
                run()
                synchronize()
                elapsed = time.perf_counter() - start
                if turn >= 0:
                    seconds[name].append(elapsed)
                elif device.type == "cuda":
                    peaks[name] = torch.cuda.max_memory_allocated(device)
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(seconds[name], peaks[name]) for name in variants}


def time_steps(unet: nn.Module, inputs: Sequence[Tensor], policies: Mapping[str, Policy], repeats: int = 20,
               warmup: int = 2) -> dict[str, Timing]:
    """Time a full step of a U-Net ("full") and the cached step of each policy (under its own name).

    inputs: what the U-Net takes before `cache`: (x, t) or (x, t, context), on its device.
    policies: step 0 must be a full and step 1 a cached step of each, as in DeepCache(branch, [0]).
    """
    def cached(policy: Policy) -> Callable[[], Tensor]:
        unet(*inputs, cache=policy.at(0))
        return lambda: unet(*inputs, cache=policy.at(1))

    with torch.inference_mode():
        variants = {name: cached(policy) for name, policy in policies.items()}
    return interleave({"full": lambda: unet(*inputs, cache=no_cache), **variants}, inputs[0].device, repeats, warmup)


def measure(unet: nn.Module, inputs: Sequence[Tensor], branches: Sequence[int], intervals: Sequence[int],
            num_steps: int, repeats: int = 20, warmup: int = 2, rows_per_image: int = 1,
            plain: nn.Module | None = None) -> dict:
    """Time DeepCache at `branches`, with the MACs (batch 1) beside, and derive whole runs with uniform schedules.

    plain: the U-Net to count the MACs of, where the weights of the other are packed.
    rows_per_image: rows of the inputs that make one image; 2 with guidance, whose two halves share a batch.
    Returns JSON-compatible {full, branches: [per branch], runs: [per branch and interval]}; images/s are of the network
    alone. Raises UserError for a branch or an interval that does not exist, or no repeats.
    """
    images = len(inputs[0]) / rows_per_image
    for branch in branches:
        if not 0 <= branch < unet.num_branches:
            raise UserError(f"--branch must be from 0 to {unet.num_branches - 1} for this model, got {branch}")
    try:
        schedules = {interval: uniform(num_steps, interval) for interval in intervals}
        caches = {branch: DeepCache(branch, [0]) for branch in branches}
        timings = time_steps(unet, inputs, {str(branch): cache for branch, cache in caches.items()}, repeats, warmup)
    except ValueError as error:
        raise UserError(str(error)) from None
    full_macs, cached_macs = branch_macs(unet if plain is None else plain, [value[:1] for value in inputs], branches)
    full = timings["full"]
    result = {"full": {**full.to_json(), "macs": full_macs.hook, "macs_fc": full_macs.fc}, "branches": [], "runs": []}
    for branch, cache in caches.items():
        cached, macs = timings[str(branch)], cached_macs[branch]
        result["branches"].append({
            "branch": branch, **cached.to_json(), "ratio": cached.ratio(full),
            "macs": macs.hook, "macs_fc": macs.fc,
            "macs_ratio": macs.hook / full_macs.hook, "macs_fc_ratio": macs.fc / full_macs.fc,
            "feature_bytes": cache.feature.numel() * cache.feature.element_size()})
    result["full"]["images_per_second"] = images / (num_steps * full.median)
    for branch in branches:
        for interval, full_steps in schedules.items():
            k, cached = len(full_steps), timings[str(branch)]
            macs = average(full_macs, cached_macs[branch], full_steps, num_steps)
            result["runs"].append({
                "branch": branch, "interval": interval, "steps": num_steps, "full_steps": k,
                "images_per_second": images / (k * full.median + (num_steps - k) * cached.median),
                "speedup": num_steps / (k + (num_steps - k) * cached.ratio(full)),
                "macs": macs.hook, "macs_fc": macs.fc, "macs_speedup": full_macs.hook / macs.hook})
    return result


class ReusedSet(NamedTuple):
    """Residuals that some steps of a schedule reuse, and how many steps those are."""
    names: frozenset[str]
    steps: int

    def policy(self, adjusted: bool, unet: nn.Module, inputs: Sequence[Tensor]) -> BlockCache:
        """Computes them on step 0 and reuses them on step 1, multiplied and shifted (by nothing) where `adjusted`."""
        policy = BlockCache({name: [0] for name in self.names})
        if adjusted:
            unet(*inputs, cache=policy.at(0))
            channels = {name: value.shape[1 if value.ndim == 4 else -1] for name, value in policy.values.items()}
            dtype, device = inputs[0].dtype, inputs[0].device
            policy.adjust = [{}, {name: (torch.ones(width, dtype=dtype, device=device),
                                         torch.zeros(width, dtype=dtype, device=device))
                                  for name, width in channels.items()}]
        return policy


def reused_sets(schedule: BlockSchedule) -> list[ReusedSet]:
    """The different sets of residuals that the steps of a schedule reuse, the commonest first."""
    found = Counter(frozenset(name for name, steps in schedule.blocks.items() if step not in steps)
                    for step in range(schedule.calls))
    return [ReusedSet(*pair) for pair in found.most_common()]


def measure_schedules(unet: nn.Module, inputs: Sequence[Tensor], schedules: Mapping[str, BlockSchedule],
                      repeats: int = 20, warmup: int = 2, rows_per_image: int = 1, plain: nn.Module | None = None
                      ) -> dict:
    """Time Block Caching: a step of each set of residuals that `schedules` reuse, without and with scale-shift.

    schedules: by name. plain: as `measure` takes it. Returns JSON-compatible {full, schedules: [per schedule and
    with_scale_shift]}, with the MACs (batch 1) of the whole runs beside their times; images/s are of the network
    alone. Raises UserError for no repeats.
    """
    sets = {name: reused_sets(schedule) for name, schedule in schedules.items()}
    distinct = list(dict.fromkeys(one.names for found in sets.values() for one in found if one.names))
    with torch.inference_mode():
        policies = {f"{i}{'+' * adjusted}": ReusedSet(names, 0).policy(adjusted, unet, inputs)
                    for i, names in enumerate(distinct) for adjusted in (False, True)}
    try:
        timings = time_steps(unet, inputs, policies, repeats, warmup)
    except ValueError as error:
        raise UserError(str(error)) from None
    full = timings["full"]
    macs_full, residuals = residual_macs(unet if plain is None else plain, [value[:1] for value in inputs])
    images = len(inputs[0]) / rows_per_image
    result = {"full": {**full.to_json(), "macs": macs_full.hook, "macs_fc": macs_full.fc}, "schedules": []}
    for name, schedule in schedules.items():
        macs = schedule_macs(macs_full, residuals, schedule.blocks, schedule.calls)
        for adjusted in (False, True):
            ratios, seconds = [], 0.0
            for one in sets[name]:
                timing = timings[f"{distinct.index(one.names)}{'+' * adjusted}"] if one.names else full
                ratios.append({"reused": len(one.names), "steps": one.steps, "ratio": timing.ratio(full)})
                seconds += one.steps * timing.median
            result["schedules"].append({
                "name": name, "sha256": schedule.sha256, "sampler": schedule.run["sampler"],
                "steps": schedule.run["steps"], "calls": schedule.calls, "scale_shift": adjusted, "sets": ratios,
                "seconds": seconds, "images_per_second": images / seconds,
                "speedup": schedule.calls / sum(one["steps"] * one["ratio"] for one in ratios),
                "macs": macs.hook, "macs_fc": macs.fc, "macs_speedup": macs_full.hook / macs.hook,
                "macs_fc_speedup": macs_full.fc / macs.fc})
    return result


def schedules_table(result: dict) -> str:
    """What `measure_schedules` found, for people."""
    lines = [f"a full step: {1e3 * result['full']['median']:.2f} ms", "",
             f"{'schedule':44}{'kinds of steps':>15}{'images/s':>10}{'speed-up':>10}{'by macs':>9}{'macs_fc':>9}"]
    for row in result["schedules"]:
        name = row["name"] + (", scale-shift" if row["scale_shift"] else "")
        lines.append(f"{name:44}{len(row['sets']):15}{row['images_per_second']:10.4g}{row['speedup']:10.2f}"
                     f"{row['macs_speedup']:9.2f}{row['macs_fc_speedup']:9.2f}")
    return "\n".join(lines)


def table(result: dict) -> str:
    """What `measure` found, for people."""
    full = result["full"]
    lines = ["cached / full: time, macs, macs_fc",
             f"{'step':12}{'median ms':>10}{'quartiles':>18}{'time':>8}{'macs':>8}{'macs_fc':>9}"]
    for name, row in (("full", full), *((f"branch {row['branch']}", row) for row in result["branches"])):
        low, high = (1e3 * value for value in row["quartiles"])
        lines.append(f"{name:12}{1e3 * row['median']:10.2f}{f'{low:.2f}-{high:.2f}':>18}{row.get('ratio', 1):8.3f}"
                     f"{row.get('macs_ratio', 1):8.3f}{row.get('macs_fc_ratio', 1):9.3f}"
                     + (f"    peak {row['peak_bytes'] / 2**20:.0f} MiB" if row["peak_bytes"] else ""))
    lines += ["", f"{'run':24}{'images/s':>10}{'speed-up':>10}{'by macs':>9}",
              f"{'no caching':24}{full['images_per_second']:10.4g}{1:10.2f}{1:9.2f}"]
    for row in result["runs"]:
        name = f"branch {row['branch']}, N = {row['interval']}"
        lines.append(f"{name:24}{row['images_per_second']:10.4g}{row['speedup']:10.2f}{row['macs_speedup']:9.2f}")
    return "\n".join(lines)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="configs/*.yaml")
    parser.add_argument("--checkpoint", type=Path, help="weights (default: random; they do not change the time)")
    parser.add_argument("--branch", type=int, nargs="+", help="0-based skips (default: the paper's for this model)")
    parser.add_argument("--interval", type=int, nargs="+", default=[2, 3, 5, 10],
                        help="N of 1:N of the whole runs (default: 2 3 5 10)")
    parser.add_argument("--steps", type=int, help="network calls per image of the whole runs (default: the config's)")
    parser.add_argument("--block-schedule", type=Path, nargs="+", metavar="FILE",
                        help="time Block Caching by these schedules instead, each without and with scale-shift")
    parser.add_argument("--batch-size", type=int, default=8,
                        help="images at a time; with guidance each takes two rows of the batch (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=20, help="timed rounds (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="untimed rounds before them (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu, cuda, cuda:1 (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the network (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--out", type=Path, help="JSON file for the result, written after the timing")
    args = parser.parse_args()

    config, device, dtype = load_config(args.config), prepare_device(args), DTYPES[args.dtype]
    if device.type == "meta":
        raise UserError("--device meta computes nothing that could be timed: use cpu or cuda")
    schedules = {}
    for path in args.block_schedule or ():
        schedules[path.stem] = BlockSchedule.load(path)
        schedules[path.stem].check({"model": config.name, "unet": asdict(config.unet)})
    branches = list(dict.fromkeys(args.branch or [config.sampler.branch]))
    steps = config.sampler.steps if args.steps is None else args.steps
    torch.manual_seed(0)
    unet = place(load_unet(config, args.checkpoint) if args.checkpoint else build(config, "cpu"), device, dtype)
    rows = args.batch_size * rows_per_image(config)
    noise = torch.Generator().manual_seed(0)
    inputs = [torch.randn(value.shape, generator=noise).to(device, dtype) if value.is_floating_point() else value + 500
              for value in example_inputs(config, rows, device, dtype)]

    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)      # fails before the work, where it fails
    where = provenance(device)
    settings = {"batch_size": args.batch_size, "rows": rows, "dtype": args.dtype, "repeats": args.repeats,
                "warmup": args.warmup, "weights": str(args.checkpoint) if args.checkpoint else "random"}
    guided = f" ({rows} rows with guidance)" if rows != args.batch_size else ""
    print(f"{config.name}: batch {args.batch_size}{guided}, {args.dtype}, {where['device']} ({where['device_name']}), "
          f"{where['threads']} CPU threads, {args.repeats} rounds", flush=True)
    rounds = args.repeats, args.warmup, rows_per_image(config), build(config).to(dtype)
    if schedules:
        result = measure_schedules(unet, inputs, schedules, *rounds)
        print(schedules_table(result))
    else:
        result = measure(unet, inputs, branches, args.interval, steps, *rounds)
        print(table(result))
    if args.out:
        write_json(args.out, {"kind": "throughput", "model": config.name, "settings": settings, "provenance": where,
                              **result})
        print(f"wrote {args.out}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["compare"]:
        from eval import compare_speed  # here: it imports this module, and diffusers
        del sys.argv[1]
        compare_speed.main()
    else:
        main()
