"""The wall-clock time of a run under any caching policy: each kind of its network calls is timed once.

Calls are of one kind where they reuse the same values (trace.py): with DeepCache there are two, full and cached
ones, with a block schedule as many as it has different sets of blocks.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eval.cost.runs import call_macs, costs_of
from eval.cost.timing import interleave
from run.spec import Run
from unet_caching.nest import Network, no_cache
from unet_caching.policy import Policy

Kind = frozenset[Hashable]


def named(kind: Kind) -> list[str]:
    """The keys that a kind of call reuses, as a file has them: levels by their skip."""
    return sorted(map(str, kind))


@torch.inference_mode()
def time_run(run: Run, network: Network, inputs: Sequence[Tensor], make: Callable[[], Policy],
             repeats: int = 20, warmup: int = 2) -> dict[str, Any]:
    """Time every kind of call of a run, in turns with a full one, and derive the whole run.

    network: the run's U-Net or what stands in for it, on its device. inputs: what it takes before `cache`. make: a
    function that returns a fresh policy.
    Returns JSON-compatible {full, kinds: [per kind, its calls, time and MACs], run}; seconds are of one batch and of
    the network alone. Raises ValueError for no repeats.
    """
    kinds, macs = run.reused, call_macs(run)
    first = {kind: step for step, kind in reversed([*enumerate(kinds)])}        # the first call of each kind

    def at(step: int) -> Callable[[], Tensor]:
        policy = make()
        for before in range(step):              # what the call reuses or forecasts is there then
            network(*inputs, cache=policy.at(before))
        return lambda: network(*inputs, cache=policy.at(step))

    timings = interleave({"full": lambda: network(*inputs, cache=no_cache),
                          **{str(step): at(step) for step in first.values()}}, inputs[0].device, repeats, warmup)
    full, whole = timings["full"], costs_of(run).full
    counts = Counter(kinds)
    found = [{"reused": named(kind), "calls": counts[kind], **timings[str(step)].to_json(),
              "ratio": timings[str(step)].ratio(full), "macs": macs[step].hook, "macs_fc": macs[step].fc}
             for kind, step in sorted(first.items(), key=lambda pair: pair[1])]
    return {"full": {**full.to_json(), "macs": whole.hook, "macs_fc": whole.fc}, "kinds": found,
            "run": {"calls": run.calls, "seconds": sum(one["calls"] * one["median"] for one in found),
                    "speedup": run.calls / sum(one["calls"] * one["ratio"] for one in found),
                    **{f"{name}_speedup": run.calls * getattr(whole, field) / sum(getattr(one, field) for one in macs)
                       for name, field in (("macs", "hook"), ("macs_fc", "fc"))}}}


def in_full_steps(times: Mapping[str, Any], run: Run) -> tuple[float, float] | None:
    """(seconds of a batch of a run, its time in full steps), from what `time_run` found; None where a kind is missing.

    A full call's time stands for calls that reuse nothing, whatever policy they belong to.
    """
    known = {tuple(one["reused"]): (one["median"], one["ratio"]) for one in times["kinds"]}
    known.setdefault((), (times["full"]["median"], 1.0))
    counts = Counter(tuple(named(kind)) for kind in run.reused)
    if not counts.keys() <= known.keys():
        return None
    return (sum(n * known[kind][0] for kind, n in counts.items()),
            sum(n * known[kind][1] for kind, n in counts.items()))


def table(result: Mapping[str, Any]) -> str:
    """The results of `time_run` as text."""
    full, run = result["full"], result["run"]
    lines = [f"{'calls':>6}{'median ms':>11}{'time':>8}{'macs':>8}{'macs_fc':>9}  reused",
             f"{'':6}{1e3 * full['median']:11.2f}{1:8.3f}{1:8.3f}{1:9.3f}  nothing (without caching)"]
    for one in result["kinds"]:
        some = ", ".join(one["reused"][:3]) + (f", ... ({len(one['reused'])})" if len(one["reused"]) > 3 else "")
        lines.append(f"{one['calls']:6}{1e3 * one['median']:11.2f}{one['ratio']:8.3f}{one['macs'] / full['macs']:8.3f}"
                     f"{one['macs_fc'] / full['macs_fc']:9.3f}  {some or 'nothing'}")
    return "\n".join([*lines, "", f"the run: {run['calls']} calls, {run['seconds']:.4g} s a batch, "
                      f"{run['speedup']:.2f}x by time, {run['macs_speedup']:.2f}x by macs, "
                      f"{run['macs_fc_speedup']:.2f}x by macs_fc"])

