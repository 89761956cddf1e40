"""Timing: what runs how often and what is reported. Never how long anything took."""

import math

import pytest
from conftest import TINY_UNET, run_command, tiny_ddpm

from eval import throughput
from eval.cost import timing
from eval.cost.macs import branch_macs
from eval.cost.runs import call_macs
from eval.cost.timing import Kind, Times, Timing, interleave, kinds_of, time_runs
from run import results
from run.families import at_resolution, example_inputs, load_config
from run.files import ROOT
from run.results import Result
from run.spec import RunSpec
from unet_caching.errors import UserError

EMOJI, SD_EMOJI = (ROOT / "configs" / f"{name}.yaml" for name in ("ddpm_emoji", "sd_emoji"))
SCHEDULE = ROOT / "checkpoints" / "block_caching" / "ddpm_20_half.json"
FOREIGN = ROOT / "configs" / "block_schedules" / "sd_v15_ddim_20_rhythm.json"
BRIEF = "--batch-size", 1, "--repeats", 2, "--warmup", 1, "--device", "cpu"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_ddpm(tmp_path_factory.mktemp("model"), TINY_UNET, steps=12)


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


RUNS = {"none": ({}, 1), "deepcache": ({"interval": 5}, 2), "forecast": ({"interval": 5, "forecast": 1}, 2),
        "blocks": ({"block_schedule": SCHEDULE}, 19), "both": ({"interval": 5, "block_schedule": SCHEDULE}, 13)}


@pytest.mark.parametrize("name", RUNS)
def test_calls_of_one_kind_cost_the_same(name):
    options, different = RUNS[name]
    run = RunSpec.of(EMOJI, steps=20, **options).open()
    kinds = kinds_of(run)
    assert len(kinds) == 20 and kinds[0] == Kind()
    assert len(set(kinds)) == len(set(zip(kinds, call_macs(run), strict=True))) == different
    assert {kind.order for kind in kinds if kind.reused} == ({1} if name == "forecast" else {0} if options else set())


def test_each_kind_of_call_of_several_runs_is_timed_once(config, unet):
    """Two of them have the same cached call; what is timed runs its own blocks, after the calls that it needs."""
    spec, ran = RunSpec.of(config), [0] * unet.num_branches
    runs = [spec.having(**options).open() for options in (
        {}, {"interval": 2, "branch": 1}, {"interval": 3, "branch": 1}, {"interval": 2, "branch": 3})]
    for k, block in enumerate(unet.input_blocks):
        block.register_forward_hook(lambda *_, k=k: ran.__setitem__(k, ran[k] + 1))
    found = time_runs(runs, unet, example_inputs(runs[0].config, 2, "cpu"), repeats=3, warmup=1)
    assert [(one["reused"], one["order"]) for one in found["kinds"]] == [(["1"], 0), (["3"], 0)]
    # Two fill the caches; then 4 rounds: full runs all 4 input blocks, branch 1 the first 2, branch 3 all.
    assert ran == [2 + 4 * 3, 2 + 4 * 3, 2 + 4 * 2, 2 + 4 * 2]
    full, cached = branch_macs(unet, example_inputs(runs[0].config), [1, 3])
    assert [one["macs"] for one in (found["full"], *found["kinds"])] == [full.hook, cached[1].hook, cached[3].hook]
    for one in (found["full"], *found["kinds"]):
        assert len(one["rounds"]) == 3 and one["min"] <= one["quartiles"][0] <= one["median"] <= one["quartiles"][1]
    times = Times(found)
    (_, fast), (median, ratio) = times.kinds[Kind(("1",))], times.kinds[Kind(("3",))]
    assert times.of_run(runs[3]) == (6 * times.full + 6 * median, 6 + 6 * ratio)
    assert times.of_run(runs[2]).full_calls == 4 + 8 * fast and times.of_run(runs[0]).full_calls == 12


def test_times_of_kinds_become_those_of_every_run_that_has_no_others():
    steps = {"full": {"median": 2.0}, "kinds": [{"reused": ["2"], "order": 0, "median": 0.5, "ratio": 0.25}]}
    spec = RunSpec.of(EMOJI, steps=20, interval=5)
    for times in (Times(steps), Times({"full": steps["full"], "branches": [
            {"branch": 2, "median": 0.5, "ratio": 0.25}, {"branch": 2, "forecast": 1, "median": 9.0, "ratio": 9.0}]})):
        assert times.of_run(spec.open()) == (4 * 2.0 + 16 * 0.5, 4 + 16 * 0.25)
        assert times.of_run(spec.having(branch=1).open()) is None
        assert times.of_run(spec.having(interval=1).open()) == (40.0, 20.0)
    assert Times(steps).of_run(spec.having(forecast=1).open()) is None
    # What was timed of one run is of that run alone.
    forecast = spec.having(forecast=1).open()
    own = Times.of(Result("throughput", settings={"cache": forecast.caching.settings}, throughput={
        **steps, "kinds": [{"reused": ["2"], "median": 0.5, "ratio": 0.25}]}))      # as files of before have it
    assert own.of_run(forecast) == (4 * 2.0 + 16 * 0.5, 4 + 16 * 0.25)
    assert own.of_run(spec.open()) is None and own.of_run(spec.having(interval=1).open()) is None


def test_command_writes_all_it_knows(config, capsys, tmp_path):
    out = tmp_path / "results" / "tiny.json"
    assert run_command(throughput.main, "--config", config, "--branch", 1, 3, 1, "--steps", 7, "--interval", 3,
                       "--forecast", 0, 1, "--dtype", "bf16", *BRIEF, "--out", out) == 0
    result = results.read(out)
    assert (result.kind, result.model) == ("throughput", "ddpm_tiny")
    assert result.settings == {"batch_size": 1, "rows": 1, "dtype": "bf16", "repeats": 2, "warmup": 1,
                               "weights": "random", "compile": False, "cuda_graphs": False}
    assert result.provenance.keys() >= {"commit", "versions", "device", "device_name", "threads"}
    found = result.throughput
    kinds = [(int(one["reused"][0]), one["order"]) for one in found["kinds"]]
    assert kinds == [(branch, order) for branch in (1, 3) for order in (0, 1)]
    assert found["kinds"][0]["macs"] == found["kinds"][1]["macs"] < found["kinds"][2]["macs"] < found["full"]["macs"]
    assert [(run["branch"], run["forecast"], run["interval"], run["steps"]) for run in found["runs"]] \
        == [(*kind, 3, 7) for kind in kinds]
    cached, run = found["kinds"][2], found["runs"][2]
    assert run["seconds"] == pytest.approx(3 * found["full"]["median"] + 4 * cached["median"])
    assert run["speedup"] == pytest.approx(7 / (3 + 4 * cached["ratio"]))
    assert run["macs_speedup"] == pytest.approx(7 / (3 + 4 * cached["macs"] / found["full"]["macs"]))
    assert all(math.isfinite(value) and value > 0 for key, value in run.items() if key not in ("branch", "forecast"))
    printed = capsys.readouterr().out
    assert "batch 1, bf16, cpu" in printed and "branch 3, N = 3" in printed and "branch 3, order 1, N = 3" in printed
    assert [path.name for path in out.parent.iterdir()] == ["tiny.json"]


def test_images_are_counted_not_rows(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(timing, "interleave", lambda variants, *_: {
        name: (call(), Timing([2.0 if name is None else 0.5]))[1] for name, call in variants.items()})
    assert run_command(throughput.main, "--config", ROOT / "configs" / "ldm_emoji.yaml", "--batch-size", 3, "--device",
                       "cpu", "--threads", 1, "--interval", 5, "--out", tmp_path / "x.json") == 0
    assert "batch 3 (6 rows with guidance)" in capsys.readouterr().out
    found = results.read(tmp_path / "x.json")
    run, = found.times["runs"]
    assert (found.settings["batch_size"], found.settings["rows"], run["branch"], run["calls"]) == (3, 6, 0, 250)
    assert run["images_per_second"] == 3 / (50 * 2.0 + 200 * 0.5)


@pytest.mark.parametrize(("options", "kinds"), [
    (["--steps", 6, "--interval", 3, "--forecast", 1], [(["1"], 1, 4)]), (["--steps", 2], [])])
def test_a_run_is_timed_by_its_kinds_of_calls(config, tmp_path, capsys, options, kinds):
    out = tmp_path / "run.json"
    assert run_command(throughput.main, "run", "--config", config, *options, *BRIEF, "--out", out) == 0
    found = results.read(out)
    assert [(one["reused"], one["order"], one["calls"]) for one in found.times["kinds"]] == kinds
    assert found.settings["cache"].get("forecast", {}).get("order") == (1 if kinds else None)
    run, = found.times["runs"]
    assert run["calls"] == options[1] and (run["macs_speedup"] > 1.2) == bool(kinds)
    assert f"the run: {options[1]} calls" in capsys.readouterr().out


@pytest.mark.parametrize("words", ["--branch 4", "--interval 2 101", "--repeats 0", "--device abacus", "--device meta",
                                   "--checkpoint nowhere.ckpt", "run --block-schedule nowhere.json",
                                   f"run --block-schedule {FOREIGN}"])
def test_command_refuses_bad_input(config, capsys, tmp_path, words):
    verb, *rest = words.split() if words.startswith("run") else ("", *words.split())
    assert run_command(throughput.main, *filter(None, [verb]), "--config", config, *BRIEF, *rest, "--out",
                       tmp_path / "x.json") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "x.json").exists()


def test_sizes_that_a_network_cannot_have():
    with pytest.raises(UserError, match="multiple of 8 pixels, got 36"):
        at_resolution(load_config(SD_EMOJI), 36)
    with pytest.raises(UserError, match="makes only images of 32 pixels"):
        at_resolution(load_config(EMOJI), 64)
