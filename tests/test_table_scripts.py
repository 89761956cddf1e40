"""The table scripts: every row with the paper's digits, shared folders, bad input, and one row run for real."""

import os
import re
import subprocess
import sys
from functools import cache

import pytest
from conftest import HERE

from eval.cost.runs import costs_of, macs_per_image, macs_per_step
from eval.tables import paper
from eval.tables.arms import Arm, Given, runs_of
from eval.tables.paper import printed_rows, tables
from lab.study import papers
from run import arguments
from run.image_model import Images
from run.machine import Machine
from run.spec import parse_run
from unet_caching.errors import UserError

ROOT = HERE.parent
SCRIPTS = {table.name: table for table in tables().values() if table.script}


@pytest.fixture
def dry_run(monkeypatch, capsys, tmp_path):
    def run(name: str, *flags: str) -> str:
        monkeypatch.chdir(ROOT)
        where = ["--samples", str(tmp_path), "--results", str(tmp_path)]
        monkeypatch.setattr("sys.argv", ["plan", name, "--dry-run", *where, *flags])
        papers.main()
        return capsys.readouterr().out
    return run


def test_each_table_has_a_script_and_each_script_a_table():
    assert SCRIPTS.keys() == {*(f"table{i}" for i in range(1, 15)), "block_caching_table1"}
    there = {path.name for pattern in ("table[0-9]*.sh", "block_caching_table*.sh")
             for path in (ROOT / "scripts").glob(pattern)}
    assert {table.script for table in SCRIPTS.values()} == there
    for table in SCRIPTS.values():
        *about, door = (ROOT / "scripts" / table.script).read_text().splitlines()
        assert all(line.startswith("#") for line in about)
        assert door == f'exec bash "$(dirname "$0")/table.sh" {table.name} "$@"'


# What the scripts leave out: other authors' methods, and models that the authors regenerated.
OTHERS = {"table1": {"IDDPM", "ADM-G", "LDM-4 (as published)", "Spectral DPM", "Diff-Pruning* (reproduced)"},
          "table2": {"DDPM (as published)", "Diff-Pruning"}}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_row_of_the_paper_has_its_command(name):
    table, runs = SCRIPTS[name], runs_of(SCRIPTS[name])
    mine = {(arm.section, arm.entry.row) for arm in runs.arms} | {*runs.pending}
    left = {label for part in table.parts for label in printed_rows(part) if (part.name, label) not in mine}
    assert left == OTHERS.get(name, set())
    assert len({(arm.section, arm.label) for arm in runs.arms}) == len(runs.arms)


@pytest.mark.parametrize("name", SCRIPTS)
def test_settings_in_a_rows_name_are_those_of_its_command(name):
    printed = {(part.name, row): cells for part in SCRIPTS[name].parts for row, cells in printed_rows(part).items()}
    for arm in runs_of(SCRIPTS[name]).arms:
        cache = arm.run.caching.settings
        for pattern, value in ((r"\bN=(\d+)", cache["interval"]), (r"(\d+) steps", arm.run.steps),
                               (r"skip branch (\d+)", cache.get("branch", 0) + 1),
                               (r"^centre (\d+)", cache.get("center")), (r"^power ([\d.]+)", cache.get("power"))):
            if match := re.search(pattern, arm.label):
                assert float(match[1]) == value, (arm.label, pattern)
        for key in ("center", "power"):
            assert cache.get(key) == printed[arm.section, arm.entry.row].get(key, cache.get(key))
        assert ("NonUniform" in arm.label) == (cache.get("schedule") == "centered") or name not in (
            "table1", "table11", "table13", "table14")


def test_centre_and_power_of_tables_9_and_10_are_used_where_they_belong():
    def settings(name: str, section: str = "") -> dict:
        runs = [arm.run for arm in runs_of(SCRIPTS[name]).arms if arm.section == section and not arm.entry.beside]
        return {run.caching.settings["interval"]: run.deepcache.full_steps for run in runs
                if run.caching.settings.get("schedule") == "centered"}

    assert settings("table11") == settings("table9")
    assert settings("table1").items() <= settings("table9").items()
    assert settings("table13") == settings("table10", "first")
    assert settings("table14") == settings("table10", "second")
    assert settings("table3", "parti") == {5: settings("table10", "first")[5]}
    assert settings("table3", "coco") == {5: settings("table10", "second")[5]}


def test_dry_run_has_every_row_its_calls_and_the_papers_macs(dry_run):
    """Of a table that also has pruned models; MACs of all tables: test_table.py."""
    rows = [("51 / 51", "338.83"), ("26 / 26", "169.42"), ("51 / 51", "223.81"), ("51 / 51", "217.78"),
            ("51 / 51", "205.09"), *[("10 / 51", "113.63")] * 2] * 2
    out = dry_run("table3").splitlines()
    for row, (calls, macs), line in zip(runs_of(SCRIPTS["table3"]).arms, rows, out[1:], strict=False):
        assert row.label in line and f" {calls} " in line
        assert f"{float(re.search(r' ([0-9]+[.][0-9]{4}) ', line)[1]):.2f}" == macs
    assert out[len(rows) + 1] == ""
    assert any(line.startswith("missing: checkpoint ") for line in out)
    assert any(line.startswith("not judged without: ") for line in out)


def test_bash_gives_the_same_plan(dry_run, tmp_path):
    done = subprocess.run(["bash", "scripts/table9_ldm_schedules.sh", "--dry-run", f"--samples={tmp_path}",
                           f"--results={tmp_path}"], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stderr, done.stdout) == (0, "", dry_run("table9"))


@cache
def made(name: str, *flags: str) -> list[Arm]:
    return runs_of(SCRIPTS[name], *arguments.parse("", Given, words=flags)).arms


def test_equal_settings_share_a_folder_and_others_do_not():
    commands: dict = {}
    for name, table in SCRIPTS.items():
        if not table.schedules:
            for arm in made(name):
                commands.setdefault(arm.folder, []).append(" ".join(arm.command()))
    assert sum(map(len, commands.values())) == 8 + 13 + 14 + 4 + 4 + 6 + 8 + 6 + 11 + 12 + 22 + 22 + 12
    for folder, lines in commands.items():     # an option that says the default changes nothing
        settled = {re.sub(r" --(branch 2|steps 50)\b", "", line) for line in lines}
        assert len(settled) == 1, folder
    names = {str(folder.relative_to("samples")): len(lines) for folder, lines in commands.items()}
    assert names["ldm_cin256/uniform_n5"] == 3 and names["ldm_cin256/centered_n20_c120_p1.4"] == 3
    assert names["ddpm_cifar10/uniform_n5"] == 3 and names["ddpm_cifar10/uniform_n10"] == 3
    assert names["sd_v15/parti_uncached"] == 2 and names["sd_v15/coco_captions_val2017_uniform_n5"] == 2
    assert {"ldm_cin256/steps59", "ddpm_cifar10/uniform_n10_zeroed", "ddpm_cifar10/uniform_n5_branch0",
            "sd_v15/parti_bk-sdm-tiny-2m", "sd_v15/coco_captions_val2017_dpmpp_steps20_guidance5"} <= names.keys()


def test_flags_reach_the_right_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("r.npz", "i.pth", "c.bin"):
        (tmp_path / name).touch()
    flags = ["--images", "1000", "--dtype", "fp16", "--labels", "random", "--compile", "--released-noise",
             "--checkpoint", "w", "--reference", "ldm_cin256=r.npz", "--reference", "ddpm_emoji=emoji:all",
             "--inception", "i.pth", "--device", "cuda"]
    ddpm, _, ldm, _ = made("table5", *flags)
    assert " ".join(ddpm.command()).startswith(
        "-m ddpm.sample --config configs/ddpm_cifar10.yaml --checkpoint w --dtype fp16 --interval 10 --seeds 0-999 "
        "--device cuda --compile --out ")
    assert " ".join(ldm.command()).startswith(
        "-m ldm.sample --config configs/ldm_cin256.yaml --labels random --checkpoint w --dtype fp16 --interval 20 "
        "--schedule centered --center 80 --power 1.2 --seeds 0-999 --device cuda --compile --out ")
    assert ldm.judge_command()[:2] == ["-m", "eval.adm"] and "r.npz" in ldm.judge_command()
    assert ddpm.judge_command()[:2] == ["-m", "eval.fid"] and "data/references/cifar10.npz" in ddpm.judge_command()
    assert "--count 1000 --device cuda --out " in " ".join(ldm.judge_command())
    sd = made("table13", *flags, "--clip-weights", "c.bin")[1]
    assert " ".join(sd.command()).startswith(
        "-m stable_diffusion.sample --config configs/sd_v15.yaml --prompts data/prompts/parti.tsv --released-noise "
        "--model w --dtype fp16 --steps 45 --seeds 0-999 --device cuda --compile --out ")
    assert sd.judge_command()[:2] == ["-m", "eval.clip_score"] and {"c.bin", "data/prompts/parti.tsv"} <= {
        *sd.judge_command()}


def test_as_many_images_as_the_paper_and_never_more_than_prompts():
    assert [arm.images for arm in made("table3")] == [1632] * 7 + [5000] * 7
    fewer = made("table3", "--images", "2000")
    assert [arm.images for arm in fewer] == [1632] * 7 + [2000] * 7
    assert all(("--allow-fewer" in arm.judge_command()) == (arm.images == 2000) for arm in fewer)
    assert {arm.images for arm in made("table2")} == {50_000}


def test_the_samplers_know_the_options_of_the_rows():
    arms = [arm for name, table in SCRIPTS.items() if not table.schedules for arm in made(name)]
    assert {arm.run.family.name for arm in arms} == {"ddpm", "ldm", "sd"}
    for arm in arms:
        assert parse_run("", Images, Machine, family=arm.run.family, words=arm.command()[2:])[0] == arm.run.spec


def test_plms_makes_one_call_more_than_the_paper_counts():
    uncached, *_, cached = runs_of(SCRIPTS["table13"]).arms[:9]
    uncached, cached = uncached.run, cached.run
    assert (cached.steps, cached.calls, len(cached.deepcache.full_steps)) == (50, 51, 25)
    full, step = costs_of(cached).full, costs_of(cached).cached(1)
    assert macs_per_step(cached, 50).hook == pytest.approx((25 * full.hook + 25 * step.hook) / 50)
    assert macs_per_image(cached).hook == pytest.approx(2 * (25 * full.hook + 26 * step.hook))
    assert macs_per_image(uncached).hook == pytest.approx(2 * 51 * full.hook)


def test_unknown_flag_is_refused(dry_run, capsys):
    with pytest.raises(SystemExit, match="2"):
        dry_run("table1", "--imges", "5")
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("usage: bash scripts/table1_ldm_imagenet.sh") and "--imges" in err


@pytest.mark.parametrize("flags", ["--images 0", "--batch-size 0", "--threads -1", "--device abacus", "--only N=2",
                                   "--config nowhere.yaml", "--checkpoint x.ckpt", "--inception nowhere.pth",
                                   "--reference nowhere.npz", "--reference README.md", "--clip-weights nowhere.bin"])
def test_bad_values_are_refused_before_any_work(dry_run, capsys, tmp_path, flags):
    with pytest.raises(SystemExit) as stop:
        dry_run("table5", *flags.split())
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("row", "why"), [
    ("{called: a, interval: 2}", "no model ''"),
    ("{called: a, model: ddpm_cifar10, intervall: 2}", "no option 'intervall': is it interval?"),
    ("{called: a, model: ddpm_cifar10, interval: 0}", "interval must be a whole number from 1"),
    ("{called: a, model: nowhere}", "no model 'nowhere'")])
def test_a_row_with_impossible_settings_is_refused(table_file, row, why):
    table_file(f"  table1:\n    title: t\n    arms:\n    - {row}\n")
    with pytest.raises(UserError, match=f"table1, row 'a': .*{why}"):
        runs_of(paper.tables()["table1"])


def test_a_run_without_weights_says_which(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    flags = ["--samples", str(tmp_path), "--checkpoint", str(tmp_path / "model.ckpt")]
    monkeypatch.setattr("sys.argv", ["plan", "table1", *flags])
    with pytest.raises(SystemExit) as stop:
        papers.main()
    assert stop.value.code == 2
    assert "model.ckpt (python -m scripts.doctor says where it comes from)" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_tables_of_settings_print_their_steps_and_sample_nothing(dry_run, tmp_path):
    out = " ".join(dry_run("table9").split())
    assert "N=20: 13 full of 250 steps: 0 22 42 61 80 98 115 131 149 168 187 207 228" in out
    assert "N=5: 10 full of 50 steps: 0 4 7 10 14 19 24 30 36 43" in " ".join(dry_run("table10").split())
    assert "python -m" not in out and not any(tmp_path.iterdir())
