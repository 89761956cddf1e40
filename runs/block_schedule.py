"""Files of Block Caching: a schedule (JSON) says when each residual is computed, a scale-shift table (safetensors) how
reused ones are adjusted. Both belong to one model, sampler and number of steps, and are refused by any other run.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from caching.block_cache import Adjustment, BlockCache, outside
from runs.errors import UserError, one_line
from runs.files import write_json
from runs.weights import save_tensors

FORMAT = 1
# What of a run's settings a schedule is made for. Guidance, prompts and number format may differ: it is measured over
# many images, and small changes of the trajectory move it little.
BOUND = ("model", "unet", "checkpoint_sha256", "sampler", "steps", "timesteps")


@dataclass
class BlockSchedule:
    """When each residual is computed, and where that comes from.

    run: the settings under BOUND; a checkpoint_sha256 of None stands for any weights. calls: network calls. kinds:
    `caching.block_cache.KINDS`. delta: the threshold, None where it was not made from one. blocks: residual -> steps
    that compute it. measured: what the changes come from. macs, macs_full: per step and row, {"hook", "fc"}, of a run
    with this schedule and of one without caching.
    """
    run: dict
    calls: int
    kinds: str
    delta: float | None
    blocks: dict[str, list[int]]
    measured: dict
    macs: dict
    macs_full: dict

    @property
    def sha256(self) -> str:
        """Of what decides the pixels."""
        content = {"run": self.run, "calls": self.calls, "blocks": self.blocks}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write it as JSON, atomically."""
        write_json(path, {"kind": "block schedule", "format": FORMAT, "sha256": self.sha256, **asdict(self)})

    @classmethod
    def load(cls, path: Path) -> "BlockSchedule":
        """Raises UserError for a file that is missing, damaged or changed by hand."""
        if not Path(path).is_file():
            raise UserError(f"no block schedule {path}: python -m scripts.block_caching makes one")
        try:
            content = json.loads(Path(path).read_text())
            if content.get("kind") != "block schedule" or content.get("format") != FORMAT:
                raise UserError(f"{path} is no block schedule of format {FORMAT}")
            schedule = cls(**{field.name: content[field.name] for field in fields(cls)})
            sha256 = schedule.sha256
            missing = [key for key in BOUND if key not in schedule.run]
        except KeyError as error:
            raise UserError(f"{path} is damaged: it has no {error}") from None
        except (ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{path} is damaged: {one_line(error)}") from None
        if content.get("sha256") != sha256:
            raise UserError(f"{path} has been changed since it was made: its sha256 does not fit")
        if missing:
            raise UserError(f"{path} does not say for which {', '.join(missing)} it was made")
        for name, steps in schedule.blocks.items():
            if steps != sorted(set(steps)) or steps[:1] != [0] or steps[-1] >= schedule.calls:
                raise UserError(f"{path}: the steps of {name} must ascend from 0 and stay below {schedule.calls}, "
                                f"got {steps}")
        return schedule

    def check(self, settings: dict) -> None:
        """Refuse a run of other settings than it was made for; those not known yet may be left out.

        Raises UserError that says what differs.
        """
        differing = [key for key in BOUND if key in settings and self.run[key] != settings[key]
                     and not (key == "checkpoint_sha256" and self.run[key] is None)]
        if differing:
            shown = (f"{key} {self.run[key]} there, {settings[key]} here" if key != "unet" else "unet differs"
                     for key in differing)
            raise UserError(f"the block schedule was made for another run: {'; '.join(shown)}")

    def outside(self, branch: int, num_branches: int) -> dict[str, list[int]]:
        """The part of it that DeepCache at `branch` leaves to it."""
        return {name: self.blocks[name] for name in outside(self.blocks, num_branches, branch)}


def save_scale_shift(table: list[Adjustment], schedule: BlockSchedule, notes: dict, path: Path) -> None:
    """Write the scale and shift of every step at which a residual is reused: [reusing steps, 2, channels] each.

    In half precision, in which the identity is exact; the error is far below that of their estimation.
    """
    tensors = {}
    for name, steps in schedule.blocks.items():
        reusing = [step for step in range(schedule.calls) if step not in steps]
        if reusing:
            tensors[name] = torch.stack([torch.stack(table[step][name]) for step in reusing]).half()
    save_tensors(tensors, path, {"schedule_sha256": schedule.sha256, "notes": json.dumps(notes)})


def load_scale_shift(path: Path, schedule: BlockSchedule) -> list[Adjustment]:
    """The adjustments of each step. Raises UserError for a missing or damaged file, or one of another schedule."""
    if not Path(path).is_file():
        raise UserError(f"no scale-shift file {path}: python -m scripts.block_caching makes one")
    try:
        with safe_open(path, "pt") as file:
            made_for = (file.metadata() or {}).get("schedule_sha256")
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}     # noqa: SIM118  it is no dict
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or no safetensors file: {one_line(error)}") from None
    if made_for != schedule.sha256:
        raise UserError(f"{path} was trained for another block schedule")
    reusing = {name: [step for step in range(schedule.calls) if step not in steps]
               for name, steps in schedule.blocks.items()}
    if {name: len(values) for name, values in tensors.items()} != {k: len(v) for k, v in reusing.items() if v}:
        raise UserError(f"{path} does not hold one scale and shift for each reused residual of the schedule")
    table = [{} for _ in range(schedule.calls)]
    for name, values in tensors.items():
        for step, (scale, shift) in zip(reusing[name], values, strict=True):
            table[step][name] = scale, shift
    return table


def block_cache(blocks: Mapping[str, Collection[int]], table: Sequence[Adjustment] | None,
                device: torch.device | str, dtype: torch.dtype) -> BlockCache:
    """A fresh policy, with the adjustments on the network's device and in its dtype."""
    if table is not None:
        table = [{name: (scale.to(device, dtype), shift.to(device, dtype)) for name, (scale, shift) in step.items()}
                 for step in table]
    return BlockCache(blocks, table)
