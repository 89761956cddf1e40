"""Exit 0 when this interpreter is Python 3.11 and has every package of requirements.txt, else 1."""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def met(line: str) -> bool:
    from pip._vendor.packaging.requirements import Requirement

    requirement = Requirement(line)
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False


if __name__ == "__main__":
    lines = Path(__file__).parent.parent.joinpath("requirements.txt").read_text().splitlines()
    wanted = [line for line in lines if line.strip() and not line.startswith("#")]
    sys.exit(sys.version_info[:2] != (3, 11) or not all(map(met, wanted)))
