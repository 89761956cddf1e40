"""The table scripts: every row with the paper's digits, shared folders, bad input, and one row run for real."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import HERE, Golden
from safetensors.torch import save_file

from eval.cost.runs import costs_of, macs_per_image, macs_per_step
from eval.tables import paper
from eval.tables.arms import Arm, Given, runs_of
from eval.tables.paper import printed_rows, tables
from lab.study import commands, papers
from run import arguments, results
from run.folder import read_run
from run.image_model import Images
from run.machine import Machine
from run.spec import parse_run
from run.weights import sha256
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


def bash(script: str, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", f"scripts/{script}", *flags], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1"})


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


# Per table its rows: full / calls, and MACs in G to the paper's digits (here or in the table that prints them).
PLANS = {
    "table1": [("250 / 250", "99.82"), ("125 / 250", "52.12"), ("84 / 250", "36.48"), ("50 / 250", "23.50"),
               *[("25 / 250", "13.97"), ("13 / 250", "9.39")] * 2],
    "table4": [("59 / 59", "99.82"), ("50 / 250", "23.50"), ("91 / 91", "99.82"), ("84 / 250", "36.48")],
    "table5": [("10 / 100", "2.63")] * 2 + [("13 / 250", "9.39")] * 2,
    "table6": [("50 / 50", "6.07"), ("50 / 100", "4.16"), ("20 / 20", "6.07"), ("20 / 100", "3.01"),
               ("10 / 10", "6.07"), ("10 / 100", "2.63")],
    "table7": [("13 / 250", "9.39")] * 8,
    "table3": [("51 / 51", "338.83"), ("26 / 26", "169.42"), ("51 / 51", "223.81"), ("51 / 51", "217.78"),
               ("51 / 51", "205.09"), *[("10 / 51", "113.63")] * 2] * 2}


@pytest.mark.parametrize("name", PLANS)
def test_dry_run_has_every_row_and_the_papers_macs(dry_run, name):
    out = dry_run(name).splitlines()
    for row, (calls, macs), line in zip(runs_of(SCRIPTS[name]).arms, PLANS[name], out[1:], strict=False):
        assert row.label in line and f" {calls} " in line
        assert f"{float(re.search(r' ([0-9]+[.][0-9]{4}) ', line)[1]):.2f}" == macs
    assert out[len(PLANS[name]) + 1] == ""
    assert any(line.startswith("missing: checkpoint ") for line in out)
    assert any(line.startswith("not judged without: ") for line in out)


def test_bash_gives_the_same_plan(dry_run, tmp_path):
    done = bash("table11_uniform_nonuniform.sh", "--dry-run", "--samples", str(tmp_path), "--results", str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")

    def settled(text: str) -> str:
        return re.sub(r"[\d.]+ GB free", "", text)
    assert settled(done.stdout) == settled(dry_run("table11"))


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
             "--checkpoint", "w", "--reference", "ldm_cin256=r.npz", "--inception", "i.pth", "--device", "cuda"]
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


@pytest.mark.parametrize("package", ["ddpm", "ldm", "sd"])
def test_the_samplers_know_the_options_of_the_rows(package):
    for name, table in SCRIPTS.items():
        for arm in [] if table.schedules else made(name):
            if arm.run.family.name == package:
                words = arm.command()[2:]
                assert parse_run("", Images, Machine, family=arm.run.family, words=words)[0] == arm.run.spec


def test_plms_makes_one_call_more_than_the_paper_counts():
    uncached, *_, cached = runs_of(SCRIPTS["table13"]).arms[:9]
    uncached, cached = uncached.run, cached.run
    assert (cached.steps, cached.calls, len(cached.deepcache.full_steps)) == (50, 51, 25)
    full, step = costs_of(cached).full, costs_of(cached).cached(1)
    assert macs_per_step(cached, 50).hook == pytest.approx((25 * full.hook + 25 * step.hook) / 50)
    assert macs_per_image(cached).hook == pytest.approx(2 * (25 * full.hook + 26 * step.hook))
    assert macs_per_image(uncached).hook == pytest.approx(2 * 51 * full.hook)


def test_unknown_flag_is_refused():
    done = bash("table1_ldm_imagenet.sh", "--dry-run", "--imges", "5")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("usage: bash scripts/table1_ldm_imagenet.sh") and "--imges" in done.stderr


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


def test_a_row_for_real(monkeypatch, capsys, tmp_path):
    """A small model in the place of cin256: sampled, judged, and found complete the second time."""
    config, samples = tmp_path / "small.yaml", tmp_path / "samples"
    save_file(Golden("ldm_small").weights, tmp_path / "small.safetensors")
    config.write_text(yaml.safe_dump({
        "name": "ldm_small", "num_classes": 10, "checkpoint": str(tmp_path / "small.safetensors"),
        "sampler": {"steps": 10},
        "unet": dict(in_channels=3, out_channels=3, model_channels=32, channel_mult=[1, 2, 2], num_res_blocks=2,
                     attention_resolutions=[4, 2], num_heads=1, context_dim=16),
        "first_stage": dict(resolution=64, ch=32, ch_mult=[1, 2, 2], num_res_blocks=1, z_channels=3, n_embed=64)}))
    for name in ("inception.pth", "reference.npz"):
        (tmp_path / name).touch()
    flags = ["--config", str(config), "--samples", str(samples), "--results", str(tmp_path / "results"), "--images",
             "2", "--only", "DeepCache N=5", "--batch-size", "2", "--device", "cpu", "--threads", "1",
             "--inception", str(tmp_path / "inception.pth"), "--reference", str(tmp_path / "reference.npz")]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["plan", "table4", *flags])
    really, folder = commands.python, samples / "ldm_small" / "uniform_n5"

    def run(line: list[str], what: str) -> None:            # all but the evaluator, whose weights cannot be had
        if line[1] != "eval.adm":
            return really(line, what)
        settings = read_run(folder)["settings"]
        hashes = {"reference": sha256(tmp_path / "reference.npz"), "extractor": sha256(tmp_path / "inception.pth")}
        results.write(Path(line[-1]), results.Result("adm", "ldm_small", settings, 2, {"FID": results.Metric(1.5)},
                                                     hashes=hashes))

    monkeypatch.setattr(commands, "python", run)
    papers.main()
    assert "0 of 2" in capsys.readouterr().out
    assert [path.name for path in sorted(folder.glob("*/*.png"))] == ["000000.png", "000001.png"]
    assert [path.name for path in (tmp_path / "results").rglob("*.json")] == ["uniform_n5_2_adm.json"]

    again = []
    monkeypatch.setattr(commands, "python", lambda line, what: again.append(line[1]))
    papers.main()
    assert again == ["ldm.sample"]          # which finds nothing missing; the result is there
    assert re.search(r"2 of 2 +0 ", capsys.readouterr().out)
