"""Distances of runs to the model's converged images, which have the same seeds and so many steps that more change
nothing. It measures solvers and caching alike, since all runs start from the same noise.

Converged latents are made once, and a run is measured once for each seed. Both are kept in a folder, batch by batch: a
killed command goes on where it was, and other studies and searches use them.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lab.fit.fit import batches
from run.files import write_json
from run.image_model import ImageModel, open_model
from run.machine import Machine
from run.psnr import psnr
from run.spec import Run, RunSpec
from run.weights import read_tensors, save_tensors, tensors_of
from unet_caching.errors import UserError
from unet_caching.files.schema import read_json
from unet_caching.methods.plan import Call, PlanCache
from unet_caching.nest import Network
from unet_caching.policy import Policy
from unet_caching.samplers.timesteps import SPACINGS

EXACT = 200.0               # dB, instead of infinity


class Distances:
    """Measures runs of a model by their distance to the run of many steps, on weights that are read once.

    converged: the run of many steps. folder: of everything that is kept, with a sub-folder for each converged run.
    Raises UserError for a converged run that is random or cached.
    """

    def __init__(self, converged: RunSpec, machine: Machine, folder: Path):
        self.run, self.machine = converged.open(), machine
        if self.run.caching or self.run.sampler.eta:
            raise UserError("the run to compare with must have no caching and eta 0")
        self.model = open_model(self.run, machine)
        self.model.load()
        self._models: dict[torch.dtype, ImageModel] = {self.run.dtype: self.model}
        self._converged: dict[int, Tensor] = {}
        uncached = {key: value for key, value in self.model.settings.items() if key != "cache"}
        self.folder = folder / f"{self.run.config.name}_{_digest(uncached)[:12]}"

    @property
    def checkpoint_sha256(self) -> str:
        return self.model.settings["checkpoint_sha256"]

    def check(self, run: Run) -> None:
        """Refuse a run that would not reach the same images with ever more steps. Raises UserError."""
        own, other = ({"model": one.config.name, "checkpoint": one.checkpoint, "guidance": one.guidance,
                       "timesteps": one.sampler.timesteps, "condition": one.spec.condition} for one in (self.run, run))
        first, start = (one.sampler.call_timesteps()[0] for one in (run, self.run))
        if run.sampler.timesteps not in SPACINGS and first == start:
            del own["timesteps"], other["timesteps"]
        differing = [name for name in own if own[name] != other[name]]
        if differing:
            raise UserError(f"{run.name} cannot be compared with {self.run.name}: they differ in "
                            f"{', '.join(differing)} (with leading timesteps each number of steps even starts at a "
                            "noise level of its own; a list of timesteps must begin where the converged run does)")
        if run.sampler.eta:
            raise UserError(f"{run.name} cannot be compared with converged images: its eta makes it random")

    def on(self, run: Run) -> ImageModel:
        """The model with a run's settings; its weights are read once for each dtype."""
        if run.dtype not in self._models:
            self._models[run.dtype] = open_model(run, self.machine)
            self._models[run.dtype].load()
        model = copy(self._models[run.dtype])
        model.run, model.sampler = run, run.sampler
        model.settings = model.settings | run.sampler.settings
        run.refuse_foreign(model.settings)
        return model

    def latents(self, run: Run, seeds: Sequence[int], policy: Policy | None = None, network: Network | None = None
                ) -> Tensor:
        """The final latents of a run, for one batch: float32 [seeds, channels, height, width], on the CPU."""
        return self.on(run).latents(seeds, policy, network).float().cpu()

    def converged(self, seeds: Sequence[int], title: str | None = "converged images") -> Tensor:
        """The converged latents of some seeds. Missing ones are made."""
        missing = self.missing(seeds)
        for batch, report in batches(missing, self.machine.batch_size, title, self.model):
            made = self.model.latents(batch, report=report).float().cpu()
            save_tensors({"seeds": torch.tensor(batch), "latents": made},
                         self._folder("converged") / f"{batch[0]}.safetensors")
            self._converged |= dict(zip(batch, made, strict=True))
        return torch.stack([self._converged[seed] for seed in seeds])

    def missing(self, seeds: Sequence[int]) -> list[int]:
        """The seeds without converged latents."""
        if not self._converged.keys() >= set(seeds):        # another process may have made some
            for file in sorted((self.folder / "converged").glob("*.safetensors")):
                self._converged |= self._latents(file)
        return [seed for seed in seeds if seed not in self._converged]

    def _latents(self, file: Path) -> dict[int, Tensor]:
        """The latents of a file, by seed. Raises UserError for a file of something else."""
        tensors = tensors_of(read_tensors(file), file, "converged latents")
        seeds, latents = (tensors.get(name, torch.empty(0)) for name in ("seeds", "latents"))
        shape = getattr(self.model, "shape", None) or self.run.family.shapes(self.run.config)[0]
        if (seeds.ndim, seeds.dtype, latents.dtype) != (1, torch.int64, torch.float32) or latents.shape != (
                len(seeds), *shape) or not latents.isfinite().all():
            raise UserError(f"{file} is damaged, since it should have seeds and finite latents {list(shape)} of each: "
                            "delete it, and run the same command again")
        return dict(zip(seeds.tolist(), latents, strict=True))

    def of(self, run: Run, seeds: Sequence[int], calls: Sequence[Call] | None = None, title: str | None = None,
           keep: Callable[[Tensor], object] | None = None) -> np.ndarray:
        """The PSNR of a run's latents to the converged ones, dB: float64 [seeds].

        calls: a plan for the calls of a run without caching; None: the run's own caching. title: of a progress bar.
        keep: gets the latents of each batch, in the order of the seeds; then all seeds are sampled again.
        """
        known = {} if keep else self.known(run, calls)
        missing = [seed for seed in seeds if seed not in known]
        model = self.on(run) if missing else self.model
        for batch, report in batches(missing, self.machine.batch_size, title, model):
            policy = model.policy() if calls is None else PlanCache(calls)
            latents = model.latents(batch, policy, report=report)
            if keep:
                keep(latents.float().cpu())
            known = self.note(run, batch, latents, calls)
        return np.array([known[seed] for seed in seeds])

    def note(self, run: Run, seeds: Sequence[int], latents: Tensor, calls: Sequence[Call] | None = None
             ) -> dict[int, float]:
        """Keep the PSNR of a run's latents that were made elsewhere. Returns all known PSNRs of the run, by seed."""
        found = psnr_to(self.converged(seeds), latents.float().cpu())
        known = self.known(run, calls) | {seed: min(float(db), EXACT) for seed, db in zip(seeds, found, strict=True)}
        self._write("psnr", _about(run, calls), known)
        return known

    def known(self, run: Run, calls: Sequence[Call] | None = None) -> dict[int, float]:
        """The known PSNRs of a run, by seed."""
        found = self._read("psnr", _about(run, calls)) or {}
        return {int(seed): db for seed, db in found.items()}

    def kept(self, part: str, about: object, measure: Callable[[], Any]) -> Any:
        """The JSON-compatible value of `measure()`, which is called once and then read from a file. Raises UserError.

        part: of the folder. about: decides the value, besides the settings that all runs share.
        """
        found = self._read(part, about)
        if found is None:
            self._write(part, about, measure())
            found = self._read(part, about)
        return found

    def _write(self, part: str, about: object, found: object) -> None:
        file, found = self._file(part, about), json.loads(json.dumps(found))
        self._folder(part)
        write_json(file, {"about": about, "found": found, "sha256": _digest([about, found])})

    def _read(self, part: str, about: object) -> Any:
        """The kept value, if there is one. Raises UserError for a file that is damaged or belongs to something else."""
        file = self._file(part, about)
        if not file.is_file():
            return None
        with suppress(ValueError, KeyError, TypeError):
            content = read_json(file)
            if content["sha256"] == _digest([about, content["found"]]):
                return content["found"]
        raise UserError(f"{file} is damaged, or of another run: delete it, and run the same command again")

    def _file(self, part: str, about: object) -> Path:
        return self.folder / part / f"{_digest(about)[:20]}.json"

    def _folder(self, part: str) -> Path:
        """A part of the folder, created if it is missing, beside a note of the model's settings."""
        if not (self.folder / "model.json").is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "model.json", json.loads(json.dumps(self.model.settings, default=str)))
        (self.folder / part).mkdir(exist_ok=True)
        return self.folder / part


def psnr_to(converged: Tensor, latents: Tensor) -> np.ndarray:
    """The PSNR of latents to the converged ones, dB: [seeds, ...] twice -> float64 [seeds].

    The span of values is from the smallest to the largest of the converged latents.
    """
    wanted = converged.double().flatten(1)
    errors = (latents.double().flatten(1) - wanted).square().mean(1)
    spans = wanted.amax(1) - wanted.amin(1)
    return psnr((errors / spans.square()).numpy(), span=1.0)


def _about(run: Run, calls: Sequence[Call] | None) -> Any:
    """What decides the latents of a run, besides the settings that all runs share, JSON-compatible."""
    about = {"run": run.brief, "calls": None if calls is None else [[call.branch, *call.damping] for call in calls]}
    return json.loads(json.dumps(about, default=str))


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
