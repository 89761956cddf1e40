"""Measures the candidates of a search, paired by seed, in one process or several with the same results."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from lab.plans.distances import Distances
from run.machine import Machine
from run.seeds import in_batches
from run.spec import Run, RunSpec
from unet_caching.errors import UserError
from unet_caching.methods.plan import Call

Found = TypeVar("Found")
Depths = tuple[int | None, ...]         # the branch of each call; None computes everything
SPACING = "trailing"        # runs of all lengths start at the same noise level and end on a clean image
CONVERGED = "unipc"


class Grid(NamedTuple):
    """The number of steps of a run, and its timesteps: trailing, or a list that begins at the same timestep."""
    steps: int
    timesteps: str = SPACING


@dataclass(frozen=True)
class Candidate:
    """A run that a search may choose."""
    group: str                  # it is first compared with others of its group
    sampler: str
    grid: Grid
    calls: tuple[Call, ...]     # its network calls
    order: int = 0              # of its forecasts

    @property
    def kind(self) -> str:
        """Its name in a report."""
        return f"{self.group}, {self.sampler}" if self.group.startswith("fewer steps") else self.group

    @property
    def depths(self) -> Depths:
        return tuple(call.branch for call in self.calls)

    def __str__(self) -> str:
        return f"{self.group}, {self.sampler}, {self.grid.steps} steps"

    def on(self, sampler: str) -> "Candidate":
        """The same with another sampler."""
        return replace(self, sampler=sampler)


class Judge:
    """Measures candidates of a model by their distances, in this process or in several."""

    def __init__(self, distances: Distances):
        self.distances = distances
        self.pool: ProcessPoolExecutor | None = None
        self._runs: dict[tuple[str, Grid], Run] = {}

    @contextmanager
    def processes(self, jobs: int) -> Iterator[None]:
        """Measure in so many processes inside a `with` statement; they share out the GPUs."""
        if jobs == 1:
            yield
            return
        context, distances = multiprocessing.get_context("spawn"), self.distances
        same = distances.run.spec, distances.machine, distances.folder.parent
        with ProcessPoolExecutor(jobs, context, _begin, (*same, context.Value("i", -1))) as self.pool:
            try:
                yield
            finally:
                self.pool.shutdown(cancel_futures=True)
                self.pool = None

    def run(self, sampler: str, grid: Grid) -> Run:
        """The run without caching over a grid. Raises UserError for a grid that the sampler cannot take."""
        if (sampler, grid) not in self._runs:
            run = run_of(self.distances.run.spec, sampler, grid).open()
            self.distances.check(run)
            _ = run.sampler
            self._runs[sampler, grid] = run
        return self._runs[sampler, grid]

    def calls(self, sampler: str, grid: Grid) -> int | None:
        """The network calls of a grid; None if the sampler cannot take it."""
        try:
            return self.run(sampler, grid).calls
        except UserError:
            return None

    def each(self, work: Callable[..., Found], items: Sequence[tuple], title: str, unit: str = "run") -> list[Found]:
        """work(judge, *item) for every item, in all processes. work: a function that other processes can import."""
        waiting: list[Future[Found]] = []
        if self.pool is not None:
            waiting = [self.pool.submit(_in_process, work, item) for item in items]
        return [waiting[number].result() if waiting else work(self, *item)
                for number, item in enumerate(tqdm(items, title, unit=unit, disable=not items))]

    def converge(self, seeds: Sequence[int]) -> None:
        """Make the missing converged latents."""
        missing = in_batches(self.distances.missing(seeds), self.distances.machine.batch_size)
        self.each(Judge._converge, [(batch,) for batch in missing], "converged images", "batch")

    def _converge(self, batch: list[int]) -> None:
        self.distances.converged(batch, title=None)

    def of(self, candidate: Candidate, seeds: Sequence[int]) -> np.ndarray:
        """PSNR to the converged latents, dB: float64 [seeds]."""
        return self.distances.of(self.run(candidate.sampler, candidate.grid), seeds, candidate.calls)

    def measure(self, candidates: Sequence[Candidate], seeds: Sequence[int], title: str) -> list[np.ndarray]:
        """`of` for many candidates."""
        return self.each(Judge.of, [(candidate, list(seeds)) for candidate in candidates], title)


def run_of(spec: RunSpec, sampler: str, grid: Grid) -> RunSpec:
    """A run of the model without caching."""
    return spec.having(sampler=sampler, steps=grid.steps, timesteps=grid.timesteps, eta=None)


# In the worker processes:

_judges: list[Judge] = []


def _begin(converged: RunSpec, machine: Machine, folder: Path, last: "Synchronized[int]") -> None:
    with last.get_lock():
        last.value += 1
        os.environ["LOCAL_RANK"] = str(last.value)      # `run.machine.Device.prepare` chooses the GPU by it
    parent: Any = multiprocessing.parent_process()

    def end_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    _judges.append(Judge(Distances(converged, machine, folder)))


def _in_process(work: Callable[..., Found], item: tuple) -> Found:
    return work(_judges[0], *item)
