"""Pictures of Block Caching: how much blocks change, and when they are computed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from eval.tables.plots import save


def short(name: str) -> str:
    """The name of a residual in a picture: input_blocks.4.1 -> in 4.1."""
    return (name.replace("input_blocks.", "in ").replace("output_blocks.", "out ").replace("middle_block.", "middle ")
            .replace("transformer_blocks.0.", ""))


def change_curves(changes: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw a curve per residual: its relative change at every step; the colour is its place in the network."""
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
