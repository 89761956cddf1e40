"""eval.throughput run: the kinds of calls of any run, and how their times become that of a run."""

import sys

import pytest
from conftest import HERE

from eval import throughput
from eval.cost.run_timing import in_full_steps
from eval.cost.runs import call_macs
from run import results
from run.spec import RunSpec

CONFIG = HERE.parent / "configs" / "ddpm_emoji.yaml"
SCHEDULE = HERE.parent / "checkpoints" / "block_caching" / "ddpm_20_half.json"
RUNS = {"none": {}, "deepcache": {"interval": 5}, "forecast": {"interval": 5, "forecast": 1},
        "blocks": {"block_schedule": SCHEDULE}, "both": {"interval": 5, "block_schedule": SCHEDULE}}


@pytest.mark.parametrize("name", RUNS)
def test_calls_of_one_kind_cost_the_same(name):
    run = RunSpec.of(CONFIG, steps=20, **RUNS[name]).open()
    kinds, macs = run.reused, call_macs(run)
    assert len(kinds) == 20 and kinds[0] == frozenset()
    assert len({(kind, cost) for kind, cost in zip(kinds, macs, strict=True)}) == len(set(kinds))
    expected = {"none": 1, "deepcache": 2, "forecast": 2}
    assert len(set(kinds)) == expected.get(name, len(set(kinds))) and (name in expected or len(set(kinds)) > 2)


def test_the_command_times_each_kind_once(monkeypatch, tmp_path, capsys):
    out = tmp_path / "run.json"
    monkeypatch.setattr(sys, "argv", ["x", "run", "--config", str(CONFIG), "--steps", "6", "--interval", "3",
                                      "--forecast", "1", "--batch-size", "1", "--device", "cpu", "--repeats", "1",
                                      "--warmup", "1", "--out", str(out)])
    throughput.main()
    found = results.read(out)
    assert [(one["reused"], one["calls"]) for one in found.throughput["kinds"]] == [([], 2), (["2"], 4)]
    assert found.settings["cache"]["forecast"]["order"] == 1
    assert found.throughput["run"]["macs_speedup"] > 1.5 and "x by time" in capsys.readouterr().out


def test_a_run_without_caching_has_one_kind(monkeypatch, tmp_path):
    out = tmp_path / "run.json"
    monkeypatch.setattr(sys, "argv", ["x", "run", "--config", str(CONFIG), "--steps", "2", "--batch-size", "1",
                                      "--device", "cpu", "--repeats", "1", "--warmup", "1", "--out", str(out)])
    throughput.main()
    assert [(one["reused"], one["calls"]) for one in results.read(out).times["kinds"]] == [([], 2)]


def test_times_of_kinds_become_those_of_every_run_that_has_no_others():
    times = {"full": {"median": 2.0}, "kinds": [{"reused": ["2"], "median": 0.5, "ratio": 0.25}]}
    run = RunSpec.of(CONFIG, steps=20, interval=5).open()
    assert in_full_steps(times, run) == (4 * 2.0 + 16 * 0.5, 4 + 16 * 0.25)
    assert in_full_steps(times, RunSpec.of(CONFIG, steps=20, interval=5, branch=1).open()) is None
    assert in_full_steps(times, RunSpec.of(CONFIG, steps=20).open()) == (40.0, 20.0)
