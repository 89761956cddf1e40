"""The one format of every number that the project measures: JSON under results/, written and read only here.

    results.write(path, Result("fidelity", "ddpm_emoji", settings, images=256, metrics={"PSNR": Metric(37.5)}))

A metric has its name from the literature only if it is exactly that measure: FID, sFID, IS, KID, CLIP score, PSNR,
SSIM, LPIPS; precision and recall (0 to 1) of Inception features. A distance of other features has another name:
FD-EffLite0, FD-IncMixed5. The `kind` says whose convention was used: adm, fid (pytorch-fid's), clip_score, fidelity,
quality, throughput, demo. eval.table puts a number into a cell of a paper if kind, settings and images are the row's.
"""

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from run.files import write_atomically, write_json
from unet_caching.errors import UserError, as_user_error
from unet_caching.files.schema import AtLeast, build, fault, parse_json, read_json

FORMAT = 1


@dataclass
class Metric:
    """One number, its 95 % interval [low, high] and its standard error; None if unknown."""
    value: float
    interval: list[float] | None = None
    stderr: float | None = None

    @classmethod
    def of(cls, estimate: Mapping[str, Any]) -> "Metric":
        """Read an estimate of the evaluators: {value or mean, interval, stderr}. The last two may be missing."""
        return cls(estimate["value" if "value" in estimate else "mean"], estimate.get("interval"),
                   estimate.get("stderr"))

    @property
    def bounds(self) -> tuple[float, float, float]:
        """The value and the ends of its interval; the value three times if the interval is not known."""
        low, high = self.interval or (self.value, self.value)
        return self.value, low, high


@dataclass
class Cost:
    """Multiply-accumulates per step (mean over the steps) of one row of the batch, in both conventions of eval.macs."""
    macs: float
    macs_fc: float


@dataclass
class Result:
    """What one command measured, and everything that it depends on."""
    kind: str                           # which command, and so which convention
    model: str | None = None            # name of the config
    settings: dict[str, Any] = field(default_factory=dict)      # what decided the pixels, as in run.json, or the times
    images: Annotated[int, AtLeast(1)] | None = None            # how many were judged
    metrics: dict[str, Metric] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)        # what was read, as the user named it
    hashes: dict[str, str] = field(default_factory=dict)        # sha256 of checkpoint, extractor, reference, images ...
    macs: Cost | None = None            # of the sampled schedule
    throughput: dict[str, Any] | None = None                    # step times, as their commands write them
    provenance: dict[str, Any] = field(default_factory=dict)    # commit, versions, device
    finished: str | None = None         # UTC, 2026-01-31T23:59:59Z
    duration_s: float | None = None
    details: dict[str, Any] = field(default_factory=dict)       # other values, under the command's own names
    format: int = FORMAT

    @property
    def full_steps(self) -> list[int]:
        """The steps on which the whole network ran: all of them without caching."""
        return self.settings.get("cache", {}).get("full_steps") or list(range(self.settings.get("steps", 0)))

    @property
    def times(self) -> dict[str, Any]:
        """The step times; empty if none were measured."""
        return self.throughput or {}

    def stamped(self, started: float | None) -> "Result":
        """The result with the time now as its end. started: time.time() of the start; None leaves out the duration."""
        return dataclasses.replace(self, finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                                   duration_s=None if started is None else round(time.time() - started, 3))


def write(path: Path, result: Result) -> None:
    """Write a result as JSON, atomically. Raises ValueError for one that breaks the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, _content(result))


def _content(result: Result) -> dict[str, Any]:
    content = dataclasses.asdict(result)
    if wrong := _wrong(content):
        raise ValueError(f"not a result: {wrong}")
    return content


def read(path: Path) -> Result:
    """Read a result. Raises UserError for a file that is missing, is not JSON, not a result, or of another format."""
    if not Path(path).is_file():
        raise UserError(f"no result {path}")
    with as_user_error():
        return _checked(read_json(path), path)


def _checked(content: Any, path: Path | str) -> Result:
    if wrong := _wrong(content):
        raise UserError(f"{path} is not a result of this program: {wrong}")
    return build(content, Result)


def read_all(folder: Path, models: Collection[str] | None = None) -> Iterator[tuple[Path, Result]]:
    """Every result in the JSON and JSON-lines files under a folder, with its path; FILE.jsonl#N for line N of a file.

    models: read only these models' lines. Raises UserError, naming the place, for something that is not a result.
    """
    for path in sorted(Path(folder).rglob("*.json*")):
        if path.suffix == ".json":
            yield path, read(path)
        elif path.suffix == ".jsonl":
            for number, result in _lines(path, models):
                yield Path(f"{path}#{number}"), result


_SHARED = ("settings", "inputs", "hashes", "provenance", "details")     # parts with entries that most results share


def write_packed(path: Path, found: Sequence[Result]) -> None:
    """Write results as JSON lines, atomically. The first line holds the entries that most results of a kind share."""
    contents = [_content(result) for result in found]
    shared = {kind: _shared([content for content in contents if content["kind"] == kind])
              for kind in dict.fromkeys(content["kind"] for content in contents)}
    lines = [{"format": FORMAT, "shared": shared}, *(_packed(one, shared[one["kind"]]) for one in contents)]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{json.dumps(line, separators=(',', ':'))}\n" for line in lines)
    write_atomically(path, lambda temporary: temporary.write_text(text))


def _shared(contents: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The entries that more than half of these results share, by part."""
    found: dict[str, dict[str, Any]] = {}
    for part in _SHARED:
        counts = Counter((key, json.dumps(value)) for content in contents for key, value in content[part].items())
        found[part] = {key: json.loads(value) for (key, value), count in counts.items() if 2 * count > len(contents)}
    return found


def _packed(content: dict[str, Any], shared: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The entries of a result that are not in the first line; `without` lists shared entries that it does not have."""
    empty = dataclasses.asdict(Result(""))
    found = {key: value for key, value in content.items() if key not in _SHARED and value != empty[key]}
    for part in _SHARED:
        own = {key: value for key, value in content[part].items()
               if key not in shared[part] or json.dumps(shared[part][key]) != json.dumps(value)}
        found |= {part: own} if own else {}
    without = [f"{part}.{key}" for part in _SHARED for key in shared[part] if key not in content[part]]
    return found | ({"without": without} if without else {})


def read_packed(path: Path) -> list[Result]:
    """The results in a file of `write_packed`. Raises UserError for a file or a line that is not of this format."""
    return [result for _, result in _lines(path)]


def _lines(path: Path, models: Collection[str] | None = None) -> Iterator[tuple[int, Result]]:
    """The results of some models, or of all, with their line numbers."""
    with as_user_error():
        lines = [parse_json(line, f"{path}, line {number},")
                 for number, line in enumerate(Path(path).read_bytes().splitlines(), 1)]
    head, *rest = lines or [None]
    if fault(head, _Head) or head["format"] != FORMAT:
        raise UserError(f"{path} is not a file of results that this program reads")
    for number, line in enumerate(rest, 2):
        if models is None or not isinstance(line, dict) or line.get("model") in models:
            yield number, _unpacked(line, head["shared"], f"{path}, line {number},")


@dataclass
class _Head:
    """The first line of a JSON-lines file."""
    format: int
    shared: dict[str, dict[str, dict]]


def _unpacked(line: Any, shared: Mapping[str, dict[str, Any]], where: str) -> Result:
    if not isinstance(line, dict):
        raise UserError(f"{where} is damaged: it is not a JSON object")
    common, without = shared.get(str(line.get("kind")), {}), line.pop("without", [])
    for part in _SHARED:
        both = {key: value for key, value in common.get(part, {}).items() if f"{part}.{key}" not in without}
        line[part] = both | line.get(part, {})
    return _checked(line, where)


def _wrong(content: Any) -> str | None:
    """What is wrong with the JSON of a result; None if it is right."""
    if isinstance(content, dict) and isinstance(content.get("format"), int) and content["format"] != FORMAT:
        return f"it has format {content['format']}, this program reads {FORMAT}"
    if wrong := fault(content, Result):
        return wrong
    if wrong := fault(content.get("settings", {}).get("cache"), dict | None, "settings.cache"):
        return wrong
    for name, metric in content.get("metrics", {}).items():
        interval = metric.get("interval")
        if interval and (len(interval) != 2 or interval[0] > interval[1]):
            return f"metrics.{name}: the interval is not [low, high]"
    if content["kind"] != "throughput":
        return None
    return _wrong_times(content.get("throughput") or {}, content.get("settings", {}))


def _wrong_times(times: dict[str, Any], settings: dict[str, Any]) -> str | None:
    """What is wrong with eval.throughput's times, as far as tables read them; None if nothing is."""
    numbers = {"settings.batch_size": settings.get("batch_size", 1)}
    if "full" in times:
        numbers["throughput.full.median"] = times["full"].get("median") if isinstance(times["full"], dict) else None
    for key in ("branches", "kinds"):
        entries = times.get(key, [])
        if wrong := fault(entries, list[dict], f"throughput.{key}"):
            return wrong
        numbers |= {f"throughput.{key}[{i}].{name}": entry.get(name)
                    for i, entry in enumerate(entries) for name in ("median", "ratio")}
    return next((f"{name} is {value!r:.40} and should be a positive number" for name, value in numbers.items()
                 if fault(value, float) or not value > 0), None)
