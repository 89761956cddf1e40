"""The nested forward and DeepCache on it: what runs, what is kept, what equals what."""

from pathlib import Path

import pytest
import torch

from ddpm.unet import UNet
from unet_caching.methods.deepcache import DeepCache, ZeroedCache
from unet_caching.nest import Cond


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet(16, 3, 3, 32, (1, 1, 2), 2, (8,)).eval()


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(2, 3, 16, 16, generator=generator), torch.full((2,), t)) for t in (700, 650, 600)]


def two_loops(unet, x, t):
    """The usual U-Net forward: one loop down that collects the skips, one loop up that uses them."""
    from ddpm.unet import timestep_embedding
    cond = Cond(unet.embed(timestep_embedding(t, 32)))
    skips = []
    for block in unet.input_blocks:
        x = block(x, cond)
        skips.append(x)
    x = unet.middle_block(x, cond)
    for block in unet.output_blocks:
        x = block(torch.cat([x, skips.pop()], dim=1), cond)
    return unet.out(x)


@torch.no_grad()
def test_nested_forward_equals_two_loops_bit_for_bit(unet, inputs):
    for x, t in inputs:
        assert torch.equal(unet(x, t), two_loops(unet, x, t))


@pytest.mark.parametrize("branch", range(9))
@torch.no_grad()
def test_full_steps_equal_no_cache_and_cached_ones_run_exactly_the_outer_blocks(unet, inputs, branch):
    ran = []
    hooks = [block.register_forward_hook(lambda *_, name=name: ran.append(name))
             for name, block in [("middle", unet.middle_block),
                                 *((f"in{i}", b) for i, b in enumerate(unet.input_blocks)),
                                 *((f"out{i}", b) for i, b in enumerate(reversed(unet.output_blocks)))]]
    cache, found, blocks = DeepCache(branch, full_steps=[0, 2]), [], []
    for step, one in enumerate(inputs):
        found.append(unet(*one, cache.at(step)))
        blocks.append(ran[:])
        ran.clear()
    for hook in hooks:
        hook.remove()
    assert torch.equal(found[0], unet(*inputs[0])) and torch.equal(found[2], unet(*inputs[2]))
    assert len(blocks[0]) == len(blocks[2]) == 2 * unet.num_branches + 1
    assert blocks[1] == [f"in{k}" for k in range(branch + 1)] + [f"out{k}" for k in reversed(range(branch + 1))]


@torch.no_grad()
def test_cached_step_keeps_the_feature_and_takes_a_fresh_skip(unet, inputs):
    cache = DeepCache(2, full_steps=[0, 2])
    unet(*inputs[0], cache.at(0))
    feature = cache.feature.clone()
    first, second = (unet(*inputs[i], cache.at(1)) for i in (1, 2))
    assert torch.equal(cache.feature, feature)                  # a cached step does not update it
    assert not torch.equal(first, second)                       # but sees its own input and timestep
    unet(*inputs[2], cache.at(2))
    assert not torch.equal(cache.feature, feature)              # a full step does
    assert [value.shape for value in cache.kept.values()] == [(2, 32, 16, 16)]
    cache.reset()
    assert cache.feature is None


@torch.no_grad()
def test_zeroed_cache_reuses_zeros(unet, inputs):
    plain, zeroed = DeepCache(2, [0]), ZeroedCache(2, [0])
    for cache in (plain, zeroed):
        unet(*inputs[0], cache.at(0))
    out = unet(*inputs[1], zeroed.at(1))
    assert not torch.allclose(out, unet(*inputs[1], plain.at(1)), atol=1e-3)
    plain.kept = {2: torch.zeros_like(plain.feature)}
    assert torch.equal(out, unet(*inputs[1], plain.at(1)))


def test_misuse_is_refused(unet, inputs):
    with pytest.raises(ValueError, match="0"):
        DeepCache(2, full_steps=[1, 2])
    with pytest.raises(ValueError, match="branch"):
        DeepCache(-1, full_steps=[0])
    with pytest.raises(RuntimeError, match="call 1"):
        DeepCache(2, full_steps=[0]).at(1)
    too_deep = DeepCache(unet.num_branches, full_steps=[0])
    with torch.no_grad():
        unet(*inputs[0], too_deep.at(0))
    with pytest.raises(RuntimeError, match="branch 9"):
        too_deep.at(1)


@pytest.mark.parametrize(("change", "word"), [
    ({"resolution": 18}, "halved"), ({"ch": 40}, "multiple of 32")])
def test_impossible_sizes_are_refused(change, word):
    arguments = {"resolution": 16, "in_channels": 3, "out_channels": 3, "ch": 32, "ch_mult": (1, 1, 2),
                 "num_res_blocks": 1, "attn_resolutions": ()}
    with pytest.raises(ValueError, match=word):
        UNet(**arguments | change)


def test_the_heart_is_read_in_half_an_hour():
    """The nest, what a cache is asked, the one class that keeps, DeepCache, schedules, forecasts."""
    files = "nest", "policy", "keep", "methods/deepcache", "schedules", "forecast"
    assert sum(len(Path(f"unet_caching/{file}.py").read_text().splitlines()) for file in files) <= 700
