"""Timing: what runs how often and what is reported. Never how long anything took."""

import math

import pytest
import torch
from conftest import HERE

from ddpm.unet import UNet
from eval import throughput
from eval.cost.macs import branch_macs, run_macs
from eval.cost.timing import Timing, interleave, measure, measure_schedules, reused_sets, time_steps
from run import results
from run.families import at_resolution, build, example_inputs, load_config
from run.files import ROOT
from unet_caching.errors import UserError
from unet_caching.files.block_schedule import BlockSchedule
from unet_caching.methods.block_cache import BlockCache, residual_names
from unet_caching.methods.deepcache import DeepCache

CONFIGS = HERE.parent / "configs"
RHYTHM = CONFIGS / "block_schedules" / "sd_v15_ddim_20_rhythm.json"      # of another model


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny layers on two threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny():
    unet = UNet(resolution=8, in_channels=3, out_channels=3, ch=32, ch_mult=[1, 2], num_res_blocks=1,
                attn_resolutions=[4]).eval().requires_grad_(False)
    return unet, (torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.long))


def test_variants_take_turns():
    calls = []
    timings = interleave({name: lambda name=name: calls.append(name) for name in "abc"}, "cpu", repeats=4, warmup=2)
    assert "".join(calls) == "abc" * 6
    assert [len(timings[name].seconds) for name in "abc"] == [4, 4, 4]
    assert all(second >= 0 for timing in timings.values() for second in timing.seconds)


@pytest.mark.parametrize("rounds", [dict(repeats=0), dict(warmup=0), dict(repeats=-1)])
def test_no_rounds_is_an_error(rounds):
    with pytest.raises(ValueError, match="round"):
        interleave({"a": lambda: None}, "cpu", **rounds)


def test_ratio_is_taken_round_by_round():
    busy = Timing([1.0, 10.0, 1.0, 1.0])          # the second round ran on a busy machine
    assert Timing([0.5, 5.0, 0.4, 0.6]).ratio(busy) == 0.5
    assert busy.median == 1.0


def test_each_variant_runs_its_own_blocks(tiny):
    unet, inputs = tiny
    ran = [0] * unet.num_branches
    for k, block in enumerate(unet.input_blocks):
        def record(*_, k=k):
            ran[k] += 1
        block.register_forward_hook(record)
    timings = time_steps(unet, inputs, {"one": DeepCache(1, [0]), "three": DeepCache(3, [0])}, repeats=3, warmup=1)
    assert list(timings) == ["full", "one", "three"]
    # Two fill the caches; then 4 rounds: full runs all 4 input blocks, branch 1 the first 2, branch 3 all.
    assert ran == [2 + 4 * 3, 2 + 4 * 3, 2 + 4 * 2, 2 + 4 * 2]
    assert {len(timing.seconds) for timing in timings.values()} == {3}


def test_measure_is_consistent(tiny):
    unet, inputs = tiny
    result = measure(unet, inputs, [1, 0], [2, 3], num_steps=10, repeats=3, warmup=1)
    full = result["full"]
    assert full["images_per_second"] == pytest.approx(2 / (10 * full["median"]))
    assert [row["branch"] for row in result["branches"]] == [1, 0]
    assert result["branches"][0]["feature_bytes"] == 2 * 64 * 8 * 8 * 4     # batch, channels, upsampled to 8x8, fp32
    for row in (full, *result["branches"]):
        assert len(row["rounds"]) == 3 and row["min"] <= row["quartiles"][0] <= row["median"] <= row["quartiles"][1]
    for row in result["branches"]:
        assert 0 < row["macs_ratio"] == row["macs"] / full["macs"] < 1
        assert 0 < row["macs_fc_ratio"] == row["macs_fc"] / full["macs_fc"] < 1
    assert [(run["branch"], run["interval"], run["full_steps"]) for run in result["runs"]] \
        == [(1, 2, 5), (1, 3, 4), (0, 2, 5), (0, 3, 4)]
    run, cached = result["runs"][1], result["branches"][0]
    assert run["images_per_second"] == pytest.approx(2 / (4 * full["median"] + 6 * cached["median"]))
    assert run["speedup"] == pytest.approx(10 / (4 + 6 * cached["ratio"]))
    assert run["macs"] == (4 * full["macs"] + 6 * cached["macs"]) / 10


def test_forecasts_are_timed_beside_reuse(tiny):
    """They cost no MACs, and one more feature for each order."""
    unet, inputs = tiny
    result = measure(unet, inputs, [0, 2], [3], num_steps=10, repeats=2, warmup=1, orders=[0, 1, 2])
    kinds = [(row["branch"], row["forecast"]) for row in result["branches"]]
    assert kinds == [(branch, order) for branch in (0, 2) for order in (0, 1, 2)]
    assert kinds == [(run["branch"], run["forecast"]) for run in result["runs"]]
    reuse, first, second = result["branches"][3:]
    assert reuse["macs"] == first["macs"] == second["macs"]
    weights = [row["feature_bytes"] - (1 + row["forecast"]) * reuse["feature_bytes"] for row in (first, second)]
    assert weights == [4, 8]                    # one number per order
    with pytest.raises(UserError, match="order"):
        measure(unet, inputs, [0], [3], num_steps=10, orders=[-1])


def test_block_caching_is_timed_by_the_sets_that_its_steps_reuse(tiny):
    unet, inputs = tiny
    names = residual_names(unet, "all")
    blocks = {name: [0, 3] if i % 2 else [0, 2, 3] for i, name in enumerate(names)}
    schedule = BlockSchedule({"sampler": "ddim", "steps": 5}, 5, "all", None, blocks, {}, {}, {})
    assert [(len(one.names), one.steps) for one in reused_sets(schedule)] \
        == [(0, 2), (len(names), 2), (len(names) // 2, 1)]
    result = measure_schedules(unet, inputs, {"one": schedule}, repeats=3, warmup=1)
    plain, adjusted = result["schedules"]
    assert (plain["scale_shift"], adjusted["scale_shift"]) == (False, True)
    for run in (plain, adjusted):
        assert run["sha256"] == schedule.sha256 and run["sets"][0] == {"reused": 0, "steps": 2, "ratio": 1.0}
        assert run["speedup"] == pytest.approx(5 / sum(one["steps"] * one["ratio"] for one in run["sets"]))
        assert run["images_per_second"] == pytest.approx(2 / run["seconds"])
        counted = run_macs(unet, [value[:1] for value in inputs], BlockCache(blocks), 5)
        assert (run["macs"], run["macs_fc"]) == pytest.approx(counted)


def run(monkeypatch, *args: str) -> None:
    monkeypatch.setattr("sys.argv", ["eval.throughput", "--config", str(CONFIGS / "ddpm_emoji.yaml"), *args])
    throughput.main()


def test_command_writes_all_it_knows(monkeypatch, capsys, tmp_path):
    out = tmp_path / "results" / "emoji.json"
    run(monkeypatch, "--branch", "1", "11", "1", "--batch-size", "1", "--repeats", "2", "--warmup", "1", "--steps", "7",
        "--interval", "3", "--dtype", "bf16", "--device", "cpu", "--out", str(out))
    result = results.read(out)
    assert (result.kind, result.model) == ("throughput", "ddpm_emoji")
    assert result.settings == {"batch_size": 1, "rows": 1, "dtype": "bf16", "repeats": 2, "warmup": 1,
                               "weights": "random"}
    assert result.provenance.keys() >= {"commit", "versions", "device", "device_name", "threads"}
    assert [row["branch"] for row in result.throughput["branches"]] == [1, 11]
    runs = result.throughput["runs"]
    assert [(row["branch"], row["interval"], row["full_steps"], row["steps"]) for row in runs] \
        == [(1, 3, 3, 7), (11, 3, 3, 7)]
    assert all(math.isfinite(row[key]) and row[key] > 0 for row in runs
               for key in ("images_per_second", "speedup", "macs", "macs_fc", "macs_speedup"))
    printed = capsys.readouterr().out
    assert "batch 1, bf16, cpu" in printed and "branch 11, N = 3" in printed
    assert [path.name for path in out.parent.iterdir()] == ["emoji.json"]


@pytest.mark.parametrize("args", ["--branch 12", "--branch 1 -1", "--interval 0", "--interval 2 101", "--steps 0",
                                  "--repeats 0", "--warmup 0", "--batch-size 0", "--threads 0", "--device abacus",
                                  "--device cuda:99", "--device meta", "--config nowhere.yaml",
                                  "--checkpoint nowhere.ckpt", "--block-schedule nowhere.json",
                                  f"--block-schedule {RHYTHM}"])
def test_command_refuses_bad_input(monkeypatch, capsys, tmp_path, args):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *args.split(), "--out", str(tmp_path / "x.json"))
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "x.json").exists()


def test_sizes_are_those_asked_for(monkeypatch, capsys, tmp_path):
    out = tmp_path / "x.json"
    monkeypatch.setattr("sys.argv", ["x", "--config", str(CONFIGS / "sd_emoji.yaml"), "--resolution", "64", "--repeats",
                                     "1", "--batch-size", "1", "--device", "cpu", "--out", str(out)])
    throughput.main()
    config = at_resolution(load_config(CONFIGS / "sd_emoji.yaml"), 64)
    found = results.read(out)
    full = branch_macs(build(config), example_inputs(config), [0])[0]
    assert found.settings["resolution"] == 64 and found.times["full"]["macs_fc"] == full.fc
    with pytest.raises(UserError, match="multiple of 8 pixels, got 36"):
        at_resolution(config, 36)
    with pytest.raises(UserError, match="made for images of 32 pixels alone"):
        at_resolution(load_config(CONFIGS / "ddpm_emoji.yaml"), 64)


def test_a_grid_has_exact_macs_of_every_branch_and_the_times_that_were_measured(monkeypatch, capsys, tmp_path):
    path = tmp_path / "x.json"
    monkeypatch.setattr("sys.argv", ["x", "--config", str(CONFIGS / "sd_emoji.yaml"), "--repeats", "1", "--steps", "6",
                                     "--branch", "1", "--forecast", "0", "1", "--interval", "2", "3", "--batch-size",
                                     "1", "--device", "cpu", "--out", str(path)])
    throughput.main()
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["x", "grid", str(path)])
    throughput.main()
    head, _, *lines = (line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines())
    config, times = load_config(CONFIGS / "sd_emoji.yaml"), results.read(path).times
    unet = build(config)
    full, cached = branch_macs(unet, example_inputs(config), range(unet.num_branches))
    assert [int(line[0]) for line in lines] == list(cached) and head[-1] == "N = 3: macs_fc, reuse, order 1"
    for branch, line in enumerate(lines):
        assert line[1:4] == [f"{cached[branch].hook / 1e9:.2f}", f"{cached[branch].hook / full.hook:.3f}",
                             f"{cached[branch].fc / full.fc:.3f}"]
        expected = f"{3 * full.fc / (full.fc + 2 * cached[branch].fc):.2f}"
        if branch != 1:
            assert line[4:6] == ["-", "-"] and line[-1] == f"{expected}, -, -"
    assert lines[1][4:6] == [f"{row['ratio']:.3f}" for row in times["branches"]]
    measured = [f"{run['speedup']:.2f}" for run in times["runs"] if run["interval"] == 3]
    assert lines[1][-1].split(", ")[1:] == measured and len(measured) == 2


def test_a_grid_of_what_are_no_step_times_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x", "grid", str(ROOT / "results/throughput/sd_v15_blocks_bf16_cpu.json")])
    with pytest.raises(SystemExit):
        throughput.main()
    assert "times of full and cached steps" in capsys.readouterr().err
