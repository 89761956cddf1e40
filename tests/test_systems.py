"""The comparison of systems: files that are made, runs that are left out, what is kept, what the table says."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_UNET, run_command, tiny_ddpm

from ddpm import sample
from lab.fit.__main__ import FITS, VERBS
from lab.plans.distances import Distances
from lab.study import systems
from lab.study.systems_report import Row, difference, lines, rival, table
from run import results
from run.machine import Machine
from run.results import Metric
from run.spec import RunSpec
from run.weights import sha256
from unet_caching.methods.adaptive import AdaptiveMethod
from unet_caching.methods.clockwork import AdaptorFile

STUDY = """
model: CONFIG
seeds: 0-3
converged: {sampler: unipc, steps: 8}
common: {timesteps: trailing}
files:
  FOLDER/learned.safetensors: >-
    lab.fit adaptor {common} --sampler unipc --steps 6 --clock 3 --clock-branch 1 --channels 4 --seeds 10-11
    --held-out-seeds 20-21 --device cpu
  FOLDER/rule.json: >-
    lab.fit adaptive {common} --sampler unipc --steps 6 --calls 4 --seeds 10-11 --held-out-seeds 20-21
    --device cpu
systems:
- {system: "Clockwork, learned", calls: 4, sampler: unipc, steps: 6, clock: 3, clock_branch: 1,
   adaptor: FOLDER/learned.safetensors}
- {system: "fewer steps, unipc", calls: [3, 4], sampler: unipc, steps: 4}
- {system: adaptive, calls: 4, sampler: unipc, steps: 6, adaptive: FOLDER/rule.json}
- {system: plan, calls: 4, plan: "FOLDER/plan_{calls}.json"}
"""


@pytest.fixture
def study(tmp_path, capsys):
    """study(text, *options): run the command; its exit code, what it printed, and where its results are."""
    config = tiny_ddpm(tmp_path, TINY_UNET, steps=8)

    def run(text: str = STUDY, *options: object) -> tuple[int, str, Path]:
        path = tmp_path / "systems_one.yaml"
        path.write_text(text.replace("CONFIG", str(config)).replace("FOLDER", str(tmp_path / "made")))
        code = run_command(systems.main, "--config", path, "--results", tmp_path / "results", "--work",
                           tmp_path / "work", "--samples", tmp_path / "samples", "--device", "cpu", "--threads", 1,
                           *options)
        told = capsys.readouterr()
        return code, told.out + told.err, tmp_path / "results" / "systems" / "one"
    return run


def test_a_study_makes_what_it_can_and_leaves_out_the_rest(study, tmp_path):
    code, listed, folder = study(STUDY, "--list")
    assert code == 0 and not folder.exists() and listed.count("no /") == 3
    code, told, folder = study(STUDY, "--quick")
    assert code == 0 and "left out: Clockwork, learned at 4 calls, there is no " in told
    assert "plan_4.json" in told and not (tmp_path / "made").exists()
    assert [path.stem for path in (folder / "runs").iterdir()] == ["unipc_steps4_trailing"]

    code, told, folder = study(STUDY, "--make", "--quick")
    assert code == 0 and told.count("left out") == 1
    note = results.read(folder / "made" / "learned.safetensors.json")
    assert note.details["cpu_s"] > 0 and "--clock 3" in note.details["command"]
    assert AdaptorFile.load(tmp_path / "made" / "learned.safetensors").made_for["steps"] == 6
    text = (folder / "table.md").read_text()
    assert "Clockwork, learned" in text and "## 3 calls" in text and "Left out: plan" in text
    calls = results.read(folder / "runs" / "adaptive_rule_unipc_steps6_trailing.json").details["spent"]
    assert len(calls) == 4 and all(1 < one <= 6 for one in calls)
    assert next(line for line in text.splitlines() if line.startswith("| adaptive")).split(" | ")[2] == (
        f"{np.mean(calls):.2f}")
    assert (folder / "systems.png").stat().st_size > 1000
    page = (folder / "index.html").read_text()
    assert "Clockwork, learned" in page and "3 calls" in page and "python -m ddpm.sample" in page

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    assert study(STUDY, "--make", "--quick")[0] == 0
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}


def test_images_are_those_of_the_sample_command_and_their_distance_is_noted(study, tmp_path):
    config = tiny_ddpm(tmp_path, TINY_UNET, steps=8)
    machine = Machine(batch_size=2, device="cpu", threads=1)
    converged = RunSpec.of(config, sampler="unipc", timesteps="trailing", steps=8)
    distances = Distances(converged, machine, tmp_path / "work")
    run = converged.having(steps=6, clock=3, clock_branch=1).open()
    place = systems.Place("one", tmp_path / "results", tmp_path / "work", tmp_path / "samples")
    arm = place.arm(run, 3, machine)
    systems.sample(arm, distances, range(3))
    assert distances.known(run).keys() == {0, 1, 2}
    assert run_command(sample.main, "--config", config, "--sampler", "unipc", "--timesteps", "trailing", "--steps", 6,
                       "--clock", 3, "--clock-branch", 1, "--seeds", "0-2", "--device", "cpu", "--out", arm.folder) == 0
    assert run_command(sample.main, "--config", config, "--sampler", "unipc", "--timesteps", "trailing", "--steps", 6,
                       "--clock", 3, "--clock-branch", 1, "--seeds", "0-2", "--device", "cpu", "--batch-size", 2,
                       "--out", tmp_path / "again") == 0
    for image in (arm.folder / "000").glob("*.png"):
        assert image.read_bytes() == (tmp_path / "again" / "000" / image.name).read_bytes()
    noted = distances.of(run, range(3))
    fresh = Distances(converged, machine, tmp_path / "elsewhere")
    assert np.allclose(noted, fresh.of(run, range(3)), atol=1e-3)


@pytest.mark.parametrize(("change", "word"), [
    (("seeds: 0-3", "seeds: 1-3"), "from 0 on"), (("steps: 4}", "step: 4}"), "is it steps?"),
    (("calls: 4, plan", "plan"), "its calls, the budget"), (("calls: 4, plan", "calls: 0.5, plan"), "whole numbers"),
    (("--channels 4", "--channels '4"), "its command has a No closing quotation"),
    (("files:", "files:\n  a: made --of b\n  b: made --of a"), "is made of the others"),
    (("sampler: unipc, steps: 4", "steps: 4, model: x"), "of one model"),
    (("timesteps: trailing", "timesteps: trailing, prompts: x"), "no option"),
    (("steps: 8}", "steps: 8, interval: 2}"), "without caching")])
def test_studies_that_cannot_be_are_refused(study, change, word):
    code, told, folder = study(STUDY.replace(*change), "--quick")
    assert code == 2 and word in told and not folder.exists()


def made(system, cost, shift, calls=8, **more):
    return Row(system, calls, system, cost, None, np.array([1.0, 2.0, 3.0]) + shift, {}, **{"made": 0.0, **more})


def test_tables_compare_with_the_best_of_fewer_steps():
    rows = [made("fewer steps, a", 8.0, 0.0), made("fewer steps, b", 8.0, 1.0), made("plan", 7.9, 3.5, made=None),
            made("plan", 12.0, 5.0, 12), made("Clockwork", 8.0, -1.0, made=90.0)]
    assert rival(rows[2], rows) is rows[1] and rival(rows[3], rows) is None
    assert difference(rows[2], rows[1]) == "+2.5 [+2.5, +2.5]" and difference(rows[1], rows[1]) == "-"
    assert [row[0] for row in table(rows, 8)[1:]] == ["plan", "fewer steps, b", "fewer steps, a", "Clockwork"]
    assert table(rows, 8)[1][-1] == "?" and table(rows, 8)[4][-1] == "1.5"
    assert [row.cost for row in lines(rows)["plan"]] == [7.9, 12.0]
    quality = {"FD-EffLite0": Metric(12.0, stderr=1.0), "FD-EffLite0 minus uncached": Metric(0.5, stderr=0.1)}
    assert table([replace(made("plan", 8.0, 0.0), quality=quality)], 8)[1][-3:-1] == ("12.0 ± 2.0 (+0.5 ± 0.2)", "-")


def test_files_are_made_after_what_they_are_made_of():
    files = {"c": "make --from b --also a", "b": "make --from a", "a": "make"}
    assert systems.needed("c", files) == ["a", "b", "c"]


def test_what_a_file_cost_is_known_without_those_on_the_way_to_it(tmp_path):
    """They need not be kept; a file that is not the one that was made has no known cost."""
    on_the_way, file = tmp_path / "changes.json", tmp_path / "schedule.json"
    study = systems.Study("x", "0-1", {}, [], files={str(on_the_way): "measure", str(file): f"make --of {on_the_way}"})
    place = systems.Place("one", tmp_path, tmp_path, tmp_path)
    for path, cpu_s in ((on_the_way, 3.0), (file, 2.0)):
        path.write_text(path.name)
        results.write(place.made(path), results.Result(systems.MADE, "x", hashes={"file": sha256(path)},
                                                       details={"cpu_s": cpu_s}))
    entry = systems.Entry("Block Caching", 8, {"block_schedule": str(file)})
    assert systems.cost_of_making(entry, study, place) == 5
    on_the_way.unlink()
    assert systems.cost_of_making(entry, study, place) == 5
    file.write_text("another")
    assert systems.cost_of_making(entry, study, place) is None


STUDIES = sorted(Path("configs/studies").glob("systems_*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_compare_at_equal_cost(path):
    """Their runs open, cost what the budget says (looked at where it is smallest, and whole steps the coarsest), and
    all of their files can be made."""
    study = systems.read_study(path)
    found = list(systems.entries(study))
    assert all(str(file) in study.files or file.parent.name == "plans" for entry in found for file in entry.files)
    for entry, run in systems.opened(found, study, path):
        if entry.calls == 8 or "plan" in entry.options:
            cost = systems.cost_of(run)
            if adaptive := run.caching.of(AdaptiveMethod):     # what it was settled to; held-out seeds come near that
                of = adaptive.rule.notes
                assert cost <= 1.05 * entry.calls, run.name
                cost = of["full calls"] + of["cached call"] * (run.calls - of["full calls"])
            assert 0.89 * entry.calls < cost <= 1.02 * entry.calls, run.name
    for command in study.files.values():
        module, kind, *_ = command.split()
        assert module == "lab.fit" and kind in {*FITS, *VERBS}
    assert {entry.calls for entry in found} == {8, 12, 18, 25}


def test_there_is_a_study_for_each_shipped_model():
    assert [systems.read_study(path).model for path in STUDIES] == ["ddpm_emoji", "ldm_emoji", "sd_emoji"]
