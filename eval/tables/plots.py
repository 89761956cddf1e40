"""Pictures as PNG: rows of samples, and heat maps."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from run.files import write_atomically


def save(figure: plt.Figure, path: Path, dpi: int = 110) -> None:
    """Save a figure with a palette, which takes a third of the bytes and looks the same."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    plt.close(figure)
    picture = Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG", optimize=True))


def sample_rows(rows: Sequence[tuple[str, np.ndarray]], path: Path, scale: float = 2) -> None:
    """One row of images per variant, the same seeds below each other, as a PNG with a palette.

    rows: (label, uint8 [n, height, width, 3]), all of one shape. scale: the enlargement.
    """
    n, height, width, _ = rows[0][1].shape
    cell_h, cell_w, gap = round(height * scale), round(width * scale), 2
    font = ImageFont.load_default(size=15)
    margin = 12 + int(max(font.getlength(label) for label, _ in rows))
    sheet = Image.new("RGB", (margin + n * (cell_w + gap), len(rows) * (cell_h + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for r, (label, images) in enumerate(rows):
        top = r * (cell_h + gap)
        draw.text((4, top + cell_h // 2), label, fill="black", font=font, anchor="lm")
        for c, image in enumerate(images):
            resample = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
            tile = Image.fromarray(image).resize((cell_w, cell_h), resample)
            sheet.paste(tile, (margin + c * (cell_w + gap), top))
    small = sheet.quantize(256, dither=Image.Dither.NONE)
    write_atomically(path, lambda temporary: small.save(temporary, format="PNG", optimize=True))


class Map(NamedTuple):
    """Numbers over two settings. numbers: [down, across], NaN for a missing one. texts: of the cells."""
    title: str
    down: Sequence
    across: Sequence
    numbers: np.ndarray
    texts: list[list[str]]
    higher: bool                # whether higher is better


def heat_maps(maps: Sequence[Map], path: Path, down: str, across: str) -> None:
    """A panel per map; yellow is better in all of them. down, across: the names of the two settings."""
    columns = 1 if len(maps[0].across) > 6 else min(2, len(maps))          # a page is 700 pixels wide
    rows = -(-len(maps) // columns)
    width, height = len(maps[0].across), len(maps[0].down)
    size = columns * max(0.52 * width + 1.6, 3.6), rows * (0.42 * height + 1.4)
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in grid.flat[len(maps):]:
        axis.axis("off")
    for axis, one in zip(grid.flat, maps, strict=False):
        axis.imshow(one.numbers, cmap="viridis" if one.higher else "viridis_r", aspect="auto")
        ranks = (one.numbers - np.nanmin(one.numbers)) / (np.nanmax(one.numbers) - np.nanmin(one.numbers) or 1)
        for (i, j), rank in np.ndenumerate(ranks if one.higher else 1 - ranks):
            axis.text(j, i, one.texts[i][j], ha="center", va="center", fontsize=7,
                      color="black" if rank > 0.6 else "white")
        axis.set_xticks(range(width), one.across)
        axis.set_yticks(range(height), one.down)
        axis.set_xlabel(across)
        axis.set_ylabel(down)
        axis.set_title(one.title, fontsize=9)
    save(figure, path)
