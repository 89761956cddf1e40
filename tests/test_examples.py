"""The notebooks: every cell runs, and what they show comes out."""

import re

import pytest
from conftest import HERE

nbformat = pytest.importorskip("nbformat", reason="nbformat and nbclient of requirements.txt are not installed")
nbclient = pytest.importorskip("nbclient", reason="nbformat and nbclient of requirements.txt are not installed")
FOLDER = HERE.parent / "docs"


def test_deepcache_in_a_pipeline():
    notebook = nbformat.read(FOLDER / "deepcache_in_a_pipeline.ipynb", 4)
    assert not any(cell.get("outputs") for cell in notebook.cells)      # none are kept
    nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(FOLDER)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.get("text", "") for output in outputs)
    near = {name: float(mean) for name, mean in re.findall(r"^(\S.+?) +[\d.]+ +[\d.]+x +([\d.]+)", text, re.M)}
    assert near.keys() == {"DeepCache", "forecast", "18 steps"}
    assert near["forecast"] > near["18 steps"] > 30 and near["forecast"] > near["DeepCache"] + 3
    assert any("image/png" in output.get("data", {}) for output in outputs)
