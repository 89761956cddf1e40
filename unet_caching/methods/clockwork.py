"""Clockwork (arXiv 2312.08128): the low-resolution part of a U-Net, replaced on most steps by an adaptor of its last
feature.

With the identity as the adaptor it is DeepCache at a deep branch, to the last bit, and the released code has no other
(github Qualcomm-AI-research/clockwork-diffusion, 12db4b4); there the part ends with its upsampling, which in networks
of two blocks per level is the level inside skip 2. A learned one (methods/adaptor.py) costs its own convolutions.
"""

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unet_caching.files.fitted import file_sha256
from unet_caching.methods.adaptor import Adaptor, AdaptorFile
from unet_caching.methods.deepcache import DeepCache
from unet_caching.options import MethodOptions, Planned, RunShape, option

BRANCH = 2              # see above
# The paper's Stable Diffusion: full steps once in four, in the later part of the run; where that begins is ours.
PRESETS: Mapping[str, Mapping[str, Any]] = {"stable-diffusion": {"clock": 4, "clock_from": 0.5}}


class Clockwork(DeepCache):
    """DeepCache whose cached steps see its feature through an adaptor.

    adaptor, table: what `methods.adaptor.AdaptorFile` holds, on the network's device; None is the identity.
    `row`: of the table, what the next call is told. The rest is as in `DeepCache`.
    """

    def __init__(self, branch: int, full_steps: Collection[int], adaptor: Adaptor | None = None,
                 table: Sequence[Tensor] | Tensor | None = None):
        super().__init__(branch, full_steps)
        self.adaptor, self.table = adaptor, table
        self.row: Tensor | None = None

    def at(self, step: int) -> "Clockwork":
        super().at(step)
        self.row = self.table[step] if self.table is not None and self.reused else None
        return self

    def reset(self) -> None:
        super().reset()
        self.row = None

    @property
    def age(self) -> int:
        """How many calls ago the feature was computed."""
        return self.step - self.held[self.branch].calls[0]

    @property
    def pattern(self) -> Hashable:
        return super().pattern, self.row is not None

    @property
    def kept(self) -> dict[Hashable, Tensor]:
        found = super().kept
        return found if self.row is None or not found else found | {(self.branch, "row"): self.row}

    @kept.setter
    def kept(self, values: Mapping[Hashable, Tensor]) -> None:
        DeepCache.kept.fset(self, values)               # type: ignore[attr-defined]
        self.row = values.get((self.branch, "row"))

    def reuse(self, key: Hashable) -> Tensor:
        value = super().reuse(key)
        return value if self.adaptor is None or self.row is None else self.adaptor(value, self.row)


def clocked(calls: int, clock: int, share: float) -> list[int]:
    """The full steps: all in the first share of the run, and then one in every `clock`, the first of them full.

    Raises ValueError for a clock below 1, or a share outside 0 to 1.
    """
    if clock < 1:
        raise ValueError(f"--clock must be 1 (no caching) or more, got {clock}")
    if not 0 <= share < 1:
        raise ValueError(f"--clock-from must be from 0 to less than 1, a share of the run, got {share:g}")
    start = round(share * calls)
    return [*range(start), *range(start, calls, clock)]


class PlannedClockwork(Planned):
    """Clockwork in a run."""
    system = "Clockwork"

    def __init__(self, branch: int, clock: int, share: float, steps: Sequence[int], file: Path | None,
                 adaptor: AdaptorFile | None):
        self.branch, self.full_steps, self.adaptor = branch, list(steps), adaptor
        self.clock, self.share = clock, share
        self.settings = {"full_steps": self.full_steps, "clockwork": {
            "clock": clock, "branch": branch, "from": share,
            "adaptor_sha256": None if file is None else file_sha256(file)}}
        self.name = [f"clock{clock}", *([f"from{share:g}"] if share else []),
                     *([f"branch{branch}"] if branch != BRANCH else []), *([file.stem] if file is not None else [])]
        self.summary = f"clock {clock} at branch {branch}, {'a learned' if adaptor else 'the identity as'} adaptor"
        if adaptor is not None:
            self.system, self.fitted = "Clockwork, learned", True
        self._made: dict[tuple[str, torch.dtype], tuple[Adaptor, Tensor]] = {}

    @classmethod
    def of_file(cls, identity: "PlannedClockwork", file: Path) -> "PlannedClockwork":
        """The same run with a learned adaptor. Raises ValueError for one that cannot be read."""
        return cls(identity.branch, identity.clock, identity.share, identity.full_steps, file, AdaptorFile.load(file))

    def policy(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Clockwork:
        if self.adaptor is None:
            return Clockwork(self.branch, self.full_steps)
        key = str(device), dtype        # recorded networks go on using the adaptor that they were recorded with
        if key not in self._made:
            self._made[key] = self.adaptor.adaptor(device, dtype), self.adaptor.table.to(device, dtype)
        return Clockwork(self.branch, self.full_steps, *self._made[key])

    def check(self, settings: Mapping[str, Any]) -> None:
        if self.adaptor is not None:
            self.adaptor.check(settings)

    def check_network(self, channels: Mapping[Hashable, int]) -> None:
        there = channels.get(self.branch)
        if self.adaptor is not None and there != self.adaptor.channels:
            raise ValueError(f"the adaptor is of {self.adaptor.channels} channels, and the feature at branch "
                             f"{self.branch} of this U-Net has {there}")


@dataclass(frozen=True)
class ClockworkOptions(MethodOptions):
    """How often the low-resolution part runs, and what stands in for it."""
    title = "caching (Clockwork: the low-resolution part runs once in so many steps, an adaptor on all others)"
    clock: int = option(1, "one full step in every so many; 1 = no caching (default)")
    clock_branch: int | None = option(None, "0-based skip whose inner level is the low-resolution part (default: 2, "
                                            "all below the full resolution where levels have two blocks)")
    clock_from: float = option(0.0, "share of the run before which all steps are full (default: 0)", metavar="SHARE")
    clock_preset: str | None = option(None, "clock and share of the paper's Stable Diffusion",
                                      choices=tuple(PRESETS))
    adaptor: Path | None = option(None, "a learned adaptor: a file that lab.fit adaptor made for this model, "
                                        "sampler, clock and branch (default: the identity)", metavar="FILE")

    def planned(self, shape: RunShape, before: Sequence[Planned]) -> PlannedClockwork | None:
        clock, share = self.clock, self.clock_from
        if self.clock_preset is not None:
            if (clock, share) != (1, 0.0):
                raise ValueError("--clock-preset says clock and share itself: leave out --clock and --clock-from")
            clock, share = (PRESETS[self.clock_preset][name] for name in ("clock", "clock_from"))
        steps = clocked(shape.calls, clock, share)
        if clock == 1:
            if self.adaptor is not None or share or self.clock_branch is not None:
                raise ValueError("--adaptor, --clock-from and --clock-branch need a --clock of 2 or more")
            return None
        if before:
            raise ValueError("--clock reuses a level in its own way: leave out --interval, --block-schedule and --plan")
        branch = min(BRANCH, shape.num_branches - 1) if self.clock_branch is None else self.clock_branch
        if not 0 <= branch < shape.num_branches:
            raise ValueError(f"--clock-branch must be from 0 to {shape.num_branches - 1} for this model, got {branch}")
        adaptor = None if self.adaptor is None else AdaptorFile.load(self.adaptor)
        if adaptor is not None:
            adaptor.check({"steps": shape.steps})
            adaptor.check_cache(branch, steps, shape.calls)
        return PlannedClockwork(branch, clock, share, steps, self.adaptor, adaptor)
