"""Files of Block Caching: a schedule (JSON) says when each residual is computed, a scale-shift table (safetensors) how
reused ones are adjusted. Both belong to one model, sampler and number of steps, and are refused by any other run.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from caching.block_cache import Adjustment, BlockCache
from sampling.runs import write_json
from sampling.settings import UserError, one_line
from sampling.weights import save_tensors

FORMAT = 1
# What of a run's settings a schedule is made for. Guidance, prompts and number format may differ: it is measured over
# many images, and small changes of the trajectory move it little.
BOUND = ("model", "unet", "checkpoint_sha256", "sampler", "steps", "timesteps")


@dataclass
class BlockSchedule:
    """When each residual is computed, and where that comes from.

    run: the settings under BOUND. calls: network calls. kinds: `caching.block_cache.KINDS`. delta: the threshold.
    blocks: residual -> steps that compute it. measured: what the changes come from. macs, macs_full: per step and
    row, {"hook", "fc"}, of a run with this schedule and of one without caching.
    """
    run: dict
    calls: int
    kinds: str
    delta: float
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
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is damaged: {one_line(error)}") from None
        if content.get("sha256") != schedule.sha256:
            raise UserError(f"{path} has been changed since it was made: its sha256 does not fit")
        return schedule

    def check(self, settings: dict, path: Path) -> None:
        """Refuse a run of other settings than it was made for: UserError that says what differs."""
        differing = [key for key in BOUND if self.run.get(key) != settings.get(key)]
        if differing:
            shown = (f"{key} {self.run.get(key)} there, {settings.get(key)} here" if key != "unet" else "unet differs"
                     for key in differing)
            raise UserError(f"{path} was made for another run: {'; '.join(shown)}")


def save_scale_shift(table: list[Adjustment], schedule: BlockSchedule, notes: dict, path: Path) -> None:
    """Write the scale and shift of every step at which a residual is reused: [reusing steps, 2, channels] each."""
    tensors = {}
    for name, steps in schedule.blocks.items():
        reusing = [step for step in range(schedule.calls) if step not in steps]
        if reusing:
            tensors[name] = torch.stack([torch.stack(table[step][name]) for step in reusing])
    save_tensors(tensors, path, {"schedule_sha256": schedule.sha256, "notes": json.dumps(notes)})


def load_scale_shift(path: Path, schedule: BlockSchedule) -> list[dict[str, tuple[Tensor, Tensor]]]:
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
    table = [{} for _ in range(schedule.calls)]
    for name, values in tensors.items():
        reusing = (step for step in range(schedule.calls) if step not in schedule.blocks[name])
        for step, (scale, shift) in zip(reusing, values, strict=True):
            table[step][name] = scale, shift
    return table


def block_cache(schedule: BlockSchedule, table: list[dict] | None, device: torch.device | str,
                dtype: torch.dtype) -> BlockCache:
    """A fresh policy, with the adjustments on the network's device and in its dtype."""
    if table is not None:
        table = [{name: (scale.to(device, dtype), shift.to(device, dtype)) for name, (scale, shift) in step.items()}
                 for step in table]
    return BlockCache(schedule.blocks, table)
