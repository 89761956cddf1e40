"""The rows of one table of a paper: plan them, sample them, judge them, print them. The table scripts call it.

    python -m scripts.plan table1 [options]

Equal settings get the same sample folder, whatever table asks for them, so nothing is sampled twice.
"""

import argparse
import shlex
import shutil
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from eval.cost.macs import giga
from eval.cost.runs import macs_per_image, macs_per_step
from eval.tables.current import CLIP, INCEPTION, Wanted
from eval.tables.paper import Section, Table, find
from eval.tables.render import Asked, shown, wanted
from eval.tables.rows import Row, Runs, of_table
from eval.tables.text import align
from lab.study.arms import Arm, Given, of_row
from lab.study.runner import by_commands
from run import arguments, results
from run.cli import command
from run.families import family_named_by, load_config
from run.files import write_atomically
from run.machine import Machine, check_counts
from run.seeds import MOST
from run.spec import DTYPES
from unet_caching.errors import UserError

PIXELS = ("checkpoint", "labels", "dtype", "released_noise")       # of the user's options, those that decide them


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def describe(arms: Sequence[Arm], macs_steps: int | None) -> str:
    """The plan: per row its steps, exact MACs, what is there, what is left and the disk it takes; then the commands.

    macs_steps: what the paper divides MACs by, where it is not the row's own steps.
    """
    lines = [["row", "full / calls", "MACs/step G", "MACs/image T", "images there", "calls left", "PNG up to", "npz"]]
    for arm in arms:
        run, there = arm.run, arm.present
        lines.append([title_of(arm), f"{run.full_calls} / {run.calls}",
                      f"{giga(macs_per_step(run, macs_steps).hook):.4f}",
                      f"{macs_per_image(run).hook / 1e12:.4f}", f"{there:,} of {arm.images:,}",
                      f"{(arm.images - there) * run.calls:,}", gigabytes(arm.pixels * arm.images),
                      gigabytes(arm.pixels * arm.images) if arm.npz else "-"])
    text = [align(lines), "",
            "Calls are of the U-Net, per image; PLMS makes one more than it has steps. With guidance each runs two",
            "rows of a batch: MACs/image counts both and all calls, MACs/step one row and the steps, as the papers do.",
            "PNG: the size of the pixels; photographs take two thirds of it or so.", ""]
    for arm in arms:
        text += [f"# {arm.label}", shlex.join(["python", *arm.command()])]
        text += [shlex.join(["python", *arm.npz_command()])] if arm.npz else []
        text += [shlex.join(["python", *arm.judge_command()])]
    return "\n".join(text)


def disk(arms: Sequence[Arm], samples: Path) -> str:
    """What is needed, and whether it is there."""
    existing = next(path for path in [samples.absolute(), *samples.absolute().parents] if path.exists())
    free, size = shutil.disk_usage(existing).free, sum(arm.bytes_needed for arm in arms)
    return (f"disk: up to {gigabytes(size)} for what is not there yet, {gigabytes(free)} free"
            + ("; it may not be enough" if size > free else ""))


def user_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, allow_abbrev=False, description=(
        "Sample the rows of one table of the paper, and judge them where the evaluator's files are given or in their "
        "places. A second run goes on where the first one stopped. Paths are relative to the repository."))
    parser.add_argument("--dry-run", action="store_true", help="print the plan and what is missing; do nothing")
    parser.add_argument("--trials", action="store_true", help="show numbers of fewer images in the table, labelled")
    parser.add_argument("--only", action="append", metavar="ROW",
                        help="this row, as the plan prints it, or by its sample folder; a section, like cifar10, is "
                             "all of its rows; repeatable")
    parser.add_argument("--config", type=Path, action="append", default=[],
                        help="one of the table's own models: its rows alone; another model: in the place of those of "
                             "its package, to try the script out; repeatable")
    add_options(parser)
    return parser


def add_options(parser: argparse.ArgumentParser, images: str = "as many as the paper") -> None:
    """What `given_by` reads: --images, the folders, the evaluators' files, what is passed on."""
    parser.add_argument("--images", type=arguments.whole,
                        help=f"per row, seeds 0 to IMAGES - 1; a later run with more keeps them (default: {images})")
    parser.add_argument("--samples", type=Path, default=Path("samples"),
                        help="where the sample folders are (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=Path("results"),
                        help="where the measured numbers are (default: %(default)s)")
    judge = parser.add_argument_group("the evaluators (python -m scripts.doctor says where their files are looked for)")
    judge.add_argument("--inception", type=Path, help="weights of Inception, for FID and its kin")
    judge.add_argument("--reference", action="append", default=[], metavar="[MODEL=]PATH",
                       help="statistics of the real images; one for each model of the table")
    judge.add_argument("--clip-weights", type=Path, help="open_clip's ViT-g-14, laion2b_s34b_b88k")
    passed = parser.add_argument_group("passed on to the sampler, which has their defaults")
    passed.add_argument("--checkpoint", type=Path, help="weights, instead of the config's")
    passed.add_argument("--labels", help="balanced, random or a list; LDM only")
    passed.add_argument("--released-noise", action="store_true",
                        help="the same noise in every batch, as the released evaluation; Stable Diffusion only")
    passed.add_argument("--batch-size", type=arguments.whole)
    passed.add_argument("--device")
    passed.add_argument("--dtype", choices=DTYPES)
    passed.add_argument("--threads", type=arguments.whole)
    passed.add_argument("--compile", action="store_true")
    passed.add_argument("--cuda-graphs", action="store_true")


def check(args: argparse.Namespace) -> None:
    """Raises UserError for values of `add_options` that no arm could use."""
    check_counts(**{name: getattr(args, name) for name in ("images", "batch_size", "threads")})
    if args.images is not None and args.images > MOST:
        raise UserError(f"--images must be at most {MOST:,}, got {args.images:,}")
    if args.device is not None:
        try:
            torch.device(args.device)
        except RuntimeError:
            raise UserError(f"--device {args.device} is no device: cpu, cuda, cuda:1") from None
    for path in (args.inception, args.clip_weights, *(Path(text.rpartition("=")[2]) for text in args.reference)):
        if path is not None and not path.exists():
            raise UserError(f"no file {path}")


def given_by(args: argparse.Namespace) -> Given:
    """What the user says of all arms, by `add_options`."""
    return Given(args.images, args.samples, args.results, args.inception or INCEPTION, args.clip_weights or CLIP,
                 tuple(args.reference), {name: value for name in PIXELS if (value := getattr(args, name))},
                 {name: value for name in arguments.names(Machine) if (value := getattr(args, name))})


def check_one_model(said: Given, models: Collection[str]) -> None:
    """Raises UserError for options that fit one model where there are several."""
    for option, values in (("checkpoint", said.pixels.get("checkpoint")),
                           ("reference", [text for text in said.reference if "=" not in text])):
        if values and len(models) > 1:
            raise UserError(f"--{option} is for one model; here are {', '.join(sorted(models))}: "
                            + ("name it in a config of its own" if option == "checkpoint"
                               else "say --reference MODEL=PATH"))


def chosen(arms: list[Arm], only: Sequence[str] | None) -> list[Arm]:
    """The arms that --only names. Raises UserError for a name of none."""
    unknown = set(only or ()) - {key for arm in arms for key in names_of(arm)}
    if unknown:
        raise UserError(f"--only {unknown.pop()!r} is no row of this table: "
                        f"{'; '.join(f'{title_of(arm)} ({arm.name})' for arm in arms)}")
    return [arm for arm in arms if not only or names_of(arm) & set(only)]


def title_of(arm: Arm) -> str:
    """A row as the plan prints it: 'cifar10: N=2'."""
    return f"{arm.section}: {arm.label}" if arm.section else arm.label


def names_of(arm: Arm) -> set[str]:
    """What --only may call a row: its section, itself in it, its label in every section, or its folder."""
    return {title_of(arm), arm.label, arm.name, *([arm.section] if arm.section else [])}


class Plan(NamedTuple):
    """What a table script asks for, with the user's options. arms: none for a table that only lists settings.

    others: models that stand in the places of the table's.
    """
    table: Table
    runs: Runs
    arms: list[Arm]
    others: Collection[str] = ()

    def shown(self, folder: Path, trials: bool = False) -> str:
        """The table, with the results in a folder, of what the user asked for."""
        found = list(results.read_all(folder)) if folder.is_dir() else []
        arms = {(arm.section, arm.label): arm for arm in self.arms}

        def asked(row: Row, section: Section, kind: str) -> Wanted:
            arm = arms.get((row.section, row.label))
            if arm is None or arm.kind != kind:
                return wanted(row, section, kind)
            return replace(arm.wanted, images=section.images or arm.images, published=bool(self.table.paper))

        text = shown(self.table, found, runs=self.runs, asked=Asked(asked, trials))
        if not self.others:
            return text
        return f"{text}\n\n{', '.join(sorted(self.others))} in the place of the table's models: no reproduction"


def make_plan(table: Table, args: argparse.Namespace) -> Plan:
    """A table's runs by the user's options, those of `user_parser`. Raises UserError."""
    check(args)
    said, own = given_by(args), {row.run.config.name for row in of_table(table).rows}
    named = {path: load_config(path).name for path in args.config}
    runs = of_table(table, {family_named_by(path).name: path for path, name in named.items() if name not in own})
    alone = own & set(named.values())
    if not table.paper and said.images:         # no paper says how many images its rows are judged on
        table = table._replace(sections={name: section._replace(images=said.images)
                                         for name, section in table.sections.items()})
    if table.schedules:
        return Plan(table, runs, [])
    arms = [of_row(row, table, said) for row in runs.rows if not alone or row.run.config.name in alone]
    arms = chosen(arms, args.only)
    check_one_model(said, {arm.run.config.name for arm in arms})
    return Plan(table, runs, arms, {arm.run.config.name for arm in arms} - own)


@command
def main() -> None:
    table = find(sys.argv[1]) if len(sys.argv) > 1 else None
    if table is None or table.script is None:
        raise UserError("python -m scripts.plan TABLE [options]: name a table that can be run, like table1")
    parser = user_parser(f"bash scripts/{table.script}")
    parser.add_argument("--write-table", type=Path, metavar="FILE",
                        help="write the table, with the results that are there, and do nothing else")
    args = parser.parse_args(sys.argv[2:])
    plan = make_plan(table, args)
    if args.write_table or plan.table.schedules:
        text = plan.shown(args.results, args.trials)
        print(text)
        if args.write_table:
            args.write_table.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(args.write_table, lambda path: path.write_text(f"{text}\n"))
        return
    arms = plan.arms
    print(f"{describe(arms, plan.table.macs_steps)}\n\n{disk(arms, args.samples)}")
    lacking = list(dict.fromkeys(thing for arm in arms for thing in arm.missing_for_sampling()))
    unjudged = list(dict.fromkeys(thing for arm in arms for thing in arm.missing_for_judging()))
    for thing in lacking:
        print(f"missing: {thing}")
    for thing in unjudged:
        print(f"not judged without: {thing}")
    if not args.dry_run:
        if lacking:
            raise UserError(f"missing: {'; '.join(lacking)}")
        print(flush=True)
        by_commands(arms)
    print(f"\n{plan.shown(args.results, args.trials)}\n\nA dash: not printed in the paper, or not measured here "
          f"(results in {args.results}/).")


if __name__ == "__main__":
    main()
