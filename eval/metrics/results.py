"""The result of judging images (run/results.py): the evaluator's numbers, and the run that the images come from.

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

VERSION = 1         # of all evaluators: raise it when the same images would get another number


def of_samples(kind: str, images: ImageSet, metrics: Mapping[str, Metric], device: torch.device | str, *,
               inputs: Mapping[str, str] | None = None, hashes: Mapping[str, str] | None = None,
               details: Mapping[str, Any] | None = None, started: float | None = None, macs: Cost | None = None
               ) -> Result:
    """The result of judging a set of images. The settings of the run are read from the run.json beside them.

    inputs, hashes: everything else that was read; the samples and their checkpoint are added. started: time.time() when
    the command began. macs: the cost of the run (default: that of the sample folder's run).
    """
    settings = (images.run() or {}).get("settings", {})
    checkpoint = {"checkpoint": settings["checkpoint_sha256"]} if settings.get("checkpoint_sha256") else {}
    return Result(kind, settings.get("model"), settings, len(images), dict(metrics),
                  {"samples": images.description, **(inputs or {})}, {**checkpoint, **(hashes or {})},
                  macs or _cost_of_folder(images), None, provenance(device) | {"evaluator": VERSION},
                  details={**(details or {}), **({"seeds": format_seeds(images.seeds)} if images.seeds else {})}
                  ).stamped(started)


def cost(run: Run) -> Cost | None:
    """The MACs per step of a run; None if they depend on the images, or the network is not the config's."""
    if any(method.online for method in run.caching.methods) or getattr(run.spec.condition, "diffusers_unet", False):
        return None
    return Cost(*macs_per_step(run))


def _cost_of_folder(images: ImageSet) -> Cost | None:
    """The MACs per step of the run of a sample folder; None if they are not known."""
    try:
        return None if images.root is None or images.run() is None else cost(Run.of_folder(images.root))
    except UserError:
        return None
