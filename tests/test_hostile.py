"""The hostile program in short (tests/hostile.py; its long form: --slow, or python tests/hostile.py)."""

import pytest
from hostile import World, all_cases, faults_of

SHARE = 20      # one case of so many, other ones of each kind


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("hostile") / "world")


def test_a_share_of_the_cases(world, tmp_path):
    cases = all_cases(world)
    assert len(cases) >= 300
    faults = [fault for case in cases[::SHARE] for fault in faults_of(case, world, tmp_path)]
    assert not faults, "\n".join(faults)


@pytest.mark.slow
def test_every_case(world, tmp_path):
    faults = [fault for case in all_cases(world) for fault in faults_of(case, world, tmp_path)]
    assert not faults, "\n".join(faults)
