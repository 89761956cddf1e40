"""The picture of arms at equal cost."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from eval.tables.plots import STYLE, save


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
