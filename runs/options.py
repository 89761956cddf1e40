"""Command-line options that all sample commands share, and their checks."""

import argparse
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from caching.block_cache import Adjustment, BlockCache, Together
from caching.deepcache import DeepCache, ZeroedCache
from caching.schedules import RULES, full_steps
from runs.block_schedule import BlockSchedule, block_cache, load_scale_shift
from runs.errors import UserError
from runs.seeds import parse_seeds
from runs.weights import sha256
from sampling.diffusion import Diffusion
from sampling.samplers import SAMPLERS, TIMESTEPS, Sampler, timesteps_for
from speed.memory import keep_freed_memory
from speed.packed import pack, packable

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_sampler_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """--sampler, --steps, --timesteps, --eta; returns their group, for more."""
    sampler = parser.add_argument_group("the sampler (defaults: the config's, which are the paper's)")
    sampler.add_argument("--sampler", choices=SAMPLERS, help="dpmpp: DPM-Solver++ (2M)")
    sampler.add_argument("--steps", type=int, help="network calls per image; plms makes one more")
    sampler.add_argument("--timesteps", choices=TIMESTEPS,
                         help="how the steps spread over the noise levels; plms takes leading (its default, where the "
                              "config's is another) and trailing, dpmpp these and linspace, ddim all but linspace")
    sampler.add_argument("--eta", type=float, help="ddim: 0 = deterministic, 1 = the variance of DDPM")
    return sampler


def add_run_options(parser: argparse.ArgumentParser, batch_size: int, seeds: str = "as many as the paper") -> None:
    """--seeds, --out, --batch-size, and those of `add_device_options`."""
    run = parser.add_argument_group("the run")
    run.add_argument("--seeds", help=f"one image per seed: 0-49999 or 0-9,20 (default: {seeds})")
    run.add_argument("--out", type=Path, required=True, help="sample folder; images that are there are kept")
    run.add_argument("--batch-size", type=int, default=batch_size,
                     help="images at a time; changes no image (default: %(default)s)")
    add_device_options(run)


def add_device_options(run: argparse._ArgumentGroup) -> None:
    """--device, --dtype, --compile, --cuda-graphs, --threads."""
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                     help="cpu, cuda, cuda:1 (default: %(default)s; under torchrun cuda is each process's own)")
    run.add_argument("--dtype", choices=DTYPES, default="fp32",
                     help="of the network; the sampler is fp32 (default: %(default)s)")
    run.add_argument("--compile", action="store_true",
                     help="torch.compile: a graph for full, one for cached steps; with --block-schedule one for each "
                          "set of blocks that some step reuses")
    run.add_argument("--cuda-graphs", action="store_true",
                     help="record each kind of step once and replay it, which saves launching its kernels; for a GPU")
    run.add_argument("--threads", type=int, help="CPU threads (default: all cores)")


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """Those of `add_deepcache_options`, --zero-cache, --block-schedule and --scale-shift."""
    cache = add_deepcache_options(parser)
    cache.add_argument("--zero-cache", action="store_true",
                       help="ablation of the paper's Table 5: reuse zeros instead of the feature")
    blocks = parser.add_argument_group("caching (Block Caching; together with --interval, of the blocks outside the "
                                       "level that DeepCache reuses)")
    blocks.add_argument("--block-schedule", type=Path, metavar="FILE",
                        help="when each block is computed: a file that scripts.block_caching made for this model, "
                             "sampler and number of steps")
    blocks.add_argument("--scale-shift", type=Path, metavar="FILE", help="how reused blocks are adjusted, likewise")


def add_deepcache_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """--interval, --branch, --schedule, --center, --power; returns their group, for more."""
    cache = parser.add_argument_group("caching (DeepCache)")
    cache.add_argument("--interval", type=int, default=1,
                       help="N of 1:N: one full step in every N; 1 = no caching (default)")
    cache.add_argument("--branch", type=int, help="0-based skip that is recomputed last; 0 = conv_in caches most "
                                                  "(default: the paper's for this model)")
    cache.add_argument("--schedule", choices=RULES, default="uniform",
                       help="which steps are full (default: %(default)s)")
    cache.add_argument("--center", type=int, help="centered: the step around which full steps gather")
    cache.add_argument("--power", type=float, help="centered and released-ldm: how quickly they thin out")
    return cache


def plan_sampler(args: argparse.Namespace, defaults: object, diffusion: Diffusion) -> Sampler:
    """The chosen sampler, with `defaults`, the config's `sampler` section, for what was not given. Raises UserError."""
    name = args.sampler or getattr(defaults, "sampler", "ddim")
    steps = defaults.steps if args.steps is None else args.steps
    eta = args.eta
    if eta is None:
        eta = getattr(defaults, "eta", 0.0) if name == "ddim" else 0.0
    try:
        return Sampler(name, steps, args.timesteps or timesteps_for(name, defaults.timesteps), eta, diffusion)
    except ValueError as error:
        raise UserError(str(error)) from None


def chosen_guidance(args: argparse.Namespace, default: float) -> float:
    """--guidance or the config's, checked. Raises UserError."""
    guidance = default if args.guidance is None else args.guidance
    if not 0 <= guidance < float("inf"):
        raise UserError(f"--guidance must be 0 or more, got {guidance}")
    return guidance


def chosen_seeds(args: argparse.Namespace, images: int) -> list[int]:
    """--seeds, or as many as the config's images. Raises UserError."""
    return parse_seeds(args.seeds) if args.seeds is not None else list(range(images))


def summary(args: argparse.Namespace, seeds: list[int], made: int, sampler: Sampler, plan: "CachePlan") -> str:
    """The last line of a sample command."""
    full = len(plan.full_steps) if plan.cached else sampler.calls
    line = f"{args.out}: {len(seeds)} images asked for, {made} made now; {full} full of {sampler.calls} network calls"
    if plan.cached:
        line += f", branch {plan.branch}"
    if plan.blocks is not None:
        computed = sum(map(len, plan.block_steps.values()))
        line += (f", blocks computed {computed} of {len(plan.block_steps) * sampler.calls} times"
                 + (", with scale-shift" if plan.table is not None else ""))
    return line if plan.cached or plan.blocks is not None else f"{line}, no caching"


class CachePlan(NamedTuple):
    """Checked caching options of one run."""
    branch: int | None              # None without DeepCache
    full_steps: list[int]
    settings: dict                  # for run.json
    blocks: BlockSchedule | None = None
    block_steps: dict[str, list[int]] | None = None     # those of its blocks that DeepCache leaves to it
    table: list[Adjustment] | None = None               # scale and shift

    @property
    def cached(self) -> bool:
        """Whether DeepCache reuses a level."""
        return self.branch is not None

    def make(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, adjusted: bool = True
             ) -> DeepCache | BlockCache | Together | None:
        """A fresh policy for one batch, or None without caching.

        device, dtype: of the network. adjusted: with the scale-shift, where there is one.
        """
        level = blocks = None
        if self.cached:
            level = (ZeroedCache if self.settings["zero_cache"] else DeepCache)(self.branch, self.full_steps)
        if self.blocks is not None:
            blocks = block_cache(self.block_steps, self.table if adjusted else None, device, dtype)
        return Together(level, blocks) if level and blocks else level or blocks

    def graphs(self, calls: int) -> int:
        """How many different sets of reused values the calls of a run have: as many graphs does compiling make."""
        return len({(step in self.full_steps or not self.cached,
                     frozenset(name for name, steps in (self.block_steps or {}).items() if step not in steps))
                    for step in range(calls)})

    def check(self, settings: dict) -> None:
        """Refuse a run that the block schedule was not made for; settings that are not known yet may be left out.

        Raises UserError that says what differs.
        """
        if self.blocks is not None:
            self.blocks.check(settings)


def plan_cache(args: argparse.Namespace, num_steps: int, num_branches: int, default_branch: int) -> CachePlan:
    """Check the caching options against a run of `num_steps` steps. Raises UserError."""
    plan = plan_deepcache(args, num_steps, num_branches, default_branch)
    if args.zero_cache:
        if not plan.cached:
            raise UserError("--zero-cache needs an --interval of 2 or more: without caching there is nothing to zero")
        if args.block_schedule is not None:
            raise UserError("--zero-cache is an ablation of DeepCache alone: leave out --block-schedule")
        plan.settings["zero_cache"] = True
    if args.block_schedule is None:
        if args.scale_shift is not None:
            raise UserError("--scale-shift adjusts the blocks of a schedule: it needs --block-schedule")
        return plan
    blocks = BlockSchedule.load(args.block_schedule)
    table = None if args.scale_shift is None else load_scale_shift(args.scale_shift, blocks)
    steps = blocks.outside(plan.branch, num_branches) if plan.cached else blocks.blocks
    settings = {"schedule_sha256": blocks.sha256, "kinds": blocks.kinds, "delta": blocks.delta, "blocks": len(steps),
                "scale_shift_sha256": None if args.scale_shift is None else sha256(args.scale_shift)}
    return plan._replace(settings=plan.settings | {"block_caching": settings}, blocks=blocks, block_steps=steps,
                         table=table)


def plan_deepcache(args: argparse.Namespace, num_steps: int, num_branches: int, default_branch: int) -> CachePlan:
    """Check the options of `add_deepcache_options` against a run of `num_steps` steps. Raises UserError."""
    branch = default_branch if args.branch is None else args.branch
    if not 0 <= branch < num_branches:
        raise UserError(f"--branch must be from 0 to {num_branches - 1} for this model, got {branch}")
    try:
        steps = full_steps(args.schedule, num_steps, args.interval, args.center, args.power)
    except ValueError as error:
        raise UserError(str(error)) from None
    if args.interval == 1:
        return CachePlan(None, steps, {"interval": 1})
    settings = {"interval": args.interval, "branch": branch, "schedule": args.schedule, "center": args.center,
                "power": args.power, "zero_cache": False, "full_steps": steps}
    return CachePlan(branch, steps, settings)


def place(network: nn.Module, device: torch.device | str, dtype: torch.dtype | None = None) -> nn.Module:
    """A network ready for inference: on its device, in its dtype (None: as it is), and in the layout that is fastest.

    Channels are last, as the weights have them: the input may come in either layout. On a CPU the weights are packed
    too, and can no longer be saved (speed/packed.py), and the process keeps the memory that it frees from now on
    (speed/memory.py).
    """
    network = network.eval().requires_grad_(False).to(device, dtype, memory_format=torch.channels_last)
    if packable(network):
        network = pack(network)
    if torch.device(device).type == "cpu":
        keep_freed_memory()     # not earlier: what is freed while weights are loaded is better returned
    return network


def prepare_device(args: argparse.Namespace) -> torch.device:
    """Check --device, --threads and, where there is one, --batch-size. Raises UserError.

    Under torchrun cuda is the process's own GPU.
    """
    if getattr(args, "batch_size", 1) < 1:
        raise UserError(f"--batch-size must be 1 or more, got {args.batch_size}")
    if args.threads is not None:
        if args.threads < 1:
            raise UserError(f"--threads must be 1 or more, got {args.threads}")
        torch.set_num_threads(args.threads)
    if args.device == "cuda" and "LOCAL_RANK" in os.environ:
        args.device = f"cuda:{int(os.environ['LOCAL_RANK']) % max(1, torch.cuda.device_count())}"
    try:
        device = torch.device(args.device)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {args.device} is not there: "
                        f"{torch.cuda.device_count()} CUDA devices are visible; cpu always works") from None
    return device
