"""The emoji images of data/emoji/: five styles of artwork, 9 groups, split into train and held-out by name."""

import csv
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from run.files import ROOT

FOLDER = ROOT / "data" / "emoji"

# The five styles of artwork in words. noto-v1 draws faces as blobs; fluent-emoji shades fluent-emoji-flat's shapes.
STYLES = {"noto": "noto style", "noto-v1": "blob style", "fluent-emoji-flat": "flat style",
          "fluent-emoji": "glossy style", "twemoji": "twitter style"}


class Emoji(NamedTuple):
    """One row of index.csv: the n-th row is the n-th tile of the mosaic."""
    name: str       # "grinning-face"
    group: str      # "Smileys & Emotion", ...
    style: str      # "noto", "noto-v1", "fluent-emoji-flat", "fluent-emoji", "twemoji"
    split: str      # "train" or "held-out"

    def caption(self, style: bool = True) -> str:
        """The name in words, with or without the style: "grinning face, noto style"."""
        name = self.name.replace("-", " ")
        return f"{name}, {STYLES[self.style]}" if style else name


def read_index() -> list[Emoji]:
    """All rows of index.csv."""
    with open(FOLDER / "index.csv", newline="") as file:
        return [Emoji(**row) for row in csv.DictReader(file)]


def class_names(groups: Sequence[str]) -> list[str]:
    """The names of a class-conditional model's labels, 'group, style', sorted by group and then by style."""
    styles = sorted({row.style for row in read_index() if row.split == "train" and row.group in groups})
    return [f"{group}, {style}" for group in groups for style in styles]


def load(size: int, split: str | None = None, groups: str | Sequence[str] | None = None
         ) -> tuple[np.ndarray, list[Emoji]]:
    """Images of a split and of one or several groups (None: all), with their rows, in the order of index.csv.

    Returns uint8 [n, size, size, 3] and n rows. Raises ValueError for a size, split or group that does not exist.
    """
    mosaic = FOLDER / f"emoji_{size}.webp"
    if not mosaic.exists():
        sizes = sorted(int(path.stem.split("_")[1]) for path in FOLDER.glob("emoji_*.webp"))
        raise ValueError(f"no emoji of {size} pixels in {FOLDER}: there are {sizes}")
    rows = read_index()
    groups = [groups] if isinstance(groups, str) else groups
    for values, known in (([split] if split else [], {row.split for row in rows}),
                          (groups or [], {row.group for row in rows})):
        for value in values:
            if value not in known:
                raise ValueError(f"no emoji of {value!r}: choose from {sorted(known)}")
    sheet = np.asarray(Image.open(mosaic).convert("RGB"))
    down, across = (extent // size for extent in sheet.shape[:2])
    tiles = sheet.reshape(down, size, across, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
    places = [i for i, row in enumerate(rows) if split in (None, row.split) and (groups is None or row.group in groups)]
    return tiles[places], [rows[i] for i in places]


def load_groups(size: int, split: str | None, groups: Sequence[str]) -> tuple[Tensor, list[Emoji]]:
    """Load one group after the other: uint8 [n, 3, size, size] and n rows. Raises ValueError as `load` does."""
    images, rows = load(size, split, groups)
    places = [i for group in groups for i, row in enumerate(rows) if row.group == group]
    return torch.from_numpy(images[places]).permute(0, 3, 1, 2).contiguous(), [rows[i] for i in places]
