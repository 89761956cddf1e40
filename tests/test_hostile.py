"""Hostile use: whatever a person may type or have on the disk ends in 0, 1 or 2 with one clear line.

    pytest tests/test_hostile.py            one of twenty cases; all with --slow

A case is one command with one thing wrong. It must end by itself within 10 seconds of computing and 2 GB, in one line
on the screen (argparse adds how the command is used), without a traceback; nothing half-written is left, and no file
that was there before is touched. Commands run in forks of this process, which has imported what they need.
"""

import hashlib
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_command, tiny_ddpm
from forked import Forked
from hostile_cases import UNET, Case, all_cases

from ddpm import sample as ddpm_sample
from run import results
from run.results import Metric, Result

SECONDS, MEMORY = 10, 2 << 30
SHARE = 20      # one case of so many, some of each kind


class World:
    """A folder with a tiny model, its images and files of all kinds, which cases are copied from."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True)
        self.config = tiny_ddpm(folder, UNET, steps=4)
        assert run_command(ddpm_sample.main, *self.sample(), "--seeds", "0-3", "--out", folder / "samples") == 0
        np.savez(folder / "real.npz", np.zeros((4, 8, 8, 3), np.uint8))
        (folder / "prompts.txt").write_text("a cat\na dog\n")
        results.write(folder / "results" / "r.json", Result("fid", "ddpm_cifar10", metrics={"FID": Metric(1.0)}))
        self.made = {path for path in folder.rglob("*") if path.is_file()}

    def sample(self) -> list[str]:
        return ["--config", str(self.config), "--threads", "1", "--device", "cpu"]


def digest(folder: Path) -> dict[str, str]:
    """Of every regular file of a folder; features are kept beside images that are judged."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*")
            if path.is_file() and not any(part.endswith(".features") for part in path.parts)}


def limited() -> None:
    """In the fork: the most that a case may take."""
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    signal.alarm(120)               # for one that waits, on a machine that is busy
    torch.set_num_threads(1)


def faults_of(case: Case, world: World, work: Path) -> list[str]:
    """What is wrong with how a case ends; nothing where all is right."""
    folder = work / "case"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    case.make(folder)
    before, own = digest(world.folder), digest(folder)
    module, *words = (word.replace("{}", str(folder)).replace("{world}", str(world.folder)) for word in case.words)
    process = Forked(module, *words, log=work / "log", env=dict(case.env), before=limited)
    code, output = process.wait(150), process.output
    lines = [line for line in output.replace("\r", "\n").splitlines() if line.strip()]
    last, found = (lines or [""])[-1], []
    if code not in case.codes:
        found.append(f"ended with {code}, not {' or '.join(map(str, case.codes))}")
    if "Traceback (most recent" in output or "defect of the program" in output:
        found.append("ended in an error that nobody foresaw")
    if code and sum(line.startswith("error: ") or ": error: " in line for line in lines) != 1:
        found.append("does not say in one line what is wrong")
    if case.says not in last:
        found.append(f"does not say {case.says!r}")
    if len(last) > 700 and "does not fit" not in last:      # there every tensor is named
        found.append(f"says it in {len(last)} characters")
    left = [str(path) for path in folder.rglob("*") if path.name.endswith((".tmp", ".part"))]
    if left:
        found.append(f"leaves {left}")
    if digest(world.folder) != before or any(digest(folder).get(name) != value for name, value in own.items()):
        found.append("touched files that it should not")
    return [f"{case.name}: {fault}; it said: {last[:300]!r}" for fault in found]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("hostile") / "world")


@pytest.mark.parametrize("share", [SHARE, pytest.param(1, marks=pytest.mark.slow)])
def test_one_case_of_so_many(world, tmp_path, share):
    cases = all_cases()
    assert len(cases) >= 300
    faults = [fault for case in cases[::share] for fault in faults_of(case, world, tmp_path)]
    assert not faults, "\n".join(faults)
