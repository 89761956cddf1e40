"""How a study is shown: the columns of its tables, and its charts. A study names one of SHOWS, perhaps with changes.

    show: budgets
    show: {like: grid, maps: [[interval, branch]]}
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from unet_caching.files.schema import fault


@dataclass(frozen=True)
class Show:
    columns: list[str]                  # words of COLUMNS in lab/study/columns.py, or names of metrics
    by: str = ""                        # budget: a table for each
    order: str = ""                     # near: the nearest first; cost: the dearest first; else the study's order
    more: list[str] = field(default_factory=list)       # further texts, words of MORE in lab/study/more.py
    charts: list[list[str]] = field(default_factory=list)       # a measure and a cost each (lab/study/charts.py)
    says: dict[str, str] = field(default_factory=dict)  # the title of a chart, like "near, cost": its message
    front: bool = False                 # charts leave out settings that another one of their kind beats
    lines: bool = True                  # marks of one kind are joined
    maps: list[list[str]] = field(default_factory=list)         # two options each: their values down and across
    samples: int = 0                    # images of each arm in a sheet
    differences: bool = False           # the sheet also has each image's difference to the first arm's


_QUALITY = [["FD-IncMixed5 minus uncached", "macs"], ["PSNR", "macs"]]
SHOWS = {
    "arms": Show(["arm", "cost", "speed-up by MACs", "measured", "near", "gain", "shifts"], more=["sentences"],
                 charts=[["near", "cost"]], samples=12, differences=True),
    "budgets": Show(["kind", "run", "cost", "time", "near", "gain", "FD-EffLite0", "KID-EffLite0", "made"], by="budget",
                    order="near", charts=[["near", "cost"]]),
    "fronts": Show(["run", "cost", "time", "near", "gain of its sampler", "gain", "gain at equal time"], order="cost",
                   more=["judged", "orders"], front=True, charts=[["near", "cost"]]),
    "grid": Show(["point", "full / calls", "speed-up by MACs", "measured", "scores", "shifts", "front"], lines=False,
                 charts=[[name, "macs"] for name in ("KID-EffLite0", "PSNR", "FID", "CLIP score")], samples=12,
                 differences=True),
    "quality": Show(["arm", "full / all steps", "macs", "speed-up by MACs", "measured", "distances", "PSNR", "SSIM",
                     "1 - cos, EffLite0"], more=["controls", "floors", "copies"], charts=_QUALITY, samples=16),
    "blocks": Show(["arm", "macs", "of uncached", "distances", "PSNR", "SSIM"], more=["fitted"], charts=_QUALITY,
                   samples=16),
}


def show_of(said: str | dict[str, Any]) -> Show:
    """One of SHOWS, with some of its fields given differently. Raises ValueError."""
    own = {"like": said} if isinstance(said, str) else dict(said)
    name = own.pop("like", "arms")
    if name not in SHOWS:
        raise ValueError(f"show has no {name!r}: choose from {', '.join(SHOWS)}")
    if wrong := fault(dataclasses.asdict(SHOWS[name]) | own, Show, "show"):
        raise ValueError(wrong)
    return dataclasses.replace(SHOWS[name], **own)
