"""Exit 0 if the project runs on this interpreter and it has the packages of requirements.txt, else 1.

    python scripts/requirements_met.py              all packages
    python scripts/requirements_met.py torch        only these packages; `python`: only the interpreter

Old interpreters run it, too, to find one that fits. So modules that they may not have are imported late.
"""

import sys
from pathlib import Path

OLDEST = (3, 11)
FILE = Path(__file__).parent.parent / "requirements.txt"


def python_fits(version: tuple) -> bool:
    return tuple(version[:2]) >= OLDEST


def unmet(file: Path = FILE) -> "dict[str, str]":
    """The faults of the packages of a requirements file, by name; an empty text if a package has none."""
    from importlib.metadata import PackageNotFoundError, version
    try:
        from packaging.requirements import Requirement
    except ImportError:
        from pip._vendor.packaging.requirements import Requirement  # type: ignore[assignment]

    found = {}
    for line in (line.split("#")[0].strip() for line in file.read_text().splitlines()):
        if line:
            wanted = Requirement(line)
            try:
                here = version(wanted.name)
                fits = wanted.specifier.contains(here.split("+")[0], prereleases=True)
                found[wanted.name] = "" if fits else f"{wanted}: {here} is installed"
            except PackageNotFoundError:
                found[wanted.name] = f"{wanted}: missing"
    return found


if __name__ == "__main__":
    names = sys.argv[1:]
    sys.exit(not (python_fits(sys.version_info)
                  and (names == ["python"] or not any(unmet().get(name, "none") for name in names or unmet()))))
