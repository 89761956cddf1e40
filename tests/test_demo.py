"""The demos: their arms, and runs of them on a tiny random model."""

import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import run_command
from safetensors.torch import save_file

from ddpm.checkpoint import published_state_dict
from ddpm.unet import UNet
from eval.cost.runs import macs_per_step
from eval.quality import FD, KID
from lab.study import demo, demo_report, demo_short
from lab.study.arms import Given
from lab.study.runner import in_this_process
from run import results
from run.results import Result
from unet_caching.errors import UserError


def test_arms_start_uncached_and_match_in_cost():
    model = demo.MODELS[0]
    arms = {arm.name: arm for arm in demo.plan(model, Given())}
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


def test_the_full_demo_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "MODELS", (tiny(tmp_path),))
    monkeypatch.setattr(demo, "others", lambda: ())        # whatever is fetched on this machine
    monkeypatch.setattr(demo, "plan", lambda *args: [
        arm for arm in whole_plan(*args) if arm.name in ("uncached", "n5", "ddim10", "n10_zeroed")])
    monkeypatch.setattr(demo, "time_steps", lambda arms, path, words: time_steps(arms, path, words, in_this_process))

    out = tmp_path / "results" / "demo"
    words = ("--full", "--images", "80", "--samples", tmp_path / "samples", "--results", out)
    assert run_command(demo_short.main, *words) == 0
    table = (out / "table.md").read_text()
    assert "A tiny DDPM" in table and "| N=5 | 3 / 12 |" in table and "Can the scores see what matters?" in table
    arm = results.read(out / "ddpm" / "n5.json")
    assert arm.full_steps == [0, 5, 10] and arm.images == 80
    assert arm.settings["cache"]["interval"] == 5 and arm.details["fidelity"]["images"] == 80
    assert {FD, KID, f"{KID} minus uncached", "PSNR", "SSIM", "1 - cos, EffLite0"} <= arm.metrics.keys()
    uncached = results.read(out / "ddpm" / "uncached.json")
    assert uncached.metrics.keys() == {FD, KID} and len(uncached.details["quality"]["floors"]) == 2
    assert uncached.details["macs_per_image"]["macs"] == pytest.approx(12 * uncached.macs.macs)
    timing = results.read(out / "ddpm" / "timing.json")
    assert (timing.kind, timing.details["speedup"]["uncached"]) == ("throughput", 1)
    assert f"{timing.details['speedup']['n5']:.2f}x" in table
    for picture in ("samples_ddpm.png", "cost_quality_ddpm.png"):
        assert (out / picture).stat().st_size > 1000
    assert (out / "index.html").read_text().count("data:image/webp") >= 4 * 8
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "samples").glob("**/*.png")}
    judged = {path: path.stat().st_mtime_ns for path in (out / "ddpm").glob("[nu]*.json")}
    assert len(before) == 4 * 80 and len(judged) == 3
    image = tmp_path / "samples" / "ddpm" / "n10_zeroed" / "000" / "000007.png"
    image.write_bytes((tmp_path / "samples" / "ddpm" / "n5" / "000" / "000008.png").read_bytes())
    assert run_command(demo_short.main, *words) == 0                # the other images and judgements are reused
    changed = {path.name for path, then in (before | judged).items() if path.stat().st_mtime_ns != then}
    assert changed == {"000007.png", "n10_zeroed.json"}
    capsys.readouterr()


whole_plan, time_steps = demo.plan, demo.time_steps


def test_arms_of_the_short_demo_cost_alike():
    for model in demo.MODELS:
        arms = demo_short.plan(model._replace(images=8, steps=50), Given())
        assert arms[0].style == "uncached" and demo_short.calls(arms[0]) == 50
        assert {"uniform", "forecast", "fewer steps"} <= {arm.style for arm in arms}
        for arm in arms:
            other = demo_short.rival(arm, arms)
            assert (other is None) == (arm.style in ("uncached", "fewer steps"))
            assert other is None or (other.style == "fewer steps"
                                     and demo_short.calls(other) == pytest.approx(demo_short.calls(arm), abs=0.5))
    assert set(demo_short.IMAGES) == {model.name for model in demo.MODELS}


def test_the_short_demo_can_be_read_when_it_is_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "MODELS", (tiny(tmp_path),))
    monkeypatch.setattr(demo_short, "STEPS", 12)
    judge, out = demo_short.judged, tmp_path / "results"
    words = ("--images", "8", "--samples", tmp_path / "samples", "--results", out)

    def stop_at_the_third(arm, *args, **options):
        if arm.style == "forecast":
            raise UserError("stopped here")
        return judge(arm, *args, **options)

    monkeypatch.setattr(demo_short, "judged", stop_at_the_third)
    assert run_command(demo_short.main, *words) == 2
    table, page = ((out / name).read_text() for name in ("table.md", "index.html"))
    assert "2 of 4 arms are still to come" in table and "2 of 4 arms are still to come" in page
    assert re.search(r"\| DeepCache, N=3 \| .*x \| - \| \d+\.\d \[", table) and "samples_ddpm.png" in os.listdir(out)
    monkeypatch.setattr(demo_short, "judged", judge)
    assert run_command(demo_short.main, *words) == 0
    said = capsys.readouterr().out
    table = (out / "table.md").read_text()
    assert "still to come" not in table and table.strip() in said
    assert re.search(r"At the cost of 6\.1 full calls, forecast, N=3: \d+\.\d dB ", table)
    assert re.search(r"\| forecast, N=3 \| 6\.1 \| \d\.\d\dx \| \d\.\d\dx \|", table)


def test_too_few_images_are_refused(capsys):
    assert run_command(demo_short.main, "--full", "--images", "10") == 2 and "80 or more" in capsys.readouterr().err
    assert run_command(demo_short.main, "--images", "2") == 2 and "8 or more" in capsys.readouterr().err


@pytest.mark.parametrize("model", demo.MODELS, ids=[model.name for model in demo.MODELS])
def test_the_table_is_that_of_the_results_that_are_kept(model):
    section = demo.section(model, demo.ROOT / "results" / "demo")
    assert section in (demo.ROOT / "results" / "demo" / "table.md").read_text()


def test_tables_have_the_distances_that_all_arms_were_judged_by():
    runs = demo.ROOT / "results" / "runs" / "ddpm_emoji"
    both, fewer = (results.read(runs / name) for name in ("unipc_steps13_256_sweep.json", "uniform_n2_64_sweep.json"))
    names = ["FD-EffLite0", "KID-EffLite0", "FD-IncMixed5", "KID-IncMixed5"]
    assert demo_report.distances_of([both, both]) == names
    assert demo_report.distances_of([both, fewer]) == ["KID-EffLite0"]          # of few images there is no FD
    told = demo_report.distances(both, names)
    assert told[3].startswith(f"{1e3 * both.metrics['KID-IncMixed5'].value:.1f} ± ")


def test_charts_show_a_metric_with_its_interval():
    arm = next(iter(demo.plan(demo.MODELS[0], Given())))
    found = demo.point(arm, Result("demo", metrics={KID: results.Metric(0.2, [0.1, 0.4])},
                                   details={"macs_per_image": {"macs": 2e9, "macs_fc": 3e9}}))
    assert found[KID] == pytest.approx([200, 100, 400]) and found["cost"] == 2 and "PSNR" not in found
