"""Shared by all tests: CPU threads, and the released code's numerical outputs (tests/goldens/README.md)."""

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import slurm_node
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from ddpm.checkpoint import published_state_dict
from ddpm.unet import UNet
from eval.tables import paper
from ldm.unet import UNet as LatentUNet
from run.folder import image_path

HERE = Path(__file__).parent
torch.set_num_threads(1)       # the networks here are tiny: a second thread costs more than it brings
os.environ.setdefault("OMP_NUM_THREADS", "1")       # in processes that tests start, too


def relative_error(value: torch.Tensor, golden: torch.Tensor) -> float:
    """The largest difference as a fraction of the golden's largest magnitude."""
    return ((value - golden).abs().max() / golden.abs().max()).item()


class Golden:
    """One small model of the released code: `manifest`, `io` tensors and `weights` in float32."""

    def __init__(self, name: str):
        self.manifest = json.loads((HERE / "goldens" / f"{name}.json").read_text())[name]
        self.io = load_file(HERE / "goldens" / f"{name}.io.safetensors")
        self.weights = {k: v.float() for k, v in load_file(HERE / "goldens" / f"{name}.weights.safetensors").items()}


def main_of(module: str) -> Callable[[], None]:
    """What `python -m module` runs."""
    found = importlib.import_module(module)
    return importlib.import_module(f"{module}.__main__").main if hasattr(found, "__path__") else found.main


def run_command(main: Callable[[], None], *words: object) -> int:
    """Run a command in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *map(str, words)])
        try:
            main()
        except SystemExit as stop:
            return stop.code
    return 0


def fails(capsys, code: int, *words: str) -> bool:
    """Whether a command ended with one line about what was wrong, which has these words in it."""
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and error.startswith("error: ") and all(word in error for word in words), error
    return True


def pixels(folder: Path) -> dict[int, np.ndarray]:
    """The images of a sample folder by their seeds."""
    return {int(path.stem): np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*/*.png"))}


def same(a: Path, b: Path, tolerance: int = 0) -> bool:
    """Whether two folders hold the same seeds and, up to so many of 255 grey levels, the same images."""
    first, second = pixels(a), pixels(b)
    return first.keys() == second.keys() and all(np.abs(first[seed] - second[seed]).max() <= tolerance
                                                 for seed in first)


def settings_of(folder: Path) -> dict:
    """What run.json of a sample folder says of its images."""
    return json.loads((folder / "run.json").read_text())["settings"]


def save_samples(folder: Path, pixels: np.ndarray, first: int = 0, settings: dict | None = None) -> Path:
    """A sample folder with images, uint8 [n, height, width, 3], of the seeds from `first`; settings: of its run.json,
    which there is not without them."""
    for seed, image in enumerate(pixels, first):
        path = image_path(folder, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    if settings is not None:
        (folder / "run.json").write_text(json.dumps({"settings": settings}))
    return folder


def tiny_ddpm(folder: Path, unet: dict, steps: int) -> Path:
    """The config of a random DDPM, written into a folder with its weights. unet: arguments of `ddpm.unet.UNet`."""
    torch.manual_seed(0)
    save_file(published_state_dict(UNet(**unet)), folder / "tiny.safetensors")
    (folder / "ddpm.yaml").write_text(yaml.safe_dump({
        "name": "ddpm_tiny", "unet": unet, "diffusion": {"beta_schedule": "linear"},
        "checkpoint": str(folder / "tiny.safetensors"), "sampler": {"steps": steps, "branch": 1, "images": 4}}))
    return folder / "ddpm.yaml"


def tiny_ldm(folder: Path, steps: int) -> Path:
    """The config of a random class-conditional latent diffusion model with guidance, likewise."""
    from ldm import checkpoint as ldm
    from ldm import first_stage
    unet = {"in_channels": 3, "out_channels": 3, "model_channels": 32, "channel_mult": [1], "num_res_blocks": 1,
            "attention_resolutions": [1], "num_heads": 1, "context_dim": 8}
    stage = {"resolution": 16, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "z_channels": 3, "n_embed": 16}
    torch.manual_seed(0)
    model = ldm.Model(LatentUNet(**unet), first_stage.build(**stage), torch.nn.Embedding(4, 8))
    weights = {name: value.contiguous() for name, value in ldm.published_state_dict(model).items()}
    save_file(weights, folder / "ldm.safetensors")
    (folder / "ldm.yaml").write_text(yaml.safe_dump({
        "name": "ldm_tiny", "unet": unet, "first_stage": stage, "num_classes": 3,
        "diffusion": {"beta_schedule": "cosine", "prediction": "v"}, "checkpoint": str(folder / "ldm.safetensors"),
        "sampler": {"steps": steps, "guidance": 2.0, "branch": 0, "images": 4}}))
    return folder / "ldm.yaml"


# Files that take longest: they come first, so that of several processes none ends long after the others.
LONG = ("test_slurm_node", "test_study", "test_sampling", "test_graphs", "test_forecast", "test_faults", "test_sdxl",
        "test_table_scripts", "test_search", "test_processes", "test_sd_sample")


# Of a U-Net in two resolutions with attention in the lower one, for tests of caching on a random network.
TINY_UNET = {"resolution": 8, "in_channels": 3, "out_channels": 3, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1,
             "attn_resolutions": [4]}

# What a file that was fitted to such a network says of its runs (unet_caching/files/fitted.py).
MADE_FOR = {"model": "tiny", "unet": {"ch": 32}, "checkpoint_sha256": "abc", "sampler": "ddim", "steps": 4,
            "timesteps": "trailing", "fingerprint": "12"}


@pytest.fixture
def unet() -> UNet:
    """A random network that does not learn."""
    torch.manual_seed(0)
    return UNet(**TINY_UNET).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def latent_unet() -> LatentUNet:
    """A random network of two levels with 4 branches, conditioned on 16 channels; no test changes it."""
    torch.manual_seed(0)
    return LatentUNet(4, 4, 32, (1, 2), 1, (1, 2), num_heads=2, context_dim=16).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def parts() -> dict:
    """What tiny pipelines of Stable Diffusion are made of."""
    from sd_pipelines import random_parts
    return random_parts()


@pytest.fixture
def calls() -> Iterator[list]:
    """The calls of U-Nets in a test (sd_pipelines.Calls)."""
    from sd_pipelines import counted
    with counted() as seen:
        yield seen


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """The config of a random DDPM that draws 9 steps; a module may have another."""
    return tiny_ddpm(tmp_path_factory.mktemp("tiny"), TINY_UNET, steps=9)


@pytest.fixture
def run(config) -> Callable[..., int]:
    """run(main, *words): a command of the model of the fixture `config`, on the CPU; its exit code."""
    return lambda main, *words: run_command(main, "--config", config, "--device", "cpu", *words)


@pytest.fixture
def fit(config) -> Callable[..., int]:
    """fit(kind, *words): `python -m lab.fit`, for the same model; its exit code."""
    return lambda kind, *words: run_command(main_of("lab.fit"), kind, "--config", config, "--device", "cpu", *words)


@pytest.fixture
def table_file(monkeypatch, tmp_path) -> Iterator[Callable[[str], None]]:
    """table_file(text): from now on the only tables are those of a file that has the text under `tables:`."""
    def write(text: str) -> None:
        (tmp_path / "x.yaml").write_text(f"name: X\nsource: y\ntables:\n{text}")
        monkeypatch.setattr(paper, "FOLDER", tmp_path)
        paper.tables.cache_clear()

    yield write
    paper.tables.cache_clear()


@pytest.fixture
def submit_table(monkeypatch, capsys, tmp_path) -> Callable[..., str]:
    """submit_table(*words): submit_table.sh without bash; returns what it printed. Its settings are slurm_node's."""
    from scripts.slurm import submit
    monkeypatch.chdir(HERE.parent)
    (tmp_path / "settings.yaml").write_text(slurm_node.SETTINGS)

    def submitted(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["submit", *words, *submitted.options])
        submit.main()
        return capsys.readouterr().out
    submitted.options = [f"--settings={tmp_path / 'settings.yaml'}",
                         *(f"--{name}={tmp_path / name}" for name in ("samples", "results", "logs"))]
    return submitted


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """The config of a DDPM with 4 branches that draws 4 steps, said to be trained on the smallest group."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    sizes = {"resolution": 32, "in_channels": 3, "out_channels": 3, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1,
             "attn_resolutions": []}
    save_file(published_state_dict(UNet(**sizes)), folder / "tiny.safetensors")
    (folder / "tiny.yaml").write_text(yaml.safe_dump({
        "name": "ddpm_tiny", "unet": sizes, "diffusion": {"beta_schedule": "cosine", "prediction": "v"},
        "checkpoint": str(folder / "tiny.safetensors"), "train": {"group": "Flags"},
        "sampler": {"steps": 4, "timesteps": "trailing", "branch": 1}}))
    return folder / "tiny.yaml"


@pytest.fixture
def study(tmp_path, tiny, capsys) -> Callable[..., tuple[int, str]]:
    """study(content, *options): carry out a study of the tiny model; the exit code, and what was printed."""
    def run(content: dict, *options: object) -> tuple[int, str]:
        path = tmp_path / "some.yaml"
        path.write_text(yaml.safe_dump({"model": str(tiny), "seeds": "0-5"} | content, sort_keys=False))
        code = run_command(main_of("lab.study"), path, "--samples", tmp_path / "samples", "--results",
                           tmp_path / "results", "--device", "cpu", "--threads", 1, *options)
        out, err = capsys.readouterr()
        return code, out + (err if code or "--jobs" in options else "")
    run.folder, run.samples = tmp_path / "results" / "some", tmp_path / "samples"
    return run


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow checks too")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.stem not in LONG)
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes on a CPU; run with --slow"))


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory) -> Path:
    """Weights of the Inception network of FID in the published layout, drawn at random so that features spread (He)."""
    from torchvision.models import Inception3
    torch.manual_seed(0)
    net = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias, std=0.1)
            torch.nn.init.uniform_(module.weight, 0.8, 1.2)
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.8, 1.2)
    torch.nn.init.normal_(net.fc.weight, std=0.1)
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(net.state_dict(), path)
    return path
