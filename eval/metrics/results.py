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

from eval.cost.macs import Macs, average, mean
from eval.cost.runs import costs_of
from eval.metrics.images import ImageSet
from run.files import ROOT
from run.provenance import provenance
from run.results import Cost, Metric, Result
from run.seeds import format_seeds
from run.spec import RunSpec
from unet_caching.methods.deepcache import DeepCache

VERSION = 1         # of all evaluators: another one where a number of the same images would be another
_CONFIGS = ROOT / "configs"


def of_samples(kind: str, images: ImageSet, metrics: Mapping[str, Metric], device: torch.device | str, *,
               inputs: Mapping[str, str] | None = None, hashes: Mapping[str, str] | None = None,
               details: Mapping[str, Any] | None = None, started: float | None = None, macs: Cost | None = None
               ) -> Result:
    """The result of judging a set of images; what run.json beside them knows is filled in.

    inputs, hashes: of what else was read; the samples and their checkpoint are added. started: time.time() of before.
    macs: of the run, where they are known; else as `cost` counts them.
    """
    settings = (images.run() or {}).get("settings", {})
    checkpoint = {"checkpoint": settings["checkpoint_sha256"]} if settings.get("checkpoint_sha256") else {}
    return Result(kind, settings.get("model"), settings, len(images), dict(metrics),
                  {"samples": images.description, **(inputs or {})}, {**checkpoint, **(hashes or {})},
                  macs or cost(settings), None, provenance(device) | {"evaluator": VERSION},
                  details={**(details or {}), **({"seeds": format_seeds(images.seeds)} if images.seeds else {})}
                  ).stamped(started)


def cost(settings: Mapping[str, Any]) -> Cost | None:
    """MACs of a run from its settings; None where they are not those of a model in configs/ with DeepCache, a plan or
    without caching: other methods say what they do in a section of their own."""
    path = _CONFIGS / f"{settings.get('model')}.yaml"
    cache = settings.get("cache") or {}
    known = not cache or cache.get("interval") == 1 or {"branch", "full_steps"} <= cache.keys()
    sections = {name for name, value in cache.items() if isinstance(value, Mapping)}
    other = sections - {"plan", "forecast"} or "diffusers" in settings.get("unet", {})
    if not path.is_file() or "steps" not in settings or not known or other:
        return None
    steps, counted = settings["steps"], costs_of(RunSpec.of(path).open())

    def step(branch: int | None) -> Macs:
        """One that reuses the level at a branch; None: a full one."""
        return counted.full if branch is None else counted.calls(DeepCache(branch, [0]), 2)[1]

    if "plan" in cache:
        return Cost(*mean([step(branch) for branch in cache["plan"]["branches"][:steps]]))
    return Cost(*average(step(None), step(cache.get("branch") or 0), cache.get("full_steps") or range(steps), steps))
