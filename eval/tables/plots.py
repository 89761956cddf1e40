"""Pictures made from sample folders and from result files."""

import io
import math
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
    """Save a figure with a palette, which takes a third of the bytes and makes no difference that can be seen."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    plt.close(figure)
    picture = Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG", optimize=True))


def sample_rows(rows: Sequence[tuple[str, np.ndarray]], path: Path, scale: float = 2, titles: Sequence[str] = (),
                exact: bool = False) -> None:
    """One row of images per variant, the same seeds below each other.

    rows: (label, uint8 [n, height, width, 3]), all of one shape. Written as a PNG, `scale` times enlarged.
    titles: one above each column, if any. exact: keep every pixel, or the sheet has a palette and a third of the bytes.
    """
    n, height, width, _ = rows[0][1].shape
    cell_h, cell_w, gap = round(height * scale), round(width * scale), 2
    font = ImageFont.load_default(size=15)
    margin = 12 + int(max(font.getlength(label) for label, _ in rows))
    head = 22 if titles else 0
    sheet = Image.new("RGB", (margin + n * (cell_w + gap), head + len(rows) * (cell_h + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for c, title in enumerate(titles):
        draw.text((margin + c * (cell_w + gap) + cell_w // 2, head // 2), title, fill="black", font=font, anchor="mm")
    for r, (label, images) in enumerate(rows):
        top = head + r * (cell_h + gap)
        draw.text((4, top + cell_h // 2), label, fill="black", font=font, anchor="lm")
        for c, image in enumerate(images):
            resample = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
            tile = Image.fromarray(image).resize((cell_w, cell_h), resample)
            sheet.paste(tile, (margin + c * (cell_w + gap), top))
    if not exact:
        sheet = sheet.quantize(256, dither=Image.Dither.NONE)
    write_atomically(path, lambda temporary: sheet.save(temporary, format="PNG", optimize=True))


def worst_pairs(pairs: Sequence[tuple[float, int, np.ndarray, np.ndarray]], path: Path) -> None:
    """A column per pair: the partner it should equal, the image, and their difference, amplified alike in all pairs.

    pairs: (PSNR in dB, seed, image, partner), images uint8 [height, width, 3].
    """
    images, partners = (np.stack([pair[i] for pair in pairs]) for i in (2, 3))
    difference = np.abs(images.astype(int) - partners)
    # As bright as can be while at most 1 in 100 values is cut off.
    factor = max(f for f in (1, 2, 4, 8, 16, 32, 64) if f == 1 or np.quantile(difference, 0.99) * f <= 255)
    rows = [("against", partners), ("samples", images),
            (f"difference x {factor}", (difference * factor).clip(0, 255).astype(np.uint8))]
    width = images.shape[2]
    titles = [f"seed {seed}: {psnr:.1f} dB" for psnr, seed, *_ in pairs]
    scale = math.ceil(144 / width) if width <= 256 else 256 / width     # a title is 140 wide
    sample_rows(rows, path, scale, titles, exact=True)


def distributions(measures: dict[str, Sequence[float]], path: Path, unrelated: dict[str, float | None]) -> None:
    """One panel per measure: a histogram over the seeds, the share of seeds up to each value, and the mean.

    measures: {axis label: values}. unrelated: their mean between images that have nothing to do with each other.
    """
    figure, axes = plt.subplots(1, len(measures), figsize=(4.2 * len(measures), 3.4), layout="constrained")
    handles = []
    for axis, (label, values) in zip(np.atleast_1d(axes), measures.items(), strict=True):
        axis.set_xlabel(label)
        axis.set_ylabel("seeds")
        if not len(values) or np.ptp(values) < 1e-9:
            axis.text(0.5, 0.5, f"{values[0]:.4g} everywhere" if len(values) else "all pairs are identical",
                      ha="center", transform=axis.transAxes)
            continue
        axis.hist(values, bins="auto", color="C0", alpha=0.4, label="seeds")
        share = axis.twinx()
        share.step(np.sort(values), np.arange(1, len(values) + 1) / len(values), color="black", where="post",
                   label="share of seeds up to here")
        share.set_ylim(0, 1.02)
        axis.axvline(np.mean(values), color="C3", label="mean")
        if unrelated.get(label) is not None:
            axis.axvline(unrelated[label], color="gray", linestyle=":", label="mean of unrelated images")
        handles = [handle for a in (axis, share) for handle in a.get_legend_handles_labels()[0]]
    if handles:
        figure.legend(handles=handles, loc="outside upper center", ncols=4, fontsize=8)
    save(figure, path, 130)


class Map(NamedTuple):
    """Numbers over two settings. numbers: [down, across], NaN for none. texts: of the cells."""
    title: str
    down: Sequence
    across: Sequence
    numbers: np.ndarray
    texts: list[list[str]]
    higher: bool                # is better


def heat_maps(maps: Sequence[Map], path: Path, down: str, across: str) -> None:
    """A panel per map; yellow is better in all of them. down, across: what the two settings are called."""
    columns = min(2, len(maps))
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
