"""Forecasting what is cached: exact where features are polynomials, the same through compilers, graphs and samplers."""

import math
from itertools import pairwise

import pytest
import torch

from lab.plans.candidates import deepcache_calls
from unet_caching.forecast import Forecast
from unet_caching.keep import Keep
from unet_caching.methods.deepcache import DeepCache, DeepCacheOptions
from unet_caching.methods.forecast import ForecastOptions
from unet_caching.options import RunShape
from unet_caching.registry import bind
from unet_caching.samplers.diffusion import Diffusion
from unet_caching.samplers.noise import SeededNoise
from unet_caching.samplers.samplers import Sampler, noise_predictor

UNEVEN = [0, 2, 3, 7, 8, 13]
CALLS = 16
DIFFUSION = Diffusion("scaled_linear", 1000, 0.00085, 0.012)


def polynomial(degree):
    """A feature whose every number is a polynomial of that degree in the call, with its own coefficients."""
    coefficients = torch.randn(degree + 1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(degree)).double()
    return lambda step: sum(c * step ** k for k, c in enumerate(coefficients))


def walk(policy, feature):
    """What each call sees where `feature(step)` is what it would compute."""
    return [policy.at(step)(0, lambda: feature(step)) for step in range(CALLS)]


def fed(full_steps, order):
    """The cached steps that have order + 1 full steps behind them."""
    return [s for s in range(CALLS) if s not in full_steps and sum(full < s for full in full_steps) > order]


@pytest.mark.parametrize(("order", "full_steps"), [
    (0, UNEVEN), (1, range(0, CALLS, 3)), (2, UNEVEN), (2, [0, 1, 2]), (3, range(0, CALLS, 3)), (3, UNEVEN)])
def test_an_order_is_exact_on_polynomials_of_its_degree_and_not_beyond(order, full_steps):
    exact, beyond = polynomial(order), polynomial(order + 1)
    seen, missed = (walk(DeepCache(0, full_steps, order), feature) for feature in (exact, beyond))
    steps = fed(full_steps, order)
    assert steps
    for step in steps:
        assert torch.allclose(seen[step], exact(step), rtol=1e-11, atol=1e-9), step
        assert not torch.allclose(missed[step], beyond(step), rtol=1e-3), step
    assert all(torch.equal(seen[step], exact(step)) for step in full_steps)


@pytest.mark.parametrize("order", [1, 2])
def test_the_start_has_the_order_that_its_full_steps_allow(order):
    line = polynomial(1)
    seen = walk(DeepCache(0, UNEVEN, order), line)
    assert torch.equal(seen[1], line(0))                                                # one value: reuse
    assert [s for s in range(4, 7)] == [s for s in fed(UNEVEN, 2) if s < 7]
    two = walk(DeepCache(0, [0, 2, 9], order), line)
    assert all(torch.allclose(two[s], line(s)) for s in range(3, 9))                    # two values: a line


def test_damping():
    feature, full = polynomial(2), [0, 2, 3, 7]
    base, whole = (walk(DeepCache(0, full, order), feature) for order in (0, 2))
    half = walk(DeepCache(0, full, 2, 0.5), feature)
    each = walk(DeepCache(0, full, 2, [w / CALLS for w in range(CALLS)]), feature)
    for step in range(CALLS):
        assert torch.allclose(half[step], base[step] + 0.5 * (whole[step] - base[step]))
        assert torch.allclose(each[step], base[step] + step / CALLS * (whole[step] - base[step]))
    assert all(map(torch.equal, walk(DeepCache(0, full, 2, 0.0), feature), base))
    line = walk(DeepCache(0, full, 1), feature)
    by_order = walk(DeepCache(0, full, 2, [[1.0, 0.0]] * CALLS), feature)               # one weight for each term
    assert all(map(torch.allclose, by_order, line))


# In a network

def sample(network, policy, sampler=None, guidance=1.0):
    """The latents of a run."""
    sampler, noise = sampler or Sampler("ddim", CALLS, "trailing", 0.0, DIFFUSION), SeededNoise([0, 1])
    context = torch.randn(2 if guidance == 1 else 4, 5, 16, generator=torch.Generator().manual_seed(5))
    predict = noise_predictor(network, sampler.diffusion, torch.float32, policy, [context], guidance)
    with torch.no_grad():
        return sampler.run(predict, noise((4, 8, 8)), noise)


class Plain:
    """The plain way to a plan: a cache that keeps the last values of all levels, and Newton's terms in float64."""

    def __init__(self, calls):
        self.calls, self.kept = calls, {}

    def at(self, step):
        self.step, self.call = step, self.calls[step]
        return self

    def __call__(self, key, compute):
        if isinstance(key, str):
            return compute()
        kept = self.kept.setdefault(key, {})
        if key != self.call.branch:
            return kept.setdefault(self.step, compute())
        steps = sorted(kept)[::-1]
        value = kept[steps[0]]
        for order, weight in enumerate(self.call.damping[:len(steps) - 1], 1):
            table = [kept[s].double() for s in steps[:order + 1]]
            for width in range(1, order + 1):
                table = [(a - b) / (steps[i] - steps[i + width]) for i, (a, b) in enumerate(pairwise(table))]
            value = value + weight * (table[0] * math.prod(self.step - s for s in steps[:order])).float()
        return value


@pytest.mark.parametrize("settings", [
    ("ddim", 15, "trailing", 1.0), ("plms", 15, "leading", 0.0), ("unipc", 16, "linspace", 0.0)],
    ids=lambda s: f"{s[0]}_eta{s[3]:g}")
def test_every_sampler_forecasts_in_the_index_of_its_calls(latent_unet, settings):
    guidance = 3.0 if settings[0] == "plms" else 1.0
    sampler = Sampler(*settings, DIFFUSION)
    expected = sample(latent_unet, Plain(deepcache_calls(1, UNEVEN, CALLS, 1)), sampler, guidance=guidance)
    found = sample(latent_unet, DeepCache(1, UNEVEN, 1), sampler, guidance=guidance)
    assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max().item())
    reused = sample(latent_unet, DeepCache(1, UNEVEN), sampler, guidance=guidance)
    assert (found - reused).abs().max() > 100 * (found - expected).abs().max()


@pytest.mark.parametrize("branch", [0, 2])
def test_order_0_is_reuse_bit_for_bit(latent_unet, branch):
    cache = DeepCache(branch, UNEVEN, forecast=0)
    assert torch.equal(sample(latent_unet, cache), sample(latent_unet, Plain(deepcache_calls(branch, UNEVEN, CALLS))))
    assert list(cache.kept) == [branch] and cache.held[branch].older == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """The arithmetic loses no more of a forecast than 2.5 times what rounding its result does."""
    exact = polynomial(2)

    def feature(step):
        return exact(1 + step / 50).to(dtype)

    seen = walk(DeepCache(0, UNEVEN, 2), feature)
    wide = walk(DeepCache(0, UNEVEN, 2), lambda step: feature(step).double())
    for step in (step for step in range(CALLS) if step not in UNEVEN and step > 1):
        assert seen[step].dtype == dtype
        rounding = (wide[step].to(dtype).double() - wide[step]).norm()
        assert 0 < (seen[step].double() - wide[step]).norm() < 2.5 * rounding


# Block Caching

def test_residuals_are_exact_on_polynomials_each_on_its_own_schedule():
    schedule = {"a": UNEVEN, "b": [0, 4, 5], "c": range(CALLS)}
    policy, feature = Keep(schedule, Forecast(2)), polynomial(2)
    for step in range(CALLS):
        policy.at(step)
        for key in schedule:
            value = policy(key, lambda: feature(step))
            if step in schedule[key]:
                assert torch.equal(value, feature(step))
            elif step in fed(schedule[key], 2):
                assert torch.allclose(value, feature(step), rtol=1e-11, atol=1e-9)


def test_residuals_are_forecast_before_they_are_adjusted():
    line = polynomial(1)
    adjust = [{"a": (torch.full((3,), 2.0).double(), torch.ones(3).double())}] * CALLS
    policy = Keep({"a": [0, 2]}, Forecast(1), adjust)
    seen = [policy.at(step)("a", lambda: line(step)) for step in range(5)]
    assert torch.allclose(seen[4], 2 * line(4) + 1) and torch.equal(seen[2], line(2))


# Options

SHAPE = RunShape(CALLS, CALLS, 4, 1)


def test_options_make_the_policy_that_forecasts(latent_unet):
    methods = bind((DeepCacheOptions(interval=4), ForecastOptions(1, 0.5)), SHAPE)
    assert methods.settings["forecast"] == {"order": 1, "damping": 0.5, "weights_sha256": None}
    assert [part for method in methods.methods for part in method.name] == ["uniform_n4", "forecast1", "damped0.5"]
    expected = sample(latent_unet, DeepCache(1, range(0, CALLS, 4), 1, 0.5))
    assert torch.equal(sample(latent_unet, methods.policy()), expected)


@pytest.mark.parametrize(("options", "words"), [
    ((DeepCacheOptions(interval=4), ForecastOptions(-1)), "whole number from 0"),
    ((DeepCacheOptions(interval=4), ForecastOptions(4)), "order 4 needs 5 full steps before a cached one, .* has 4"),
    ((DeepCacheOptions(interval=15), ForecastOptions(1)), "order 1 needs 2 full steps before a cached one, .* has 1"),
    ((DeepCacheOptions(), ForecastOptions(1)), "--forecast needs an --interval"),
    ((DeepCacheOptions(interval=4), ForecastOptions(0, 0.5)), "needs --forecast"),
    ((DeepCacheOptions(interval=4), ForecastOptions(1, math.inf)), "finite"),
    ((DeepCacheOptions(interval=4, zero_cache=True), ForecastOptions(1)), "zero-cache")])
def test_options_that_cannot_be(options, words):
    with pytest.raises(ValueError, match=words) as raised:
        bind(options, SHAPE)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("make", "words"), [
    (lambda: Keep({"a": [0, 5], "b": [0]}, Forecast(2)), "order 2 needs 3 full steps .* has 2"),
    (lambda: DeepCache(0, UNEVEN, 1, math.nan), "finite"), (lambda: DeepCache(0, UNEVEN, 2, [[1.0]]), "as the order"),
    (lambda: DeepCache(0, UNEVEN, 1, [1.0] * 4), "none for call 5")])
def test_bad_input_is_one_clear_error(make, words):
    with pytest.raises(ValueError, match=words):
        policy = make()
        policy.at(0)(0, lambda: torch.zeros(1))
        policy.at(5)
