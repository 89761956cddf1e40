"""FID, sFID, IS, precision and recall by the conventions of ADM's evaluator (github openai/guided-diffusion).

    python -m eval.adm --samples samples/cin256_n10 --reference VIRTUAL_imagenet256_labeled.npz \\
        --inception weights-inception-2015-12-05-6726825d.pth --out results/cin256_n10_adm.json
    torchrun --nproc-per-node 4 -m eval.adm ...        # the extraction shared by 4 GPUs

Images are brought to 299 pixels as TensorFlow 1 does. FID and sFID are against the means and covariances in the
reference file (mu, sigma; mu_s, sigma_s), precision and recall (k = 3) against its images (arr_0, 10,000), as is KID.
The Inception Score is the mean over consecutive blocks of 5000 images in the order of the seeds, unshuffled: it depends
on that order, and images sorted by class score far lower. Differences from the original: statistics in float64, and
distances of precision and recall in float32, not float16.
Errors (95%) are over draws of the samples, reference held fixed: of FID, sFID and recall by a jackknife over groups
of them (--groups), of IS from its blocks (Student's), of precision binomial.
Features are kept beside the images (0.02 MB an image), so that a second call takes minutes.
"""

import argparse
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from eval.metrics import evaluator
from eval.metrics.extract import extract
from eval.metrics.images import ImageSet, open_images
from eval.metrics.inception import DIMS, Inception
from eval.metrics.measure import Sets
from eval.tables.results import of_samples
from run import results
from run.cli import command, warn
from run.machine import check_counts, prepare_device
from run.seeds import rank_and_world
from run.weights import sha256
from unet_caching.errors import UserError, one_line

LAYERS = ("pool", "logits", "spatial")
_KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


class Reference(NamedTuple):
    """images: arr_0. statistics: (mean, covariance) by layer as the file has them; None where it has none."""
    images: ImageSet
    statistics: dict[str, tuple[np.ndarray, np.ndarray]] | None


def open_reference(path: Path) -> Reference:
    """A reference file of ADM: arr_0 uint8 NHWC, and mu, sigma, mu_s, sigma_s, all of them or none.

    Raises UserError for a file that is damaged or has other shapes.
    """
    if not path.is_file():
        raise UserError(f"no reference {path}: ADM's for ImageNet 256 is VIRTUAL_imagenet256_labeled.npz, at "
                        "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
                        "VIRTUAL_imagenet256_labeled.npz")
    images = open_images(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            wanted = [key for keys in _KEYS.values() for key in keys]
            missing = [key for key in wanted if key not in file]
            if len(missing) == len(wanted):
                return Reference(images, None)
            if missing:
                raise UserError(f"{path} lacks {', '.join(missing)}: a reference of ADM has {', '.join(wanted)} and "
                                "arr_0")
            found = {layer: (file[mu], file[sigma]) for layer, (mu, sigma) in _KEYS.items()}
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged: {one_line(error)}") from None
    for layer, (mu, sigma) in found.items():
        d = DIMS[layer]
        if mu.shape != (d,) or sigma.shape != (d, d) or not np.isfinite(mu).all() or not np.isfinite(sigma).all():
            raise UserError(f"{path}: {' and '.join(_KEYS[layer])} are {list(mu.shape)} and {list(sigma.shape)}: "
                            f"expected [{d}] and [{d}, {d}], all finite")
    return Reference(images, found)


def table(scores: evaluator.Scores, samples: int, reference: int, name: Callable[[str], str] = str) -> str:
    """For people. name: what a number may be called."""
    lines = {name(said): line for said, line in scores.lines.items()}
    width = 2 + max(map(len, lines))
    return "\n".join([f"{samples} samples; precision, recall and KID against {reference} images",
                      *(f"{said:{width}}{line}" for said, line in lines.items())])


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    evaluator.add_sample_options(parser)
    parser.add_argument("--reference", type=Path, required=True, help="reference npz of ADM")
    evaluator.add_options(parser)
    args = parser.parse_args()
    check_counts(batch_size=args.batch_size)
    started, device = time.time(), prepare_device(args.device, args.threads)
    samples, notes = evaluator.open_samples(args)
    reference = open_reference(args.reference)
    if reference.images.size != samples.size:
        h, w = reference.images.size
        raise UserError(f"the samples are {samples.size[1]}x{samples.size[0]} pixels and {args.reference} is {w}x{h}: "
                        "take the reference of the samples' size")
    inception = Inception(args.inception, "adm", LAYERS, device)
    if not reference.statistics:
        notes.append(f"{args.reference} has no mu and sigma: those of its {len(reference.images)} images are used")
        notes += evaluator.few(len(reference.images), DIMS["pool"], "reference images")
    notes += evaluator.few(len(samples), DIMS["pool"], "images") + inception.notes
    rank, _ = rank_and_world()
    if not rank:
        warn(notes)
    x, y = (extract(images, inception, args.batch_size, args.features, share=True)
            for images in (samples, reference.images))
    if x is None or y is None:          # the work of rank 0
        return
    scores = evaluator.score("adm", Sets(x, reference.statistics, y, args.groups))
    print(table(scores, len(samples), len(reference.images), inception.name))
    if args.out:
        metrics = {inception.name(name): metric for name, metric in scores.metrics.items()}
        results.write(args.out, of_samples(
            "adm", samples, metrics, device, started=started, inputs={"reference": str(args.reference)},
            hashes={"reference": sha256(args.reference), "extractor": inception.sha256, "images": x.images_sha256},
            details={**scores.details, "unavailable": scores.unavailable, "notes": notes, "extractor": inception.id,
                     "reference_images": len(reference.images), "groups": args.groups}))
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
