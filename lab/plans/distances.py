"""How near runs of one model come to its converged images: those of the same seeds with so many steps that more of them
change nothing. It is the measure for solvers and caching alike, which all start from the same noise.

Converged latents are made once, and a run is measured once for each seed; both are kept batch by batch in a folder, so
that what was killed goes on where it was, and another study or search finds what it needs.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from lab.fit.fit import batches
from run.files import write_json
from run.image_model import ImageModel
from run.machine import Machine
from run.psnr import psnr
from run.spec import Run, RunSpec
from run.weights import read_tensors, save_tensors, tensors_of
from unet_caching.errors import UserError
from unet_caching.files.schema import build, check, read_json
from unet_caching.methods.plan import Call, PlanCache
from unet_caching.nest import Network
from unet_caching.policy import Policy
from unet_caching.samplers.ddim import is_listed

EXACT = 200.0               # dB, instead of infinity
Kept = TypeVar("Kept")


class Distances:
    """Measures runs of a model by their distance to the run of many steps, on weights that are read once.

    converged: the run of many steps. folder: where everything is kept, in a folder of its own for each converged run.
    Raises UserError for a converged run that is random or cached.
    """

    def __init__(self, converged: RunSpec, machine: Machine, folder: Path):
        self.run, self.machine = converged.open(), machine
        if self.run.caching or self.run.eta:
            raise UserError("what others are compared with must be a run without caching and with eta 0")
        self.model = self.run.family.open(self.run, machine)
        self.model.load()
        self._models: dict[torch.dtype, ImageModel] = {self.run.dtype: self.model}
        self._converged: dict[int, Tensor] = {}
        self.folder = folder / f"{self.run.config.name}_{_digest(self.model.settings)[:12]}"

    @property
    def checkpoint_sha256(self) -> str:
        return self.model.settings["checkpoint_sha256"]

    def check(self, run: Run) -> None:
        """Refuse a run that does not come to the same images with ever more steps. Raises UserError."""
        own, other = ({"model": one.config.name, "checkpoint": one.checkpoint, "guidance": one.guidance,
                       "timesteps": one.timesteps, "condition": one.spec.condition} for one in (self.run, run))
        if is_listed(run.timesteps) and run.sampler.call_timesteps()[0] == self.run.sampler.call_timesteps()[0]:
            del own["timesteps"], other["timesteps"]
        differing = [name for name in own if own[name] != other[name]]
        if differing:
            raise UserError(f"{run.name} cannot be compared with {self.run.name}: they differ in "
                            f"{', '.join(differing)} (with leading timesteps each number of steps even starts at a "
                            "noise level of its own; a list of timesteps must begin where the converged run does)")
        if run.eta:
            raise UserError(f"{run.name} cannot be compared with converged images: its eta makes it random")

    def on(self, run: Run) -> ImageModel:
        """The model with a run's settings; its weights are read once for each dtype."""
        if run.dtype not in self._models:
            self._models[run.dtype] = run.family.open(run, self.machine)
            self._models[run.dtype].load()
        model = copy(self._models[run.dtype])
        model.run, model.sampler = run, run.sampler
        model.settings = model.settings | run.sampler.settings
        run.refuse_foreign(model.settings)
        return model

    def latents(self, run: Run, seeds: Sequence[int], policy: Policy | None = None, network: Network | None = None
                ) -> Tensor:
        """What a run ends on: float32 [seeds, channels, height, width], on the CPU. For one batch."""
        return self.on(run).latents(seeds, policy, network).float().cpu()

    def converged(self, seeds: Sequence[int], title: str | None = "converged images") -> Tensor:
        """The converged latents, which are made where they are missing."""
        missing = self.missing(seeds)
        for batch, report in batches(missing, self.machine.batch_size, title, self.model):
            made = self.model.latents(batch, report=report).float().cpu()
            save_tensors({"seeds": torch.tensor(batch), "latents": made},
                         self.made("converged") / f"{batch[0]}.safetensors")
            self._converged |= dict(zip(batch, made, strict=True))
        return torch.stack([self._converged[seed] for seed in seeds])

    def missing(self, seeds: Sequence[int]) -> list[int]:
        """The seeds without converged latents."""
        if not self._converged.keys() >= set(seeds):        # another process may have made some
            for file in sorted((self.folder / "converged").glob("*.safetensors")):
                self._converged |= self._read(file)
        return [seed for seed in seeds if seed not in self._converged]

    def _read(self, file: Path) -> dict[int, Tensor]:
        """The latents of a file, by seed. Raises UserError for one that holds none."""
        tensors = tensors_of(read_tensors(file), file, "converged latents")
        seeds, latents = (tensors.get(name, torch.empty(0)) for name in ("seeds", "latents"))
        shape = getattr(self.model, "shape", None) or self.run.family.shapes(self.run.config)[0]
        if (seeds.ndim, seeds.dtype, latents.dtype) != (1, torch.int64, torch.float32) or latents.shape != (
                len(seeds), *shape) or not latents.isfinite().all():
            raise damaged(file, f"it should hold seeds and of each finite latents {list(shape)}")
        return dict(zip(seeds.tolist(), latents, strict=True))

    def of(self, run: Run, seeds: Sequence[int], calls: Sequence[Call] | None = None, title: str | None = None,
           keep: Callable[[Tensor], object] | None = None) -> np.ndarray:
        """PSNR of a run's latents to the converged ones, dB: float64 [seeds].

        calls: a plan for the calls of a run without caching; None: the run's own caching. title: of a progress bar.
        keep: is given the latents of each batch, in the order of the seeds; all are made then.
        """
        known = {} if keep else self.known(run, calls)
        model = self.on(run) if any(seed not in known for seed in seeds) else self.model
        missing = [seed for seed in seeds if seed not in known]
        for batch, report in batches(missing, self.machine.batch_size, title, model):
            policy = model.policy() if calls is None else PlanCache(calls)
            latents = model.latents(batch, policy, report=report)
            if keep:
                keep(latents.float().cpu())
            known = self.note(run, batch, latents, calls)
        return np.array([known[seed] for seed in seeds])

    def note(self, run: Run, seeds: Sequence[int], latents: Tensor, calls: Sequence[Call] | None = None
             ) -> dict[int, float]:
        """Keep how near the latents of a run are, which were made elsewhere; what is known of it then, by seed."""
        found = psnr_to(self.converged(seeds), latents.float().cpu())
        known = self.known(run, calls) | {seed: min(float(db), EXACT) for seed, db in zip(seeds, found, strict=True)}
        self.made("runs")
        write_json(self._file(run, calls), _about(run, calls) | {"psnr": known})
        return known

    def made(self, part: str) -> Path:
        """A folder of what is measured, made where it is not there, with a note of what it was measured on."""
        if not (self.folder / "model.json").is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "model.json", json.loads(json.dumps(self.model.settings, default=str)))
        (self.folder / part).mkdir(exist_ok=True)
        return self.folder / part

    def known(self, run: Run, calls: Sequence[Call] | None = None) -> dict[int, float]:
        """What has been measured of a run, by seed."""
        file = self._file(run, calls)
        if not file.is_file():
            return {}
        content, about = read_kept(file, _Measured), json.loads(json.dumps(_about(run, calls), default=str))
        if (content.run, content.calls) != (about["run"], about["calls"]):
            raise UserError(f"{file} is of another run: delete it, and the same command measures again")
        return numbered(file, content.psnr)

    def _file(self, run: Run, calls: Sequence[Call] | None) -> Path:
        return self.folder / "runs" / f"{_digest(_about(run, calls))[:20]}.json"


@dataclass
class _Measured:
    """A file of `Distances.of`."""
    run: dict                       # what decides its latents
    calls: list | None
    psnr: dict[str, float]          # dB, by seed


def kept(path: Path, schema: type[Kept], measure: Callable[[], dict]) -> Kept:
    """What is measured once, and read from a file of a schema from then on. Raises UserError for a damaged one."""
    if not path.is_file():
        write_json(path, measure())
    return read_kept(path, schema)


def read_kept(path: Path, schema: type[Kept]) -> Kept:
    """What a file that was measured holds. Raises UserError for one that is damaged."""
    try:
        content = read_json(path)
        check(content, schema, path)
        return build(content, schema)
    except ValueError as error:
        raise UserError(f"{error}; delete it, and the same command measures again") from None


def damaged(path: Path, why: str) -> UserError:
    """The error of a file that was measured and does not hold what it should."""
    return UserError(f"{path} is damaged: {why}; delete it, and the same command measures again")


def numbered(path: Path, values: Mapping[str, Kept]) -> dict[int, Kept]:
    """The values of a file by the whole numbers that their keys are. Raises UserError."""
    wrong = next((key for key in values if not (key.isascii() and key.isdigit() and len(key) < 20)), None)
    if wrong is not None:
        raise damaged(path, f"{wrong[:40]!r} should be a whole number")
    return {int(key): value for key, value in values.items()}


def psnr_to(converged: Tensor, latents: Tensor) -> np.ndarray:
    """PSNR of latents to the converged ones, dB: [seeds, ...] both -> float64 [seeds].

    The span is the converged latents' own, from their smallest to their largest value.
    """
    wanted = converged.double().flatten(1)
    errors = (latents.double().flatten(1) - wanted).square().mean(1)
    spans = wanted.amax(1) - wanted.amin(1)
    return psnr((errors / spans.square()).numpy(), span=1.0)


def _about(run: Run, calls: Sequence[Call] | None) -> dict[str, object]:
    """What decides the latents of a run, beside what all runs share."""
    return {"run": run.told, "calls": None if calls is None else [[call.branch, *call.damping] for call in calls]}


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
