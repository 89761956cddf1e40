"""Block Caching (arXiv 2312.03209): reuse single residuals, each on a schedule derived from how much it changes.

Reused residuals may be scaled and shifted per channel, as in the paper, or be forecast (unet_caching/forecast.py),
which is not in the paper. Schedules and scale-shift tables are files of lab/fit, which belong to one model, sampler and
number of steps.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import nn

from unet_caching.files.fitted import Fitted
from unet_caching.files.schema import AtLeast
from unet_caching.keep import Adjustment, Keep
from unet_caching.methods.deepcache import DeepCacheMethod, ZeroedCache
from unet_caching.options import Method, MethodOptions, RunShape, ScheduledMethod, option

KINDS = ("transformer", "attention", "resnet", "all")


def residual_names(unet: nn.Module, kinds: str = "transformer") -> list[str]:
    """The names of a U-Net's residuals, which are their keys in a cache, in the order of its modules.

    kinds: 'transformer' (as in the paper: spatial transformers, DDPM's attention blocks), 'attention' (only the self-
    and cross-attention inside transformers), 'resnet' or 'all' (transformers and ResNet blocks).
    Raises ValueError for any other kind, and if the U-Net has no blocks of the kind.
    """
    if kinds not in KINDS:
        raise ValueError(f"unknown kind of blocks {kinds!r}: choose from {', '.join(KINDS)}")
    wanted = ("transformer", "resnet") if kinds == "all" else (kinds,)
    names = [name for name, module in unet.named_modules() if getattr(module, "kind", None) in wanted]
    if not names:
        raise ValueError(f"this U-Net has no {kinds} blocks that could be cached")
    return names


def outside(names: Iterable[str], num_branches: int, branch: int) -> list[str]:
    """The residuals that run on a cached step of DeepCache at `branch`: in blocks 0..branch of encoder and decoder."""
    def runs(name: str) -> bool:
        side, index, *_ = name.split(".")
        skip = {"input_blocks": int(index), "output_blocks": num_branches - 1 - int(index)}.get(side)
        return skip is not None and skip <= branch

    return [name for name in names if runs(name)]


@dataclass
class BlockSchedule(Fitted):
    """When each residual is computed."""
    kind = "block schedule"
    maker = "python -m lab.fit block-schedule"
    calls: Annotated[int, AtLeast(1)]       # network calls of a run
    kinds: str                              # one of KINDS
    delta: float | None                     # the threshold that gave the schedule, or None
    blocks: dict[str, list[int]]            # residual -> the calls that compute it
    macs: dict[str, float]                  # "hook", "fc": per call and row of the batch, in a run with this schedule
    macs_full: dict[str, float]             # the same without caching

    def fault(self) -> str | None:
        if not self.blocks:
            return "it has no blocks"
        wrong = next((name for name, steps in self.blocks.items() if steps != sorted(set(steps)) or steps[:1] != [0]
                      or steps[-1] >= self.calls), None)
        return None if wrong is None else (f"the steps of {wrong} must ascend from 0 and stay below {self.calls}, got "
                                           f"{self.blocks[wrong]}")

    def reusing(self) -> dict[str, list[int]]:
        """The calls that reuse each residual."""
        return {name: [call for call in range(self.calls) if call not in steps] for name, steps in self.blocks.items()}

    def outside(self, branch: int, num_branches: int) -> dict[str, list[int]]:
        """The part of the schedule for residuals that DeepCache at `branch` does not cache."""
        return {name: self.blocks[name] for name in outside(self.blocks, num_branches, branch)}


@dataclass
class ScaleShiftTable(Fitted):
    """The scales and shifts of reused residuals. tensors: residual -> [calls that reuse it, 2, channels]."""
    kind = "scale-shift table"
    maker = "python -m lab.fit scale-shift"
    has_tensors = True
    schedule_sha256: str                    # of the block schedule that the table was learnt for

    @classmethod
    def of(cls, table: Sequence[Adjustment], schedule: BlockSchedule) -> "ScaleShiftTable":
        """The table of the adjustments of each network call."""
        return cls(schedule.made_for, schedule.sha256, tensors={
            name: torch.stack([torch.stack(table[call][name]) for call in calls])
            for name, calls in schedule.reusing().items() if calls})

    def adjustments(self, schedule: BlockSchedule) -> list[Adjustment]:
        """The adjustments of each network call. Raises ValueError for another schedule."""
        if self.schedule_sha256 != schedule.sha256:
            raise ValueError("the scale-shift table was made for another block schedule")
        reusing = {name: calls for name, calls in schedule.reusing().items() if calls}
        if {name: len(value) for name, value in self.tensors.items()} != {k: len(v) for k, v in reusing.items()}:
            raise ValueError("the scale-shift table does not have a scale and shift for each reuse of a residual")
        return [{name: tuple(self.tensors[name][calls.index(call)]) for name, calls in reusing.items() if call in calls}
                for call in range(schedule.calls)]

    def fault(self) -> str | None:
        wrong = next((name for name, value in self.tensors.items() if value.ndim != 3 or value.shape[1] != 2), None)
        return super().fault() if wrong is None else f"{wrong} should be [calls that reuse it, 2, channels]"


class BlockCachingMethod(ScheduledMethod):
    """A block schedule in a run, or with DeepCache the part outside of its cached level."""

    def __init__(self, schedule: BlockSchedule, blocks: dict[str, list[int]], scale_shift: ScaleShiftTable | None,
                 name: str, calls: int):
        self.schedule, self.computed = schedule, blocks
        self.files = (schedule,) if scale_shift is None else (schedule, scale_shift)
        self.table = None if scale_shift is None else scale_shift.adjustments(schedule)
        self.settings = {"block_caching": {
            "schedule_sha256": schedule.sha256, "kinds": schedule.kinds, "delta": schedule.delta,
            "blocks": len(blocks), "scale_shift_sha256": None if scale_shift is None else scale_shift.sha256}}
        self.system = str(schedule.notes.get("system", ""))     # lab.fit kinds with a system of their own note its name
        self.name = [f"blocks_{name}", *(["scale_shift"] if scale_shift else [])]
        self.summary = (f"blocks computed {sum(map(len, blocks.values()))} of {len(blocks) * calls} times"
                        + (", with scale-shift" if scale_shift else ""))

    def policy(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Keep:
        table = None if self.table is None else [
            {name: (scale.to(device, dtype), shift.to(device, dtype)) for name, (scale, shift) in call.items()}
            for call in self.table]
        return Keep(self.computed, self.forecast, table)

    def check_network(self, channels: Mapping[Hashable, int]) -> None:
        unknown = [name for name in self.computed if name not in channels]
        if unknown:
            raise ValueError(f"the block schedule names {unknown[0]}, but this U-Net has no such block")
        for call in self.table or ():
            for name, (scale, _) in call.items():
                if len(scale) != channels.get(name, len(scale)):
                    raise ValueError(f"the scale-shift table has {len(scale)} channels for {name}, but this U-Net has "
                                     f"{channels[name]}")


@dataclass(frozen=True)
class BlockCachingOptions(MethodOptions):
    """When each block is computed, and how reused ones are adjusted."""
    title = "caching (Block Caching; with --interval, of the blocks outside the cached level)"
    rare = True
    block_schedule: Path | None = option(None, "when each block is computed, by lab.fit", metavar="FILE")
    scale_shift: Path | None = option(None, "scale and shift of reused blocks, by lab.fit", metavar="FILE")

    def bind(self, shape: RunShape, others: Sequence[Method]) -> BlockCachingMethod | None:
        if self.block_schedule is None:
            if self.scale_shift is not None:
                raise ValueError("--scale-shift adjusts the blocks of a schedule: it needs --block-schedule")
            return None
        level = next((one for one in others if isinstance(one, DeepCacheMethod)), None)
        if level is not None and level.kind is ZeroedCache:
            raise ValueError("--zero-cache is an ablation of DeepCache without others: leave out --block-schedule")
        schedule = BlockSchedule.load(self.block_schedule)
        if schedule.made_for["steps"] == shape.steps and schedule.calls != shape.calls:
            raise ValueError(f"{self.block_schedule} is for {schedule.calls} network calls, but this run makes "
                             f"{shape.calls}")
        scale_shift = None if self.scale_shift is None else ScaleShiftTable.load(self.scale_shift)
        blocks = schedule.outside(level.branch, shape.num_branches) if level else schedule.blocks
        return BlockCachingMethod(schedule, blocks, scale_shift, self.block_schedule.stem, shape.calls)
