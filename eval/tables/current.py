"""Whether a number is current: everything that it depends on is unchanged, by content.

Tables, studies and Slurm jobs all ask `Wanted.fault`. A result that is not current is judged again, and a table shows
why it has no number.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from eval.cost import bk_sdm
from eval.cost.runs import pruned
from eval.metrics.extract import pixels_sha256
from eval.metrics.features import EffLite0
from eval.metrics.images import open_images
from eval.metrics.inception import DIMS
from eval.metrics.results import VERSION
from eval.metrics.sources import open_reference
from run.families import Config
from run.files import ROOT, stamp
from run.folder import differences, read_run, seeds_there
from run.labels import RULES
from run.prompts import prompts_sha256, read_prompts
from run.results import Result
from run.seeds import parse_seeds
from run.spec import Run
from run.weights import sha256
from unet_caching.errors import UserError

# scripts/download.sh puts the evaluators' files here.
INCEPTION = Path("checkpoints/inception/weights-inception-2015-12-05-6726825d.pth")
CLIP = Path("checkpoints/clip_vit_g_14/open_clip_pytorch_model.bin")
COMMANDS = ("adm", "fid", "clip_score", "quality")      # of eval/, with the conventions of the papers' tables
_RULE = ("interval", "schedule", "center", "power")     # the settings that decide which steps are full
# The files that an evaluator reads, by option: the name in a message, and the name of the digest in a result.
_READ = {"--reference": ("reference", "reference"), "--inception": ("Inception", "extractor"),
         "--weights": ("CLIP weights", "weights"), "--prompts": ("prompts", "prompts")}


@dataclass(frozen=True)
class Wanted:
    """What a number must belong to."""
    run: Run
    kind: str                   # of its result
    images: int | None          # None: any number
    inputs: Mapping[str, Path] = field(default_factory=dict)        # of the evaluator, by option
    samples: Path | None = None         # the folder of the images; None: the folder in the result
    published: bool = False             # whether it stands beside a paper's number
    seeds: str | None = None            # None: any
    against: Run | None = None          # the run that its run is compared with
    metrics: Sequence[str] = ()         # that the result must have

    def fault(self, result: Result) -> str | None:
        """Why a result is not current, in words; None if it is. Files that are missing here are not compared."""
        parts = (self._run, self._settings, self._inputs, self._seeds, self._samples, self._images)
        return next((why for part in parts for why in part(result)), None)

    def of_another_run(self, result: Result) -> bool:
        """Whether a result belongs to another row: another evaluator, model, sampler, or way to cache."""
        return any(True for _ in self._run(result))

    def trial(self, result: Result) -> str | None:
        """Why a result is a trial: another number of images, or a reference of too few; None if it is not."""
        return next(self._images(result), None)

    def progress(self) -> str:
        """Why there is no result, in words."""
        folder = self.samples or Path("samples") / self.run.config.name / self.run.name
        seeds, asked = seeds_there(folder), self.images or 0
        there = sum(seed < asked for seed in seeds)
        return "not judged" if there == asked else f"{there} of {asked} images sampled" if there else "not sampled"

    # How a result differs from the wanted one, in words. Each assumes that the ones before it found nothing.

    def _run(self, result: Result) -> Iterator[str]:
        if result.kind != self.kind:
            yield f"judged by eval.{result.kind}"
        ours, theirs = self.run.brief, result.settings
        keys = ("model", "sampler", "steps", "timesteps", "eta", "guidance")
        if any(theirs.get(key) != ours.get(key) for key in keys if key in ours or key in theirs):
            yield "another run"
        layout = (theirs.get("unet") or {}).get("diffusers")
        if pruned(self.run) != (None if layout is None else bk_sdm.size_of(layout) or "unknown"):
            yield "another U-Net"
        # The same values must be kept and reused, by any method; another rule may have chosen the full steps.
        cached, wanted = theirs.get("cache") or {}, self.run.caching.settings
        if any(cached.get(key) != wanted.get(key) for key in (cached.keys() | wanted.keys()) - {*_RULE}):
            yield "another way to cache"

    def _settings(self, result: Result) -> Iterator[str]:
        ours = _as_json({**self.run.settings, "cache": None})
        theirs = {key: value for key, value in result.settings.items() if key not in ("cache", "checkpoint_sha256")}
        if pruned(self.run) is not None:
            ours.pop("unet", None)
            theirs.pop("unet", None)
        if ours.get("labels") in RULES and theirs.get("labels") in RULES:    # equally many images of each class
            ours["labels"] = theirs["labels"]
        if "prompts_sha256" not in ours:            # the file is not on this machine
            theirs.pop("prompts_sha256", None)
        if getattr(self.run.spec.condition, "released_noise", False) and theirs.get("noise") != "per seed":
            theirs.pop("noise", None)
        if ours.get("prompts_sha256", "") != theirs.get("prompts_sha256", ""):
            yield "sampled from other prompts"
        if unlike := differences(theirs, ours):
            yield f"sampled with other settings ({'; '.join(unlike[:3])})"
        digest = result.settings.get("checkpoint_sha256")
        if digest is not None and (ROOT / self.run.checkpoint).exists() and weights_sha256(self.run) != digest:
            yield f"sampled with other weights than {self.run.checkpoint}"

    def _inputs(self, result: Result) -> Iterator[str]:
        """The evaluator and its files."""
        if result.provenance.get("evaluator", 1) != VERSION:
            yield "judged by an older evaluator"
        for option, path in self.inputs.items():
            what, digest = _READ[option]
            wanted = _digest(self.kind, option, path, self.run)
            if wanted is not None and wanted != result.hashes.get(digest):
                yield f"judged with another {what} than {path}"
            if wanted is None and option in ("--reference", "--prompts"):
                named = result.inputs.get(option.removeprefix("--"), "")
                if Path(named).name != path.name:
                    yield f"judged with another {what} ({named or 'unknown'}) than {path}"
        if self.kind not in COMMANDS and result.hashes.get("extractor", "") not in ("", extractor_id()):
            yield "judged with other features"

    def _seeds(self, result: Result) -> Iterator[str]:
        """The seeds, the run to compare with, and the metrics."""
        if self.seeds and result.details.get("seeds") != self.seeds:
            yield "measured on other seeds"
        if self.against and result.details.get("against") != _as_json(self.against.brief):
            yield f"compared with another run than {self.against.name}"
        yield from (f"without {name}" for name in self.metrics if name not in result.metrics)

    def _samples(self, result: Result) -> Iterator[str]:
        """The images that were judged, if they still exist."""
        folder = Path(result.inputs.get("samples", "nowhere")) if self.samples is None else self.samples
        if not (folder / "run.json").is_file():
            return
        if differences(read_run(folder)["settings"], result.settings):
            yield "the images were made anew with other settings"
        if _changed(folder, result, "images"):
            yield "the images are not those that were judged"
        for name in ("against", "converged", "twice"):
            other = Path(result.inputs.get(name, "nowhere"))
            if name in result.hashes and other.is_dir() and _changed(other, result, name):
                yield "the images that it is compared with are not those that were judged"

    def _images(self, result: Result) -> Iterator[str]:
        if self.images is not None and result.images != self.images:
            yield f"trial with {result.images} images"
        few = result.details.get("reference_images")
        if self.published and isinstance(few, int) and few <= DIMS["pool"]:
            yield f"trial against {few} images"


class Match(NamedTuple):
    """The result for a wanted number, if there is one. why: it is missing, or is only a trial."""
    path: Path | None
    result: Result | None
    why: str | None


def match(found: Iterable[tuple[Path, Result]], wanted: Wanted, trials: bool = False) -> Match:
    """The newest current result, or why none is current. trials: a result of another number of images will do, too.

    Every table, of a paper or a study, takes its numbers from here.
    """
    own = sorted((pair for pair in found if not wanted.of_another_run(pair[1])),
                 key=lambda pair: (pair[1].finished or "", str(pair[0])), reverse=True)
    others = list[Match]()
    for path, result in own:
        fault = wanted.fault(result)
        if fault is None:
            return Match(path, result, None)
        others.append(Match(path, result, fault))
    trial = next((one for one in others if one.result and one.why == wanted.trial(one.result)), None)
    if trial and trials:
        return trial
    last = trial or next(iter(others), None)
    return Match(None, None, last.why if last else None)


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(settings))


def _changed(folder: Path, result: Result, key: str) -> bool:
    """Whether the images in a folder differ from a result's hash with the name `key`."""
    seeds = result.details.get("seeds")
    try:
        wanted = parse_seeds(seeds) if isinstance(seeds, str) else range(result.images or 0)
        return key in result.hashes and pixels_sha256(open_images(folder, wanted)) != result.hashes[key]
    except UserError:                   # some are gone: the others say nothing about the number
        return False


def _digest(kind: str, option: str, path: Path, run: Run) -> str | None:
    """The digest of a file of the evaluator; None if it is not on this machine."""
    if option == "--prompts":
        return prompts_sha256(read_prompts(ROOT / path)) if (ROOT / path).is_file() else None
    if kind in ("adm", "fid", "clip_score"):
        return sha256(ROOT / path) if (ROOT / path).is_file() else None
    emoji = str(path).startswith("emoji:")
    if not emoji and not (ROOT / path).exists():
        return None
    return _reference_sha256(str(path) if emoji else str(ROOT / path), run.family.resolution(run.config),
                             *(() if emoji else stamp(ROOT / path)))


def weights_sha256(run: Run) -> str:
    """The sha256 of a run's weights, as in its run.json."""
    return run.family.checkpoint_sha256(ROOT / run.checkpoint, **run.weights)


@cache
def extractor_id() -> str:
    """The id of the network behind the small models' distances."""
    return EffLite0().id


@cache
def _reference_sha256(text: str, size: int, *seen: object) -> str:
    return pixels_sha256(open_reference(text, (size, size))[0])


def trained_on(config: Config) -> str | None:
    """The images that a model was trained on here, as --reference of eval.quality; None for a published model."""
    train = getattr(config, "train", None)
    if train is None:
        return None
    groups = getattr(train, "groups", None) or [train.group or "all"]
    return f"emoji:{','.join(groups)}"


def reference_of(run: Run, named: Sequence[str] = ()) -> Path:
    """The reference of a run: from the user's MODEL=PATH or PATH, else the training images or the default place."""
    name = run.config.name
    for text in named:
        model, _, path = text.rpartition("=")
        if model in ("", name):
            return Path(path)
    return Path(trained_on(run.config) or run.family.references.get(name) or f"data/references/{name}.npz")


def inputs_of(run: Run, kind: str, inception: Path = INCEPTION, clip_weights: Path = CLIP,
              references: Sequence[str] = ()) -> dict[str, Path]:
    """The files that the evaluator of a run reads, by option. references: the user's, see `reference_of`."""
    prompts: Path | None = getattr(run.spec.condition, "prompts", None)
    if kind == "clip_score" and prompts:
        return {"--prompts": prompts, "--weights": clip_weights}
    if kind not in COMMANDS:
        return {}
    found: dict[str, Any] = {"--reference": reference_of(run, references)}
    return found | ({"--inception": inception} if kind != "quality" else {})
