"""The notebook and the worked example of docs/compare.md: all of it runs, and what is shown comes out."""

import ast
import json
import re
import shutil
import subprocess
import sys

import pytest
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


def test_a_method_of_ones_own_is_compared(tmp_path):
    """As docs/compare.md says, in a copy of the project, but for the number of seeds."""
    project, page = tmp_path / "project", (DOCS / "compare.md").read_text()
    for room in ("unet_caching", "run", "eval", "lab", "ldm", "ddpm", "stable_diffusion", "configs"):
        shutil.copytree(HERE.parent / room, project / room, ignore=shutil.ignore_patterns("__pycache__"))
    for data in ("checkpoints", "data"):
        (project / data).symlink_to(HERE.parent / data)
    shutil.copytree(HERE.parent / "results" / "systems_ldm", project / "results" / "systems_ldm")
    blocks = dict(re.findall(r"^```(python|diff|yaml)\n(.*?)^```$", page, re.M | re.S))
    (project / "unet_caching/methods/late.py").write_text(blocks["python"])
    registry = (project / "unet_caching/registry.py").read_text()
    added, removed, other = blocks["diff"].splitlines()
    assert registry.count(removed[1:]) == 1
    (project / "unet_caching/registry.py").write_text(
        registry.replace("from unet_caching.methods.output", f"{added[1:]}\nfrom unet_caching.methods.output")
        .replace(removed[1:], other[1:]))
    study, table = project / "configs/studies/my_method.yaml", project / "results/my_method/table.md"
    study.write_text(blocks["yaml"])

    def run(line):
        done = subprocess.run([sys.executable, *line.split()[1:]], cwd=project, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    lines = [line for block in re.findall(r"^```sh\n(.*?)^```$", page, re.M | re.S) for line in block.splitlines()]
    sample, macs, listing, whole = (line.replace("0-7", "0-1") for line in lines)
    assert "12 full of 18 network calls, branch 0, all calls full from 50% on" in run(sample)
    assert re.search(r"^average +0.18\d\d ", run(macs), re.M)
    assert [float(one) for one in re.findall(r"^my method .+ / \d+ +([\d.]+) ", run(listing), re.M)] == [
        pytest.approx(budget, rel=0.05) for budget in (8, 12, 18, 25)]
    study.write_text(blocks["yaml"].replace("0-127", "0-1").replace("steps: 100", "steps: 20")
                     .replace("also: [systems_ldm]\n", ""))
    run(f"{whole} --only 8 --only near --device cpu --threads 1")
    assert re.search(r"## 8 calls\n\n\| system .+\n.+\n\| my method \| late3_0.5_unipc_steps12 \| 8", table.read_text())
