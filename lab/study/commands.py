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
    """Judge the images by the evaluator's command, where its files are there. Raises UserError where it fails."""
    if not arm.missing_for_judging() and arm.measured() is None:
        python(arm.judge_command(), f"row {arm.label!r}")
