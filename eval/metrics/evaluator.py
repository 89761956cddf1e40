"""What the evaluators on Inception features share: command-line options, their checks, and scoring two sets."""

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eval.metrics.frechet import GROUPS
from eval.metrics.images import ImageSet, open_to_judge
from eval.metrics.measure import Sets, Unavailable
from eval.metrics.registry import SETS
from run import arguments
from run.results import Metric
from run.seeds import parse_seeds
from unet_caching.errors import UserError

VERSION = 1         # of all evaluators: another one where a number of the same images would be another
COUNT = 50_000      # images behind the published numbers


def add_options(parser: argparse.ArgumentParser) -> None:
    """--inception, --features, --batch-size, --device, --threads: of the extraction."""
    parser.add_argument("--inception", type=Path, required=True,
                        help="weights of the Inception network, a local file (eval/metrics/inception.py names two)")
    parser.add_argument("--features", type=Path, help="folder to keep features in (default: beside the images)")
    parser.add_argument("--batch-size", type=arguments.whole, default=64,
                        help="images at a time (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu, cuda, cuda:1 (default: %(default)s; under torchrun cuda is each process's own)")
    parser.add_argument("--threads", type=arguments.whole, help="CPU threads (default: all cores)")


def add_sample_options(parser: argparse.ArgumentParser) -> None:
    """--samples, --seeds, --count, --allow-fewer, --groups, --out: of what is judged."""
    parser.add_argument("--samples", type=Path, required=True, help="sample folder, folder of images, or npz (arr_0)")
    parser.add_argument("--seeds", help="exactly these, like 0-49999, whatever else is there (default: all)")
    parser.add_argument("--count", type=arguments.whole, default=COUNT,
                        help="images that must be there (default: %(default)s)")
    parser.add_argument("--allow-fewer", action="store_true",
                        help="judge fewer images, or an unfinished folder: not comparable with published numbers")
    parser.add_argument("--groups", type=arguments.whole, default=GROUPS,
                        help="of the jackknife for the errors of FID, sFID, recall (default: %(default)s; 0: none)")
    parser.add_argument("--out", type=arguments.out_file, help="JSON to write (run/results.py)")


def open_samples(args: argparse.Namespace) -> tuple[ImageSet, list[str]]:
    """The images to judge, and what must be said about them.

    Raises UserError for a folder that is unfinished, fewer than --count images without --allow-fewer, fewer than two.
    """
    if args.groups < 0 or args.groups == 1:
        raise UserError(f"--groups must be 2 or more, or 0 for no error, got {args.groups}")
    if args.count < 2:
        raise UserError(f"--count must be 2 or more, got {args.count}")
    images, notes = open_to_judge(args.samples, parse_seeds(args.seeds) if args.seeds else None,
                                  allow_fewer=args.allow_fewer)
    n = len(images)
    if n < 2:
        raise UserError(f"{images.description} has {n} image: a distance of sets needs at least 2")
    if n < args.count and not args.allow_fewer:
        raise UserError(f"{images.description} has {n} of the {args.count} images expected: sample the rest first, "
                        "name another --count, or pass --allow-fewer for a number that is not comparable")
    if n != args.count:
        notes.append(f"{n} images where {args.count} are expected: FID, sFID and recall of another number of images "
                     "are not comparable")
    return images, notes


def few(n: int, dims: int, what: str) -> list[str]:
    """A note where a covariance is singular."""
    return [f"{n} {what} for {dims} dimensions: the covariance is singular, and the Frechet distance mostly bias"
            ] if n <= dims else []


class Scores(NamedTuple):
    """metrics by name. details: what else there is to say of some, JSON-compatible. unavailable: reasons, by name.
    lines: all of it for the screen, by what a measure is called there.
    """
    metrics: dict[str, Metric]
    details: dict[str, Any]
    unavailable: dict[str, str]
    lines: dict[str, str]


def score(command: str, sets: Sets) -> Scores:
    """All that a command of eval/, adm or fid, prints of two sets."""
    found = Scores({}, {}, {}, {})
    for one in (one for one in SETS if command in one.commands):
        names = [measure.name for measure in one.measures]
        if sys.stderr.isatty():
            print(f"computing {' and '.join(names)}{one.slow}", file=sys.stderr, flush=True)
        try:
            scores = one.of(sets)
        except Unavailable as reason:
            found.unavailable.update(dict.fromkeys(names, str(reason)))
            found.lines.update({one.said.get(name, name): f"-   ({reason})" for name in names})
            continue
        for name, of in zip(names, scores, strict=True):
            found.metrics[name], found.lines[one.said.get(name, name)] = of.metric, of.line
            found.details.update({name: of.details} if of.details else {})
    return found
