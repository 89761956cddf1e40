"""Measures how much every residual changes from step to step, and what it costs: OUT.json and pictures of it.

    python -m lab.fit changes --config configs/ddpm_emoji.yaml --out changes.json
    python -m lab.fit block-schedule --changes changes.json --kinds all --macs 0.5 --out half.json

Block Caching's schedules (arXiv 2312.03209) are made of that alone; they need no weights.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from eval.cost.runs import costs_of
from lab.fit.block_plots import change_curves, similarity_maps
from lab.fit.fit import Fit, batches, own_unet
from lab.fit.meters import SimilarityMeter, changes_of
from run.image_model import ImageModel
from run.provenance import provenance
from run.seeds import format_seeds
from unet_caching.errors import UserError
from unet_caching.files.fitted import Fitted
from unet_caching.methods.block_caching import KINDS
from unet_caching.methods.deepcache import DeepCache
from unet_caching.options import option


@dataclass
class Residual:
    """What is known of one residual."""
    kind: str                   # of `KINDS`
    changes: list[float]        # of each call from the one before
    macs: tuple[float, float]   # hook, fc


@dataclass
class BlockChanges(Fitted):
    """The changes of all residuals of a run, with the MACs of one network call and one row."""
    kind = "table of block changes"
    maker = "python -m lab.fit changes"
    calls: int
    residuals: dict[str, Residual]              # by name
    macs_full: tuple[float, float]              # hook, fc: of a full call
    macs_cached: list[tuple[float, float]]      # of DeepCache's cached call at each branch

    def fault(self) -> str | None:
        wrong = next((name for name, one in self.residuals.items() if len(one.changes) != self.calls), None)
        return None if wrong is None else f"{wrong} does not have a change for each of {self.calls} calls"

    def of_kinds(self, kinds: str) -> dict[str, list[float]]:
        """The changes of the residuals of `methods.block_caching.KINDS`. Raises UserError where there are none."""
        if kinds not in KINDS:
            raise UserError(f"unknown kind of blocks {kinds!r}: choose from {', '.join(KINDS)}")
        wanted = ("transformer", "resnet") if kinds == "all" else (kinds,)
        found = {name: one.changes for name, one in self.residuals.items() if one.kind in wanted}
        if not found:
            raise UserError(f"{self.made_for['model']} has no {kinds} blocks that could be cached")
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
        residuals = {name: Residual(kind, changes[name].double().mean(0).tolist(), costs.values[name])
                     for name, kind in kinds.items()}
        made = BlockChanges(model.run.made_for(model.settings["checkpoint_sha256"]), model.sampler.calls, residuals,
                            costs.full, list(cached), notes=notes)
        return Made(made, similar.similarities())

    def write(self, made: Made, path: Path) -> dict[str, Any]:
        made.changes.save(path)
        for kind in sorted({one.kind for one in made.changes.residuals.values()}):
            change_curves(made.changes.of_kinds(kind), path.with_name(f"{path.stem}_{kind}.png"))
        if made.similar:
            similarity_maps(made.similar, path.with_name(f"{path.stem}_similarity.png"))
        return made.changes.notes
