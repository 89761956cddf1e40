"""Files of Block Caching: a schedule (JSON) says when each residual is computed, a scale-shift table (safetensors) how
reused ones are adjusted. Both belong to one model, sampler and number of steps, and are refused by any other run.

Errors are ValueErrors here, which say what was wrong with which file.
"""

import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unet_caching.files.fitted import BOUND, file_sha256, read_signed, refuse_other_run
from unet_caching.files.schema import AtLeast
from unet_caching.forecast import Damping, Forecast, check_order, usable
from unet_caching.keep import Adjustment, Keep
from unet_caching.methods.block_cache import outside
from unet_caching.methods.deepcache import PlannedDeepCache
from unet_caching.options import MethodOptions, Planned, RunShape, option

KIND, FORMAT = "block schedule", 1


@dataclass
class BlockSchedule:
    """When each residual is computed, and where that comes from.

    run: the settings under BOUND; a checkpoint_sha256 of None stands for any weights. calls: network calls. kinds:
    `methods.block_cache.KINDS`. delta: the threshold, None where it was not made from one. blocks: residual -> steps
    that compute it. measured: what the changes come from. macs, macs_full: per step and row, {"hook", "fc"}, of a run
    with this schedule and of one without caching.
    """
    run: dict
    calls: Annotated[int, AtLeast(1)]
    kinds: str
    delta: float | None
    blocks: dict[str, list[int]]
    measured: dict
    macs: dict[str, float]
    macs_full: dict[str, float]

    @property
    def sha256(self) -> str:
        """The digest of what decides the pixels."""
        content = {"run": self.run, "calls": self.calls, "blocks": self.blocks}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """What `load` reads."""
        return {"kind": KIND, "format": FORMAT, "sha256": self.sha256, **asdict(self)}

    @classmethod
    def load(cls, path: Path) -> "BlockSchedule":
        """Read a file. Raises ValueError where it is missing, damaged or changed by hand."""
        schedule = read_signed(cls, path, KIND, FORMAT, "lab.fit block-schedule")
        if not schedule.blocks:
            raise ValueError(f"{path} has no blocks")
        for name, steps in schedule.blocks.items():
            if steps != sorted(set(steps)) or steps[:1] != [0] or steps[-1] >= schedule.calls:
                raise ValueError(f"{path}: the steps of {name} must ascend from 0 and stay below {schedule.calls}, "
                                f"got {steps}")
        return schedule

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse a run of other settings than it was made for; those not known yet may be left out.

        Raises ValueError that says what differs.
        """
        refuse_other_run("the block schedule was made", {key: self.run[key] for key in BOUND}, settings)

    def outside(self, branch: int, num_branches: int) -> dict[str, list[int]]:
        """The part of it that DeepCache at `branch` leaves to it."""
        return {name: self.blocks[name] for name in outside(self.blocks, num_branches, branch)}


def scale_shift_tensors(table: Sequence[Adjustment], schedule: BlockSchedule) -> dict[str, Tensor]:
    """The scale and shift of every step at which a residual is reused, for a file: [reusing steps, 2, channels] each.

    They are in half precision: it holds the identity exactly, and its error is far below that of their estimation.
    """
    tensors = {}
    for name, steps in schedule.blocks.items():
        reusing = [step for step in range(schedule.calls) if step not in steps]
        if reusing:
            tensors[name] = torch.stack([torch.stack(table[step][name]) for step in reusing]).half()
    return tensors


def scale_shift_metadata(schedule: BlockSchedule, notes: Mapping[str, Any]) -> dict[str, str]:
    """What the file says beside its tensors: whose they are, and how they came about."""
    return {"schedule_sha256": schedule.sha256, "notes": json.dumps(notes)}


def load_scale_shift(path: Path, schedule: BlockSchedule) -> Sequence[Adjustment]:
    """The adjustments of each step. Raises ValueError for a missing or damaged file, or one of another schedule."""
    if not Path(path).is_file():
        raise ValueError(f"no scale-shift file {path}: python -m lab.fit scale-shift makes one")
    try:
        with safe_open(path, "pt") as file:
            made_for = (file.metadata() or {}).get("schedule_sha256")
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}     # noqa: SIM118  it is no dict
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None
    if made_for != schedule.sha256:
        raise ValueError(f"{path} was trained for another block schedule")
    for name, values in tensors.items():
        if values.ndim != 3 or values.shape[1] != 2 or not values.isfinite().all():
            raise ValueError(f"{path}: {name} is {list(values.shape)} and should be [reusing steps, 2, channels], all "
                             "finite")
    reusing = {name: [step for step in range(schedule.calls) if step not in steps]
               for name, steps in schedule.blocks.items()}
    if {name: len(values) for name, values in tensors.items()} != {k: len(v) for k, v in reusing.items() if v}:
        raise ValueError(f"{path} does not hold one scale and shift for each reused residual of the schedule")
    table: list[dict[str, tuple[Tensor, Tensor]]] = [{} for _ in range(schedule.calls)]
    for name, values in tensors.items():
        for step, (scale, shift) in zip(reusing[name], values, strict=True):
            table[step][name] = scale, shift
    return table


class PlannedBlocks(Planned):
    """A block schedule in a run, or that part of it which DeepCache leaves to it."""
    fitted = True

    def __init__(self, options: "BlockCachingOptions", schedule: BlockSchedule, blocks: dict[str, list[int]],
                 table: Sequence[Adjustment] | None, calls: int):
        assert options.block_schedule is not None       # the schedule's file
        self.schedule, self.blocks, self.table = schedule, blocks, table
        digest = None if options.scale_shift is None else file_sha256(options.scale_shift)
        self.settings = {"block_caching": {
            "schedule_sha256": schedule.sha256, "kinds": schedule.kinds, "delta": schedule.delta,
            "blocks": len(blocks), "scale_shift_sha256": digest}}
        self.system = str(schedule.measured.get("system", ""))          # where a program of its own made it
        self.name = [f"blocks_{options.block_schedule.stem}", *(["scale_shift"] if options.scale_shift else [])]
        computed = sum(map(len, blocks.values()))
        self.summary = (f"blocks computed {computed} of {len(blocks) * calls} times"
                        + (", with scale-shift" if table is not None else ""))
        self.forecast: tuple[int, Damping] = 0, 1.0

    def policy(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Keep:
        return block_cache(self.blocks, self.table, device, dtype, *self.forecast)

    def extrapolate(self, order: int, damping: Damping, calls: int) -> None:
        check_order(order, max((usable(steps, calls) for steps in self.blocks.values()), default=None))
        self.forecast = order, damping

    def check(self, settings: Mapping[str, Any]) -> None:
        self.schedule.check(settings)

    def check_network(self, channels: Mapping[Hashable, int]) -> None:
        unknown = [name for name in self.blocks if name not in channels]
        if unknown:
            raise ValueError(f"the block schedule names {unknown[0]}, and this U-Net has no such block")
        for step in self.table or ():
            for name, (scale, _) in step.items():
                if len(scale) != channels.get(name, len(scale)):
                    raise ValueError(f"the scale-shift file has {len(scale)} channels for {name}, and this U-Net has "
                                     f"{channels[name]}")


@dataclass(frozen=True)
class BlockCachingOptions(MethodOptions):
    """When each block is computed, and how reused ones are adjusted."""
    title = ("caching (Block Caching; together with --interval, of the blocks outside the level that DeepCache "
             "reuses)")
    block_schedule: Path | None = option(None, "when each block is computed: a file that lab.fit made for this "
                                               " model, sampler and number of steps", metavar="FILE")
    scale_shift: Path | None = option(None, "how reused blocks are adjusted, likewise", metavar="FILE")

    def planned(self, shape: RunShape, before: Sequence[Planned]) -> PlannedBlocks | None:
        if self.block_schedule is None:
            if self.scale_shift is not None:
                raise ValueError("--scale-shift adjusts the blocks of a schedule: it needs --block-schedule")
            return None
        level = next((one for one in before if isinstance(one, PlannedDeepCache)), None)
        if level is not None and level.settings["zero_cache"]:
            raise ValueError("--zero-cache is an ablation of DeepCache alone: leave out --block-schedule")
        schedule = BlockSchedule.load(self.block_schedule)
        if schedule.run["steps"] == shape.steps and schedule.calls != shape.calls:
            raise ValueError(f"{self.block_schedule} is of {schedule.calls} network calls, and this run makes "
                             f"{shape.calls}")
        table = None if self.scale_shift is None else load_scale_shift(self.scale_shift, schedule)
        blocks = schedule.outside(level.branch, shape.num_branches) if level else schedule.blocks
        return PlannedBlocks(self, schedule, blocks, table, shape.calls)


def block_cache(blocks: Mapping[str, Sequence[int]], table: Sequence[Adjustment] | None,
                device: torch.device | str, dtype: torch.dtype, forecast: int = 0, damping: Damping = 1.0
                ) -> Keep:
    """A fresh policy, with the adjustments on the network's device and in its dtype."""
    if table is not None:
        table = [{name: (scale.to(device, dtype), shift.to(device, dtype)) for name, (scale, shift) in step.items()}
                 for step in table]
    return Keep(blocks, Forecast(forecast, damping), table)
