"""Pictures made from sample folders and from result files."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sampling.runs import write_atomically

STYLE = {"uniform": ("C0", "o", "-"), "non-uniform": ("C2", "s", "-"), "fewer steps": ("C1", "^", "--"),
         "block caching": ("C4", "D", "-"), "block caching, scale-shift": ("C6", "P", "-"),
         "together": ("C9", "v", "-"), "transformers only": ("C5", "<", "none"),
         "uncached": ("black", "*", "none"), "ablation": ("C3", "x", "none")}


def sample_rows(rows: Sequence[tuple[str, np.ndarray]], path: Path, scale: float = 2, titles: Sequence[str] = ()
                ) -> None:
    """One row of images per variant, the same seeds below each other.

    rows: (label, uint8 [n, height, width, 3]), all of one shape. Written as a PNG, `scale` times enlarged.
    titles: one above each column, if any.
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
    write_atomically(path, lambda temporary: sheet.save(temporary, format="PNG"))


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
    sample_rows(rows, path, math.ceil(144 / width) if width <= 256 else 256 / width, titles)     # a title is 140 wide


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
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))
    plt.close(figure)


def cost_against_quality(points: Sequence[dict], path: Path, panels: Sequence[tuple[str, str]],
                         floors: dict[str, float] | None = None) -> None:
    """One panel per measure, cost in G MACs per image on the horizontal axis, families joined by lines.

    points: dicts with family (a key of STYLE), label, cost, and per measure `value` or (value, low, high).
    panels: (key of the measure, axis label). floors: a horizontal line per measure, where real images stand.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.8), layout="constrained")
    for axis, (key, label) in zip(np.atleast_1d(axes), panels, strict=True):
        for family, (color, marker, line) in STYLE.items():
            chosen = sorted((p for p in points if p["family"] == family and p.get(key) is not None),
                            key=lambda p: p["cost"])
            if not chosen:
                continue
            values = np.array([np.broadcast_to(p[key], 3) if np.isscalar(p[key]) else p[key] for p in chosen])
            spread = np.abs(values[:, 1:] - values[:, :1]).T
            axis.errorbar([p["cost"] for p in chosen], values[:, 0], yerr=spread, color=color, marker=marker,
                          linestyle=line, markersize=9 if marker == "*" else 6, capsize=2, label=family)
            for p, value in zip(chosen, values[:, 0], strict=True):
                axis.annotate(p["label"], (p["cost"], value), textcoords="offset points", xytext=(4, 5), fontsize=7,
                              color=color)
        if floors and key in floors:
            axis.axhline(floors[key], color="gray", linestyle=":", linewidth=1, label="real against real")
        axis.set_xlabel("MACs per image (G)")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    np.atleast_1d(axes)[0].legend(fontsize=8)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))
    plt.close(figure)
