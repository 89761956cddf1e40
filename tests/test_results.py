"""The format of results: what is written comes back, and what is none is refused."""

import json
import re
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import fails, run_command

from eval import table
from eval.metrics.results import cost
from run import results
from run.files import ROOT
from run.results import Metric, Result
from run.spec import Run, RunSpec
from unet_caching.errors import UserError


def test_results_come_back_as_they_were_written(tmp_path):
    settings = RunSpec.of("ldm_cin256", interval=5).open().settings
    written = Result("adm", "ldm_cin256", json.loads(json.dumps(settings)), 50_000, macs=results.Cost(1.0, 2.0),
                     duration_s=3.5, metrics={"FID": Metric(3.0, [2.5, 3.5], 0.25), "IS": Metric(200.0)})
    results.write(tmp_path / "deep/r.json", written)
    assert results.read(tmp_path / "deep/r.json") == written
    assert list(results.read_all(tmp_path)) == [(tmp_path / "deep/r.json", written)]
    assert written.full_steps == list(range(0, 250, 5))


@pytest.mark.parametrize(("change", "said"), [
    ({"metrics": {"FID": {"value": float("nan"), "interval": None, "stderr": None}}}, "FID.value is nan"),
    ({"metrics": {"FID": {"value": 1.0, "interval": [2.0, 1.0], "stderr": None}}}, "FID: the interval is not [low"),
    ({"metrics": {"FID": 1.0}}, "FID is 1.0"), ({"images": 0}, "images is 0"), ({"images": "5"}, "images is '5'"),
    ({"format": 2}, "format 2, this program reads 1"), ({"surprise": 1}, "an unknown key surprise"),
    ({"macs": {"macs": 1.0}}, "macs has no macs_fc"), ({"settings": {"cache": 5}}, "settings.cache is 5"),
    ({"hashes": {"images": 5}}, "hashes.images is 5 and should be text"),
    *(({"kind": "throughput", "throughput": times}, said) for times, said in (
        ({"full": 5}, "throughput.full.median is None"), ({"full": {"median": "x"}}, "median is 'x' and should be"),
        ({"branches": 5}, "throughput.branches is 5"), ({"kinds": [{"median": 0}]}, "kinds[0].median is 0")))])
def test_what_is_no_result_is_refused(tmp_path, change, said):
    results.write(tmp_path / "r.json", Result("adm"))
    content = json.loads((tmp_path / "r.json").read_text())
    (tmp_path / "r.json").write_text(json.dumps(content | change))
    with pytest.raises(UserError, match=f"r.json is not a result of this program: .*{re.escape(said)}"):
        results.read(tmp_path / "r.json")
    with pytest.raises(UserError, match=r"damaged|no result"):
        (tmp_path / "r.json").write_text("{")
        results.read(tmp_path / "r.json")


def test_a_bad_result_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"FID.value is inf"):
        results.write(tmp_path / "r.json", Result("adm", metrics={"FID": Metric(float("inf"))}))
    assert not any(tmp_path.iterdir())


def test_every_number_that_is_kept_here_is_read_by_the_one_reader():
    found = dict(results.read_all(ROOT / "results"))
    assert {Path(str(path).partition("#")[0]) for path in found} == {
        path for suffix in ("json", "jsonl") for path in (ROOT / "results").rglob(f"*.{suffix}")}
    checked = 0
    for path, result in found.items():
        assert result.metrics or result.throughput or result.kind in ("fitted file", "converged", "macs"), path
        with suppress(UserError):                   # where a file decides what is computed
            own = cost(Run.of_settings(result.settings)) if result.macs else None
            if own is not None:
                checked += 1
                assert tuple(vars(result.macs).values()) == pytest.approx(tuple(vars(own).values())), path
    assert checked > 100
    reports = list((ROOT / "checkpoints/block_caching").glob("*.scale_shift.json"))
    assert reports and all(results.read(path).kind == "scale-shift" for path in reports)


@pytest.mark.parametrize("content", ["[1]", '{"interval": 5}', '{"kind": "quality", "value": 3.0}'])
def test_a_file_of_something_else_among_the_results_is_refused_by_name(capsys, tmp_path, content):
    results.write(tmp_path / "some.json", Result("adm"))
    (tmp_path / "other.json").write_text(content)
    code = run_command(table.main, "1", "--results", tmp_path)
    assert fails(capsys, code, "other.json is not a result of this program")


def test_numbers_of_sets_of_images_stand_beside_how_many_those_are():
    """A FID of few images is no FID of 50,000."""
    pages = [page.read_text().splitlines() for page in (ROOT / "results").rglob("*.md")]
    heads = [line for lines in pages for line, below in pairwise(lines)
             if below.startswith("|---") and re.search(r"FID|FD-|KID|\bIS\b|precision|recall", line)]
    assert len(heads) > 30 and all(re.search(r"[\d,]+ images|^\| images", head) for head in heads)
