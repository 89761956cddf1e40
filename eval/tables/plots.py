"""Pictures made from sample folders and from result files."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from run.files import write_atomically

STYLE = {"uniform": ("C0", "o", "-"), "non-uniform": ("C2", "s", "-"), "fewer steps": ("C1", "^", "--"),
         "block caching": ("C4", "D", "-"), "block caching, scale-shift": ("C6", "P", "-"),
         "forecast": ("C8", "P", "-"), "plan": ("C7", "D", "none"), "together": ("C9", "v", "-"),
         "transformers only": ("C5", "<", "none"), "uncached": ("black", "*", "none"),
         "ablation": ("C3", "x", "none")}


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
    save(figure, path, 130)


MARKERS = "osD^vPX<>hp*"


def quality_fronts(points: Sequence[dict], path: Path, panels: Sequence[tuple], columns: int,
                   axes: Sequence[str]) -> None:
    """Quality against cost, points coloured by one setting and shaped by another, with the front as a line.

    points: dicts with label, cached, color and marker (the values of the two `axes`; None: neither), cost by key, and
    per measure (value, low, high) or None; printed: per measure what the papers have. panels: ((cost, label), (measure,
    label, whether higher is better), places of the points on its front), `columns` in a row.
    """
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(5.2 * columns + 1.2, 3.9 * rows), layout="constrained",
                                squeeze=False)
    colors, markers = (sorted({p[key] for p in points if p[key] is not None}) for key in ("color", "marker"))
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.95, max(len(colors), 1)))

    def style(p: dict) -> dict:
        if not p["cached"]:
            return {"color": "black", "marker": "*"}
        return {"color": shades[colors.index(p["color"])] if p["color"] is not None else "C0",
                "marker": MARKERS[markers.index(p["marker"]) % len(MARKERS)] if p["marker"] is not None else "o"}

    printed = False
    hollow: dict[str, Any] = {"marker": "D", "markersize": 9, "markerfacecolor": "none", "linestyle": "none"}
    for axis, ((cost, cost_label), (measure, label, higher), front) in zip(grid.flat, panels, strict=False):
        drawn = [(i, p) for i, p in enumerate(points) if p.get(measure) is not None and p[cost] is not None]
        for _, p in drawn:
            value, low, high = p[measure]
            axis.errorbar(p[cost], value, yerr=[[max(value - low, 0)], [max(high - value, 0)]], **style(p),
                          linestyle="none", markersize=5 if p["cached"] else 9, elinewidth=0.5, alpha=0.9)
            if cost == "macs":
                for other in p["printed"][measure]:
                    axis.plot(p[cost], other, color="C3", **hollow)
                    printed = True
        line = sorted(((p[cost], p[measure][0], p["label"]) for i, p in drawn if i in front))
        axis.plot([x for x, *_ in line], [y for _, y, _ in line], color="C3", linewidth=1, alpha=0.7)
        for x, y, text in line[:: max(1, -(-len(line) // 8))]:
            axis.annotate(text, (x, y), textcoords="offset points", xytext=(4, -10), fontsize=6, color="C3")
        axis.set_xlabel(cost_label)
        axis.set_ylabel(f"{label} ({'higher' if higher else 'lower'} is better)")
        axis.grid(alpha=0.3)
    key = [plt.Line2D([], [], color="black", marker="*", linestyle="none", label="uncached"),
           plt.Line2D([], [], color="C3", label="front")]
    key += [plt.Line2D([], [], color="C3", label="paper", **hollow)] * printed
    key += [plt.Line2D([], [], color=shade, marker="o", linestyle="none", label=f"{axes[0]} {value}")
            for shade, value in zip(shades, colors, strict=False)]
    key += [plt.Line2D([], [], color="gray", marker=MARKERS[i % len(MARKERS)], linestyle="none",
                       label=f"{axes[1]} {value}") for i, value in enumerate(markers)]
    figure.legend(handles=key, loc="outside right upper", fontsize=8)
    save(figure, path)


def heat_maps(panels: Sequence[tuple[str, Sequence, Sequence, np.ndarray, list[list[str]], bool]], path: Path,
              rows: str, columns: str) -> None:
    """A map per panel: (title, values of the rows, of the columns, numbers with NaN for none, texts, whether higher is
    better); yellow is better in all of them."""
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    width, height = len(panels[0][2]), len(panels[0][1])
    size = across * max(0.52 * width + 1.6, 3.6), down * (0.42 * height + 1.4)
    figure, grid = plt.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
    for axis in grid.flat[len(panels):]:
        axis.axis("off")
    for axis, (title, down_values, across_values, numbers, texts, higher) in zip(grid.flat, panels, strict=False):
        axis.imshow(numbers, cmap="viridis" if higher else "viridis_r", aspect="auto")
        ranks = (numbers - np.nanmin(numbers)) / (np.nanmax(numbers) - np.nanmin(numbers) or 1)
        for (i, j), rank in np.ndenumerate(ranks if higher else 1 - ranks):
            axis.text(j, i, texts[i][j], ha="center", va="center", fontsize=7, color="black" if rank > 0.6 else "white")
        axis.set_xticks(range(len(across_values)), across_values)
        axis.set_yticks(range(len(down_values)), down_values)
        axis.set_xlabel(columns)
        axis.set_ylabel(rows)
        axis.set_title(title, fontsize=9)
    save(figure, path)


def lines_of_kinds(panels: Sequence[tuple[str, dict[str, list[tuple[float, float, float, float]]]]], path: Path,
                   measure: str) -> None:
    """One panel per cost, with a line per kind of run: broken ones for fewer steps.

    panels: (name of the cost, {kind: [(cost, value, low, high), ...]}). measure: name of the value.
    """
    figure, grid = plt.subplots(1, len(panels), figsize=(6.4 * len(panels), 5), layout="constrained", squeeze=False)
    kinds = list(dict.fromkeys(kind for _, lines in panels for kind in lines))
    for axis, (cost, lines) in zip(grid.flat, panels, strict=True):
        for kind, line in lines.items():
            place, (x, y, low, high) = kinds.index(kind), np.array(line).T
            axis.errorbar(x, y, yerr=[y - low, high - y], color=f"C{place % 10}", marker=MARKERS[place % len(MARKERS)],
                          linestyle="--" if kind.startswith("fewer steps") else "-", markersize=5, linewidth=1.2,
                          elinewidth=0.6, capsize=2, label=kind)
        axis.set_xscale("log")
        axis.set_xlabel(cost)
        axis.set_ylabel(measure)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("{x:g}")
        axis.tick_params(axis="x", which="minor", labelsize=7)
        axis.grid(alpha=0.3, which="both")
    if len(kinds) > 8:                  # more would cover what they name
        figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    else:
        grid.flat[0].legend(fontsize=8)
    save(figure, path, 120)


def calls_of_runs(runs: Sequence[tuple[str, Sequence[tuple[float, float, int]]]], path: Path) -> None:
    """One row per run: a mark for each network call at its timestep, the higher the more it computes.

    runs: (label, [(timestep, share of a full call's MACs, order of the forecast), ...]).
    """
    colours = ("C7", "C1", "C3", "C4")
    figure, grid = plt.subplots(len(runs), 1, figsize=(9, 0.9 * len(runs) + 0.9), layout="constrained", squeeze=False,
                                sharex=True)
    used = dict[str, str]()
    for axis, (label, calls) in zip(grid.flat, runs, strict=True):
        for t, share, order in calls:
            kind = "all is computed" if share == 1 else f"forecast, order {order}" if order else "reused"
            used[kind] = "black" if share == 1 else colours[order]
            axis.plot([t, t], [0, 0.15 + 0.85 * share], color=used[kind], linewidth=2.2, solid_capstyle="butt")
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
        axis.set_yticks([])
        axis.set_ylim(0, 1.05)
        axis.spines[["top", "right", "left"]].set_visible(False)
    grid.flat[-1].set_xlabel("timestep of the call; the higher a mark, the more is computed")
    grid.flat[-1].invert_xaxis()
    handles = [plt.Line2D([], [], color=colour, linewidth=2.2, label=kind) for kind, colour in sorted(used.items())]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=8, frameon=False)
    save(figure, path)
