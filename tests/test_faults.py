"""Faults: processes killed at any moment, disks that are full, files cut short, two writers at a time.

Real commands on tiny models: sampling, the conversion of a checkpoint, packing and evaluation. Each is run once
undisturbed; then it is killed and started again, several times in one folder, until a last run may end. Whatever lies
there in between must be whole and right, and the end must equal the undisturbed run to the last bit, with nothing
missing, doubled or left over. A process is killed (SIGKILL) at a random time or at one of its operations on files,
chosen at random, or (SIGXFSZ) in the middle of writing a file.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import run_command, tiny_ddpm, tiny_ldm
from forked import Forked
from safetensors.torch import load_file

from ddpm import sample as ddpm_sample
from eval.metrics import extract

IMAGES = 10
SEEDS = f"0-{IMAGES - 1}"
DDPM = {"resolution": 8, "in_channels": 3, "out_channels": 3, "ch": 32, "ch_mult": [1], "num_res_blocks": 1,
        "attn_resolutions": []}


class Case(NamedTuple):
    """A command that works in a folder."""
    words: list                                     # module, arguments; '{}' is the folder
    result: Callable[[Path], dict[str, bytes]]      # what it must end with, by name
    needs: tuple[Path, ...] = ()                    # copied into the folder before
    ranks: int = 1                                  # processes that share the work

    def make(self, folder: Path) -> Path:
        """The folder before the command."""
        folder.mkdir(exist_ok=True)
        for path in self.needs:
            (shutil.copytree if path.is_dir() else shutil.copy2)(path, folder / path.name)
        return folder

    def start(self, folder: Path, log: Path, rank: int = 0, before: Callable[[], None] = lambda: None) -> Forked:
        module, *args = (str(word).replace("{}", str(folder)) for word in self.words)
        env = {} if self.ranks == 1 else {"RANK": str(rank), "WORLD_SIZE": str(self.ranks)}
        return Forked(module, *args, log=log, env=env, before=before)

    def finish(self, folder: Path, log: Path) -> dict[str, bytes]:
        """Run to the end; the result."""
        processes = [self.start(folder, Path(f"{log}{rank}"), rank) for rank in range(self.ranks)]
        for process in processes:
            assert process.wait() == 0, process.output
        return self.result(folder)


class Done(NamedTuple):
    """What an undisturbed run leaves, what it ends with, and the seconds it took."""
    folder: Path
    result: dict[str, bytes]
    seconds: float


def files(*patterns: str) -> Callable[[Path], dict[str, bytes]]:
    return lambda folder: {str(path.relative_to(folder)): path.read_bytes()
                           for pattern in patterns for path in folder.glob(pattern)}


def judged(folder: Path) -> dict[str, bytes]:
    found = {path.name: json.loads(path.read_text()) for path in folder.glob("result.json")}
    return {name: json.dumps([one["metrics"], one["details"]["FD-EffLite0"]]).encode() for name, one in found.items()}


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Case]:
    """Tiny models with random weights, and the cases on them, by name."""
    folder = tmp_path_factory.mktemp("models")
    ddpm = ["ddpm.sample", "--config", tiny_ddpm(folder, DDPM, steps=2), "--threads", 1]
    ldm = tiny_ldm(folder, steps=2)
    torch.save({"state_dict": load_file(folder / "ldm.safetensors")}, folder / "ldm.ckpt")
    samples, real = folder / "samples", folder / "reference"
    for out, seeds in ((samples, SEEDS), (real, f"100-{99 + IMAGES}")):
        assert run_command(ddpm_sample.main, *ddpm[1:], "--seeds", seeds, "--out", out) == 0
    sampling = [*ddpm, "--seeds", SEEDS, "--batch-size", 1, "--out", "{}/out"]
    return {
        "sampling": Case(sampling, files("out/*/*.png")),
        "two ranks": Case(sampling, files("out/*/*.png"), ranks=2),
        "conversion and sampling": Case(
            ["ldm.sample", "--config", ldm, "--checkpoint", "{}/ldm.ckpt", "--seeds", "0-3",
             "--batch-size", 1, "--threads", 1, "--out", "{}/out"],
            files("out/*/*.png", "ldm.safetensors"), (folder / "ldm.ckpt",)),
        "packing": Case(["run.npz", "--samples", samples, "--seeds", SEEDS, "--out", "{}/x.npz"], files("x.npz")),
        "evaluation": Case(["eval.quality", "--samples", "{}/samples", "--reference", "{}/reference", "--repeats", 2,
                            "--dims", 4, "--threads", 1, "--out", "{}/result.json"], judged, (samples, real))}


@pytest.fixture(scope="module")
def done(cases, tmp_path_factory) -> Callable[[str], Done]:
    """done(name): a case after an undisturbed run, of which there is one."""
    @cache
    def run(name: str) -> Done:
        folder, started = tmp_path_factory.mktemp("done"), time.monotonic()
        result = cases[name].finish(cases[name].make(folder / "work"), folder / "log")
        return Done(folder / "work", result, time.monotonic() - started)
    return run


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(extract, "PART", 3)


def compare(found: dict[str, bytes], expected: dict[str, bytes], folder: Path | None = None) -> None:
    """What is there is as expected; with a folder, at the end, all is there, and nothing is left over."""
    assert not [name for name, content in found.items() if expected.get(name) != content]
    if folder:
        assert found.keys() == expected.keys()
        assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


# ---- kills

FILE_EVENTS = {"open", "os.rename", "os.link", "os.remove", "os.mkdir"}


def at_operation(folder: Path, number: int) -> Callable[[], None]:
    """In a fork: die just before the file operation of that number below `folder`."""
    left = [number]

    def hook(event: str, args: tuple) -> None:
        if event in FILE_EVENTS and isinstance(args[0], str | os.PathLike) and str(folder) in os.fspath(args[0]):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
    return lambda: sys.addaudithook(hook)


def in_file(size: int) -> Callable[[], None]:
    """In a fork: die where a file would grow beyond `size` bytes, with so much of it written."""
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return limit


def killed(case: Case, folder: Path, log: Path, seconds: float, rng: random.Random) -> bool:
    """Start the case (of several ranks: all, one of which is the victim) and kill it; False where it was done before.

    seconds: that an undisturbed run takes.
    """
    victim = rng.randrange(case.ranks)
    others = [case.start(folder, Path(f"{log}{rank}"), rank) for rank in range(case.ranks) if rank != victim]
    how = rng.choice(["time", "operation", "write"])
    if how == "time":
        process = case.start(folder, log, victim)
        time.sleep(rng.uniform(0, 1.1 * seconds))
        process.send(signal.SIGKILL)
    elif how == "operation":
        # Few of the first, where a run is set up, and many more later on.
        process = case.start(folder, log, victim, at_operation(folder, int(2 ** rng.uniform(0, 6.5))))
    else:
        # From a few bytes to more than the largest file has; the output, a file too, is not kept.
        process = case.start(folder, Path(os.devnull), victim, in_file(int(2 ** rng.uniform(2, 18))))
    code = process.wait()
    assert all(other.wait() == 0 for other in others), [other.output for other in others]
    assert code in (0, -signal.SIGKILL, -signal.SIGXFSZ), f"killed at {how}: {process.output}"
    return code != 0


KILLS = {"sampling": 3, "two ranks": 2, "conversion and sampling": 2, "packing": 3, "evaluation": 2}


@pytest.mark.parametrize("name", KILLS)
def test_killed_at_any_moment(cases, done, name, tmp_path):
    case, whole, rng, log = cases[name], done(name), random.Random(name), tmp_path / "log"
    kills = 0
    while kills < KILLS[name]:
        folder = case.make(tmp_path / str(kills))
        for _ in range(rng.randint(1, 6)):
            dead = killed(case, folder, log, whole.seconds, rng)
            compare(case.result(folder), whole.result)
            if not dead:
                break
            kills += 1
        compare(case.finish(folder, log), whole.result, folder)
        shutil.rmtree(folder)


# ---- disks, damaged files, two writers


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A tmpfs of so many bytes, where one can be mounted."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True,
                             text=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def ended(process: Forked, codes: tuple[int, ...], words: str = "") -> int:
    """The exit code, which is one of the codes; beside 0 there is one clear line with the words."""
    code, output = process.wait(), process.output
    line = output.strip().splitlines()[-1] if output.strip() else ""
    assert code in codes, output
    assert not code or (line.startswith("error: ") and "Traceback" not in output and words in line), output
    return code


@pytest.mark.parametrize("name", ["sampling", "conversion and sampling", "packing"])
def test_a_full_disk(cases, done, name, tmp_path):
    """With ever more room until the case ends, in one folder."""
    case, whole, log, refused, room = cases[name], done(name), tmp_path / "log", 0, 0
    needed = sum(path.stat().st_blocks * 512 for path in whole.folder.rglob("*"))
    with small_disk(tmp_path / "disk", 2 * needed + 2 ** 20) as disk:
        case.make(disk)
        while True:
            filler = disk / "filler"
            filler.write_bytes(b"")
            free = shutil.disk_usage(disk).free
            with open(filler, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, free - room))
            code = ended(case.start(disk, log), (0, 1, 2))
            filler.unlink()
            if not code:
                break
            compare(case.result(disk), whole.result)
            refused += 1
            room += max(4096, needed // 4)
        compare(case.result(disk), whole.result, disk)
    assert refused > 0


@pytest.mark.parametrize(("name", "pattern", "heals"), [
    ("sampling", "out/000/000003.png", True), ("sampling", "out/sessions.jsonl", True),
    ("sampling", "out/run.json", False),
    ("conversion and sampling", "ldm.safetensors", False), ("conversion and sampling", "ldm.ckpt", False),
    ("conversion and sampling", "ldm.safetensors.sha256", True), ("conversion and sampling", "out/images.csv", True),
    ("evaluation", "samples/.features/*/*.npz", True), ("evaluation", "samples/000/000003.png", False),
    ("evaluation", "samples/run.json", False)])
def test_a_file_cut_short(cases, done, name, pattern, heals, tmp_path):
    """Either all is as it was after the same command, or the file is named in one clear line."""
    case, rng = cases[name], random.Random(pattern)
    folder = shutil.copytree(done(name).folder, tmp_path / "folder")
    path = min(folder.glob(pattern))
    whole = path.read_bytes()
    for size in (0, rng.randrange(1, len(whole) - 1)):
        path.write_bytes(whole[:size])
        # A PNG that lacks no more than its last bytes has all its pixels.
        if not ended(case.start(folder, tmp_path / "log"), (0,) if heals else (0, 2), "" if heals else path.name):
            compare(case.result(folder), done(name).result, folder)
