"""One network in all its forms, with the same random weights, compared by results and by time.

`ours` is our U-Net as the sample commands run it (`speed.accelerate.place`). `pipeline` is the nest over diffusers'
U-Net, which a pipeline with caching runs. `diffusers` is their U-Net, unchanged. `helper` is the PyPI package DeepCache
on their U-Net, if it is installed; it cannot be compiled or recorded. We have no U-Net of our own for video.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from eval.cost.macs import branch_macs
from eval.cost.timing import Timing, interleave, random_inputs
from run.families import Config, at_resolution, build, example_inputs, family, load_config, rows_per_image
from unet_caching.methods.deepcache import DeepCache
from unet_caching.methods.plan import Call, PlanCache
from unet_caching.nest import Cache, Network, no_cache
from unet_caching.pipelines.forward import argument_names, cached_forward
from unet_caching.pipelines.parts import Caching
from unet_caching.policy import Policy
from unet_caching.samplers.diffusion import Diffusion
from unet_caching.samplers.samplers import Sampler, noise_predictor
from unet_caching.schedules import uniform
from unet_caching.speed.accelerate import place
from unet_caching.speed.compiled import compile_seconds, compiled
from unet_caching.speed.graphs import recorded

try:
    from DeepCache import DeepCacheSDHelper
except ImportError:
    DeepCacheSDHelper = None

VIDEO = {"svd": 14}             # networks of diffusers without one of ours, and their number of frames
STEPS, INTERVALS = 50, (2, 3, 5)                # of whole runs
PLAN = tuple(Call() if branch is None else Call(branch, (1.0,))
             for branch in (None, None, 1, None, 0, None, 1, None, 0, None, 1, None))
TIMES = (500, 499)              # by the timestep the package tells full steps from cached ones


@dataclass(frozen=True)
class Subject:
    """A network at a size. name: a config, its file, or one of VIDEO. pixels: of a side (default: the model's)."""
    name: str
    pixels: int | None = None
    frames: int | None = None

    @property
    def config(self) -> Config | None:
        if self.name in VIDEO:
            return None
        config = load_config(self.name)
        return config if self.pixels is None else at_resolution(config, self.pixels)

    @property
    def branch(self) -> int:
        """The papers' branch, or the default of pipelines."""
        return 1 if self.config is None else self.config.sampler.branch

    @property
    def rows(self) -> int:
        """Rows of the batch for each image: 2 with guidance."""
        return 2 if self.config is None else rows_per_image(self.config)

    @property
    def video_frames(self) -> int:
        return self.frames or VIDEO[self.name]

    @property
    def model(self) -> str:
        return Path(self.name).stem

    def __str__(self) -> str:
        frames = [f"{self.frames} frames"] if self.frames else []
        return ", ".join([self.model, *frames, *([f"{self.pixels} px"] if self.pixels else [])])

    def make(self, device: torch.device | str, dtype: torch.dtype) -> tuple[nn.Module | None, list[nn.Module]]:
        """Our network and two copies of diffusers', with the same random weights."""
        torch.manual_seed(0)
        config = self.config
        if config is None:
            import diffusers  # here: it takes seconds
            with torch.device(device):
                first = diffusers.UNetSpatioTemporalConditionModel(num_frames=self.video_frames)
            first.to(device, dtype).eval().requires_grad_(False)
            with torch.device("meta"):
                second = type(first).from_config(first.config).eval().requires_grad_(False)
            second.load_state_dict(first.state_dict(), assign=True)
            return None, [first, second]
        plain = build(config, device).to(dtype=dtype)
        return plain, [family(config).theirs(config, plain) for _ in range(2)]

    def inputs(self, rows: int, device: torch.device | str, dtype: torch.dtype) -> list[Tensor]:
        """Random x, a timestep, and random further arguments of the network."""
        if self.config is not None:
            return random_inputs(family(self.config).shapes(self.config), rows, device, dtype)
        height, width = ((pixels or usual) // 8 for pixels, usual in ((self.pixels, 576), (self.pixels, 1024)))
        return random_inputs([(self.video_frames, 8, height, width), (1, 1024), (3,)], rows, device, dtype)


def their_words(beside: Sequence[Tensor]) -> dict[str, Any]:
    """The arguments of diffusers' U-Nets after x and t, by name."""
    if len(beside) == 2:
        return {"encoder_hidden_states": beside[0], "added_time_ids": beside[1]}
    added = {"added_cond_kwargs": dict(zip(("text_embeds", "time_ids"), beside[1:], strict=True))} if beside[1:] else {}
    return ({"encoder_hidden_states": beside[0]} | added) if beside else {}


class Nested(nn.Module):
    """Our nest over a U-Net of diffusers', called like one of ours."""

    def __init__(self, theirs: nn.Module):
        super().__init__()
        self.theirs, self.names = theirs, argument_names(theirs)

    def forward(self, x: Tensor, t: Tensor, *beside: Tensor, cache: Cache = no_cache) -> Tensor:
        words = their_words(beside)
        return cached_forward(self.theirs, self.names, Caching(cache), x, t, **words, return_dict=False)[0]


def cached_steps(network: Network, inputs: Sequence[Tensor], branches: Sequence[int], orders: Sequence[int],
                 source: Network) -> dict[str, Callable[[], Tensor]]:
    """A full step and cached ones, by name: "full", "branch 0", "branch 0, order 1".

    source: the network whose one call computes the values that the cached steps reuse.
    """
    values: dict[Hashable, Tensor] = {}

    def kept(key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        values[key] = compute()
        return values[key]

    def cached(branch: int, order: int) -> Callable[[], Tensor]:
        policy = DeepCache(branch, range(order + 1), order)
        for step in range(order + 1):
            policy.at(step)(branch, lambda: values[branch])
        return lambda: network(*inputs, cache=policy.at(order + 1))

    source(*inputs, cache=kept)
    full: dict[str, Callable[[], Tensor]] = {"full": lambda: network(*inputs, cache=no_cache)}
    return full | {name_of(branch, order): cached(branch, order) for branch in branches for order in orders}


def name_of(branch: int, order: int = 0) -> str:
    """The name of a cached step."""
    return f"branch {branch}" + (f", order {order}" if order else "")


class Helper:
    """The PyPI package on a U-Net, and its steps by name."""

    def __init__(self, theirs: Any, inputs: Sequence[Tensor], branches: Sequence[int]):
        self.theirs, (self.x, _, *beside) = theirs, inputs
        clock = "cpu" if self.x.is_meta else self.x.device      # the package reads the timesteps' values
        self.words, self.times = their_words(beside), [torch.tensor(time, device=clock) for time in TIMES]
        self.package = DeepCacheSDHelper(SimpleNamespace(unet=theirs, scheduler=SimpleNamespace(timesteps=list(TIMES))))
        self.package.set_params(cache_interval=len(TIMES))
        self.package.enable()
        self.steps: dict[str, Callable[[], Tensor]] = {"full": partial(self.step, 0, 0)}
        self.steps |= {name_of(branch): partial(self.step, 1, branch) for branch in branches}

    def step(self, number: int, branch: int) -> Tensor:
        self.package.set_params(len(TIMES), branch)
        return self.theirs(self.x, self.times[number], **self.words, return_dict=False)[0]

    def first(self) -> Tensor:
        """A full step with an empty cache."""
        self.package.cached_output.clear()
        return self.step(0, 0)


class Sides:
    """The forms of a network in a mode, and the steps of each by name. eager: the steps of our eager network."""

    def __init__(self, subject: Subject, batch_size: int, dtype: torch.dtype, mode: str, device: torch.device):
        plain, (theirs, helped) = subject.make(device, dtype)
        nested, self.inputs = Nested(theirs), subject.inputs(batch_size * subject.rows, device, dtype)
        self.name = "pipeline" if plain is None else "ours"
        network = nested if plain is None else place(plain, device, dtype)
        branches, orders = ((0, 1, 2), (0, 1)) if mode != "compiled" else ((subject.branch,), (0,))
        self.network: Network = network
        if mode == "graphs":
            self.network = recorded(network, device)
        if mode == "compiled":
            self.network = compiled(network, 2)
        x, t, *beside = self.inputs
        their: Any = torch.compile(theirs, fullgraph=True) if mode == "compiled" else theirs
        self.eager = cached_steps(network, self.inputs, branches, orders, network)
        self.steps = {self.name: self.eager if self.network is network else cached_steps(
            self.network, self.inputs, branches, orders, network), "diffusers": {
            "full": lambda: their(x, t, **their_words(beside), return_dict=False)[0]}}
        if mode == "eager" and network is not nested:
            self.steps["pipeline"] = cached_steps(nested, self.inputs, (0, 1, 2), (0,), nested)
            del self.steps["pipeline"]["full"]          # the same as diffusers'
        self.helper = None
        if mode != "compiled" and DeepCacheSDHelper is not None:
            self.helper = Helper(helped, self.inputs, (0, 1, 2))
            self.steps["helper"] = self.helper.steps

    def memory(self, branch: int, device: torch.device) -> dict[str, Any]:
        """Peak bytes besides the weights, of a step without a cache (dense) and of a full step that fills the cache
        (run), and the bytes of the feature in our cache."""
        cache = DeepCache(branch, [0])
        found: dict[str, Any] = {self.name: {
            "dense": peak_memory(self.steps[self.name]["full"], device),
            "run": peak_memory(lambda: self.network(*self.inputs, cache=cache.at(0)), device)}}
        found["diffusers"] = {"dense": peak_memory(self.steps["diffusers"]["full"], device)}
        if self.helper is not None:
            found["helper"] = {"run": peak_memory(self.helper.first, device)}
        return found | {"feature": sum(value.nbytes for value in cache.kept.values())}


def difference(value: Tensor, reference: Tensor) -> float:
    """The largest difference as a fraction of the reference's largest magnitude."""
    value, reference = value.float().cpu(), reference.float().cpu()
    return ((value - reference).abs().max() / reference.abs().max()).item()


@torch.inference_mode()
def compare(subject: Subject, batch_size: int, dtype: torch.dtype, mode: str, device: torch.device, repeats: int,
            limit: float) -> dict[str, Any]:
    """Time all sides: JSON-compatible {sides, expected, memory, runs, compile_seconds}.

    sides: by side and step, the times, `over_ours` (a median over rounds, as all ratios) and how far the result is from
    our eager network's. expected: a cached step's MACs as a fraction of a full one's. memory (eager): peak bytes beside
    the weights. runs: whole runs of our network, in seconds: the sum of their steps' times, and as measured if that
    takes less than `limit` seconds.
    """
    before = compile_seconds()
    sides = Sides(subject, batch_size, dtype, mode, device)
    variants = {(side, step): run for side, steps in sides.steps.items() for step, run in steps.items()}
    reference = {step: run() for step, run in sides.eager.items()}
    apart = {(side, step): 0.0 if run is sides.eager.get(step) else difference(run(), reference[step])
             for (side, step), run in variants.items()}
    took = compile_seconds() - before
    memory = sides.memory(subject.branch, device) if mode == "eager" else {}
    timings = interleave(variants, device, repeats, 1, limit)
    found: dict[str, dict] = {side: {} for side in sides.steps}
    for (side, step), timing in timings.items():
        found[side][step] = timing.to_json() | {"over_ours": timing.ratio(timings[sides.name, step]),
                                                "difference": apart[side, step]}
    ours = {step: timings[sides.name, step] for step in sides.eager}
    return {"sides": found, "expected": expected(subject), "memory": memory, "compile_seconds": round(took, 1),
            "runs": whole_runs(subject, sides, ours, device, limit)}


def expected(subject: Subject) -> dict[str, dict[str, float]]:
    """The MACs of cached steps as a fraction of a full step's. Empty for a video network: the papers' convention has no
    rule for some of its layers."""
    if subject.config is None:
        return {}
    full, cached = branch_macs(build(subject.config), example_inputs(subject.config), (0, 1, 2))
    return {name_of(branch): {"macs": macs.hook / full.hook, "macs_fc": macs.fc / full.fc}
            for branch, macs in cached.items()}


def whole_runs(subject: Subject, sides: Sides, steps: Mapping[str, Timing], device: torch.device, limit: float
               ) -> dict[str, dict]:
    """Whole runs without a cache, at some intervals and by a plan: {calls, steps, measured}, both times in seconds."""
    usual = name_of(subject.branch)
    policies: dict[str, tuple[list[str], Policy | None]] = {"uncached": (["full"] * STEPS, None)}
    for interval in INTERVALS:
        full = uniform(STEPS, interval)
        policies[f"N = {interval}"] = (["full" if step in full else usual for step in range(STEPS)],
                                       DeepCache(subject.branch, full))
    plan = ["full" if call.branch is None else name_of(call.branch, 1) for call in PLAN]
    if steps.keys() >= set(plan):
        policies["plan"] = plan, PlanCache(PLAN)
    found: dict[str, dict] = {name: {"calls": len(kinds), "steps": sum(steps[kind].median for kind in kinds)}
                              for name, (kinds, _) in policies.items()}
    if sum(run["steps"] for run in found.values()) > limit:
        return found
    x, _, *beside = sides.inputs

    def run(calls: int, policy: Policy | None) -> Tensor:
        predict = noise_predictor(sides.network, Diffusion(), x.dtype, policy, beside)
        return Sampler("ddim", calls, "uniform", 0.0, Diffusion()).run(predict, x.float())

    variants = {name: partial(run, len(kinds), policy) for name, (kinds, policy) in policies.items()}
    timed = interleave(variants, device, 2, 1)
    return {name: found[name] | {"measured": timing.median} for name, timing in timed.items()}


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """The peak bytes of PyTorch's tensors during a run, besides those that existed before."""
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
    first = min(allocations, key=lambda pair: pair[0])[1]        # the totals include earlier recordings
    return max(fields.total_allocated for _, fields in allocations) - (first.total_allocated - first.alloc_size)
