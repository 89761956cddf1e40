"""Measures how much every residual changes from step to step, and what it costs: OUT.json and pictures of it.

    python -m lab.fit changes --config configs/ddpm_emoji.yaml --out changes.json
    python -m lab.fit block-schedule --changes changes.json --kinds all --macs 0.5 --out half.json

Block Caching's schedules (arXiv 2312.03209) are made of that alone; they need no weights.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from eval.cost.runs import costs_of
from lab.fit.block_plots import change_curves, similarity_maps
from lab.fit.fit import Fit, batches, own_unet
from lab.fit.meters import SimilarityMeter, changes_of
from run.files import write_json
from run.image_model import ImageModel
from run.provenance import provenance
from run.seeds import format_seeds
from unet_caching.errors import UserError, as_user_error
from unet_caching.files.fitted import BOUND
from unet_caching.files.schema import check, read_json
from unet_caching.methods.block_cache import KINDS
from unet_caching.methods.deepcache import DeepCache
from unet_caching.options import option

KIND, FORMAT = "block changes", 1


@dataclass
class Residual:
    """What is known of one residual."""
    kind: str                   # of `KINDS`
    changes: list[float]        # of each call from the one before
    macs: list[float]           # hook, fc


@dataclass
class BlockChanges:
    """The changes of all residuals of a run, with the MACs of one network call and one row."""
    run: dict[str, Any]                 # the settings under BOUND
    calls: int
    measured: dict[str, Any]            # what the changes come from
    residuals: dict[str, Residual]      # by name
    macs_full: list[float]              # of a full call
    macs_cached: list[list[float]]      # of DeepCache's cached call at each branch

    def save(self, path: Path) -> None:
        """Write it as JSON, atomically."""
        write_json(path, {"kind": KIND, "format": FORMAT, **asdict(self)})

    @classmethod
    def load(cls, path: Path) -> "BlockChanges":
        """Read a file. Raises UserError where it is missing or damaged."""
        if not Path(path).is_file():
            raise UserError(f"no measured changes {path}: python -m lab.fit changes makes them")
        with as_user_error():
            content = read_json(path)
            known = content if isinstance(content, dict) else {}
            if (known.pop("kind", None), known.pop("format", None)) != (KIND, FORMAT):
                raise UserError(f"{path} holds no block changes of format {FORMAT}")
            check(content, cls, path)
        residuals = {name: Residual(**one) for name, one in content.pop("residuals").items()}
        changes = cls(**content, residuals=residuals)
        wrong = [name for name, one in residuals.items() if len(one.changes) != changes.calls or len(one.macs) != 2]
        if wrong or not all(len(macs) == 2 for macs in (changes.macs_full, *changes.macs_cached)):
            raise UserError(f"{path} is damaged: it should hold {changes.calls} changes of each residual, and MACs in "
                            "two conventions")
        return changes

    def of_kinds(self, kinds: str) -> dict[str, list[float]]:
        """The changes of the residuals of `methods.block_cache.KINDS`. Raises UserError where there are none."""
        if kinds not in KINDS:
            raise UserError(f"unknown kind of blocks {kinds!r}: choose from {', '.join(KINDS)}")
        wanted = ("transformer", "resnet") if kinds == "all" else (kinds,)
        found = {name: one.changes for name, one in self.residuals.items() if one.kind in wanted}
        if not found:
            raise UserError(f"{self.run['model']} has no {kinds} blocks that could be cached")
        return found


class Made(NamedTuple):
    """What was measured. similar: at each branch, the similarity of the feature between all pairs of steps."""
    changes: BlockChanges
    similar: dict[int, Tensor]


@dataclass(frozen=True)
class ChangesFit(Fit):
    """Change curves."""
    title = "what is measured"
    seeds = "0-63"              # the paper measures 32 prompts with 2 seeds each
    judged = False
    similar: int = option(4, "runs for the similarity of DeepCache's features (default: %(default)s)", least=0)

    def fit(self, model: ImageModel, seeds: list[int], batch_size: int) -> Made:
        kinds = {name: str(module.kind) for name, module in own_unet(model).named_modules()
                 if getattr(module, "kind", None)}
        changes = changes_of(model, kinds, seeds, batch_size)
        unknown = next((name for name in kinds if not changes[name].isfinite().all()), None)
        if unknown is not None:
            raise UserError(f"the changes of {unknown} are not finite: an overflow of the number format (use --dtype "
                            "fp32 or bf16), or damaged weights")
        branches = range(model.run.unet.num_branches)
        similar = SimilarityMeter(branches)
        for batch, report in batches(seeds[:self.similar], 2, "similarity", model):
            model.latents(batch, similar, report=report)
            similar.reset()
        costs = costs_of(model.run)
        cached = [costs.calls(DeepCache(branch, [0]), 2)[1] for branch in branches]
        notes = {"seeds": format_seeds(seeds), "settings": model.settings, "provenance": provenance(model.device)}
        residuals = {name: Residual(kind, changes[name].double().mean(0).tolist(), list(costs.values[name]))
                     for name, kind in kinds.items()}
        made = BlockChanges({key: model.settings[key] for key in BOUND}, model.sampler.calls, notes, residuals,
                            list(costs.full), [list(macs) for macs in cached])
        return Made(made, similar.similarities())

    def write(self, made: Made, path: Path) -> dict[str, Any]:
        made.changes.save(path)
        for kind in sorted({one.kind for one in made.changes.residuals.values()}):
            change_curves(made.changes.of_kinds(kind), path.with_name(f"{path.stem}_{kind}.png"))
        if made.similar:
            similarity_maps(made.similar, path.with_name(f"{path.stem}_similarity.png"))
        return made.changes.measured
