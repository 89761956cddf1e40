"""FID, sFID, IS, precision and recall by the conventions of ADM's evaluator (github openai/guided-diffusion).

    python -m eval.adm --samples samples/cin256_n10 --reference VIRTUAL_imagenet256_labeled.npz \\
        --inception weights-inception-2015-12-05-6726825d.pth --out results/cin256_n10_adm.json

Images are resized to 299 pixels as TensorFlow 1 does. FID and sFID use the means and covariances in the reference file
(mu, sigma; mu_s, sigma_s). Precision and recall (k = 3) use its images (arr_0, 10,000).
The Inception Score is the mean over consecutive blocks of 5000 images in the order of the seeds. It depends on that
order: images sorted by class score far lower, with a warning. Differences from ADM's evaluator: statistics are in
float64, and distances of precision and recall in float32 instead of float16.
Features are kept beside the images (0.02 MB an image), so that a second call takes minutes.
"""

from dataclasses import dataclass
from pathlib import Path

from eval.metrics.evaluator import Extraction, OfSets, Real, few, judge, read_statistics
from eval.metrics.images import ImageSet, open_images
from run.cli import command
from run.machine import Device
from unet_caching.errors import UserError
from unet_caching.options import required

LAYERS = ("pool", "logits", "spatial")
_KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


@dataclass(frozen=True)
class Options(OfSets):
    reference: Path = required("reference npz of ADM")


def open_reference(path: Path, samples: ImageSet) -> Real:
    """A reference file of ADM: arr_0 uint8 NHWC, and mu, sigma, mu_s, sigma_s, all of them or none.

    Raises UserError for a file that is damaged or has other shapes, and for images of another size than the samples.
    """
    if not path.is_file():
        raise UserError(f"no reference {path}: ADM's for ImageNet 256 is VIRTUAL_imagenet256_labeled.npz, at "
                        "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
                        "VIRTUAL_imagenet256_labeled.npz")
    images = open_images(path)
    if images.size != samples.size:
        h, w = images.size
        raise UserError(f"the samples are {samples.size[1]}x{samples.size[0]} pixels and {path} is {w}x{h}: "
                        "take the reference of the samples' size")
    statistics, notes = read_statistics(path, _KEYS), []
    if statistics is None:
        notes = [f"{path} has no mu and sigma: they are computed from its {len(images)} images",
                 *few(len(images), "reference images")]
    return Real(path, "adm", LAYERS, statistics, images, notes=notes, details={"reference_images": len(images)})


@command
def main(options: Options, extraction: Extraction, where: Device) -> None:
    judge("adm", options, extraction, where, lambda samples: open_reference(options.reference, samples))


if __name__ == "__main__":
    main()
