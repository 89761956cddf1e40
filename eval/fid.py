"""FID by the convention of pytorch-fid, and by clean-fid's: CIFAR-10 and LSUN in the papers' tables.

    python -m eval.fid make-reference --from cifar-10-batches-py --out cifar10_train.npz --inception FILE
    python -m eval.fid make-reference --from bedroom_train_lmdb --count 50000 --out bedroom.npz --inception FILE
    python -m eval.fid --samples samples/cifar10_n5 --reference cifar10_train.npz --inception FILE --out results/x.json

The number depends on how images are resized to 299 pixels. The modes:
    pytorch-fid         PyTorch's bilinear, no antialias
    clean               clean-fid: Pillow's bicubic with antialias
    legacy_pytorch      clean-fid's version of pytorch-fid
    legacy_tensorflow   TensorFlow 1's bilinear: the original FID
clean-fid's functions resize for `clean` and `legacy_pytorch`. All modes use the network of --inception; clean-fid has
another file of the same weights for `clean` and `legacy_tensorflow`.
A reference holds its mode, network, number and size of images, and judges samples in its mode. A published file with
only mu and sigma can be a reference, too; its mode is then --mode.
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
# The names of results: only pytorch-fid's number is called FID and nothing else.
NAMES = {"pytorch-fid": "{}", "clean": "clean-{}", "legacy_pytorch": "{} (clean-fid, legacy_pytorch)",
         "legacy_tensorflow": "{} (clean-fid, legacy_tensorflow)"}


@dataclass(frozen=True)
class Options(OfSets):
    reference: Path = required("statistics of real images, from make-reference or published (mu, sigma)")
    mode: str | None = option(None, "mode of a published reference (default: pytorch-fid)", choices=tuple(NAMES))


@dataclass(frozen=True)
class Reference:
    """Statistics of real images, for eval.fid (and for pytorch-fid)."""
    source: Path = required("folder of images, npz (arr_0), LSUN lmdb folder, or CIFAR-10's cifar-10-batches-py",
                            flag="from")
    out: Path = required("the npz to write", type=arguments.out_file)
    mode: str = option("pytorch-fid", "how images are prepared (default: %(default)s)", choices=tuple(NAMES))
    count: int | None = option(None, "how many images, from the first on (default: all)", least=1)
    size: int | None = option(None, "resize the shorter side to so many pixels, then crop the centre; needed for a "
                                    "folder of mixed sizes (default: 256 for LSUN, else unchanged)", least=1)


def open_reference(path: Path, mode: str | None, samples: ImageSet) -> Real:
    """A reference from make-reference, or a published file. mode: of a published file.

    Raises UserError for a file that is missing, damaged, something else, or of another size or mode.
    """
    if not path.is_file():
        raise UserError(f"no reference {path}: make it with python -m eval.fid make-reference")
    with opened(path) as file:
        if "format" not in file and ("arr_0" in file or "mu_s" in file):
            raise UserError(f"{path} is a reference of ADM's evaluator, which resizes images differently: use it with "
                            "python -m eval.adm, or make one with python -m eval.fid make-reference")
        known = {key: file[key] for key in file if key not in ("mu", "sigma")}
    statistics = read_statistics(path, {"pool": ("mu", "sigma")})
    if statistics is None:
        raise UserError(f"{path} has no mu and sigma: make a reference of images with python -m eval.fid "
                        "make-reference")
    if "format" not in known:
        mode = mode or "pytorch-fid"
        return Real(path, mode, ("pool",), statistics, None, NAMES[mode], notes=[
            f"{path} does not name its network and mode: the network of --inception and mode {mode} are assumed"])
    if not known.keys() >= {"format", "mode", "extractor_sha256", "count", "size", "source"}:
        raise UserError(f"{path} is damaged or not a reference from python -m eval.fid make-reference: make it again")
    of, count, (h, w) = str(known["mode"]), int(known["count"]), known["size"].tolist()
    if int(known["format"]) != FORMAT:
        raise UserError(f"{path} has format {known['format']}, and format {FORMAT} is needed: make it again")
    if of not in NAMES:
        raise UserError(f"{path} has mode {of!r}, which is not one of {', '.join(NAMES)}")
    if mode not in (None, of):
        raise UserError(f"{path} has mode {of}, not {mode}: leave out --mode, or make another reference")
    if (h, w) != samples.size:
        raise UserError(f"the samples are {samples.size[1]}x{samples.size[0]} pixels and {path} is {w}x{h}: "
                        "take a reference of the samples' size")
    return Real(path, of, ("pool",), statistics, None, NAMES[of], str(known["extractor_sha256"]),
                few(count, f"reference images in {path}"),
                {"reference_images": count, "reference_from": str(known["source"])})


def write_reference(path: Path, images: ImageSet, features: Features, inception: Inception) -> None:
    """Write statistics of real images, in a layout that pytorch-fid can read, too (mu, sigma)."""
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
