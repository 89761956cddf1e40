"""Pictures made from sample folders and from result files."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sampling.runs import write_atomically

STYLE = {"uniform": ("C0", "o", "-"), "non-uniform": ("C2", "s", "-"), "fewer steps": ("C1", "^", "--"),
         "uncached": ("black", "*", "none"), "ablation": ("C3", "x", "none")}


def sample_rows(rows: Sequence[tuple[str, np.ndarray]], path: Path, scale: int = 2) -> None:
    """One row of images per variant, the same seeds below each other.

    rows: (label, uint8 [n, height, width, 3]), all of one shape. Written as a PNG, `scale` times enlarged.
    """
    n, height, width, _ = rows[0][1].shape
    cell_h, cell_w, gap = height * scale, width * scale, 2
    font = ImageFont.load_default(size=15)
    margin = 12 + int(max(font.getlength(label) for label, _ in rows))
    sheet = Image.new("RGB", (margin + n * (cell_w + gap), len(rows) * (cell_h + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for r, (label, images) in enumerate(rows):
        top = r * (cell_h + gap)
        draw.text((4, top + cell_h // 2), label, fill="black", font=font, anchor="lm")
        for c, image in enumerate(images):
            tile = Image.fromarray(image).resize((cell_w, cell_h), Image.Resampling.NEAREST)
            sheet.paste(tile, (margin + c * (cell_w + gap), top))
    write_atomically(path, lambda temporary: sheet.save(temporary, format="PNG"))


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
