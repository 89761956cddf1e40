"""The speed-up of caching on this machine: checks, then times of networks of real size; a table, a picture, and advice.

    python -m scripts.machine               ten minutes on a GPU; longer on a CPU
    python -m scripts.machine --quick       one minute; on a CPU two or three, with the small models
    python -m scripts.machine --full        all sizes, dtypes and modes; on a CPU SDXL and a video network, too
    python -m scripts.machine --show        only print the results so far

Weights are random and nothing is downloaded. Our U-Nets, diffusers' with our caching (as in a pipeline), diffusers' own
and the PyPI package DeepCache, if it is installed, take turns in one process: trust the ratios. Results are written to
results/machines/NAME/ at once. A stopped command shows them, and the same command goes on.
"""

import gc
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from eval import checks
from eval.cost import operators
from eval.cost.sides import Subject, compare
from eval.tables import machine
from run import results
from run.cli import command
from run.files import ROOT
from run.machine import Device
from run.provenance import device_name, provenance
from run.results import Result
from run.spec import DTYPES
from scripts import doctor
from unet_caching.errors import UserError
from unet_caching.options import option
from unet_caching.speed.compiled import missing_compiler
from unet_caching.speed.packed import packable

Measured = tuple[dict[str, Any], dict[str, Any]]         # settings, times
REAL = tuple(map(Subject, ("ddpm_cifar10", "ldm_cin256", "sd_v15")))
LARGE = {"cpu": (Subject("sdxl", 512), Subject("svd", 128, 4)), "cuda": (Subject("sdxl"), Subject("svd"))}
SECONDS = {"quick": 2.0, "default": 15.0, "full": 120.0}     # limit of timed rounds after the second, and of whole runs


@dataclass(frozen=True)
class Options:
    quick: bool = option(False, "one to three minutes", one_of="form")
    full: bool = option(False, "all sizes, dtypes and modes", one_of="form")
    show: bool = option(False, "only print the results so far", one_of="form")
    name: str | None = option(None, "folder below --out (default: the device's name)")
    out: Path = option(ROOT / "results" / "machines", "folder of the results (default: results/machines)")

    @property
    def form(self) -> str:
        return "quick" if self.quick else "full" if self.full else "default"


@dataclass(frozen=True)
class Timed:
    """Forms of a network to time together. sizes: images at a time; the first size that fits is taken."""
    subject: Subject
    sizes: tuple[int, ...]
    dtype: str
    mode: str

    def __str__(self) -> str:
        return f"{self.subject}, batch {' or '.join(map(str, self.sizes))}, {self.dtype}, {self.mode}"

    def settings(self, size: int) -> dict[str, Any]:
        subject = self.subject
        sized = {"resolution": subject.pixels, "frames": subject.frames}
        return {"batch_size": size, "rows": size * subject.rows, "dtype": self.dtype, "mode": self.mode,
                "branch": subject.branch, "weights": "random", **{key: one for key, one in sized.items() if one}}

    def measure(self, device: torch.device, limit: float) -> Measured:
        """The times at the first size that fits. Raises UserError if none fits."""
        dtype = DTYPES[self.dtype]
        plain, (theirs, _) = self.subject.make("meta", dtype)
        needed = 2 * sum(value.nbytes for value in (plain or theirs).parameters())      # ours and theirs
        if needed > free_memory(device):
            raise UserError(f"it takes {needed / 1e9:.0f} GB, and {free_memory(device) / 1e9:.0f} GB are free")
        for size in self.sizes:
            gc.collect()        # the networks measured before
            torch.compiler.reset()
            torch.cuda.empty_cache()
            try:
                return self.settings(size), compare(self.subject, size, dtype, self.mode, device, 20, limit)
            except torch.OutOfMemoryError:
                print(f"  {size} do not fit", flush=True)
        raise UserError("it does not fit")


def free_memory(device: torch.device) -> int:
    """The free memory in bytes; for a CPU, the system's available memory, if known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return 1024 * int(re.findall(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[0])
    except (OSError, IndexError):
        return 2 ** 62


def timed(form: str, device: torch.device) -> list[Timed]:
    """The networks that a form of this command times on a device."""
    full, gpu = form == "full", device.type != "cpu"
    subjects = REAL if gpu or form != "quick" else checks.SMALL
    if full or (gpu and form != "quick"):
        subjects += LARGE["cuda" if gpu else "cpu"]
    half = ["bf16"] if gpu or packable(nn.Linear(1, 1).to(torch.bfloat16)) else []
    dtypes = ["fp32", *half, *(["fp16"] if full and gpu else [])] if full or not gpu else half
    sizes = [(1,), (16, 4)] if gpu and form != "quick" else [(1,)]
    modes = ["eager", *(["graphs"] if gpu else []), *(["compiled"] if (full or gpu) and form != "quick" else [])]
    if missing_compiler(device):
        modes = [mode for mode in modes if mode != "compiled"]
    return [Timed(subject, size, dtype, mode) for subject in subjects for size in sizes for dtype in dtypes
            for mode in modes if full or mode != "compiled" or size == (1,)]


class Part(NamedTuple):
    """Something to measure. settings: of its record, one of these."""
    what: str
    kind: str
    model: str | None
    settings: list[dict[str, Any]]
    measure: Callable[[], Measured]

    def known(self, record: Result) -> bool:
        """Whether a record belongs to it."""
        return (record.kind, record.model) == (self.kind, self.model) and record.settings in self.settings


def count(subject: Subject) -> Measured:
    return {}, {"operators": operators.of_cached_steps(subject)}


@dataclass
class Session:
    """The records of a machine, and the parts that are still to be measured."""
    folder: Path
    device: torch.device
    form: str

    def __post_init__(self) -> None:
        file = self.folder / "records.jsonl"
        self.records = results.read_packed(file) if file.exists() else []
        self.provenance = provenance(self.device)
        try:
            self.provenance["versions"]["DeepCache"] = version("DeepCache")
        except PackageNotFoundError:
            print("the PyPI package DeepCache is not installed: it is left out", flush=True)

    def parts(self) -> Iterator[Part]:
        """All parts that this form measures."""
        yield Part("checks", "checks", None, [{}], self.checks)
        for one in timed(self.form, self.device):
            yield Part(str(one), "speed", one.subject.model, [one.settings(size) for size in one.sizes],
                       partial(one.measure, self.device, SECONDS[self.form]))
        for subject in checks.SMALL if self.form == "quick" else (*REAL, *LARGE["cuda"]):
            yield Part(f"operators of {subject}", "operators", subject.model, [{}], partial(count, subject))

    def checks(self) -> Measured:
        found = []
        for name in checks.CHECKS:
            if name == "torch.compile" and self.form == "quick":
                continue
            found.append(checks.check(name, self.device))
            print(f"  {name}: {found[-1]['state']}. {found[-1]['why']}", flush=True)
        return {}, {"checks": found}

    def run(self) -> None:
        """Measure the missing parts one after the other, and write each at once."""
        parts = list(self.parts())
        for number, part in enumerate(parts, 1):
            there = any(map(part.known, self.records))
            print(f"[{number}/{len(parts)}] {part.what}{': there already' if there else ''}", flush=True)
            if there:
                continue
            started = time.time()
            try:
                settings, times = part.measure()
            except Exception as error:      # the rest still runs
                print(f"  left out: {type(error).__name__}: {error}"[:300], flush=True)
                continue
            record = Result(part.kind, part.model, settings, throughput=times, provenance=self.provenance)
            self.records.append(record.stamped(started))
            results.write_packed(self.folder / "records.jsonl", self.records)
            machine.write(self.records, self.folder)


@command
def main(options: Options, where: Device) -> None:
    device = where.prepare()
    name = options.name or re.sub(r"\W+", "_", device_name(device).lower()).strip("_")
    session = Session(options.out / name, device, options.form)
    print("\n".join(doctor.machine()), flush=True)
    try:
        if not options.show:
            session.run()
    finally:
        if session.records:
            print(machine.write(session.records, session.folder) + f"\n{session.folder}")


if __name__ == "__main__":
    main()
