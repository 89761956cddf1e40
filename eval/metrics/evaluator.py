"""What the evaluators share: the options of what is judged, and the judging of two sets on Inception features."""

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
    """Which images are judged, and where the number goes."""
    title: ClassVar[str] = "what is judged"
    samples: Path = required("sample folder, folder of images, or npz (arr_0)")
    seeds: str | None = option(None, "exactly these, like 0-49999, whatever else is there (default: all)")
    allow_fewer: bool = option(False, "judge fewer images, or an unfinished folder; the result says so")
    out: Path | None = option(None, "JSON to write (run/results.py)", type=arguments.out_file)

    def open(self, path: Path | None = None, count: int | None = None) -> tuple[ImageSet, list[str]]:
        """The images (of another path, for what they are compared with), and what must be said about them.

        count: at least so many must be there. Raises UserError for fewer, and for an unfinished folder unless --seeds
        says that just these are meant; --allow-fewer takes both as they are.
        """
        images = open_images(path or self.samples, parse_seeds(self.seeds) if self.seeds else None)
        if count is not None and len(images) < count and not self.allow_fewer:
            raise UserError(f"{images.description} has {len(images)} of the {count} images expected: sample the rest "
                            "first, name another --count, or pass --allow-fewer for a number that is not comparable")
        return images, [] if self.seeds else check_finished(images, self.allow_fewer)

    def write(self, result: Result) -> None:
        if self.out:
            results.write(self.out, result)
            print(f"wrote {self.out}")


@dataclass(frozen=True)
class OfSets(Judged):
    """A set of images that is judged as a whole."""
    count: int = option(COUNT, "images that must be there (default: %(default)s)", least=2)

    def open_all(self) -> tuple[ImageSet, list[str]]:
        """As `open`; raises UserError for fewer images than --count without --allow-fewer, and for fewer than two."""
        images, notes = self.open(count=self.count)
        n = len(images)
        if n < 2:
            raise UserError(f"{images.description} has {n} image: a distance of sets needs at least 2")
        if n != self.count:
            notes.append(f"{n} images where {self.count} are expected: FID, sFID and recall of another number of "
                         "images are not comparable")
        return images, [*notes, *few(n, "images")]


@dataclass(frozen=True)
class Extraction:
    """How Inception features are computed."""
    title: ClassVar[str] = "the features"
    inception: Path = required("weights of the Inception network, a local file (eval/metrics/inception.py names two)")
    batch_size: int = option(64, "images at a time (default: %(default)s)", least=1)


def few(n: int, what: str) -> list[str]:
    """A note where the covariance of n images is singular."""
    dims = DIMS["pool"]
    return [f"{n} {what} for {dims} dimensions: the covariance is singular, and the Frechet distance mostly bias"
            ] if n <= dims else []


@dataclass
class Real:
    """Real images that others are judged against. Raises UserError, where it is opened, for what cannot be that."""
    path: Path
    mode: str                                   # how images are prepared, of eval.metrics.inception.MODES
    layers: tuple[str, ...]                     # of Inception
    statistics: Mapping[str, tuple[np.ndarray, np.ndarray]] | None      # (mean, covariance) by layer; of the images
    images: ImageSet | None                     # themselves
    name: str = "{}"                            # of a metric
    weights: str | None = None                  # sha256 of the network that the statistics are of, where known
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Mapping[str, np.ndarray]]:
    """The arrays of an npz. Raises UserError for a file that is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            yield file
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, AttributeError, zlib.error) as error:
        raise UserError(f"{path} is damaged or no reference: {one_line(error)[:200]}") from None


def read_statistics(path: Path, keys: Mapping[str, tuple[str, str]]) -> dict[str, tuple[np.ndarray, np.ndarray]] | None:
    """(mean, covariance) by layer, from an npz; None where it has none. keys: by layer, how they are called there.

    Raises UserError for a file that has some of them, of other shapes, or not finite.
    """
    with opened(path) as file:
        missing = [key for pair in keys.values() for key in pair if key not in file]
        if len(missing) == 2 * len(keys):
            return None
        if missing:
            raise UserError(f"{path} has no {' and '.join(missing)}, which belong to the others of a reference")
        statistics = {layer: (file[mu], file[sigma]) for layer, (mu, sigma) in keys.items()}
    for layer, (mu, sigma) in statistics.items():
        d = DIMS[layer]
        if mu.shape != (d,) or sigma.shape != (d, d) or not np.isfinite(mu).all() or not np.isfinite(sigma).all():
            raise UserError(f"{path}: {' and '.join(keys[layer])} are {list(mu.shape)} and {list(sigma.shape)}: "
                            f"expected [{d}] and [{d}, {d}], all finite")
    return statistics


def judge(command: str, options: OfSets, extraction: Extraction, where: Device,
          open_real: Callable[[ImageSet], Real]) -> None:
    """Score samples against real images, print it and write it: eval.adm and eval.fid. Raises UserError."""
    started, device = time.time(), where.prepare()
    samples, notes = options.open_all()
    real = open_real(samples)
    inception = Inception(extraction.inception, real.mode, real.layers, device)
    if real.weights not in (None, inception.sha256):
        raise UserError(f"{real.path} was made with other Inception weights (sha256 {real.weights[:16]}; "
                        f"--inception is {inception.sha256[:16]}): make it anew with these, or take its own")
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
    """What a command of eval/, adm or fid, tells of two sets: metrics, why others cannot be had, and both as text.

    called: what the number of a measure may be called.
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
