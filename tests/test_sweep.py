"""Sweeps: their points, what is refused, and whole runs of them on a tiny random model."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from ddpm.checkpoint import published_state_dict
from ddpm.unet import UNet
from eval.tables import rows
from lab.study import plan, runner, sweep, sweep_report
from run.spec import RunSpec
from unet_caching.errors import UserError

SIZES = {"resolution": 32, "in_channels": 3, "out_channels": 3, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1,
         "attn_resolutions": []}
READY = sorted(Path(sweep.ROOT / "configs" / "sweeps").glob("*.yaml"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """The config of a DDPM with 4 branches that draws 4 steps, said to be trained on the smallest group."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    save_file(published_state_dict(UNet(**SIZES)), folder / "tiny.safetensors")
    config = {"name": "ddpm_tiny", "unet": SIZES, "diffusion": {"beta_schedule": "cosine", "prediction": "v"},
              "checkpoint": str(folder / "tiny.safetensors"), "train": {"group": "Flags"},
              "sampler": {"steps": 4, "timesteps": "trailing", "branch": 1}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    return folder / "tiny.yaml"


def written(folder: Path, content: dict) -> Path:
    path = folder / "some.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def points_of(path: Path, *flags: str) -> list:
    parser = sweep.argparse.ArgumentParser()
    plan.add_options(parser)
    return sweep.make_points(sweep.read_sweep(path), path, plan.given_by(parser.parse_args(flags)))


def call(monkeypatch, *words: object) -> None:
    monkeypatch.setattr("sys.argv", ["sweep", *map(str, words)])
    sweep.main()


def test_points_are_every_combination_once(tmp_path, tiny):
    path = written(tmp_path, {"images": 5, "grids": [
        {"model": [str(tiny), "ldm_emoji"], "interval": [1, 2], "branch": "all"},
        {"model": str(tiny), "interval": 2, "branch": [1, 2]},
        {"model": str(tiny), "steps": [4, 2], "interval": 1}]})
    points = points_of(path)
    names = {model: [arm.folder.name for arm in points if arm.run.config.name == model]
             for model in ("ddpm_tiny", "ldm_emoji")}
    assert names["ddpm_tiny"] == ["uncached", "uniform_n2_branch0", "uniform_n2", "uniform_n2_branch2",
                                  "uniform_n2_branch3", "steps2"]
    assert len(names["ldm_emoji"]) == 1 + RunSpec.of("configs/ldm_emoji.yaml").open().unet.num_branches
    assert all(arm.images == 5 for arm in points) and len(points) == sum(map(len, names.values()))


def test_every_option_of_a_registered_method_is_an_axis(tmp_path, tiny):
    path = written(tmp_path, {"images": 5, "grids": [
        {"model": str(tiny), "interval": 2, "forecast": [0, 1], "forecast_damping": [1, 0.5]},
        {"model": str(tiny), "interval": 2, "zero_cache": True}]})
    with pytest.raises(UserError, match=r"forecast 0, forecast_damping 0.5.*--forecast-damping needs"):
        points_of(path)
    path = written(tmp_path, {"images": 5, "grids": [
        {"model": str(tiny), "interval": 2, "forecast": 1, "forecast_damping": [1, 0.5]},
        {"model": str(tiny), "interval": 2, "zero_cache": True, "branch": [0, 1]}]})
    points = points_of(path)
    assert [arm.name for arm in points] == ["uncached", "uniform_n2_forecast1", "uniform_n2_forecast1_damped0.5",
                                            "uniform_n2_branch0_zeroed", "uniform_n2_zeroed"]
    assert sweep_report.axes_of(points[2].run)["forecast_damping"] == 0.5
    # A run whose time is not that of full and cached steps is timed by itself.
    names = [file.name for file in runner.times_paths(tmp_path / "times.json", points)]
    assert names == ["times.json", "times_uniform_n2_forecast1.json",
                     "times_uniform_n2_forecast1_damped0.5.json"]


def test_uncached_run_has_the_first_steps_and_sampler(tmp_path, tiny):
    path = written(tmp_path, {"images": 5, "grids": [{"model": str(tiny), "steps": [3, 2], "interval": 2,
                                                      "sampler": "dpmpp"}]})
    first, *others = points_of(path)
    assert (first.run.steps, first.run.sampler.name, bool(first.run.caching)) == (3, "dpmpp", False)
    assert [arm.run.steps for arm in others] == [3, 2]


GRID = {"model": "ddpm_emoji", "interval": 5}


@pytest.mark.parametrize("content, message", [
    ({"grids": [GRID | {"brnach": 2}]}, "grid 1 has no axis 'brnach': is it branch?"),
    ({"grids": [GRID, GRID | {"branch": 12}]}, r"grid 2, .*ddpm_emoji.*branch 12.*: --branch must be from 0 to 11"),
    ({"grids": [{"model": ["ddpm_emoji", "ldm_emoji"], "interval": 5, "branch": [2, 10]}]},
     r"ldm_emoji.*branch 10.*: --branch must be from 0 to 8"),
    ({"grids": [GRID | {"center": 3}]}, "takes no center"),
    ({"grids": [GRID | {"schedule": "centered", "center": 120, "power": 1.2}]}, "center must be a step from 0 to 99"),
    ({"grids": [GRID | {"schedule": "centred"}]}, "schedule has no 'centred'"),
    ({"grids": [GRID | {"sampler": "plsm"}]}, "sampler has no 'plsm'"),
    ({"grids": [GRID | {"interval": 101}]}, "interval must be"),
    ({"grids": [GRID | {"interval": "five"}]}, "interval takes whole numbers, got 'five'"),
    ({"grids": [GRID | {"interval": []}]}, "interval has no values"),
    ({"grids": [GRID | {"forecast": True}]}, "forecast takes whole numbers, got True"),
    ({"grids": [GRID | {"zero_cache": 1}]}, "zero_cache takes true or false, got 1"),
    ({"grids": [{"model": "ddpm_emoij"}]}, "no model 'ddpm_emoij': there are ddpm_bedroom"),
    ({"grids": [{"interval": 5}]}, "names no model"),
    ({"grids": [{"model": "sd_emoji", "interval": 5}]}, "say prompts: FILE"),
    ({"grids": [{"model": "sd_emoji"}], "prompts": "data/emoji/prompts.txt", "images": 100}, "images_per_prompt of 2"),
    ({"grids": [GRID], "imgaes": 3}, "imgaes"),
    ({"grids": [GRID], "dtype": "fp8"}, "dtype must be one of fp32"),
    ({"grids": [GRID], "images": 2}, "images must be 3 or more"),
    ({"grids": [GRID], "extractors": ["inception"]}, "no 'inception': beside EffLite0 there is incmixed5"),
    ({"grids": []}, "grids is empty"),
    ({}, "it has no grids"),
])
def test_bad_sweeps_are_refused_in_one_line(tmp_path, monkeypatch, capsys, content, message):
    path = written(tmp_path, {"images": 90} | content)
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, "--config", path, "--samples", tmp_path / "samples", "--results", tmp_path / "results")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(message, error) and error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["some.yaml"]


def test_block_schedule_of_another_model_is_refused(tmp_path, monkeypatch, capsys):
    from unet_caching.methods.block_caching import BlockSchedule
    made_for = RunSpec.of("ldm_emoji").open().made_for("0")
    BlockSchedule(made_for, 50, "all", 0.5, {"mid": [0]}, {}, {}).save(tmp_path / "other.json")
    path = written(tmp_path, {"images": 90, "grids": [{"model": "ddpm_emoji",
                                                       "block_schedule": str(tmp_path / "other.json")}]})
    with pytest.raises(SystemExit):
        call(monkeypatch, "--config", path, "--samples", tmp_path / "samples", "--list")
    assert "made for another run: model ldm_emoji there, ddpm_emoji here" in capsys.readouterr().err


@pytest.mark.parametrize("share", ["0/2", "3/2", "1", "a/b"])
def test_bad_shares_are_refused(tmp_path, monkeypatch, capsys, share):
    path = written(tmp_path, {"images": 90, "grids": [{"model": "ddpm_emoji"}]})
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, "--config", path, "--share", share, "--samples", tmp_path / "samples")
    assert stop.value.code == 2 and "INDEX/COUNT" in capsys.readouterr().err


def test_shares_are_all_points_once():
    points = list(range(10))
    assert sorted(arm for i in (1, 2, 3) for arm in sweep.share_of(points, f"{i}/3")) == points


@pytest.mark.parametrize("path", READY, ids=[path.stem for path in READY])
def test_ready_sweeps_can_be_planned(path):
    points = points_of(path)
    assert len(points) > 1 and not points[0].run.caching
    branches = {arm.run.deepcache.branch for arm in points if arm.run.deepcache}
    if "branch" in path.stem:
        assert branches == set(range(points[0].run.unet.num_branches))


def test_papers_numbers_stand_beside_the_points_they_are_of():
    points = points_of(sweep.ROOT / "configs" / "sweeps" / "table12_branch.yaml")
    printed = [rows.printed_values("ddpm_cifar10").get(arm.folder.name, []) for arm in points]
    fid = [next(numbers["fid"] for table, _, numbers in point if table.name == "table12") for point in printed[1:]]
    assert fid == [7.14, 5.94, 5.73, 5.69, 5.51, 4.93, 4.92, 4.76, 4.54, 4.57, 4.52, 4.48]
    assert any(table.name == "table2" and numbers["fid"] == 5.73 for table, _, numbers in printed[3])


def test_front():
    points = [(3, 1.0), (1, 5.0), (2, 2.0), (2, 2.5), (4, 1.0), (1, 5.0)]
    assert sweep_report.front(points, higher=False) == [0, 1, 2, 5]         # equals do not beat each other
    assert sweep_report.front(points, higher=True) == [1, 5]


def metrics_of(folder: Path) -> dict[str, dict]:
    return {path.name: json.loads(path.read_text())["metrics"] for path in folder.glob("runs/ddpm_tiny/*_sweep.json")}


def other_weights(folder: Path, tiny: Path) -> Path:
    """Other weights of the tiny model."""
    path = folder / "other.safetensors"
    save_file({name: 2 * value for name, value in load_file(tiny.with_suffix(".safetensors")).items()}, path)
    return path


def test_sweep_end_to_end(tmp_path, monkeypatch, capsys, tiny):
    path = written(tmp_path, {"images": 6, "grids": [{"model": str(tiny), "interval": [2, 4], "branch": [0, 1]}]})

    def run(name: str, *flags: str) -> tuple[str, Path]:
        folders = ["--samples", tmp_path / name / "samples", "--results", tmp_path / name / "results"]
        call(monkeypatch, "--config", path, *folders, "--threads", "1", "--device", "cpu", "--batch-size", "4", *flags)
        return capsys.readouterr().out, tmp_path / name / "results"

    said, results = run("whole")
    out = results / "sweeps" / "some"
    assert "5 of 5 points are judged" in said and "are few" in said
    with open(out / "points.csv") as file:
        points = list(csv.DictReader(file))
    assert [(row["interval"], row["branch"]) for row in points] == [("1", ""), ("2", "0"), ("2", "1"), ("4", "0"),
                                                                  ("4", "1")]
    assert float(points[0]["speed-up measured"]) == float(points[0]["speed-up by MACs"]) == 1
    assert all(float(row["PSNR"]) > 5 and float(row["speed-up measured"]) > 0 for row in points[1:])
    assert points[0]["KID-EffLite0 minus uncached"] == "" != points[1]["KID-EffLite0 minus uncached"]
    assert any(row["front of KID-EffLite0 by MACs"] == "1" for row in points)
    for picture in ("fronts_ddpm_tiny.png", "interval_branch_ddpm_tiny.png"):
        assert (out / picture).stat().st_size > 5000
    page = (out / "index.html").read_text()
    assert said.endswith(f"to look at: {out / 'index.html'}\n") and "python -m ddpm.sample --config" in page
    assert page.count("data:image/webp") == 5 * 6 and "N=2 b1" in page and page.count('class="mark"') > 10

    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "whole").rglob("*.png") if "samples" in str(file)}
    judged = {file: file.stat().st_mtime_ns for file in results.glob("runs/**/*.json")}
    assert len(before) == 30 and len(judged) == 5
    (tmp_path / "whole" / "samples" / "ddpm_tiny" / "uniform_n4" / "000" / "000003.png").unlink()
    next(results.glob("runs/ddpm_tiny/uniform_n2_6_sweep.json")).unlink()
    again, _ = run("whole")                                     # what is missing, and nothing else
    assert "uniform_n2: 6 images asked for, 0 made now" in again and "5 of 5" in again
    assert sum(file.stat().st_mtime_ns != at for file, at in before.items() if file.exists()) == 0
    assert sum(file.stat().st_mtime_ns != at for file, at in judged.items()) == 1

    # Other weights: nothing that was judged is of them, and the images in the folder are not either.
    other, _ = run("whole", "--list", "--checkpoint", str(other_weights(tmp_path, tiny)))
    assert other.count("sampled with other weights than") == 5
    with pytest.raises(SystemExit) as stop:
        run("whole", "--checkpoint", str(tmp_path / "other.safetensors"))
    assert stop.value.code == 2 and "holds images of other settings (checkpoint_sha256" in capsys.readouterr().err

    listed, _ = run("shared", "--list")
    assert "0 of 6" in listed and not (tmp_path / "shared").exists()
    run("shared", "--share", "2/2")
    assert not metrics_of(tmp_path / "shared" / "results")      # the uncached images are the other share's
    run("shared", "--share", "1/2")
    assert not (tmp_path / "shared" / "results" / "sweeps").exists()
    drawn, _ = run("shared", "--render")
    assert "3 of 5 points are judged" in drawn
    shutil.copy(out / "times_ddpm_tiny.json", tmp_path / "shared" / "results" / "sweeps" / "some")
    run("shared")
    assert metrics_of(tmp_path / "shared" / "results") == metrics_of(results)


def test_the_error_to_a_converged_run_is_a_column(tmp_path, tiny, monkeypatch, capsys):
    """Two steps are far from four, which are the same as eight where a run of eight moves the error by 5 % at most."""
    path = written(tmp_path, {"images": 4, "converged": {"sampler": "dpmpp", "steps": 60},
                              "grids": [{"model": str(tiny), "steps": 4, "interval": [1, 2]}]})
    words = ["--config", path, "--samples", tmp_path / "s", "--results", tmp_path / "r", "--threads", 1,
             "--device", "cpu"]
    monkeypatch.setattr(sweep, "measure_times", lambda *_: None)
    call(monkeypatch, *words)
    folders = {one.name for one in (tmp_path / "s" / "ddpm_tiny").iterdir() if one.is_dir()}
    assert {"dpmpp_steps60", "dpmpp_steps120", "uncached", "uniform_n2"} <= folders
    results_of = tmp_path / "r" / "runs" / "ddpm_tiny"
    found = json.loads((results_of / "uniform_n2_4_sweep.json").read_text())
    by = found["details"]["convergence"]
    x, near, far = (np.stack([np.asarray(Image.open(tmp_path / "s" / "ddpm_tiny" / name / "000" / f"{i:06}.png"), float)
                              for i in range(4)]) for name in ("uniform_n2", "dpmpp_steps60", "dpmpp_steps120"))
    errors = [np.sqrt(np.square(x - other).mean((1, 2, 3))).mean() for other in (near, far)]
    assert by["mean"] == pytest.approx(errors[0]) and by["moved"] == pytest.approx(abs(errors[0] / errors[1] - 1))
    assert by["converged"] and found["metrics"]["RMSE to converged"]["value"] == pytest.approx(errors[0])
    assert "RMSE to converged" in (tmp_path / "r" / "sweeps" / "some" / "table.md").read_text()

    # Another converged run, or another image of it: judged again.
    assert "2 of 2 points" in capsys.readouterr().out
    call(monkeypatch, *words, "--list")
    assert capsys.readouterr().out.count(" yes") == 2
    one = tmp_path / "s" / "ddpm_tiny" / "dpmpp_steps60" / "000" / "000001.png"
    before = one.read_bytes()
    shutil.copy(one.with_name("000002.png"), one)
    call(monkeypatch, *words, "--list")
    assert capsys.readouterr().out.count("not those that were judged") == 2
    one.write_bytes(before)
    path.write_text(path.read_text().replace("steps: 60", "steps: 30"))
    call(monkeypatch, *words, "--list")
    assert capsys.readouterr().out.count("not compared with dpmpp_steps30") == 2


def test_a_run_that_is_not_converged_gives_no_number(tmp_path, tiny, monkeypatch):
    path = written(tmp_path, {"images": 4, "converged": {"sampler": "dpmpp", "steps": 3},
                              "grids": [{"model": str(tiny), "sampler": "dpmpp", "steps": 3, "interval": [1, 2]}]})
    monkeypatch.setattr(sweep, "measure_times", lambda *_: None)
    call(monkeypatch, "--config", path, "--samples", tmp_path / "s", "--results", tmp_path / "r", "--threads", 1,
         "--device", "cpu")
    found = json.loads((tmp_path / "r" / "runs" / "ddpm_tiny" / "dpmpp_steps3_4_sweep.json").read_text())
    assert not found["details"]["convergence"]["converged"] and "RMSE to converged" not in found["metrics"]


@pytest.mark.parametrize("converged, message", [
    ({"steps": 60, "interval": 2}, "has no option 'interval': .*sampler, steps, timesteps, eta"),
    ({"sampler": "dpmpp"}, "converged says no steps"), ({"steps": "many"}, "steps takes whole numbers"),
    ({"steps": 600}, "converged, ddpm_tiny"), ({"sampler": "ddim", "steps": 10, "eta": 1.0}, "eta 1.0")])
def test_converged_runs_that_cannot_be(tmp_path, tiny, converged, message):
    path = written(tmp_path, {"images": 4, "converged": converged, "grids": [{"model": str(tiny), "interval": 2}]})
    with pytest.raises(UserError, match=message):
        points_of(path)
