"""Parts of pages (eval/tables/page.py) that experiments made of arms have in common."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.tables.calls import calls_of
from eval.tables.page import Rows, Section, pictures_of
from eval.tables.svg import Mark, Plot
from lab.study.arms import Arm
from run.folder import missing_seeds
from run.provenance import provenance

MOST = 10           # arms whose images and calls are shown


def command_of(arm: Arm) -> str:
    return shlex.join(["python", *arm.command()])


def mark(arm: Arm, cost: float, value: tuple[float, float, float], unit: str = "") -> Mark:
    """An arm in a plot: its value with its interval, and on demand what it is and how to make it again."""
    note = f"{arm.label}: {value[0]:.4g} [{value[1]:.4g}, {value[2]:.4g}]{unit}\nat {cost:.4g}\nseeds {arm.seeds}"
    return Mark(cost, *value, f"{note}\n{command_of(arm)}")


def section(title: str, text: Sequence[str], rows: Rows, plots: Sequence[Plot], arms: Sequence[Arm],
            about: Mapping[str, str] | None = None) -> Section:
    """A model's part of a page; the first arm is what the others are compared with. about: of arms, by label."""
    shown = arms[:MOST]
    folders: dict[str, Path] = {arm.label: arm.folder for arm in shown
                                if not missing_seeds(arm.folder, range(arm.images))}
    first = shown[0].label in folders and len(folders) > 1
    return Section(title, text, rows, plots, pictures_of(folders, range(shown[0].images), about) if first else (),
                   {arm.label: calls_of(arm.run) for arm in shown}, {arm.label: command_of(arm) for arm in arms})


def made_by(command: str, device: str = "cpu") -> list[str]:
    """The foot of a page: how to make it again, and where it was made."""
    where: dict[str, Any] = provenance(device)
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return [f"Made by `{command}` at commit {where['commit'] or 'unknown'}.", f"{where['device_name']}; {versions}."]
