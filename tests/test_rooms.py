"""The order of rooms, as CONTRIBUTING.md lists it from the ground up: imports point only down, and in no circle."""

import ast
import re
import subprocess
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from runs.files import ROOT

ORDER = re.findall(r"^\d+\. `([\w/]+)/`", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)


def room(file: Path) -> str:
    """The innermost room that holds a file; the name of its folder where none does."""
    inside = [room for room in ORDER if file.is_relative_to(room)]
    return max(inside, key=len) if inside else file.parts[0]


def imports(file: Path, files: set[Path], source: str) -> Iterator[tuple[Path, bool]]:
    """The files among `files` that one imports, anywhere in it, and whether for type checkers alone."""
    def found(module: str) -> Path | None:
        for folder in (Path(), file.parent) if room(file) == "tests" else (Path(),):   # tests import each other bare
            path = folder.joinpath(*module.split("."))
            for candidate in (path.with_name(f"{path.name}.py"), path / "__init__.py"):
                if candidate in files:
                    return candidate
        return None

    tree = ast.parse(source)
    typing = {inner for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
              for statement in node.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        modules: list[Path | None] = []
        if isinstance(node, ast.Import):
            modules = [found(alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{file} line {node.lineno}: a relative import"
            modules = [found(f"{node.module}.{alias.name}") or found(node.module) for alias in node.names]
        yield from ((module, node in typing) for module in modules if module)


def upward(sources: dict[Path, str]) -> list[str]:
    """Imports from a room that is listed later."""
    return sorted(f"{file} imports {other}" for file, source in sources.items()
                  for other in {other for other, _ in imports(file, set(sources), source)}
                  if ORDER.index(room(other)) > ORDER.index(room(file)))


def circle(sources: dict[Path, str]) -> list[Path]:
    """Files that import each other when they run, the first of them again at the end."""
    graph = {file: {other for other, for_types in imports(file, set(sources), source) if not for_types}
             for file, source in sources.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


@pytest.fixture(scope="module")
def sources() -> dict[Path, str]:
    """The repository's Python files in folders, tracked or to be tracked."""
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "*/*.py"], cwd=ROOT,
                            capture_output=True, text=True, check=True).stdout.split("\n")
    return {Path(name): (ROOT / name).read_text() for name in listed if name and (ROOT / name).is_file()}


def test_every_file_is_in_a_room_and_every_room_is_there(sources):
    assert {room(file) for file in sources} == set(ORDER)
    assert len(set(ORDER)) == len(ORDER)


def test_no_import_upward(sources):
    found = upward(sources)
    assert not found, "\n".join(found)


def test_no_circle(sources):
    assert circle(sources) == []


def test_what_these_tests_would_find():
    x, y, z = Path("caching/x.py"), Path("eval/cost/y.py"), Path("eval/z.py")
    assert upward({x: "", y: "from caching import x", z: "import eval.cost.y\nfrom eval.cost.y import anything"}) == []
    assert upward({x: "def late():\n    from eval.cost import y", y: "", z: ""}) == [f"{x} imports {y}"]
    assert upward({y: "from eval.z import anything", z: ""}) == [f"{y} imports {z}"]
    assert circle({y: "import eval.z", z: "def late():\n    from eval.cost import y"}) in ([y, z, y], [z, y, z])
    assert circle({y: "import eval.z", z: "if TYPE_CHECKING:\n    from eval.cost import y"}) == []
