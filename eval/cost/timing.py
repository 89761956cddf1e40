"""The wall-clock time of a run's network calls: the project's only timer.

Calls of one kind reuse the same values and forecast them alike. DeepCache has two kinds, full and cached calls; a block
schedule has one for each different set of blocks. Each kind is timed once, in turns with a full call, so that a busy
machine slows all of them alike. The time of a run is the sum over its calls.
"""

import gc
import math
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from eval.cost.macs import Macs
from eval.cost.runs import call_macs, costs_of
from run.results import Result
from run.spec import Run
from unet_caching.keep import Keep
from unet_caching.methods.block_caching import BlockCachingMethod
from unet_caching.methods.deepcache import DeepCacheMethod
from unet_caching.methods.forecast import ForecastMethod
from unet_caching.methods.plan import PlanMethod
from unet_caching.nest import Network, no_cache

Name = TypeVar("Name", bound=Hashable)


class Timing(NamedTuple):
    """The seconds of one call, a value for each round. All variants share the rounds."""
    seconds: list[float]
    peak_bytes: int | None = None       # of accelerator memory during the call; None on a CPU

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    def ratio(self, other: "Timing") -> float:
        """This call's time as a fraction of the other's, the median over the rounds."""
        return round(float(np.median(np.divide(self.seconds, other.seconds))), 6)

    def to_json(self) -> dict:
        low, median, high = np.percentile(self.seconds, [25, 50, 75]).round(8).tolist()
        return {"median": median, "quartiles": [low, high], "min": min(self.seconds), "rounds": self.seconds,
                "peak_bytes": self.peak_bytes}


@torch.inference_mode()
def interleave(variants: Mapping[Name, Callable[[], object]], device: torch.device | str, repeats: int = 20,
               warmup: int = 2, limit: float = math.inf) -> dict[Name, Timing]:
    """Time functions that take turns: each runs once per round, for `warmup` untimed and `repeats` timed rounds.

    device: waited for before the clock is read. limit: seconds of timed rounds after which no other round begins; at
    least two are timed. Raises ValueError for fewer than one timed or warm-up round.
    """
    if repeats < 1 or warmup < 1:
        raise ValueError(f"at least one timed and one warm-up round are needed, got {repeats} and {warmup}")
    device = torch.device(device)
    synchronize = torch.get_device_module(device).synchronize
    seconds: dict[Name, list[float]] = {name: [] for name in variants}
    peaks: dict[Name, int | None] = dict.fromkeys(variants)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(-warmup, repeats):
            if turn >= 2 and sum(map(sum, seconds.values())) > limit:
                break
            for name, call in variants.items():
                if device.type == "cuda" and turn < 0:
                    torch.cuda.reset_peak_memory_stats(device)
                synchronize()
                start = time.perf_counter()
                call()
                synchronize()
                elapsed = time.perf_counter() - start
                if turn >= 0:
                    seconds[name].append(round(elapsed, 8))     # no meaningless digits in files
                elif device.type == "cuda":
                    peaks[name] = torch.cuda.max_memory_allocated(device)
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(seconds[name], peaks[name]) for name in variants}


def random_inputs(shapes: Sequence[tuple[int, ...]], rows: int, device: torch.device | str, dtype: torch.dtype
                  ) -> list[Tensor]:
    """A U-Net's arguments before `cache`. shapes: of a row of each argument but t."""
    noise = torch.Generator().manual_seed(0)
    x, *beside = (torch.randn(rows, *shape, generator=noise).to(device, dtype) for shape in shapes)
    return [x, torch.full((rows,), 500, device=device), *beside]


class Kind(NamedTuple):
    """A kind of network call. A full call reuses nothing."""
    reused: tuple[str, ...] = ()        # the cache keys of the reused values, sorted; a level has its skip's index
    order: int = 0                      # of their forecast


def kinds_of(run: Run) -> list[Kind]:
    """The kind of every network call of an image."""
    plan = run.caching.of(PlanMethod)
    order = run.caching.settings.get("forecast", {}).get("order", 0)
    orders = [len(call.damping) for call in plan.plan.calls] if plan else [order] * run.calls
    return [Kind(tuple(sorted(map(str, keys))), order if keys else 0)
            for keys, order in zip(run.reused, orders, strict=True)]


def time_runs(runs: Sequence[Run], network: Network, inputs: Sequence[Tensor], repeats: int = 20, warmup: int = 2
              ) -> dict[str, Any]:
    """Time every kind of call of some runs, in turns with a call without any cache.

    runs: all of one model. network: their U-Net, perhaps accelerated, on its device. inputs: its arguments before
    `cache`. Returns JSON-compatible {full, kinds: [...]} for `Times`, with seconds of one batch and MACs of one row.
    Raises ValueError for no repeats.
    """
    first: dict[Kind, tuple[Run, int, Macs]] = {}       # the first call of each kind: its run, its step, its MACs
    for run in runs:
        for step, (kind, macs) in enumerate(zip(kinds_of(run), call_macs(run), strict=True)):
            if kind.reused or not only_reuses(run):       # other methods may do more in a full call
                first.setdefault(kind, (run, step, macs))

    @torch.inference_mode()
    def at(run: Run, step: int) -> Callable[[], Tensor]:
        policy = run.caching.policy(inputs[0].device, inputs[0].dtype) or Keep({})
        for before in range(step):              # these calls fill the cache
            network(*inputs, cache=policy.at(before))
        return lambda: network(*inputs, cache=policy.at(step))

    timings = interleave({None: lambda: network(*inputs, cache=no_cache),
                          **{kind: at(run, step) for kind, (run, step, _) in first.items()}},
                         inputs[0].device, repeats, warmup)
    full, calls = timings.pop(None), Counter(kind for run in runs for kind in kinds_of(run))

    def entry(timing: Timing, macs: Macs) -> dict[str, Any]:
        return {**timing.to_json(), "macs": macs.hook, "macs_fc": macs.fc}

    return {"full": entry(full, costs_of(runs[0]).full),
            "kinds": [{"reused": list(kind.reused), "order": kind.order, "calls": calls[kind],
                       **entry(timing, first[kind][2]), "ratio": timing.ratio(full)}
                      for kind, timing in timings.items()]}


def only_reuses(run: Run) -> bool:
    """Whether a run's calls only reuse and forecast, so that calls of one kind take the same time in all runs.

    Scale-shift counts as reuse: on Stable Diffusion v1.5 it added 0.005 %.
    """
    plain = DeepCacheMethod, BlockCachingMethod, PlanMethod, ForecastMethod
    return all(isinstance(method, plain) for method in run.caching.methods)


class RunTime(NamedTuple):
    """The time of all network calls of a batch."""
    seconds: float
    full_calls: float           # the same in full calls, by the ratios of single rounds


class Times:
    """The measured times of a model's calls, for one batch: seconds of a full call; (seconds, ratio to it) by kind.

    throughput: the result of `time_runs`; older files have `branches` instead of kinds. cache: the caching settings of
    the only run that the times hold for; None: they hold for all runs whose kinds of calls were timed.
    """

    def __init__(self, throughput: Mapping[str, Any], cache: Mapping[str, Any] | None = None):
        self.full, self.cache = throughput["full"]["median"], cache
        order = (cache or {}).get("forecast", {}).get("order", 0)
        self.kinds = {Kind(): (self.full, 1.0)}
        for one in throughput.get("branches", ()):
            self.kinds[Kind((str(one["branch"]),), one.get("forecast", 0))] = one["median"], one["ratio"]
        for one in throughput.get("kinds", ()):
            kind = Kind(tuple(one["reused"]), one.get("order", order if one["reused"] else 0))
            self.kinds[kind] = one["median"], one["ratio"]

    @classmethod
    def of(cls, result: Result) -> "Times":
        """The times in a result of eval.throughput."""
        return cls(result.times, result.settings.get("cache"))

    def of_run(self, run: Run) -> RunTime | None:
        """The time of a run; None if a kind of its calls was not timed."""
        if self.cache != run.caching.settings if self.cache is not None else not only_reuses(run):
            return None
        calls = Counter(kinds_of(run))
        if not calls.keys() <= self.kinds.keys():
            return None
        return RunTime(*(sum(n * self.kinds[kind][i] for kind, n in calls.items()) for i in (0, 1)))
