"""The search for plans: gaps measured, schedules by dynamic programming, and the command on a tiny random model."""

import itertools
import json
import multiprocessing
import pickle
import random
import re
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import run_command, tiny_ddpm

from ddpm.model import DDPM
from eval.cost.runs import call_macs, costs_of, macs_per_image
from lab.plans import candidates, search, tournament
from lab.plans.__main__ import main as plans_main
from lab.plans.candidates import Prices, deepcache_calls, deepened, neighbours, plans_of, uniform_schedules
from lab.plans.distances import Distances, psnr_to
from lab.plans.dynamic_programming import best_marks
from lab.plans.gaps import GapMeasurements, Gaps
from lab.plans.judge import Candidate, Grid, Judge, run_of
from lab.plans.timesteps import RULES
from lab.plans.tournament import Tournament
from run import results
from run.machine import Machine
from run.spec import RunSpec
from unet_caching.methods.deepcache import DeepCache
from unet_caching.methods.plan import Call, Plan, PlanCache

UNET = {"resolution": 8, "in_channels": 3, "out_channels": 3, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1,
        "attn_resolutions": [4]}
CPU = Machine(batch_size=4, device="cpu", threads=1)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_ddpm(tmp_path_factory.mktemp("tiny"), UNET, steps=20)


# Gaps

@pytest.fixture
def gaps() -> Gaps:
    """Two levels over 12 calls: features that curve, more so at the start, and level 1 counts half as much."""
    draw = np.random.default_rng(0)
    calls = np.arange(12)[:, None]
    bent = sum(curve * draw.normal(size=(1, 40)) for curve in (np.exp(-calls / 4), 0.1 * calls, np.sin(calls),
                                                               0.3 * np.cos(calls * 2)))
    features = {0: bent, 1: bent + 0.05 * draw.normal(size=(12, 40))}
    made = Gaps({level: value @ value.T for level, value in features.items()},
                {0: np.ones(12), 1: np.full(12, 0.5)}, ridge=0.0)
    made.features = features
    return made


@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_gram_matrix_tells_damping_and_error_of_a_forecast(gaps, order):
    """Against least squares over the features themselves."""
    steps, at = [6, 4, 1], 9
    damping, error = gaps.fit(1, at, steps, order)
    f = gaps.features[1]
    first = (at - 6) * (f[6] - f[4]) / 2
    second = (at - 6) * (at - 4) * ((f[6] - f[4]) / 2 - (f[4] - f[1]) / 3) / 5
    terms = np.stack([first, second], 1)[:, :order]
    best = np.linalg.lstsq(terms, f[at] - f[6], rcond=None)[0].clip(0, 1.5) if order else np.zeros(0)
    if order < 2:                       # a clipped weight moves the others
        assert damping == pytest.approx(best, abs=1e-3)
    left = f[at] - f[6] - terms @ np.array(damping)
    assert error == pytest.approx(0.5 * np.linalg.norm(left), rel=1e-5)


def test_the_policy_forecasts_what_was_fitted(gaps):
    """The terms of a plan's damping are those of the policy."""
    depths = (None, 1, None, None, 1, 1, 0, 0)
    calls, errors = gaps.fitted(depths, 2), [error for _, error in gaps.forecasts(depths, 2)]
    policy = PlanCache(calls)
    for step, call in enumerate(calls):
        policy.at(step)
        for level in (0, 1):
            feature = torch.from_numpy(gaps.features[level][step])
            value = policy(level, lambda feature=feature: feature)
            if level == call.branch:
                seen = float(gaps.weights[level][step] * (value - feature).norm())
                assert seen == pytest.approx(errors[step], rel=1e-5)
                break


@pytest.mark.parametrize("coherent", [True, False])
def test_dynamic_programming_finds_the_best_of_all_schedules(gaps, coherent):
    costs = gaps.of_gaps(0, coherent)

    def cost(full):
        ends, before = [*full, 12], [12, *full]
        return sum(costs[before[n], full[n], ends[n + 1]] for n in range(len(full)))

    found = best_marks(costs, 5)
    assert [len(full) for full in found] == [1, 2, 3, 4, 5] and all(full[0] == 0 for full in found)
    for full in found:
        every = ([0, *rest] for rest in itertools.combinations(range(1, 12), len(full) - 1))
        assert cost(full) == pytest.approx(min(map(cost, every)))
    if coherent:            # and the costs are those of the plan
        depths = tuple(None if step in found[3] else 0 for step in range(12))
        assert gaps.error(depths, 1) == pytest.approx(cost(found[3]), rel=1e-3)


# Candidates

PRICES = Prices(5.0, {0: 0.1, 1: 0.3})


def test_candidates_stay_within_the_budget(gaps):
    plans, simple = list(plans_of(gaps, Grid(12), PRICES, "unipc")), list(uniform_schedules(PRICES, "unipc"))
    assert {one.kind for one in plans} == {"plan"}
    assert {(trial.kind, trial.order) for trial in simple} == {
        ("DeepCache, uniform", 0), ("forecast, uniform", 1), ("forecast, uniform", 2)}
    for trial in [*plans, *simple]:
        assert PRICES.of(trial.depths) <= 5 + 1e-9 and trial.depths[0] is None
    assert all(PRICES.of(trial.depths) > 4.8 for trial in plans)        # what is left is spent
    # as many calls as the budget pays for: 4 full and 4 cached, 4 and 8, 4 and 10, 3 and 12
    assert [trial for trial in simple if trial.order == 1] == [
        Candidate("forecast, uniform", "unipc", Grid(calls),
                  tuple(deepcache_calls(0, range(0, calls, interval), calls, 1)), 1)
        for interval, calls in ((2, 8), (3, 12), (4, 14), (5, 15))]
    assert PRICES.lengths() == [6, 7, 8, 12, 14, 15]


def test_what_is_left_goes_where_it_saves_most(gaps):
    depths = (None, None, *[0] * 10)
    assert PRICES.of(depths) == pytest.approx(3)
    found = deepened(depths, gaps, PRICES, 1)
    assert PRICES.of(found) == pytest.approx(5) and found.count(1) == 10
    some = deepened(depths, gaps, Prices(3.5, PRICES.cached), 1)
    assert some.count(1) == 2 and gaps.error(some, 1) < gaps.error(depths, 1)


def test_neighbours_are_other_plans_of_the_budget(gaps):
    depths = (None, 0, 0, None, 0, 0, None, 0, 0, 0, 0, 0)

    def walk():
        return list(itertools.islice(neighbours(depths, gaps, PRICES, 1, random.Random(0)), 200))

    found = set(walk()) - {depths}
    assert len(found) > 20 and walk() == walk()
    assert all(PRICES.allow(one) and one[0] is None and len(one) == 12 for one in found)
    assert {one.count(None) for one in found} == {2, 3}


# Measured on a network

@pytest.fixture(scope="module")
def judge(config, tmp_path_factory):
    spec = RunSpec.of(config)
    return Judge(Distances(run_of(spec, "unipc", Grid(30)), CPU, tmp_path_factory.mktemp("work")))


def test_distances_are_those_of_the_runs_and_are_kept(config, judge):
    candidate, distances = Candidate("x", "dpmpp", Grid(9), tuple(deepcache_calls(1, [0, 3, 6], 9, 1))), judge.distances
    found = judge.of(candidate, [5, 6, 7])
    run = RunSpec.of(config, sampler="dpmpp", steps=9, timesteps="trailing", interval=3, branch=1, forecast=1).open()
    assert isinstance(run.caching.policy(), DeepCache)
    assert distances.of(run, [5, 6, 7]) == pytest.approx(found, abs=1e-3)
    model = distances.on(run)
    assert found == pytest.approx(psnr_to(distances.converged([5, 6, 7]), model.latents([5, 6, 7], model.policy())),
                                  abs=1e-3)
    same = pickle.loads(pickle.dumps((distances.run.spec, CPU, distances.folder.parent)))        # as processes get it
    other = Judge(Distances(*same))
    other.distances.on = None                                           # nothing is run again
    assert (other.of(candidate, [7, 5]) == found[[2, 0]]).all()


def test_gaps_of_a_network(judge):
    """The error of the feature that a run would see, against features taken from the network itself."""
    measured = GapMeasurements(judge, [0, 2], [1, 2], probe=Grid(6), nodes=3)
    gaps = measured.of(Grid(8))
    features = []

    class Counted(PlanCache):
        def __call__(self, key, compute):
            value = compute()
            if key == 2:
                features.append(value.clone())
            return value

    judge.distances.latents(judge.run("unipc", Grid(8)), [1, 2], Counted([Call()] * 8))
    f = [value.double().flatten() for value in features]
    damping, error = gaps.fit(2, 5, [3, 1], 1)
    left = f[5] - f[3] - damping[0] * (f[3] - f[1])
    assert error == pytest.approx(gaps.weights[2][5] * left.norm().item(), rel=1e-3)
    assert all((gaps.weights[branch][1:] > 0).all() for branch in (0, 2))
    assert (gaps.flattened(0.5).weights[2] ** 2)[1:] == pytest.approx(gaps.weights[2][1:])
    again = GapMeasurements(judge, [0, 2], [1, 2], probe=Grid(6), nodes=3).of(Grid(8))
    assert (again.weights[2] == gaps.weights[2]).all()


# The command

@pytest.fixture
def search_for(config):
    return lambda *words: run_command(plans_main, "search", "--config", config, "--device", "cpu", "--seeds", "10-13",
                                      "--held-out-seeds", "20-23", "--converged-steps", 8, "--attempts", 2, *words)


@pytest.fixture
def few(monkeypatch):
    """Fewer candidates."""
    monkeypatch.setattr(candidates, "STRETCH", (1.5,))
    for part in (candidates, tournament):
        monkeypatch.setattr(part, "INTERVALS", (3,))
        monkeypatch.setattr(part, "POWERS", (1.0,))
    monkeypatch.setattr(tournament, "RULES", RULES[:2])
    monkeypatch.setattr(search, "LEVELS", 2)
    monkeypatch.setattr(search, "SAMPLERS", ("unipc", "dpmpp3"))


class Killed(BaseException):
    """Stands for a kill, at any moment."""


def test_a_killed_search_comes_to_the_same_plan(few, search_for, config, tmp_path, capsys, monkeypatch):
    """To the last digit what one finds that is not killed, and measures in two processes."""
    out, real, left = tmp_path / "plan.json", DDPM.latents, [26]

    def until_killed(self, seeds, *args, **options):
        left[0] -= 1
        if not left[0]:
            raise Killed
        return real(self, seeds, *args, **options)

    monkeypatch.setattr(DDPM, "latents", until_killed)
    with pytest.raises(Killed):
        search_for("--calls", 4, "--out", out)
    assert not out.exists() and len(list((tmp_path / "plan.work").glob("*/psnr/*.json"))) > 3
    left[0] = 10 ** 9
    capsys.readouterr()
    context = multiprocessing.get_context("fork")       # which has imported what spawned ones would, for seconds
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: context)
    assert search_for("--calls", 4, "--out", tmp_path / "again.json", "--jobs", 2) == 0
    most = int(re.search(r"at most ([\d,]+) of them", capsys.readouterr().out)[1].replace(",", ""))
    assert search_for("--calls", 4, "--out", out) == 0
    assert out.read_text() == (tmp_path / "again.json").read_text()
    one, two = ({file.name: json.loads(file.read_text()) for file in (tmp_path / f"{name}.work").glob("*/psnr/*")}
                for name in ("plan", "again"))
    assert one == two and len(one) > 15
    full = sum(len(run["found"]) * sum(branch is None for branch, *_ in run["about"]["calls"]) for run in one.values())
    assert full + 12 * 8 < most < 2500                                  # as was announced
    the_report_says_what_was_compared(out)

    # it is a plan of the budget, and every program takes it
    plan, run = Plan.load(out), RunSpec.of(config, plan=out).open()
    assert plan.cost <= 4 + 1e-9 and plan.guidance is None
    assert plan.macs == macs_per_image(run)._asdict() and plan.macs_full == costs_of(run).full._asdict()
    branches = [call.branch for call in plan.calls]
    assert [sorted(keys) for keys in run.reused] == [[] if branch is None else [branch] for branch in branches]
    assert len(call_macs(run)) == run.calls == len(plan.calls)


def the_report_says_what_was_compared(out):
    plan, found = Plan.load(out), results.read(out.with_suffix(".search.json"))
    assert found.images == 4 and found.details["reported_on"] == "24-27" and found.hashes["plan"] == plan.sha256
    value = {name: metric.value for name, metric in found.metrics.items()}
    tried = found.details["candidates"]
    chosen, *others = tried[:found.details["reported"]]
    assert {one["kind"].split(",")[0] for one in others} == {"fewer steps", "DeepCache", "forecast"}
    assert chosen["branches"] == [call.branch for call in plan.calls]
    assert plan.notes["distance"]["mean"] == value["plan"]
    for one in others:
        assert value[f"plan less {one['kind']}"] == pytest.approx(value["plan"] - value[one["kind"]])
    rest = Counter(one["kind"] for one in tried[len(others) + 1:])
    assert all(one["full_calls"] <= 4 for one in tried) and max(rest.values()) <= 10
    assert {f"fewer steps, {name}" for name in ("unipc", "dpmpp3", "ddim")} <= {one["kind"] for one in tried}


def test_the_best_of_each_group_takes_part(few, judge):
    measured = GapMeasurements(judge, [0, 1], range(4), Grid(6), 2)
    prices = Prices(4.0, {0: 0.2, 1: 0.35})
    searched = Tournament(judge, measured, prices, ("unipc", "plms"), range(8), 4, 4, (4, 1))
    assert searched.sizes() == [4, 8]
    found = searched.run()
    plans = [one for one in found if one.group == "plan"]
    assert sorted(one.group for one in found if one.group != "plan") == [
        "DeepCache, uniform", "fewer steps", "fewer steps, fitted", "forecast, uniform"]
    plms = [one for one, _ in searched.first if one.kind == "fewer steps, plms"]
    # 3 steps do not divide the timesteps; a step more is called
    assert [(one.grid.steps, len(one.depths)) for one in plms] == [(2, 3), (1, 1)]
    assert all(prices.of(one.depths) <= 4 + 1e-9 for one in found)
    # what is kept is the best of its group, and the improved plan is no worse than the one that was found
    assert 1 <= len(plans) <= 2
    assert judge.of(plans[-1], range(8)).mean() >= judge.of(plans[0], range(8)).mean()


def test_a_budget_too_small_for_plans_is_spent_on_steps(few, judge):
    measured = GapMeasurements(judge, [0, 1], range(4), Grid(6), 2)
    found = Tournament(judge, measured, Prices(2.0, {0: 0.2, 1: 0.35}), ("unipc",), range(4), 8, 4, (4, 1)).run()
    assert {one.group for one in found} == {"fewer steps", "fewer steps, fitted"}


@pytest.mark.parametrize(("words", "why"), [
    ((), "--calls, --macs or --speedup"), (("--calls", 1.5), "must be from 2 to"),
    (("--speedup", 0), "must be from 2 to"), (("--macs", 1e-9), "must be from 2 to"),
    (("--calls", 4, "--held-out-seeds", "13-20"), "seed 13 is in two of"),
    (("--calls", 4, "--report-seeds", "30-31"), "--report-seeds must be 4 or more"),
    (("--calls", 4, "--compile"), "are for sampling"), (("--calls", 4, "--attempts", -1), "--attempts must be 0"),
    (("--calls", 4, "--jobs", 0), "--jobs must be 1"), (("--calls", 4, "--speedup", 2), "not allowed with"),
    (("--calls", 4, "--out", "nowhere/plan.json"), "in a folder that exists")])
def test_refusals(search_for, tmp_path, capsys, words, why):
    assert search_for("--out", tmp_path / "plan.json", *words) == 2
    assert why in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_budgets(config):
    run = RunSpec.of(config).open()

    def budget(**given):
        return search.Options(out=None, seeds="", held_out_seeds="", **given).prices(run).budget

    assert budget(calls=4.5) == 4.5 and budget(speedup=4) == 5.0
    assert budget(macs=6 * costs_of(run).full.hook / 1e9) == pytest.approx(6)
