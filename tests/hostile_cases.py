"""Whatever a person may type or have on the disk that is wrong, as command lines; see test_hostile.py."""

import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

UNET = {"resolution": 8, "in_channels": 3, "out_channels": 3, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1,
        "attn_resolutions": []}
DEEP = "[" * 100_000


class Case(NamedTuple):
    """A command line in which something is wrong."""
    name: str
    words: list[str]                # {} is the folder of the case, {world} that of what all cases find
    says: str = ""                  # what its last line must hold
    make: Callable[[Path], object] = lambda folder: None        # what lies in the folder before
    codes: tuple[int, ...] = (2,)   # that are right
    env: dict[str, str] = {}        # noqa: RUF012  never changed


def case(name: str, line: str, *more: str, says: str = "", make: Callable[[Path], object] = lambda folder: None,
         codes: tuple[int, ...] = (2,), env: dict[str, str] | None = None) -> Case:
    """A case whose words are those of a line, with {model} and {samples} for options that many need, and more."""
    line = line.replace("{model}", "--config {world}/ddpm.yaml").replace("{samples}", "--samples {world}/samples")
    return Case(name, [*line.split(), *more], says, make, codes, env or {})


def written(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Make a file of a case."""
    def make(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return make


JSONS = {"empty": "", "a list": "[]", "an object": "{}", "null": "null", "text": '"x"', "cut": '{"a": ', "deep": DEEP,
         "NaN": "NaN", "no UTF-8": b"\xff\xfe{", "zeros": b"\0" * 64}
YAMLS = {"empty": "", "a list": "- a\n- b\n", "a number": "5", "cut": "{a: [", "deep": DEEP,
         "no UTF-8": b"\xff\xfea: 1",
         "tabs": "a:\n\t- b", "python": "a: !!python/object/apply:os.system [true]", "zeros": b"\0" * 64}
NUMBERS = ("0", "-1", "x", "", "1e308", "nan", "inf", "99999999999999999999", "0.5", "1_0", "٣")
SEEDS = ("", "x", "-1", "3-1", "1,1", "0-", "18446744073709551616", "0-999999999", "0-9999999999999999999", "1.5",
         "1e3", "٣", "0--5", ",", "9223372036854775808")


SAMPLE = "ddpm.sample {model} --seeds 0 --device cpu --out {}/o"
TABLE = "lab.study.papers table6 --samples {}/s --results {}/r"
STUDY = "lab.study {}/f.yaml --samples {}/s --results {}/r"
TEXT = "stable_diffusion.sample --config configs/sd_emoji.yaml --out {}/o"


def of_numbers() -> Iterator[Case]:
    """Numbers of the command line, in every sample option."""
    needed = {"center": "--interval 2 --schedule centered --power 1.2",
              "power": "--interval 2 --schedule centered --center 1", "branch": "--interval 2",
              "forecast": "--interval 2", "forecast-damping": "--interval 2 --forecast 1", "clock-from": "--clock 2"}
    for option, value in itertools.product(
            ("steps", "interval", "branch", "center", "power", "eta", "batch-size", "threads", "forecast",
             "forecast-damping", "clock", "clock-from"), NUMBERS):
        yield case(f"--{option} {value!r}", f"{SAMPLE} {needed.get(option, '')}", f"--{option}={value}",
                   codes=(0, 2) if value in ("0", "0.5", "1_0", "٣", "-1", "") else (2,))


WRONG = ("x", "", "nan", "inf", "-1", "1e308", "99999999999999999999")      # what no number of a command may be
FIT = "{model} --seeds 0-3 --held-out-seeds 4-7"
NUMBERED = (        # a command that would run, and its numbers
    (f"lab.plans search {FIT} --calls 3 --out {{}}/p.json", "attempts converged-steps jobs batch-size threads"),
    (f"lab.plans search {FIT} --out {{}}/p.json", "calls macs speedup"),
    (f"lab.fit scale-shift {FIT} --block-schedule {{}}/s.json --out {{}}/s.safetensors", "lr ridge batch-size"),
    ("lab.study ddpm_emoji_interval_branch --samples {}/s --results {}/r",
     "images batch-size threads share seeds jobs"),
    ("eval.throughput {model} --device cpu --repeats 1 --warmup 1",
     "repeats warmup branch interval forecast steps batch-size threads"),
    ("eval.throughput run {model} --device cpu --interval 2 --repeats 1", "repeats warmup batch-size threads"),
    ("scripts.machine --quick --device cpu --out {}/m", "threads"),
    ("eval.macs {model}", "steps interval branch"),
    ("eval.quality {samples} --reference {world}/real.npz --device cpu",
     "dims repeats count batch-size threads seeds"),
    ("eval.fidelity {samples} --against {world}/samples --device cpu", "batch-size threads"),
    ("eval.clip_score {samples} --prompts {world}/prompts.txt --weights {}/w.bin",
     "images-per-prompt batch-size threads"),
    ("scripts.slurm.submit table_emoji --dry-run --samples {}/s --results {}/r",
     "images-per-task time images batch-size"),
    (f"{TABLE} --dry-run", "images batch-size threads"),
    ("lab.fit block-schedule --changes {}/c.json --out {}/o.json", "delta macs speedup"),
    ("lab.train --config configs/ddpm_emoji.yaml --out {}/t", "threads"))


def of_other_numbers() -> Iterator[Case]:
    """The numbers of all commands but the sample commands."""
    for line, options in NUMBERED:
        for option, value in itertools.product(options.split(), WRONG):
            fine = option == "ridge" and value in WRONG[-2:]          # as much as there is
            yield case(f"{' '.join(line.split()[:2])} --{option} {value!r}", line, f"--{option}={value}",
                       codes=(0, 2) if fine else (2,))


def study(**arm: object) -> Callable[[Path], None]:
    return written("f.yaml", yaml.safe_dump({"model": "ddpm_emoji", "seeds": "0-89", "arms": [arm]}))


def of_size() -> Iterator[Case]:
    """More than a machine can hold, or than anybody waits for."""
    yield case("a batch that fits no memory", "eval.throughput {model} --device cpu --interval 2 --batch-size 99999999",
               says="out of memory", codes=(1,))
    many = {"schedule": "centered", "interval": list(range(2, 12)), "center": list(range(20, 40))}
    powers = [round(1.2 + 0.05 * i, 2) for i in range(11)]
    yield case("a study of 2,000 arms", f"{STUDY} --list", says="GB free", make=study(**many, power=powers[:10]),
               codes=(0,))
    yield case("a study of 2,200 arms", f"{STUDY} --list", says="more than 2,000 arms",
               make=study(**many, power=powers))
    yield case("a study of many steps", f"{STUDY} --list", says="too many to plan", make=study(
        steps=list(range(900, 1001)), timesteps="uniform", interval=list(range(1, 11))))


def of_damaged_work() -> Iterator[Case]:
    """What studies and searches keep, damaged or of another run, and the files that they read."""
    whole = {"model": "ddpm_emoji", "seeds": "0-5", "chosen_on": 3, "against": {"steps": 4}, "measure": ["near"],
             "arms": [{"steps": 2, "sampler": "unipc"}]}
    for name, content in JSONS.items():
        for what, path in (("record", "s/ddpm_emoji/unipc_steps2_0-5_near.json"),
                           ("file of records", "r/f/records.jsonl")):
            yield case(f"study, {what} {name}", f"{STUDY} --render", make=lambda folder, path=path, content=content: (
                written("f.yaml", yaml.safe_dump(whole))(folder), written(path, content)(folder)))
        yield case(f"Stable Diffusion's index, JSON {name}", f"{TEXT} --checkpoint {{}}/m --prompt cat --seeds 0",
                   make=written("m/model_index.json", content))


def of_seeds() -> Iterator[Case]:
    for value in SEEDS:
        yield case(f"sample --seeds {value!r}", SAMPLE, f"--seeds={value}")
        yield case(f"npz --seeds {value!r}", "run.npz {samples} --out {}/o.npz", f"--seeds={value}")
        yield case(f"fidelity --seeds {value!r}", "eval.fidelity {samples} --against {world}/samples --out {}/o.json",
                   f"--seeds={value}", codes=(0, 2) if value == "" else (2,))
    for value in ("0-99999999", "x", "1000", "-1", ""):
        yield case(f"--labels {value!r}", "ldm.sample --config configs/ldm_emoji.yaml --seeds 0 --out {}/o",
                   f"--labels={value}")
    for name, value in itertools.product(("RANK", "WORLD_SIZE"), ("", "x", "-1", "1.5", "99999999999")):
        yield case(f"{name}={value!r}", SAMPLE, env={name: value})
    yield case("WORLD_SIZE=0", SAMPLE, says="WORLD_SIZE", env={"WORLD_SIZE": "0"})


def of_files() -> Iterator[Case]:
    """Files that people edit: of every kind, for every command that reads it."""
    for name, content in YAMLS.items():
        for line in ("ddpm.sample --config {}/f.yaml --seeds 0 --out {}/o", "eval.macs --config {}/f.yaml",
                     "eval.throughput --config {}/f.yaml", f"{STUDY} --list", f"{TABLE} --config {{}}/f.yaml --dry-run",
                     "scripts.download x --catalogue {}/f.yaml --into {}"):
            yield case(f"{line.split()[0]}, YAML {name}", line, make=written("f.yaml", content))
    for name, content in JSONS.items():
        for what, line in (("plan", f"{SAMPLE} --plan"), ("adaptive rule", f"{SAMPLE} --adaptive"),
                           ("block schedule", f"{SAMPLE} --block-schedule"),
                           ("changes", "lab.fit block-schedule --out {}/o.json --changes")):
            yield case(f"{what}, JSON {name}", line, "{}/f.json", make=written("f.json", content))
        yield case(f"result, JSON {name}", "eval.table 6 --results {}", make=written("f.json", content))
        yield case(f"run.json {name}", SAMPLE, says="run.json", make=written("o/run.json", content))
        yield case(f"run.json {name}, packed", "run.npz --samples {}/o --seeds 0 --out {}/o.npz",
                   make=written("o/run.json", content))
    for name, settings in (("null", None), ("a list", []), ("text", "x")):
        yield case(f"settings {name}", SAMPLE, says="settings",
                   make=written("o/run.json", json.dumps({"format": 1, "settings": settings})))
    for name, content in {"no UTF-8": b"a\xff\n", "empty": b"", "a blank line": b"a\n\nb\n"}.items():
        yield case(f"prompts {name}", f"{TEXT} --prompts {{}}/p.txt", make=written("p.txt", content))
    for name, content in {"half a pair": '["\\ud800"]', "deep": DEEP, "numbers": "[1]",
                          "no captions": '{"images": 1}', "odd captions": '{"images": [1], "annotations": 5}'}.items():
        yield case(f"prompts, JSON {name}", f"{TEXT} --prompts {{}}/p.json", make=written("p.json", content))


def of_paths() -> Iterator[Case]:
    """Places that are not there, or are something else."""
    yield case("--out a file", SAMPLE, "--out", "{}/f", make=written("f", "x"))
    yield case("--out below a file", SAMPLE, "--out", "{}/f/o", make=written("f", "x"), codes=(1, 2))
    for line in ("eval.macs", "ddpm.sample --seeds 0 --out {}/o", "eval.throughput", "lab.fit changes --out {}/o.json",
                 "lab.plans search --out {}/o.json --seeds 0 --held-out-seeds 1"):
        for name, path in (("missing", "{}/no.yaml"), ("a folder", "{}"), ("a device", "/dev/null"),
                           ("empty name", "")):
            yield case(f"{line.split()[0]}, config {name}", line, "--config", path)
    for name, path in (("missing", "{}/no.yaml"), ("a folder", "{}"), ("a device", "/dev/null"), ("empty name", "")):
        yield case(f"study {name}", "lab.study --samples {}/s --results {}/r", path, says="no study")
    for line in ("run.npz {samples} --seeds 0-3", "eval.quality {samples} --reference {world}/real.npz --dims 2 "
                 "--repeats 2 --threads 1"):
        yield case(f"{line.split()[0]} --out a pipe", f"{line} --out {{}}/pipe", says="not a regular file",
                   make=lambda folder: os.mkfifo(folder / "pipe"))
    for table in ("", "0", "table99", "../x"):
        yield case(f"table {table!r}", "eval.table --results {world}/results", table)
        yield case(f"plan {table!r}", "lab.study.papers", table, "--dry-run")
    for words in ("--only nobody", "--reference {}/no", "--inception {}/no", "--device abacus", "--checkpoint {}/no",
                  "--config {}/no"):
        yield case(f"table6 {words}", f"{TABLE} {words}")


def all_cases() -> list[Case]:
    """Every case, no name twice."""
    found = [*of_numbers(), *of_other_numbers(), *of_size(), *of_damaged_work(), *of_seeds(), *of_files(), *of_paths()]
    assert len({case.name for case in found}) == len(found)
    return found
