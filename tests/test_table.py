"""The papers' tables: what is printed is consistent, MACs are its digits, results appear where they belong."""

import csv
import io
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import HERE, fails, run_command

from eval import table as table_command
from eval.cost import bk_sdm
from eval.cost.macs import costs, mean
from eval.cost.runs import macs_per_step, pruned
from eval.cost.timing import kinds_of
from eval.metrics.extract import pixels_sha256
from eval.metrics.results import cost
from eval.metrics.sources import open_reference
from eval.tables import paper as paper_tables
from eval.tables.arms import Arm, runs_of
from eval.tables.current import match, reference_of, weights_sha256
from eval.tables.paper import decimals, find, printed_rows, tables
from eval.tables.render import Found, Rendered, as_csv, speed_of
from eval.tables.study import Study
from run.families import build, example_inputs
from run.results import Metric, Result
from unet_caching.errors import UserError
from unet_caching.keep import Keep
from unet_caching.methods.block_caching import BlockCachingMethod

ROOT = HERE.parent
SCRIPTED = [found for found in tables().values() if found.script]


# What is printed

def rows_of(name: str, section: str = "") -> dict[str, dict]:
    return printed_rows(next(part for part in tables()[name].parts if part.name == section))


@pytest.mark.parametrize("name", [found.name for found in tables().values()])
def test_speed_ups_are_ratios_of_the_printed_throughputs(name):
    for part in tables()[name].parts:
        half, step = (0.5 * 10.0 ** -decimals(part, column) for column in ("throughput", "speedup"))
        base = None
        for label, row in printed_rows(part).items():
            if row.get("throughput") is None or row.get("speedup") is None:
                continue
            throughput, speedup = float(row["throughput"]), float(row["speedup"])
            if speedup == 1:
                base = throughput
            # Block Caching's rows follow the baseline of their own solver and steps; skip branches that of Table 2.
            base = base or rows_of("table2", "cifar10")["DDPM* (reproduced)"]["throughput"]
            low, high = (throughput - half) / (base + half), (throughput + half) / (base - half)
            assert low - 2 * step <= speedup <= high + 2 * step, (part.name, label)


def test_tables_that_print_one_setting_twice_agree():
    for label in ("Uniform N=2", "Uniform N=3", "Uniform N=5", "Uniform N=10", "Uniform N=20", "NonUniform N=10"):
        assert rows_of("table11")[label].items() <= rows_of("table1")[label].items()
    for n in (5, 3):
        assert rows_of("table4")[f"DeepCache N={n}"].items() <= rows_of("table1")[f"Uniform N={n}"].items()
    assert rows_of("table7")["centre 120"] == rows_of("table8")["power 1.2"]


# MACs

# Cells whose exact MACs do not round to the printed digits. Each must carry a footnote with the exact number.
EXCEPTIONS = {("table2", "cifar10", "N=2"): "4.1552", ("table3", "parti", "DeepCache N=5"): "113.6291",
              ("table3", "coco", "DeepCache N=5"): "113.6291", **{
                  ("table12", "", f"skip branch {m}"): exact for m, exact in (
                      (1, "1.6096"), (4, "3.8993"), (5, "4.5854"), (6, "5.3252"), (7, "5.5738"), (8, "5.7319"),
                      (9, "5.8900"))}}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, str]:
    """What `python -m eval.table --all` writes from results/ as it is, by path."""
    folder = tmp_path_factory.mktemp("some") / "results"
    shutil.copytree(ROOT / "results", folder, ignore=lambda at, names: {"README.md", "tables"} & {*names})
    assert run_command(table_command.main, "--all", "--results", folder) == 0
    return {str(path.relative_to(folder)): path.read_text()
            for path in (folder / "README.md", *(folder / "tables").iterdir())}


def lines_of(text: str) -> list[dict[str, str]]:
    """The lines of a table's CSV."""
    return list(csv.DictReader(io.StringIO(text)))


def test_the_written_tables_are_current(written):
    for name, text in written.items():
        assert (ROOT / "results" / name).read_text() == text, f"{name} is old: run python -m eval.table --all"
    assert {f"tables/{path.name}" for path in (ROOT / "results/tables").iterdir()} | {"README.md"} == written.keys()
    assert all(f"## {paper.heading}\n" in written["README.md"] for paper in tables().values())


def test_every_macs_cell_is_the_papers_digits_or_has_a_footnote(written):
    odd, counted = {}, 0
    for name in tables():
        for line in lines_of(written[f"tables/{name}.csv"]):
            if line["column"] == "macs_G" and line["run"]:
                counted += 1
                assert re.fullmatch(r"\d+\.\d+", line["ours"]) and line["from"] == "counted"
                if line["paper"] != "-" and float(line["paper"]) != float(line["ours"]):
                    odd[name, line["section"], line["row"]] = line["difference"]
                else:
                    assert line["paper"] == "-" or float(line["difference"]) == 0
    assert odd.keys() == EXCEPTIONS.keys()
    assert counted == sum(len(runs_of(paper).arms) for paper in SCRIPTED)
    for (name, section, label), exact in EXCEPTIONS.items():
        run = run_of(name, label, section).run
        assert f"{macs_per_step(run, tables()[name].macs_steps).hook / 1e9:.4f}" == exact
        [note] = [note for note in tables()[name].notes if note.marks(section, label, "macs_G")]
        assert exact in note.text


# Results in their places

def measured(arm: Arm, **other) -> Result:
    """As an evaluator writes it for the images of a row."""
    settings = arm.run.settings | {"cache": arm.run.caching.settings, "checkpoint_sha256": "ab" * 32}
    if pruned(arm.run):
        settings["unet"] = {"diffusers": dict(bk_sdm.build(pruned(arm.run)).config)}
    kind, metrics = {"ldm": ("adm", {"FID": Metric(3.456), "precision": Metric(0.8266)}),
                     "ddpm": ("fid", {"FID": Metric(4.2)}),
                     "sd": ("clip_score", {"CLIP score": Metric(29.53)})}[arm.run.family.name]
    prompts = getattr(arm.run.spec.condition, "prompts", None)
    inputs = {"prompts": f"/elsewhere/{prompts.name}"} if prompts else {"reference": str(reference_of(arm.run))}
    return Result(**{"kind": kind, "model": arm.run.config.name, "settings": settings, "images": arm.whole,
                     "metrics": metrics, "inputs": inputs,
                     "provenance": {"device": "cuda", "device_name": "GPU", "threads": 1},
                     "finished": "2026-01-01T00:00:00Z", "hashes": {"checkpoint": "ab" * 32}} | other)


def cells(paper: Study, found: Found) -> dict[tuple[str, str], tuple[str, str, str, str]]:
    """(printed, ours, difference, from) by row and column; of rows of one name the first."""
    lines = lines_of(as_csv(Rendered(paper, runs_of(paper), found)))
    return {(line["run"] or line["row"], line["column"]): (
        line["paper"], line["ours"], line["difference"], line["from"]) for line in reversed(lines)}


def run_of(name: str, label: str, section: str | None = None) -> Arm:
    return next(arm for arm in runs_of(find(name)).arms if arm.label == label and section in (None, arm.section))


def is_of(result: Result, arm: Arm, kind: str) -> bool:
    return arm.wanted_in_table(kind).fault(result) is None


def test_a_result_goes_to_every_row_of_its_settings_and_to_no_other():
    found = [(Path(f"r/{name}.json"), measured(run_of(name, label))) for name, label in (
        ("1", "Uniform N=5"), ("13", "NonUniform N=5"), ("5", "DDPM CIFAR-10 N=10, zeroed cache"))]
    shown = {name: cells(find(name), found) for name in ("1", "3", "4", "5", "7", "11", "13", "14")}
    assert shown["1"]["Uniform N=5", "fid"] == ("3.59", "3.46", "-0.13", "1.json")
    assert shown["1"]["Uniform N=5", "precision"] == ("82.36", "82.66", "+0.30", "1.json")
    assert shown["1"]["Uniform N=5", "sfid"] == ("5.16", "-", "-", "")
    assert shown["13"]["NonUniform N=5", "clip"] == ("29.50", "29.53", "+0.03", "13.json")
    for name, label, column, value in (
            ("4", "DeepCache N=5", "fid", "3.46"), ("3", "DeepCache N=5", "clip", "29.53"),
            ("5", "DDPM CIFAR-10 N=10, zeroed cache", "fid", "4.20"), ("5", "DDPM CIFAR-10 N=10", "fid", "-"),
            ("1", "Uniform N=3", "fid", "-"), ("1", "LDM-4* (regenerated by authors)", "fid", "-"),
            ("11", "NonUniform N=5", "fid", "-"), ("4", "DDIM 59 steps", "fid", "-"), ("7", "centre 10", "fid", "-"),
            ("13", "Uniform N=5", "clip", "-"), ("14", "NonUniform N=5", "clip", "-")):
        assert shown[name][label, column][1] == value, (name, label)


def test_pruned_models_are_told_apart():
    tiny = run_of("3", "BK-SDM Tiny")
    result = measured(tiny)
    assert is_of(result, tiny, "clip_score")
    for label in ("BK-SDM Base", "BK-SDM Small", "PLMS 50 steps"):
        assert not is_of(result, run_of("3", label), "clip_score")
    assert cost(tiny.run) is None
    assert bk_sdm.size_of({}) is None and bk_sdm.size_of({"layers_per_block": 1}) == "base"


def test_the_newest_result_counts():
    row = run_of("1", "Uniform N=5")
    found = [(Path(f"{day}.json"), measured(row, finished=f"2026-01-{day}T00:00:00Z")) for day in ("09", "30", "12")]
    assert match(found, row.wanted_in_table("adm")).path == Path("30.json")


def test_times_of_steps_become_throughput():
    def timed(device: str, name: str) -> tuple[Path, Result]:
        steps = {"full": {"median": 0.5}, "branches": [{"branch": 2, "median": 0.2, "ratio": 0.4}]}
        return Path(f"{device}.json"), Result(
            "throughput", "ddpm_cifar10", {"dtype": "fp32", "batch_size": 8, "weights": "random"}, throughput=steps,
            provenance={"device": device, "device_name": name, "threads": 1})

    found = [timed("cuda", "RTX 2080"), timed("cpu", "CPU")]
    shown = cells(find("2"), found)
    assert shown["N=10", "throughput"] == ("20.26", "0.35", "-19.91", "cuda.json")
    assert shown["N=10", "speedup"] == ("2.07", "2.17", "+0.10", "cuda.json")
    assert shown["DDPM* (reproduced)", "speedup"][1] == "1.00"
    assert cells(find("2"), found[1:])["N=10", "throughput"] == ("20.26", "0.35", "-", "cpu.json")
    assert cells(find("12"), found)["skip branch 4", "speedup"][1] == "-"       # another branch was not timed
    sd = Result("throughput", "sd_v15", {"dtype": "fp16", "batch_size": 1, "weights": "random"}, throughput={
        "full": {"median": 1.0}, "branches": [{"branch": 1, "median": 0.5, "ratio": 0.5}]},
        provenance={"device": "cuda", "device_name": "GPU", "threads": 1})
    row = run_of("13", "Uniform N=5")
    assert speed_of([(Path("x"), sd)], row.run)[2] == pytest.approx((10 + 41 * 0.5, 10 + 41 * 0.5))


def test_times_of_block_schedules_become_throughput():
    """Each over the uncached run of as many steps; of the sets of blocks that were timed, and no others."""
    rhythm = run_of("block_caching_table1", "DPM 20 steps, caching / the example's rhythm")
    cached = next(kind for kind in kinds_of(rhythm.run) if kind.reused)
    assert kinds_of(rhythm.run).count(cached) == 15
    found = [(Path("blocks.json"), Result(
        "throughput", "sd_v15", {"dtype": "bf16", "batch_size": 2, "weights": "random"},
        throughput={"full": {"median": 1.0}, "kinds": [
            {"reused": list(cached.reused), "order": 0, "median": 0.8, "ratio": 0.6}]},
        provenance={"device": "cpu", "device_name": "CPU", "threads": 1}))]
    paper = find("block_caching_table1")
    shown = cells(paper, found)
    assert shown[rhythm.label, "throughput"][1] == "0.12"          # 2 images in 17 seconds
    assert shown[rhythm.label, "speedup"][1] == "1.43"             # 20 / (5 + 15 x 0.6)
    found[0][1].times["kinds"][0]["reused"] = ["middle_block.0"]
    shown = cells(paper, found)
    assert shown[rhythm.label, "speedup"][1] == "-"
    assert shown["DPM 14 steps", "speedup"][1] == "1.43"           # over 20 steps,
    assert shown["DPM 30 steps", "speedup"][1] == "1.67"           # over 50 steps
    inputs = example_inputs(rhythm.run.config)
    blocks = rhythm.run.caching.of(BlockCachingMethod).schedule.blocks
    counted = mean(costs(build(rhythm.run.config), inputs).calls(Keep(blocks), 20))
    assert float(shown[rhythm.label, "macs_G"][1]) == pytest.approx(counted.hook / 1e9, abs=0.005)


# Formats and the command

@pytest.fixture
def said(capsys, tmp_path):
    """said(*words): what eval.table prints where nothing was measured."""
    def run(*words: str) -> str:
        assert run_command(table_command.main, *words, "--results", tmp_path) == 0
        return capsys.readouterr().out
    return run


def test_formats(said):
    markdown = said("12", "--format", "markdown")
    assert "|  | 50,000 images |" in markdown
    assert "| skip branch 7 | paper | 5.45 [3] | 11.27 | 1.151 | 4.92 |\n|  | ours | 5.57 | - | - | - |" in markdown
    assert "\n- [3] The exact averages, 5.5738 and 5.7319" in markdown
    lines = lines_of(said("table12", "--format", "csv"))
    assert lines[0] == {"table": "table12", "section": "", "row": "skip branch 1", "run": "skip branch 1",
                        "column": "macs_G", "images": "", "paper": "1.60", "ours": "1.61", "difference": "+0.01",
                        "from": "counted"}
    assert len(lines) == 12 * 4 and {line["images"] for line in lines if line["column"] == "fid"} == {"50000"}
    latex = said("2", "--format", "latex")
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 3 and r"[1] The exact" in latex
    assert not re.search(r"(?<!\\)[%#_]", latex.replace(r"\begin{table}", ""))
    text = said("block_caching_table1")
    assert "Not run (its schedule is not there yet" in text and "DPM 20 steps, caching" in text


@pytest.mark.parametrize("args", ["", "1 --all", "15", "table99", "1 --results nowhere"])
def test_the_command_refuses_bad_input(capsys, args):
    assert fails(capsys, run_command(table_command.main, *args.split()))


def test_columns_of_a_row_may_come_from_several_evaluators():
    """A distance of sets by either extractor, and the distance to a converged run, which eval.fidelity measures."""
    names = ("fd_efflite0", "kid_incmixed5", "rmse_converged")
    own = replace(find("emoji"), parts=[replace(part, columns=list(names)) for part in find("emoji").parts])
    row = next(arm for arm in runs_of(own).arms if arm.label == "N=5")
    reference = pixels_sha256(open_reference(str(reference_of(row.run)), (32, 32))[0])
    settings = measured(row).settings | {"checkpoint_sha256": weights_sha256(row.run)}
    found = [(Path(f"{name}.json"), measured(row, kind=kind, metrics={name: Metric(value)},
                                             settings=settings, hashes={"reference": reference}))
             for name, kind, value in (("FD-EffLite0", "quality", 21.3), ("KID-IncMixed5", "quality", 0.0123),
                                       ("RMSE to converged", "fidelity", 7.891))]
    shown = cells(own, found)
    assert {column: shown["N=5", column][1:] for column in names} == {
        "fd_efflite0": ("21.3", "-", "FD-EffLite0.json"), "kid_incmixed5": ("12.3", "-", "KID-IncMixed5.json"),
        "rmse_converged": ("7.89", "-", "RMSE to converged.json")}


@pytest.mark.parametrize("table, message", [
    ("5", "tables.t is 5 and should be keys with values"), ("{arms: [], images: 0}", "images is 0 and should be 1 or"),
    ("{arms: [], surprise: 1}", "unknown key surprise"), ("{arms: [{steps: 2}]}", "row 1 has no name"),
    ("{arms: [{called: a, printed: {fid: [1]}}]}", "printed.fid is a list and should be a finite number or text"),
    ("{arms: [{called: a, printed: {fidd: 1}}]}", "unknown column fidd"),
    ("{arms: [{called: a}, {called: a}]}", "two rows have the same name"),
    ("{arms: [{called: a, run: 5}]}", "run is 5 and should be true or false"),
    ("{parts: [{name: a, title: x}]}", "it has no arms"),
    ("{arms: [], notes: [{text: a, rows: [b]}]}", "a note names rows that do not exist: b"),
    ("{arms: [], notes: [{rows: [a]}]}", r"notes\[0\] has no text")])
def test_a_file_of_tables_that_was_edited_wrongly(table_file, table, message):
    table_file(f"  t: {table}\n")
    with pytest.raises(UserError, match=f"x.yaml.*{message}"):
        paper_tables.tables()
