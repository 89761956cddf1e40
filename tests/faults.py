"""Faults: processes killed at any moment, disks that are full or read-only, files cut short, two writers at a time.

    python tests/faults.py --kills 100

Real commands on tiny models: sampling, the conversion of a checkpoint, packing, evaluation and the making of
references. Each is run once undisturbed; then it is killed and started again, several times in one folder, until a last
run may end. Whatever lies there in between must be whole and right, and the end must equal the undisturbed run to the
last bit, with nothing missing, doubled or left over. A process is killed (SIGKILL) at a random time or at one of its
operations on files, chosen at random, or (SIGXFSZ) in the middle of writing a file.
"""

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import yaml
from forked import Forked
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from ddpm import checkpoint as ddpm_checkpoint
from ddpm import unet as ddpm_unet
from eval.metrics import extract
from ldm import checkpoint as ldm_checkpoint
from ldm import first_stage
from ldm import unet as ldm_unet

IMAGES = 10
_DDPM = {"resolution": 8, "in_channels": 3, "out_channels": 3, "ch": 32, "ch_mult": [1], "num_res_blocks": 1,
         "attn_resolutions": []}
_LDM = {"name": "tiny", "num_classes": 3,
        "unet": {"in_channels": 3, "out_channels": 3, "model_channels": 32, "channel_mult": [1], "num_res_blocks": 1,
                 "attention_resolutions": [], "num_heads": 1, "context_dim": 8},
        "first_stage": {"resolution": 8, "ch": 32, "ch_mult": [1], "num_res_blocks": 1, "z_channels": 3, "n_embed": 16},
        "sampler": {"steps": 2, "eta": 0.0, "guidance": 1.5, "branch": 0, "images": IMAGES}}


class Failure(Exception):
    """What was lost, doubled or different."""


class Case(NamedTuple):
    """A command on a folder.

    command: (module, arguments). result: what it must end with, by name. ranks: processes that share the work.
    """
    name: str
    command: Callable[[Path], tuple[str, list]]
    result: Callable[[Path], dict[str, bytes]]
    prepare: Callable[[Path], None] = lambda folder: None
    ranks: int = 1

    def start(self, folder: Path, log: Path, rank: int = 0, before: Callable[[], None] = lambda: None) -> Forked:
        module, args = self.command(folder)
        env = {} if self.ranks == 1 else {"RANK": str(rank), "WORLD_SIZE": str(self.ranks)}
        return Forked(module, *args, log=log, env=env, before=before)

    def finish(self, folder: Path, log: Path, code: int = 0) -> str:
        """Run to the end; returns the output."""
        processes = [self.start(folder, Path(f"{log}{rank}"), rank) for rank in range(self.ranks)]
        for process in processes:
            if process.wait() != code:
                raise Failure(f"{self.name} ended with {process.returncode}, not {code}: {process.output}")
        return "".join(process.output for process in processes)


def files(folder: Path, *patterns: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for pattern in patterns for path in folder.glob(pattern)}


class Models:
    """Tiny models with random weights, and the cases on them."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        save_file(ddpm_checkpoint.published_state_dict(ddpm_unet.UNet(**_DDPM)), folder / "ddpm.safetensors")
        (folder / "ddpm.yaml").write_text(yaml.safe_dump(
            {"name": "tiny", "unet": _DDPM, "diffusion": {"beta_schedule": "linear"},
             "checkpoint": str(folder / "ddpm.safetensors"), "sampler": {"steps": 2, "branch": 0, "images": IMAGES}}))
        model = ldm_checkpoint.Model(ldm_unet.UNet(**_LDM["unet"]), first_stage.build(**_LDM["first_stage"]),
                                     nn.Embedding(_LDM["num_classes"] + 1, 8))
        torch.save({"state_dict": ldm_checkpoint.published_state_dict(model)}, folder / "ldm.ckpt")
        (folder / "ldm.yaml").write_text(yaml.safe_dump(_LDM | {"checkpoint": "given"}))
        for name in ("samples", "reference"):
            seeds = f"0-{IMAGES - 1}" if name == "samples" else f"100-{100 + IMAGES - 1}"
            made = Forked("ddpm.sample", "--config", folder / "ddpm.yaml", "--seeds", seeds, "--threads", 1, "--out",
                          folder / name, log=folder / "log")
            if made.wait():
                raise Failure(made.output)

    def copied(self, *names: str) -> Callable[[Path], None]:
        def prepare(folder: Path) -> None:
            for name in names:
                source = self.folder / name
                (shutil.copytree if source.is_dir() else shutil.copy2)(source, folder / name)
        return prepare

    def cases(self) -> dict[str, Case]:
        """By name; the making of references only once there are weights for it (`add_inception`)."""
        seeds, config = f"0-{IMAGES - 1}", self.folder
        sampling = ["--seeds", seeds, "--batch-size", 1, "--threads", 1]

        def judged(folder: Path) -> dict[str, bytes]:
            path = folder / "result.json"
            if not path.exists():
                return {}
            result = json.loads(path.read_text())
            return {"metrics": json.dumps([result["metrics"], result["details"]["FD-EffLite0"]]).encode()}

        def made_reference(folder: Path) -> dict[str, bytes]:
            path = folder / "reference.npz"
            return {key: value.tobytes() for key, value in np.load(path).items() if key != "source"} \
                if path.exists() else {}

        found = [
            Case("sampling", lambda folder: ("ddpm.sample", ["--config", config / "ddpm.yaml", *sampling, "--out",
                                                             folder / "out"]),
                 lambda folder: files(folder, "out/*/*.png")),
            Case("two ranks", lambda folder: ("ddpm.sample", ["--config", config / "ddpm.yaml", *sampling, "--out",
                                                              folder / "out"]),
                 lambda folder: files(folder, "out/*/*.png"), ranks=2),
            Case("conversion and sampling",
                 lambda folder: ("ldm.sample", ["--config", config / "ldm.yaml", "--checkpoint", folder / "ldm.ckpt",
                                                *sampling, "--seeds", "0-3", "--out", folder / "out"]),
                 lambda folder: files(folder, "out/*/*.png", "ldm.safetensors"), self.copied("ldm.ckpt")),
            Case("packing", lambda folder: ("run.npz", ["--samples", config / "samples", "--seeds", seeds, "--out",
                                                             folder / "x.npz"]),
                 lambda folder: files(folder, "x.npz")),
            Case("evaluation",
                 lambda folder: ("eval.quality", ["--samples", folder / "samples", "--reference", folder / "reference",
                                                  "--repeats", 2, "--dims", 4, "--threads", 1, "--out",
                                                  folder / "result.json"]),
                 judged, self.copied("samples", "reference"))]
        if (inception := self.folder / "inception.pth").exists():
            found.append(Case("reference", lambda folder: (
                "eval.fid", ["make-reference", "--from", folder / "samples", "--inception", inception, "--threads", 1,
                             "--out", folder / "reference.npz"]),
                made_reference, self.copied("samples")))
        return {case.name: case for case in found}

    def add_inception(self) -> None:
        from torchvision.models import Inception3
        torch.save(Inception3(num_classes=1008, aux_logits=False, init_weights=False).state_dict(),
                   self.folder / "inception.pth")


# ---- kills

_FILE_EVENTS = {"open", "os.rename", "os.link", "os.remove", "os.mkdir"}


def at_operation(folder: Path, number: int) -> Callable[[], None]:
    """In a fork: die just before the file operation of that number below `folder`."""
    left = [number]

    def hook(event: str, args: tuple) -> None:
        if event in _FILE_EVENTS and isinstance(args[0], str | os.PathLike) and str(folder) in os.fspath(args[0]):
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


def killed(case: Case, folder: Path, log: Path, seconds: float, rng: random.Random) -> str | None:
    """Start the case (of several ranks: all, one of which is the victim) and kill it; how, or None where it was done.

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
    for other in others:
        if other.wait():
            raise Failure(f"{case.name}: the other rank failed: {other.output}")
    if code not in (0, -signal.SIGKILL, -signal.SIGXFSZ):
        raise Failure(f"{case.name}, to be killed at {how}, ended with {code}: {process.output}")
    return how if code else None


def compare(case: Case, folder: Path, expected: dict[str, bytes], at_the_end: bool) -> None:
    """Raises Failure where something there is not as expected, or, at the end, is missing or left over."""
    found = case.result(folder)
    wrong = [name for name, content in found.items() if expected.get(name) != content]
    lost = sorted(expected.keys() - found.keys())
    left = [str(path) for path in folder.rglob(".*.tmp*")] + [str(path) for path in folder.rglob("*.tmp")]
    if wrong or (at_the_end and (lost or left)):
        raise Failure(f"{case.name}: different {wrong}; lost {lost}; left over {left}")


def kill_often(case: Case, kills: int, work: Path, rng: random.Random, tick: Callable[[], None] = lambda: None
               ) -> Counter:
    """Kill a case so many times; how often in which way. Raises Failure."""
    log = work / f"log of {case.name}"
    plain = work / f"{case.name} undisturbed"
    plain.mkdir()
    case.prepare(plain)
    started = time.monotonic()
    case.finish(plain, log)
    seconds, expected, ways, run = time.monotonic() - started, case.result(plain), Counter(), 0
    while ways.total() < kills:
        folder = work / f"{case.name} {run}"
        folder.mkdir()
        case.prepare(folder)
        for _ in range(rng.randint(1, 6)):
            how = killed(case, folder, log, seconds, rng)
            compare(case, folder, expected, at_the_end=False)
            if how is None:
                break
            ways[how] += 1
            tick()
        case.finish(folder, log)
        compare(case, folder, expected, at_the_end=True)
        shutil.rmtree(folder)
        run += 1
    return ways


# ---- disks

@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A tmpfs of so many bytes. Raises PermissionError where none can be mounted."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True,
                             text=True)
    if mounted.returncode:
        raise PermissionError(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def said(case: Case, output: str, codes: tuple[int, ...], code: int, words: str = "") -> None:
    """Raises Failure unless a process ended with one of the codes and one clear line."""
    line = output.strip().splitlines()[-1] if output.strip() else ""
    if code not in codes or (code and (not line.startswith("error: ") or "Traceback" in output or words not in line)):
        raise Failure(f"{case.name} ended with {code}: {output}")


def full_disk(case: Case, work: Path) -> int:
    """Run a case with ever more room until it ends, in one folder; how often it did not fit."""
    log = work / "log of a full disk"
    plain = work / f"{case.name} with room"
    plain.mkdir()
    case.prepare(plain)
    case.finish(plain, log)
    needed = sum(path.stat().st_blocks * 512 for path in plain.rglob("*"))
    refused = 0
    with small_disk(work / f"{case.name} disk", 2 * needed + 2 ** 20) as disk:
        case.prepare(disk)
        room = 0
        while True:
            filler = disk / "filler"
            filler.write_bytes(b"")
            free = shutil.disk_usage(disk).free
            with open(filler, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, free - room))
            process = case.start(disk, log)
            code = process.wait()
            filler.unlink()
            if not code:
                break
            said(case, process.output, (1, 2), code)
            compare(case, disk, case.result(plain), at_the_end=False)
            refused += 1
            room += max(4096, needed // 8)
        compare(case, disk, case.result(plain), at_the_end=True)
    return refused


def read_only(case: Case, work: Path) -> None:
    """A case on a disk that cannot be written: one clear line, and nothing happened; later it goes on."""
    log = work / "log of a read-only disk"
    with small_disk(work / f"{case.name} read-only", 2 ** 27) as disk:
        case.prepare(disk)
        for mode in ("ro", "rw"):
            subprocess.run(["mount", "-o", f"remount,{mode}", disk], check=True)
            process = case.start(disk, log)
            code = process.wait()
            said(case, process.output, (1, 2) if mode == "ro" else (0,), code)


# ---- damaged files, two writers

def damaged(case: Case, pattern: str, heals: bool, work: Path, rng: random.Random, cuts: int = 3) -> None:
    """Cut a finished case's file short, run again: either all is as it was, or the file is named in one clear line."""
    log = work / "log of damage"
    folder = work / f"{case.name} {pattern.replace('/', ' ')} damaged"
    folder.mkdir()
    case.prepare(folder)
    case.finish(folder, log)
    expected = case.result(folder)
    path = min(folder.glob(pattern))
    whole = path.read_bytes()
    for size in [0, *(rng.randrange(1, len(whole) - 1) for _ in range(cuts))]:
        path.write_bytes(whole[:size])
        process = case.start(folder, log)
        code = process.wait()
        # A PNG that lacks no more than its last bytes has all its pixels.
        said(case, process.output, (0,) if heals else (0, 2), code, "" if heals else path.name)
        if not code:
            compare(case, folder, expected, at_the_end=True)
    path.write_bytes(whole)


def two_writers(case: Case, work: Path) -> None:
    """The same command twice at the same time: both end well, and no image is made twice."""
    folder = work / f"{case.name} twice"
    folder.mkdir()
    case.prepare(folder)
    both = [case.start(folder, work / f"log of writer {i}") for i in range(2)]
    for process in both:
        code = process.wait()
        said(case, process.output, (0,), code)
    made = [int(number) for process in both for number in re.findall(r"(\d+) made now", process.output)]
    images = len(list(folder.glob("out/*/*.png")))
    if made and sum(made) != images:
        raise Failure(f"{case.name}: {made} images made by two processes, where {images} were missing")
    alone = work / f"{case.name} once"
    alone.mkdir()
    case.prepare(alone)
    case.finish(alone, work / "log of one writer")
    compare(case, folder, case.result(alone), at_the_end=True)


DAMAGE = (("sampling", "out/000/000003.png", True), ("sampling", "out/sessions.jsonl", True),
          ("sampling", "out/run.json", False),
          ("conversion and sampling", "ldm.safetensors", False), ("conversion and sampling", "ldm.ckpt", False),
          ("conversion and sampling", "ldm.safetensors.sha256", True),
          ("conversion and sampling", "out/images.csv", True), ("evaluation", "samples/.features/*/*.npz", True),
          ("evaluation", "samples/000/000003.png", False), ("evaluation", "samples/run.json", False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what is chosen at random (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    extract.PART = 3
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        models = Models(work / "models")
        models.add_inception()
        cases = models.cases()
        with tqdm(total=args.kills, unit="kill") as bar:
            for i, case in enumerate(cases.values()):
                share = args.kills * (i + 1) // len(cases) - args.kills * i // len(cases)
                ways = kill_often(case, share, work, rng, bar.update)
                tqdm.write(f"{case.name}: killed {ways.total()} times ({dict(ways)}), equal in the end")
        for case, pattern, heals in DAMAGE:
            damaged(cases[case], pattern, heals, work, rng)
            print(f"{case}: {pattern} cut short: {'as before after another run' if heals else 'named in the error'}")
        for case in cases.values():
            if case.ranks == 1:
                two_writers(case, work)
                print(f"{case.name}: two at a time, nothing doubled")
                try:
                    print(f"{case.name}: disk full {full_disk(case, work)} times, equal in the end", flush=True)
                    read_only(case, work)
                    print(f"{case.name}: read-only disk, one clear line")
                except PermissionError as error:
                    print(f"{case.name}: full and read-only disks not tried: {error}")


if __name__ == "__main__":
    main()
