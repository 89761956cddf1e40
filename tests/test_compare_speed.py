"""The comparison with diffusers and the PyPI package: same results, honest ratios. Never how long anything took."""

import pytest
import torch
from conftest import run_command

from eval import throughput
from eval.compare_speed import compare, full_calls, peak_memory
from run import results
from run.families import load_config
from run.files import ROOT
from run.results import Result


@pytest.mark.parametrize("name", ["ddpm_emoji", "ldm_emoji", "sd_emoji"])
def test_all_sides_compute_the_same(name):
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    found = compare(config, 1, config.sampler.branch, torch.float32, "eager", torch.device("cpu"), 1, 1)
    sides = found["sides"]
    assert sides.keys() == {"ours", "diffusers", "helper"} and "cached" not in sides["diffusers"]
    for side in sides.values():
        assert all(step["difference"] < 1e-5 for name, step in side.items() if name in ("full", "cached"))
    assert sides["ours"]["full"]["over_ours"] == sides["ours"]["cached"]["over_ours"] == 1
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


def test_report_and_settings_that_are_there(capsys, tmp_path):
    """10 of 50 steps are full; a side that was not measured has a dash, and what is there is not measured again."""
    assert full_calls(0.25) == 10 + 40 * 0.25
    full = {"ours": {"median": 2.0, "over_ours": 1.0}, "diffusers": {"median": 4.0, "over_ours": 2.0}}
    sides = {"ours": {"full": full["ours"], "cached": {"over_ours": 1.0}, "cached_over_full": 0.25},
             "diffusers": {"full": full["diffusers"]},
             "helper": {"full": full["diffusers"], "cached": {"over_ours": 4.0}, "cached_over_full": 0.5}}
    memory = {"feature": 1e6, "ours": {"dense": 2e7, "run": 2.1e7}, "diffusers": {"dense": 2.2e7},
              "helper": {"run": 3e7}}

    def table(**found: dict) -> list[str]:
        path = tmp_path / "ddpm_emoji_b3_fp32_eager_cpu.json"
        results.write(path, Result("compare_speed", "ddpm_emoji", {"batch_size": 3, "dtype": "fp32", "mode": "eager"},
                                   throughput={"expected": {"macs": 0.25, "macs_fc": 0.2}, **found}))
        assert run_command(throughput.main, "compare", "--model", "ddpm_emoji", "--batch-size", 3, "--dtype", "fp32",
                           "--device", "cpu", "--out", tmp_path) == 0
        assert {file.name for file in tmp_path.iterdir()} == {path.name, "table.md"}
        return capsys.readouterr().out.splitlines()[1:]

    rows = table(sides=sides, memory=memory)
    assert rows[2] == "| ddpm_emoji | 3 | fp32 | eager | 2 | 0.250 | 0.250 | 0.200 | 2.50 | 2.78 | 2.00 | 4.00 | 3.00 |"
    assert rows[-1] == "| ddpm_emoji | 3 | fp32 | 20.0 | 21.0 | 1.0 | 22.0 | 30.0 |"
    del sides["helper"]
    assert table(sides=sides, memory={})[2].endswith("| 2.00 | - | - |")


@pytest.mark.parametrize("words", ["--repeats 0", "--batch-size 0", "--model nowhere", "--device meta", "--threads 0",
                                   "--mode graphs --device cpu", "--model sdxl --resolution 500", "--resolution 64"])
def test_bad_input(capsys, tmp_path, words):
    assert run_command(throughput.main, "compare", *words.split(), "--out", tmp_path / "x") == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "x").exists()
