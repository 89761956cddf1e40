"""Forecasting what is cached: exact where features are polynomials, the same through compilers, graphs and samplers."""

import itertools
import math

import pytest
import torch
from test_graphs import record
from torch import nn

from ldm.unet import UNet
from unet_caching.files.forecast_weights import ForecastWeights
from unet_caching.forecast import DampingFit, newton_terms
from unet_caching.methods.block_cache import BlockCache, residual_names
from unet_caching.methods.deepcache import DeepCache, DeepCacheOptions, ZeroedCache
from unet_caching.methods.forecast_fit import ForecastErrors, ForecastFit
from unet_caching.methods.forecast_options import ForecastOptions
from unet_caching.options import RunShape
from unet_caching.policy import Together
from unet_caching.registry import plan
from unet_caching.samplers.diffusion import Diffusion
from unet_caching.samplers.noise import SeededNoise
from unet_caching.samplers.samplers import Sampler, noise_predictor
from unet_caching.speed.graphs import RecordedNetwork

UNEVEN = [0, 2, 3, 7, 8, 13]
CALLS = 16
DIFFUSION = Diffusion("scaled_linear", 1000, 0.00085, 0.012)


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    torch.manual_seed(0)
    return UNet(4, 4, 32, (1, 2), 1, (1, 2), num_heads=2, context_dim=16).eval().requires_grad_(False)


def polynomial(degree, sign=1.0, dtype=torch.float64):
    """A feature whose every number is a polynomial of that degree in the call, with its own coefficients."""
    coefficients = torch.randn(degree + 1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(degree)).to(dtype)
    return lambda step: sum(c * (sign * step) ** k for k, c in enumerate(coefficients))


def walk(policy, feature, calls=CALLS, key=0):
    """What each call sees where `feature(step)` is what it would compute."""
    return [policy.at(step)(key, lambda: feature(step)) for step in range(calls)]


def fed(full_steps, order):
    """The cached steps that have order + 1 full steps behind them."""
    return [s for s in range(CALLS) if s not in full_steps and sum(full < s for full in full_steps) > order]


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("full_steps", [UNEVEN, range(0, CALLS, 3), [0, 1, 2]], ids=["uneven", "uniform", "start"])
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_an_order_is_exact_on_polynomials_of_its_degree_and_not_beyond(order, full_steps, sign):
    if order >= len(full_steps):
        return
    exact, beyond = polynomial(order, sign), polynomial(order + 1, sign)
    seen, missed = (walk(DeepCache(0, full_steps, order), feature) for feature in (exact, beyond))
    steps = fed(full_steps, order)
    assert steps
    for step in steps:
        assert torch.allclose(seen[step], exact(step), rtol=1e-11, atol=1e-9), step
        assert not torch.allclose(missed[step], beyond(step), rtol=1e-3), step
    assert all(torch.equal(seen[step], exact(step)) for step in full_steps)


def test_it_leads_on_and_not_back():
    """One number per call, so that the direction can be read: 0, 3, 6 go on with 7, 8, and fall with -7, -8."""
    for sign in (1.0, -1.0):
        seen = walk(DeepCache(0, [0, 3, 6], 1), lambda step: torch.full((1, 1, 1, 1), sign * step), 9)
        assert [value.item() for value in seen] == pytest.approx([sign * s for s in (0, 0, 0, 3, 4, 5, 6, 7, 8)])


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


@pytest.mark.parametrize("order", [1, 2])
def test_newtons_terms_are_the_divided_differences(order):
    steps, at = (9, 4, 3)[:order + 1], 11
    values = [float(s) ** 3 for s in steps]
    first = (at - 9) * (values[0] - values[1]) / 5
    expected = [first]
    if order == 2:
        second = ((values[0] - values[1]) / 5 - (values[1] - values[2]) / 1) / 6
        expected.append((at - 9) * (at - 4) * second)
    found = [sum(c * (v - values[0]) for c, v in zip(row, values[1:], strict=True)) for row in newton_terms(at, steps)]
    assert found == pytest.approx(expected)


# In a network

def sample(network, policy, sampler=None, seeds=(0, 1), guidance=1.0, dtype=torch.float32):
    """The latents of a run."""
    sampler = sampler or Sampler("ddim", CALLS, "trailing", 0.0, DIFFUSION)
    noise = SeededNoise(seeds)
    rows = len(seeds) * (1 if guidance == 1 else 2)
    context = torch.randn(rows, 5, 16, generator=torch.Generator().manual_seed(5)).to(dtype)
    predict = noise_predictor(network, sampler.diffusion, dtype, policy, [context], guidance)
    with torch.no_grad():
        return sampler.run(predict, noise((4, 8, 8)), noise)


def extrapolated(unet, policy, branch, full_steps):
    """The plain way to a forecast of order 1: a cache that computes Lagrange's line in float64."""
    kept = {}

    class Plain:
        def at(self, step):
            self.step = step
            return self

        def __call__(self, key, compute):
            if key != branch:
                return compute()
            if self.step in full_steps:
                kept[self.step] = compute()
                return kept[self.step]
            last = sorted(kept)[-2:]
            if len(last) == 1:
                return kept[last[0]]
            a, b = last
            old, new = kept[a].double(), kept[b].double()
            return (old * (self.step - b) / (a - b) + new * (self.step - a) / (b - a)).float()
    return Plain()


@pytest.mark.parametrize("settings", [
    ("ddim", 15, "uniform", 0.0), ("ddim", 15, "trailing", 1.0), ("plms", 15, "leading", 0.0),
    ("dpmpp", 16, "trailing", 0.0), ("unipc", 16, "linspace", 0.0)], ids=lambda s: f"{s[0]}_eta{s[3]:g}")
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_every_sampler_forecasts_in_the_index_of_its_calls(unet, settings, guidance):
    sampler = Sampler(*settings, DIFFUSION)
    expected = sample(unet, extrapolated(unet, None, 1, UNEVEN), sampler, guidance=guidance)
    found = sample(unet, DeepCache(1, UNEVEN, 1), sampler, guidance=guidance)
    assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max().item())
    reused = sample(unet, DeepCache(1, UNEVEN), sampler, guidance=guidance)
    assert (found - reused).abs().max() > 100 * (found - expected).abs().max()


@pytest.mark.parametrize("branch", [0, 2])
@torch.no_grad()
def test_order_0_is_reuse_bit_for_bit(unet, branch):
    class Reuse:
        """The paper's cache in its shortest form."""
        def at(self, step):
            self.full = step in UNEVEN
            return self

        def __call__(self, key, compute):
            if key == branch and not self.full:
                return self.feature
            value = compute()
            if key == branch:
                self.feature = value
            return value
    expected = sample(unet, Reuse())
    cache = DeepCache(branch, UNEVEN, forecast=0)
    assert torch.equal(sample(unet, cache), expected)
    assert list(cache.kept) == [branch] and cache.history.older == ()


def test_reset_and_a_run_anew_forget_everything(unet):
    cache = DeepCache(1, UNEVEN, 2)
    first = sample(unet, cache)
    cache.reset()
    assert cache.kept == {} and torch.equal(sample(unet, cache), first)
    assert torch.equal(sample(unet, cache), first)              # a run that begins at call 0 again needs no reset


def test_what_is_kept_is_one_feature_more_for_each_order(unet):
    for order in (0, 1, 2):
        cache = DeepCache(1, UNEVEN, order)
        sample(unet, cache)
        sizes = [value.numel() for value in cache.kept.values()]
        assert sorted(sizes, reverse=True) == [cache.feature.numel()] * (order + 1) + [order] * (order > 0)


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


def graphs(unet, make):
    """How many graphs torch.compile makes of two runs, which must come out as without it."""
    from torch._dynamo.testing import CompileCounter
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(unet, fullgraph=True, backend=counter)
    for _ in range(2):
        assert torch.allclose(sample(compiled, make()), sample(unet, make()), atol=1e-4)
    return counter.frame_count


@pytest.mark.parametrize("order", [1, 2])
def test_compiles_to_two_graphs(unet, order):
    assert graphs(unet, lambda: DeepCache(1, UNEVEN, order, [0.1 * step for step in range(CALLS)])) == 2


def test_block_caching_compiles_to_as_many_graphs_as_without(unet):
    blocks = {name: [0, 4, 8, 12] for name in residual_names(unet)[:2]}
    assert graphs(unet, lambda: BlockCache(blocks, forecast=1)) == graphs(unet, lambda: BlockCache(blocks))


def policies(unet):
    names = residual_names(unet)
    blocks = {name: [0, 2, 8, 9] if i % 2 else [0, 2, 8] for i, name in enumerate(names)}
    outer = {name: steps for name, steps in blocks.items() if name.startswith(("input_blocks.1", "output_blocks.3"))}
    return {"order1": lambda: DeepCache(1, UNEVEN, 1),
            "order2": lambda: DeepCache(1, UNEVEN, 2, [0.1 * step for step in range(CALLS)]),
            "blocks": lambda: BlockCache(blocks, forecast=2),
            "together": lambda: Together(DeepCache(1, UNEVEN, 1), BlockCache(outer, forecast=1))}


@pytest.mark.parametrize("name", ["order1", "order2", "blocks", "together"])
def test_recorded_calls_are_the_network(unet, name):
    """As CUDA graphs: fixed buffers, in which values move up by one, and weights that change from step to step."""
    make, patterns = policies(unet)[name], set()
    fast = RecordedNetwork(unet, record)

    def plain(*inputs, cache):
        patterns.add(cache.pattern)
        return unet(*inputs, cache=cache)

    for seeds in ((0, 1), (2, 3)):
        ours, expected = make(), make()
        assert torch.allclose(sample(fast, ours, seeds=seeds), sample(plain, expected, seeds=seeds), atol=1e-4)
        assert ours.kept.keys() == expected.kept.keys()
        for value, right in zip(ours.kept.values(), expected.kept.values(), strict=True):
            assert torch.allclose(value, right, atol=1e-4)
    assert len(fast.recordings) == len(patterns)


# Block Caching

def test_residuals_are_exact_on_polynomials_each_on_its_own_schedule():
    schedule = {"a": UNEVEN, "b": [0, 4, 5], "c": range(CALLS)}
    features = {key: polynomial(2, sign) for key, sign in (("a", 1.0), ("b", -1.0), ("c", 1.0))}
    policy = BlockCache(schedule, forecast=2)
    for step in range(CALLS):
        policy.at(step)
        for key, feature in features.items():
            value = policy(key, lambda: feature(step))
            if step in schedule[key]:
                assert torch.equal(value, feature(step))
            elif step in fed(schedule[key], 2):
                assert torch.allclose(value, feature(step), rtol=1e-11, atol=1e-9)


def test_residuals_are_forecast_before_they_are_adjusted():
    line = polynomial(1)
    adjust = [{"a": (torch.full((3,), 2.0).double(), torch.ones(3).double())}] * CALLS
    policy = BlockCache({"a": [0, 2]}, adjust, forecast=1)
    seen = [policy.at(step)("a", lambda: line(step)) for step in range(5)]
    assert torch.allclose(seen[4], 2 * line(4) + 1) and torch.equal(seen[2], line(2))


def test_blocks_of_order_0_are_reuse_bit_for_bit(unet):
    blocks = {name: [0, 2, 5, 9] for name in residual_names(unet, "all")}
    plain, zero = BlockCache(blocks), BlockCache(blocks, forecast=0)
    assert torch.equal(sample(unet, plain), sample(unet, zero)) and plain.kept.keys() == zero.kept.keys() == set(blocks)


# Fitted weights

def test_the_best_damping_is_found_and_the_ridge_draws_to_1():
    terms = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    lacking = -0.4 * terms[0] + 0.2 * terms[1]              # the best weights are 0.6 and 1.2
    fit = DampingFit(2)
    for part in range(3):                                   # as batches
        fit.add(terms[:, part], lacking[part])
    assert fit.solve(0.0) == pytest.approx([0.6, 1.2], abs=1e-5)
    assert fit.solve(1e9) == pytest.approx([1.0, 1.0], abs=1e-5)
    assert all(abs(w - 1) < abs(best - 1) for w, best in zip(fit.solve(0.5), (0.6, 1.2), strict=True))
    assert DampingFit(2).solve(0.1) == [1.0, 1.0]           # without data


@pytest.mark.parametrize("order", [1, 2])
def test_fitted_damping_forecasts_better_on_other_seeds(unet, order):
    full, sampler = range(0, CALLS, 4), Sampler("dpmpp", CALLS, "trailing", 0.0, DIFFUSION)
    fit = ForecastFit(unet, 1, full, order, CALLS)
    for seeds in (range(4), range(4, 8)):
        sample(fit, fit.policy(), sampler, seeds)
    assert all(weights == [1.0] * order for step, weights in enumerate(fit.damping) if step in full or step < 4)
    assert all(weights[0] != 1 for step, weights in enumerate(fit.damping) if step > 4 and step not in full)

    def error(damping):
        errors = ForecastErrors(unet)
        sample(errors, DeepCache(1, full, order, damping), sampler, range(100, 104))
        assert len(errors.errors) == CALLS - len(full)
        return torch.stack(errors.errors).mean().item()

    assert error(fit.damping) < 0.98 * min(error(1.0), error(0.0))


SETTINGS = {"model": "tiny", "unet": {"ch": 32}, "checkpoint_sha256": "abc", "sampler": "ddim", "steps": CALLS,
            "timesteps": "trailing"}


def weights_file(path, order=1, **change):
    from safetensors.torch import save_file
    made = ForecastWeights(**{"run": SETTINGS, "branch": 1, "full_steps": list(range(0, CALLS, 4)),
                              "damping": [[0.5 + step / 64] * order for step in range(CALLS)],
                              "notes": {"seeds": "0-7"}, **change})
    save_file(made.tensors(), path, made.metadata())
    return made


def test_a_file_of_weights_comes_back(tmp_path):
    made = weights_file(tmp_path / "w.safetensors", 2)
    assert ForecastWeights.load(tmp_path / "w.safetensors") == made
    made.check(SETTINGS)
    made.check({"model": "tiny"})
    made.check_cache(1, range(0, CALLS, 4), 2, CALLS)


@pytest.mark.parametrize(("change", "words"), [
    ({"steps": 20}, "steps 16 there, 20 here"), ({"sampler": "plms"}, "sampler ddim there, plms here"),
    ({"checkpoint_sha256": "def"}, "checkpoint_sha256 abc there"), ({"unet": {"ch": 64}}, "unet differs"),
    ({"timesteps": "quad"}, "timesteps trailing there, quad here"), ({"model": "big"}, "model tiny there, big here")])
def test_weights_of_another_run_are_refused(tmp_path, change, words):
    weights_file(tmp_path / "w.safetensors")
    planned = plan((DeepCacheOptions(interval=4, branch=1), ForecastOptions(1, 1.0, tmp_path / "w.safetensors")), SHAPE)
    planned.check(SETTINGS)
    with pytest.raises(ValueError, match=f"the forecast weights were fitted for another run: {words}"):
        planned.check(SETTINGS | change)


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all", "foreign", "nan", "cut"])
def test_a_file_that_is_none_is_refused_in_one_line(tmp_path, content):
    from safetensors.torch import save_file
    path = tmp_path / "w.safetensors"
    if content == "foreign":
        save_file({"damping": torch.ones(2, 1)}, path)
    elif content == "nan":
        weights_file(path, damping=[[math.nan]] * CALLS)
    elif content == "cut":
        weights_file(path)
        path.write_bytes(path.read_bytes()[:-8])
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"w\.safetensors") as raised:
        ForecastWeights.load(path)
    assert "\n" not in str(raised.value)


# Options

SHAPE = RunShape(CALLS, CALLS, 4, 1)


def test_options_make_the_policy_that_forecasts(unet, tmp_path):
    planned = plan((DeepCacheOptions(interval=4), ForecastOptions(1, 0.5)), SHAPE)
    assert planned.settings["forecast"] == {"order": 1, "damping": 0.5, "weights_sha256": None}
    assert [part for method in planned.methods for part in method.name] == ["uniform_n4", "forecast1", "damped0.5"]
    expected = sample(unet, DeepCache(1, range(0, CALLS, 4), 1, 0.5))
    assert torch.equal(sample(unet, planned.policy()), expected)

    made = weights_file(tmp_path / "w.safetensors")
    fitted = plan((DeepCacheOptions(interval=4), ForecastOptions(1, 1.0, tmp_path / "w.safetensors")), SHAPE)
    assert fitted.settings["forecast"]["damping"] is None and len(fitted.settings["forecast"]["weights_sha256"]) == 64
    assert torch.equal(sample(unet, fitted.policy()), sample(unet, DeepCache(1, range(0, CALLS, 4), 1, made.damping)))


def test_without_a_forecast_nothing_is_said_of_it():
    planned = plan((DeepCacheOptions(interval=4), ForecastOptions()), SHAPE)
    assert "forecast" not in planned.settings and len(planned.methods) == 1
    assert not plan((DeepCacheOptions(), ForecastOptions()), SHAPE)


@pytest.mark.parametrize(("options", "words"), [
    ((DeepCacheOptions(interval=4), ForecastOptions(-1)), "whole number from 0"),
    ((DeepCacheOptions(interval=4), ForecastOptions(1.5)), "whole number from 0"),
    ((DeepCacheOptions(interval=4), ForecastOptions(4)), "order 4 needs 5 full steps before a cached one, .* has 4"),
    ((DeepCacheOptions(interval=8), ForecastOptions(2)), "order 2 needs 3 full steps .* has 2"),
    ((DeepCacheOptions(interval=15), ForecastOptions(1)), "order 1 needs 2 full steps before a cached one, .* has 1"),
    ((DeepCacheOptions(), ForecastOptions(1)), "--forecast needs an --interval"),
    ((DeepCacheOptions(interval=4), ForecastOptions(0, 0.5)), "need --forecast"),
    ((DeepCacheOptions(interval=4), ForecastOptions(1, math.inf)), "finite"),
    ((DeepCacheOptions(interval=4, zero_cache=True), ForecastOptions(1)), "zero-cache")])
def test_options_that_cannot_be(options, words):
    with pytest.raises(ValueError, match=words) as raised:
        plan(options, SHAPE)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("options", "words"), [
    ((DeepCacheOptions(interval=2, branch=1), ForecastOptions(1)), "full_steps"),
    ((DeepCacheOptions(interval=4, branch=0), ForecastOptions(1)), "branch 1 there, 0 here"),
    ((DeepCacheOptions(interval=4, branch=1), ForecastOptions(2)), "order 1 there, 2 here"),
    ((DeepCacheOptions(interval=4, branch=1), ForecastOptions(1, 0.5)), "choose one"),
    ((DeepCacheOptions(interval=4, branch=1), ForecastOptions(0)), "need --forecast")])
def test_weights_of_another_cache_are_refused(tmp_path, options, words):
    weights_file(tmp_path / "w.safetensors")
    level, forecast = options
    forecast = ForecastOptions(forecast.forecast, forecast.forecast_damping, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=words):
        plan((level, forecast), SHAPE)


@pytest.mark.parametrize(("make", "words"), [
    (lambda: DeepCache(0, UNEVEN, -1), "whole number from 0"),
    (lambda: DeepCache(0, UNEVEN, 0.5), "whole number from 0"),
    (lambda: DeepCache(0, [0, 5], 2), "order 2 needs 3 full steps"),
    (lambda: BlockCache({"a": [0, 5], "b": [0]}, forecast=2), "order 2 needs 3 full steps .* has 2"),
    (lambda: BlockCache({"a": UNEVEN}, forecast=-2), "whole number"),
    (lambda: DeepCache(0, UNEVEN, 1, math.nan), "finite"), (lambda: DeepCache(0, UNEVEN, 2, [[1.0]]), "as the order"),
    (lambda: DeepCache(0, UNEVEN, 1, [1.0] * 4), "none for call 5")])
def test_bad_input_is_one_clear_error(make, words):
    with pytest.raises(ValueError, match=words):
        policy = make()
        policy.at(0)(0, lambda: torch.zeros(1))
        policy.at(5)


def test_a_residual_that_few_steps_feed_takes_what_they_allow():
    line = polynomial(1)
    policy = BlockCache({"a": UNEVEN, "b": [0]}, forecast=1)
    for step, key in itertools.product(range(5), "ab"):
        value = policy.at(step)(key, lambda: line(step))
        expected = line(step) if key == "a" and step in (0, 2, 3, 4) else line(0)
        assert torch.allclose(value, expected)


def test_zeroed_features_stay_zero(unet):
    cache = ZeroedCache(1, [0, 2])
    assert (walk(cache, polynomial(1), 2, key=1)[1] == 0).all()
