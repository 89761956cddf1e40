"""The provenance of a number or an image: commit, versions, device."""

import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from runs.files import ROOT

_PACKAGES = ("torch", "numpy", "diffusers", "transformers", "torchmetrics", "safetensors")
_OURS = __name__.removesuffix("runs.provenance").rstrip(".")        # the package of the rooms where they are installed


def commit() -> str | None:
    """The repository's commit, with '+changes' where tracked files differ from it; None outside a git checkout."""
    if _OURS:       # the folder may lie in another project's checkout
        return None

    def git(*args: str) -> str:
        done = subprocess.run(("git", "-C", str(ROOT), *args), capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that compute; of ours too where it is installed."""
    found = {"python": platform.python_version()}
    for package in (*_PACKAGES, *filter(None, [_OURS])):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


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


def provenance(device: torch.device | str) -> dict:
    """Everything that run.json and results say of where they were made."""
    return {"commit": commit(), "versions": versions(), "device": str(device), "device_name": device_name(device),
            "threads": torch.get_num_threads()}
