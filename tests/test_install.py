"""`pip install .` seen from another folder: the library alone, which does what the clone does."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from test_sd_pipeline import build, parts, run  # noqa: F401  parts: a fixture

import unet_caching
from run.files import ROOT
from stable_diffusion.pipeline import enable_deepcache

NAME = "unet_caching"
ROOMS = {file.parent.name for file in ROOT.glob("*/__init__.py")} - {NAME}
VERSION = unet_caching.__version__
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORT_ALL = f"""
import importlib, pkgutil, sys
import {NAME}
assert "torch" not in sys.modules and "diffusers" not in sys.modules, "the package itself imports what takes seconds"
names = [found.name for found in pkgutil.walk_packages({NAME}.__path__, "{NAME}.")]
for name in names:
    importlib.import_module(name)
print(len(names), sorted(sys.modules.keys() & {ROOMS}))
"""
EXTRAS = {module for module, names in packages_distributions().items() for name in names
          if name.lower() in {Requirement(text).name.lower() for extra in PROJECT["optional-dependencies"].values()
                              for text in extra}}
CACHED_PIPELINE = f"""
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys({sorted(EXTRAS)}))     # as where no extra is installed
import torch
import {NAME}
from {NAME} import disable_deepcache, enable_deepcache, plan_scheduler
from diffusers import StableDiffusionPipeline           # after ours, see unet_caching/samplers/libraries.py

pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], safety_checker=None, local_files_only=True)
def latents():
    return pipe("a cat", height=16, width=16, num_inference_steps=6, output_type="latent",
                generator=torch.Generator().manual_seed(0)).images
enable_deepcache(pipe, interval=3)
cached = latents()
disable_deepcache(pipe)
torch.save([cached, latents()], sys.argv[2])
for found in pkgutil.walk_packages({NAME}.__path__, "{NAME}."):
    importlib.import_module(found.name)
"""


def python(folder: Path, installed: Path, *words: str) -> str:
    """Run an interpreter in `folder` that knows the packages of this one and what was installed, and not the clone."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True,
                          env=environment | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The folder with the wheel, built in a copy: building leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / NAME, folder / "source" / NAME, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder / "source")
    subprocess.run([sys.executable, "-m", "pip", "wheel", ".", "--quiet", "--no-deps", "--no-build-isolation",
                    "--no-index", "--wheel-dir", folder], cwd=folder / "source", check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder of packages with ours."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile",
                    "--target", folder, wheel], check=True)
    return folder


def test_one_top_level_name_comes_along(installed):
    assert {path.name for path in installed.iterdir()} == {NAME, f"{NAME}-{VERSION}.dist-info"}
    assert (installed / NAME / "py.typed").is_file()
    assert {path.name for path in installed.glob("*.dist-info/licenses/*")} == {"LICENSE", "NOTICE"}


def test_every_module_imports_and_knows_nothing_around_the_library(installed, tmp_path):
    modules = [path for path in (installed / NAME).rglob("*.py") if path != installed / NAME / "__init__.py"]
    assert python(tmp_path, installed, "-c", IMPORT_ALL).splitlines()[-1] == f"{len(modules)} []"
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text())):      # what is imported only when a function runs, too
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert not {name.split(".")[0] for name in names} & ROOMS, f"{path}: line {node.lineno}"


def test_two_lines_switch_caching_on_in_a_pipeline_without_any_extra(installed, tmp_path, parts):  # noqa: F811
    pipe = build(parts)
    pipe.save_pretrained(tmp_path / "pipeline")
    (tmp_path / "cached.py").write_text(CACHED_PIPELINE)
    python(tmp_path, installed, "cached.py", "pipeline", "latents.pt")
    cached, uncached = torch.load(tmp_path / "latents.pt")
    assert torch.equal(uncached, run(pipe))
    enable_deepcache(pipe, interval=3)
    assert torch.equal(cached, run(pipe)) and not torch.equal(cached, uncached)


def test_an_editable_installation_is_the_clone(tmp_path):
    shutil.copytree(ROOT / NAME, tmp_path / "clone" / NAME, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tmp_path / "clone")
    make = "from setuptools import build_meta; build_meta.build_editable('..')"
    subprocess.run([sys.executable, "-c", make], cwd=tmp_path / "clone", check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        paths = [wheel.read(name).decode().strip() for name in wheel.namelist() if name.endswith(".pth")]
    assert paths == [str(tmp_path / "clone")] or "unet_caching" in paths[0]


def test_the_project_names_the_requirements_of_the_clone():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    known = {requirement.name.lower(): requirement for requirement in wanted}
    extras = PROJECT["optional-dependencies"]
    for text in [*PROJECT["dependencies"], *(text for extra in extras.values() for text in extra)]:
        requirement = Requirement(text)
        assert str(known[requirement.name.lower()].specifier) == str(requirement.specifier), text


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == VERSION and citation["license"] == PROJECT["license"]
    assert [paper["doi"][-10:] for paper in citation["references"]] == ["2312.00858", "2312.03209"]
