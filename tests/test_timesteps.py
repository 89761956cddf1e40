"""Fitted timesteps: what steps cost, told by the inner products of a trajectory, and the timesteps of least error."""

import itertools

import numpy as np
import pytest

from lab.plans.distances import Distances
from lab.plans.judge import Grid, Judge, run_of
from lab.plans.timesteps import RULES, Rule, Trajectory, trajectory
from run.machine import Machine
from run.spec import RunSpec
from unet_caching.samplers.diffusion import Diffusion

CPU = Machine(batch_size=4, device="cpu", threads=1)
TIMES = [999, 860, 700, 560, 410, 250, 90]
ALPHAS = Diffusion("cosine").alphas_cumprod()[TIMES].double().numpy()


@pytest.fixture
def values():
    """States and clean images of 7 calls, and the final image: [15, values]."""
    return np.random.default_rng(0).normal(size=(15, 30)) / 30 ** 0.5


@pytest.fixture
def made(values):
    return Trajectory(TIMES, ALPHAS, values @ values.T)


@pytest.mark.parametrize("order", [1, 2])
def test_errors_are_those_of_the_rules(made, values, order):
    x, clean = values[:8], values[8:]
    a, s = np.append(ALPHAS ** 0.5, 1), np.append((1 - ALPHAS) ** 0.5, 0)
    errors = made.errors(order)
    for i, j, k in [(0, 1, 2), (1, 4, 5), (2, 3, 6), (0, 5, 6), (7, 0, 3), (3, 6, 7), (7, 0, 7)]:
        image = clean[j]
        if order == 2 and i < 7 and k < 7:
            log = np.log(a[:7] / s[:7])
            image = image + (log[k] - log[j]) / (2 * (log[j] - log[i])) * (clean[j] - clean[i])
        step = s[k] / s[j] * x[j] + (a[k] - a[j] * s[k] / s[j]) * image
        assert errors[i, j, k] == pytest.approx(((step - x[k]) ** 2).sum(), rel=1e-6)
    assert np.isinf(errors[0, 3, 2]) and np.isinf(errors[3, 2, 5])


@pytest.mark.parametrize("rule", RULES)
def test_fitted_timesteps_are_those_of_least_error(made, rule):
    errors = made.errors(rule.order)
    costs = np.sqrt(errors) if rule.coherent else errors

    def cost(calls):
        ends, before = [*calls, 7], [7, *calls]
        return sum(costs[before[n], calls[n], ends[n + 1]] for n in range(len(calls)))

    found = made.fitted(rule, 4)
    assert len(found) == 4 and all(times.split(",")[0] == "999" for times in found)
    for number, times in enumerate(found, 1):
        calls = [TIMES.index(int(time)) for time in times.split(",")]
        every = ([0, *rest] for rest in itertools.combinations(range(1, 7), number - 1))
        assert cost(calls) == pytest.approx(min(map(cost, every)))


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpmpp", 2)])
def test_a_run_makes_no_error_on_its_own_steps(sampler, order, tmp_path):
    """What is measured of a network with guidance is what the sampler steps through."""
    spec = RunSpec.of("configs/ldm_emoji.yaml")
    judge = Judge(Distances(run_of(spec, sampler, Grid(8)), CPU, tmp_path))
    found = trajectory(judge, [0])
    errors, size = found.errors(order), found.gram[8, 8]
    assert found.timesteps == judge.run(sampler, Grid(8)).sampler.call_timesteps()
    # DPM-Solver++ takes its last two steps of few with the first order
    own = [errors[j - 1 if j else 8, j, j + 1] for j in range(8 if order == 1 else 6)]
    assert max(own) < 1e-6 * size and errors[8, 0, 4] > 1e-3 * size
    judge.distances.latents = None                  # it is kept
    assert (trajectory(judge, [0]).gram == found.gram).all()


def test_fitted_timesteps_come_nearer_than_spread_ones(tmp_path):
    spec = RunSpec.of("configs/ldm_emoji.yaml")
    judge = Judge(Distances(run_of(spec, "unipc", Grid(20)), CPU, tmp_path))
    fitted = trajectory(judge, range(2)).fitted(Rule(2, False), 6)[-1]
    runs = [judge.run("unipc", grid) for grid in (Grid(6), Grid(6, fitted))]
    spread, found = (judge.distances.of(run, [4, 5]).mean() for run in runs)
    assert found > spread + 0.5
