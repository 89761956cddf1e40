"""How near the images of a run come to the converged ones: those of the same seeds with so many steps that more of them
change nothing. It is the measure for solvers and caching alike, which all start from the same noise.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from planning.fitting import batches
from runs.errors import UserError
from runs.machine import Machine
from runs.psnr import psnr
from runs.seeds import format_seeds
from runs.spec import Run, RunSpec
from runs.weights import save_tensors


class Converged:
    """What sampling ends on for some seeds after many steps, made once and kept in a file.

    spec: the run of many steps. Raises UserError for one that is random or cached.
    """

    def __init__(self, spec: RunSpec, seeds: Sequence[int], machine: Machine, file: Path | None = None):
        self.run, self.seeds, self.machine = spec.open(), list(seeds), machine
        if self.run.caching or self.run.eta:
            raise UserError("what others are compared with must be a run without caching and with eta 0")
        self.model = self.run.family.open(self.run, machine)
        self.model.check_seeds(self.seeds)
        self.model.load()
        made_of = {"settings": str(self.model.settings), "seeds": format_seeds(self.seeds)}
        kept = _read(file, made_of) if file else None
        if kept is None:
            kept = self.sample(self.run)
            if file:
                file.parent.mkdir(parents=True, exist_ok=True)
                save_tensors({"latents": kept}, file, made_of)
        self.latents = kept

    @property
    def checkpoint_sha256(self) -> str:
        return self.model.settings["checkpoint_sha256"]

    def check(self, run: Run) -> None:
        """Refuse a run that does not come to the same images with ever more steps. Raises UserError."""
        own, other = ({"model": one.config.name, "checkpoint": one.checkpoint, "guidance": one.guidance,
                       "timesteps": one.timesteps, "condition": one.spec.condition} for one in (self.run, run))
        differing = [name for name in own if own[name] != other[name]]
        if differing:
            raise UserError(f"{run.name} cannot be compared with {self.run.name}: they differ in "
                            f"{', '.join(differing)} (with leading timesteps each number of steps even starts at a "
                            "noise level of its own)")

    def sample(self, run: Run, seeds: Sequence[int] | None = None) -> Tensor:
        """What a run ends on, for all seeds or some of them: float32 [seeds, channels, height, width], on the CPU."""
        model = run.family.open(run, self.machine)
        run.refuse_foreign(model.settings)
        model.load()
        run.refuse_foreign(model.settings)
        chosen = self.seeds if seeds is None else seeds
        return torch.cat([model.latents(batch, model.policy(), report=report).float().cpu()
                          for batch, report in batches(chosen, self.machine.batch_size, run.name, model)])

    def psnr(self, latents: Tensor, seeds: Sequence[int] | None = None) -> np.ndarray:
        """`psnr_to` of each seed's latents: float64 [seeds]. seeds: those of the latents."""
        places = [self.seeds.index(seed) for seed in (self.seeds if seeds is None else seeds)]
        return psnr_to(self.latents[places], latents)


def psnr_to(converged: Tensor, latents: Tensor) -> np.ndarray:
    """PSNR of latents to the converged ones, dB: [seeds, ...] both -> float64 [seeds].

    The span is the converged latents' own, from their smallest to their largest value.
    """
    wanted = converged.double().flatten(1)
    errors = (latents.double().flatten(1) - wanted).square().mean(1)
    spans = wanted.amax(1) - wanted.amin(1)
    return psnr((errors / spans.square()).numpy(), span=1.0)


def _read(file: Path, made_of: dict[str, str]) -> Tensor | None:
    """The latents of a file that was made of the same settings and seeds, if there is one."""
    if not file.is_file():
        return None
    with safe_open(file, "pt") as content:
        return content.get_tensor("latents") if content.metadata() == made_of else None
