"""FID, sFID, IS, precision and recall by the conventions of ADM's evaluator (github openai/guided-diffusion).

    python -m eval.adm --samples samples/cin256_n10 --reference VIRTUAL_imagenet256_labeled.npz \\
        --inception weights-inception-2015-12-05-6726825d.pth --out results/cin256_n10_adm.json
    torchrun --nproc-per-node 4 -m eval.adm ...        # the extraction shared by 4 GPUs

Images are brought to 299 pixels as TensorFlow 1 does. FID and sFID are against the means and covariances in the
reference file (mu, sigma; mu_s, sigma_s), precision and recall (k = 3) against its images (arr_0, 10,000), as is KID.
The Inception Score is the mean over consecutive blocks of 5000 images in the order of the seeds, unshuffled: it depends
on that order, and images sorted by class score far lower. Differences from the original: statistics in float64, and
distances of precision and recall in float32, not float16, which moves these two by 0.002 to 0.0035.
Errors (95%): FID, sFID by a jackknife over groups of samples, reference held fixed; IS from its blocks; precision and
recall binomial. Features are kept beside the images (0.02 MB an image), so that a second call takes minutes.
"""

import argparse
import sys
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from eval.metrics import options, statistics
from eval.metrics.extract import Features, extract
from eval.metrics.images import ImageSet, open_images
from eval.metrics.inception import DIMS, Inception
from eval.tables.results import of_samples
from runs import results
from runs.cli import command
from runs.errors import UserError, one_line
from runs.options import prepare_device
from runs.seeds import rank_and_world
from runs.weights import sha256

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
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, zipfile.zlib.error) as error:
        raise UserError(f"{path} is damaged: {one_line(error)}") from None
    for layer, (mu, sigma) in found.items():
        d = DIMS[layer]
        if mu.shape != (d,) or sigma.shape != (d, d) or not np.isfinite(mu).all() or not np.isfinite(sigma).all():
            raise UserError(f"{path}: {' and '.join(_KEYS[layer])} are {list(mu.shape)} and {list(sigma.shape)}: "
                            f"expected [{d}] and [{d}, {d}], all finite")
    return Reference(images, found)


class Scores(NamedTuple):
    """metrics by name; details: what else there is to say, JSON-compatible; unavailable: reasons, by name."""
    metrics: dict[str, results.Metric]
    details: dict
    unavailable: dict[str, str]


def score(samples: Features, reference: Features, known: dict[str, tuple[np.ndarray, np.ndarray]] | None,
          groups: int = statistics.GROUPS) -> Scores:
    """All metrics of features with the layers pool, logits and spatial.

    known: the reference's mean and covariance by layer (default: of `reference`).
    """
    metrics, unavailable = {}, {}
    for name, layer in (("FID", "pool"), ("sFID", "spatial")):
        _say(name)
        mu, sigma = known[layer] if known else statistics.Moments(reference.parts(layer)).statistics()
        metrics[name] = options.metric(statistics.frechet(samples.parts(layer), mu, sigma, groups))
    _say("IS")
    inception_score = statistics.inception_score(samples.parts("logits"))
    metrics["IS"] = options.metric(inception_score.estimate)
    details = {"IS": {"deviation": inception_score.deviation, "blocks": inception_score.blocks,
                      "images_per_block": statistics.SPLIT, "order": "as the samples lie, not shuffled"}}
    x, y = samples.all("pool"), reference.all("pool")
    if min(len(x), len(y)) > statistics.NEIGHBOURS:
        _say("precision and recall (minutes on a CPU)")
        for name, share in zip(("precision", "recall"), statistics.precision_recall(x, y), strict=True):
            metrics[name] = results.Metric(share.value, share.interval, share.stderr)
    else:
        unavailable |= dict.fromkeys(("precision", "recall"), f"they need more than {statistics.NEIGHBOURS} images")
    _say("KID")
    kid = statistics.kid(x, y)
    metrics["KID"] = results.Metric(kid.mean)
    details["KID"] = {"deviation": kid.deviation, "images_per_subset": kid.size, "against": "the reference's images"}
    return Scores(metrics, details, unavailable)


def _say(what: str) -> None:
    if sys.stderr.isatty():
        print(f"computing {what}", file=sys.stderr, flush=True)


def table(scores: Scores, samples: int, reference: int) -> str:
    """For people."""
    m, score_is, kid = scores.metrics, scores.details["IS"], scores.details["KID"]
    lines = [f"{samples} samples; precision, recall and KID against {reference} images",
             f"FID         {options.shown(m['FID'])}",
             f"sFID        {options.shown(m['sFID'])}",
             f"IS          {options.shown(m['IS'], 2)}   ({len(score_is['blocks'])} blocks in order, deviation "
             f"{score_is['deviation']:.2f})"]
    lines += [f"{name:12}{options.shown(m[name])}" if name in m else f"{name:12}-   ({scores.unavailable[name]})"
              for name in ("precision", "recall")]
    lines.append(f"KID x 1000  {1000 * m['KID'].value:.4f}   (deviation of a subset of {kid['images_per_subset']}: "
                 f"{1000 * kid['deviation']:.4f})")
    return "\n".join(lines)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_sample_options(parser)
    parser.add_argument("--reference", type=Path, required=True, help="reference npz of ADM")
    options.add_options(parser)
    args = parser.parse_args()
    started, device = time.time(), prepare_device(args)
    samples, notes = options.open_samples(args)
    reference = open_reference(args.reference)
    if reference.images.size != samples.size:
        h, w = reference.images.size
        raise UserError(f"the samples are {samples.size[1]}x{samples.size[0]} pixels and {args.reference} is {w}x{h}: "
                        "take the reference of the samples' size")
    inception = Inception(args.inception, "adm", LAYERS, device)
    if not reference.statistics:
        notes.append(f"{args.reference} has no mu and sigma: those of its {len(reference.images)} images are used")
        notes += options.few(len(reference.images), DIMS["pool"], "reference images")
    notes += options.few(len(samples), DIMS["pool"], "images") + inception.notes
    rank, _ = rank_and_world()
    if not rank:
        print("".join(f"warning: {note}\n" for note in notes), end="", file=sys.stderr, flush=True)
    x, y = (extract(images, inception, args.batch_size, args.features, share=True)
            for images in (samples, reference.images))
    if rank:
        return
    scores = score(x, y, reference.statistics, args.groups)
    print(table(scores, len(samples), len(reference.images)))
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
