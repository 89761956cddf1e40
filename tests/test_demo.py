"""The demo: its arms, and a run of it on a tiny random model."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from ddpm.checkpoint import published_state_dict
from ddpm.unet import UNet
from eval.cost.runs import macs_per_step
from experiments import demo
from experiments.arms import Given
from runs import results
from runs.results import Result


def test_arms_start_uncached_and_match_in_cost():
    model = demo.MODELS[0]
    arms = {arm.name: arm for arm in demo.plan(model, Given(), quick=False)}
    whole = arms["uncached"].run
    assert next(iter(arms)) == "uncached" and whole.steps == 100 and not whole.caching
    for n in (2, 3, 5, 10):
        cached, fewer = arms[f"n{n}"].run, arms[f"equal{n}"].run
        cost = 100 * macs_per_step(cached).hook / macs_per_step(whole).hook
        assert abs(fewer.steps - cost) <= 0.5 and not fewer.caching
        assert cached.deepcache.full_steps == list(range(0, 100, n)) and cached.steps == 100
    full_steps = {name: arm.run.deepcache.full_steps for name, arm in arms.items() if arm.run.deepcache}
    assert len(full_steps["n5_centered"]) == len(full_steps["n5"]) and full_steps["n5_centered"] != full_steps["n5"]
    assert "--zero-cache" in arms["n10_zeroed"].command() and "--zero-cache" not in arms["n10"].command()
    assert {arm.name for arm in demo.plan(model, Given(), quick=True)} < set(arms)


def tiny(folder: Path, **changes: object) -> demo.Model:
    """A random DDPM, said to be trained on the shipped emoji."""
    sizes = {"resolution": 32, "in_channels": 3, "out_channels": 3, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1,
             "attn_resolutions": []} | changes
    torch.manual_seed(0)
    save_file(published_state_dict(UNet(**sizes)), folder / "tiny.safetensors")
    (folder / "tiny.yaml").write_text(yaml.safe_dump({
        "name": "ddpm_tiny", "unet": sizes, "diffusion": {"beta_schedule": "cosine"},
        "checkpoint": str(folder / "tiny.safetensors"), "train": {"group": "Smileys & Emotion"},
        "sampler": {"steps": 12, "timesteps": "trailing", "branch": 1}}))
    return demo.MODELS[0]._replace(config=folder / "tiny.yaml", title="A tiny DDPM", steps=12)


def test_demo_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "MODELS", (tiny(tmp_path),))
    monkeypatch.setattr(demo, "plan", lambda *args: [
        arm for arm in whole_plan(*args) if arm.name in ("uncached", "n5", "ddim10", "n10_zeroed")])

    out = tmp_path / "results" / "demo_quick"
    monkeypatch.setattr("sys.argv", ["demo", "--quick", "--images", "80", "--samples", str(tmp_path / "samples"),
                                     "--results", str(out)])
    demo.main()
    table = (out / "table.md").read_text()
    assert "A tiny DDPM" in table and "| N=5 | 3 / 12 |" in table and "Can the scores see what matters?" in table
    arm = results.read(out / "ddpm" / "n5.json")
    assert arm.full_steps == [0, 5, 10] and arm.images == 80
    assert arm.settings["cache"]["interval"] == 5 and arm.details["fidelity"]["images"] == 80
    assert {demo.FD, demo.KID, f"{demo.KID} minus uncached", "PSNR", "SSIM", "1 - cos, EffLite0"} <= arm.metrics.keys()
    uncached = results.read(out / "ddpm" / "uncached.json")
    assert uncached.metrics.keys() == {demo.FD, demo.KID} and len(uncached.details["quality"]["floors"]) == 2
    assert uncached.details["macs_per_image"]["macs"] == pytest.approx(12 * uncached.macs.macs)
    timing = results.read(out / "ddpm" / "timing.json")
    assert (timing.kind, timing.details["speedup"]["uncached"]) == ("throughput", 1)
    assert f"{timing.details['speedup']['n5']:.2f}x" in table
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


@pytest.mark.parametrize("model", demo.MODELS, ids=[model.name for model in demo.MODELS])
def test_the_table_is_that_of_the_results_that_are_kept(model):
    section = demo.section(model, demo.ROOT / "results" / "demo")
    assert section in (demo.ROOT / "results" / "demo" / "table.md").read_text()


def test_charts_show_a_metric_with_its_interval():
    arm = next(iter(demo.plan(demo.MODELS[0], Given(), quick=True)))
    found = demo.point(arm, Result("demo", metrics={demo.KID: results.Metric(0.2, [0.1, 0.4])},
                                   details={"macs_per_image": {"macs": 2e9, "macs_fc": 3e9}}))
    assert found[demo.KID] == pytest.approx([200, 100, 400]) and found["cost"] == 2 and "PSNR" not in found
