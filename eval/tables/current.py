"""Whether a number is current: everything that it depends on is unchanged, by content.

Tables, plans, sweeps and Slurm ask `Wanted.fault` and nothing else: a result that is not current is judged again, and a
table says why it has no number.
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

# Where scripts/download.sh puts what the evaluators need.
INCEPTION = Path("checkpoints/inception/weights-inception-2015-12-05-6726825d.pth")
CLIP = Path("checkpoints/clip_vit_g_14/open_clip_pytorch_model.bin")
COMMANDS = ("adm", "fid", "clip_score", "quality")      # of eval/, which judge as the papers' tables want it
_RULE = ("interval", "schedule", "center", "power")     # of what says which steps are full
# What an evaluator reads, by option: what it is called, and the name of its digest in a result.
_READ = {"--reference": ("reference", "reference"), "--inception": ("Inception", "extractor"),
         "--weights": ("CLIP weights", "weights"), "--prompts": ("prompts", "prompts")}


@dataclass(frozen=True)
class Wanted:
    """What a number is to be of."""
    run: Run
    kind: str                   # of its result
    images: int | None          # None: any number
    inputs: Mapping[str, Path] = field(default_factory=dict)        # of the evaluator, by option
    samples: Path | None = None         # the folder of the images; None: that which a result names
    published: bool = False             # it is to stand beside a paper's
    seeds: str | None = None            # None: any
    against: Run | None = None          # the run that its run is compared with
    metrics: Sequence[str] = ()         # that it must have

    def fault(self, result: Result) -> str | None:
        """Why a result is not current, in words; None where it is. What is not on this machine is not compared."""
        parts = (self._run, self._settings, self._inputs, self._seeds, self._samples, self._images)
        return next((why for part in parts for why in part(result)), None)

    def of_another_run(self, result: Result) -> bool:
        """Whether it is of another row altogether: another evaluator, model, sampler, or way to cache."""
        return any(True for _ in self._run(result))

    def trial(self, result: Result) -> str | None:
        """Whether it is of another number of images, or against so few that a paper's number is another thing."""
        return next(self._images(result), None)

    def progress(self) -> str:
        """Why there is no result at all, in words."""
        folder = self.samples or Path("samples") / self.run.config.name / self.run.name
        seeds, asked = seeds_there(folder), self.images or 0
        there = sum(seed < asked for seed in seeds)
        return "not judged" if there == asked else f"{there} of {asked} images sampled" if there else "not sampled"

    # How a result differs from what is wanted, in words, each question where all before have found nothing.

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
        # What is kept and reused must be the same, by whatever method; the rule that gave the full steps may be
        # another.
        cached, wanted = theirs.get("cache") or {}, self.run.caching.settings
        if any(cached.get(key) != wanted.get(key) for key in (cached.keys() | wanted.keys()) - {*_RULE}):
            yield "another way to cache"

    def _settings(self, result: Result) -> Iterator[str]:
        ours = _as_json({**self.run.settings, "cache": None})
        theirs = {key: value for key, value in result.settings.items() if key not in ("cache", "checkpoint_sha256")}
        if pruned(self.run) is not None:
            ours.pop("unet", None)
            theirs.pop("unet", None)
        if ours.get("labels") in RULES and theirs.get("labels") in RULES:    # as many images of each class by either
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
        """Of the evaluator and its files."""
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
        """And of what it is compared with, and of its metrics."""
        if self.seeds and result.details.get("seeds") != self.seeds:
            yield "measured on other seeds"
        if self.against and result.details.get("against") != _as_json(self.against.brief):
            yield f"compared with another run than {self.against.name}"
        yield from (f"without {name}" for name in self.metrics if name not in result.metrics)

    def _samples(self, result: Result) -> Iterator[str]:
        """Of the images that were judged, where they are still there."""
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
    """The number that is wanted. result: None where there is none. why: there is none, or it is not quite that."""
    path: Path | None
    result: Result | None
    why: str | None


def match(found: Iterable[tuple[Path, Result]], wanted: Wanted, trials: bool = False) -> Match:
    """The newest of some results that is current, or why none is; with `trials`, else one of another number of images.

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
    """Whether the images in a folder are others than a result's hash of that name says."""
    seeds = result.details.get("seeds")
    try:
        wanted = parse_seeds(seeds) if isinstance(seeds, str) else range(result.images or 0)
        return key in result.hashes and pixels_sha256(open_images(folder, wanted)) != result.hashes[key]
    except UserError:                   # some are gone: what is left says nothing of the number
        return False


def _digest(kind: str, option: str, path: Path, run: Run) -> str | None:
    """The digest of what is to be judged with; None where it is not on this machine."""
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
    """Of the weights of a run, as run.json says it."""
    return run.family.checkpoint_sha256(ROOT / run.checkpoint, **run.weights)


@cache
def extractor_id() -> str:
    """Of the network of the small models' distances."""
    return EffLite0().id


@cache
def _reference_sha256(text: str, size: int, *seen: object) -> str:
    return pixels_sha256(open_reference(text, (size, size))[0])


def trained_on(config: Config) -> str | None:
    """The images that a model was trained on here, as eval.quality calls them; None for a published one."""
    train = getattr(config, "train", None)
    if train is None:
        return None
    groups = getattr(train, "groups", None) or [train.group or "all"]
    return f"emoji:{','.join(groups)}"


def reference_of(run: Run, named: Sequence[str] = ()) -> Path:
    """MODEL=PATH or PATH of the user's, else what the model was trained on, or where its reference is looked for."""
    name = run.config.name
    for text in named:
        model, _, path = text.rpartition("=")
        if model in ("", name):
            return Path(path)
    return Path(trained_on(run.config) or run.family.references.get(name) or f"data/references/{name}.npz")


def inputs_of(run: Run, kind: str, inception: Path = INCEPTION, clip_weights: Path = CLIP,
              references: Sequence[str] = ()) -> dict[str, Path]:
    """What the evaluator of a run reads, by option. references: of the user's, see `reference_of`."""
    prompts: Path | None = getattr(run.spec.condition, "prompts", None)
    if kind == "clip_score" and prompts:
        return {"--prompts": prompts, "--weights": clip_weights}
    if kind not in COMMANDS:
        return {}
    found: dict[str, Any] = {"--reference": reference_of(run, references)}
    return found | ({"--inception": inception} if kind != "quality" else {})
