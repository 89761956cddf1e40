"""One format for every number that the project measures: JSON under results/, read by eval.table.

    from eval import results

    results.write(args.out, results.of_samples(
        "adm", images=image_set, device=args.device, started=started,
        metrics={"FID": results.Metric(3.37), "precision": results.Metric(0.827, interval=[0.823, 0.831])},
        inputs={"reference": str(args.reference)}, hashes={"reference": sha, "extractor": sha},
        details={"layer": "pool3"}))

A metric has the name that its literature gives it, and only where it is that very measure: FID, sFID, IS, KID,
CLIP score, PSNR, SSIM, LPIPS; precision and recall (0 to 1) of the Inception features. On other features it has another
name: FD-EffLite0. Which evaluator's convention was used is the `kind`: adm, fid (pytorch-fid's), clip_score, fidelity,
quality, throughput, demo. eval.table takes a number for a cell of a paper when kind, settings and images are the row's.
"""

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from eval.cost.macs import average, step_macs
from eval.metrics.images import ImageSet
from runs.errors import UserError
from runs.families import build, example_inputs, load_config, rows_per_image
from runs.files import ROOT, write_json
from runs.provenance import provenance

FORMAT = 1
_CONFIGS = ROOT / "configs"


@dataclass
class Metric:
    """One number. interval: its 95 % interval [low, high]; stderr: its standard error; None where neither is known."""
    value: float
    interval: list[float] | None = None
    stderr: float | None = None


@dataclass
class Cost:
    """Multiply-accumulates per step (mean over the steps) of one row of the batch, in both conventions of eval.macs."""
    macs: float
    macs_fc: float


@dataclass
class Result:
    """What one command measured, and all that it depends on.

    kind: which command, and so which convention. model: name of the config. settings: those that decided the pixels,
    as in run.json; the schedule is settings["steps"] and settings["cache"]. images: how many were judged. metrics: by
    name. inputs: what was read, as the user named it (samples, reference, prompts). hashes: sha256 of checkpoint,
    extractor, reference, images, prompts. macs: of the sampled schedule. throughput: step times as eval.throughput
    writes them. provenance: commit, versions, device. details: what else the command reports, in its own words.
    """
    kind: str
    model: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    images: int | None = None
    metrics: dict[str, Metric] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    macs: Cost | None = None
    throughput: dict[str, Any] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    finished: str | None = None         # UTC, 2026-01-31T23:59:59Z
    duration_s: float | None = None
    details: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def full_steps(self) -> list[int]:
        """Steps on which the whole network ran; all of them without caching."""
        return self.settings.get("cache", {}).get("full_steps") or list(range(self.settings.get("steps", 0)))


def of_samples(kind: str, images: ImageSet, metrics: Mapping[str, Metric], device: torch.device | str, *,
               inputs: Mapping[str, str] | None = None, hashes: Mapping[str, str] | None = None,
               details: Mapping[str, Any] | None = None, started: float | None = None) -> Result:
    """The result of judging a set of images; what run.json beside them knows is filled in, MACs included.

    inputs, hashes: of what else was read; the samples and their checkpoint are added. started: time.time() of before.
    """
    settings = (images.run() or {}).get("settings", {})
    checkpoint = {"checkpoint": settings["checkpoint_sha256"]} if settings.get("checkpoint_sha256") else {}
    return Result(kind, settings.get("model"), settings, len(images), dict(metrics),
                  {"samples": images.description, **(inputs or {})}, {**checkpoint, **(hashes or {})}, cost(settings),
                  None, provenance(device), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                  None if started is None else round(time.time() - started, 3), dict(details or {}))


def cost(settings: Mapping[str, Any]) -> Cost | None:
    """MACs of a run from its settings; None where they are not those of a model in configs/ with DeepCache or none."""
    path = _CONFIGS / f"{settings.get('model')}.yaml"
    cache = settings.get("cache") or {}
    known = not cache or cache.get("interval") == 1 or {"branch", "full_steps"} <= cache.keys()
    other = "block_caching" in cache or "diffusers" in settings.get("unet", {})
    if not path.is_file() or "steps" not in settings or not known or other:
        return None
    config, steps = load_config(path), settings["steps"]
    full, cached = step_macs(build(config), example_inputs(config), cache.get("branch") or 0)
    return Cost(*average(full, cached, cache.get("full_steps") or range(steps), steps))


def write(path: Path, result: Result) -> None:
    """Write a result as JSON, atomically. Raises ValueError for one that is not of this format."""
    content = dataclasses.asdict(result)
    faults = check(content)
    if faults:
        raise ValueError(f"not a result: {'; '.join(faults)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def read(path: Path) -> Result:
    """Read a result; files from before this format are translated.

    Raises UserError for a file that is missing, no JSON, no result, or of a newer format.
    """
    content = _json(path)
    if isinstance(content, dict) and "format" not in content:
        content = _translate(content)
    faults = check(content)
    if faults:
        raise UserError(f"{path} is no result of this program: {'; '.join(faults[:3])}")
    return Result(**content | {"metrics": {name: Metric(**metric) for name, metric in content["metrics"].items()},
                               "macs": Cost(**content["macs"]) if content["macs"] else None})


def read_all(folder: Path) -> Iterator[tuple[Path, Result]]:
    """All results under a folder, by path; JSON files of something else are left out. Raises UserError as `read`."""
    for path in sorted(Path(folder).rglob("*.json")):
        content = _json(path)
        if isinstance(content, dict) and ("format" in content or content.get("kind") in _OLDER) and "kind" in content:
            yield path, read(path)


def _json(path: Path) -> object:
    try:
        return json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"no result {path} ({error.strerror})") from None
    except ValueError:
        raise UserError(f"{path} is no JSON, or damaged") from None


_TYPES = {"kind": str, "model": str | None, "settings": dict, "images": int | None, "metrics": dict, "inputs": dict,
          "hashes": dict, "macs": dict | None, "throughput": dict | None, "provenance": dict, "finished": str | None,
          "duration_s": float | int | None, "details": dict, "format": int}


def check(content: object) -> list[str]:
    """What is wrong with the JSON of a result; an empty list where nothing is."""
    if not isinstance(content, dict):
        return ["it is no JSON object"]
    if isinstance(content.get("format"), int) and content["format"] != FORMAT:
        return [f"it has format {content['format']}, this program reads {FORMAT}"]
    faults = [f"no key {key}" for key in _TYPES if key not in content]
    faults += [f"unknown key {key}" for key in content if key not in _TYPES]
    faults += [f"{key} is {content[key]!r}" for key, kind in _TYPES.items()
               if key in content and not isinstance(content[key], kind)]
    if faults:
        return faults
    if content["images"] is not None and content["images"] < 1:
        faults.append(f"images is {content['images']}")
    for name, metric in content["metrics"].items():
        if not isinstance(metric, dict) or metric.keys() != {"value", "interval", "stderr"}:
            faults.append(f"metric {name} needs value, interval and stderr")
            continue
        interval = metric["interval"]
        if interval is not None and (not isinstance(interval, list) or len(interval) != 2):
            faults.append(f"metric {name}: the interval is not [low, high]")
        elif not all(isinstance(value, int | float) and math.isfinite(value)
                     for value in (metric["value"], metric["stderr"] or 0, *(interval or []))):
            faults.append(f"metric {name} is not finite")
        elif interval is not None and interval[0] > interval[1]:
            faults.append(f"metric {name}: the interval runs backwards")
    if content["macs"] is not None and content["macs"].keys() != {"macs", "macs_fc"}:
        faults.append("macs needs macs and macs_fc")
    return faults


# Files from before this format: each kind of them as (metrics, further fields).

def _estimate(content: dict) -> dict | None:
    value = content.get("value", content.get("mean"))
    return None if value is None else {"value": value, "interval": content.get("interval"),
                                       "stderr": content.get("stderr")}


def _older_quality(content: dict) -> dict:
    return {"metrics": {name: _estimate(value) for name, value in content.items() if name.startswith(("FD-", "KID-"))},
            "images": content["samples"]["images"],
            "inputs": {"samples": content["samples"]["from"], "reference": content["reference"]["from"]},
            "hashes": {"images": content["samples"]["sha256"], "reference": content["reference"]["sha256"],
                       "extractor": content["extractor"]}}


def _older_fidelity(content: dict) -> dict:
    names = {"psnr": "PSNR", "ssim": "SSIM", "feature_distance": "1 - cos, EffLite0"}
    return {"metrics": {name: _estimate(content[key]) for key, name in names.items()}, "images": content["images"]}


def _older_demo(content: dict) -> dict:
    judged = [_older_quality(content["quality"])]
    judged += [_older_fidelity(content["fidelity"])] if "fidelity" in content else []
    # MACs there are of an image, both rows of guidance included; here of a step and one row.
    path = _CONFIGS / f"{content['run']['settings']['model']}.yaml"
    shares = content["steps"] * rows_per_image(load_config(path)) if path.is_file() else None
    return {"metrics": {name: value for part in judged for name, value in part["metrics"].items()},
            "images": judged[0]["images"], "inputs": judged[0]["inputs"], "hashes": judged[0]["hashes"],
            "macs": {key: content["macs"][old] / shares for key, old in (("macs", "hook"), ("macs_fc", "fc"))}
            if shares else None}


def _older_throughput(content: dict) -> dict:
    about = {"kind", "model", "settings", "provenance"}
    return {"throughput": {key: value for key, value in content.items() if key not in about}}


_OLDER = {"quality": _older_quality, "fidelity": _older_fidelity, "demo": _older_demo, "throughput": _older_throughput}


def _translate(content: dict) -> dict:
    """JSON of a kind from before this format, as this format has it; as it is where the kind is not known."""
    translate = _OLDER.get(content.get("kind"))
    if translate is None:
        return content
    run = (content.get("run") or {}).get("settings", {})
    new = dataclasses.asdict(Result(content["kind"], content.get("model") or run.get("model"),
                                    content.get("settings") or run, provenance=content["provenance"]))
    found = translate(content)
    found["metrics"] = {name: value for name, value in found.get("metrics", {}).items() if value}
    return new | found
