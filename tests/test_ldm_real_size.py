"""LDM-4-G at its real size, with random weights in the layout of the public file: loading and the command line.

    python -m pytest tests/test_ldm_real_size.py --slow -s

Needs 8 GB of disk for a while, 5 GB of memory and some minutes. -s shows what was measured.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HERE
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from ldm import first_stage
from ldm.checkpoint import Model, published_state_dict
from ldm.unet import UNet
from run.families import load_config

ROOT = HERE.parent
CONFIG = ROOT / "configs" / "ldm_cin256.yaml"
pytestmark = pytest.mark.slow

# What loading, and reading every weight once, adds to the largest memory of a process so far, in bytes, in which pages
# of a mapped file count too (getrusage would count what the parent had when it forked); and the size of the weights.
LOAD = """
import re, sys
from pathlib import Path
from ldm.checkpoint import load_checkpoint
from run.families import load_config
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
before = peak()
model = load_checkpoint(load_config(Path(sys.argv[1])), Path(sys.argv[2]))
weights = [p for network in model for p in network.parameters()]
total = sum(p.sum().item() for p in weights)
print(peak() - before, sum(p.numel() * p.element_size() for p in weights))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """model.ckpt as Lightning writes it, and flat/model.safetensors, of the same random weights."""
    folder = tmp_path_factory.mktemp("cin256")
    config = load_config(CONFIG)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Model(UNet(**vars(config.unet)), first_stage.build(**vars(config.first_stage)),
                      nn.Embedding(config.num_classes + 1, config.unet.context_dim))
    assert sum(p.numel() for p in model.unet.parameters()) == 400_920_579
    # Small weights, norms of one: no overflow, whatever the network.
    tensors = {name: torch.ones(value.shape) if value.ndim == 1 and name.endswith("weight") else
               torch.empty(value.shape).normal_(std=0.02) for name, value in published_state_dict(model).items()}
    buffers = {"betas": torch.zeros(1000), "model_ema.decay": torch.zeros(()), "scale_factor": torch.ones(())}
    torch.save({"epoch": 0, "global_step": 0, "state_dict": tensors | buffers}, folder / "model.ckpt")
    (folder / "flat").mkdir()
    save_file(tensors, folder / "flat" / "model.safetensors")
    yield folder
    for path in folder.rglob("model*"):
        path.unlink()


def run(*args) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_memory_of_loading(checkpoints):
    # The first load of a pickle converts it; the second one finds it converted.
    for path in ("flat/model.safetensors", "model.ckpt", "model.ckpt"):
        added, size = map(int, run("-c", LOAD, CONFIG, checkpoints / path).stdout.split())
        print(f"{path}: {added / 1e9:.2f} GB for {size / 1e9:.2f} GB of weights, {added / size:.2f} of their size")
        assert 0.9 < added / size <= 1.3        # less would say that the measurement is wrong


def test_the_command_line(checkpoints, tmp_path):
    """Two steps, one of them cached, guidance as a doubled batch, and the first stage."""
    out = tmp_path / "out"
    run("-m", "ldm.sample", "--config", CONFIG, "--checkpoint", checkpoints / "model.ckpt", "--steps", 2,
        "--interval", 2, "--seeds", "0", "--threads", 2, "--out", out)
    image = np.asarray(Image.open(out / "000" / "000000.png"))
    assert image.shape == (256, 256, 3) and image.std() > 0
    settings = json.loads((out / "run.json").read_text())["settings"]
    assert settings["cache"]["full_steps"] == [0] and settings["guidance"] == 1.5
    assert (out / "images.csv").read_text() == "seed,label\n0,0\n"
