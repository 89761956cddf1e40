"""The provenance of a number or an image: commit, versions, device."""

import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from run.files import ROOT

_PACKAGES = ("torch", "numpy", "diffusers", "transformers", "torchmetrics", "safetensors")
_VECTORS = ("avx", "fma", "amx", "sve", "asimd", "i8mm", "bf16")        # how the names of extensions begin


def commit() -> str | None:
    """The repository's commit, with '+changes' if tracked files differ from it; None outside a git checkout."""
    def git(*args: str) -> str:
        done = subprocess.run(("git", "-C", str(ROOT), *args), capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that change numbers."""
    about = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            about[package] = version(package)
    return about


def device_name(device: torch.device | str) -> str:
    """The name of a GPU, 'NVIDIA H100', or of the processor."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        models = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")]
        return models[0] if models else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def processor() -> dict:
    """The processor, in more detail than its name: vendor, family and model number, and its extensions for vectors and
    matrices. Fields that the system does not know are missing. used: the widest vectors that PyTorch's kernels use."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        first = ""
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    about: dict = {name: fields[key] for name, key in (("vendor", "vendor_id"), ("name", "model name"))
                   if key in fields}
    about |= {name: int(fields[key]) for name, key in (("family", "cpu family"), ("model", "model"))
              if fields.get(key, "").isdigit()}
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {"machine": platform.machine(), **about, "extensions": [flag for flag in flags if flag.startswith(_VECTORS)],
            "used": torch.backends.cpu.get_cpu_capability()}


def provenance(device: torch.device | str) -> dict:
    """What run.json and results record about the program and the machine."""
    return {"commit": commit(), "versions": versions(), "device": str(device), "device_name": device_name(device),
            "processor": processor(), "threads": torch.get_num_threads()}
