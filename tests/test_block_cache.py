"""Block Caching on the seam: what is measured, when residuals are computed, what reusing them costs and changes."""

from itertools import pairwise

import pytest
import torch
from conftest import relative_error

from ddpm.unet import UNet
from eval.cost.macs import costs, mean, schedule_macs
from lab.fit.block_schedule import threshold_schedule
from lab.fit.changes import ChangeMeter
from ldm.unet import UNet as LatentUNet
from unet_caching.keep import Keep, joined
from unet_caching.methods.block_caching import outside, residual_names
from unet_caching.methods.deepcache import DeepCache
from unet_caching.nest import WHOLE
from unet_caching.samplers.diffusion import Diffusion
from unet_caching.samplers.solvers import ddim
from unet_caching.samplers.timesteps import uniform_timesteps

STEPS = 6


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet(16, 3, 3, 32, (1, 1, 2), 1, (8,)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def latent():
    torch.manual_seed(0)
    return LatentUNet(3, 3, 32, (1, 2), 1, (1, 2), num_heads=2, context_dim=16).eval().requires_grad_(False)


def run(unet, policy=None, network=None, batch=2, seed=0, context=()):
    """x_0 of a short DDIM run."""
    network = unet if network is None else network
    x = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))

    def predict(x, t, step):
        cache = {} if policy is None else {"cache": policy.at(step)}
        return network(x, torch.full((len(x),), t), *context, **cache)

    return ddim(predict, x, uniform_timesteps(STEPS, 1000), Diffusion("linear").alphas_cumprod())


def measured(unet, kinds="transformer", **kwargs):
    meter = ChangeMeter(residual_names(unet, kinds))
    run(unet, meter, **kwargs)
    meter.reset()
    return means(meter)


def means(meter):
    return {name: rows.double().mean(0).tolist() for name, rows in meter.changes().items()}


class Counting:
    """A policy's cache that notes what was computed at each step."""

    def __init__(self, policy):
        self.policy, self.computed = policy, []

    def at(self, step):
        self.cache = self.policy.at(step)
        self.computed.append([])
        return self

    def __call__(self, key, compute):
        def noted():
            self.computed[-1].append(key)
            return compute()
        return self.cache(key, noted)


def test_kinds_of_residuals(unet, latent):
    transformers, resnets = residual_names(latent, "transformer"), residual_names(latent, "resnet")
    assert len(transformers) == 1 + 1 + 1 + 2 + 2 and len(resnets) == 2 + 2 + 4
    assert set(residual_names(latent, "all")) == {*transformers, *resnets}
    inner = residual_names(latent, "attention")
    assert inner == [f"{name}.transformer_blocks.0.attn{i}" for name in transformers for i in (1, 2)]
    assert residual_names(unet)[-1] == "middle_block.1" or "output_blocks" in residual_names(unet)[-1]
    with pytest.raises(ValueError, match="choose from"):
        residual_names(unet, "spatial")
    with pytest.raises(ValueError, match="no attention blocks"):
        residual_names(unet, "attention")


def test_threshold_schedule_by_hand():
    changes = [9.0, 0.2, 0.2, 0.2, 0.5, 0.1, 0.1, 0.4]
    assert threshold_schedule(changes, 0.55) == [0, 3, 5]       # sums from 0: 0.2 0.4 0.6; from 3: 0.5 0.6; 0.1 0.5
    assert threshold_schedule([0, 1, 1, 1], 1) == [0, 2]
    assert threshold_schedule(changes, 0) == list(range(8))
    assert threshold_schedule([0, 0, 0], 0) == [0, 1, 2]
    assert threshold_schedule(changes, 100) == [0]
    for delta in (-1, float("nan")):
        with pytest.raises(ValueError, match="delta"):
            threshold_schedule(changes, delta)
    with pytest.raises(ValueError, match="step 1"):
        threshold_schedule([0, float("nan")], 1)


def test_change_is_the_relative_l1_difference_averaged_over_rows(unet):
    name, values = residual_names(unet)[0], []

    class Spy(Counting):
        def __call__(self, key, compute):
            value = compute()
            if key == name:
                values.append(value.clone())
            return value

    run(unet, Spy(DeepCache(0, range(STEPS))), batch=3)
    expected = [((b - a).abs().sum((1, 2, 3)) / b.abs().sum((1, 2, 3))).mean().item()
                for a, b in pairwise(values)]
    assert measured(unet, batch=3)[name] == pytest.approx([0, *expected], rel=1e-5)


@pytest.mark.parametrize("kinds", ["all", "attention"])
def test_what_is_computed_is_what_the_schedule_says(unet, latent, kinds):
    unet, context = (latent, (torch.randn(2, 1, 16),)) if kinds == "attention" else (unet, ())
    changes = measured(unet, kinds, context=context)
    schedule = {name: threshold_schedule(c, 1.5 * max(c)) for name, c in changes.items()}
    assert any(len(steps) < STEPS for steps in schedule.values())
    counting = Counting(Keep(schedule))
    run(unet, counting, context=context)
    for step, computed in enumerate(counting.computed):
        assert {key for key in computed if key in schedule} == {k for k, steps in schedule.items() if step in steps}
        assert sorted(key for key in computed if isinstance(key, int)) == list(range(WHOLE, unet.num_branches))


def test_reuse_changes_the_result_and_leaks_nothing(unet):
    schedule = {name: [0, 3] for name in residual_names(unet)}
    cache, other = Keep(schedule), run(unet, seed=5)
    first = run(unet, cache)
    assert not torch.equal(first, run(unet))
    cache.reset()
    run(unet, cache, seed=5)
    assert not torch.equal(other, first)
    cache.reset()
    assert torch.equal(run(unet, cache), first)         # of the run between, nothing is left
    rows = [run(unet, Keep(schedule), batch=2)[:1], run(unet, Keep(schedule), batch=1)]
    assert relative_error(*rows) < 1e-5                 # and rows of a batch do not see each other
    cache.reset()
    with pytest.raises(RuntimeError, match="no call before it has computed"):
        cache.at(1)
    with pytest.raises(ValueError, match="must contain 0"):
        Keep({"a": [1]})


def test_macs_of_a_schedule_equal_those_counted_step_by_step(unet, latent):
    for net, context, kinds in ((unet, (), "all"), (latent, (torch.zeros(1, 1, 16),), "attention")):
        inputs = (torch.zeros(1, 3, 16, 16), torch.zeros(1), *context)
        names = residual_names(net, kinds)
        schedule = {name: range(0, STEPS, 1 + i % 4) for i, name in enumerate(names)}
        found = costs(net, inputs)
        exact = mean(found.calls(Keep(schedule), STEPS))
        assert schedule_macs(found.full, found.values, schedule, STEPS) == pytest.approx(exact, rel=1e-12)
        assert exact.hook < found.full.hook and exact.fc < found.full.fc


def test_deepcache_and_block_caching_together(unet):
    names, branch = outside(residual_names(unet, "all"), unet.num_branches, 1), 1
    assert names and not any(name.startswith("middle") for name in names)
    schedule = {name: [0, 2, 4] for name in names}
    level = DeepCache(branch, [0, 3])
    counting = Counting(joined(level, Keep(schedule)))
    run(unet, counting)
    for step, computed in enumerate(counting.computed):
        assert ("middle_block.0" in computed) == (step in (0, 3))
        assert {key for key in computed if key in schedule} == (set(schedule) if step in (0, 2, 4) else set())
    everything = joined(DeepCache(branch, range(STEPS)), Keep({name: range(STEPS) for name in names}))
    assert torch.equal(run(unet, everything), run(unet))
    alone = run(unet, DeepCache(branch, [0, 3]))
    none = joined(DeepCache(branch, [0, 3]), Keep({}))
    assert torch.equal(run(unet, none), alone)
