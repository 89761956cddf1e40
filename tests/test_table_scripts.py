"""The table scripts: every row with the paper's digits, shared folders, bad input, and one row run for real."""

import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import HERE, Golden
from safetensors.torch import save_file

from scripts import plan

ROOT = HERE.parent
PAPER = yaml.safe_load((ROOT / "results/paper/deepcache.yaml").read_text())
CENTERED_20 = "--interval 20 --schedule centered --center"
# Per script its rows: full steps / calls, and MACs in G as the paper prints them, here or in Tables 1 and 2.
ROWS = {
    "table1_ldm_imagenet": [("250 / 250", "99.82"), ("125 / 250", "52.12"), ("84 / 250", "36.48"),
                            ("50 / 250", "23.50"), *[("25 / 250", "13.97"), ("13 / 250", "9.39")] * 2],
    "table4_equal_throughput": [("59 / 59", "99.82"), ("50 / 250", "23.50"), ("91 / 91", "99.82"),
                                ("84 / 250", "36.48")],
    "table5_zeroed_cache": [("10 / 100", "2.63")] * 2 + [("13 / 250", "9.39")] * 2,
    "table7_center": [("13 / 250", "9.39")] * 8,
    "table8_power": [("13 / 250", "9.39")] * 6,
    "table11_uniform_nonuniform": [("125 / 250", "52.12"), ("84 / 250", "36.48"), ("50 / 250", "23.50"),
                                   ("25 / 250", "13.97"), ("13 / 250", "9.39")] * 2 + [("13 / 250", "9.39")]}


def lines_of(script: str) -> list[tuple[list[str], str]]:
    """The commands of a script: words, and the comment behind them."""
    text = (ROOT / f"scripts/{script}.sh").read_text().replace("\\\n", " ")
    found = []
    for match in re.finditer(r'^((?:table|row|note) (?:"[^"]*"|[^"#\n])*)(?:#(.*))?$', text, re.MULTILINE):
        found.append((shlex.split(match[1]), match[2] or ""))
    return found


def said(script: str) -> list[str]:
    """What table.sh hands to scripts.plan."""
    words = {"table": lambda args: args[0], "row": shlex.join, "note": " ".join}
    return ["--script", f"{script}.sh"] + [word for (name, *args), _ in lines_of(script)
                                           for word in (f"--{name}", words[name](args))]


@pytest.fixture
def dry_run(monkeypatch, capsys, tmp_path):
    def run(script: str, *flags: str) -> str:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr("sys.argv", ["plan", *said(script), "--", "--dry-run", "--samples", str(tmp_path), *flags])
        plan.main()
        return capsys.readouterr().out
    return run


def bash(script: str, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", f"scripts/{script}.sh", *flags], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1"})


def test_every_table_script_is_tested():
    assert {path.stem for path in (ROOT / "scripts").glob("table[0-9]*.sh")} >= ROWS.keys()


@pytest.mark.parametrize("script", ROWS)
def test_dry_run_has_every_row_and_the_papers_macs(dry_run, script):
    out = dry_run(script)
    rows = [(words[1], comment) for words, comment in lines_of(script) if words[0] == "row"]
    planned = out.splitlines()[1:1 + len(rows)]
    for (label, _), (calls, macs), line in zip(rows, ROWS[script], planned, strict=True):
        assert line.startswith(f"{label} ") and f" {calls} " in line
        exact = re.search(r" (\d+\.\d{4}) ", line)[1]
        assert f"{float(exact):.2f}" == macs
    ours = re.findall(r"^ +ours +(\S+)((?: +-)+)$", out, re.MULTILINE)
    assert [macs for macs, _ in ours] == [macs for _, macs in ROWS[script]]     # and all else is a dash
    assert "Not measured here" in out


@pytest.mark.parametrize("script", ROWS)
def test_comments_carry_the_papers_numbers(script):
    commands = lines_of(script)
    [table] = [words[1] for words, _ in commands if words[0] == "table"]
    printed = {str(next(iter(row.values()))): row for row in PAPER[table]}
    rows = [(words[1].split(" / ")[0], comment) for words, comment in commands if words[0] == "row"]
    for label, comment in rows:
        values = [printed[label].get(key) for key in plan.COLUMNS if key != "throughput_img_s"]
        assert [float(value) for value in comment.split()] == [value for value in values if value is not None]
    ours = {label for label, _ in rows}
    others = {"IDDPM", "ADM-G", "LDM-4 (as published)", "Spectral DPM"}
    assert {label for label in printed.keys() - ours if not label.startswith("Diff-Pruning")} <= others


def test_difference_is_of_printed_digits(dry_run):
    differences = re.findall(r"^ +difference +(\S+)", dry_run("table1_ldm_imagenet"), re.MULTILINE)
    assert differences == ["+0.00"] * 8


def test_bash_gives_the_same_plan(dry_run, tmp_path):
    done = bash("table11_uniform_nonuniform", "--dry-run", "--samples", str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")

    def settled(text: str) -> str:
        return re.sub(r"[\d.]+ GB free", "", text)
    assert settled(done.stdout) == settled(dry_run("table11_uniform_nonuniform"))


def test_equal_settings_share_a_folder_and_others_do_not(dry_run):
    """Tables 1, 4, 5, 7, 8 and 11 have 41 rows, of which 28 differ."""
    commands = {}
    for script in ROWS:
        for line in re.findall(r"^python -m (?:ldm|ddpm)\.sample .*", dry_run(script), re.MULTILINE):
            words = shlex.split(line)
            folder = words[words.index("--out") + 1]
            commands.setdefault(folder, []).append(line)
    assert all(len(set(lines)) == 1 for lines in commands.values())
    assert sum(map(len, commands.values())) == 41 and len(commands) == 28
    names = Counter({Path(folder).name: len(lines) for folder, lines in commands.items()})
    assert names["uniform_n5"] == 3 and names["centered_n20_c120_p1.4"] == 3 and names["centered_n20_c80_p1.2"] == 3
    assert {"uncached", "steps59", "uniform_n10_zeroed", "centered_n20_c80_p1.2_zeroed"} <= names.keys()


def test_flags_reach_the_right_sampler(dry_run):
    out = dry_run("table5_zeroed_cache", "--images", "1000", "--dtype", "fp16", "--labels", "random", "--compile",
                  "--only", "uniform_n10", "--only", "LDM-4-G ImageNet N=20")
    ddpm, ldm, npz = re.findall(r"^python -m (.*)", out, re.MULTILINE)
    assert ddpm.startswith("ddpm.sample --config configs/ddpm_cifar10.yaml --interval 10 --seeds 0-999 --dtype fp16 "
                           "--compile --out ")
    assert ldm.startswith(f"ldm.sample --config configs/ldm_cin256.yaml {CENTERED_20} 80 --power 1.2 --seeds 0-999 "
                          "--labels random --dtype fp16 --compile --out ")
    assert npz.startswith("sampling.npz --samples ") and npz.endswith("/centered_n20_c80_p1.2_1000.npz")


def test_unknown_flag_is_refused():
    done = bash("table1_ldm_imagenet", "--dry-run", "--imges", "5")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("usage: bash scripts/table1_ldm_imagenet.sh") and "--imges" in done.stderr


@pytest.mark.parametrize("flags", ["--images 0", "--batch-size 0", "--threads -1", "--device abacus", "--only N=2",
                                   "--config nowhere.yaml", "--checkpoint x.ckpt"])
def test_bad_values_are_refused_before_any_work(dry_run, capsys, tmp_path, flags):
    with pytest.raises(SystemExit) as stop:
        dry_run("table5_zeroed_cache", *flags.split())
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_a_run_without_weights_says_which(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    flags = ["--samples", str(tmp_path), "--checkpoint", str(tmp_path / "model.ckpt")]
    monkeypatch.setattr("sys.argv", ["plan", *said("table1_ldm_imagenet"), "--", *flags])
    with pytest.raises(SystemExit) as stop:
        plan.main()
    assert stop.value.code == 2
    assert "model.ckpt (configs/ldm_cin256.yaml says where it comes from)" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_row_for_real(monkeypatch, capsys, tmp_path):
    """A small model in the place of cin256: sampled, packed, and found complete the second time."""
    config, samples = tmp_path / "small.yaml", tmp_path / "samples"
    save_file(Golden("ldm_small").weights, tmp_path / "small.safetensors")
    config.write_text(yaml.safe_dump({
        "name": "ldm_small", "num_classes": 10, "checkpoint": str(tmp_path / "small.safetensors"),
        "sampler": {"steps": 130},
        "unet": dict(in_channels=3, out_channels=3, model_channels=32, channel_mult=[1, 2, 2], num_res_blocks=2,
                     attention_resolutions=[4, 2], num_heads=1, context_dim=16),
        "first_stage": dict(resolution=64, ch=32, ch_mult=[1, 2, 2], num_res_blocks=1, z_channels=3, n_embed=64)}))
    flags = ["--config", str(config), "--samples", str(samples), "--images", "2", "--only", "Uniform N=20",
             "--batch-size", "2", "--device", "cpu", "--threads", "1"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["plan", *said("table1_ldm_imagenet"), "--", *flags])
    plan.main()
    assert "0 of 2" in capsys.readouterr().out
    folder = samples / "ldm_small" / "uniform_n20"
    assert [path.name for path in sorted(folder.glob("*/*.png"))] == ["000000.png", "000001.png"]
    with np.load(folder.with_name("uniform_n20_2.npz")) as arrays:
        assert arrays["arr_0"].shape == (2, 64, 64, 3) and arrays["arr_0"].dtype == np.uint8
        assert arrays["arr_1"].tolist() == [0, 1]

    again = []
    monkeypatch.setattr(plan, "_python", lambda row, line: again.append(line[1]))
    plan.main()
    assert again == ["ldm.sample"]          # which finds nothing missing; the npz is there
    assert re.search(r"2 of 2 +0 ", capsys.readouterr().out)
