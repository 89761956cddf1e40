"""The rows of one table of the paper: plan them, sample them, print them. The table scripts call it (scripts/table.sh).

A row is `LABEL PACKAGE OPTIONS`: the paper's name of the row, `ldm` or `ddpm`, and options of PACKAGE.sample. Equal
settings get the same sample folder, whatever table asks for them, so nothing is sampled twice.

    python -m scripts.plan --script NAME --table KEY --row ROW ... --note NOTE ... -- [what the user gave]
"""

import argparse
import shlex
import shutil
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import OmegaConf
from torch import nn

from eval.macs import Macs, average, giga, step_macs
from eval.models import Config, build, example_inputs, family, load_config, rows_per_image
from sampling.cli import command
from sampling.options import DTYPES, CachePlan, add_cache_options, plan_cache
from sampling.settings import UserError

ROOT = Path(__file__).resolve().parent.parent
PAPER = ROOT / "results" / "paper" / "deepcache.yaml"
CONFIGS = {"ddpm": Path("configs/ddpm_cifar10.yaml"), "ldm": Path("configs/ldm_cin256.yaml")}
# The columns of the paper that can be ours, by key: heading, printed decimals.
COLUMNS = {"macs_G": ("MACs (G)", 2), "throughput_img_s": ("images/s", 3), "throughput": ("images/s", 3),
           "fid": ("FID", 2), "sfid": ("sFID", 2), "is": ("IS", 2), "precision": ("precision", 2),
           "recall": ("recall", 2)}
PASSED_ON = ("checkpoint", "labels", "batch_size", "device", "dtype", "threads", "compile")


class Row(NamedTuple):
    """One row of a table: what the paper printed, and how it is sampled here."""
    label: str
    paper: dict                 # the paper's row; {} where it has none
    config_path: Path
    config: Config
    steps: int
    plan: CachePlan
    folder: Path
    npz: Path | None            # in ADM's layout, for the ImageNet columns
    command: list[str]          # of the sampler, without "python"

    @property
    def size(self) -> int:
        """Bytes of an image's pixels."""
        stage = getattr(self.config, "first_stage", self.config.unet)
        return 3 * stage.resolution ** 2

    def macs(self) -> Macs:
        """The average over the steps, as the paper counts it: for one row of the network's batch."""
        full, cached = _step_macs(self.config_path, self.plan.branch or 0)
        return average(full, cached, self.plan.full_steps, self.steps)

    def packed(self) -> bool:
        """Whether the npz is there, and no older than the sample folder; a row without one is done."""
        run = self.folder / "run.json"
        return self.npz is None or (self.npz.exists()
                                    and not (run.exists() and run.stat().st_mtime > self.npz.stat().st_mtime))

    def present(self, images: int) -> int:
        """How many of the images are in the folder, by their number alone."""
        return min(images, sum(1 for _ in self.folder.glob("*/*.png")))


@cache
def _open(path: Path) -> tuple[Config, nn.Module]:
    config = load_config(path)
    return config, build(config)


@cache
def _step_macs(path: Path, branch: int) -> tuple[Macs, Macs]:
    config, unet = _open(path)
    return step_macs(unet, example_inputs(config), branch)


def folder_name(plan: CachePlan, steps: int, config: Config) -> str:
    """A short name of the settings: uncached, steps59, uniform_n5, centered_n20_c120_p1.4, uniform_n10_zeroed."""
    parts = []
    if plan.cached:
        s = plan.settings
        parts += [f"{s['schedule']}_n{s['interval']}"]
        parts += [f"c{s['center']}"] if s["center"] is not None else []
        parts += [f"p{s['power']:g}"] if s["power"] is not None else []
        parts += [f"branch{plan.branch}"] if plan.branch != config.sampler.branch else []
        parts += ["zeroed"] if s["zero_cache"] else []
    if steps != config.sampler.steps:
        parts.append(f"steps{steps}")
    return "_".join(parts) or "uncached"


def make_row(text: str, paper: dict[str, dict], args: argparse.Namespace, configs: dict[str, Path],
             seeds: str) -> Row:
    """Check one row of a script. Raises UserError."""
    label, package, *options = shlex.split(text)
    parser = argparse.ArgumentParser(prog=f"row {label!r}", allow_abbrev=False)
    parser.add_argument("--steps", type=int)
    add_cache_options(parser)
    given = parser.parse_args(options)
    config, unet = _open(configs[package])
    steps = config.sampler.steps if given.steps is None else given.steps
    plan = plan_cache(given, steps, unet.num_branches, config.sampler.branch)
    folder = args.samples / config.name / folder_name(plan, steps, config)
    npz = folder.with_name(f"{folder.name}_{args.images}.npz") if package == "ldm" else None
    # A row that is ours alone names the paper's row that it is to be compared with before a slash.
    return Row(label, paper.get(label.split(" / ")[0], {}), configs[package], config, steps, plan, folder, npz,
               ["-m", f"{package}.sample", "--config", str(configs[package]), *options, "--seeds", seeds,
                *passed_on(args, package), "--out", str(folder)])


def passed_on(args: argparse.Namespace, package: str) -> list[str]:
    """The user's options for a sampler."""
    flags = []
    for name in PASSED_ON:
        value = getattr(args, name)
        if value in (None, False) or (name == "labels" and package != "ldm"):
            continue
        flags += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return flags


def npz_command(row: Row, seeds: str) -> list[str]:
    return ["-m", "sampling.npz", "--samples", str(row.folder), "--seeds", seeds, "--out", str(row.npz)]


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def align(lines: list[list[str]]) -> str:
    """Columns, the first one to the left."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w)
                               for i, (cell, w) in enumerate(zip(line, widths, strict=True))).rstrip()
                     for line in lines)


def describe(rows: list[Row], images: int, seeds: str) -> str:
    """The plan: per row its steps, exact MACs, what is there, what is left and the disk it takes; then the commands."""
    lines = [["row", "full / calls", "MACs/step G", "MACs/image T", "images there", "calls left", "PNG up to", "npz"]]
    for row in rows:
        there = row.present(images)
        per_image = row.macs().hook * row.steps * rows_per_image(row.config)
        lines.append([row.label, f"{len(row.plan.full_steps)} / {row.steps}", f"{giga(row.macs().hook):.4f}",
                      f"{per_image / 1e12:.4f}", f"{there:,} of {images:,}", f"{(images - there) * row.steps:,}",
                      gigabytes(row.size * images), gigabytes(row.size * images) if row.npz else "-"])
    text = [align(lines), "",
            "Calls are of the U-Net, per image. With guidance each runs two rows of a batch: MACs/image counts both,",
            "MACs/step one, as the paper does. PNG: the size of the pixels; photographs take two thirds of it or so.",
            ""]
    for row in rows:
        text += [f"# {row.label}", shlex.join(["python", *row.command])]
        text += [shlex.join(["python", *npz_command(row, seeds)])] if row.npz else []
    return "\n".join(text)


def needed(rows: list[Row], images: int) -> int:
    """Bytes on the disk for what is not there yet, at most."""
    return sum(row.size * (images - row.present(images) + (0 if row.packed() else images))
               for row in rows)


def missing(rows: list[Row], args: argparse.Namespace) -> list[str]:
    """What a run lacks on this machine."""
    found = []
    for row in {row.config.name: row for row in rows}.values():
        checkpoint = args.checkpoint or Path(row.config.checkpoint)
        if not checkpoint.is_file():
            found.append(f"checkpoint {checkpoint} ({row.config_path} says where it comes from)")
    return found


def disk(rows: list[Row], args: argparse.Namespace) -> str:
    """What is needed, and whether it is there."""
    existing = next(path for path in [args.samples.absolute(), *args.samples.absolute().parents] if path.exists())
    free, size = shutil.disk_usage(existing).free, needed(rows, args.images)
    return (f"disk: up to {gigabytes(size)} for what is not there yet, {gigabytes(free)} free"
            + ("; it may not be enough" if size > free else ""))


def table(rows: list[Row]) -> str:
    """Paper, ours and difference of every row; a dash for what is not printed or not measured."""
    keys = ["macs_G", *(key for key in COLUMNS if key != "macs_G" and any(key in row.paper for row in rows))]
    lines = [["", "", *(COLUMNS[key][0] for key in keys)]]
    for row in rows:
        ours = {"macs_G": giga(row.macs().hook)}
        paper = {key: row.paper.get(key) for key in keys}
        difference = {key: round(ours[key], COLUMNS[key][1]) - paper[key] for key in ours if paper[key] is not None}

        def cells(values: dict, sign: str = "") -> list[str]:
            return [f"{values[key]:{sign}.{COLUMNS[key][1]}f}" if values.get(key) is not None else "-" for key in keys]

        lines += [[row.label, "paper", *cells(paper)], ["", "ours", *cells(ours)],
                  ["", "difference", *cells(difference, "+")]]
    return align(lines)


def run(rows: list[Row], seeds: str) -> None:
    """Sample each row and pack it; what is there is kept. Raises UserError for a row that fails."""
    for i, row in enumerate(rows):
        print(f"[{i + 1}/{len(rows)}] {row.label}", flush=True)
        _python(row, row.command)
        if not row.packed():
            _python(row, npz_command(row, seeds))


def _python(row: Row, line: list[str]) -> None:
    if subprocess.run([sys.executable, *line], cwd=ROOT).returncode:
        raise UserError(f"row {row.label!r} failed; to see it alone: {shlex.join(['python', *line])}")


def script_parser() -> argparse.ArgumentParser:
    """What a table script says."""
    parser = argparse.ArgumentParser(prog="scripts.plan", allow_abbrev=False)
    parser.add_argument("--script", required=True)
    parser.add_argument("--table", required=True, help="key of results/paper/deepcache.yaml")
    parser.add_argument("--row", action="append", required=True)
    parser.add_argument("--note", action="append", default=[])
    return parser


def user_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, allow_abbrev=False, description=(
        "Sample the rows of one table of the paper. A second run goes on where the first one stopped. Paths are "
        "relative to the repository."))
    parser.add_argument("--dry-run", action="store_true", help="print the plan and what is missing; do nothing")
    parser.add_argument("--images", type=int, default=50_000,
                        help="per row, seeds 0 to IMAGES - 1; a later run with more keeps them (default: %(default)s)")
    parser.add_argument("--only", action="append", metavar="ROW", help="this row (label or sample folder); repeatable")
    parser.add_argument("--samples", type=Path, default=Path("samples"),
                        help="where the sample folders are (default: %(default)s)")
    parser.add_argument("--config", type=Path, action="append", default=[],
                        help="another model for the rows of its package, to try the script out; repeatable")
    passed = parser.add_argument_group("passed on to the sampler, which has their defaults")
    passed.add_argument("--checkpoint", type=Path, help="weights, instead of the config's")
    passed.add_argument("--labels", help="balanced, random or a list; LDM only")
    passed.add_argument("--batch-size", type=int)
    passed.add_argument("--device")
    passed.add_argument("--dtype", choices=DTYPES)
    passed.add_argument("--threads", type=int)
    passed.add_argument("--compile", action="store_true")
    return parser


@command
def main() -> None:
    end = sys.argv.index("--")
    script = script_parser().parse_args(sys.argv[1:end])
    args = user_parser(f"bash scripts/{script.script}").parse_args(sys.argv[end + 1:])
    for name in ("images", "batch_size", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(args, name)}")
    if args.device is not None:
        try:
            torch.device(args.device)
        except RuntimeError:
            raise UserError(f"--device {args.device} is no device: cpu, cuda, cuda:1") from None
    configs = CONFIGS | {family(load_config(path)): path for path in args.config}

    printed = OmegaConf.to_container(OmegaConf.load(PAPER))[script.table]
    paper = {str(next(iter(row.values()))): row for row in printed}
    seeds = f"0-{args.images - 1}"
    rows = [make_row(text, paper, args, configs, seeds) for text in script.row]
    if args.checkpoint and len({row.config.name for row in rows}) > 1:
        raise UserError("--checkpoint is for tables of one model; this one has two: give each its own with --config")
    if args.only:
        unknown = set(args.only) - {key for row in rows for key in (row.label, row.folder.name)}
        if unknown:
            raise UserError(f"--only {unknown.pop()!r} is no row of this table: "
                            f"{'; '.join(f'{row.label} ({row.folder.name})' for row in rows)}")
        rows = [row for row in rows if {row.label, row.folder.name} & set(args.only)]

    print(f"{describe(rows, args.images, seeds)}\n\n{disk(rows, args)}")
    lacking = missing(rows, args)
    for thing in lacking:
        print(f"missing: {thing}")
    if not args.dry_run:
        if lacking:
            raise UserError(f"missing: {'; '.join(lacking)}")
        print(flush=True)
        run(rows, seeds)
    print(f"\n{table(rows)}\n")
    for note in script.note:
        print(textwrap.fill(f"* {note}", 118, subsequent_indent="  ", break_on_hyphens=False))
    print("Not measured here: all but the MACs. This script makes the images; the program that judges them is not part "
          "of it yet.")


if __name__ == "__main__":
    main()
