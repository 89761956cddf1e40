"""Which steps are full, to the step."""

import json
from itertools import pairwise

import pytest
from conftest import HERE

from unet_caching.schedules import centered, released_ldm, uniform

GOLDEN = json.loads((HERE / "goldens" / "schedules.json").read_text())


@pytest.mark.parametrize(("steps", "interval", "expected"), [
    (8, 3, [0, 3, 6]), (8, 1, list(range(8))), (8, 8, [0]), (1, 1, [0]),
])
def test_uniform(steps, interval, expected):
    assert uniform(steps, interval) == expected


def test_centered_makes_the_papers_schedules():
    for row in GOLDEN:
        steps = centered(row["T"], row["N"], row["center"], row["power"])
        assert steps == row["full_steps"] and len(steps) == row["n_full"], row


def test_centered_takes_the_real_part_of_a_complex_power():
    signed_real_power = [0, 6, 11, 14, 15, 19, 24, 29, 35, 42]
    assert centered(50, 5, 15, 1.4) == [0, 5, 9, 13, 17, 21, 26, 31, 37, 43] != signed_real_power


def test_centered_lowers_the_power_until_the_count_is_met():
    assert centered(50, 2, 20, 1.3) == centered(50, 2, 20, 1.2)


def test_center_zero_starts_dense():
    gaps = [b - a for a, b in pairwise(centered(100, 10, 0, 2.0))]
    assert gaps == sorted(gaps) and gaps[0] < gaps[-1]


def test_released_ldm_drops_repeated_steps():
    assert released_ldm(250, 20, 1.5) == [0, 5, 15, 27, 42, 59, 78, 98, 120, 144, 168, 194, 221]
    assert released_ldm(8, 3, 1.5) == [0, 1, 4]
    assert len(released_ldm(250, 2, 3.0)) < 125


@pytest.mark.parametrize(("call", "word"), [
    (lambda: uniform(50, 0), "interval"), (lambda: uniform(50, 51), "interval"), (lambda: uniform(0, 1), "steps"),
    (lambda: centered(50, 5, 50, 1.4), "center"), (lambda: centered(50, 5, -1, 1.4), "center"),
    (lambda: centered(50, 5, 15, 0.0), "power"), (lambda: centered(50, 5, 15, float("nan")), "power"),
    (lambda: centered(10, 2, 5, 1.2), "center"), (lambda: released_ldm(250, 0, 1.5), "interval"),
])
def test_bad_settings_are_refused(call, word):
    with pytest.raises(ValueError, match=word):
        call()
