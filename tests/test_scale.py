"""The arithmetic of docs/scale.md."""

import pytest

from lab.study import scale
from unet_caching.files.block_schedule import PlannedBlocks


@pytest.fixture(scope="module")
def runs() -> dict[tuple[str, str], scale.Run]:
    return {(run.arm.run.config.name, run.arm.folder.name): run for run in scale.all_runs()}


@pytest.mark.parametrize("model, name, rate, how", [
    ("ldm_cin256", "uniform_n5", 0.733, "printed"),
    ("ldm_cin256", "centered_n20_c10_p1.2", 1.876, "same work"),        # as many full steps as uniform N = 20
    ("ddpm_cifar10", "uniform_n10_zeroed", 20.26, "same work"),
    ("ddpm_cifar10", "steps50", 2 * 9.79, "by calls"),
    ("ldm_cin256", "steps59", 0.727, "printed"),
])
def test_rates_are_printed_or_derived(runs, model, name, rate, how):
    found = runs[model, name].rate
    assert found.how == how and found.gpu == "RTX 2080"
    assert found.images_per_second == pytest.approx(rate)


def test_other_schedules_than_the_papers_have_no_rate(runs):
    blocks = [run for run in runs.values() if run.arm.run.caching.of(PlannedBlocks)]
    assert all(run.rate is None for run in blocks)


def test_hours_leave_out_what_has_no_rate(runs):
    one = runs["ldm_cin256", "uncached"]
    assert scale.hours([one, one._replace(rate=None)]) == pytest.approx(50_000 / 0.178 / 3600)


def test_page_has_the_marks_and_every_table(runs):
    text = scale.PAGE.read_text()
    inside = text.partition(scale.BEGIN)[2].partition(scale.END)[0]
    assert all(f"\n| {run.table} |" in inside for run in runs.values())
