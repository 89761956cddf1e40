"""The demo: its arms, and a run of it on a tiny random model."""

import pytest
import torch
import yaml
from safetensors.torch import save_file

from ddpm.checkpoint import published_state_dict
from ddpm.unet import UNet
from experiments import demo
from runs import results


def test_arms_start_uncached_and_match_in_cost():
    model = demo.MODELS[0]
    arms = {arm.name: arm for arm in demo.plan(model, 0.26, quick=False)}
    assert next(iter(arms)) == "uncached" and arms["uncached"].full_steps == list(range(100))
    for n in (2, 3, 5, 10):
        cached, fewer = arms[f"n{n}"], arms[f"equal{n}"]
        cost = len(cached.full_steps) + 0.26 * (cached.steps - len(cached.full_steps))
        assert abs(fewer.steps - cost) <= 0.5 and fewer.full_steps == list(range(fewer.steps))
    assert len(arms["n5_centered"].full_steps) == len(arms["n5"].full_steps)
    assert arms["n5_centered"].full_steps != arms["n5"].full_steps
    assert "--zero-cache" in arms["n10_zeroed"].options and "--zero-cache" not in arms["n10"].options
    assert {arm.name for arm in demo.plan(model, 0.26, quick=True)} < set(arms)


def test_demo_end_to_end(tmp_path, monkeypatch, capsys):
    (tmp_path / "configs").mkdir()
    sizes = {"resolution": 32, "in_channels": 3, "out_channels": 3, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1,
             "attn_resolutions": []}
    torch.manual_seed(0)
    save_file(published_state_dict(UNet(**sizes)), tmp_path / "tiny.safetensors")
    config = {"name": "ddpm_tiny", "unet": sizes, "diffusion": {"beta_schedule": "cosine"},
              "checkpoint": "tiny.safetensors", "sampler": {"steps": 12, "branch": 1}}
    (tmp_path / "configs" / "ddpm_emoji.yaml").write_text(yaml.safe_dump(config))
    for package in ("caching", "ddpm", "runs", "sampling", "speed", "training", "data"):   # commands run there
        (tmp_path / package).symlink_to(demo.ROOT / package)
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    tiny = demo.MODELS[0]._replace(title="A tiny DDPM", steps=12)
    monkeypatch.setattr(demo, "MODELS", (tiny,))
    monkeypatch.setattr(demo, "plan", lambda model, ratio, quick: [
        arm for arm in whole_plan(model, ratio, quick) if arm.name in ("uncached", "n5", "ddim10", "n10_zeroed")])

    monkeypatch.setattr("sys.argv", ["demo", "--quick", "--images", "80"])
    demo.main()
    out = tmp_path / "results" / "demo_quick"
    table = (out / "table.md").read_text()
    assert "A tiny DDPM" in table and "| N=5 | 3 / 12 |" in table and "Can the scores see what matters?" in table
    arm = results.read(out / "ddpm" / "n5.json")
    assert arm.full_steps == [0, 5, 10] and arm.images == 80
    assert arm.settings["cache"]["interval"] == 5 and arm.details["fidelity"]["images"] == 80
    assert arm.metrics.keys() == {demo.FD, demo.KID, "PSNR", "SSIM", "1 - cos, EffLite0"}
    uncached = results.read(out / "ddpm" / "uncached.json")
    assert uncached.metrics.keys() == {demo.FD, demo.KID}
    assert uncached.details["macs_per_image"]["macs"] == pytest.approx(12 * uncached.macs.macs)
    for picture in ("samples_ddpm.png", "cost_quality_ddpm.png"):
        assert (out / picture).stat().st_size > 1000
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "samples").glob("**/*.png")}
    assert len(before) == 4 * 80
    demo.main()                                                                 # the images are reused
    assert {path: path.stat().st_mtime_ns for path in before} == before
    capsys.readouterr()


whole_plan = demo.plan


def test_too_few_images_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["demo", "--images", "10"])
    with pytest.raises(SystemExit) as stop:
        demo.main()
    assert stop.value.code == 2 and "80 or more" in capsys.readouterr().err
