"""Multiply-accumulates of full and cached steps, counted exactly on the meta device: no weights, no memory.

    python -m eval.macs --config configs/ddpm_cifar10.yaml                              a table of all branches
    python -m eval.macs --config configs/ddpm_cifar10.yaml --interval 5 --branch 2      the average over a run
    python -m eval.macs --config configs/ldm_cin256.yaml --interval 5                   the same for LDM
    python -m eval.macs --config configs/ddpm_emoji.yaml --block-schedule FILE          with Block Caching

Two conventions, for one row of a batch (with guidance an image has two). `macs` is the papers' convention: the hook
counter of DeepCache's released code, which counts biases and torch's own norms but no attention products. `macs_fc` is
PyTorch's FlopCounterMode / 2: convolutions, linear layers and attention products, no biases, no norms.
"""

import json
from dataclasses import asdict, dataclass

from eval.cost.macs import giga, mean
from eval.cost.runs import call_macs, costs_of, macs_per_step
from run.cli import command
from run.spec import Run, SamplerOptions, parse_run
from unet_caching.methods.block_caching import BlockCachingMethod
from unet_caching.methods.deepcache import DeepCacheOptions
from unet_caching.options import MethodOptions, option


@dataclass(frozen=True)
class Options:
    json: bool = option(False, "print JSON, in MACs, instead of text, in G")


def of_branches(run: Run, branch: int | None) -> tuple[dict, list[str]]:
    """The MACs of a full step, and of a cached step at a branch or at all branches."""
    branches = range(run.unet.num_branches) if branch is None else [branch]
    costs = costs_of(run)
    full, counted = costs.full, {one: costs.cached(one) for one in branches}
    result = {"model": run.config.name, "macs_full": full.hook, "macs_fc_full": full.fc,
              "branches": [{"branch": one, "macs_cached": cached.hook, "macs_fc_cached": cached.fc}
                           for one, cached in counted.items()]}
    return result, [f"{run.config.name}: one step, in G; ratio = cached / full",
                    f"{'branch':8}{'macs':>10}{'ratio':>8}{'macs_fc':>10}{'ratio':>8}",
                    f"{'full':8}{giga(full.hook):10.4f}{1:8.3f}{giga(full.fc):10.4f}{1:8.3f}",
                    *(f"{one:<8}{giga(cached.hook):10.4f}{cached.hook / full.hook:8.3f}"
                      f"{giga(cached.fc):10.4f}{cached.fc / full.fc:8.3f}" for one, cached in counted.items())]


def of_run(run: Run) -> tuple[dict, list[str]]:
    """The average over a run with caching, beside a full step and, for DeepCache by itself, a cached step."""
    blocks, level, full = run.caching.of(BlockCachingMethod), run.deepcache, costs_of(run).full
    alone = level is not None and len(run.caching.methods) == 1
    average = macs_per_step(run) if alone else mean(call_macs(run))
    shown = {"full": full, "average": average}
    result = {"model": run.config.name, "steps": run.steps, **({} if alone else {"calls": run.calls}),
              **run.caching.settings, "macs": average.hook, "macs_fc": average.fc, "macs_full": full.hook,
              "macs_fc_full": full.fc}
    about = ", ".join(method.summary for method in run.caching.methods)
    title = f"{run.config.name}: {about}; one of {run.calls} network calls, in G"
    if blocks is not None:
        title = (f"{run.config.name}: {blocks.schedule.kinds} blocks on their own schedules"
                 + (f", {len(level.full_steps)} full steps, branch {level.branch}" if level else "")
                 + f"; one of {run.calls} network calls, in G")
    if alone and level:
        cached = costs_of(run).cached(level.branch)
        shown = {"full": full, "cached": cached, "average": average}
        result |= {"macs_cached": cached.hook, "macs_fc_cached": cached.fc}
        title = f"{run.config.name}: {len(level.full_steps)} full of {run.steps} steps, branch {level.branch}, in G"
    return result, [title, f"{'':8}{'macs':>10}{'macs_fc':>10}",
                    *(f"{name:8}{giga(macs.hook):10.4f}{giga(macs.fc):10.4f}" for name, macs in shown.items())]


@command
def main() -> None:
    spec, options = parse_run(__doc__, Options, parts=(SamplerOptions, MethodOptions))
    run = spec.open()
    run.refuse_foreign({"model": run.config.name, "unet": asdict(run.config.unet), "steps": run.steps})
    branch = next(method.branch for method in spec.caching if isinstance(method, DeepCacheOptions))
    result, text = of_run(run) if run.caching else of_branches(run, branch)
    print(json.dumps(result, indent=1) if options.json else "\n".join(text))


if __name__ == "__main__":
    main()
