"""The project's commands, each run in a process of its own."""

import shlex
import subprocess
import sys
from collections.abc import Sequence

from eval.tables.arms import Arm
from run.files import ROOT
from unet_caching.errors import UserError


def python(line: Sequence[str], what: str) -> None:
    """Run a command of the project in a process of its own. Raises UserError if it fails."""
    if subprocess.run([sys.executable, *line], cwd=ROOT).returncode:
        raise UserError(f"{what} failed; to run it by itself: {shlex.join(['python', *line])}")


def evaluate(arm: Arm) -> None:
    """Judge the images by the evaluator's command, if its files exist. Raises UserError if it fails."""
    if not arm.missing_for_judging() and arm.measured() is None:
        python(arm.judge_command(), f"row {arm.label!r}")
