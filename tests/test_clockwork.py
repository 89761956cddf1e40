"""Clockwork: the identity is DeepCache, an adaptor starts as the identity, and costs its convolutions."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMPipeline
from tiny_pipelines import LEVELS, built, call

from ddpm import sample
from eval.cost.runs import call_macs
from lab.fit.fit import frozen
from run.folder import read_run
from run.spec import RunSpec
from unet_caching.errors import UserError
from unet_caching.methods.clockwork import Adaptor, AdaptorFile, Clockwork, clocked
from unet_caching.methods.deepcache import DeepCache
from unet_caching.pipelines.enable import enable_deepcache

RUN = ("--clock", 3, "--clock-branch", 1)


@pytest.fixture(scope="module")
def adaptor(config, tmp_path_factory):
    """The file of an adaptor that is far from the identity."""
    torch.manual_seed(0)
    weights = {name: torch.randn_like(value) / 4 for name, value in Adaptor(64, 8).state_dict().items()}
    path = tmp_path_factory.mktemp("made") / "learned.safetensors"
    AdaptorFile(RunSpec.of(config).open().made_for(), 1, [0, 3, 6], tensors={**weights, "table": torch.ones(9, 3, 8)}
                ).save(path)
    return path


@torch.no_grad()
def outputs(unet, policy, calls=7):
    noise = torch.Generator().manual_seed(1)
    return [unet(torch.randn(2, 3, 8, 8, generator=noise), torch.full((2,), 900 - 100 * step), cache=policy.at(step))
            for step in range(calls)]


def test_the_identity_is_deepcache_to_the_last_bit(unet):
    """Without an adaptor, and with one as it is before it learns, whatever it is told."""
    torch.manual_seed(2)
    table = torch.randn(7, 3, 8)
    for branch in (0, 1, 2):
        channels = {0: 32, 1: 64, 2: 64}[branch]
        plain = outputs(unet, DeepCache(branch, [0, 3, 6]))
        for policy in (Clockwork(branch, [0, 3, 6]), Clockwork(branch, [0, 3, 6], Adaptor(channels, 8), table)):
            assert all(map(torch.equal, plain, outputs(unet, policy)))


@pytest.mark.parametrize("calls, clock, share, steps", [(8, 3, 0, [0, 3, 6]), (8, 4, 0.5, [0, 1, 2, 3, 4]),
                                                        (9, 2, 0.34, [0, 1, 2, 3, 5, 7])])
def test_clocks(calls, clock, share, steps):
    assert clocked(calls, clock, share) == steps


def test_what_is_not_frozen_is_noticed(unet):
    with pytest.raises(RuntimeError, match="have changed"), frozen(unet):
        next(unet.parameters()).add_(1)


def test_samples_with_an_adaptor(run, adaptor, config, tmp_path, capsys):
    assert run(sample.main, *RUN, "--adaptor", adaptor, "--seeds", "0-1", "--out", tmp_path / "a") == 0
    assert "3 full of 9 network calls, clock 3 at branch 1, a learned adaptor" in capsys.readouterr().out
    told = read_run(tmp_path / "a")["settings"]["cache"]
    assert told["full_steps"] == [0, 3, 6] and told["clockwork"]["adaptor_sha256"]
    assert run(sample.main, *RUN, "--seeds", "0-1", "--out", tmp_path / "a") == 2           # another run's folder
    assert "adaptor_sha256" in capsys.readouterr().err
    assert run(sample.main, *RUN, "--seeds", "0-1", "--out", tmp_path / "identity") == 0
    assert run(sample.main, "--interval", 3, "--branch", 1, "--seeds", "0-1", "--out", tmp_path / "deepcache") == 0
    images = {name: (tmp_path / name / "000" / "000001.png").read_bytes() for name in ("a", "identity", "deepcache")}
    assert images["identity"] == images["deepcache"] != images["a"]


def test_an_adaptor_costs_its_convolutions(config, adaptor):
    spec = RunSpec.of(config, clock=3, clock_branch=1)
    plain, learned = (call_macs(one.open()) for one in (spec, spec.having(adaptor=adaptor)))
    assert plain[0] == learned[0]
    pixels, channels, width = 64, 64, 8         # the level inside skip 1 comes back from 4 by 4 pixels
    products = pixels * (9 * channels * width + width + width * channels + channels)
    assert learned[1].hook - plain[1].hook == products + 2 * pixels * channels          # and its normalisation


def test_names_and_presets(config):
    run = RunSpec.of(config, clock_preset="stable-diffusion", clock_branch=2).open()
    assert run.name == "clock4_from0.5" and run.full_calls == 4 + 2
    assert RunSpec.of(config, clock=2, clock_branch=1).open().name == "clock2_branch1"


def test_a_pipeline_takes_a_clock_and_refuses_the_adaptor_of_another_network(adaptor, monkeypatch):
    monkeypatch.setitem(LEVELS, "layers_per_block", 2)
    pipe = built(DDIMPipeline)
    with enable_deepcache(pipe, clock=3, clock_branch=1):
        clocked = call(pipe)
    with enable_deepcache(pipe, interval=3, branch=1):
        assert torch.equal(call(pipe), clocked)
    with pytest.raises(UserError, match="the U-Net of ddpm_tiny there, another here"):
        enable_deepcache(pipe, clock=3, clock_branch=1, adaptor=adaptor)


@pytest.mark.parametrize(("words", "why"), [
    (("--clock", 0), "--clock must be"), (("--clock-from", 0.5), "need a --clock"),
    (("--clock", 3, "--clock-from", 1), "--clock-from must be"),
    (("--clock", 3, "--clock-preset", "stable-diffusion"), "sets --clock and --clock-from"),
    (("--clock", 3, "--clock-branch", 9), "--clock-branch must be from 0 to"),
    # where the adaptor is not the run's
    ((*RUN, "--adaptor", "learned", "--clock", 2), "full_steps"),
    ((*RUN, "--adaptor", "learned", "--clock-branch", 0), "branch 1 there"),
    ((*RUN, "--adaptor", "learned", "--interval", 3), "leave out --interval"),
    ((*RUN, "--adaptor", "learned", "--forecast", 1), "--forecast is not for"),
    ((*RUN, "--adaptor", "wide"), "has 32 channels, but the feature at branch 1 of this U-Net has 64")])
def test_refusals(run, adaptor, tmp_path, capsys, words, why):
    made, wide = AdaptorFile.load(adaptor), adaptor.with_name("wide.safetensors")
    replace(made, tensors={**Adaptor(32, 8).state_dict(), "table": made.table}).save(wide)
    files = {"learned": adaptor, "wide": wide}
    assert run(sample.main, *(files.get(word, word) for word in words), "--out", tmp_path / "no") == 2
    assert why in capsys.readouterr().err and not (tmp_path / "no").exists()
