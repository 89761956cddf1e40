"""The comparison with diffusers and the PyPI package: same results, honest ratios. Never how long anything took."""

import shutil

import pytest
import torch
from conftest import HERE

from eval import throughput
from eval.cost.compare_speed import compare, peak_memory, report, whole_run
from eval.cost.macs import branch_macs
from run import results
from run.families import build, example_inputs, load_config, rows_per_image
from run.results import Result

CONFIGS = HERE.parent / "configs"


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["ddpm_emoji", "ldm_emoji", "sd_emoji"])
def test_all_sides_compute_the_same(one_thread, tmp_path, name):
    config = load_config(CONFIGS / f"{name}.yaml")
    found = compare(config, 1, config.sampler.branch, torch.float32, "eager", torch.device("cpu"), 1, 1)
    sides = found["sides"]
    assert sides.keys() == {"ours", "diffusers", "helper"} and "cached" not in sides["diffusers"]
    for side in sides.values():
        assert all(step["difference"] < 1e-5 for name, step in side.items() if name in ("full", "cached"))
    assert sides["ours"]["full"]["over_ours"] == sides["ours"]["cached"]["over_ours"] == 1
    assert len(found["runs"]) == 15 and found["peak"]["gflops"] > 0
    for side in sides.values():
        for step in (value for value in side.values() if isinstance(value, dict)):
            assert step["of_peak"] == pytest.approx(step["gflops"] / found["peak"]["gflops"])
    macs = branch_macs(build(config), example_inputs(config), [config.sampler.branch])[0].fc
    full = sides["ours"]["full"]
    assert full["gflops"] == pytest.approx(2e-9 * macs * rows_per_image(config) / full["median"])
    memory = found["memory"]
    assert memory["ours"]["run"] <= 1.02 * memory["ours"]["dense"] + memory["feature"]
    assert memory["ours"]["dense"] < memory["diffusers"]["dense"] and memory["ours"]["run"] < memory["helper"]["run"]


def test_peak_memory():
    def run() -> torch.Tensor:
        x = torch.ones(2**20)               # 4 MiB
        x = x + 1                           # 8
        del x
        return torch.ones(2**18)
    sizes = []
    for _ in range(3):
        kept = torch.ones(2**19)            # not of the run
        sizes.append(peak_memory(run, torch.device("cpu")))
        del kept
    assert sizes == pytest.approx([2**23] * 3, rel=0.01)


SIDES = {"ours": {"full": {"median": 2.0, "over_ours": 1.0}, "cached": {"over_ours": 1.0}, "cached_over_full": 0.25},
         "diffusers": {"full": {"median": 4.0, "over_ours": 2.0}},
         "helper": {"full": {"median": 4.0, "over_ours": 2.0}, "cached": {"over_ours": 4.0}, "cached_over_full": 0.5}}
EXPECTED = {"macs": 0.25, "macs_fc": 0.2}


def test_whole_run():
    run = whole_run(SIDES, EXPECTED, 3, steps=50, interval=5)           # 10 full steps, 40 cached ones
    assert run["images_per_second"] == pytest.approx({"ours": 3 / 40, "helper": 3 / 120})
    assert run["speedup"] == pytest.approx({"ours": 2.5, "helper": 50 / 30, "macs": 2.5, "macs_fc": 50 / 18})
    dense = whole_run(SIDES, EXPECTED, 3, steps=50, interval=1)
    assert dense["images_per_second"] == pytest.approx({"ours": 3 / 100, "diffusers": 3 / 200, "helper": 3 / 200})


def test_report_and_settings_that_are_there(monkeypatch, capsys, tmp_path):
    settings: dict = {"batch_size": 3, "dtype": "fp32", "mode": "eager"}
    found = {"sides": SIDES, "expected": EXPECTED,
             "memory": {"feature": 1e6, "ours": {"dense": 2e7, "run": 2.1e7}, "diffusers": {"dense": 2.2e7},
                        "helper": {"run": 3e7}},
             "runs": [whole_run(SIDES, EXPECTED, 3, steps, interval)
                      for steps in (50, 100, 250) for interval in (1, 2, 3, 5, 10)]}
    path = tmp_path / "ddpm_emoji_b3_fp32_eager_cpu.json"
    results.write(path, Result("compare_speed", "ddpm_emoji", settings, throughput=found))
    rows = report(tmp_path).splitlines()
    assert rows[2] == "| ddpm_emoji | 3 | fp32 | eager | 2 | 0.250 | 0.250 | 0.200 | 2.50 | 2.78 | 2.00 | 4.00 | 3.00 |"
    assert rows[-1] == "| ddpm_emoji | 3 | fp32 | 20.0 | 21.0 | 1.0 | 22.0 | 30.0 |"
    sides = {"ours": {"full": {**SIDES["ours"]["full"], "of_peak": 0.9}, "cached": {"over_ours": 1.0, "of_peak": 0.8},
                      "cached_over_full": 0.25}, "diffusers": {"full": {"over_ours": 2.0, "of_peak": 0.45}}}
    where = {"device": "cpu", "device_name": "AMD EPYC", "processor": {"family": 25, "model": 17, "used": "AVX512"}}
    of_peak = Result("compare_speed", "ddpm_emoji", settings, throughput={
        **found, "sides": {**SIDES, **sides}, "peak": {"gflops": 113.2}}, provenance=where)
    results.write(tmp_path / "sub" / path.name, of_peak)
    row = "| AMD EPYC, family 25 model 17, AVX512 | ddpm_emoji | 3 | fp32 | eager | 113 | 90 % | 80 % | 45 % | - |"
    assert report(tmp_path / "sub").splitlines()[-1] == row
    shutil.rmtree(tmp_path / "sub")
    without = {**found, "memory": {}, "sides": {side: SIDES[side] for side in ("ours", "diffusers")}}
    without["runs"] = [whole_run(without["sides"], EXPECTED, 3, 50, interval) for interval in (1, 2, 3, 5, 10)]
    results.write(path, Result("compare_speed", "ddpm_emoji", settings, throughput=without))
    monkeypatch.setattr("sys.argv", ["x", "compare", "--model", "ddpm_emoji", "--batch-size", "3", "--dtype", "fp32",
                                     "--device", "cpu", "--out", str(tmp_path)])
    throughput.main()                                                # measures nothing again
    assert capsys.readouterr().out.splitlines()[3].endswith("| 2.00 | - | - |")
    assert {file.name for file in tmp_path.iterdir()} == {path.name, "table.md", "chart.png"}


@pytest.mark.parametrize("args", ["--repeats 0", "--batch-size 0", "--model nowhere", "--device meta", "--threads 0",
                                  "--mode graphs --device cpu", "--model sdxl --resolution 500",
                                  "--resolution 64"])
def test_bad_input(monkeypatch, capsys, tmp_path, args):
    monkeypatch.setattr("sys.argv", ["eval.throughput", "compare", *args.split(), "--out", str(tmp_path / "x")])
    with pytest.raises(SystemExit) as stop:
        throughput.main()
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "x").exists()
