"""The order of rooms, as CONTRIBUTING.md lists it from the ground up: imports point only down, and in no circle."""

import ast
import re
import subprocess
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from run.files import ROOT

ORDER = re.findall(r"^\d+\. `([\w/]+)/`", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
Graph = dict[Path, set[tuple[Path, bool]]]


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


def graph(sources: dict[Path, str]) -> Graph:
    """For each file what it imports, and whether for type checkers alone."""
    return {file: set(imports(file, set(sources), source)) for file, source in sources.items()}


def upward(graph: Graph) -> list[str]:
    """Imports from a room that is listed later."""
    return sorted({f"{file} imports {other}" for file, others in graph.items() for other, _ in others
                   if ORDER.index(room(other)) > ORDER.index(room(file))})


def closed_by_types(graph: Graph) -> list[str]:
    """Imports for type checkers alone that close a circle: what they import imports them, if by way of others."""
    def reached(file: Path) -> set[Path]:
        found, left = {file}, [file]
        while left:
            new = {other for other, _ in graph[left.pop()]} - found
            found |= new
            left += new
        return found

    return sorted(f"{file} imports {other}" for file, others in graph.items() for other, for_types in others
                  if for_types and file in reached(other))


def circle(graph: Graph) -> list[Path]:
    """Files that import each other when they run, the first of them again at the end."""
    run = {file: {other for other, for_types in others if not for_types} for file, others in graph.items()}
    try:
        TopologicalSorter(run).prepare()
    except CycleError as error:
        return error.args[1]
    return []


@pytest.fixture(scope="module")
def ours() -> Graph:
    """The repository's Python files in folders, tracked or to be tracked."""
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "*/*.py"], cwd=ROOT,
                            capture_output=True, text=True, check=True).stdout.split("\n")
    return graph({Path(name): (ROOT / name).read_text() for name in listed if name and (ROOT / name).is_file()})


def test_every_file_is_in_a_room_and_every_room_is_there(ours):
    assert {room(file) for file in ours} == set(ORDER)
    assert len(set(ORDER)) == len(ORDER)


def test_no_import_upward(ours):
    found = upward(ours)
    assert not found, "\n".join(found)


def test_no_circle(ours):
    found = circle(ours)
    assert not found, " imports ".join(map(str, reversed(found)))


def test_no_circle_is_hidden(ours):
    found = closed_by_types(ours)
    assert not found, "\n".join(found)


def test_what_these_tests_would_find():
    x, y, z = Path("unet_caching/x.py"), Path("eval/cost/y.py"), Path("eval/z.py")
    down = graph({x: "", y: "from unet_caching import x", z: "import eval.cost.y\nfrom eval.cost.y import anything"})
    assert down == {x: set(), y: {(x, False)}, z: {(y, False)}} and upward(down) == circle(down) == []
    assert upward(graph({x: "def late():\n    from eval.cost import y", y: ""})) == [f"{x} imports {y}"]
    assert upward(graph({y: "from eval.z import anything", z: ""})) == [f"{y} imports {z}"]
    assert {*circle(graph({y: "import eval.z", z: "def late():\n    from eval.cost import y"}))} == {y, z}
    hidden = graph({y: "import eval.z", z: "if TYPE_CHECKING:\n    from eval.cost import y"})
    assert circle(hidden) == [] and closed_by_types(hidden) == [f"{z} imports {y}"]
    assert closed_by_types(graph({y: "", z: "if TYPE_CHECKING:\n    from eval.cost import y"})) == []
