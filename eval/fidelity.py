"""How close images are to images of the same seeds in another folder: cached against uncached sampling.

    python -m eval.fidelity --samples samples/interval5 --against samples/full --out results/interval5_fidelity.json

PSNR (dB) and SSIM per image, the distance of EfficientNet-Lite0 features (1 - cosine), and LPIPS with the file of its
backbone (--lpips-backbone). The page of a study (lab/study) shows such pairs side by side.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from eval.metrics.evaluator import Judged
from eval.metrics.features import EffLite0, features_of
from eval.metrics.images import ImageSet, check_paired
from eval.metrics.intervals import mean_estimate
from eval.metrics.lpips import BACKBONE, Lpips
from eval.metrics.registry import FEATURE_DISTANCE, PAIRS, PIXELS, RMSE_TO_CONVERGED
from eval.metrics.results import of_samples
from run.cli import command, warn
from run.machine import Device
from run.results import Metric
from unet_caching.options import option, required

WITHIN = 0.05       # a run has converged if twice its steps change the error to it by at most this fraction


@dataclass(frozen=True)
class Options(Judged):
    against: Path = required("folder or npz with the same seeds, uncached")
    lpips_backbone: Path | None = option(None, f"{BACKBONE}, torchvision's AlexNet, for LPIPS")
    batch_size: int = option(32, "images at a time (default: %(default)s)", least=1)


def fidelity(samples: ImageSet, against: ImageSet, extractor: EffLite0, batch_size: int = 32,
             lpips: Lpips | None = None) -> dict:
    """PSNR, SSIM, feature distance and, with `lpips`, LPIPS between images of the same seed, and their means.

    Returns {images, identical, psnr, ssim, feature_distance, lpips: {mean, stderr, interval}, per_image: {seed, psnr,
    ...}}. interval: 95%, bootstrap over pairs.
    The PSNR of identical images is infinite: None per image, and left out of the mean; `identical` counts them.
    Raises UserError if an image has no partner, the sizes differ, or the images are too small.
    """
    seeds, measures = check_paired(samples, against), [*PIXELS, *([lpips.measure] if lpips else [])]
    for measure in measures:
        measure.check_size(samples.size)
    batches: dict[str, list[np.ndarray]] = {measure.key: [] for measure in measures}
    with tqdm(total=len(seeds), unit="img", desc=f"{samples.description}, pairs", leave=False, disable=None) as bar:
        for x, y in zip(samples.batches(batch_size), against.batches(batch_size), strict=True):
            for measure in measures:
                batches[measure.key].append(measure.of(x, y))
            bar.update(len(x))
    fx, fy = (features_of(images, extractor, batch_size) for images in (samples, against))
    pairs = {name: np.concatenate(values) for name, values in batches.items()}
    pairs[FEATURE_DISTANCE.key] = _cosine_distance(fx.all(), fy.all())

    names = [measure.key for measure in PAIRS if measure.key in pairs]
    means = {name: mean_estimate(pairs[name][np.isfinite(pairs[name])]) for name in names}
    of_images = {name: [round(float(v), 6) if np.isfinite(v) else None for v in pairs[name]] for name in names}
    return {"images": len(seeds), "identical": int(np.isinf(pairs["psnr"]).sum()), **means,
            "per_image": {"seed": seeds, **of_images},
            "images_sha256": {"samples": fx.images_sha256, "against": fy.images_sha256}}


def to_converged(samples: ImageSet, against: ImageSet, twice: ImageSet, batch_size: int = 32) -> dict:
    """The root mean squared error (levels of 255) to the images of the same seeds in `against`, a run of many steps.

    That run has converged if the mean error to `twice`, a run of twice its steps, is nearly the same.
    Returns {mean, stderr, interval, steps, twice: {steps, mean}, moved, within, converged}.
    Raises UserError if an image has no partner.
    """
    for other in (against, twice):
        check_paired(samples, other)
    near, far = (np.concatenate([RMSE_TO_CONVERGED.of(x, y) for x, y in zip(
        samples.batches(batch_size), other.batches(batch_size), strict=True)]) for other in (against, twice))
    moved = abs(near.mean() - far.mean()) / far.mean() if far.any() else float(near.any())
    steps = (against.run() or {}).get("settings", {}).get("steps", 0)
    return {**mean_estimate(near), "steps": steps, "twice": {"steps": 2 * steps, "mean": float(far.mean())},
            "moved": float(moved), "within": WITHIN, "converged": bool(moved <= WITHIN)}


def converged_metrics(result: dict) -> dict[str, Metric]:
    """The error in a result of `to_converged`; empty if the run of many steps has not converged."""
    return {RMSE_TO_CONVERGED.name: Metric.of(result)} if result["converged"] else {}


def metrics(result: dict) -> dict[str, Metric]:
    """The means in a result of `fidelity`."""
    return {measure.name: Metric.of(result[measure.key]) for measure in PAIRS
            if measure.key in result and result[measure.key]["mean"] is not None}


def _cosine_distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = x.astype(np.float64), y.astype(np.float64)
    cosine = (x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1))
    return (1 - cosine).clip(0)


def table(result: dict) -> str:
    """The means as a few lines of text."""
    lines = [f"{result['images']} images, {result['identical']} identical to their partner",
             f"{'':20}{'mean':>9}  {'95% interval':^19}"]
    for measure in PAIRS:
        if measure.key not in result:
            continue
        row = result[measure.key]
        if row["mean"] is None:
            lines.append(f"{measure.label:20}{'inf':>9}")
            continue
        low, high = row["interval"]
        lines.append(f"{measure.label:20}{row['mean']:9.4f}  {low:9.4f} {high:9.4f}")
    return "\n".join(lines)


@command
def main(options: Options, where: Device) -> None:
    started, device = time.time(), where.prepare()
    (samples, notes), (against, more) = (options.open(path) for path in (options.samples, options.against))
    warn(notes := notes + more)
    extractor = EffLite0(device)
    lpips = Lpips(options.lpips_backbone, device) if options.lpips_backbone else None
    result = fidelity(samples, against, extractor, options.batch_size, lpips=lpips)
    print(table(result))
    hashes = {"images": result["images_sha256"]["samples"], "against": result["images_sha256"]["against"],
              "extractor": extractor.id} | ({"lpips": lpips.sha256} if lpips else {})
    options.write(of_samples(
        "fidelity", samples, metrics(result), device, hashes=hashes, started=started,
        inputs={"against": against.description},
        details={**result, "against_run": against.run(), **({"notes": notes} if notes else {})}))


if __name__ == "__main__":
    main()
