"""The fault program in short (tests/faults.py; its long form: --slow, or python tests/faults.py --kills 100)."""

import random

import pytest
from faults import DAMAGE, Models, damaged, full_disk, kill_often, read_only, two_writers

from eval.metrics import extract

KILLS = {"sampling": 4, "two ranks": 3, "conversion and sampling": 3, "packing": 4, "evaluation": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return Models(tmp_path_factory.mktemp("faults") / "models")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(extract, "PART", 3)


@pytest.mark.parametrize(("name", "kills"), KILLS.items())
def test_killed_at_any_moment(models, name, kills, tmp_path):
    assert kill_often(models.cases()[name], kills, tmp_path, random.Random(name)).total() >= kills


@pytest.mark.slow
def test_killed_a_hundred_times(models, tmp_path):
    models.add_inception()
    cases = models.cases().values()
    assert len(cases) == 6
    assert sum(kill_often(case, 17, tmp_path, random.Random(case.name)).total() for case in cases) >= 100


@pytest.mark.parametrize(("name", "pattern", "heals"), DAMAGE)
def test_a_file_cut_short(models, name, pattern, heals, tmp_path):
    damaged(models.cases()[name], pattern, heals, tmp_path, random.Random(pattern), cuts=1)


@pytest.mark.parametrize("name", ["sampling", "conversion and sampling", "packing"])
def test_two_writers(models, name, tmp_path):
    two_writers(models.cases()[name], tmp_path)


@pytest.mark.parametrize("name", ["sampling", "conversion and sampling", "packing"])
def test_disks_that_are_full_or_read_only(models, name, tmp_path):
    try:
        assert full_disk(models.cases()[name], tmp_path) > 0
        read_only(models.cases()[name], tmp_path)
    except PermissionError as error:
        pytest.skip(str(error))
