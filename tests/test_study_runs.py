"""Studies of a tiny random model, carried out: what is made once, what is current, what is shared and left out."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import HERE, run_command
from safetensors.torch import load_file, save_file

from ddpm import sample
from eval.metrics.images import open_images
from lab.plans.distances import psnr_to
from lab.study import runner
from lab.study.ledger import records_of
from lab.study.measures import minus_uncached
from run.image_model import open_model
from run.machine import Machine
from run.spec import RunSpec

MACHINE = Machine(batch_size=4, device="cpu", threads=1)
WHOLE = {"measure": ["quality", "fidelity", "converged", "time"], "show": {"like": "grid", "maps": [["interval",
         "branch"]]}, "time": {"repeats": 2, "warmup": 1}, "converged": {"sampler": "dpmpp", "steps": 60},
         "arms": [{}, {"interval": [2, 4], "branch": [0, 1]}]}


def times(folder: Path, pattern: str) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob(pattern) if ".features" not in path.parts}


def test_a_study_is_carried_out_once(study, tmp_path, tiny):
    code, listed = study(WHOLE, "--list")
    assert code == 0 and listed.count("0 of 6") == 5 and "are few" in listed and not study.samples.exists()
    code, told = study(WHOLE)
    assert code == 0 and "5 of 5 arms are measured" in told, told
    found = records_of(study.folder / "records.jsonl")
    cached = found["uniform_n2_branch0"]
    assert cached.keys() == {"quality", "fidelity", "converged", "time"} and found["uncached"].keys() == {
        "quality", "converged"}
    assert cached["quality"].metrics.keys() == {"KID-EffLite0", minus_uncached("KID-EffLite0")}
    assert len(cached["fidelity"].details["psnr"]) == 6 and cached["fidelity"].metrics["PSNR"].value > 5

    x, near, far = (np.concatenate([*open_images(study.samples / "ddpm_tiny" / name).batches(6)]).astype(float)
                    for name in ("uniform_n2_branch0", "dpmpp_steps60", "dpmpp_steps120"))
    errors = [np.sqrt(np.square(x - other).mean((1, 2, 3))).mean() for other in (near, far)]
    by = cached["converged"].details["convergence"]
    assert by["mean"] == pytest.approx(errors[0]) and by["moved"] == pytest.approx(abs(errors[0] / errors[1] - 1))
    assert by["converged"] and cached["converged"].metrics["RMSE to converged"].value == pytest.approx(errors[0])

    table, page = ((study.folder / name).read_text() for name in ("table.md", "index.html"))
    assert re.search(r"\| N=2 b0 \| 2 / 4 \| \d\.\d\dx \| \d\.\d\dx \|", table) and "RMSE to converged" in table
    assert (study.folder / "interval_branch.png").stat().st_size > 5000 and "charts.svg" in table
    assert page.count("data:image/webp") == 5 * 6 and page.count('class="mark"') == 9
    assert "python -m ddpm.sample --config" in page and told.endswith(f"to look at: {study.folder / 'index.html'}\n")

    images, records = times(study.samples, "*.png"), times(study.samples, "*.json")
    assert "5 of 5" in study(WHOLE)[1] and images == times(study.samples, "*.png") and records == times(
        study.samples, "*.json")
    (study.samples / "ddpm_tiny" / "uniform_n4" / "000" / "000003.png").unlink()        # what is missing, no more
    (study.samples / "ddpm_tiny" / "uniform_n4_0-5_fidelity.json").unlink()
    shutil.rmtree(study.folder)
    assert "5 of 5" in study(WHOLE)[1] and {path for path, then in {**images, **records}.items()
                                            if path.stat().st_mtime_ns != then} == {
        study.samples / "ddpm_tiny" / "uniform_n4" / "000" / "000003.png",
        study.samples / "ddpm_tiny" / "uniform_n4_0-5_fidelity.json"}

    # Another image: what was measured of it is not current, and the listing says why; nor is what is of other weights.
    one = study.samples / "ddpm_tiny" / "uniform_n4" / "000" / "000001.png"
    shutil.copy(one.with_name("000002.png"), one)
    assert study(WHOLE, "--list")[1].count("not those that were judged") == 3
    other = tmp_path / "other.safetensors"
    save_file({name: 2 * value for name, value in load_file(tiny.with_suffix(".safetensors")).items()}, other)
    assert study(WHOLE, "--list", "--checkpoint", other)[1].count("sampled with other weights than") > 10
    code, told = study(WHOLE, "--checkpoint", other)
    assert code == 2 and "sampled with other weights than" in told and "name another folder" in told

    # The file of records alone is enough for the table.
    shutil.rmtree(study.samples)
    assert "5 of 5" in study(WHOLE, "--render")[1] and (study.folder / "table.md").read_text() == table


def test_shares_and_processes_come_to_the_same(study):
    """What must wait for images of the other share is left to the last; several processes share the arms."""
    content = {"measure": ["fidelity"], "arms": [{}, {"interval": [2, 4]}, {"steps": 2}]}

    def found() -> dict:
        return {name: one["fidelity"].metrics for name, one in records_of(study.folder / "records.jsonl").items()}

    assert study(content, "--share", "2/2")[0] == 0 and not list(study.samples.rglob("*fidelity.json"))
    assert study(content, "--share", "1/2")[0] == 0 and not study.folder.exists()
    assert "2 of 4 arms" in study(content, "--render")[1]
    assert "4 of 4 arms" in study(content)[1]
    alone = found()
    shutil.rmtree(study.samples)
    shutil.rmtree(study.folder)
    code, told = study(content, "--jobs", 2)
    assert code == 0 and found() == alone and "100%" in told, told


def holding(study, *names: str) -> subprocess.Popen:
    """Another process that has some arms of `study`, until its stdin is closed."""
    (claims := study.samples / "claims").mkdir(parents=True, exist_ok=True)
    taken = [runner.claim_of(SimpleNamespace(name=f"ddpm_tiny/{one}", records=Path(f"{one}_0-5"))) for one in names]
    script = (f"import sys\nfrom run.claims import Claims\nwith Claims('{claims}/some.claims') as own:\n"
              f"    own.take({taken})\n    print(flush=True)\n    sys.stdin.read()")
    process = subprocess.Popen([sys.executable, "-c", script], cwd=HERE.parent, stdin=-1, stdout=-1)
    process.stdout.readline()
    return process


def test_a_process_does_what_no_other_has_and_waits_for_the_rest_not_without_end(study, monkeypatch):
    """One that hangs is named. What is left to do when a process begins has no say in who does what."""
    content = {"measure": ["fidelity"], "arms": [{"interval": [2, 4]}]}
    monkeypatch.setattr(runner, "TELL", 0.6)
    monkeypatch.setattr(runner, "GIVE_UP", 1.5)
    with holding(study, "uniform_n4") as process:
        code, told = study(content)
    arm = f"ddpm_tiny: uniform_n4 (process {process.pid})"
    assert code == 2 and f"waiting for {arm}" in told and re.search(f"error: other processes.*{re.escape(arm)}", told)
    with holding(study, "uncached", "uniform_n2"):
        assert "2 of 2 arms" in study(content)[1]


NEAR = {"seeds": "10-15", "chosen_on": 3, "twice": 2, "against": {"sampler": "unipc", "steps": 8},
        "common": {"timesteps": "trailing"}, "measure": ["near"], "show": "fronts",
        "arms": [{"sampler": "unipc", "steps": [2, 3, 4]},
                 {"sampler": "unipc", "steps": 6, "interval": 2, "forecast": [0, 1]}]}


def latents(tiny: Path, seed: int, **options: object) -> torch.Tensor:
    model = open_model(RunSpec.of(tiny, sampler="unipc", timesteps="trailing", **options).open(), MACHINE)
    model.load()
    return model.latents([seed], model.policy())


def test_distances_are_those_of_the_latents(study, tiny):
    """And what is there is not made again, but when the seeds or the converged run are others."""
    code, told = study(NEAR)
    assert code == 0 and "5 of 5 arms" in told, told
    found = records_of(study.folder / "records.jsonl")
    near = found["uniform_n2_forecast1_unipc_steps6"]["near"]
    wanted = psnr_to(latents(tiny, 12, steps=8), latents(tiny, 12, steps=6, interval=2, forecast=1))
    assert near.details["psnr"][2] == pytest.approx(wanted[0], abs=0.01)
    assert near.metrics["PSNR to converged"].value == pytest.approx(np.mean(near.details["psnr"]), abs=1e-3)
    assert found["unipc_steps8"]["twice"].images == 2 and near.details["full_calls"] < 6
    table, page = ((study.folder / name).read_text() for name in ("table.md", "index.html"))
    assert "the first 3 choose" in table and "order between them" in table and "twice the steps" in table
    assert page.count("data:image/webp") == 3 * 6 and "of 6 calls compute everything" in page       # seeds 13 to 15

    before = times(study.samples, "*.json")
    assert "5 of 5" in study(NEAR)[1] and before == times(study.samples, "*.json")
    assert study(NEAR, "--list")[1].count(" yes") == 5
    assert study(NEAR, "--list", "--seeds", "10-14")[1].count("measured on other seeds") == 5
    other = NEAR | {"against": {"sampler": "unipc", "steps": 7}}
    assert study(other, "--list")[1].count("compared with another run than unipc_steps7") == 5


def test_images_are_those_of_the_sample_command_where_distances_are_measured_too(study, tmp_path, tiny):
    words = ["--sampler", "unipc", "--timesteps", "trailing", "--steps", 5]
    code, told = study(NEAR | {"measure": ["near", "fidelity"], "arms": [{"sampler": "unipc", "steps": 5}]})
    assert code == 0, told
    assert run_command(sample.main, "--config", tiny, *words, "--seeds", "10-15", "--device", "cpu", "--out",
                       tmp_path / "again") == 0
    images = list((study.samples / "ddpm_tiny" / "unipc_steps5").glob("000/*.png"))
    assert len(images) == 6
    for image in images:
        assert image.read_bytes() == (tmp_path / "again" / "000" / image.name).read_bytes()


def test_other_studies_are_shown_beside(study, tmp_path):
    study(NEAR)
    shutil.copy(tmp_path / "some.yaml", tmp_path / "other.yaml")
    shutil.copytree(study.folder, tmp_path / "results" / "other")
    both = NEAR | {"also": ["other"], "arms": [{"sampler": "unipc", "steps": [3, 5]}]}
    code, told = study(both, "--only", "unipc_steps5")
    assert code == 0 and "6 of 6 arms" in told, told
    assert (study.folder / "table.md").read_text().count("| unipc_steps3 |") == 1
    assert study(both, "--list", "--seeds", "10-12")[0] == 0
    code, told = study(both | {"seeds": "10-16"}, "--list")
    assert code == 2 and "other cannot be shown, too: it has another seeds" in told


FITTED = {"against": {"sampler": "unipc", "steps": 8}, "common": {"timesteps": "trailing"}, "seeds": "0-2",
          "measure": ["near", "spent"], "show": "budgets", "made": {
    "FOLDER/rule.json": "lab.fit adaptive {common} --sampler unipc --steps 6 --calls 5 --seeds 10-11 "
                        "--held-out-seeds 20-21 --device cpu"},
    "arms": [{"kind": "adaptive", "budget": 4, "sampler": "unipc", "steps": 6, "adaptive": "FOLDER/rule.json"},
             {"kind": "fewer steps", "budget": [3, 4], "sampler": "unipc", "steps": 4},
             {"kind": "plan", "budget": 4, "plan": "FOLDER/plan_{budget}.json"}]}


def test_a_study_makes_what_it_can_and_leaves_out_the_rest(study, tmp_path):
    content = json.loads(json.dumps(FITTED).replace("FOLDER", str(tmp_path / "made")))
    code, listed = study(content, "--list")
    assert code == 0 and "left out: adaptive at 4 calls, there is no " in listed and "plan_4.json" in listed
    code, told = study(content, "--make")
    assert code == 0 and told.count("left out") == 1, told
    text = (study.folder / "table.md").read_text()
    assert "## 3 calls" in text and "Left out: plan at 4 calls" in text
    found = records_of(study.folder / "records.jsonl")
    note, spent = found["rule.json"]["fitted file"], found["adaptive_rule_unipc_steps6"]["spent"]
    assert note.details["cpu_s"] > 0 and "--calls 5" in note.details["command"]
    assert len(spent.details["calls"]) == 3 and all(1 < one <= 6 for one in spent.details["calls"])
    row = next(line.split(" | ") for line in text.splitlines() if line.startswith("| adaptive"))
    assert row[2] == f"{np.mean(spent.details['calls']):.2f}" and row[-1] != "? |"
    before = times(study.samples, "*.json")
    assert study(content, "--make")[0] == 0 and before == times(study.samples, "*.json")
