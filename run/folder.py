"""A sample folder: one PNG per seed, one run.json, resumable after any kill, never mixed.

    OUT/run.json            the settings that decide the pixels, and the provenance of the first images
    OUT/sessions.jsonl      one line per process that added images: which were missing, device, versions, commit
    OUT/.claims             an empty file with a lock on each seed that a process is sampling (run/claims.py)
    OUT/000/000123.png      the image of seed 123
"""

import json
import math
import os
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from run.claims import Claims
from run.files import remove_leftovers, write_atomically
from run.seeds import format_seeds, in_batches, rank_and_world
from unet_caching.errors import UserError
from unet_caching.files.schema import check, read_json
from unet_caching.files.whole import write_and_move

FORMAT = 1      # of run.json
_PNG_END = b"IEND\xaeB`\x82"
_RECOUNT = 10   # seconds after which the progress bar counts the images of other processes


def read_run(folder: Path) -> dict:
    """The content of a sample folder's run.json. Raises UserError if it is missing or damaged."""
    path = folder / "run.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a sample folder: it has no run.json")
    try:
        content = read_json(path)
        check(content, _Record, path)
    except ValueError as error:
        raise UserError(f"{error}, so the settings of its images are unknown: use another folder") from None
    if content.get("format", FORMAT) != FORMAT:
        raise UserError(f"{path} has format {content['format']}, this program reads {FORMAT}: use another folder")
    return content


@dataclass
class _Command:
    """The options of a sample command, by name."""
    family: str
    config: str
    options: dict


@dataclass
class _Record:
    """What run.json holds."""
    settings: dict                  # what decides the pixels
    provenance: dict = field(default_factory=dict)      # of the first images
    run: _Command | None = None     # the options that gave the settings; None in older folders
    format: int = FORMAT


def image_path(folder: Path, seed: int) -> Path:
    """The path of a seed's image in a sample folder, which has a sub-folder for every 1000 seeds."""
    return folder / f"{seed // 1000:03d}" / f"{seed:06d}.png"


def seeds_there(folder: Path) -> list[int]:
    """The seeds that have an image in a sample folder, sorted. Only file names count; other files are ignored."""
    paths = {int(path.stem): path for path in folder.glob("[0-9][0-9][0-9]*/[0-9]*.png")
             if path.stem.isascii() and path.stem.isdigit()}
    return sorted(seed for seed, path in paths.items() if path == image_path(folder, seed))


def missing_seeds(folder: Path, seeds: Iterable[int]) -> list[int]:
    """The seeds whose image is missing from a sample folder, or not whole."""
    return [seed for seed in seeds if not _is_whole_png(image_path(folder, seed))]


def check_finite(x: Tensor) -> Tensor:
    """Return x unchanged. Raises UserError if it is not finite, as after an overflow in float16."""
    if not torch.isfinite(x).all():
        raise UserError("the network's output is not finite: the number format overflowed (use --dtype fp32 or bf16), "
                        "or the weights are damaged")
    return x


def quoted(field: str) -> str:
    """Quote a field of a CSV file."""
    return '"' + field.replace('"', '""') + '"'


def to_uint8(x: Tensor) -> np.ndarray:
    """[-1, 1] float [n, channels, height, width] -> uint8 [n, height, width, channels], rounded to nearest.

    Raises UserError if the images are not finite.
    """
    pixels = (check_finite(x).float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


class RunFolder:
    """A folder of images that all come from the same settings.

    settings: what decides the pixels, JSON-compatible. provenance: where this process runs. run: the options that gave
    the settings, as `RunSpec.to_json` writes them. The last two are only recorded.
    Several processes may work on one folder: every file appears whole or not at all.
    Raises UserError, which says what differs, for a folder with other settings, or with images but no run.json.
    """

    def __init__(self, path: Path, settings: dict, provenance: dict, run: dict | None = None):
        self.path = Path(path)
        settings = json.loads(json.dumps(settings))
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file, not a folder for images")
        self.path.mkdir(parents=True, exist_ok=True)
        remove_leftovers([*self.path.glob(".*.tmp"), *self.path.glob("*/.*.tmp")])
        if not (self.path / "run.json").exists():
            if any(self.path.glob("[0-9][0-9][0-9]*/*.png")):
                raise UserError(f"{self.path} has images but no run.json, so their settings are unknown: "
                                "use another folder")
            self._create({"format": FORMAT, "settings": settings, "provenance": provenance, "run": run})
        unlike = differences(read_run(self.path)["settings"], settings)
        if unlike:
            raise UserError(f"{self.path} holds images of other settings ({'; '.join(unlike)}): "
                            "use another folder, or the same settings")
        self.provenance = provenance

    def _create(self, content: dict) -> None:
        """Write run.json unless another process was faster."""
        temporary = self.path / f".run.json.{socket.gethostname()}.{os.getpid()}.tmp"
        try:
            temporary.write_text(json.dumps(content, indent=1) + "\n")
            os.link(temporary, self.path / "run.json")
        except FileExistsError:
            pass
        finally:
            temporary.unlink(missing_ok=True)

    def seeds(self) -> list[int]:
        """The seeds that have an image now, sorted."""
        return seeds_there(self.path)

    def write_listing(self, name: str, header: str, line: Callable[[int], str]) -> None:
        """Write a CSV file about the images in the folder: a header, and a line for each seed.

        Several processes may end at the same time. Each looks again after writing, so the last listing is complete.
        """
        listed = None
        while (seeds := self.seeds()) != listed:
            text = "\n".join([header, *map(line, seeds)]) + "\n"
            write_atomically(self.path / name, lambda path: path.write_text(text, encoding="utf-8"))
            listed = seeds

    def save(self, seed: int, image: np.ndarray) -> None:
        """Write uint8 [height, width, 3] atomically as the PNG of a seed."""
        path = image_path(self.path, seed)
        path.parent.mkdir(exist_ok=True)
        write_and_move(path, lambda temporary: Image.fromarray(image).save(temporary, format="PNG"))

    def _save_all(self, seeds: Sequence[int], images: np.ndarray) -> None:
        for seed, image in zip(seeds, images, strict=True):
            self.save(seed, image)

    def _log(self, line: dict) -> None:
        """Append to sessions.jsonl, on a new line even if a full disk cut the last line short."""
        line = {**self.provenance, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **line}
        with open(self.path / "sessions.jsonl", "a+b") as file:
            file.seek(max(0, file.tell() - 1))
            cut_short = file.read() not in (b"", b"\n")
            file.write((b"\n" if cut_short else b"") + json.dumps(line).encode() + b"\n")

    def fill(self, seeds: Sequence[int], batch_size: int,
             sample: Callable[[list[int], Callable[[float], None]], np.ndarray],
             stop: Callable[[], bool] = lambda: False) -> int:
        """Make the missing images of `seeds` that no other process is making; returns how many.

        sample(batch of seeds, report) -> uint8 [batch, height, width, 3]; it may call report(done) with the finished
        fraction of the batch, for the progress bar, which only rank 0 shows. stop: called before each batch.
        Processes that share a folder start at different batches, go round, and never wait for each other. `seeds` is
        always cut into the same batches, so a restart samples the same seeds together.
        One batch is encoded and written while the next is sampled.
        """
        rank, world = rank_and_world()
        todo = set(missing_seeds(self.path, seeds))
        if not todo:
            return 0
        self._log({"seeds": format_seeds(todo), "batch_size": batch_size})
        size = min(batch_size, math.ceil(len(seeds) / world))
        batches = in_batches(seeds, size)
        own = len(batches) * rank // world
        made, saving, counted = 0, None, time.monotonic()
        bar = tqdm(total=len(seeds), initial=len(seeds) - len(todo), unit="img", smoothing=0.1,
                   disable=rank > 0 or "TQDM_DISABLE" in os.environ,
                   desc=self.path.name + (f", {world} processes" if world > 1 else ""))
        with Claims(self.path / ".claims") as claims, ThreadPoolExecutor(1) as background, bar:
            for batch in batches[own:] + batches[:own]:
                if stop():
                    break
                batch = claims.take(seed for seed in batch if seed in todo)
                batch = missing_seeds(self.path, batch)         # without what another process has made since
                if not batch:
                    continue
                if not bar.disable and time.monotonic() - counted > _RECOUNT:
                    counted = time.monotonic()
                    bar.update(max(0, len(set(seeds).intersection(self.seeds())) - bar.n))
                before = bar.n

                def report(done: float) -> None:
                    bar.update(before + int(done * len(batch)) - bar.n)

                following = background.submit(self._save_all, batch, sample(batch, report))
                if saving is not None:
                    saving.result()
                saving, made = following, made + len(batch)
                report(1.0)
            if saving is not None:
                saving.result()
        return made


def differences(theirs: dict, ours: dict, prefix: str = "") -> list[str]:
    """A line like 'steps: 100 there, 50 here' for each setting that differs."""
    lines = []
    for key in sorted(theirs.keys() | ours.keys()):
        a, b = theirs.get(key), ours.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            a, b = (json.dumps(value) for value in (a, b))
            shown = f"{a} there, {b} here" if len(a) + len(b) < 120 else "differs"
            lines.append(f"{prefix}{key}: {shown}")
    return lines


def _is_whole_png(path: Path) -> bool:
    try:
        if path.exists() and not path.is_file():        # opening a pipe would wait
            raise UserError(f"{path} is not a regular file: move it elsewhere")
        with open(path, "rb") as file:
            file.seek(-len(_PNG_END), os.SEEK_END)
            return file.read() == _PNG_END
    except OSError:
        return False


