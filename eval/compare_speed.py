"""Our steps against those of diffusers' U-Nets and the PyPI package DeepCache: time, side by side in one process.

    python -m eval.throughput compare --threads 1                                       all settings, one after another
    python -m eval.throughput compare --model sd_v15 --batch-size 1 --dtype fp32 --threads 1 --repeats 3
    python -m eval.throughput compare --mode compiled --model ddpm_cifar10 --threads 1
    python -m eval.throughput compare --model sdxl --dtype bf16 --resolution 512 --threads 1 --repeats 3    12 GB

The models have their real sizes and random weights, the same on all sides, and take turns. `ours` is our U-Net as the
sample commands run it (`speed.accelerate.place`), `diffusers` theirs as it comes, `helper` the PyPI package on it; the
package cannot be compiled. In mode `graphs` our steps are CUDA graphs (--cuda-graphs), the others eager. Each setting
is a JSON file in --out, written as soon as it is measured: settings that are there are not measured again. The table is
of all that are there. What to expect of a cached step is the ratio of the MACs.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from DeepCache import DeepCacheSDHelper
from diffusers.utils import logging
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from eval.cost.macs import branch_macs
from eval.cost.timing import interleave
from eval.tables.text import markdown
from run import results
from run.families import Config, at_resolution, build, example_inputs, family, load_config, rows_per_image
from run.files import ROOT, write_atomically
from run.machine import Device
from run.provenance import provenance
from run.results import Result
from run.spec import DTYPES
from unet_caching.errors import UserError
from unet_caching.methods.deepcache import DeepCache
from unet_caching.nest import Network
from unet_caching.options import option
from unet_caching.schedules import uniform
from unet_caching.speed.accelerate import place
from unet_caching.speed.compiled import compiled
from unet_caching.speed.graphs import recorded

BATCH_SIZES = {"ddpm_cifar10": (1, 8, 64), "ldm_cin256": (1, 8), "sd_v15": (1, 4)}
STEPS, INTERVAL = 50, 5         # of the whole run in the table
MODES = ("eager", "compiled", "graphs")
TIMES = (500, 499)      # the package finds out from the timestep whether a step is a full or a cached one


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference as a fraction of their largest magnitude."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that PyTorch's tensors take at most during a run, beside those that were there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    allocations, events = [], list(profiled.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.tag == _EventType.Allocation:
            allocations.append((event.start_time_ns, event.extra_fields))
    first = min(allocations, key=lambda pair: pair[0])[1]        # the totals begin with what earlier recordings left
    return max(fields.total_allocated for _, fields in allocations) - (first.total_allocated - first.alloc_size)


@torch.inference_mode()
def compare(config: Config, batch_size: int, branch: int, dtype: torch.dtype, mode: str, device: torch.device,
            repeats: int, warmup: int) -> dict:
    """Time all sides: JSON-compatible {sides: {ours, diffusers, helper: {full, cached}}, expected, memory}.

    difference: of a side's results from ours, as a fraction of their largest magnitude. Ratios are medians over rounds.
    memory (eager): peak bytes beside the weights, of a step without cache (dense) and of a full and a cached step
    (run), and of the feature that is kept between them.
    """
    torch.manual_seed(0)
    plain = build(config, "cpu").to(device, dtype)
    theirs: Network = family(config).theirs(config, plain)
    cache = DeepCache(branch, [0])
    pipe = SimpleNamespace(unet=family(config).theirs(config, plain), scheduler=SimpleNamespace(timesteps=list(TIMES)))
    placed = place(plain, device, dtype)
    ours: Network = placed
    if mode == "compiled":
        ours, theirs = compiled(placed, 2), torch.compile(theirs, fullgraph=True)
    if mode == "graphs":
        ours = recorded(placed, device)
    rows = batch_size * rows_per_image(config)
    x, *context = (torch.randn(value.shape).to(device, dtype) for value in example_inputs(config, rows)
                   if value.is_floating_point())
    added = dict(zip(("text_embeds", "time_ids"), context[1:], strict=True)) if context[1:] else None
    of_sdxl = {} if added is None else {"added_cond_kwargs": added}

    def times(step: int) -> Tensor:
        return torch.full((rows,), TIMES[step], device=device)

    def our_step(step: int) -> Tensor:
        return ours(x, times(step), *context, cache=cache.at(step))

    def their_step(unet: Network, step: int) -> Tensor:
        return unet(x, torch.tensor(TIMES[step], device=device), *context[:1], **of_sdxl, return_dict=False)[0]

    variants: dict[tuple[str, str], Callable[[], Tensor]] = {
        ("ours", "full"): lambda: our_step(0), ("ours", "cached"): lambda: our_step(1),
        ("diffusers", "full"): lambda: their_step(theirs, 0)}
    if mode != "compiled":
        helper = DeepCacheSDHelper(pipe)
        helper.set_params(cache_interval=len(TIMES), cache_branch_id=branch)
        helper.enable()
        variants |= {("helper", "full"): lambda: their_step(pipe.unet, 0),
                     ("helper", "cached"): lambda: their_step(pipe.unet, 1)}
    results = {name: run() for name, run in variants.items()}
    memory: dict[str, Any] = {}
    if mode == "eager":
        memory["feature"] = sum(value.nbytes for value in cache.kept.values())
        cache.reset()
        helper.cached_output.clear()
        runs = {("ours", "run"): lambda: (our_step(0), our_step(1)),
                ("helper", "run"): lambda: (their_step(pipe.unet, 0), their_step(pipe.unet, 1)),
                ("ours", "dense"): lambda: ours(x, times(0), *context),
                ("diffusers", "dense"): variants["diffusers", "full"]}
        for (side, what), run in runs.items():
            memory.setdefault(side, {})[what] = peak_memory(run, device)
    timings = interleave(variants, device, repeats, warmup)
    macs, cached_macs = branch_macs(build(config), example_inputs(config), [branch])
    expected = {"macs": cached_macs[branch].hook / macs.hook, "macs_fc": cached_macs[branch].fc / macs.fc}
    sides: dict[str, dict] = {}
    for (side, step), timing in timings.items():
        steps = sides.setdefault(side, {})
        steps[step] = timing.to_json() | {"over_ours": timing.ratio(timings["ours", step]),
                                          "difference": difference(results["ours", step], results[side, step])}
        if step == "cached":
            steps["cached_over_full"] = timing.ratio(timings[side, "full"])
    return {"sides": sides, "expected": expected, "memory": memory}


def full_calls(ratio: float) -> float:
    """What a run of STEPS and INTERVAL takes, in full steps. ratio: of a cached to a full one."""
    full = len(uniform(STEPS, INTERVAL))
    return full + (STEPS - full) * ratio


def _named(result: Result) -> str:
    pixels = result.settings.get("resolution")
    return str(result.model) if pixels is None else f"{result.model}, {pixels} px"


def table(measured: Sequence[Result]) -> list[list[str]]:
    """The time of all settings, head first."""
    rows = [["model", "batch", "dtype", "mode", "full step, s", "cached / full", "by macs", "by macs_fc",
             "N = 5 speed-up", "by macs_fc", "diffusers / ours, full", "helper / ours, cached", "helper / ours, N = 5"]]
    for result in measured:
        settings, sides, expected = result.settings, result.times["sides"], result.times["expected"]
        ours, helper = sides["ours"], sides.get("helper")
        ratios = ours["cached_over_full"], expected["macs_fc"]
        rows.append([
            *map(str, (_named(result), settings["batch_size"], settings["dtype"], settings["mode"])),
            f"{ours['full']['median']:.3g}", f"{ours['cached_over_full']:.3f}", f"{expected['macs']:.3f}",
            f"{expected['macs_fc']:.3f}", *(f"{STEPS / full_calls(ratio):.2f}" for ratio in ratios),
            f"{sides['diffusers']['full']['over_ours']:.2f}", *(["-", "-"] if helper is None else [
                f"{helper['cached']['over_ours']:.2f}", f"{seconds(helper) / seconds(ours):.2f}"])])
    return rows


def seconds(side: dict) -> float:
    """Of the run, from the times of its steps."""
    return side["full"]["median"] * full_calls(side["cached_over_full"])


def memory_table(measured: Sequence[Result]) -> list[list[str]]:
    """The peak memory of all settings where it was measured, head first."""
    rows = [["model", "batch", "dtype", "ours, without cache", "ours, cached", "the feature", "diffusers", "helper"]]
    for result in measured:
        if of := result.times["memory"]:
            megabytes = (of["ours"]["dense"], of["ours"]["run"], of["feature"], of["diffusers"]["dense"],
                         of["helper"]["run"])
            rows.append([_named(result), str(result.settings["batch_size"]), result.settings["dtype"],
                         *(f"{value / 1e6:.1f}" for value in megabytes)])
    return rows


def report(folder: Path) -> str:
    """Write table.md of all settings in a folder; returns the table."""
    order = {name: i for i, name in enumerate(BATCH_SIZES)}
    measured = sorted((result for _, result in results.read_all(folder)),
                   key=lambda result: (order.get(str(result.model), len(order)), MODES.index(result.settings["mode"]),
                                       result.settings["dtype"], result.settings["batch_size"]))
    text = "\n".join([*markdown(table(measured)), "", "Peak memory beside the weights, MB of PyTorch's tensors:", "",
                      *markdown(memory_table(measured))])
    write_atomically(folder / "table.md", lambda path: path.write_text(text + "\n"))
    return text


@dataclass(frozen=True)
class Options:
    model: tuple[str, ...] = option(tuple(BATCH_SIZES), f"configs/NAME.yaml (default: {' '.join(BATCH_SIZES)})",
                                    metavar="NAME")
    batch_size: tuple[int, ...] = option((), "images at a time; with guidance each takes two rows (default: those of "
                                             "the model)", least=1)
    resolution: int | None = option(None, "of the images (default: the models' own)", metavar="PIXELS")
    dtype: tuple[str, ...] = option(("fp32", "bf16"), "(default: fp32 bf16)", choices=tuple(DTYPES))
    mode: tuple[str, ...] = option(("eager",), "(default: eager)", choices=MODES)
    repeats: int = option(10, "timed rounds (default: %(default)s)", least=1)
    warmup: int = option(1, "untimed rounds before them (default: %(default)s)", least=1)
    out: Path = option(ROOT / "results" / "throughput" / "compare", "folder (default: results/throughput/compare)")


def run(args: Options, where: Device) -> None:
    configs = [load_config(ROOT / "configs" / f"{name}.yaml") for name in args.model]
    if args.resolution is not None:
        configs = [at_resolution(config, args.resolution) for config in configs]
    device = where.prepare()
    if "graphs" in args.mode and device.type != "cuda":
        raise UserError(f"--mode graphs needs a GPU, --device is {device}: use eager or compiled")
    args.out.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity_error()
    measured_by = provenance(device)
    measured_by["versions"]["DeepCache"] = version("DeepCache")
    for config in configs:
        for mode, dtype, size in itertools.product(args.mode, args.dtype,
                                                   args.batch_size or BATCH_SIZES.get(config.name, (1,))):
            pixels = "" if args.resolution is None else f"_{args.resolution}px"
            path = args.out / f"{config.name}{pixels}_b{size}_{dtype}_{mode}_{device.type}.json"
            if path.exists():
                print(f"{path.name}: there already", flush=True)
                continue
            print(f"{path.name}: measuring", flush=True)
            started = time.time()
            times = compare(config, size, config.sampler.branch, DTYPES[dtype], mode, device, args.repeats, args.warmup)
            settings = {"batch_size": size, "rows": size * rows_per_image(config), "dtype": dtype, "mode": mode,
                        "branch": config.sampler.branch, "repeats": args.repeats, "warmup": args.warmup,
                        "weights": "random", **({} if args.resolution is None else {"resolution": args.resolution})}
            results.write(path, Result("compare_speed", config.name, settings, throughput=times, provenance=measured_by
                                       ).stamped(started))
    print(report(args.out))
