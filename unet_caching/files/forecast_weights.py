"""Files of fitted forecasts (safetensors): the damping of each network call. A file belongs to one model, sampler,
number of steps, branch and schedule, and is refused by any other run.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unet_caching.files.fitted import BOUND, read_tensors, refuse_other_run

KIND, FORMAT = "forecast weights", "1"


@dataclass
class ForecastWeights:
    """The damping of a forecast, and which run it was fitted to.

    run: the settings under `files.fitted.BOUND`. full_steps: network calls. damping: [network calls][order], as
    `unet_caching.methods.deepcache.DeepCache` takes it. notes: how it came about.
    """
    run: dict[str, Any]
    branch: int
    full_steps: list[int]
    damping: list[list[float]]
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def order(self) -> int:
        return len(self.damping[0])

    def tensors(self) -> dict[str, Tensor]:
        """What the file holds: float32 [network calls, order]."""
        return {"damping": torch.tensor(self.damping)}

    def metadata(self) -> dict[str, str]:
        """What the file says beside it."""
        made_for = {"run": {key: self.run[key] for key in BOUND}, "branch": self.branch, "full_steps": self.full_steps}
        return {"kind": KIND, "format": FORMAT, "made_for": json.dumps(made_for), "notes": json.dumps(self.notes)}

    @classmethod
    def load(cls, path: Path) -> "ForecastWeights":
        """Read a file. Raises ValueError where it is missing, damaged or of another kind."""
        if not Path(path).is_file():
            raise ValueError(f"no forecast weights {path}")
        def made(made_for: dict, notes: dict, tensors: dict[str, Tensor]) -> "ForecastWeights":
            damping = tensors["damping"]
            if damping.ndim != 2 or not damping.numel() or not damping.isfinite().all():
                raise ValueError(f"{path} does not hold finite weights for each network call and order")
            return cls(made_for["run"], made_for["branch"], made_for["full_steps"], damping.tolist(), notes)

        return read_tensors(path, KIND, FORMAT, made)

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse a run of other settings than it was fitted to; those not known yet may be left out.

        Raises ValueError that says what differs.
        """
        refuse_other_run("the forecast weights were fitted", {key: self.run[key] for key in BOUND}, settings)

    def check_cache(self, branch: int, full_steps: Sequence[int], order: int, calls: int) -> None:
        """Refuse a run that caches otherwise, likewise. calls: its network calls."""
        made_for = {"branch": self.branch, "full_steps": self.full_steps, "order": self.order,
                    "calls": len(self.damping)}
        refuse_other_run("the forecast weights were fitted", made_for,
                         {"branch": branch, "full_steps": list(full_steps), "order": order, "calls": calls})
