"""The demo of Block Caching, on a tiny random model."""

import pytest
import torch
import yaml
from safetensors.torch import save_file

from ddpm.checkpoint import published_state_dict
from ddpm.unet import UNet
from experiments import block_caching_demo, demo
from runs import results


@pytest.mark.slow
def test_demo_end_to_end(tmp_path, monkeypatch):
    sizes = {"resolution": 32, "in_channels": 3, "out_channels": 3, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1,
             "attn_resolutions": [16]}
    torch.manual_seed(0)
    save_file(published_state_dict(UNet(**sizes)), tmp_path / "tiny.safetensors")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "ddpm_emoji.yaml").write_text(yaml.safe_dump({
        "name": "ddpm_tiny", "unet": sizes, "diffusion": {"beta_schedule": "cosine"},
        "checkpoint": str(tmp_path / "tiny.safetensors"),
        "sampler": {"steps": 8, "timesteps": "trailing", "branch": 1}}))
    for package in ("caching", "ddpm", "eval", "ldm", "sampling", "scripts", "stable_diffusion", "training", "data"):
        (tmp_path / package).symlink_to(demo.ROOT / package)
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(block_caching_demo, "ROOT", tmp_path)
    monkeypatch.setattr(block_caching_demo, "FILES", tmp_path / "checkpoints" / "block_caching")
    monkeypatch.setattr(block_caching_demo, "BUDGETS", (0.6,))
    for name in ("MEASURED", "TRAINED", "HELD_OUT"):
        monkeypatch.setattr(block_caching_demo, name, 4)
    monkeypatch.setattr(demo, "MODELS", (demo.MODELS[0]._replace(title="A tiny DDPM", steps=8),))
    monkeypatch.setattr("sys.argv", ["demo", "--models", "ddpm", "--images", "80"])
    block_caching_demo.main()

    out, files = tmp_path / "results" / "block_caching", tmp_path / "checkpoints" / "block_caching"
    table = (out / "table.md").read_text()
    assert "A tiny DDPM" in table and "scale-shift" in table and "| no cache |" in table
    found = {path.stem: result for path, result in results.read_all(out / "ddpm")}
    macs = {name: result.details["macs_per_image"]["macs"] for name, result in found.items()}
    uniform = next(value for name, value in macs.items() if name in ("n2", "n3"))
    assert macs["all_60"] <= 1.0001 * uniform < macs["uncached"]
    assert found["all_60_scale_shift"].settings["cache"]["block_caching"]["scale_shift_sha256"]
    assert (files / "ddpm_all_60.safetensors").is_file() and (out / "equal_cost_ddpm.png").is_file()
