"""FID by the convention of pytorch-fid, and by clean-fid's: CIFAR-10 and LSUN in the papers' tables.

    python -m eval.fid make-reference --from cifar-10-batches-py --out cifar10_train.npz --inception FILE
    python -m eval.fid make-reference --from bedroom_train_lmdb --count 50000 --out bedroom.npz --inception FILE
    python -m eval.fid --samples samples/cifar10_n5 --reference cifar10_train.npz --inception FILE --out results/x.json
    torchrun --nproc-per-node 4 -m eval.fid ...        # the extraction shared by 4 GPUs; make-reference too

How images are brought to 299 pixels decides the number. The modes:
    pytorch-fid         PyTorch's bilinear, no antialias
    clean               clean-fid: Pillow's bicubic with antialias
    legacy_pytorch      clean-fid's version of pytorch-fid
    legacy_tensorflow   TensorFlow 1's bilinear: the original FID
Resizing for `clean` and `legacy_pytorch` is done by clean-fid's functions. The network is that of --inception in every
mode; clean-fid takes another file of the same weights for `clean` and `legacy_tensorflow`.
A reference remembers its mode, network, number and size of images, and judges samples in that mode; several references
give several columns. A published file with nothing but mu and sigma serves too, in the mode that --mode says.
Errors (95%): a jackknife over groups of samples, reference held fixed. KID is against the features in the reference.
"""

import argparse
import sys
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.metrics import evaluator
from eval.metrics.extract import Features, extract
from eval.metrics.frechet import Moments
from eval.metrics.images import ImageSet
from eval.metrics.inception import DIMS, Inception, NoLibrary
from eval.metrics.measure import Sets
from eval.metrics.sources import open_source
from eval.tables.results import of_samples
from run import arguments, results
from run.cli import command, warn
from run.files import write_atomically
from run.machine import check_counts, prepare_device
from run.seeds import rank_and_world
from run.weights import sha256
from unet_caching.errors import UserError, one_line

FORMAT = 1              # of references
KEPT = 10_000           # features kept in a reference, for KID
# The names of results: only pytorch-fid's are FID and KID without a word before them.
NAMES = {"pytorch-fid": "{}", "clean": "clean-{}", "legacy_pytorch": "{} (clean-fid, legacy_pytorch)",
         "legacy_tensorflow": "{} (clean-fid, legacy_tensorflow)"}


@dataclass
class Reference:
    """Statistics of real images. mu: [2048]; sigma: [2048, 2048]. What a published file does not say is None.

    extractor_sha256: of the weights. size: (height, width). features: float32 [at most 10,000, 2048], drawn at random.
    """
    path: Path
    mu: np.ndarray
    sigma: np.ndarray
    mode: str | None = None
    extractor_sha256: str | None = None
    count: int | None = None
    size: tuple[int, int] | None = None
    features: np.ndarray | None = None
    source: str | None = None


def read_reference(path: Path) -> Reference:
    """Raises UserError for a file that is missing, damaged or no such statistics."""
    if not path.is_file():
        raise UserError(f"no reference {path}: make it with python -m eval.fid make-reference")
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in ("mu", "sigma") if key not in file]
            if missing:
                raise UserError(f"{path} has no {' and '.join(missing)}: make a reference of images with "
                                "python -m eval.fid make-reference")
            if "format" not in file and ("arr_0" in file or "mu_s" in file):
                raise UserError(f"{path} is a reference of ADM's evaluator, which prepares images otherwise: "
                                "judge against it with python -m eval.adm, or make one with eval.fid make-reference")
            found = Reference(path, file["mu"], file["sigma"])
            if "format" in file:
                if int(file["format"]) != FORMAT:
                    raise UserError(f"{path} has format {file['format']}, this program reads {FORMAT}: make it anew")
                found.mode, found.extractor_sha256 = str(file["mode"]), str(file["extractor_sha256"])
                found.count, found.size = int(file["count"]), (int(file["size"][0]), int(file["size"][1]))
                found.features, found.source = file["features"], str(file["source"])
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, EOFError, AttributeError, zlib.error) as error:
        raise UserError(f"{path} is damaged or no reference: {one_line(error)[:200]}") from None
    d = DIMS["pool"]
    if found.mu.shape != (d,) or found.sigma.shape != (d, d):
        raise UserError(f"{path}: mu and sigma are {list(found.mu.shape)} and {list(found.sigma.shape)}: "
                        f"expected [{d}] and [{d}, {d}]")
    if not np.isfinite(found.mu).all() or not np.isfinite(found.sigma).all():
        raise UserError(f"{path}: mu or sigma is not finite")
    return found


def write_reference(path: Path, images: ImageSet, features: Features, inception: Inception) -> None:
    """Statistics and a share of the features of real images, in the layout that pytorch-fid reads too (mu, sigma)."""
    mu, sigma = Moments(features.parts("pool")).statistics()
    chosen = np.sort(np.random.default_rng(0).permutation(features.count)[:KEPT])
    kept, first = [], 0
    for part in features.parts("pool"):
        low, high = np.searchsorted(chosen, (first, first + len(part)))
        kept.append(part[chosen[low:high] - first])
        first += len(part)

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, mu=mu, sigma=sigma, features=np.concatenate(kept), mode=inception.mode,
                     extractor_sha256=inception.sha256, count=features.count, size=np.array(images.size),
                     source=images.description, images_sha256=features.images_sha256, format=FORMAT)
    write_atomically(path, write)


@dataclass
class Column:
    """A reference and the mode it is used in."""
    reference: Reference
    mode: str
    notes: list[str]

    def name(self, metric: str) -> str:
        """Of FID or KID in results."""
        return NAMES[self.mode].format(metric)


def plan(references: list[Reference], mode: str | None, samples: ImageSet, inception_sha256: str) -> list[Column]:
    """A column per reference. Raises UserError for a reference of another size, network or mode, or one mode twice."""
    columns = []
    for reference in references:
        path, notes = reference.path, []
        if reference.mode is None:
            notes.append(f"{path} does not say which network, mode and images it is of: taken to be of this network, "
                         f"and of {mode or 'pytorch-fid'}")
        elif mode not in (None, reference.mode):
            raise UserError(f"{path} is of mode {reference.mode}, not {mode}: leave out --mode, or make another "
                            "reference")
        if reference.mode is not None and reference.mode not in NAMES:
            raise UserError(f"{path} is of mode {reference.mode!r}, which is none of {', '.join(NAMES)}")
        if reference.extractor_sha256 not in (None, inception_sha256):
            raise UserError(f"{path} was made with other Inception weights (sha256 {reference.extractor_sha256[:16]}; "
                            f"--inception is {inception_sha256[:16]}): make it anew with these, or take its own")
        if reference.size not in (None, samples.size):
            h, w = reference.size
            raise UserError(f"the samples are {samples.size[1]}x{samples.size[0]} pixels and {path} is of {w}x{h}: "
                            "take a reference of the samples' size")
        if reference.count is not None:
            notes += evaluator.few(reference.count, DIMS["pool"], f"reference images in {path}")
        columns.append(Column(reference, reference.mode or mode or "pytorch-fid", notes))
    modes = [column.mode for column in columns]
    twice = {mode for mode in modes if modes.count(mode) > 1}
    if twice:
        raise UserError(f"two references of mode {', '.join(sorted(twice))}: judge against one at a time")
    return columns


def _judge(args: argparse.Namespace) -> None:
    check_counts(batch_size=args.batch_size)
    started, device = time.time(), prepare_device(args.device, args.threads)
    samples, notes = evaluator.open_samples(args)
    base = Inception(args.inception, "pytorch-fid", device=device)
    columns = plan([read_reference(path) for path in args.reference], args.mode, samples, base.sha256)
    notes += evaluator.few(len(samples), DIMS["pool"], "images") + base.notes
    notes += [note for column in columns for note in column.notes]
    unavailable, extractors = {}, {}
    for column in columns:
        try:
            extractors[column.mode] = base.in_mode(column.mode)
        except NoLibrary as error:
            unavailable[column.name("FID")] = str(error)
            if len(columns) == 1:
                raise
    rank, _ = rank_and_world()
    if not rank:
        warn(notes)
    metrics: dict[str, results.Metric] = {}
    details: dict[str, Any] = {}
    lines, digest = [], ""
    for column in columns:
        if column.name("FID") in unavailable:
            lines.append(f"{base.name(column.name('FID')):58}-   ({unavailable[column.name('FID')]})")
            continue
        extractor, reference = extractors[column.mode], column.reference
        features = extract(samples, extractor, args.batch_size, args.features, share=True)
        if features is None:
            continue
        digest = features.images_sha256
        sets = Sets(features, {"pool": (reference.mu, reference.sigma)}, reference.features, args.groups)
        scores = evaluator.score("fid", sets)
        metrics |= {column.name(name): metric for name, metric in scores.metrics.items()}
        details |= {column.name(name): about for name, about in scores.details.items()}
        unavailable |= {column.name(name): f"{reference.path}: {why}" for name, why in scores.unavailable.items()}
        lines += [f"{base.name(column.name(said)):58}{line}" for said, line in scores.lines.items()]
        details[column.name("FID")] = {
            "mode": column.mode, "extractor": extractor.id, "reference": str(reference.path),
            "reference_images": reference.count, "reference_from": reference.source}
    if rank:
        return
    if not metrics:
        raise UserError("; ".join(unavailable.values()))
    print("\n".join([f"{len(samples)} samples", *lines]))
    if args.out:
        hashes = {f"reference {path.name}" if len(args.reference) > 1 else "reference": sha256(path)
                  for path in args.reference}
        results.write(args.out, of_samples(
            "fid", samples, {base.name(name): metric for name, metric in metrics.items()}, device, started=started,
            inputs={"reference": ", ".join(str(path) for path in args.reference)},
            hashes={**hashes, "extractor": base.sha256, "images": digest},
            details={**details, "unavailable": unavailable, "notes": notes, "groups": args.groups}))
        print(f"wrote {args.out}")


def _make_reference(args: argparse.Namespace) -> None:
    check_counts(batch_size=args.batch_size)
    device = prepare_device(args.device, args.threads)
    check_counts(size=args.size, count=args.count)
    images = open_source(getattr(args, "from"), args.size, args.count)
    inception = Inception(args.inception, args.mode, device=device)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if len(images) < 2:
        raise UserError(f"{images.description} has {len(images)} image: statistics need at least 2")
    rank, _ = rank_and_world()
    if not rank:
        notes = evaluator.few(len(images), DIMS["pool"], "images") + inception.notes
        warn(notes)
    features = extract(images, inception, args.batch_size, args.features, share=True)
    if features is None:
        return
    write_reference(args.out, images, features, inception)
    h, w = images.size
    print(f"wrote {args.out}: {len(images)} images of {w}x{h} from {images.description}, mode {inception.mode}")


def build_parser() -> argparse.ArgumentParser:
    """Of judging."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    evaluator.add_sample_options(parser)
    parser.add_argument("--reference", type=Path, nargs="+", required=True,
                        help="statistics of real images, of make-reference or published (mu, sigma)")
    parser.add_argument("--mode", choices=NAMES, help="of a published reference (default: pytorch-fid)")
    evaluator.add_options(parser)
    return parser


def build_reference_parser() -> argparse.ArgumentParser:
    """Of make-reference."""
    parser = argparse.ArgumentParser(prog="python -m eval.fid make-reference",
                                     description="Statistics of real images, for eval.fid (and for pytorch-fid).")
    parser.add_argument("--from", type=Path, required=True,
                        help="folder of images, npz (arr_0), LSUN lmdb folder, or CIFAR-10's cifar-10-batches-py")
    parser.add_argument("--out", type=arguments.out_file, required=True, help="the npz to write")
    parser.add_argument("--mode", choices=NAMES, default="pytorch-fid", help="(default: %(default)s)")
    parser.add_argument("--count", type=arguments.whole, help="the first so many images (default: all)")
    parser.add_argument("--size", type=arguments.whole,
                        help="the shorter side of each image is brought to it, then the centre cut; needed for a "
                             "folder of mixed sizes (default: 256 of LSUN, else as they are)")
    evaluator.add_options(parser)
    return parser


@command
def main() -> None:
    if sys.argv[1:2] == ["make-reference"]:
        _make_reference(build_reference_parser().parse_args(sys.argv[2:]))
    else:
        _judge(build_parser().parse_args())


if __name__ == "__main__":
    main()
