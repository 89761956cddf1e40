"""The house: how much of it there is. The numbers only go down; whoever makes something smaller lowers them."""

import subprocess
from pathlib import Path

import pytest

from run.files import ROOT

LIBRARY, CODE, TESTS = 5_280, 23_300, 15_380          # lines of Python: unet_caching/, all but tests, tests
ROOMS, RESULTS = 14, 130                            # folders at the root; files under results/
LONG = 360                                          # lines of a file


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """What is tracked, or is to be."""
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, text=True, check=True).stdout.splitlines()
    return [Path(name) for name in dict.fromkeys(listed) if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def lines(files) -> dict[Path, int]:
    """Of each Python file."""
    return {file: (ROOT / file).read_text().count("\n") for file in files if file.suffix == ".py"}


def test_lines_of_python(lines):
    def of(*rooms: str) -> int:
        return sum(count for file, count in lines.items() if file.parts[0] in rooms)

    assert of("unet_caching") <= LIBRARY
    assert sum(lines.values()) - of("tests") <= CODE
    assert of("tests") <= TESTS


def test_no_file_is_long(lines):
    assert not [str(file) for file, count in lines.items() if count > LONG]


def test_folders_and_results_are_few(files):
    rooms = {file.parts[0] for file in files if len(file.parts) > 1}
    assert len([name for name in rooms if not name.startswith(".")]) <= ROOMS
    assert sum(file.parts[0] == "results" for file in files) <= RESULTS
