"""Studies: their arms, what is refused, what their tables say, and those that are shipped."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import HERE, main_of, run_command

from eval.tables.arms import Arm, Given
from eval.tables.study import FOLDER, Entry, entries, files_of, needed, opened, read_study
from lab.study.bench import Bench
from lab.study.ledger import Ledger
from lab.study.measures import MEASURES
from lab.study.more import orders
from lab.study.rows import Row, Rows, cost_of, front
from lab.study.tables import Shown, open_benches
from run import results
from run.results import Metric, Result
from run.spec import RunSpec
from run.weights import sha256
from unet_caching.errors import UserError
from unet_caching.methods.adaptive import AdaptiveMethod

ROOT = HERE.parent
SHIPPED = sorted(path.stem for path in (ROOT / FOLDER).glob("*.yaml"))


def bench_of(folder: Path, tiny: Path, **content: object) -> Bench:
    """The only part of a study of the tiny model."""
    path = folder / "some.yaml"
    path.write_text(yaml.safe_dump({"model": str(tiny), "seeds": "0-4", **content}, sort_keys=False))
    read = read_study(path)
    return Bench(read.parts[0], path, Given(samples=folder / "samples"), Ledger(folder / "records.jsonl"))


# What a file may say

def test_arms_are_every_combination_once(tmp_path, tiny):
    bench = bench_of(tmp_path, tiny, arms=[
        {"interval": [1, 2], "branch": "all"}, {"interval": 2, "branch": [1, 2]}, {"steps": [4, 2], "interval": 1},
        {"called": "twice as often", "interval": 2}])
    assert [arm.run.name for arm in bench.arms] == [
        "uncached", "uniform_n2_branch0", "uniform_n2", "uniform_n2_branch2", "uniform_n2_branch3", "steps2",
        "uniform_n2"]
    assert len(bench.all) == 6 and all(arm.images == 5 for arm in bench.arms)
    assert [arm.label for arm in bench.arms][-2:] == ["steps2", "twice as often"]
    assert "--seeds 0-4 --out" in " ".join(bench.arms[-1].command()) and bench.setup.whole.label == "uncached"


def test_every_option_of_a_registered_method_is_one_of_studies(tmp_path, tiny):
    with pytest.raises(UserError, match=r"forecast 0, forecast_damping 0.5.*--forecast-damping needs"):
        bench_of(tmp_path, tiny, arms=[{"interval": 2, "forecast": [0, 1], "forecast_damping": [1, 0.5]}])
    bench = bench_of(tmp_path, tiny, arms=[{"interval": 2, "forecast": 1, "forecast_damping": [1, 0.5]},
                                           {"interval": 2, "zero_cache": True, "branch": [0, 1]}])
    assert [arm.run.name for arm in bench.arms] == ["uniform_n2_forecast1", "uniform_n2_forecast1_damped0.5",
                                                    "uniform_n2_branch0_zeroed", "uniform_n2_zeroed"]
    assert Row(bench.arms[1], {}).options == {"interval": 2, "forecast": 1, "forecast_damping": 0.5}


ARM = {"interval": 2}


@pytest.mark.parametrize(("content", "message"), [
    ({"arms": [{"brnach": 2}]}, "no option 'brnach': is it branch?"),
    ({"arms": [ARM, {"interval": 2, "branch": 12}]}, r"branch 12: --branch must be from 0 to 3"),
    ({"arms": [{"interval": 2, "center": 3}]}, "takes no center"),
    ({"arms": [{"interval": 2, "schedule": "centred"}]}, "schedule cannot be 'centred'"),
    ({"arms": [{"interval": "five"}]}, "interval is 'five' and should be a whole number"),
    ({"arms": [{"interval": []}]}, "interval has no values"),
    ({"arms": [{"interval": 2, "forecast": True}]}, "forecast is True and should be a whole number"),
    ({"arms": [{"zero_cache": 1}]}, "zero_cache is 1 and should be true or false"),
    ({"arms": [{"budget": 0.5}]}, "arm 1: budget is 0.5 and should be a whole number"),
    ({"arms": [{"model": "x"}]}, "no option 'model'"),
    ({"arms": [ARM], "model": "ddpm_emoij"}, "no model 'ddpm_emoij': choose from ddpm_bedroom"),
    ({"arms": [ARM], "model": "sd_emoji", "common": {"prompts": "data/emoji/prompts.txt"}, "seeds": "0-99"},
     "images_per_prompt to be at least 2"),
    ({"arms": [ARM], "sedes": 3}, "an unknown key sedes"), ({"arms": []}, "arms is empty"), ({}, "has no arms"),
    ({"arms": [ARM], "seeds": "3-1"}, "runs backwards"), ({"arms": [ARM], "chosen_on": 5}, "chosen_on must split"),
    ({"arms": [ARM], "twice": 9}, "twice must be from 0 to the 6"),
    ({"arms": [ARM], "measure": ["nea"]}, "no measure 'nea': choose from near"),
    ({"arms": [ARM], "show": "tables"}, "show has no 'tables'"), ({"arms": [ARM], "show": {"by": 3}}, "by is 3"),
    ({"arms": [ARM], "extractors": ["inception"]}, "no extractor 'inception': choose from efflite0"),
    ({"arms": [ARM], "common": {"prompts": "x"}}, "some.yaml.*no option 'prompts'"),
    ({"arms": [ARM], "converged": {"steps": 60, "interval": 2}}, "no option 'interval'.*sampler, steps, timesteps"),
    ({"arms": [ARM], "converged": {"sampler": "dpmpp"}}, "converged has no steps"),
    ({"arms": [ARM], "measure": ["converged"], "converged": {"sampler": "ddim", "steps": 10, "eta": 1.0}}, "eta 1.0"),
    ({"arms": [ARM], "made": {"a": "made --with 'a"}}, "its command is wrong: No closing quotation"),
    ({"arms": [ARM], "made": {"a": "made --of b", "b": "made --of a"}}, "need each other"),
    ({"arms": [ARM], "measure": ["near"], "against": {"interval": 2}}, "must have no caching"),
    ({"arms": [ARM], "measure": ["near"], "against": {"timesteps": "uniform"}}, "differ in timesteps")])
def test_what_cannot_be_is_refused_in_one_line(study, tmp_path, content, message):
    code, told = study(content, *([] if "near" in content.get("measure", ()) else ["--list"]))
    assert code == 2 and re.search(message, told) and told.splitlines()[-1].startswith("error: "), told
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize("words", [("--share", "0/2"), ("--share", "3/2"), ("--share", "1"), ("--only", "N=7"),
                                   ("--jobs", -1), ("--seeds", "x"), ("--images", 0)])
def test_options_that_cannot_be(study, words):
    code, told = study({"arms": [ARM]}, *words)
    assert code == 2 and "error: " in told and not study.samples.exists()


def test_files_are_made_after_what_they_are_made_of():
    made = {"c": "make --from b --also a", "b": "make --from a", "a": "make"}
    assert needed("c", made) == ["a", "b", "c"]


def test_what_is_kept_of_a_file_that_is_no_longer_here(tmp_path, tiny):
    """A run of scale-shift costs what it costs without; its records stay in the table, and in their file."""
    schedule = ROOT / "checkpoints" / "systems" / "ldm_emoji" / "all_8.json"
    bench = open_benches("systems_ldm", Given(results=ROOT / "results"))[1][0]
    assert schedule.is_file() and [str(entry) for entry in bench.left_out][:1] == [
        "Block Caching, scale-shift at 8 calls"]
    rows = Shown(bench).rows.rows
    plain, kept = (next(row for row in rows if row.kind == kind and row.arm.entry.budget == 8)
                   for kind in ("Block Caching", "Block Caching, scale-shift"))
    assert kept.name == plain.name.replace("all_8", "all_8_scale_shift") and kept.cost == plain.cost
    assert kept.psnr.mean() != plain.psnr.mean() and Shown(bench).left_out == []


def test_what_a_file_cost_is_known_without_those_on_the_way_to_it(tmp_path, tiny):
    """They need not be kept; a file that is not the one that was made has no known cost."""
    on_the_way, file = tmp_path / "changes.json", tmp_path / "schedule.json"
    bench = bench_of(tmp_path, tiny, arms=[ARM], made={str(on_the_way): "measure", str(file): f"do --of {on_the_way}"})
    for path, cpu_s in ((on_the_way, 3.0), (file, 2.0)):
        path.write_text(path.name)
        results.write(bench.made(str(path)), Result("fitted file", "x", hashes={"file": sha256(path)},
                                               details={"cpu_s": cpu_s}))
    entry = Entry({"block_schedule": str(file)})
    assert bench.cost_of_making(entry) == 5
    on_the_way.unlink()
    assert bench.cost_of_making(entry) == 5
    file.write_text("another")
    assert bench.cost_of_making(entry) is None


# What the tables say

def row(kind: str, cost: float, shift: float, budget: int | None = None, sampler: str = "unipc", cached: bool = False,
        **more: object) -> Row:
    """A row of a cost, whose seeds are 1, 2, 3, 4 dB and a shift from the converged ones."""
    run = RunSpec.of("ddpm_emoji", sampler=sampler, timesteps="trailing", steps=round(cost),
                     interval=3 if cached else 1).open()
    psnr = [one + shift for one in (1.0, 2.0, 3.0, 4.0)]
    records = {"near": Result("near", metrics={"full calls": Metric(cost), **more.pop("metrics", {})},
                              details={"psnr": psnr})}
    return Row(Arm(Entry({}, kind, kind, budget), run, range(4), Path(kind), Path(kind)), records, **more)


def test_cost_decides_what_a_run_is_compared_with():
    plain = [row(f"fewer steps, {name}{steps}", steps, shift, sampler=name) for name, steps, shift in (
        ("unipc", 3, 0), ("unipc", 9, 20), ("unipc", 27, 40), ("ddim", 3, -5), ("ddim", 9, 5), ("ddim", 27, 15))]
    cached = row("reuse", 9.1, 20.5, cached=True)
    rows = Rows([*plain, cached], plain[0], 2)
    assert rows.rival(cached).kind == "fewer steps, unipc9"            # 9 costs 0.989 of 9.1
    assert rows.rival(cached, among=lambda one: one.run.sampler.name == "ddim").kind == "fewer steps, ddim9"
    assert rows.rival(cached, lambda one: 3 * one.cost if one.plain else 27.0).kind == "fewer steps, unipc9"
    better = row("fewer steps, unipc3", 3, 21)
    assert Rows([better, *plain[1:], cached], plain[0], 2).rival(cached) is better      # cheaper and better
    assert rows.rival(row("reuse", 40, 0, cached=True)) is None
    assert rows.nearer(cached, plain[1]).bounds == (0.5, 0.5, 0.5)


def test_budgets_decide_where_there_are_some():
    rows = [row("fewer steps, a", 8, 0, 8), row("fewer steps, b", 8, 1, 8), row("plan", 7.9, 3.5, 8, cached=True),
            row("plan", 12, 5, 12, cached=True)]
    among = Rows(rows, rows[0])
    assert among.rival(rows[2]) is rows[1] and among.rival(rows[3]) is None
    assert among.nearer(rows[2], rows[1]).value == 2.5 and among.nearer(rows[1], rows[1]) is None


def test_fronts_and_orders():
    points = [(3, 1.0), (1, 5.0), (2, 2.0), (2, 2.5), (4, 1.0), (1, 5.0)]
    assert front(points, higher=False) == [0, 1, 2, 5]          # equals do not beat each other
    assert front(points, higher=True) == [1, 5]
    plain = [row("fewer steps", steps, 40 * np.log10(steps)) for steps in (3, 9, 27)]
    assert orders(Rows(plain, plain[0]))[-1].endswith("| 3, 9, 27 | 2.00, 2.00 |")


# What is shipped

@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_studies_open_and_their_results_belong_to_them(name):
    """Every record is of a run, or a file, that the study has today."""
    study, packed = read_study(name), ROOT / "results" / name / "records.jsonl"
    known, files = set(), set()
    for part in study.parts:
        assert len(opened(part, study.path)[0]) > 3 and set(part.measure) <= MEASURES.keys()
        for line in part.made.values():
            assert Path(f"{line.split()[0].replace('.', '/')}").is_dir()
        bench = Bench(part, study.path, Given(results=ROOT / "results"), Ledger(packed))
        known |= {arm.name for other in (bench, *bench.also) for arm in other.all} | {bench.setup.whole.name} | {
            next(iter(records.values())).details["name"] for _, records in bench.kept()}
        files |= part.made.keys()
    for result in results.read_packed(packed) if packed.is_file() else ():
        assert result.details["file"] in files if result.kind == "fitted file" else result.details["name"] in known


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.startswith("systems_")])
def test_shipped_systems_are_compared_at_equal_cost(name):
    """They cost what the budget says (looked at where it is smallest, and whole steps the coarsest), and all of their
    files can be made."""
    part = read_study(name).parts[0]
    assert all(str(file) in part.made or "plans" in file.parts for entry in entries(part, name)
               for file in files_of(entry).values())
    for entry, run in opened(part, Path(name))[0]:
        if entry.budget == 8 or "plan" in entry.options:
            cost = cost_of(run)
            if adaptive := run.caching.of(AdaptiveMethod):     # what it was settled to; held-out seeds come near that
                of = adaptive.rule.notes
                assert cost <= 1.05 * entry.budget, run.name
                cost = of["full calls"] + of["cached call"] * (run.calls - of["full calls"])
            assert 0.89 * entry.budget < cost <= 1.02 * entry.budget, run.name
    assert {entry.budget for entry in entries(part, name)} == {8, 12, 18, 25}


@pytest.mark.parametrize("name", ["demo", "demo_short"])
def test_arms_of_the_demos_cost_alike(name):
    """Every cached arm has one of fewer steps that costs what it does, to half a call or so; PLMS makes one more."""
    for bench in open_benches(name, Given())[1]:
        plain = [cost_of(arm.run) for arm in bench.arms if arm.entry.kind == "fewer steps"]
        for arm in bench.arms:
            if arm.run.caching and arm.entry.kind != "control":
                more = arm.run.calls - arm.run.steps
                assert min(abs(cost - more - cost_of(arm.run)) for cost in plain) <= 0.55, arm.label
                assert arm.entry.budget is None or abs(arm.entry.budget - cost_of(arm.run)) <= 0.5


RENDERED = [name for name in SHIPPED if (ROOT / "results" / name).is_dir()]
QUICK = ("bf16_ldm", "block_caching", "ldm_emoji_at_12_calls", "plans_sd", "systems_sd")


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
                                  for name in RENDERED])
def test_tables_that_are_kept_are_those_of_their_records(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for other in RENDERED:
        (tmp_path / other).mkdir()
        shutil.copy(ROOT / "results" / other / "records.jsonl", tmp_path / other)
        for picture in (ROOT / "results" / other).glob("samples*.png"):
            shutil.copy(picture, tmp_path / other)
    assert run_command(main_of("lab.study"), name, "--render", "--device", "cpu", "--results", tmp_path) == 0
    for file in ("table.md", "records.jsonl"):
        assert (tmp_path / name / file).read_text() == (ROOT / "results" / name / file).read_text()


@pytest.mark.parametrize("name", RENDERED)
def test_charts_have_at_most_eight_lines_each_with_its_name(name):
    for chart in (ROOT / "results" / name).glob("charts*.svg"):
        plots = chart.read_text().split('<g class="plot"')[1:]
        assert plots and all(1 <= plot.count('class="name"') <= 8 for plot in plots), chart
        assert all(" against " not in plot for plot in plots), f"{chart}: a title that is no message"
