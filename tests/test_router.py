"""Learning-to-Cache: routers at 1 are the run without caching, learn within a budget, and become a block schedule."""

import pytest
import torch

from lab.fit.fit import weights_sha256
from lab.fit.router import Budget, Router, RouterStudent
from unet_caching.keep import Keep
from unet_caching.methods.block_caching import residual_names
from unet_caching.nest import no_cache


def inputs(calls):
    noise = torch.Generator().manual_seed(1)
    return [(torch.randn(2, 3, 8, 8, generator=noise), torch.full((2,), 900 - 100 * step)) for step in range(calls)]


@torch.no_grad()
def test_routers_at_1_are_no_cache_and_rounded_ones_a_block_schedule(unet):
    """To the last bit."""
    names = residual_names(unet, "all")
    router = Router(names, [torch.ones(len(names))] * 4)
    for step, one in enumerate(inputs(4)):
        assert torch.equal(unet(*one, cache=router.at(step)), unet(*one, cache=no_cache))
    torch.manual_seed(3)
    betas = [torch.ones(len(names)), *torch.randint(0, 2, (3, len(names))).float()]
    blocks = Budget(dict.fromkeys(names, 1.0), 100.0, 4).rounded(betas)
    assert all(blocks[name] == [step for step in range(4) if betas[step][i]] for i, name in enumerate(names))
    router, schedule = Router(names, betas), Keep(blocks)
    for step, one in enumerate(inputs(4)):
        assert torch.equal(unet(*one, cache=router.at(step)), unet(*one, cache=schedule.at(step)))


def test_rounding_keeps_the_largest_within_the_budget():
    betas = [torch.ones(2), torch.tensor([0.9, 0.2]), torch.tensor([0.6, 0.4])]

    def rounded(budget=None, always=(0,)):
        return Budget({"a": 10.0, "b": 30.0}, 50.0, 3, budget).rounded(betas, always)

    assert rounded() == {"a": [0, 1, 2], "b": [0]}
    assert rounded(50 + 20 + 30 + 10 + 10) == {"a": [0, 1, 2], "b": [0, 2]}
    assert rounded(80) == {"a": [0, 1], "b": [0]}
    assert rounded(50 + 50 + 10, (0, 1)) == {"a": [0, 1], "b": [0, 1]}
    with pytest.raises(ValueError, match=r"3 calls cost at least 1.40 .* more than the budget of 1.20"):
        rounded(60)


def learning(unet, calls, trained, budget=None, runs=1):
    """Every residual costs as much as any other, and all of them half of a call."""
    names = residual_names(unet, "all")
    full = 2.0 * len(names)
    costs = Budget(dict.fromkeys(names, 1.0), full, calls, None if budget is None else budget * full)
    return RouterStudent(unet, costs, trained, 0.1, 1e-3, runs)


def test_what_costs_nothing_to_reuse_is_reused_first(unet):
    """On calls with the same input all values stay the same, so that lambda alone decides; the network is frozen."""
    before, training = weights_sha256(unet), learning(unet, 3, {1, 2})
    policy, one = training.policy(), inputs(1)[0]
    for step in range(3):
        expected = unet(*one)
        assert torch.allclose(training(*one, cache=policy.at(step)), expected, atol=1e-5)
    assert all((beta < 1).all() for beta in training.betas[1:]) and (training.betas[0] == 1).all()
    saved = sum((1 - beta).mean().item() for beta in training.betas) / 2
    assert training.share == pytest.approx(3 - saved)
    assert weights_sha256(unet) == before and len(training.losses) == 2


def test_lambda_is_moved_towards_the_budget(unet):
    """At once in the last of two runs; in the first one they may still have everything."""
    for runs, budget, sign in ((2, 1.0, 1), (2, 5.0, -1), (8, 1.9, -1)):
        training = learning(unet, 2, {1}, budget, runs)
        policy = training.policy()
        for step, one in enumerate(inputs(2)):
            training(*one, cache=policy.at(step))
        training.update()
        assert sign * (training.lam - 1e-3) > 0


def test_where_all_calls_may_reuse_a_beta_is_how_often_its_residual_is_computed():
    """Betas of one half by themselves would be all or nothing."""
    betas = torch.tensor([[1.0, 1, 1, 1], *([[0.5, 0.25, 1, 0]] * 8)])

    def spread(budget=None):
        return Budget(dict.fromkeys("abcd", 1.0), 5.0, 9, budget).spread(betas)

    assert spread() == {"a": [0, 1, 3, 5, 7], "b": [0, 2, 6], "c": list(range(9)), "d": [0]}
    least_of_all = 9 * 5 - 8 * 4
    for budget in (least_of_all, least_of_all + 9, least_of_all + 14, 9 * 5):
        found = spread(budget)
        spent = least_of_all + sum(len(steps) - 1 for steps in found.values())
        assert spent <= budget and found["d"] == [0] and len(found["a"]) >= len(found["b"])
        assert spent > budget - 3 or all(found[name] == list(range(9)) for name in "abc")
    with pytest.raises(ValueError, match="a larger budget"):
        spread(least_of_all - 1)
