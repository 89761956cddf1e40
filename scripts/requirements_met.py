"""Exit 0 when this interpreter is a Python that the project runs on and has the packages of requirements.txt, else 1.

    python scripts/requirements_met.py              all of them
    python scripts/requirements_met.py torch        the named ones; `python` asks for the interpreter alone

Interpreters of any age run it, to find one that fits: what they may not have is imported late.
"""

import sys
from pathlib import Path

OLDEST = (3, 11)


def python_fits(version: tuple) -> bool:
    return tuple(version[:2]) >= OLDEST


def packages_met(names: list) -> bool:
    """Whether all lines of requirements.txt are met, or, where names are given, those of these packages."""
    from importlib.metadata import PackageNotFoundError, version
    try:
        from packaging.requirements import Requirement
    except ImportError:
        from pip._vendor.packaging.requirements import Requirement  # type: ignore[assignment]

    lines = Path(__file__).parent.parent.joinpath("requirements.txt").read_text().splitlines()
    wanted = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    asked = [requirement for requirement in wanted if not names or requirement.name in names]
    try:
        return len(asked) >= len(names) and all(
            requirement.specifier.contains(version(requirement.name), prereleases=True) for requirement in asked)
    except PackageNotFoundError:
        return False


if __name__ == "__main__":
    asked = sys.argv[1:]
    sys.exit(not (python_fits(sys.version_info) and (asked == ["python"] or packages_met(asked))))
