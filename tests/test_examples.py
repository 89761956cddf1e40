"""The notebooks: every cell runs, and what they show comes out."""

import ast
import json
import re
import sys

from conftest import HERE
from PIL import Image

DOCS = HERE.parent / "docs"


def test_deepcache_in_a_pipeline(monkeypatch, capsys):
    notebook = json.loads((DOCS / "deepcache_in_a_pipeline.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 5 and not any(cell["outputs"] for cell in cells)      # none are kept
    monkeypatch.chdir(DOCS)
    monkeypatch.setattr("sys.path", [*sys.path])
    names: dict = {}
    for cell in cells:
        *statements, last = ast.parse("".join(cell["source"])).body
        exec(compile(ast.Module(statements, []), "cell", "exec"), names)
        if cell is cells[-1]:
            image = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
        else:
            exec(compile(ast.Module([last], []), "cell", "exec"), names)
        names["PROMPTS"] = names.get("PROMPTS", [])[:2]         # two are enough here
    text = capsys.readouterr().out
    near = {name: float(mean) for name, mean in re.findall(r"^(\S.+?) +[\d.]+ +[\d.]+x +([\d.]+)", text, re.M)}
    assert near.keys() == {"DeepCache", "forecast", "18 steps"}
    assert near["forecast"] > near["18 steps"] > 30 and near["forecast"] > near["DeepCache"] + 3
    assert isinstance(image, Image.Image) and image.size == (3 * 2 * 32, 3 * 7 * 32)
