"""What everything that is fitted to a model has in common: its protocol, and going through runs of the model."""

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from tqdm import tqdm

from run.image_model import ImageModel
from run.machine import Machine
from run.results import Metric
from run.seeds import in_batches
from unet_caching.errors import UserError
from unet_caching.files.fitted import Fitted
from unet_caching.policy import Policy
from unet_caching.unet import NestedUNet


@dataclass(frozen=True)
class Fit(ABC):
    """Something that is fitted to runs of a model; its options are fields (`unet_caching.options.option`).

    A kind of it is one file of lab/fit and a word in `FITS` of lab/fit/__main__.py, which does what all share: the run
    and its seeds, the checks before any work, the frozen network, the distances on held-out seeds, the report.
    """
    title: ClassVar[str] = ""               # of its options in --help
    file: ClassVar[type[Fitted]]            # what is made
    caching: ClassVar[bool] = False         # whether it is fitted to runs that cache
    seeds: ClassVar[str | None] = None      # to learn from, where the user need not say
    judged: ClassVar[bool] = True           # on held-out seeds

    def check(self, model: ImageModel) -> None:         # noqa: B027  few have nothing to check
        """Refuse, before the weights are read, what cannot be fitted. Raises UserError or ValueError."""

    @abstractmethod
    def fit(self, model: ImageModel, seeds: list[int], batch_size: int) -> Any:
        """The file of what is learnt from the runs of some seeds of a loaded model. Raises UserError."""

    def measure(self, model: ImageModel, made: Any, seeds: list[int], batch_size: int) -> dict[str, Metric]:
        """What the report says of the held-out seeds beside distances; it may be noted in the file, too."""
        return {}

    def draw(self, model: ImageModel, made: Any, seeds: list[int], path: Path) -> None:     # noqa: B027
        """Pictures beside the file. seeds: that were learnt from."""

    def arms(self, model: ImageModel, path: Path) -> Mapping[str, Callable[[], Policy]]:
        """What is compared on the held-out seeds, each with the one before it: functions that return a fresh policy.

        path: of the file, which the last of them takes.
        """
        return {}


def with_file(model: ImageModel, **options: Path) -> Callable[[], Policy]:
    """A fresh policy of the model's run with more caching options. Raises UserError where the run refuses them."""
    run = model.run.spec.having(**options).open()
    run.refuse_foreign(model.settings)

    def policy() -> Policy:
        made = run.caching.policy(model.device, model.dtype)
        assert made is not None
        return made
    return policy


def check_runs(machine: Machine, **sets: list[int]) -> None:
    """Refuse sets of seeds, by their options, that share one; and a machine that is for sampling. Raises UserError."""
    if machine.compile or machine.cuda_graphs:
        raise UserError("--compile and --cuda-graphs are for sampling: every network call is looked at here")
    seed, most = Counter(chain(*sets.values())).most_common(1)[0]
    if most > 1:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in sets)
        raise UserError(f"seed {seed} is in two of {flags}: take others")


def bisected(holds: Callable[[float], bool], good: float, bad: float, halvings: int = 60) -> float:
    """The value nearest to a bad one for which something holds, as it does from there to a good one."""
    for _ in range(halvings):
        middle = (good + bad) / 2
        good, bad = (middle, bad) if holds(middle) else (good, middle)
    return good


def evenly(calls: int, count: int) -> list[int]:
    """So many of the network calls of a run, evenly spread, the first among them."""
    return sorted({step * calls // count for step in range(count)})


def check_out(path: Path, suffix: str) -> None:
    """Refuse a file that could not be written. Raises UserError."""
    if path.suffix != suffix or not path.absolute().parent.is_dir():
        raise UserError(f"--out must be a {suffix} file in a folder that is there, got {path}")


def check_float32(model: ImageModel) -> None:
    """Raises UserError for a network in another number format, which is too coarse to learn in."""
    if model.dtype != torch.float32:
        raise UserError("training is in float32: leave out --dtype")


def own_unet(model: ImageModel) -> NestedUNet:
    """The U-Net of a loaded model. Raises UserError for one of another layout, which nothing can be fitted to."""
    if not isinstance(model.unet, NestedUNet):
        raise UserError("--diffusers-unet is for sampling without caching: there is nothing to measure or to fit")
    return model.unet


def batches(seeds: Sequence[int], size: int, title: str | None, model: ImageModel, work: int = 1
            ) -> Iterator[tuple[list[int], Callable[[float], None]]]:
    """Go through batches under a progress bar, with what is told the progress of each of the `work` runs.

    title: of the bar; None: there is none.
    """
    with tqdm(total=len(seeds) * work * model.sampler.calls, desc=title, unit="call",
              disable=title is None or not seeds) as bar:
        for batch in in_batches(seeds, size):
            def report(done: float, step: int = len(batch)) -> None:
                bar.update(step)
            yield batch, report


def embeddings(model: ImageModel) -> torch.Tensor:
    """What the blocks know of the timestep of each network call of a loaded model's run: float32 [calls, channels]."""
    steps = torch.tensor(model.sampler.call_timesteps(), device=model.device)
    return own_unet(model).embedding(steps).float()


def weights_sha256(network: nn.Module) -> str:
    """The hex digest of a network's weights, packed ones included."""
    digest = hashlib.sha256()
    for name, value in network.named_parameters():
        dense = value.detach().to_dense() if value.is_mkldnn else value.detach()
        digest.update(name.encode())
        digest.update(dense.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def frozen(network: nn.Module) -> Iterator[str]:
    """Make sure that a network's weights are the same after what is done inside: yields their digest.

    Raises RuntimeError where they are not, or could learn.
    """
    before = weights_sha256(network)
    yield before
    if weights_sha256(network) != before or any(value.requires_grad for value in network.parameters()):
        raise RuntimeError("the network was to be frozen, and it has changed")
