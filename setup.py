"""`pip install .` puts the rooms of this repository into one package, unet_caching, so that they collide with nobody's.

In a clone they are top-level packages: `from caching.nested import Cache`. Installed they are subpackages, and their
imports of each other say so: `from unet_caching.caching.nested import Cache`. A clone needs no installation.
"""

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel
from setuptools.errors import SetupError

NAME = "unet_caching"
PACKAGES = [found for found in find_packages() if found.split(".")[0] not in ("package", "experiments", "scripts")]
ROOMS = sorted({package.split(".")[0] for package in PACKAGES})
DATA = {"configs": ["*.yaml", "block_schedules/*.json"], "data": ["emoji/index.csv", "emoji/prompts.txt"]}


def below_name(node: ast.Import | ast.ImportFrom, text: bytes) -> bytes:
    """The text of an import as it is once the rooms are below NAME; the same text where no room is imported."""
    def is_room(module: str) -> bool:
        return module.split(".")[0] in ROOMS

    def one(alias: ast.alias) -> str:
        if not is_room(alias.name):
            return f"import {alias.name}" + (f" as {alias.asname}" if alias.asname else "")
        if alias.asname:
            return f"import {NAME}.{alias.name} as {alias.asname}"
        room, *inner = alias.name.split(".")        # `import room.module` names the room
        return (f"import {NAME}.{alias.name}; " if inner else "") + f"from {NAME} import {room}"

    if isinstance(node, ast.Import):
        return "; ".join(map(one, node.names)).encode() if any(is_room(alias.name) for alias in node.names) else text
    if node.level or not is_room(node.module or ""):
        return text
    return re.sub(rb"^from\s+", b"from " + NAME.encode() + b".", text)


def installed(source: bytes) -> bytes:
    """The source of a module of a room as it is installed; its lines stay where they are.

    Beside imports, commands are renamed: what says `python -m ROOM...`, above all the text of --help.
    """
    starts = [0, *(found.end() for found in re.finditer(rb"\n", source))]

    def imports() -> Iterator[tuple[int, int, ast.Import | ast.ImportFrom]]:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                yield (starts[node.lineno - 1] + node.col_offset,
                       starts[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0), node)

    for start, end, node in sorted(imports(), key=lambda found: found[0], reverse=True):
        source = source[:start] + below_name(node, source[start:end]) + source[end:]
    return re.sub(rf"(python -m )(?=(?:{'|'.join(ROOMS)})\b)".encode(), rf"\1{NAME}.".encode(), source)


class BuildBelowName(build_py):
    """Copies the rooms and rewrites the copies."""

    def run(self) -> None:
        shutil.rmtree(Path(self.build_lib) / NAME, ignore_errors=True)      # modules that are no more
        super().run()

    def build_module(self, module: str, module_file: str, package: str) -> tuple[str, bool]:
        path, copied = super().build_module(module, module_file, package)
        Path(path).write_bytes(installed(Path(path).read_bytes()))
        return path, copied


class NoEditable(editable_wheel):
    """Refuses `pip install --editable`, which would leave the rooms' imports as they are in a clone."""

    def run(self) -> None:
        raise SetupError("there is no editable installation: what is installed is a rewritten copy. A clone needs "
                         "none; run its commands in its folder")


setup(
    packages=[NAME, *(f"{NAME}.{package}" for package in (*PACKAGES, *DATA))],
    package_dir={NAME: "package", **{f"{NAME}.{folder}": folder for folder in (*ROOMS, *DATA)}},
    package_data={NAME: ["py.typed"], f"{NAME}.eval.tables": ["page.html"],
                  **{f"{NAME}.{folder}": files for folder, files in DATA.items()}},
    cmdclass={"build_py": BuildBelowName, "editable_wheel": NoEditable},
)
