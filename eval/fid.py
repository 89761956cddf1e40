"""FID by the convention of pytorch-fid, and by clean-fid's: CIFAR-10 and LSUN in the papers' tables.

    python -m eval.fid make-reference --from cifar-10-batches-py --out cifar10_train.npz --inception FILE
    python -m eval.fid make-reference --from bedroom_train_lmdb --count 50000 --out bedroom.npz --inception FILE
    python -m eval.fid --samples samples/cifar10_n5 --reference cifar10_train.npz --inception FILE --out results/x.json

How images are brought to 299 pixels decides the number. The modes:
    pytorch-fid         PyTorch's bilinear, no antialias
    clean               clean-fid: Pillow's bicubic with antialias
    legacy_pytorch      clean-fid's version of pytorch-fid
    legacy_tensorflow   TensorFlow 1's bilinear: the original FID
Resizing for `clean` and `legacy_pytorch` is done by clean-fid's functions. The network is that of --inception in every
mode; clean-fid takes another file of the same weights for `clean` and `legacy_tensorflow`.
A reference remembers its mode, network, number and size of images, and judges samples in that mode. A published file
with nothing but mu and sigma serves too, in the mode that --mode says.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.metrics.evaluator import Extraction, OfSets, Real, few, judge, opened, read_statistics
from eval.metrics.extract import Features, extract
from eval.metrics.frechet import mean_and_covariance
from eval.metrics.images import ImageSet
from eval.metrics.inception import Inception
from eval.metrics.sources import open_source
from run import arguments
from run.cli import command, warn
from run.files import write_atomically
from run.machine import Device
from unet_caching.errors import UserError
from unet_caching.options import option, required

FORMAT = 1              # of references
# The names of results: only pytorch-fid's is FID without a word before it.
NAMES = {"pytorch-fid": "{}", "clean": "clean-{}", "legacy_pytorch": "{} (clean-fid, legacy_pytorch)",
         "legacy_tensorflow": "{} (clean-fid, legacy_tensorflow)"}


@dataclass(frozen=True)
class Options(OfSets):
    reference: Path = required("statistics of real images, of make-reference or published (mu, sigma)")
    mode: str | None = option(None, "of a published reference (default: pytorch-fid)", choices=tuple(NAMES))


@dataclass(frozen=True)
class Reference:
    """Statistics of real images, for eval.fid (and for pytorch-fid)."""
    source: Path = required("folder of images, npz (arr_0), LSUN lmdb folder, or CIFAR-10's cifar-10-batches-py",
                            flag="from")
    out: Path = required("the npz to write", type=arguments.out_file)
    mode: str = option("pytorch-fid", "how images are prepared (default: %(default)s)", choices=tuple(NAMES))
    count: int | None = option(None, "the first so many images (default: all)", least=1)
    size: int | None = option(None, "the shorter side of each image is brought to it, then the centre cut; needed for "
                                    "a folder of mixed sizes (default: 256 of LSUN, else as they are)", least=1)


def open_reference(path: Path, mode: str | None, samples: ImageSet) -> Real:
    """What make-reference wrote, or a published file. mode: of the latter.

    Raises UserError for a file that is missing, damaged, no such statistics, or of another size or mode.
    """
    if not path.is_file():
        raise UserError(f"no reference {path}: make it with python -m eval.fid make-reference")
    with opened(path) as file:
        if "format" not in file and ("arr_0" in file or "mu_s" in file):
            raise UserError(f"{path} is a reference of ADM's evaluator, which prepares images otherwise: judge against "
                            "it with python -m eval.adm, or make one with eval.fid make-reference")
        known = {key: file[key] for key in file if key not in ("mu", "sigma")}
    statistics = read_statistics(path, {"pool": ("mu", "sigma")})
    if statistics is None:
        raise UserError(f"{path} has no mu and sigma: make a reference of images with python -m eval.fid "
                        "make-reference")
    if "format" not in known:
        mode = mode or "pytorch-fid"
        return Real(path, mode, ("pool",), statistics, None, NAMES[mode], notes=[
            f"{path} does not say which network, mode and images it is of: taken to be of this network, and of {mode}"])
    if not known.keys() >= {"format", "mode", "extractor_sha256", "count", "size", "source"}:
        raise UserError(f"{path} is damaged or no reference of eval.fid make-reference: make it anew")
    of, count, (h, w) = str(known["mode"]), int(known["count"]), known["size"].tolist()
    if int(known["format"]) != FORMAT:
        raise UserError(f"{path} has format {known['format']}, this program reads {FORMAT}: make it anew")
    if of not in NAMES:
        raise UserError(f"{path} is of mode {of!r}, which is none of {', '.join(NAMES)}")
    if mode not in (None, of):
        raise UserError(f"{path} is of mode {of}, not {mode}: leave out --mode, or make another reference")
    if (h, w) != samples.size:
        raise UserError(f"the samples are {samples.size[1]}x{samples.size[0]} pixels and {path} is of {w}x{h}: "
                        "take a reference of the samples' size")
    return Real(path, of, ("pool",), statistics, None, NAMES[of], str(known["extractor_sha256"]),
                few(count, f"reference images in {path}"),
                {"reference_images": count, "reference_from": str(known["source"])})


def write_reference(path: Path, images: ImageSet, features: Features, inception: Inception) -> None:
    """Statistics of real images, in the layout that pytorch-fid reads too (mu, sigma)."""
    mu, sigma = mean_and_covariance(features.parts("pool"))

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, mu=mu, sigma=sigma, mode=inception.mode, extractor_sha256=inception.sha256,
                     count=features.count, size=np.array(images.size), source=images.description,
                     images_sha256=features.images_sha256, format=FORMAT)
    write_atomically(path, write)


def make_reference(options: Reference, extraction: Extraction, where: Device) -> None:
    """Statistics of real images, for eval.fid (and for pytorch-fid)."""
    device, images = where.prepare(), open_source(options.source, options.size, options.count)
    inception = Inception(extraction.inception, options.mode, device=device)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if len(images) < 2:
        raise UserError(f"{images.description} has {len(images)} image: statistics need at least 2")
    warn([*few(len(images), "images"), *inception.notes])
    features = extract(images, inception, extraction.batch_size)
    write_reference(options.out, images, features, inception)
    h, w = images.size
    print(f"wrote {options.out}: {len(images)} images of {w}x{h} from {images.description}, mode {inception.mode}")


def judge_samples(options: Options, extraction: Extraction, where: Device) -> None:
    judge("fid", options, extraction, where,
          lambda samples: open_reference(options.reference, options.mode, samples))


@command
def main() -> None:
    arguments.call_verb({"make-reference": make_reference}, judge_samples)


if __name__ == "__main__":
    main()
