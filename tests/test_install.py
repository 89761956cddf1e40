"""`pip install .` seen from another folder: the library alone, which does what the clone does and needs little."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from packaging.requirements import Requirement

import unet_caching
from run.files import ROOT
from unet_caching import enable_deepcache

NAME = "unet_caching"
ROOMS = {file.parent.name for file in ROOT.glob("*/__init__.py")} - {NAME}
VERSION = unet_caching.__version__
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LISTED = [Requirement(line) for line in (ROOT / "requirements.txt").read_text().splitlines()
          if line.strip() and not line.startswith("#")]


def brought(names: list[str]) -> set[str]:
    """The packages with these names, and all that they need."""
    found: set[str] = set()
    while names:
        name = names.pop().lower().replace("_", "-")
        if name not in found:
            found.add(name)
            try:
                needed = [Requirement(text) for text in requires(name) or ()]
            except PackageNotFoundError:        # of another machine
                continue
            names += [one.name for one in needed if not one.marker or one.marker.evaluate({"extra": ""})]
    return found


NEEDED = brought([Requirement(text).name for text in PROJECT["dependencies"]])
OTHERS = {module for module, names in packages_distributions().items()
          for name in names if name.lower() in {one.name.lower().replace("_", "-") for one in LISTED} - NEEDED}
ALONE = f"""
import importlib, pkgutil, sys
import {NAME}
assert "torch" not in sys.modules and "diffusers" not in sys.modules, "the package itself imports what takes seconds"
sys.modules.update(dict.fromkeys({sorted(OTHERS)}))     # as where nothing else is installed
import torch
from {NAME} import disable_deepcache, enable_deepcache, plan_scheduler
from diffusers import DDIMPipeline                      # after ours, see unet_caching/libraries.py

pipe = DDIMPipeline.from_pretrained(sys.argv[1], local_files_only=True)
def images():
    return torch.from_numpy(pipe(num_inference_steps=6, output_type="np", generator=torch.Generator().manual_seed(0)
                                 ).images)
enable_deepcache(pipe, interval=3)
cached = images()
disable_deepcache(pipe)
torch.save([cached, images()], sys.argv[2])
names = [found.name for found in pkgutil.walk_packages({NAME}.__path__, "{NAME}.")]
for name in names:
    importlib.import_module(name)
print(len(names), sorted(sys.modules.keys() & {ROOMS}))
"""
BUILD = "from setuptools import build_meta; build_meta.build_wheel('..'); build_meta.build_editable('../editable')"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel, and below `editable` another, built in a copy: building leaves folders behind."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT / NAME, folder / "source" / NAME, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder / "source")
    (folder / "editable").mkdir()
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=folder / "source", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def installed(built) -> Path:
    """What pip makes of the wheel: a folder of packages with ours."""
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(built / "installed")
    return built / "installed"


def test_one_top_level_name_comes_along(installed):
    assert {path.name for path in installed.iterdir()} == {NAME, f"{NAME}-{VERSION}.dist-info"}
    assert (installed / NAME / "py.typed").is_file()
    assert {path.name for path in installed.glob("*.dist-info/licenses/*")} == {"LICENSE", "NOTICE"}
    needed = re.findall("^Requires-Dist: (.+)$", next(installed.glob("*.dist-info/METADATA")).read_text(), re.M)
    alone, extra = ([Requirement(text) for text in needed if ("extra ==" in text) == more] for more in (False, True))
    assert [str(one) for one in alone] == [str(Requirement(text)) for text in PROJECT["dependencies"]]
    assert {one.name for one in extra} == {one.name for one in LISTED}


def test_the_library_alone_caches_in_a_pipeline_and_knows_nothing_around_it(installed, tmp_path):
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (8, 8), "norm_num_groups": 4}
    unet = UNet2DModel(**sizes, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path / "pipeline")
    (tmp_path / "alone.py").write_text(ALONE)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run([sys.executable, "alone.py", "pipeline", "images.pt"], cwd=tmp_path, capture_output=True,
                          text=True, env=environment | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    modules = [path for path in (installed / NAME).rglob("*.py") if path != installed / NAME / "__init__.py"]
    assert done.stdout.splitlines()[-1] == f"{len(modules)} []"

    cached, uncached = torch.load(tmp_path / "images.pt")
    pipe = DDIMPipeline.from_pretrained(tmp_path / "pipeline")
    with enable_deepcache(pipe, interval=3):
        images = pipe(num_inference_steps=6, output_type="np", generator=torch.Generator().manual_seed(0)).images
    assert torch.equal(cached, torch.from_numpy(images)) and not torch.equal(cached, uncached)


def test_what_is_imported_late_is_needed_too():
    known = sys.stdlib_module_names | NEEDED | {NAME}
    for path in (ROOT / NAME).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert {name.split(".")[0] for name in names} <= known, f"{path}: line {node.lineno}"


def test_an_editable_installation_is_the_clone(built):
    with zipfile.ZipFile(next((built / "editable").glob("*.whl"))) as wheel:
        paths = [wheel.read(name).decode().strip() for name in wheel.namelist() if name.endswith(".pth")]
    assert paths == [str(built / "source")] or NAME in paths[0]


def test_the_library_takes_what_the_clone_takes():
    known, own = {one.name: one for one in LISTED}, [Requirement(text) for text in PROJECT["dependencies"]]
    assert {one.name for one in own} == {"torch", "diffusers", "safetensors", "numpy", "tqdm"}
    for wanted in own:
        if wanted.name != "diffusers":          # transformers 5, which the clone needs, is not for the older ones
            assert wanted.specifier == known[wanted.name].specifier


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == VERSION and citation["license"] == PROJECT["license"]
    assert [paper["doi"][-10:] for paper in citation["references"]] == ["2312.00858", "2312.03209"]
