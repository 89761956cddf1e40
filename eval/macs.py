"""Multiply-accumulates of full and cached steps, counted exactly on the meta device: no weights, no memory.

    python -m eval.macs --config configs/ddpm_cifar10.yaml                              a table of all branches
    python -m eval.macs --config configs/ddpm_cifar10.yaml --interval 5 --branch 2      the average over a run
    python -m eval.macs --config configs/ldm_cin256.yaml --interval 5                   so for LDM
    python -m eval.macs --config configs/ddpm_emoji.yaml --block-schedule FILE          with Block Caching

Two conventions, for one row of a batch (with guidance an image takes two). `macs` is the papers': the hook counter of
DeepCache's released code, which counts biases and norms (those of torch's own classes) but no attention product.
`macs_fc` is PyTorch's FlopCounterMode / 2: convolutions, linear layers and attention products, no biases, no norms.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from caching.nested import no_cache
from eval.cost.macs import average, branch_macs, count, giga, on_meta, run_macs, step_macs
from eval.models import build, example_inputs, load_config
from runs.cli import command
from runs.options import add_cache_options, plan_cache


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="configs/*.yaml")
    parser.add_argument("--steps", type=int, help="network calls per image (default: the config's)")
    parser.add_argument("--json", action="store_true", help="print JSON, in MACs, instead of text, in G")
    add_cache_options(parser)
    args = parser.parse_args()

    config = load_config(args.config)
    steps = config.sampler.steps if args.steps is None else args.steps
    unet, inputs = build(config), example_inputs(config)
    plan = plan_cache(args, steps, unet.num_branches, config.sampler.branch)
    if plan.blocks is not None:
        plan.check({"model": config.name, "unet": asdict(config.unet), "steps": steps})
        full = count(lambda: on_meta(unet, inputs)(no_cache))
        mean = run_macs(unet, inputs, plan.make(adjusted=False), plan.blocks.calls)
        result = {"model": config.name, "steps": steps, "calls": plan.blocks.calls, **plan.settings, "macs": mean.hook,
                  "macs_fc": mean.fc, "macs_full": full.hook, "macs_fc_full": full.fc}
        text = [f"{config.name}: {plan.blocks.kinds} blocks on their own schedules"
                + (f", {len(plan.full_steps)} full steps, branch {plan.branch}" if plan.cached else "")
                + f"; one of {plan.blocks.calls} network calls, in G",
                f"{'':8}{'macs':>10}{'macs_fc':>10}",
                *(f"{name:8}{giga(macs.hook):10.4f}{giga(macs.fc):10.4f}"
                  for name, macs in (("full", full), ("average", mean)))]
    elif plan.cached:
        full, cached = step_macs(unet, inputs, plan.branch)
        mean = average(full, cached, plan.full_steps, steps)
        result = {"model": config.name, "steps": steps, **plan.settings, "macs": mean.hook, "macs_fc": mean.fc,
                  "macs_full": full.hook, "macs_cached": cached.hook,
                  "macs_fc_full": full.fc, "macs_fc_cached": cached.fc}
        text = [f"{config.name}: {len(plan.full_steps)} full of {steps} steps, branch {plan.branch}, in G",
                f"{'':8}{'macs':>10}{'macs_fc':>10}",
                *(f"{name:8}{giga(macs.hook):10.4f}{giga(macs.fc):10.4f}"
                  for name, macs in (("full", full), ("cached", cached), ("average", mean)))]
    else:
        branches = range(unet.num_branches) if args.branch is None else [plan.branch]
        full, counted = branch_macs(unet, inputs, branches)
        result = {"model": config.name, "macs_full": full.hook, "macs_fc_full": full.fc,
                  "branches": [{"branch": branch, "macs_cached": cached.hook, "macs_fc_cached": cached.fc}
                               for branch, cached in counted.items()]}
        text = [f"{config.name}: one step, in G; ratio = cached / full",
                f"{'branch':8}{'macs':>10}{'ratio':>8}{'macs_fc':>10}{'ratio':>8}",
                f"{'full':8}{giga(full.hook):10.4f}{1:8.3f}{giga(full.fc):10.4f}{1:8.3f}",
                *(f"{branch:<8}{giga(cached.hook):10.4f}{cached.hook / full.hook:8.3f}"
                  f"{giga(cached.fc):10.4f}{cached.fc / full.fc:8.3f}" for branch, cached in counted.items())]
    print(json.dumps(result, indent=1) if args.json else "\n".join(text))


if __name__ == "__main__":
    main()
