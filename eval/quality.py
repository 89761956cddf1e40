"""The distance of a set of images from a set of real ones, on features of a small network.

    python -m eval.quality --samples samples/full --reference "emoji:Smileys & Emotion" --out results/full_quality.json

FD-EffLite0: Frechet distance in the first 64 principal directions of the reference. KID-EffLite0: unbiased kernel
distance on all 1280 features. Both have error bars, and beside them the distance of as many real images.
These are not FID and KID of the literature, which use another network. Compare FD only between equal numbers of images.
--extractor incmixed5 uses another network, InceptionV3 up to its block mixed5 (FD-IncMixed5, KID-IncMixed5), to see
whether a result depends on the network. Fetch it with bash scripts/download.sh incmixed5.
--against FOLDER, with the same seeds, gives the difference of the two runs' distances with a paired interval. Two runs
may differ significantly although their own intervals overlap.
"""

import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.metrics.evaluator import Judged
from eval.metrics.features import SmallExtractor, features_of
from eval.metrics.images import ImageSet, check_paired
from eval.metrics.measure import Measure, shown
from eval.metrics.registry import EXTRACTORS, SMALL_MEASURES, SMALL_SETS
from eval.metrics.results import of_samples
from eval.metrics.small_sets import FrechetInBasis, KernelDistance, nearest_distances, real_floor
from eval.metrics.sources import open_reference
from run.cli import command, warn
from run.machine import Device
from run.results import Metric
from unet_caching.errors import UserError
from unet_caching.options import option, required

FD, KID = FrechetInBasis.named("EffLite0").name, KernelDistance.named("EffLite0").name


@dataclass(frozen=True)
class Options(Judged):
    reference: str = required("emoji:GROUP (or GROUP,GROUP or all), a folder of PNGs, or an npz")
    against: Path | None = option(None, "folder or npz of the same seeds: print the difference, too")
    count: int | None = option(None, "the fewest images there must be")
    extractor: str = option("efflite0", "network of the features (default: %(default)s)", choices=tuple(EXTRACTORS))
    dims: int = option(64, "principal directions of FD (default: %(default)s)")
    repeats: int = option(200, "subsets per error bar (default: %(default)s)", least=2)
    batch_size: int = option(32, "images at a time (default: %(default)s)", least=1)


def quality(samples: ImageSet, reference: ImageSet, extractor: SmallExtractor, held_out: ImageSet | None = None,
            dims: int = 64, repeats: int = 200, batch_size: int = 32, with_floors: bool = True,
            against: ImageSet | None = None) -> dict:
    """The distances of samples from a reference, with errors, floors and nearest neighbours, JSON-compatible.

    dims: of the PCA basis. repeats: subsets per error bar, and half as many for each floor. with_floors: floors take
    most of the time, and sets of equal size need them only once. against: a set of the same seeds; `difference` is then
    the distances of samples minus the distances of `against`, paired: {by name: {value, stderr, interval}, against}.
    """
    if against is not None:
        check_paired(samples, against)
    x, y, *more = (features_of(images, extractor, batch_size)
                   for images in (samples, reference, held_out, against) if images is not None)
    held = more[0] if held_out is not None else None
    own, real, *rest = (features.all() for features in (x, y, *more))          # read from disk once
    unseen = rest[0] if held else None
    distances = [distance(real, dims, extractor.name) for distance in SMALL_SETS]
    floors = [real_floor(distances, own, one, repeats // 2) for one in ((None, unseen) if held else (None,))
              ] if with_floors else []
    nearest = {"samples": _nearest(own, real)}
    if unseen is not None:
        nearest["held_out"] = _nearest(unseen, real)
    found = {
        **{one.measure.name: {**one.estimate(own, repeats), **one.about} for one in distances},
        "floors": floors,
        "nearest_reference": nearest,
        "samples": _described(samples, x.images_sha256),
        "reference": _described(reference, y.images_sha256),
        "held_out": _described(held_out, held.images_sha256) if held_out is not None and held else None,
        "extractor": extractor.id,
    }
    if against is not None:
        found["difference"] = {
            **{one.measure.name: one.difference(own, rest[-1], repeats) for one in distances},
            "against": _described(against, more[-1].images_sha256)}
    return found


def metrics(result: dict) -> dict[str, Metric]:
    """The distances in a result of `quality`, or in its `difference`."""
    return {measure.name: Metric.of(result[measure.name]) for measure in measures(result)}


def measures(result: dict) -> list[Measure]:
    """The measures in a result of `quality`."""
    return [measure for measure in SMALL_MEASURES if measure.name in result]


def hashes(result: dict) -> dict[str, str]:
    """The sha256 of the images, the reference and the extractor in a result of `quality`."""
    return {"images": result["samples"]["sha256"], "reference": result["reference"]["sha256"],
            "extractor": result["extractor"]}


def _nearest(features: np.ndarray, reference: np.ndarray) -> dict:
    """Quantiles of the distance to the nearest reference image. Far below held-out images' they mean copies."""
    distances = nearest_distances(features, reference)
    quantiles = {"min": 0, "5%": 0.05, "median": 0.5, "95%": 0.95}
    return {name: float(np.quantile(distances, q)) for name, q in quantiles.items()}


def _described(images: ImageSet, digest: str) -> dict:
    return {"from": images.description, "images": len(images), "size": list(images.size), "sha256": digest}


def table(result: dict) -> str:
    """The numbers as a few lines of text."""
    lines = [f"{result['samples']['images']} images against {result['reference']['images']} of "
             f"{result['reference']['from']}"]

    shown_here = measures(result)

    def row(label: str, cells: Iterable[str]) -> None:
        lines.append(f"{label:44}" + "".join(f"  {cell:>{max(20, len(measure.heading))}}"
                                             for measure, cell in zip(shown_here, cells, strict=True)))

    def spread(numbers: dict, centre: str, ends: str, form: str) -> Iterable[str]:
        return (form.format(*(measure.scale * v for v in (numbers[measure.name][centre], *numbers[measure.name][ends])))
                for measure in shown_here)

    row("", (measure.heading for measure in shown_here))
    row(f"all {result['samples']['images']} images", (shown(metric, 2, measure.scale) for measure, metric in zip(
        shown_here, metrics(result).values(), strict=True)))
    for floor in result["floors"]:
        sizes = f"{floor['n']} against {floor['reference_n']}"
        real, samples = ({name: floor[name][kind] for name in metrics(result)} for kind in ("real", "samples"))
        row(f"  real ({floor['kind']}), {sizes}", spread(real, "mean", "range", "{:.2f} [{:.2f} {:.2f}]"))
        # The samples' error is in the first row; this range may not include it.
        row(f"  samples, {sizes}", (f"{measure.scale * samples[measure.name]['mean']:.2f}" for measure in shown_here))
    if by := result.get("difference"):
        row(f"minus {Path(by['against']['from']).name}, paired by seed",
            spread(by, "value", "interval", "{:+.2f} [{:+.2f} {:+.2f}]"))
    near = result["nearest_reference"]
    lines.append("distance to the nearest reference image, median (5%): "
                 + ", ".join(f"{name.replace('_', '-')} {q['median']:.2f} ({q['5%']:.2f})" for name, q in near.items()))
    return "\n".join(lines)


@command
def main(options: Options, where: Device) -> None:
    started, device = time.time(), where.prepare()
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    samples, notes = options.open(count=options.count)
    against = None
    if options.against:
        against, of_against = options.open(options.against)
        notes += of_against
    reference, held_out = open_reference(options.reference, samples.size)
    if len(samples) < 3:
        raise UserError(f"{options.samples} has {len(samples)} images: distances with errors need at least 3")
    extractor = EXTRACTORS[options.extractor](device)
    warn(notes)
    result = quality(samples, reference, extractor, held_out, options.dims, options.repeats, options.batch_size,
                     against=against)
    print(table(result))
    options.write(of_samples("quality", samples, metrics(result), device, hashes=hashes(result), started=started,
                             inputs={"reference": options.reference},
                             details=result | ({"notes": notes} if notes else {})))


if __name__ == "__main__":
    main()
