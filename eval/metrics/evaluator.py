"""What the evaluators share: options, opening the images, and scores of two sets on Inception features."""

import contextlib
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from eval.metrics.extract import extract
from eval.metrics.images import ImageSet, check_finished, open_images
from eval.metrics.inception import DIMS, Inception
from eval.metrics.inception_scores import in_order
from eval.metrics.measure import Sets, Unavailable, shown
from eval.metrics.registry import SETS
from eval.metrics.results import of_samples
from run import arguments, results
from run.cli import warn
from run.machine import Device
from run.results import Metric, Result
from run.seeds import parse_seeds
from run.weights import sha256
from unet_caching.errors import UserError, one_line
from unet_caching.options import option, required

COUNT = 50_000      # images behind the published numbers


@dataclass(frozen=True)
class Judged:
    """The images to judge, and the file for the result."""
    title: ClassVar[str] = "the images to judge"
    samples: Path = required("sample folder, folder of images, or npz (arr_0)")
    seeds: str | None = option(None, "exactly these, like 0-49999; other images are ignored (default: all)")
    allow_fewer: bool = option(False, "judge fewer images, or an unfinished folder; the result says so")
    out: Path | None = option(None, "JSON to write (run/results.py)", type=arguments.out_file)

    def open(self, path: Path | None = None, count: int | None = None) -> tuple[ImageSet, list[str]]:
        """The images of --samples or of another path, and notes about them.

        count: the fewest images. Raises UserError for fewer, and for an unfinished folder unless --seeds names its
        images. With --allow-fewer both are notes.
        """
        images = open_images(path or self.samples, parse_seeds(self.seeds) if self.seeds else None)
        if count is not None and len(images) < count and not self.allow_fewer:
            raise UserError(f"{images.description} has {len(images)} of {count} images: sample the rest first, pass "
                            "another --count, or pass --allow-fewer for a number that is not comparable")
        return images, [] if self.seeds else check_finished(images, self.allow_fewer)

    def write(self, result: Result) -> None:
        if self.out:
            results.write(self.out, result)
            print(f"wrote {self.out}")


@dataclass(frozen=True)
class OfSets(Judged):
    """A set of images that is judged as a whole."""
    count: int = option(COUNT, "how many images there must be (default: %(default)s)", least=2)

    def open_all(self) -> tuple[ImageSet, list[str]]:
        """As `open` with --count. Raises UserError for fewer than two images, with --allow-fewer, too."""
        images, notes = self.open(count=self.count)
        n = len(images)
        if n < 2:
            raise UserError(f"{images.description} has {n} image: a distance of sets needs at least 2")
        if n != self.count:
            notes.append(f"{n} images instead of {self.count}: FID, sFID and recall of different numbers of images are "
                         "not comparable")
        return images, [*notes, *few(n, "images")]


@dataclass(frozen=True)
class Extraction:
    """How Inception features are computed."""
    title: ClassVar[str] = "Inception features"
    inception: Path = required("weights of the Inception network, a local file (eval/metrics/inception.py names two)")
    batch_size: int = option(64, "images at a time (default: %(default)s)", least=1)


def few(n: int, what: str) -> list[str]:
    """A note if the covariance of n images is singular."""
    dims = DIMS["pool"]
    return [f"{n} {what} for {dims} dimensions: the covariance is singular, and the Frechet distance mostly bias"
            ] if n <= dims else []


@dataclass
class Real:
    """The reference: real images that samples are judged against."""
    path: Path
    mode: str                                   # how images are prepared, one of eval.metrics.inception.MODES
    layers: tuple[str, ...]                     # of Inception
    statistics: Mapping[str, tuple[np.ndarray, np.ndarray]] | None      # (mean, covariance) by layer
    images: ImageSet | None
    name: str = "{}"                            # format of a metric's name
    weights: str | None = None                  # sha256 of the network behind the statistics, if known
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Mapping[str, np.ndarray]]:
    """The arrays of an npz. Raises UserError for a damaged file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            yield file
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, AttributeError, zlib.error) as error:
        raise UserError(f"{path} is damaged or not a reference: {one_line(error)[:200]}") from None


def read_statistics(path: Path, keys: Mapping[str, tuple[str, str]]) -> dict[str, tuple[np.ndarray, np.ndarray]] | None:
    """(mean, covariance) by layer, from an npz; None if it has none of them. keys: their names there, by layer.

    Raises UserError if only some of them are in the file, or if one has another shape or is not finite.
    """
    with opened(path) as file:
        missing = [key for pair in keys.values() for key in pair if key not in file]
        if len(missing) == 2 * len(keys):
            return None
        if missing:
            raise UserError(f"{path} has no {' and '.join(missing)}, but other statistics of a reference: it needs all "
                            "of them or none")
        statistics = {layer: (file[mu], file[sigma]) for layer, (mu, sigma) in keys.items()}
    for layer, (mu, sigma) in statistics.items():
        d = DIMS[layer]
        if mu.shape != (d,) or sigma.shape != (d, d) or not np.isfinite(mu).all() or not np.isfinite(sigma).all():
            raise UserError(f"{path}: {' and '.join(keys[layer])} are {list(mu.shape)} and {list(sigma.shape)}: "
                            f"expected [{d}] and [{d}, {d}], all finite")
    return statistics


def judge(command: str, options: OfSets, extraction: Extraction, where: Device,
          open_real: Callable[[ImageSet], Real]) -> None:
    """Score samples against real images, print the scores and write them, for eval.adm and eval.fid."""
    started, device = time.time(), where.prepare()
    samples, notes = options.open_all()
    real = open_real(samples)
    inception = Inception(extraction.inception, real.mode, real.layers, device)
    if real.weights not in (None, inception.sha256):
        raise UserError(f"{real.path} was made with other Inception weights (sha256 {real.weights[:16]}; "
                        f"--inception has {inception.sha256[:16]}): make it again with these weights, or pass its own "
                        "to --inception")
    notes += [*real.notes, *inception.notes]
    warn(notes)
    x, *real_features = (extract(images, inception, extraction.batch_size)
                         for images in (samples, real.images) if images is not None)
    if "logits" in real.layers:
        warn(order := in_order(x.parts("logits")))
        notes += order
    metrics, unavailable, lines = scores(command, Sets(x, real.statistics, *real_features),
                                         lambda name: inception.name(real.name.format(name)))
    width = 2 + max(map(len, lines))
    print("\n".join([f"{len(samples)} samples against {real.path}",
                     *(f"{name:{width}}{line}" for name, line in lines.items())]))
    options.write(of_samples(
        command, samples, metrics, device, started=started, inputs={"reference": str(real.path)},
        hashes={"reference": sha256(real.path), "extractor": inception.sha256, "images": x.images_sha256},
        details={**real.details, "unavailable": unavailable, "notes": notes, "extractor": inception.id}))


def scores(command: str, sets: Sets, called: Callable[[str], str]
           ) -> tuple[dict[str, Metric], dict[str, str], dict[str, str]]:
    """The metrics of two sets that a command prints, the reasons for missing ones, and both as text, all by name.

    command: adm or fid. called: turns the name of a measure into the name of its number.
    """
    metrics, unavailable = dict[str, Metric](), dict[str, str]()
    for one in (one for one in SETS if command in one.commands):
        names = [called(measure.name) for measure in one.measures]
        if sys.stderr.isatty():
            print(f"computing {' and '.join(names)}{one.slow}", file=sys.stderr, flush=True)
        try:
            metrics |= dict(zip(names, one.of(sets), strict=True))
        except Unavailable as reason:
            unavailable |= dict.fromkeys(names, str(reason))
    lines = {name: f"{shown(metric)}   ({sets.samples.count:,} images)" for name, metric in metrics.items()}
    return metrics, unavailable, lines | {name: f"-   ({reason})" for name, reason in unavailable.items()}
