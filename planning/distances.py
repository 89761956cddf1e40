"""How near the runs of one model come to its converged images: measured once for each run and seed, and kept in a
folder of small files, so that a search goes on where it was killed and another budget finds what it needs.
"""

import hashlib
import json
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from caching.nested import Network
from caching.plan import Call, PlanCache
from caching.policy import Policy
from planning.convergence import psnr_to
from planning.fitting import batches
from runs.errors import UserError
from runs.files import write_json
from runs.machine import Machine
from runs.spec import Run, RunSpec
from runs.weights import save_tensors

SPACING = "trailing"        # runs of all lengths start at the same noise level and end on a clean image
CONVERGED = "unipc"
EXACT = 200.0               # dB, instead of infinity


class Candidate(NamedTuple):
    """A run that a search may choose, over trailing timesteps. calls: what each of its network calls does."""
    sampler: str
    steps: int
    calls: tuple[Call, ...]

    @property
    def key(self) -> str:
        """A name for its file."""
        content = json.dumps([self.sampler, self.steps, [[call.branch, *call.damping] for call in self.calls]])
        return hashlib.sha256(content.encode()).hexdigest()[:20]


class Distances:
    """Measures candidates of a model, whose condition and weights are a run's.

    folder: what was measured; that of another model is refused. steps: of the converged run. Raises UserError.
    """

    def __init__(self, spec: RunSpec, machine: Machine, folder: Path, steps: int = 200):
        self.spec, self.batch_size, self.folder = spec, machine.batch_size, folder
        run = self.run(CONVERGED, steps)
        self.model = run.family.open(run, machine)
        self.model.load()
        self._check_folder()
        self._converged: dict[int, Tensor] = {}
        for file in sorted((folder / "converged").glob("*.safetensors")):
            content = load_file(file)
            self._converged |= dict(zip(content["seeds"].tolist(), content["latents"], strict=True))

    def run(self, sampler: str, steps: int) -> Run:
        """The run without caching that has so many steps. Raises UserError for a number that the sampler cannot do."""
        found = self.spec.having(sampler=sampler, steps=steps, timesteps=SPACING, eta=None).open()
        if found.sampler.eta:
            raise UserError("what is compared with a converged run must not be random: the config has an eta")
        return found

    def _check_folder(self) -> None:
        """Refuse a folder of another model."""
        own, file = json.loads(json.dumps(self.model.settings, default=str)), self.folder / "model.json"
        if not file.is_file():
            for part in ("converged", "runs"):
                (self.folder / part).mkdir(parents=True, exist_ok=True)
            write_json(file, own)
        found = json.loads(file.read_text())
        differing = sorted(key for key in own.keys() | found.keys() if own.get(key) != found.get(key))
        if differing:
            raise UserError(f"{self.folder} holds what was measured for another run: {', '.join(differing)} differs; "
                            "give another --work")

    def latents(self, sampler: str, steps: int, seeds: Sequence[int], policy: Policy | None = None,
                network: Network | None = None) -> Tensor:
        """What a run ends on: float32 [seeds, channels, height, width], on the CPU. For one batch."""
        model = copy(self.model)                # another sampler on the same weights
        model.sampler = self.run(sampler, steps).sampler
        return model.latents(seeds, policy, network).float().cpu()

    def converged(self, seeds: Sequence[int]) -> Tensor:
        """The converged latents, which are made where they are missing."""
        missing = [seed for seed in seeds if seed not in self._converged]
        for batch, report in batches(missing, self.batch_size, "converged images", self.model) if missing else ():
            made = self.model.latents(batch, report=report).float().cpu()
            save_tensors({"seeds": torch.tensor(batch), "latents": made},
                         self.folder / "converged" / f"{batch[0]}.safetensors")
            self._converged |= dict(zip(batch, made, strict=True))
        return torch.stack([self._converged[seed] for seed in seeds])

    def of(self, candidate: Candidate, seeds: Sequence[int]) -> np.ndarray:
        """PSNR of a run's latents to the converged ones, dB: float64 [seeds]."""
        file = self.folder / "runs" / f"{candidate.key}.json"
        psnr = json.loads(file.read_text())["psnr"] if file.is_file() else {}
        known = {int(seed): db for seed, db in psnr.items()}
        missing = [seed for seed in seeds if seed not in known]
        for first in range(0, len(missing), self.batch_size):
            batch = missing[first:first + self.batch_size]
            wanted = self.converged(batch)
            found = psnr_to(wanted, self.latents(candidate.sampler, candidate.steps, batch, PlanCache(candidate.calls)))
            known |= {seed: min(float(db), EXACT) for seed, db in zip(batch, found, strict=True)}
            write_json(file, {"sampler": candidate.sampler, "steps": candidate.steps,
                              "branches": [call.branch for call in candidate.calls], "psnr": known})
        return np.array([known[seed] for seed in seeds])
