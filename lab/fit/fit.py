"""What all fits share: their protocol, and going through runs of the model."""

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
    """Something that is fitted to runs of a model. Its fields are options (`unet_caching.options.option`).

    A fit is one file of lab/fit and a word in `FITS` of lab/fit/__main__.py. That command does the shared work: the run
    and its seeds, the checks before any work, the frozen network, the distances on held-out seeds, the report.
    """
    title: ClassVar[str] = ""               # of its options in --help
    file: ClassVar[type[Fitted]]            # the class of the file that it makes
    caching: ClassVar[bool] = False         # whether it is fitted to runs that cache
    seeds: ClassVar[str | None] = None      # the default of --seeds
    judged: ClassVar[bool] = True           # whether it is judged on held-out seeds

    def check(self, model: ImageModel) -> None:         # noqa: B027  some fits have nothing to check
        """Refuse a run that it cannot be fitted to, before the weights are read. Raises UserError or ValueError."""

    @abstractmethod
    def fit(self, model: ImageModel, seeds: list[int], batch_size: int) -> Any:
        """Fit to the runs of some seeds of a loaded model. Returns the file's contents. Raises UserError."""

    def measure(self, model: ImageModel, made: Any, seeds: list[int], batch_size: int) -> dict[str, Metric]:
        """Metrics of the held-out seeds for the report, besides distances; may also note them in the file."""
        return {}

    def draw(self, model: ImageModel, made: Any, seeds: list[int], path: Path) -> None:     # noqa: B027
        """Draw pictures beside the file. seeds: of the fit."""

    def arms(self, model: ImageModel, path: Path) -> Mapping[str, Callable[[], Policy]]:
        """Functions that return a fresh policy, by name, to compare on the held-out seeds, each with the one before.

        path: the fitted file, which the last policy uses.
        """
        return {}


def with_file(model: ImageModel, **options: Path) -> Callable[[], Policy]:
    """A function that returns a fresh policy of the model's run with more caching options. Raises UserError."""
    run = model.run.spec.having(**options).open()
    run.refuse_foreign(model.settings)

    def policy() -> Policy:
        made = run.caching.policy(model.device, model.dtype)
        assert made is not None
        return made
    return policy


def check_runs(machine: Machine, **sets: list[int]) -> None:
    """Refuse sets of seeds, by option, that share a seed, and machine options for sampling. Raises UserError."""
    if machine.compile or machine.cuda_graphs:
        raise UserError("--compile and --cuda-graphs are for sampling: leave them out here")
    seed, most = Counter(chain(*sets.values())).most_common(1)[0]
    if most > 1:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in sets)
        raise UserError(f"seed {seed} is in two of {flags}: take different seeds")


def bisected(holds: Callable[[float], bool], good: float, bad: float, halvings: int = 60) -> float:
    """The value nearest to `bad` for which `holds` is true. It must be true from there to `good`."""
    for _ in range(halvings):
        middle = (good + bad) / 2
        good, bad = (middle, bad) if holds(middle) else (good, middle)
    return good


def evenly(calls: int, count: int) -> list[int]:
    """`count` of the network calls of a run, evenly spread, from the first on."""
    return sorted({step * calls // count for step in range(count)})


def check_out(path: Path, suffix: str) -> None:
    """Refuse a file that cannot be written. Raises UserError."""
    if path.suffix != suffix or not path.absolute().parent.is_dir():
        raise UserError(f"--out must be a {suffix} file in a folder that exists, got {path}")


def check_float32(model: ImageModel) -> None:
    """Raises UserError for a network in another number format, which is too coarse for training."""
    if model.dtype != torch.float32:
        raise UserError("training is in float32: leave out --dtype")


def own_unet(model: ImageModel) -> NestedUNet:
    """The U-Net of a loaded model. Raises UserError if it is not one of ours: nothing can be fitted to it."""
    if not isinstance(model.unet, NestedUNet):
        raise UserError("--diffusers-unet is for sampling without caching: leave it out here")
    return model.unet


def batches(seeds: Sequence[int], size: int, title: str | None, model: ImageModel, work: int = 1
            ) -> Iterator[tuple[list[int], Callable[[float], None]]]:
    """Go through batches under a progress bar. Yields each batch, and a function that reports a run's progress.

    title: of the bar; None: no bar. work: the number of runs of each batch.
    """
    with tqdm(total=len(seeds) * work * model.sampler.calls, desc=title, unit="call",
              disable=title is None or not seeds) as bar:
        for batch in in_batches(seeds, size):
            def report(done: float, step: int = len(batch)) -> None:
                bar.update(step)
            yield batch, report


def embeddings(model: ImageModel) -> torch.Tensor:
    """The timestep embedding of each network call of a loaded model's run: float32 [calls, channels]."""
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
    """Make sure that a network's weights do not change inside the block: yields their digest.

    Raises RuntimeError if they have changed, or require gradients.
    """
    before = weights_sha256(network)
    yield before
    if weights_sha256(network) != before or any(value.requires_grad for value in network.parameters()):
        raise RuntimeError("the weights of a frozen network have changed, or require gradients")
