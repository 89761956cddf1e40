"""Pictures of Block Caching: how much blocks change, when they are computed, how alike features of two steps are."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor

from eval.tables.plots import STYLE, save


def short(name: str) -> str:
    """The name of a residual at the axis of a picture: input_blocks.4.1 -> in 4.1."""
    return (name.replace("input_blocks.", "in ").replace("output_blocks.", "out ").replace("middle_block.", "middle ")
            .replace("transformer_blocks.0.", ""))


def change_curves(changes: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw a curve per residual: its relative change at every step; colour = where it lies in the network."""
    figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.95, len(changes)))
    for colour, (name, values) in zip(colours, changes.items(), strict=True):
        axis.plot(range(1, len(values)), values[1:], color=colour, linewidth=1, label=short(name))
    axis.set_xlabel("step (0 = highest noise level)")
    axis.set_ylabel("relative L1 change of the residual")
    axis.set_yscale("log")
    axis.grid(alpha=0.3)
    figure.legend(fontsize=6, ncols=1 + len(changes) // 24, loc="outside right upper")
    save(figure, path)


def schedule_chart(schedule: Mapping[str, Sequence[int]], num_steps: int, path: Path) -> None:
    """Draw a row per residual: a dot where it is computed, an arrow over the steps that reuse the value."""
    figure, axis = plt.subplots(figsize=(2 + 0.16 * num_steps, 0.8 + 0.2 * len(schedule)), layout="constrained")
    for row, steps in enumerate(schedule.values()):
        for start, end in zip(steps, [*steps[1:], num_steps], strict=True):
            if end - 1 > start:
                axis.annotate("", (end - 1 + 0.3, row), (start, row),
                              arrowprops={"arrowstyle": "->", "color": "C0", "linewidth": 1})
        axis.plot(steps, [row] * len(steps), "o", color="black", markersize=3)
    axis.set_yticks(range(len(schedule)), [short(name) for name in schedule], fontsize=7)
    axis.set_xlim(-1, num_steps)
    axis.set_ylim(len(schedule) - 0.4, -0.6)
    axis.set_xlabel("step: a dot computes the residual, the arrow reuses it")
    save(figure, path)


def at_equal_cost(points: Sequence[dict], path: Path, panels: Sequence[tuple[str, str]]) -> None:
    """Draw a row per arm, in their order; a panel per measure, dotted where the uncached run stands.

    points: as in `eval.tables.plots.cost_against_quality`, by budget; a line separates where the
    cost falls by more than 5 %.
    panels: (key of the measure, axis label).
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(2.6 + 3.4 * len(panels), 0.9 + 0.24 * len(points)),
                                sharey=True, squeeze=False, layout="constrained")
    for axis, (key, label) in zip(axes[0], panels, strict=True):
        for y, p in enumerate(points):
            if p.get(key) is None:
                continue
            value, low, high = (p[key],) * 3 if np.isscalar(p[key]) else p[key]
            colour, marker, _ = STYLE[p["family"]]
            axis.errorbar(value, y, xerr=[[value - low], [high - value]], color=colour, marker=marker, capsize=2)
            if p["family"] == "uncached":
                axis.axvline(value, color="black", linestyle=":", linewidth=1)
        for y, (above, below) in enumerate(pairwise(points)):
            if above["cost"] > 1.05 * below["cost"]:
                axis.axhline(y + 0.5, color="gray", linewidth=0.8)
        axis.set_xlabel(label)
        axis.grid(axis="x", alpha=0.3)
    axes[0][0].set_yticks(range(len(points)), [f"{p['label']}  ({p['cost']:.3g} G)" for p in points], fontsize=8)
    axes[0][0].set_ylim(len(points) - 0.5, -0.5)
    save(figure, path)


def similarity_maps(similarities: Mapping[int, Tensor], path: Path) -> None:
    """Draw a square per branch: the cosine similarity of its feature between all pairs of steps."""
    columns = min(len(similarities), 6)
    rows = -(-len(similarities) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(0.8 + 2.4 * columns, 2.6 * rows), squeeze=False,
                                layout="constrained")
    for axis in axes.flat[len(similarities):]:
        axis.remove()
    for axis, (branch, values) in zip(axes.flat, similarities.items(), strict=False):
        image = axis.imshow(values, vmin=0, vmax=1, cmap="magma", origin="upper")
        axis.set_title(f"branch {branch}", fontsize=10)
        axis.set_xlabel("step")
    axes[0][0].set_ylabel("step")
    figure.colorbar(image, ax=list(axes.flat[:len(similarities)]), label="cosine similarity", shrink=0.8)
    save(figure, path)
