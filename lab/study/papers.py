"""The rows of one table of a paper: plan, sample, judge and print them. The table scripts call it.

    python -m lab.study.papers table1 [options]

Tables share sample folders by settings, so nothing is sampled twice.
"""

import shlex
import shutil
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, NamedTuple

from eval.cost.macs import giga
from eval.cost.runs import macs_per_image, macs_per_step
from eval.tables.arms import Arm, Given, Runs, runs_of
from eval.tables.paper import find
from eval.tables.render import Rendered, as_text
from eval.tables.study import Study
from eval.tables.text import align
from lab.study import commands
from run import arguments, results
from run.cli import command
from run.families import family_named_by, load_config
from run.files import write_atomically
from unet_caching.errors import UserError
from unet_caching.options import option


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def describe(arms: Sequence[Arm], macs_steps: int | None) -> str:
    """The plan: for each row its steps, exact MACs, images, calls that are left and disk space; then the commands.

    macs_steps: the paper divides MACs by it (default: the row's steps).
    """
    lines = [["row", "full / calls", "MACs/step G", "MACs/image T", "images there", "calls left", "PNG up to"]]
    for arm in arms:
        run, there = arm.run, arm.present
        lines.append([title_of(arm), f"{run.full_calls} / {run.calls}",
                      f"{giga(macs_per_step(run, macs_steps).hook):.4f}",
                      f"{macs_per_image(run).hook / 1e12:.4f}", f"{there:,} of {arm.images:,}",
                      f"{(arm.images - there) * run.calls:,}", gigabytes(arm.pixels * arm.images)])
    text = [align(lines), "",
            "Calls are of the U-Net, per image; PLMS makes one more than it has steps. With guidance each runs two",
            "rows of a batch: MACs/image counts both and all calls, MACs/step one row and the steps, as the papers do.",
            "PNG: the size of the pixels; photographs take two thirds of it or so.", ""]
    for arm in arms:
        text += [f"# {arm.label}", *(shlex.join(["python", *line]) for line in (arm.command(), arm.judge_command()))]
    return "\n".join(text)


def disk(arms: Sequence[Arm], samples: Path) -> str:
    """The disk space that is needed, and whether it is free."""
    existing = next(path for path in [samples.absolute(), *samples.absolute().parents] if path.exists())
    free, size = shutil.disk_usage(existing).free, sum(arm.bytes_needed for arm in arms)
    return (f"disk: up to {gigabytes(size)} for what is not there yet, {gigabytes(free)} free"
            + ("; it may not be enough" if size > free else ""))


@dataclass(frozen=True)
class Options:
    title: ClassVar[str] = "the table"
    dry_run: bool = option(False, "print the plan and what is missing; do nothing")
    trials: bool = option(False, "show numbers of fewer images in the table, labelled")
    only: tuple[str, ...] = option((), "only this row, by its name in the plan or by its sample folder, or all rows of "
                                       "a section, like cifar10; repeatable", action="append", metavar="ROW")
    config: tuple[Path, ...] = option((), "a model of the table: only its rows; another model: try the script with it "
                                          "instead of the table's models of its package; repeatable", action="append")
    write_table: Path | None = option(None, "only write the table, with the results so far", metavar="FILE")


ABOUT = ("Sample the rows of one table of the paper, and judge them if the evaluator's files are given or in their "
         "default places. A second run goes on where the first one stopped. Paths are relative to the repository.")


def chosen(arms: list[Arm], only: Sequence[str]) -> list[Arm]:
    """The arms that --only names. Raises UserError for a name that matches no arm."""
    unknown = set(only) - {key for arm in arms for key in names_of(arm)}
    if unknown:
        raise UserError(f"--only {unknown.pop()!r} is not a row of this table: choose from "
                        f"{'; '.join(f'{title_of(arm)} ({arm.name})' for arm in arms)}")
    return [arm for arm in arms if not only or names_of(arm) & set(only)]


def title_of(arm: Arm) -> str:
    """The name of a row in the plan: 'cifar10: N=2'."""
    return f"{arm.section}: {arm.label}" if arm.section else arm.label


def names_of(arm: Arm) -> set[str]:
    """The words of --only that match a row: its name in the plan, its label, its folder, its section."""
    return {title_of(arm), arm.label, arm.name, arm.folder.name, *([arm.section] if arm.section else [])}


class Plan(NamedTuple):
    """A table and the arms to run. arms: none for a table that only lists settings. others: models that replace the
    table's."""
    table: Study
    runs: Runs
    arms: list[Arm]
    others: Collection[str] = ()

    def shown(self, folder: Path, trials: bool = False) -> str:
        """The table with the results in a folder."""
        found = list(results.read_all(folder)) if folder.is_dir() else []
        text = as_text(Rendered(self.table, self.runs, found, trials))
        if not self.others:
            return text
        return f"{text}\n\n{', '.join(sorted(self.others))} in the place of the table's models: no reproduction"


def make_plan(table: Study, options: Options, given: Given) -> Plan:
    """A table's runs by the user's options. Raises UserError."""
    own = {arm.run.config.name for arm in runs_of(table).arms}
    named = {path: load_config(path).name for path in options.config}
    if not table.paper and given.images:        # a table of our own has no published number of images
        table = replace(table, parts=[replace(part, images=given.images) for part in table.parts])
    others = {family_named_by(path).name: path for path, name in named.items() if name not in own}
    runs, alone = runs_of(table, given, others), own & set(named.values())
    if table.schedules:
        return Plan(table, runs, [])
    arms = chosen([arm for arm in runs.arms if not alone or arm.run.config.name in alone], options.only)
    given.check_one_model({arm.run.config.name for arm in arms})
    return Plan(table, runs, arms, {arm.run.config.name for arm in arms} - own)


@command
def main() -> None:
    table = find(sys.argv[1]) if len(sys.argv) > 1 else None
    if table is None or table.script is None:
        raise UserError("name a table that can be run, like python -m lab.study.papers table1 [options]")
    options, given = arguments.parse(ABOUT, Options, Given, words=sys.argv[2:], prog=f"bash scripts/{table.script}")
    plan = make_plan(table, options, given)
    if options.write_table or plan.table.schedules:
        text = plan.shown(given.results, options.trials)
        print(text)
        if options.write_table:
            options.write_table.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(options.write_table, lambda path: path.write_text(f"{text}\n"))
        return
    arms = plan.arms
    print(f"{describe(arms, plan.table.macs_steps)}\n\n{disk(arms, given.samples)}")
    lacking = list(dict.fromkeys(thing for arm in arms for thing in arm.missing_for_sampling()))
    unjudged = dict.fromkeys(thing for arm in arms for thing in arm.missing_for_judging())
    print("".join([*(f"missing: {thing}\n" for thing in lacking),
                   *(f"not judged without: {thing}\n" for thing in unjudged)]), end="")
    if not options.dry_run:
        if lacking:
            raise UserError(f"missing: {'; '.join(lacking)}")
        print(flush=True)
        for number, arm in enumerate(arms, 1):
            print(f"[{number}/{len(arms)}] {arm.label}", flush=True)
            commands.python(arm.command(), f"row {arm.label!r}")
            commands.evaluate(arm)
    print(f"\n{plan.shown(given.results, options.trials)}\n\nA dash: not printed in the paper, or not measured here "
          f"(results in {given.results}/).")


if __name__ == "__main__":
    main()
