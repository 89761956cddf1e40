"""The machine of a run: where and how it is computed. That changes the run's time, but no image."""

import os
from dataclasses import dataclass
from typing import ClassVar

import torch

from run import arguments
from run.seeds import environment_number
from unet_caching.errors import UserError
from unet_caching.options import option


@dataclass(frozen=True)
class Device:
    """Where to compute. Raises UserError for a number of threads below 1."""
    title: ClassVar[str] = "the machine"
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1 (default: %(default)s)")
    threads: int | None = option(None, "CPU threads (default: all cores)", least=1)

    def __post_init__(self) -> None:
        arguments.check(self)

    def prepare(self) -> torch.device:
        """Set the number of CPU threads, and return the device. Raises UserError if it does not exist.

        Under torchrun, cuda is the process's own GPU.
        """
        name = self.device
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        if name == "cuda" and "LOCAL_RANK" in os.environ:
            name = f"cuda:{environment_number('LOCAL_RANK', 0) % max(1, torch.cuda.device_count())}"
        try:
            device = torch.device(name)
            torch.ones(1, device=device).item()
        except (RuntimeError, AssertionError):
            raise UserError(f"--device {name} does not exist: {torch.cuda.device_count()} CUDA devices are visible; "
                            "cpu always works") from None
        return device


@dataclass(frozen=True)
class Machine(Device):
    """Where and how to compute the images of a run."""
    batch_size: int = option(8, "images at a time (default: %(default)s)", least=1)
    compile: bool = option(False, "torch.compile, a graph for each kind of step")
    cuda_graphs: bool = option(False, "record each kind of step once and replay it (GPU)")
