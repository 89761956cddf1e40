"""Adaptive caching: every image decides for itself, whatever it is batched with, by a rule that was calibrated."""

import numpy as np
import pytest
import torch

from ddpm import sample
from eval.cost.runs import call_macs, costs_of
from lab.fit.adaptive import decided, settled, threshold_for
from run.folder import read_run
from run.spec import RunSpec
from unet_caching.methods.adaptive import AdaptiveCache, AdaptiveRule
from unet_caching.methods.deepcache import DeepCache
from unet_caching.nest import no_cache

WATCHED, THRESHOLD = "input_blocks.1.0", 0.2


@pytest.fixture(scope="module")
def rule(config, tmp_path_factory):
    """A rule by which some calls of the tiny model's runs are full, and not the same for all seeds."""
    path = tmp_path_factory.mktemp("rule") / "rule.json"
    made_for = RunSpec.of(config).open().made_for()
    AdaptiveRule(made_for, 1, WATCHED, [0.0, *[1.0] * 8], THRESHOLD, [0, 3, 6]).save(path)
    return path


def inputs(calls, rows):
    """Rows that change little, and ever more so, from call to call."""
    noise = torch.Generator().manual_seed(1)
    first, pace = (torch.randn(rows, 3, 8, 8, generator=noise) for _ in range(2))
    speed = torch.linspace(0.01, 0.3, rows)[:, None, None, None]
    return [(first + step * speed * pace, torch.full((rows,), 900 - 10 * step)) for step in range(calls)]


@torch.no_grad()
def run_on(unet, policy, given):
    return [unet(*one, cache=policy.at(step)) for step, one in enumerate(given)]


def made(threshold, calls=6):
    return AdaptiveCache(1, WATCHED, [1.0] * calls, threshold, [0])


def test_an_image_is_the_same_in_any_batch(unet):
    given, policy = inputs(6, 4), made(0.4)
    together = run_on(unet, policy, given)
    full = torch.stack(policy.decided)                                      # [calls, rows]
    assert full[0].all() and len(set(full.sum(0).tolist())) > 1             # the rows do not agree
    for row in range(4):
        alone = made(0.4)
        outputs = run_on(unet, alone, [(x[row:row + 1], t[row:row + 1]) for x, t in given])
        assert torch.equal(torch.stack(alone.decided)[:, 0], full[:, row])
        for one, other in zip(outputs, together, strict=True):
            assert torch.allclose(one[0], other[row], atol=1e-5)
        deepcache = DeepCache(1, full[:, row].nonzero()[:, 0].tolist())
        expected = run_on(unet, deepcache, [(x[row:row + 1], t[row:row + 1]) for x, t in given])
        assert all(map(torch.equal, outputs, expected))


def test_thresholds_from_all_to_nothing(unet):
    given = inputs(6, 2)
    with torch.no_grad():
        exact = [unet(*one, cache=no_cache) for one in given]
    assert all(map(torch.equal, run_on(unet, made(0.0), given), exact))
    policy = made(1e9)
    run_on(unet, policy, given)
    assert torch.stack(policy.decided).sum(0).tolist() == [1, 1] and set(policy.kept) == {"feature", "seen", "sums"}
    policy.reset()
    assert not policy.kept and not policy.decided
    with pytest.raises(RuntimeError, match="before output_blocks"):
        run_on(unet, AdaptiveCache(1, "output_blocks.0.0", [1.0], 0.0, [0]), given[:1])


def test_the_rule_adds_changes_up_until_they_exceed_the_threshold():
    changes = np.array([[0, 1, 1, 1, 1, 1], [9, 3, 0, 0, 0, 3.0]])
    assert decided(changes, 1.5).tolist() == [[True, False, True, False, True, False],
                                              [True, True, False, False, False, True]]
    assert decided(changes, threshold_for(changes, 3.0)).sum(1).mean() <= 3
    assert decided(changes, threshold_for(changes, 3.0) - 1e-6).sum(1).mean() > 3


def test_the_threshold_is_moved_until_real_runs_cost_the_budget():
    """Runs that make two calls more than the recorded changes foretell."""
    tried = []

    def run(threshold):
        tried.append(threshold)
        return np.arange(40) < np.full((1, 3, 1), 2 + round(20 / threshold))

    threshold, full = settled(lambda wanted: 20 / wanted, run, 10)
    assert tried == [2.0, 2.5] and threshold == 2.5 and full.sum(-1).tolist() == [[10, 10, 10]]
    threshold, full = settled(lambda wanted: 20 / (12 if wanted == 10 else 5), run, 10)      # never comes out
    assert threshold == 4.0 and full.sum(-1).tolist() == [[7, 7, 7]]


def test_costs_are_those_of_the_typical_run(rule, config):
    run = RunSpec.of(config, adaptive=rule).open()
    assert run.full_calls == 3 and run.reused[0] == frozenset()
    assert call_macs(run) == costs_of(run).calls(DeepCache(1, [0, 3, 6]), 9)


def test_samples_with_a_rule(run, rule, tmp_path, capsys):
    assert run(sample.main, "--adaptive", rule, "--seeds", "0-3", "--batch-size", 4, "--out", tmp_path / "four") == 0
    assert "adaptive at branch 1" in capsys.readouterr().out
    assert run(sample.main, "--adaptive", rule, "--seeds", "0-3", "--batch-size", 1, "--out", tmp_path / "one") == 0
    for image in sorted((tmp_path / "four").rglob("*.png")):
        assert image.read_bytes() == (tmp_path / "one" / "000" / image.name).read_bytes()
    assert read_run(tmp_path / "one")["settings"]["cache"]["adaptive"]["sha256"] == AdaptiveRule.load(rule).sha256


@pytest.mark.parametrize(("words", "why"), [
    (("--interval", 3), "leave out the other"), (("--forecast", 1), "--forecast is not for"),
    (("--compile",), "--compile needs a schedule that is known beforehand")])
def test_what_does_not_go_with_a_rule_is_refused(run, rule, tmp_path, capsys, words, why):
    assert run(sample.main, "--adaptive", rule, *words, "--out", tmp_path / "no") == 2
    assert why in capsys.readouterr().err and not (tmp_path / "no").exists()
