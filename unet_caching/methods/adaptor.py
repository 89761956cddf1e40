"""The adaptor of Clockwork (arXiv 2312.08128), which stands in for the low-resolution part of a U-Net, and its file.

It is a bottleneck of two convolutions on the last feature of that part, told the timestep and how old the feature is:

    F -> F + outer(gain * silu(scale * inner(normalised F) + shift))

Scale, shift and gain are of the bottleneck's channels. A linear layer makes them of the timestep embedding while it
learns; a run of given steps needs one row of them for each network call, and that table is what is
kept. The gain grows with the age of the feature, in calls. It starts as the identity: `outer` is zero.
Its shape, and the age, are ours; the paper has residual blocks there that are told the timestep alone.

A file (safetensors) belongs to one model, sampler, number of steps, branch and clock, and is refused by any other run.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet_caching.files.fitted import bound, read_tensors, refuse_other_run

KIND, FORMAT = "clockwork adaptor", "1"
ROWS = 3                # scale, shift, gain


class Adaptor(nn.Module):
    """Makes the feature of a cached step of the last one: [batch, channels, height, width], and a row of the table,
    [3, width]. width: channels of the bottleneck. It starts as the identity.
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


@dataclass
class AdaptorFile:
    """A trained adaptor, and which run it was trained for.

    run: the settings of `files.fitted.bound`. full_steps: network calls. weights: of an `Adaptor`. table: float32
    [network calls, 3, width]. notes: how it came about.
    """
    run: dict[str, Any]
    branch: int
    full_steps: list[int]
    weights: dict[str, Tensor]
    table: Tensor
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def channels(self) -> int:
        """Of the feature."""
        return len(self.weights["outer.weight"])

    def adaptor(self, device: torch.device | str, dtype: torch.dtype) -> Adaptor:
        """The module, on a device, with nothing left to train."""
        made = Adaptor(self.channels, self.table.shape[-1])
        made.load_state_dict(self.weights)
        return made.to(device, dtype).eval().requires_grad_(False)

    def tensors(self) -> dict[str, Tensor]:
        """What the file holds, in half precision, whose error is far below that of what it stands for."""
        return {name: value.half() for name, value in {**self.weights, "table": self.table}.items()}

    def metadata(self) -> dict[str, str]:
        """What the file says beside it."""
        made_for = {"run": bound(self.run), "branch": self.branch, "full_steps": self.full_steps}
        return {"kind": KIND, "format": FORMAT, "made_for": json.dumps(made_for), "notes": json.dumps(self.notes)}

    @classmethod
    def load(cls, path: Path) -> "AdaptorFile":
        """Read a file. Raises ValueError where it is missing, damaged or of another kind."""
        if not Path(path).is_file():
            raise ValueError(f"no adaptor {path}: python -m lab.fit adaptor makes one")
        found = read_tensors(path, KIND, FORMAT, lambda made_for, notes, tensors: cls(
            made_for["run"], made_for["branch"], made_for["full_steps"], tensors, tensors.pop("table"), notes))
        fault = found._fault()
        if fault:
            raise ValueError(f"{path} is damaged: {fault}")
        return found

    def _fault(self) -> str | None:
        """What is wrong with the tensors; None where nothing is."""
        if self.table.ndim != 3 or self.table.shape[1] != ROWS or not self.table.numel():
            return f"its table is {list(self.table.shape)} and should be [network calls, {ROWS}, width]"
        shapes = {name: list(value.shape) for name, value in self.weights.items()}
        channels = shapes.get("outer.weight", [0])[0]
        wanted = {name: list(value.shape)
                  for name, value in Adaptor(channels, self.table.shape[-1]).state_dict().items()} if channels else {}
        if shapes != wanted:
            return f"its weights are {shapes} and should be those of an adaptor, {wanted}"
        if not all(value.isfinite().all() for value in (*self.weights.values(), self.table)):
            return "its numbers are not all finite"
        return None

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse a run of other settings than it was trained for; those not known yet may be left out.

        Raises ValueError that says what differs.
        """
        refuse_other_run("the adaptor was trained", bound(self.run), settings)

    def check_cache(self, branch: int, full_steps: Sequence[int], calls: int) -> None:
        """Refuse a run that caches otherwise, likewise. calls: its network calls."""
        made_for = {"branch": self.branch, "full_steps": self.full_steps, "calls": len(self.table)}
        refuse_other_run("the adaptor was trained", made_for,
                         {"branch": branch, "full_steps": list(full_steps), "calls": calls})
