"""What this machine has and what is missing: packages, weights, references, prompts, and the needs of each table.
The first line says what works right now, and the next step.

    python -m scripts.doctor                  every table
    python -m scripts.doctor table3 table12   only these tables
"""

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from eval.tables.arms import Arm, runs_of
from eval.tables.paper import find, tables
from eval.tables.study import Study
from eval.tables.text import align
from run.cli import command
from run.families import families
from run.files import ROOT
from run.provenance import device_name
from scripts.download import Item, catalogue
from scripts.requirements_met import unmet
from unet_caching.options import option

# The small models of a clone: name and weights.
SHIPPED = {"DDPM": "checkpoints/ddpm_emoji.safetensors", "LDM": "checkpoints/ldm_emoji.safetensors",
           "Stable Diffusion": "checkpoints/sd_emoji/unet/diffusion_pytorch_model.safetensors"}
# References that are made from downloaded images: model -> (name of the download, place of the images).
MADE_FROM = {"ddpm_cifar10": ("cifar10_images", "data/cifar10/cifar-10-batches-py"),
             "ddpm_bedroom": ("bedroom_images", "data/lsun/bedroom_train_lmdb --count 50000"),
             "ddpm_church": ("church_images", "data/lsun/church_outdoor_train_lmdb --count 50000"),
             "sd_v15": ("coco_images", "data/coco/val2017 --size 512")}


def machine() -> Iterator[str]:
    """Processor, accelerators, memory, disk."""
    yield f"CPU: {device_name('cpu')}, {os.cpu_count()} cores"
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        yield f"GPU {i}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.device_count():
        yield "GPU: none that this PyTorch sees; the tables with published weights take weeks on a CPU"
    usage = shutil.disk_usage(ROOT)
    yield f"disk: {usage.free / 1e9:.0f} of {usage.total / 1e9:.0f} GB free"


def state(item: Item) -> str:
    """Here or missing. Only `scripts.download` compares files with their published digests."""
    here = sum(file.there(ROOT) for file in item.files)
    if here < len(item.files):
        return f"missing, {here} of {len(item.files)} files here" if here else "missing"
    return "here"


def references() -> dict[str, Path]:
    """The default path of the reference of each published model."""
    return {model: path for family in families().values() for model, path in family.references.items()}


def named(path: Path, items: dict[str, Item]) -> str:
    """The command that brings the file of a path."""
    for name, item in items.items():
        if any(path == one or path in one.parents for file in item.files for one in file.results):
            return f"bash scripts/download.sh {name}"
    for model, (images, where) in MADE_FROM.items():
        if path == references()[model]:
            fetch = f"bash scripts/download.sh {images} && "
            return (f"{fetch}python -m eval.fid make-reference --from {where} --out {path} --inception "
                    "checkpoints/inception/weights-inception-2015-12-05-6726825d.pth")
    return "no download is known"


def arms_of(table: Study) -> list[Arm]:
    """The arms of a table with default options."""
    return [] if table.schedules else runs_of(table).arms


def needs(table: Study, items: dict[str, Item]) -> Iterator[str]:
    """The missing files of a table, each with the command that brings it: first for sampling, then for judging."""
    lines = {f"to sample: {option} {path}: {named(path, items)}": path for arm in arms_of(table)
             for option, path in arm.inputs_of_sampling().items()}
    lines |= {f"to judge: {path}: {named(path, items)}": path for arm in arms_of(table)
              for option, path in arm.inputs.items() if option != "--prompts"}
    yield from (line for line, path in lines.items()
                if not ((ROOT / path).exists() or str(path).startswith("emoji:")))


def now_and_next(lacking: Sequence[tuple[Study, list[str]]], wrong: Sequence[str]) -> str:
    """A line that says what works right now, and the next step.

    lacking: tables with their needs. wrong: lines about missing or wrong packages.
    """
    shipped = [name for name, checkpoint in SHIPPED.items() if (ROOT / checkpoint).exists()]
    ready = [table for table, needed in lacking if not needed and arms_of(table)]
    accelerated = torch.cuda.is_available()
    where = "a GPU" if accelerated else f"{os.cpu_count()} CPU cores"
    can = [f"sample, judge and time the small models ({', '.join(shipped)}) on {where}"] if shipped else []
    can += ["cache in any diffusers pipeline of yours"]
    can += [f"{len(ready)} of {len(lacking)} tables of the papers" + ("" if accelerated else ", in weeks without a GPU")
            if ready else "no table of the papers yet, whose weights are not here"]
    if wrong:
        can, step = ["little before the packages are right"], f"{sys.executable} -m pip install -r requirements.txt"
    elif not shipped:
        step = "git checkout -- checkpoints, since the small models are missing"
    elif not (ROOT / "results" / "demo_short" / "index.html").is_file():
        step = "bash scripts/demo.sh, three to five minutes"
    elif not accelerated:
        step = "two lines in a pipeline of yours, see docs/pipelines.md"
    elif ready:
        step = f"bash scripts/{ready[0].script}"
    else:
        lines = min((needed for table, needed in lacking if table.script and needed), key=len, default=None)
        step = lines[0].rpartition(": ")[2] if lines else "bash scripts/all_tables.sh --dry-run"
    return f"Right now: {'; '.join(can)}. Next: {step}."


def report(chosen: Sequence[Study]) -> str:
    """The report as text."""
    items, met = catalogue(), unmet(ROOT / "requirements.txt")
    wrong = list(filter(None, met.values()))
    lacking = [(table, list(needs(table, items))) for table in chosen]
    parts = [now_and_next(lacking, wrong), "\n".join(machine()),
             "\n".join([*wrong, f"{len(met) - len(wrong)} of {len(met)} packages of requirements.txt are right"]),
             align([["file or folder", "state"], *([name, state(item)] for name, item in items.items())])]
    for table, lines in lacking:
        lines = lines or ["nothing is missing"] if table.script else ["nothing can be run: its model is not public"]
        parts.append("\n".join([table.heading, *(f"  {line}" for line in lines)]))
    return "\n\n".join(parts)


@dataclass(frozen=True)
class Options:
    tables: tuple[str, ...] = option((), "table1 to table14, block_caching_table1 (default: all)", word=True,
                                     metavar="TABLE")


@command
def main(options: Options) -> None:
    print(report([find(name) for name in options.tables] or list(tables().values())))


if __name__ == "__main__":
    main()
