"""Judged images as a result (run/results.py): what is known of them besides the numbers that the evaluator found.

    results.write(args.out, of_samples(
        "adm", images=image_set, device=args.device, started=started,
        metrics={"FID": Metric(3.37), "precision": Metric(0.827, interval=[0.823, 0.831])},
        inputs={"reference": str(args.reference)}, hashes={"reference": sha, "extractor": sha},
        details={"layer": "pool3"}))
"""

from collections.abc import Mapping
from typing import Any

import torch

from eval.cost.runs import macs_per_step
from eval.metrics.images import ImageSet
from run.provenance import provenance
from run.results import Cost, Metric, Result
from run.seeds import format_seeds
from run.spec import Run
from unet_caching.errors import UserError

VERSION = 1         # of all evaluators: another one where a number of the same images would be another


def of_samples(kind: str, images: ImageSet, metrics: Mapping[str, Metric], device: torch.device | str, *,
               inputs: Mapping[str, str] | None = None, hashes: Mapping[str, str] | None = None,
               details: Mapping[str, Any] | None = None, started: float | None = None, macs: Cost | None = None
               ) -> Result:
    """The result of judging a set of images; what run.json beside them knows is filled in.

    inputs, hashes: of what else was read; the samples and their checkpoint are added. started: time.time() of before.
    macs: of the run, where they are known; else those of the sample folder's.
    """
    settings = (images.run() or {}).get("settings", {})
    checkpoint = {"checkpoint": settings["checkpoint_sha256"]} if settings.get("checkpoint_sha256") else {}
    return Result(kind, settings.get("model"), settings, len(images), dict(metrics),
                  {"samples": images.description, **(inputs or {})}, {**checkpoint, **(hashes or {})},
                  macs or _cost_of_folder(images), None, provenance(device) | {"evaluator": VERSION},
                  details={**(details or {}), **({"seeds": format_seeds(images.seeds)} if images.seeds else {})}
                  ).stamped(started)


def cost(run: Run) -> Cost | None:
    """MACs per step of a run; None where they depend on the images, or the network is another than the config's."""
    if any(method.online for method in run.caching.methods) or getattr(run.spec.condition, "diffusers_unet", False):
        return None
    return Cost(*macs_per_step(run))


def _cost_of_folder(images: ImageSet) -> Cost | None:
    """MACs per step of the run of a sample folder, where that is known."""
    try:
        return None if images.root is None or images.run() is None else cost(Run.of_folder(images.root))
    except UserError:
        return None
