"""What is done of an arm by the commands of the project, each in a process of its own."""

import shlex
import subprocess
import sys
from collections.abc import Sequence

from eval.tables.arms import Arm
from run.files import ROOT
from unet_caching.errors import UserError


def python(line: Sequence[str], what: str) -> None:
    """Run a command of the project, in a process of its own. Raises UserError where it fails."""
    if subprocess.run([sys.executable, *line], cwd=ROOT).returncode:
        raise UserError(f"{what} failed; to see it alone: {shlex.join(['python', *line])}")


def evaluate(arm: Arm) -> None:
    """Pack the images where that is asked for, and judge them by the evaluator's command, where its files are there."""
    if not arm.packed():
        python(arm.npz_command(), f"row {arm.label!r}")
    if not arm.missing_for_judging() and arm.measured() is None:
        python(arm.judge_command(), f"row {arm.label!r}")


def by_commands(arms: Sequence[Arm]) -> None:
    """Sample, pack and judge arms as the papers' tables want it, each step in a process of its own.

    Raises UserError for one that fails.
    """
    for i, arm in enumerate(arms):
        print(f"[{i + 1}/{len(arms)}] {arm.label}", flush=True)
        python(arm.command(), f"row {arm.label!r}")
        evaluate(arm)
