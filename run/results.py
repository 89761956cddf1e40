"""One format for every number that the project measures: JSON under results/, written and read here alone.

    results.write(path, Result("fidelity", "ddpm_emoji", settings, images=256, metrics={"PSNR": Metric(37.5)}))

A metric has the name that its literature gives it, and only where it is that very measure: FID, sFID, IS, KID,
CLIP score, PSNR, SSIM, LPIPS; precision and recall (0 to 1) of the Inception features. On others it has another
name: FD-EffLite0, FD-IncMixed5. Which evaluator's convention was used is the `kind`: adm, fid (pytorch-fid's),
clip_score, fidelity, quality, throughput, demo. eval.table takes a number for a cell of a paper when kind, settings
and images are the row's.
"""

import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from run.files import write_atomically, write_json
from unet_caching.errors import UserError, as_user_error
from unet_caching.files import schema as _schema
from unet_caching.files.schema import read_json

FORMAT = 1


@dataclass
class Metric:
    """One number. interval: its 95 % interval [low, high]; stderr: its standard error; None where neither is known."""
    value: float
    interval: list[float] | None = None
    stderr: float | None = None

    @classmethod
    def of(cls, estimate: Mapping[str, Any]) -> "Metric":
        """An estimate as the evaluators write it: {value or mean, interval, stderr}, the last two where known."""
        return cls(estimate["value" if "value" in estimate else "mean"], estimate.get("interval"),
                   estimate.get("stderr"))

    @property
    def bounds(self) -> tuple[float, float, float]:
        """The value and the ends of its interval, which are the value again where that is not known."""
        low, high = self.interval or (self.value, self.value)
        return self.value, low, high


@dataclass
class Cost:
    """Multiply-accumulates per step (mean over the steps) of one row of the batch, in both conventions of eval.macs."""
    macs: float
    macs_fc: float


@dataclass
class Result:
    """What one command measured, and all that it depends on.

    kind: which command, and so which convention. model: name of the config. settings: those that decided the pixels,
    as in run.json; the schedule is settings["steps"] and settings["cache"]; of times, those of the timing. images: how
    many were judged. metrics: by name. inputs: what was read, as the user named it (samples, reference, prompts).
    hashes: sha256 of checkpoint, extractor, reference, images, prompts. macs: of the sampled schedule. throughput: step
    times, as the commands that measure them write them. provenance: commit, versions, device. details: what else the
    command reports, in its own words.
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

    @property
    def times(self) -> dict[str, Any]:
        """What was timed; nothing where nothing was."""
        return self.throughput or {}

    def stamped(self, started: float | None) -> "Result":
        """The same, finished now. started: time.time() of before; None leaves the duration out."""
        return dataclasses.replace(self, finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                                   duration_s=None if started is None else round(time.time() - started, 3))


def write(path: Path, result: Result) -> None:
    """Write a result as JSON, atomically. Raises ValueError for one that is not of this format."""
    content = dataclasses.asdict(result)
    faults = check(content)
    if faults:
        raise ValueError(f"not a result: {'; '.join(faults)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def read(path: Path) -> Result:
    """Read a result. Raises UserError for a file that is missing, no JSON, no result, or of another format."""
    if not Path(path).is_file():
        raise UserError(f"no result {path}")
    with as_user_error():
        content = read_json(path)
    return _checked(content, path)


def _checked(content: Any, path: Path | str) -> Result:
    faults = check(content)
    if faults:
        raise UserError(f"{path} is no result of this program: {'; '.join(faults[:3])}")
    return Result(**content | {"metrics": {name: Metric(**metric) for name, metric in content["metrics"].items()},
                               "macs": Cost(**content["macs"]) if content["macs"] else None})


def read_all(folder: Path) -> Iterator[tuple[Path, Result]]:
    """Every result in the JSON and JSON-lines files under a folder, by path; of a line its number stands after it.

    Raises UserError for one that is none, by its name.
    """
    for path in sorted(Path(folder).rglob("*.json*")):
        if path.suffix == ".json":
            yield path, read(path)
        elif path.suffix == ".jsonl":
            for number, result in enumerate(read_packed(path), 2):
                yield Path(f"{path}#{number}"), result


_SHARED = ("settings", "inputs", "hashes", "provenance", "details")     # whose entries most results share


def write_packed(path: Path, found: Sequence[Result]) -> None:
    """Write results as JSON lines, atomically; the first line has what most of each kind say of settings, files and
    machine."""
    contents = [dataclasses.asdict(result) for result in found]
    if faults := [fault for content in contents for fault in check(content)]:
        raise ValueError(f"not a result: {'; '.join(faults[:3])}")
    shared = {kind: _shared([content for content in contents if content["kind"] == kind])
              for kind in dict.fromkeys(content["kind"] for content in contents)}
    lines = [{"format": FORMAT, "shared": shared}, *(_packed(one, shared[one["kind"]]) for one in contents)]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{json.dumps(line, separators=(',', ':'))}\n" for line in lines)
    write_atomically(path, lambda temporary: temporary.write_text(text))


def _shared(contents: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What most of some results say, by part."""
    found: dict[str, dict[str, Any]] = {}
    for part in _SHARED:
        counts = Counter((key, json.dumps(value)) for content in contents for key, value in content[part].items())
        found[part] = {key: json.loads(value) for (key, value), count in counts.items() if 2 * count > len(contents)}
    return found


def _packed(content: dict[str, Any], shared: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What a result has that the file's first line does not say; `without`: what that says and the result has not."""
    empty = dataclasses.asdict(Result(""))
    found = {key: value for key, value in content.items() if key not in _SHARED and value != empty[key]}
    for part in _SHARED:
        own = {key: value for key, value in content[part].items()
               if key not in shared[part] or json.dumps(shared[part][key]) != json.dumps(value)}
        found |= {part: own} if own else {}
    without = [f"{part}.{key}" for part in _SHARED for key in shared[part] if key not in content[part]]
    return found | ({"without": without} if without else {})


def read_packed(path: Path) -> list[Result]:
    """The results of a file of `write_packed`. Raises UserError for a file or a line that is not of this format."""
    try:
        first, *rest = Path(path).read_text(encoding="utf-8").splitlines() or [""]
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    head = _line(first, f"{path}, line 1,")
    if head.get("format") != FORMAT or _schema.fault(head.get("shared"), dict[str, dict[str, dict]]):
        raise UserError(f"{path} is no file of results that this program reads")
    return [_unpacked(_line(text, f"{path}, line {number},"), head["shared"], f"{path}, line {number},")
            for number, text in enumerate(rest, 2)]


def _line(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{where} is damaged: it is no JSON object")
    return found


def _unpacked(line: dict[str, Any], shared: Mapping[str, dict[str, Any]], where: str) -> Result:
    common, without = shared.get(str(line.get("kind")), {}), line.pop("without", [])
    for part in _SHARED:
        both = {key: value for key, value in common.get(part, {}).items() if f"{part}.{key}" not in without}
        line[part] = both | line.get(part, {})
    return _checked(dataclasses.asdict(Result("")) | line, where)


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
    cache = content["settings"].get("cache")
    if cache is not None and not isinstance(cache, dict):
        faults.append(f"settings.cache is {cache!r:.60} and should be keys with values")
    faults += [fault for key in ("inputs", "hashes")
               if (fault := _schema.fault(content[key], dict[str, str], key)) is not None]
    if content["kind"] == "throughput":
        faults += _check_times(content["throughput"] or {}, content["settings"])
    if content["images"] is not None and content["images"] < 1:
        faults.append(f"images is {content['images']}")
    for name, metric in content["metrics"].items():
        faults += [f"metric {name}{fault}" for fault in _check_metric(metric)]
    if content["macs"] is not None and content["macs"].keys() != {"macs", "macs_fc"}:
        faults.append("macs needs macs and macs_fc")
    return faults


# What tables read of the times that eval.throughput writes: the numbers of each entry of a list.
_TIMED = {"branches": ("median", "ratio"), "kinds": ("median", "ratio")}


def _check_times(times: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    numbers = {"settings.batch_size": settings.get("batch_size", 1)}
    if "full" in times:
        numbers["throughput.full.median"] = times["full"].get("median") if isinstance(times["full"], dict) else None
    for key, wanted in _TIMED.items():
        entries = times.get(key, [])
        if _schema.fault(entries, list[dict]):
            return [f"throughput.{key} is no list of keys with values"]
        numbers |= {f"throughput.{key}[{i}].{name}": entry.get(name)
                    for i, entry in enumerate(entries) for name in wanted}
    return [f"{name} is {value!r:.40} and should be a positive number" for name, value in numbers.items()
            if _schema.fault(value, float) or not value > 0]


def _check_metric(metric: object) -> list[str]:
    if not isinstance(metric, dict) or metric.keys() != {"value", "interval", "stderr"}:
        return [" needs value, interval and stderr"]
    interval = metric["interval"]
    if interval is not None and (not isinstance(interval, list) or len(interval) != 2):
        return [": the interval is not [low, high]"]
    if not all(isinstance(value, int | float) and math.isfinite(value)
               for value in (metric["value"], metric["stderr"] or 0, *(interval or []))):
        return [" is not finite"]
    return [": the interval runs backwards"] if interval is not None and interval[0] > interval[1] else []
