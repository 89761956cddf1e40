"""Clockwork (arXiv 2312.08128): on most steps an adaptor of its last feature replaces the low-resolution part of a
U-Net.

With the identity as the adaptor, this is bit for bit DeepCache at a deep branch. The released code has only that
(github Qualcomm-AI-research/clockwork-diffusion, 12db4b4). There the part ends with its upsampling, which in networks
with two blocks per level is the level inside skip 2.

A learned adaptor is a bottleneck of two convolutions on the last feature F of that part. It depends on the timestep and
on the age of the feature:

    F -> F + outer(gain * silu(scale * inner(normalised F) + shift))

Scale, shift and gain have a number for each channel of the bottleneck. In training a linear layer makes them from the
timestep embedding. A run needs one row of them for each network call, so the file keeps this table. The gain grows with
the age of the feature, in calls. `outer` starts at zero, so the adaptor starts as the identity. The shape and the age
are ours; the paper has residual blocks that depend only on the timestep.
"""

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet_caching.files.fitted import Fitted
from unet_caching.methods.deepcache import DeepCache
from unet_caching.options import Method, MethodOptions, RunShape, option

BRANCH = 2              # see above
ROWS = 3                # of an adaptor's table, for each network call: scale, shift, gain
# The paper's Stable Diffusion: every fourth step is full in the later part of the run; where that begins is ours.
PRESETS: Mapping[str, Mapping[str, Any]] = {"stable-diffusion": {"clock": 4, "clock_from": 0.5}}


class Adaptor(nn.Module):
    """Makes the feature of a cached step from the last feature [batch, channels, height, width] and a row [3, width] of
    the table. width: channels of the bottleneck. It starts as the identity.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(1, channels, affine=False)
        self.inner = nn.Conv2d(channels, width, 3, padding=1)
        self.outer = nn.Conv2d(width, channels, 1)
        for value in self.outer.parameters():
            nn.init.zeros_(value)

    def forward(self, feature: Tensor, row: Tensor) -> Tensor:
        scale, shift, gain = row[:, :, None, None]                              # [width, 1, 1] each
        h = F.silu(self.inner(self.norm(feature)) * scale + shift) * gain       # [batch, width, height, width]
        return feature + self.outer(h)


class Clockwork(DeepCache):
    """DeepCache with an adaptor on the feature of cached steps.

    adaptor, table [calls, 3, width]: from `AdaptorFile`, on the network's device; None is the identity.
    `row`: the next call's row of the table. The rest is as in `DeepCache`.
    """

    def __init__(self, branch: int, full_steps: Collection[int], adaptor: Adaptor | None = None,
                 table: Tensor | None = None):
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
    def pattern(self) -> Hashable:
        return super().pattern, self.row is not None

    @property
    def kept(self) -> dict[Hashable, Tensor]:
        return super().kept | ({} if self.row is None else {(self.branch, "row"): self.row})

    @kept.setter
    def kept(self, values: Mapping[Hashable, Tensor]) -> None:
        DeepCache.kept.fset(self, values)               # type: ignore[attr-defined]
        self.row = values.get((self.branch, "row"))

    def reuse(self, key: Hashable) -> Tensor:
        value = super().reuse(key)
        return value if self.adaptor is None or self.row is None else self.adaptor(value, self.row)


def clocked(calls: int, clock: int, share: float) -> list[int]:
    """The full steps: all steps in the first `share` of the run, then every `clock`-th.

    Raises ValueError for a clock below 1, or a share outside 0 to 1.
    """
    if clock < 1:
        raise ValueError(f"--clock must be 1 (no caching) or more, got {clock}")
    if not 0 <= share < 1:
        raise ValueError(f"--clock-from must be from 0 to less than 1, a share of the run, got {share:g}")
    start = round(share * calls)
    return [*range(start), *range(start, calls, clock)]


@dataclass
class AdaptorFile(Fitted):
    """A trained adaptor. tensors: its weights and its table [network calls, 3, width]."""
    kind = "adaptor"
    maker = "python -m lab.fit adaptor"
    has_tensors = True
    branch: int
    full_steps: list[int]

    @property
    def table(self) -> Tensor:
        return self.tensors["table"]

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.tensors.items() if name != "table"}

    @property
    def channels(self) -> int:
        """The channels of the feature."""
        return len(self.tensors["outer.weight"])

    def adaptor(self, device: torch.device | str, dtype: torch.dtype) -> Adaptor:
        """The module on a device, frozen."""
        made = Adaptor(self.channels, self.table.shape[-1])
        made.load_state_dict(self.weights)
        return made.to(device, dtype).eval().requires_grad_(False)

    def bounds(self) -> dict[str, Any]:
        return {**self.made_for, "branch": self.branch, "full_steps": self.full_steps, "calls": len(self.table)}

    def fault(self) -> str | None:
        shapes = {name: list(value.shape) for name, value in self.tensors.items()}
        table, channels = shapes.get("table", []), shapes.get("outer.weight", [0])[0]
        if len(table) != 3 or table[1] != ROWS or 0 in table:
            return f"its table is {table} and should be [network calls, {ROWS}, width]"
        known = Adaptor(channels, table[2]).state_dict().items() if channels else ()
        wanted = {name: list(value.shape) for name, value in known} | {"table": table}
        if shapes != wanted:
            return f"its tensors are {shapes} and should be those of an adaptor, {wanted}"
        return super().fault()


class ClockworkMethod(Method):
    """Clockwork in a run."""
    system = "Clockwork"

    def __init__(self, branch: int, clock: int, share: float, full_steps: Sequence[int], file: Path | None):
        self.branch, self.full_steps = branch, list(full_steps)
        self.adaptor = None if file is None else AdaptorFile.load(file)
        self.settings = {"full_steps": self.full_steps, "clockwork": {
            "clock": clock, "branch": branch, "from": share,
            "adaptor_sha256": None if self.adaptor is None else self.adaptor.sha256}}
        self.name = [f"clock{clock}", *([f"from{share:g}"] if share else []),
                     *([f"branch{branch}"] if branch != BRANCH else []), *([file.stem] if file is not None else [])]
        self.summary = f"clock {clock} at branch {branch}, {'a learned' if self.adaptor else 'the identity as'} adaptor"
        if self.adaptor is not None:
            self.system, self.files = "Clockwork, learned", (self.adaptor,)
        self._made: dict[tuple[str, torch.dtype], tuple[Adaptor, Tensor]] = {}

    def policy(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Clockwork:
        if self.adaptor is None:
            return Clockwork(self.branch, self.full_steps)
        key = str(device), dtype        # recorded networks go on using the adaptor that they were recorded with
        if key not in self._made:
            self._made[key] = self.adaptor.adaptor(device, dtype), self.adaptor.table.to(device, dtype)
        return Clockwork(self.branch, self.full_steps, *self._made[key])

    def check_network(self, channels: Mapping[Hashable, int]) -> None:
        there = channels.get(self.branch)
        if self.adaptor is not None and there != self.adaptor.channels:
            raise ValueError(f"the adaptor has {self.adaptor.channels} channels, but the feature at branch "
                             f"{self.branch} of this U-Net has {there}")


@dataclass(frozen=True)
class ClockworkOptions(MethodOptions):
    """How often the low-resolution part runs, and which adaptor replaces it."""
    title = "caching (Clockwork: an adaptor replaces the low-resolution part)"
    rare = True
    clock: int = option(1, "one full step in every N (default: 1, no caching)")
    clock_branch: int | None = option(None, "0-based skip outside of that part (default: 2)")
    clock_from: float = option(0.0, "this first share of all steps is full (default: 0)", metavar="SHARE")
    clock_preset: str | None = option(None, f"the paper's clock and share: {', '.join(PRESETS)}",
                                      choices=tuple(PRESETS), metavar="NAME")
    adaptor: Path | None = option(None, "by lab.fit adaptor (default: the identity)", metavar="FILE")

    def bind(self, shape: RunShape, others: Sequence[Method]) -> ClockworkMethod | None:
        clock, share = self.clock, self.clock_from
        if self.clock_preset is not None:
            if (clock, share) != (1, 0.0):
                raise ValueError("--clock-preset sets --clock and --clock-from: leave both out")
            clock, share = (PRESETS[self.clock_preset][name] for name in ("clock", "clock_from"))
        steps = clocked(shape.calls, clock, share)
        if clock == 1:
            if self.adaptor is not None or share or self.clock_branch is not None:
                raise ValueError("--adaptor, --clock-from and --clock-branch need a --clock of 2 or more")
            return None
        if others:
            raise ValueError("--clock decides what is reused: leave out --interval, --block-schedule and --plan")
        branch = min(BRANCH, shape.num_branches - 1) if self.clock_branch is None else self.clock_branch
        if not 0 <= branch < shape.num_branches:
            raise ValueError(f"--clock-branch must be from 0 to {shape.num_branches - 1} for this model, got {branch}")
        method = ClockworkMethod(branch, clock, share, steps, self.adaptor)
        for file in method.files:
            file.check({"steps": shape.steps, "branch": branch, "full_steps": steps, "calls": shape.calls})
        return method
