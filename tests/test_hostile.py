"""Hostile use: whatever a person may type or have on the disk ends in 0, 1 or 2 with one clear line.

    pytest tests/test_hostile.py            one of twenty cases; all with --slow

A case is one command with one thing wrong. It must end by itself within 10 seconds of computing and 2 GB, in one line
on the screen (argparse adds how the command is used), without a traceback; nothing half-written is left, and no file
that was there before is touched. Commands run in forks of this process, which has imported what they need.
"""

import hashlib
import io
import itertools
import json
import os
import resource
import shutil
import signal
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from conftest import run_command, tiny_ddpm
from forked import Forked
from PIL import Image
from safetensors.torch import load_file, save_file

from ddpm import sample as ddpm_sample
from run import results
from run.results import Metric, Result

UNET = {"resolution": 8, "in_channels": 3, "out_channels": 3, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1,
        "attn_resolutions": []}
DEEP = "[" * 100_000
SECONDS, MEMORY = 10, 2 << 30


class Case(NamedTuple):
    """words: of the command, with {} for the folder of the case. make: what lies there before. codes: that are right.
    says: what its last line must hold. env: of the process."""
    name: str
    module: str
    words: tuple[str, ...]
    says: str = ""
    make: Callable[[Path], object] = lambda folder: None
    codes: tuple[int, ...] = (2,)
    env: dict[str, str] = {}        # noqa: RUF012  never changed


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
    words = [word.replace("{}", str(folder)).replace("{world}", str(world.folder)) for word in case.words]
    process = Forked(case.module, *words, log=work / "log", env=dict(case.env), before=limited)
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


# ---- what there is to do wrong

def written(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Make a file of a case."""
    def make(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return make


def png(width: int, height: int) -> bytes:
    """A PNG that claims a size, without its pixels."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


JSONS = {"empty": "", "a list": "[]", "an object": "{}", "null": "null", "text": '"x"', "cut": '{"a": ', "deep": DEEP,
         "NaN": "NaN", "no UTF-8": b"\xff\xfe{", "zeros": b"\0" * 64}
YAMLS = {"empty": "", "a list": "- a\n- b\n", "a number": "5", "cut": "{a: [", "deep": DEEP,
         "no UTF-8": b"\xff\xfea: 1",
         "tabs": "a:\n\t- b", "python": "a: !!python/object/apply:os.system [true]", "zeros": b"\0" * 64}
NUMBERS = ("0", "-1", "x", "", "1e308", "nan", "inf", "99999999999999999999", "0.5", "1_0", "٣")
SEEDS = ("", "x", "-1", "3-1", "1,1", "0-", "18446744073709551616", "0-999999999", "0-9999999999999999999", "1.5",
         "1e3", "٣", "0--5", ",", "9223372036854775808")


def of_numbers() -> Iterator[Case]:
    """Numbers of the command line, in every sample option and in commands that have their own."""
    options = ("--steps", "--interval", "--branch", "--center", "--power", "--eta", "--batch-size", "--threads",
               "--forecast", "--forecast-damping", "--clock", "--clock-from")
    fine = {("--batch-size", "1_0"), ("--batch-size", "٣"), ("--threads", "1_0"), ("--threads", "٣")}
    for option, value in itertools.product(options, NUMBERS):
        extra = {"--center": ("--interval", "2", "--schedule", "centered", "--power", "1.2"),
                 "--power": ("--interval", "2", "--schedule", "centered", "--center", "1"),
                 "--branch": ("--interval", "2"), "--forecast": ("--interval", "2"),
                 "--forecast-damping": ("--interval", "2", "--forecast", "1"),
                 "--clock-from": ("--clock", "2")}.get(option, ())
        right = (0, 2) if (option, value) in fine or value in ("0", "0.5", "1_0", "٣", "-1", "") else (2,)
        yield Case(f"{option} {value!r}", "ddpm.sample", ("--config", "{world}/ddpm.yaml", *extra, f"{option}={value}",
                                                          "--seeds", "0", "--device", "cpu", "--out", "{}/o"),
                   codes=right)
    for option, value in itertools.product(("--images", "--batch-size", "--threads"),
                                           ("0", "-1", "x", "9" * 20, "1e3")):
        yield Case(f"tables {option} {value}", "scripts.plan",
                   ("table6", "--dry-run", f"{option}={value}", "--samples", "{}/s", "--results", "{}/r"))
    for option, value in itertools.product(("--delta", "--macs", "--speedup"), ("nan", "inf", "x", "-1", "1e400")):
        yield Case(f"schedule {option} {value}", "lab.fit",
                   ("block-schedule", "--changes", "{}/c.json", f"{option}={value}", "--out", "{}/o.json"))
    for value in ("10000000000", "-5", "x"):
        yield Case(f"slurm --images {value}", "scripts.slurm.submit",
                   ("table6_shallow_net", f"--images={value}", "--dry-run", "--samples", "{}/s", "--results", "{}/r"),
                   codes=(1, 2))


WRONG = ("x", "", "nan", "inf", "-1", "1e308", "99999999999999999999")      # what no number of a command may be
ON_CPU = ("--device", "cpu")
MODEL = ("--config", "{world}/ddpm.yaml")
FITTING = ("--seeds", "0-3", "--held-out-seeds", "4-7")

# A command that would run, and its numbers.
NUMBERED = (
    ("lab.plans", ("search", *MODEL, *FITTING, "--calls", "3", "--out", "{}/p.json"),
     "attempts converged-steps jobs batch-size threads"),
    ("lab.plans", ("search", *MODEL, *FITTING, "--out", "{}/p.json"), "calls macs speedup"),
    ("lab.fit", ("scale-shift", *MODEL, *FITTING, "--block-schedule", "{}/s.json", "--out", "{}/s.safetensors"),
     "lr ridge batch-size"),
    ("scripts.convergence", ("--config", "configs/studies/bf16_ldm.yaml", "--results", "{}/r", "--work", "{}/w"),
     "batch-size threads"),
    ("scripts.sweep", ("--config", "configs/sweeps/ddpm_emoji_interval_branch.yaml", "--samples", "{}/s", "--results",
                       "{}/r"),
     "images batch-size threads share"),
    ("eval.throughput", (*MODEL, *ON_CPU, "--repeats", "1", "--warmup", "1"),
     "repeats warmup branch interval forecast steps batch-size threads"),
    ("eval.throughput", ("run", *MODEL, *ON_CPU, "--interval", "2", "--repeats", "1"),
     "repeats warmup batch-size threads"),
    ("eval.throughput", ("compare", "--model", "ddpm_emoji", *ON_CPU, "--out", "{}/c"),
     "repeats warmup batch-size threads"),
    ("eval.macs", MODEL, "steps interval branch"),
    ("eval.quality", ("--samples", "{world}/samples", "--reference", "{world}/real.npz", *ON_CPU),
     "dims repeats count batch-size threads seeds"),
    ("eval.fidelity", ("--samples", "{world}/samples", "--against", "{world}/samples", *ON_CPU),
     "within worst batch-size threads"),
    ("eval.clip_score", ("--samples", "{world}/samples", "--prompts", "{world}/prompts.txt", "--weights", "{}/w.bin"),
     "images-per-prompt batch-size threads"),
    ("scripts.slurm.submit", ("table_emoji", "--dry-run", "--samples", "{}/s", "--results", "{}/r"),
     "images-per-task images-per-hour time batch-size"),
    ("ddpm.train", ("--out", "{}/t"), "threads"), ("ldm.train_first_stage", ("--out", "{}/t"), "threads"))


def of_other_numbers() -> Iterator[Case]:
    """The numbers of all commands but the sample commands."""
    for module, words, options in NUMBERED:
        verb = words[0] if words[0] in ("run", "compare", "scale-shift", "search") else ""
        for option, value in itertools.product(options.split(), WRONG):
            fine = option in ("ridge", "images-per-hour") and value in WRONG[-2:]          # as much as there is
            yield Case(f"{module} {verb} --{option} {value!r}", module, (*words, f"--{option}={value}"),
                       codes=(0, 2) if fine else (2,))


def of_size() -> Iterator[Case]:
    """More than a machine can hold, or than anybody waits for."""
    yield Case("a batch that fits no memory", "eval.throughput", (*MODEL, *ON_CPU, "--batch-size", "99999999"),
               "out of memory", codes=(1,))

    def sweep(values: int) -> Callable[[Path], None]:
        grid = {"model": "configs/ddpm_emoji.yaml", "schedule": "centered", "interval": list(range(2, 12)),
                "center": list(range(20, 40)), "power": [round(1.2 + 0.05 * i, 2) for i in range(values)]}
        return written("f.yaml", yaml.safe_dump({"images": 90, "grids": [grid]}))

    yield Case("a sweep of 2,000 points", "scripts.sweep", ("--config", "{}/f.yaml", "--list", "--samples", "{}/s"),
               "FD", make=sweep(10), codes=(0,))
    yield Case("a sweep of 2,200 points", "scripts.sweep", ("--config", "{}/f.yaml", "--list", "--samples", "{}/s"),
               "at most 2,000", make=sweep(11))
    yield Case("a sweep of many steps", "scripts.sweep", ("--config", "{}/f.yaml", "--list", "--samples", "{}/s"),
               "too many to plan", make=written("f.yaml", yaml.safe_dump({"images": 90, "grids": [
                   {"model": "configs/ddpm_emoji.yaml", "steps": list(range(900, 1001)), "timesteps": "uniform",
                    "interval": list(range(1, 11))}]})))


def of_damaged_work() -> Iterator[Case]:
    """What studies and searches keep, damaged or of another run, and the files that they read."""
    study = {"model": "ddpm_emoji", "seeds": "0-5", "chosen_on": 3, "converged": {"steps": 4},
             "grids": [{"steps": 2, "sampler": "unipc"}]}
    for key, value in (("seeds", "x"), ("chosen_on", 0), ("chosen_on", "x"), ("twice", -1), ("twice", "many"),
                       ("converged", {"steps": "x"}), ("converged", {"stepz": 5}), ("converged", [1]), ("grids", 5),
                       ("grids", []), ("grids", [5]), ("common", {"steps": [1]}), ("common", {"eta": "x"}),
                       ("model", 5), ("model", "../x"), ("surprise", 1)):
        yield Case(f"study with {key} {value}", "scripts.convergence",
                   ("--config", "{}/f.yaml", "--list", "--results", "{}/r"),
                   make=written("f.yaml", yaml.safe_dump(study | {key: value})))
    for name, content in JSONS.items():
        yield Case(f"study, result {name}", "scripts.convergence",
                   ("--config", "{}/f.yaml", "--render", "--results", "{}/r"), make=lambda folder, content=content: (
                       written("f.yaml", yaml.safe_dump(study))(folder),
                       written("r/convergence/f/unipc_steps2.json", content)(folder)))
        yield Case(f"Stable Diffusion's index, JSON {name}", "stable_diffusion.sample",
                   ("--config", "configs/sd_emoji.yaml", "--checkpoint", "{}/m", "--prompt", "cat face", "--seeds", "0",
                    "--out", "{}/o"), make=written("m/model_index.json", content))


def of_seeds() -> Iterator[Case]:
    for value in SEEDS:
        yield Case(f"sample --seeds {value!r}", "ddpm.sample",
                   ("--config", "{world}/ddpm.yaml", f"--seeds={value}", "--device", "cpu", "--out", "{}/o"))
        yield Case(f"npz --seeds {value!r}", "run.npz",
                   ("--samples", "{world}/samples", f"--seeds={value}", "--out", "{}/o.npz"))
        yield Case(f"fidelity --seeds {value!r}", "eval.fidelity",
                   ("--samples", "{world}/samples", "--against", "{world}/samples", f"--seeds={value}", "--out",
                    "{}/o.json"), codes=(0, 2) if value == "" else (2,))
    for value in ("0-99999999", "x", "1000", "-1", ""):
        yield Case(f"--labels {value!r}", "ldm.sample",
                   ("--config", "configs/ldm_emoji.yaml", f"--labels={value}", "--seeds", "0", "--out", "{}/o"))
    for name, value in itertools.product(("RANK", "WORLD_SIZE"), ("", "x", "-1", "1.5", "99999999999")):
        yield Case(f"{name}={value!r}", "ddpm.sample",
                   ("--config", "{world}/ddpm.yaml", "--seeds", "0", "--device", "cpu", "--out", "{}/o"),
                   env={name: value})
    yield Case("WORLD_SIZE=0", "eval.quality", ("--samples", "{world}/samples", "--reference", "{world}/real.npz"),
               "WORLD_SIZE", env={"WORLD_SIZE": "0"})


def of_files() -> Iterator[Case]:
    """Files that people edit: of every kind, for every command that reads it."""
    for name, content in YAMLS.items():
        for module, words in (("ddpm.sample", ("--config", "{}/f.yaml", "--seeds", "0", "--out", "{}/o")),
                              ("eval.macs", ("--config", "{}/f.yaml")),
                              ("eval.throughput", ("--config", "{}/f.yaml")),
                              ("scripts.sweep", ("--config", "{}/f.yaml", "--list")),
                              ("scripts.convergence", ("--config", "{}/f.yaml", "--list")),
                              ("scripts.systems", ("--config", "{}/f.yaml", "--list")),
                              ("scripts.plan", ("table6", "--config", "{}/f.yaml", "--dry-run")),
                              ("scripts.download", ("x", "--catalogue", "{}/f.yaml", "--into", "{}"))):
            yield Case(f"{module}, YAML {name}", module, words, make=written("f.yaml", content))
    sampling = ("--config", "{world}/ddpm.yaml", "--seeds", "0", "--device", "cpu", "--out", "{}/o")
    for name, content in JSONS.items():
        for what, module, words in (
                ("plan", "ddpm.sample", (*sampling, "--plan", "{}/f.json")),
                ("adaptive rule", "ddpm.sample", (*sampling, "--adaptive", "{}/f.json")),
                ("block schedule", "ddpm.sample", (*sampling, "--block-schedule", "{}/f.json")),
                ("changes", "lab.fit", ("block-schedule", "--changes", "{}/f.json", "--out", "{}/o.json")),
                ("schedule to show", "lab.fit", ("show", "{}/f.json")),
                ("result", "eval.table", ("6", "--results", "{}"))):
            yield Case(f"{what}, JSON {name}", module, words, make=written("f.json", content))
        yield Case(f"run.json {name}", "ddpm.sample", sampling, "run.json", make=written("o/run.json", content))
        yield Case(f"run.json {name}, packed", "run.npz", ("--samples", "{}/o", "--seeds", "0", "--out", "{}/o.npz"),
                   make=written("o/run.json", content))
    for name, settings in (("null", None), ("a list", []), ("text", "x")):
        yield Case(f"settings {name}", "ddpm.sample", sampling, "settings",
                   make=written("o/run.json", json.dumps({"format": 1, "settings": settings})))
    for name, content in {"no UTF-8": b"a\xff\n", "empty": b"", "a blank line": b"a\n\nb\n"}.items():
        yield Case(f"prompts {name}", "stable_diffusion.sample",
                   ("--config", "configs/sd_emoji.yaml", "--prompts", "{}/p.txt", "--out", "{}/o"),
                   make=written("p.txt", content))
    for name, content in {"half a pair": '["\\ud800"]', "deep": DEEP, "numbers": "[1]", "no captions": '{"images": 1}',
                          "odd captions": '{"images": [1], "annotations": 5}'}.items():
        yield Case(f"prompts, JSON {name}", "stable_diffusion.sample",
                   ("--config", "configs/sd_emoji.yaml", "--prompts", "{}/p.json", "--out", "{}/o"),
                   make=written("p.json", content))


def of_configs() -> Iterator[Case]:
    """A config with one value that cannot be."""
    for key, value in (("ch", -32), ("ch", 0), ("ch", "x"), ("ch_mult", []), ("ch_mult", [0]), ("ch_mult", -1),
                       ("resolution", 0), ("resolution", -8), ("in_channels", 0), ("num_res_blocks", -1),
                       ("num_res_blocks", 0.5), ("attn_resolutions", 5), ("surprise", 1)):
        def make(folder: Path, key: str = key, value: object = value) -> None:
            content = {"name": "ddpm_x", "unet": UNET | {key: value}, "diffusion": {"beta_schedule": "linear"},
                       "checkpoint": "none.safetensors", "sampler": {"steps": 4, "branch": 0, "images": 4}}
            (folder / "f.yaml").write_text(yaml.safe_dump(content))
        yield Case(f"unet.{key}: {value}", "ddpm.sample", ("--config", "{}/f.yaml", "--seeds", "0", "--out", "{}/o"),
                   make=make)
    for grid in ({"interval": 10 ** 9}, {"steps": 10 ** 9}, {"branch": -1}, {"interval": [[1]]}, {"power": 1e308},
                 {"schedule": "centered", "interval": 2, "center": 1, "power": 1e308}, {"model": 5}, {"steps": True}):
        def sweep(folder: Path, grid: dict = grid) -> None:
            one = {"model": "configs/ddpm_emoji.yaml"} | grid
            (folder / "f.yaml").write_text(yaml.safe_dump({"images": 90, "grids": [one]}))
        yield Case(f"sweep {grid}", "scripts.sweep", ("--config", "{}/f.yaml", "--list", "--samples", "{}/s"),
                   make=sweep)


def of_weights(world: World) -> Iterator[Case]:
    """Checkpoints that hold something else."""
    def changed(change: Callable[[dict], object], name: str = "w.pt") -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            tensors = load_file(world.folder / "tiny.safetensors")
            change(tensors)
            save_file(tensors, folder / name) if name.endswith(".safetensors") else torch.save(tensors, folder / name)
        return make

    first = next(iter(load_file(world.folder / "tiny.safetensors")))
    changes: dict[str, Callable[[dict], object]] = {
        "int": lambda t: t.update({first: t[first].int()}), "bool": lambda t: t.update({first: t[first] > 0}),
        "complex": lambda t: t.update({first: t[first].cfloat()}),
        "meta": lambda t: t.update({first: t[first].to("meta")}),
        "sparse": lambda t: t.update({first: t[first].to_sparse()}), "a number": lambda t: t.update({first: 5}),
        "int keys": lambda t: t.update({5: t[first]}), "missing": lambda t: t.pop(first), "empty": lambda t: t.clear(),
        "quantised": lambda t: t.update({first: torch.quantize_per_tensor(t[first], 0.1, 0, torch.qint8)}),
        "another shape": lambda t: t.update({first: t[first][:1]})}
    files = {name: changed(change) for name, change in changes.items()}
    files |= {"empty file": written("w.pt", b""), "text": written("w.pt", "no weights"),
              "zip": written("w.pt", b"PK\3\4"),
              "a folder": lambda folder: (folder / "w.pt").mkdir(), "a pipe": lambda folder: os.mkfifo(folder / "w.pt"),
              "nothing": lambda folder: None}
    for name, make in files.items():
        yield Case(f"weights: {name}", "ddpm.sample",
                   ("--config", "{world}/ddpm.yaml", "--checkpoint", "{}/w.pt", "--seeds", "0", "--device", "cpu",
                    "--out", "{}/o"), make=make)
    inception = {"fc a number": lambda folder: torch.save({"fc.weight": 5}, folder / "i.pth"),
                 "fc flat": lambda folder: torch.save({"fc.weight": torch.tensor(5.0)}, folder / "i.pth"),
                 "a list": lambda folder: torch.save([1], folder / "i.pth"), "empty": written("i.pth", b""),
                 "fc alone": lambda folder: torch.save({"fc.weight": torch.zeros(1008, 2048)}, folder / "i.pth")}
    for name, make in inception.items():
        yield Case(f"Inception: {name}", "eval.fid",
                   ("make-reference", "--from", "{world}/real.npz", "--inception", "{}/i.pth", "--out", "{}/o.npz"),
                   make=make)


def of_images() -> Iterator[Case]:
    """Images that are none, and others than are asked for."""
    def folder_with(name: str, content: bytes | None) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            (folder / "s").mkdir()
            for i in range(3):
                Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / "s" / f"{i}.png")
            path = folder / "s" / name
            path.unlink(missing_ok=True)
            path.write_bytes(content) if content is not None else os.mkfifo(path)
        return make

    def encoded(mode: str, form: str = "PNG", size: tuple[int, int] = (8, 8)) -> bytes:
        with io.BytesIO() as buffer:
            Image.new(mode, size).save(buffer, format=form)
            return buffer.getvalue()

    odd = {"claims 60000 pixels": png(60_000, 60_000), "claims 0": png(0, 0), "claims 9000": png(9_000, 9_000),
           "no pixels": png(8, 8), "empty": b"", "text": b"x", "a pipe": None, "grey": encoded("L"),
           "palette": encoded("P"), "16 bits": encoded("I;16"), "another size": encoded("RGB", size=(9, 9)),
           "a GIF": encoded("RGB", "GIF", (9, 9))}
    for name, content in odd.items():
        for module, words in (("eval.fidelity", ("--against", "{}/s")), ("eval.quality", ("--reference", "{}/s"))):
            yield Case(f"{module}, image {name}", module, ("--samples", "{}/s", *words, "--threads", "1"),
                       make=folder_with("1.png", content))
    for name, content in {"empty": b"", "text": b"x", "cut": b"PK\3\4", "a pickle": b"\x80\x04N."}.items():
        for module in ("eval.fidelity", "eval.quality"):
            option = "--against" if module == "eval.fidelity" else "--reference"
            yield Case(f"{module}, npz {name}", module, ("--samples", "{}/x.npz", option, "{world}/real.npz"),
                       make=written("x.npz", content))
    yield Case("a stray copy", "ddpm.sample",
               ("--config", "{world}/ddpm.yaml", "--seeds", "0-1", "--device", "cpu", "--threads", "1", "--out",
                "{}/o"),
               make=written("o/note.txt", "x"), codes=(0,))


def of_paths() -> Iterator[Case]:
    """Places that are not there, or are something else."""
    sampling = ("--config", "{world}/ddpm.yaml", "--seeds", "0", "--device", "cpu", "--threads", "1")
    yield Case("--out a file", "ddpm.sample", (*sampling, "--out", "{}/f"), make=written("f", "x"))
    yield Case("--out below a file", "ddpm.sample", (*sampling, "--out", "{}/f/o"), make=written("f", "x"),
               codes=(1, 2))
    for module, words in (("eval.macs", ()), ("ddpm.sample", ("--seeds", "0", "--out", "{}/o")),
                          ("eval.throughput", ()), ("scripts.sweep", ("--list",)), ("scripts.convergence", ("--list",)),
                          ("lab.fit", ("--out", "{}/o.json")),
                          ("lab.plans", ("--out", "{}/o.json", "--seeds", "0", "--held-out-seeds", "1"))):
        verb = {"lab.fit": ("changes",), "lab.plans": ("search",)}.get(module, ())
        for name, path in (("missing", "{}/no.yaml"), ("a folder", "{}"), ("a device", "/dev/null"),
                           ("empty name", "")):
            yield Case(f"{module}, config {name}", module, (*verb, "--config", path, *words))
    for module, words in (("run.npz", ("--samples", "{world}/samples", "--seeds", "0-3", "--out", "{}/pipe")),
                          ("eval.quality", ("--samples", "{world}/samples", "--reference", "{world}/real.npz", "--dims",
                                            "2", "--repeats", "2", "--threads", "1", "--out", "{}/pipe"))):
        yield Case(f"{module} --out a pipe", module, words, "no regular file",
                   lambda folder: os.mkfifo(folder / "pipe"))
    for table in ("", "0", "table99", "../x", "table1\0"):
        if "\0" not in table:
            yield Case(f"table {table!r}", "eval.table", (table, "--results", "{world}/results"))
            yield Case(f"plan {table!r}", "scripts.plan", (table, "--dry-run"))
    for words in (("--only", "nobody"), ("--reference", "{}/no"), ("--inception", "{}/no"), ("--device", "abacus"),
                  ("--checkpoint", "{}/no"), ("--config", "{}/no")):
        yield Case(f"table6 {words[0]}", "scripts.plan", ("table6", *words, "--samples", "{}/s", "--results", "{}/r"))


def all_cases(world: World) -> list[Case]:
    """Every case, no name twice."""
    found = [*of_numbers(), *of_other_numbers(), *of_size(), *of_damaged_work(), *of_seeds(), *of_files(),
             *of_configs(), *of_weights(world), *of_images(), *of_paths()]
    assert len({case.name for case in found}) == len(found)
    return found


# ---- tests

SHARE = 20      # one case of so many, other ones of each kind


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("hostile") / "world")


def test_a_share_of_the_cases(world, tmp_path):
    cases = all_cases(world)
    assert len(cases) >= 300
    faults = [fault for case in cases[::SHARE] for fault in faults_of(case, world, tmp_path)]
    assert not faults, "\n".join(faults)


@pytest.mark.slow
def test_every_case(world, tmp_path):
    faults = [fault for case in all_cases(world) for fault in faults_of(case, world, tmp_path)]
    assert not faults, "\n".join(faults)
