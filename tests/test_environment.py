"""Which interpreter the scripts take: one that fits, wherever it is, and what they install into it."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from run.files import ROOT
from scripts.requirements_met import OLDEST, python_fits, unmet

# An interpreter that says what it was asked, has what $HAS lists, and makes environments that are like itself.
FAKE = """#!/bin/bash
echo "$(basename "$0") $*" >> log
case "$*" in
    "scripts/requirements_met.py"*) [[ " $HAS " == *" $(basename "$0")${2:+-$2} "* ]] ;;
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    "-m pip"*) ;;
esac
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "environment.sh", tmp_path / "scripts")
    for place, names in {"bin": ("python3.11", "python3.12", "python3.13", "python3.14", "python3", "python"),
                         "active/bin": ("python",)}.items():
        (tmp_path / place).mkdir(parents=True)
        for name in names:
            (tmp_path / place / name).write_text(FAKE)
            (tmp_path / place / name).chmod(0o755)
    return tmp_path


def sourced(folder: Path, has: str, **variables: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """What a script finds in `PYTHON`, and what interpreters were asked."""
    done = subprocess.run(["bash", "-c", "set -euo pipefail; source scripts/environment.sh; echo $PYTHON"], cwd=folder,
                          env={"PATH": f"{folder}/bin:{os.defpath}", "HAS": has, **variables}, text=True,
                          capture_output=True)
    return done, (folder / "log").read_text().splitlines()


def test_a_new_environment_gets_the_versions_of_the_results(folder):
    done, asked = sourced(folder, "python3.12-python python-python")        # the first that fits; no active one
    assert done.stdout.splitlines()[-1] == f"{folder}/.venv/bin/python"
    assert "python3.12 -m venv .venv" in asked
    assert asked[-1].endswith("-r requirements.txt -c scripts/constraints.txt")


def test_an_active_environment_with_a_fitting_pytorch_gets_what_it_lacks(folder):
    active = {"VIRTUAL_ENV": f"{folder}/active"}
    done, asked = sourced(folder, "python-torch", **active)
    assert done.stdout.splitlines()[-1] == f"{folder}/active/bin/python"
    assert asked[-1].endswith("-r requirements.txt") and "active" in done.stdout and not (folder / ".venv").exists()
    done, asked = sourced(folder, "python-torch python", **active)
    assert done.stdout == f"{folder}/active/bin/python\n" and not asked[-1].startswith("python -m pip")


def test_an_active_environment_without_pytorch_is_left_alone(folder):
    done, asked = sourced(folder, "python3.11-python python-python python", VIRTUAL_ENV=f"{folder}/active")
    assert done.stdout.splitlines()[-1] == f"{folder}/.venv/bin/python" and not any("pip" in line for line in asked)


def test_no_python_that_fits_is_one_line(folder):
    done, _ = sourced(folder, "")
    assert done.returncode == 2 and done.stderr == "error: Python 3.11 or later is needed and not on PATH\n"


def test_pythons_from_the_oldest_on_fit():
    assert [python_fits(version) for version in ((3, 10, 9), (3, 11, 0), (3, 13, 9), (3, 15, 0), (4, 0))] == [
        False, True, True, True, True]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=" + ".".join(map(str, OLDEST))
    tested = [text.split()[-1] for text in project["classifiers"] if "Python :: 3." in text]
    assert min(tested) == "3.11"


def test_the_pytorch_of_the_results_is_in_the_range():
    found = {Requirement(line).name: Requirement(line) for line in (ROOT / "requirements.txt").read_text().splitlines()
             if line and not line.startswith("#")}
    for line in (ROOT / "scripts" / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            pinned = Requirement(line)
            assert found[pinned.name].specifier.contains(str(pinned.specifier).removeprefix("=="))


def test_this_interpreter_is_told_what_it_has():
    def asked(*names: str) -> int:
        return subprocess.run([sys.executable, "scripts/requirements_met.py", *names], cwd=ROOT).returncode

    assert asked("python") == asked("torch") == asked("numpy", "torch") == 0
    assert asked("no-such-package") == asked("torch", "no-such-package") == 1


def test_packages_that_are_missing_or_old_are_named(tmp_path):
    (tmp_path / "requirements.txt").write_text("# these\ntorch>=1\nnumpy<1\nno-such-package==1\n")
    found = unmet(tmp_path / "requirements.txt")
    assert found["torch"] == "" and found["no-such-package"] == "no-such-package==1: missing"
    assert found["numpy"].startswith("numpy<1: ") and found["numpy"].endswith(" is installed")
