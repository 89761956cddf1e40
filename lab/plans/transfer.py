"""Writes a plan of one model for another: the same steps, timesteps, depths and forecasts, at its own cost.

    python -m lab.plans.transfer --plan checkpoints/plans/sd_emoji_18.json --config configs/sd_v15.yaml --out plan.json
    python -m stable_diffusion.sample --config configs/sd_v15.yaml --plan plan.json --prompts prompts.txt --out plan

For who has no time for a search (lab.plans.search); docs/planning.md says what is known of how well that does. Nothing
is measured on the other model: its weights and its guidance may be any. Depths are branches, counted from the outside,
which both models must have.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from lab.fit.fit import check_out
from lab.plans.plans import bound_plan
from run.cli import command
from run.files import write_json
from run.spec import RunSpec
from unet_caching.errors import UserError, as_user_error
from unet_caching.files.plan_file import SAMPLING, Plan


def transferred(plan: Plan, config: Path) -> Plan:
    """The plan for the model of a config. Raises UserError where that has too few branches, or no such timesteps."""
    run = RunSpec.of(config, **{key: plan.run[key] for key in SAMPLING}, eta=None).open()
    _ = run.sampler
    if plan.deepest >= run.unet.num_branches:
        raise UserError(f"the plan has branch {plan.deepest}, {run.config.name} has branches 0 to "
                        f"{run.unet.num_branches - 1}")
    settings = {"model": run.config.name, "unet": asdict(run.config.unet), **run.sampler.settings}
    notes = {**plan.notes, "found_on": plan.run["model"], "found_sha256": plan.sha256}
    return bound_plan(run, settings, plan.calls, None, None, notes)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--plan", type=Path, required=True, help="of another model")
    parser.add_argument("--config", type=Path, required=True, help="of the model to write it for, configs/*.yaml")
    parser.add_argument("--out", type=Path, required=True, help="plan to write, .json")
    args = parser.parse_args()
    check_out(args.out, ".json")
    with as_user_error():
        plan = Plan.load(args.plan)
    made = transferred(plan, args.config)
    write_json(args.out, made.to_json())
    print(f"{args.out}: {made.run['model']}, {made.run['sampler']}, {made.run['steps']} steps, {made.cost:.2f} full "
          f"calls ({plan.cost:.2f} on {plan.run['model']}); not measured on this model")


if __name__ == "__main__":
    main()
