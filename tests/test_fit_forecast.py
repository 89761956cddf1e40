"""lab.fit.fit_forecast through the command line: a tiny random model, from the fit to samples that use it."""


import pytest
from conftest import tiny_ddpm

from ddpm import sample
from lab.fit import fit_forecast
from run import results
from run.folder import read_run
from run.spec import RunSpec

UNET = {"resolution": 8, "in_channels": 3, "out_channels": 3, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1,
        "attn_resolutions": [4]}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_ddpm(tmp_path_factory.mktemp("tiny"), UNET, steps=9)


RUN = ("--interval", 3, "--forecast", 1)
SEEDS = ("--seeds", "10-13", "--held-out-seeds", "20-23")


def test_from_the_fit_to_samples(run, config, tmp_path, capsys):
    out = tmp_path / "w.safetensors"
    assert run(fit_forecast.main, *RUN, *SEEDS, "--out", out) == 0
    found = results.read(tmp_path / "w.forecast.json")
    assert found.images == 4 and found.details["held_out_seeds"] == "20-23"
    damping = found.details["damping"]
    assert len(damping) == 9
    assert all(damping[step] == [1.0] for step in (0, 1, 2, 3, 6))      # full, or with one value so far
    assert all(damping[step] != [1.0] for step in (4, 5, 7, 8))
    value = {name: metric.value for name, metric in found.metrics.items()}
    assert value["feature, fitted less plain"] == pytest.approx(value["feature, fitted"] - value["feature, plain"])
    assert value["feature, fitted"] < value["feature, plain"]           # it is fitted to just this, on other seeds

    assert run(sample.main, *RUN, "--forecast-weights", out, "--out", tmp_path / "fitted") == 0
    assert "forecast of order 1, with fitted weights" in capsys.readouterr().out
    spec = RunSpec.of(config, interval=3, forecast=1, forecast_weights=out)
    assert spec.open().deepcache.policy().forecast.damping == [pytest.approx(one) for one in damping]
    assert read_run(tmp_path / "fitted")["settings"]["cache"]["forecast"]["weights_sha256"]
    for words, why in ((("--steps", 8), "9 there, 8 here"), (("--interval", 2), "full_steps"),
                       (("--branch", 2), "branch 1 there, 2 here"), (("--forecast", 2), "order 1 there, 2 here")):
        assert run(sample.main, *RUN, "--forecast-weights", out, *words, "--out", tmp_path / "no") == 2
        assert why in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(("words", "why"), [
    (("--interval", 3), "give --interval and --forecast"), (("--forecast", 1), "--forecast needs an --interval"),
    ((*RUN, "--ridge", -1), "--ridge must be 0 or more"), ((*RUN, "--held-out-seeds", "13-14"), "seed 13 is to be"),
    ((*RUN, "--compile"), "are for sampling"), ((*RUN, "--out", "nowhere/w.safetensors"), "in a folder that is there")])
def test_refusals(run, tmp_path, capsys, words, why):
    assert run(fit_forecast.main, *SEEDS, "--out", tmp_path / "w.safetensors", *words) == 2
    assert why in capsys.readouterr().err and not any(tmp_path.iterdir())
