"""Studies of convergence: what is measured of a run, what is kept, and what the tables say."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from eval.metrics.images import from_array
from eval.metrics.registry import EXTRACTORS
from eval.metrics.sources import open_reference
from eval.quality import quality
from lab.study import convergence
from lab.study.convergence_report import LESS, PSNR, Point, orders, plan_calls, rival, rows
from run import results
from run.files import ROOT
from run.image_model import open_model
from run.machine import Machine
from run.results import Result
from run.spec import RunSpec
from unet_caching.methods.plan import Plan

MACHINE = Machine(batch_size=2, device="cpu", threads=1)
STUDY = """
model: ddpm_emoji
seeds: 10-15
chosen_on: 3
twice: 2
converged: {sampler: unipc, steps: 8}
common: {timesteps: trailing, branch: 0}
grids:
- {sampler: unipc, steps: [2, 4]}
- {sampler: unipc, steps: 6, interval: 2, forecast: [0, 1]}
"""


@pytest.fixture
def study(tmp_path, monkeypatch, capsys):
    """study(text, *options): run the command; what it printed, and where its results are."""
    def run(text: str = STUDY, *options: str) -> tuple[str, Path]:
        path = tmp_path / "one.yaml"
        path.write_text(text)
        monkeypatch.setattr("sys.argv", ["convergence", "--config", str(path), "--results", str(tmp_path / "results"),
                                         "--work", str(tmp_path / "work"), "--device", "cpu", "--threads", "1",
                                         *options])
        convergence.main()
        return capsys.readouterr().out, tmp_path / "results" / "convergence" / "one"
    return run


def test_a_study_is_measured_once(study, tmp_path):
    """Each run's PSNR is that of its latents to the converged ones; what is there is not made again."""
    listed, folder = study(STUDY, "--list")
    assert not folder.exists() and listed.count(" no") == 4
    printed, folder = study()
    assert "4 runs are measured" in printed
    names = {path.stem: path for path in folder.glob("*.json")}
    assert names.keys() == {"twice", "unipc_steps2", "unipc_steps4", "uniform_n2_branch0_unipc_steps6",
                            "uniform_n2_branch0_forecast1_unipc_steps6"}

    machine, latents = Machine(batch_size=4, device="cpu", threads=1), {}
    for name, options in (("converged", {"steps": 8}), ("run", {"steps": 6, "interval": 2, "forecast": 1})):
        run = RunSpec.of("ddpm_emoji", sampler="unipc", timesteps="trailing", branch=0, **options).open()
        model = open_model(run, machine)
        model.load()
        latents[name] = model.latents([12], model.policy()).double()
    span = latents["converged"].max() - latents["converged"].min()
    wanted = 10 * torch.log10(span ** 2 / (latents["run"] - latents["converged"]).square().mean()).item()
    found = results.read(names["uniform_n2_branch0_forecast1_unipc_steps6"])
    assert found.details["psnr"][2] == pytest.approx(wanted, abs=0.01) and found.details["seeds"] == "10-15"
    assert found.metrics[PSNR].value == pytest.approx(np.mean(found.details["psnr"]), abs=1e-3)
    assert results.read(names["unipc_steps4"]).details["full_calls"] == 4

    page = (folder / "index.html").read_text()
    assert f"to look at: {folder / 'index.html'}" in printed and page.count("data:image/webp") == 12    # seeds 13-15
    assert "reuse" in page and "python -m ddpm.sample" in page and "of 6 calls compute everything" in page
    before = {path: path.stat().st_mtime_ns for path in [*folder.rglob("*.json"), *tmp_path.glob("work/**/*.png")]}
    assert "4 runs are measured" in study()[0]
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert study(STUDY, "--list")[0].count("yes") == 4
    study(STUDY.replace("10-15", "10-14"))
    assert len(results.read(names["unipc_steps4"]).details["psnr"]) == 5


def test_images_are_judged_and_other_studies_shown(study, tmp_path):
    """Distances to real images are those of eval.quality, less those of the converged images; the converged run's own
    are nothing above itself."""
    study()
    (tmp_path / "one.yaml").rename(tmp_path / "other.yaml")
    (tmp_path / "results" / "convergence" / "one").rename(tmp_path / "results" / "convergence" / "other")
    text = STUDY[:STUDY.index("grids")] + """judged: "emoji:Smileys & Emotion"
also: [other]
grids:
- {sampler: unipc, steps: [3, 8]}
"""
    printed, folder = study(text)
    assert "6 runs are measured" in printed
    run, itself = (results.read(folder / f"unipc_steps{steps}.json") for steps in (3, 8))
    kid, more = (run.metrics[name] for name in ("KID-EffLite0", f"KID-EffLite0{LESS}"))
    own = itself.metrics["KID-EffLite0"].value
    assert more.value == pytest.approx(kid.value - own) and more.interval[0] < more.value < more.interval[1]
    assert itself.metrics[f"FD-EffLite0{LESS}"].value == pytest.approx(0, abs=1e-6)
    table = (folder / "table.md").read_text()
    assert table.count("uniform_n2_branch0_forecast1_unipc_steps6") == 1 and table.count("| unipc_steps3 |") == 2
    assert "judged.png" in table and (folder / "judged.png").is_file()
    assert study(text, "--list")[0].count(" yes") == 2

    model = RunSpec.of("ddpm_emoji", sampler="unipc", steps=3, timesteps="trailing").open()
    model = open_model(model, MACHINE)
    model.load()
    images = model.decode(torch.cat([model.latents(seeds) for seeds in ([10, 11], [12, 13], [14, 15])]))
    images = from_array(images, "images", [f"{seed}.png" for seed in range(10, 16)])
    reference, _ = open_reference("emoji:Smileys & Emotion", (32, 32))
    wanted = quality(images, reference, EXTRACTORS["efflite0"]("cpu"), repeats=4, with_floors=False)
    assert kid.value == pytest.approx(wanted["KID-EffLite0"]["value"], rel=1e-4)
    with pytest.raises(SystemExit):
        study(text.replace("10-15", "10-16"), "--list")


@pytest.mark.parametrize(("change", "word"), [
    (("steps: [2, 4]", "step: [2, 4]"), "is it steps?"),
    (("chosen_on: 3", "chosen_on: 5"), "chosen_on"),
    (("timesteps: trailing, ", ""), "no option"),
    (("steps: 8}", "steps: 8, interval: 2}"), "without caching"),
    (("{sampler: unipc, steps: [2, 4]}", "{sampler: ddim, timesteps: uniform, steps: [2, 4]}"), "differ in timesteps"),
    (("{sampler: unipc, steps: [2, 4]}", "{model: ldm_emoji, steps: [2, 4]}"), "of one model"),
])
def test_what_cannot_be_compared_is_refused(study, change, word, tmp_path, capsys):
    text = STUDY.replace(*change)
    if word == "no option":
        text = STUDY.replace("branch: 0}", "branch: 0, prompts: some.txt}")
    with pytest.raises(SystemExit) as stop:
        study(text)
    assert stop.value.code == 1 or stop.value.code == 2
    assert word in capsys.readouterr().err and not list(tmp_path.rglob("*.json"))


def points() -> list[Point]:
    """Errors of 1 / steps^2 with unipc, of 1 / steps with ddim; one cached run, half a decibel better than unipc 9."""
    def psnr(error: float) -> np.ndarray:
        return np.array([-20 * np.log10(error) + shift for shift in (-1.0, 0.0, 1.0, 2.0)])

    plain = [Point(f"{name}{steps}", name, f"fewer steps, {name}", steps, None, float(steps), 1.5 * steps,
                   psnr(steps ** -power)) for name, power in (("unipc", 2.0), ("ddim", 1.0)) for steps in (3, 9, 27)]
    return [*plain, Point("cached", "ddim", "reuse", 20, 3, 9.1, 12.0, psnr(9 ** -2.0) + 0.5)]


def test_cost_decides_what_a_run_is_compared_with():
    *plain, cached = points()
    everywhere = slice(None)
    assert rival(cached, plain[3:], lambda one: one.cost, everywhere).name == "ddim9"       # 9 costs 0.989 of 9.1
    assert rival(cached, plain[:3], lambda one: one.time, everywhere).name == "unipc9"      # 9 takes 13.5, it takes 12
    assert rival(cached, plain, lambda one: one.cost, everywhere).name == "unipc9"
    better = replace(plain[0], psnr=plain[1].psnr + 1)
    assert rival(cached, [better, *plain[1:]], lambda one: one.cost, everywhere).name == "unipc3"   # cheaper and better
    assert rival(plain[2], [cached], lambda one: one.cost, everywhere) is None
    table = {row[0]: row for row in rows(points(), slice(2), slice(2, None))}
    assert table["cached"][5] == "+0.5 [+0.5, +0.5] (unipc, 9)" and table["unipc9"][4:] == ("", "", "")
    assert table["cached"][4].startswith("+19.6")


def test_orders_are_the_slopes_of_the_errors():
    found = {row[1]: row[-1] for row in orders(points())[1:]}
    assert found == {"unipc": "2.00, 2.00", "ddim": "1.00, 1.00"}


STUDIES = sorted(path for path in Path("configs/studies").glob("*.yaml") if not path.name.startswith("systems_"))


def test_the_studies_that_are_shipped_open():
    for path in STUDIES:
        read = convergence.read_study(path)
        runs = list(convergence.specs(read))
        convergence.check_names(runs, path)
        assert len(runs) > 3, path


def test_shipped_results_belong_to_their_studies():
    """Every JSON of a study's folder is of a run that its file has today."""
    for path in STUDIES:
        read, folder = convergence.read_study(path), Path("results/convergence") / path.stem
        names = {spec.open().name for spec in convergence.specs(read)}
        there = {one.stem for one in folder.glob("*.json")} - {"twice", "times"}
        assert there <= names
        for one in there:
            content = json.loads((folder / f"{one}.json").read_text())
            assert content["details"]["name"] == one and len(content["details"]["psnr"]) == content["images"]


def test_what_the_calls_of_a_plan_compute():
    """Their shares are its cost, its marks lie at its timesteps."""
    run = RunSpec.of("ldm_emoji", plan="checkpoints/plans/ldm_emoji_12.json").open()
    calls = plan_calls(run)
    plan = Plan.load("checkpoints/plans/ldm_emoji_12.json")
    assert sum(share for _, share, _ in calls) == pytest.approx(plan.cost)
    assert [t for t, _, _ in calls] == run.sampler.call_timesteps()
    assert [share == 1 for _, share, _ in calls] == [call.branch is None for call in plan.calls]
    assert plan_calls(RunSpec.of("ldm_emoji", interval=3).open()) is None


def test_a_result_is_measured_again_when_the_weights_change(study, tmp_path, monkeypatch):
    """And the listing says why; so is the distance of twice the steps; times of another model are refused."""
    text = STUDY[:STUDY.index("- {sampler: unipc, steps: 6")]
    config = yaml.safe_load((ROOT / "configs" / "ddpm_emoji.yaml").read_text())
    weights = load_file(ROOT / config["checkpoint"])
    config |= {"checkpoint": str(tmp_path / "w.safetensors"), "name": "ddpm_other"}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(config))
    text = text.replace("ddpm_emoji", str(tmp_path / "other.yaml"))
    save_file(weights, tmp_path / "w.safetensors")
    _, folder = study(text)
    first = {name: results.read(folder / f"{name}.json") for name in ("twice", "unipc_steps2")}
    assert study(text, "--list")[0].count(" yes") == 2
    save_file({name: 0.9 * value for name, value in weights.items()}, tmp_path / "w.safetensors")
    assert study(text, "--list")[0].count("sampled with other weights than") == 2
    said = study(text, "--render")[0]
    assert said.count("left out: unipc_steps") == 2 and "nothing is measured yet" in said
    study(text)
    for name, before in first.items():
        assert results.read(folder / f"{name}.json").metrics[PSNR].value != before.metrics[PSNR].value
    results.write(folder / "times.json", Result("throughput of forecasts", "ldm_emoji"))
    with pytest.raises(SystemExit):
        study(text, "--render")
