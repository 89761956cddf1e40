"""Measure how much every residual changes from step to step, and its cost: OUT.json and pictures.

    python -m lab.fit changes --config configs/ddpm_emoji.yaml --out changes.json
    python -m lab.fit block-schedule --changes changes.json --kinds all --macs 0.5 --out half.json

Block Caching's schedules (arXiv 2312.03209) are made from this file only, without weights.
"""

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from eval.cost.runs import costs_of
from lab.fit.block_plots import change_curves
from lab.fit.fit import Fit, batches, own_unet
from run.image_model import ImageModel
from run.provenance import provenance
from run.seeds import format_seeds
from unet_caching.errors import UserError
from unet_caching.files.fitted import Fitted
from unet_caching.methods.adaptive import relative_change
from unet_caching.methods.block_caching import KINDS
from unet_caching.policy import Policy


@dataclass
class Residual:
    """The measured changes and the MACs of a residual."""
    kind: str                   # of `KINDS`
    changes: list[float]        # from the call before, for each call
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
        """The changes of the residuals of a kind of `methods.block_caching.KINDS`. Raises UserError if it has none."""
        if kinds not in KINDS:
            raise UserError(f"unknown kind of blocks {kinds!r}: choose from {', '.join(KINDS)}")
        wanted = ("transformer", "resnet") if kinds == "all" else (kinds,)
        found = {name: one.changes for name, one in self.residuals.items() if one.kind in wanted}
        if not found:
            raise UserError(f"{self.made_for['model']} has no {kinds} blocks to cache")
        return found


class ChangeMeter(Policy):
    """Measures how much values change from call to call, by row (L1rel of Block Caching, arXiv 2312.03209)."""

    def __init__(self, keys: Collection[Hashable]):
        self.batches: dict[Hashable, list[Tensor]] = {key: [] for key in keys}
        self.reset()

    def reset(self) -> None:
        """Add the changes of the batch to those of earlier batches."""
        for key, calls in getattr(self, "calls", {}).items():
            self.batches[key].append(torch.stack(calls, 1))
        self.calls: dict[Hashable, list[Tensor]] = {}
        self.previous: dict[Hashable, Tensor] = {}

    def __call__(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        value = compute()
        if key in self.batches:
            change = relative_change(value, self.previous.get(key, value))
            self.calls.setdefault(key, []).append(change.cpu())
            self.previous[key] = value
        return value

    def changes(self) -> dict[Hashable, Tensor]:
        """The change of each value from the call before, by key: float32 [rows of all batches, calls]; 0 in the first
        call."""
        return {key: torch.cat(batches) for key, batches in self.batches.items()}


def changes_of(model: ImageModel, keys: Collection[Hashable], seeds: Sequence[int], batch_size: int
               ) -> dict[Hashable, Tensor]:
    """The changes of values in the uncached runs of a loaded model, as `ChangeMeter.changes`."""
    meter = ChangeMeter(keys)
    for batch, report in batches(seeds, batch_size, "changes", model):
        model.latents(batch, meter, report=report)
        meter.reset()
    return meter.changes()


@dataclass(frozen=True)
class ChangesFit(Fit):
    title = "the measurement"
    file = BlockChanges
    seeds = "0-63"              # the paper measures 32 prompts with 2 seeds each
    judged = False

    def fit(self, model: ImageModel, seeds: list[int], batch_size: int) -> BlockChanges:
        kinds = {name: str(module.kind) for name, module in own_unet(model).named_modules()
                 if getattr(module, "kind", None)}
        changes = changes_of(model, kinds, seeds, batch_size)
        unknown = next((name for name in kinds if not changes[name].isfinite().all()), None)
        if unknown is not None:
            raise UserError(f"the changes of {unknown} are not finite: an overflow of the number format (use --dtype "
                            "fp32 or bf16), or damaged weights")
        costs = costs_of(model.run)
        cached = [costs.cached(branch) for branch in range(model.run.unet.num_branches)]
        residuals = {name: Residual(kind, changes[name].double().mean(0).tolist(), costs.values[name])
                     for name, kind in kinds.items()}
        notes = {"seeds": format_seeds(seeds), "settings": model.settings, "provenance": provenance(model.device)}
        return BlockChanges(model.run.made_for(model.settings["checkpoint_sha256"]), model.sampler.calls, residuals,
                            costs.full, list(cached), notes=notes)

    def draw(self, model: ImageModel, made: BlockChanges, seeds: list[int], path: Path) -> None:
        for kind in sorted({one.kind for one in made.residuals.values()}):
            change_curves(made.of_kinds(kind), path.with_name(f"{path.stem}_{kind}.png"))
