"""From samples to tables: what a number depends on is compared by content, and nothing else fills a cell.

Random files in the published formats, and a tiny model: sample, judge, table; then one thing after the other changes.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import HERE, run_command, tiny_ddpm
from PIL import Image
from safetensors.torch import load_file, save_file

from ddpm import sample as ddpm_sample
from eval import quality
from eval import table as table_command
from eval.tables import current
from eval.tables.arms import Given, runs_of
from eval.tables.current import Wanted
from eval.tables.paper import find
from lab.study import commands, papers
from run import arguments, results
from run.folder import image_path
from run.results import Metric, Result
from run.spec import Run, RunSpec
from run.weights import sha256

ROOT = HERE.parent
UNET = {"resolution": 32, "in_channels": 3, "out_channels": 3, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1,
        "attn_resolutions": []}
COMMANDS = {"ddpm.sample": ddpm_sample.main, "eval.quality": quality.main}


class Chain:
    """bash scripts/table_emoji.sh on a tiny model, in this process. `did`: the commands that it ran, in their order."""

    def __init__(self, folder: Path, capsys):
        self.folder, self.capsys, self.reference = folder, capsys, folder / "reference.npz"
        self.config = tiny_ddpm(folder, UNET, steps=10)
        self.make_reference(0)
        self.did: list[str] = []

    def make_reference(self, seed: int) -> None:
        np.savez(self.reference, np.random.default_rng(seed).integers(0, 256, (12, 32, 32, 3), np.uint8))

    def python(self, line: list[str], what: str) -> None:
        self.did.append(line[1])
        few = ["--dims", 2, "--repeats", 2, "--threads", 1] if line[1] == "eval.quality" else []
        code = run_command(COMMANDS[line[1]], *line[2:], *few)
        assert code == 0, (line, self.capsys.readouterr().err)

    def run(self, images: int = 4, *words: object) -> str:
        """The table's text, after the row of 1:5 was sampled and judged."""
        self.did.clear()
        self.capsys.readouterr()
        code = run_command(papers.main, "emoji", "--config", self.config, "--samples", self.folder / "samples",
                           "--results", self.folder / "results", "--images", images, "--only", "N=5", "--reference",
                           self.reference, "--threads", 1, "--batch-size", 4, *words)
        out, err = self.capsys.readouterr()
        assert code == 0, err
        return out

    def judges(self, images: int = 4) -> bool:
        """Whether a run judges."""
        self.run(images)
        return self.did == ["ddpm.sample", "eval.quality"]

    @property
    def samples(self) -> Path:
        return next(path.parent for path in (self.folder / "samples").rglob("run.json"))


@pytest.fixture
def chain(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    made = Chain(tmp_path, capsys)
    monkeypatch.setattr(commands, "python", made.python)
    return made


def test_from_samples_to_a_table_and_whatever_changes_is_judged_again(chain):
    assert "no reproduction" in chain.run() and chain.did == ["ddpm.sample", "eval.quality"]
    assert not chain.judges()                                   # a second run does nothing

    image = image_path(chain.samples, 1)                        # an image overwritten by hand
    before = image.read_bytes()
    Image.new("RGB", (32, 32), "red").save(image)
    assert chain.judges()
    image.write_bytes(before)
    assert chain.judges()
    image.write_bytes(before)                                   # the same pixels: the same number
    assert not chain.judges()

    chain.make_reference(1)                                     # another reference of the same name
    assert chain.judges()
    assert chain.judges(3)                                      # fewer images than are there
    assert sorted(result.images for _, result in results.read_all(chain.folder / "results")) == [3, 4]
    assert not chain.judges(4)

    tiny = chain.folder / "tiny.safetensors"                    # other weights
    save_file({name: value * 1.01 for name, value in load_file(tiny).items()}, tiny)
    samples = chain.samples
    shutil.rmtree(samples)
    assert chain.judges()


def result_of(wanted: Wanted, **changes) -> Result:
    settings = json.loads(json.dumps(wanted.run.settings | {"cache": wanted.run.caching.settings}))
    fields = {"kind": wanted.kind, "model": wanted.run.config.name, "settings": settings, "images": wanted.images,
              "metrics": {"FID": Metric(4.0)}, "inputs": {option.removeprefix("--"): str(path)
                                                        for option, path in wanted.inputs.items()}}
    return Result(**fields | changes)


@pytest.fixture
def wanted():
    run = RunSpec.of("configs/sd_v15.yaml", prompts="data/prompts/parti.tsv", interval=5).open()
    return Wanted(run, "clip_score", 1632, current.inputs_of(run, "clip_score"))


@pytest.mark.parametrize(("settings", "why"), [
    ({"negative_prompt": "ugly"}, 'negative_prompt: "ugly" there, "" here'),
    ({"height": 256}, "height: 256 there, 512"),
    ({"width": 256}, "width: 256 there, 512"), ({"images_per_prompt": 2}, "images_per_prompt: 2 there, 1 here"),
    ({"prompts_rule": "one for all seeds"}, "prompts_rule"), ({"noise": {"rule": "released"}}, "noise"),
    ({"dtype": "fp16"}, 'dtype: "fp16" there, "fp32" here'),
    ({"unet": {"in_channels": 4}}, "unet.attention_resolutions"),
    ({"diffusion": {"beta_schedule": "cosine"}}, "diffusion.beta_schedule"), ({"surprise": 1}, "surprise: 1 there"),
    *((change, "another run") for change in ({"steps": 100}, {"eta": 1.0}, {"guidance": 3.0}, {"model": "sd_v14"},
                                             {"sampler": "ddim"}, {"timesteps": "trailing"})),
    ({"unet": {"diffusers": {}}}, "another U-Net"), ({"cache": {"interval": 1}}, "another way to cache")])
def test_a_run_of_other_settings_fills_no_cell_and_the_reason_is_said(wanted, settings, why):
    result = result_of(wanted)
    assert wanted.fault(result) is None
    result.settings.update(settings)
    said = wanted.fault(result)
    assert said == why or (said.startswith("sampled with other settings (") and why in said)


@pytest.mark.parametrize(("changes", "why"), [
    ({"images": 8}, "trial with 8 images"), ({"kind": "fid"}, "judged by eval.fid"),
    ({"inputs": {"prompts": "x/others.tsv"}}, "judged with another prompts (x/others.tsv) than data/prompts/parti.tsv"),
    ({"provenance": {"evaluator": 0}}, "judged by an older evaluator")])
def test_other_ways_to_judge_fill_no_cell(wanted, changes, why):
    assert wanted.fault(result_of(wanted, **changes)) == why


def test_prompts_are_compared_by_content_where_they_are_there(tmp_path, wanted):
    """Another file of the same name is not the one that was sampled."""
    (tmp_path / "parti.txt").write_text("a\nb\n")
    spec = wanted.run.spec.having(prompts=tmp_path / "parti.txt")
    own = Wanted(spec.open(), "clip_score", 2, current.inputs_of(spec.open(), "clip_score"))
    result = result_of(own, hashes={"prompts": own.run.settings["prompts_sha256"]})
    assert own.fault(result) is None
    (tmp_path / "parti.txt").write_text("a\nc\n")
    assert replace(own, run=spec.open()).fault(result) == "sampled from other prompts"


@pytest.fixture(scope="module")
def cifar10() -> Run:
    """Of a row of Table 2."""
    return next(arm.run for arm in runs_of(find("2")).arms if arm.label == "N=5" and arm.section == "cifar10")


def test_a_distance_to_few_images_is_none(cifar10):
    asked = Wanted(cifar10, "fid", 50_000, current.inputs_of(cifar10, "fid"), published=True)
    assert asked.fault(result_of(asked)) is None
    few = result_of(asked, details={"reference_images": 200})
    assert asked.fault(few) == "trial against 200 images"
    other = result_of(asked, inputs={"reference": "elsewhere/mine.npz"})
    assert asked.fault(other) == ("judged with another reference (elsewhere/mine.npz) than data/references/cifar10.npz")


def test_another_inception_or_reference_is_told_by_content(tmp_path, cifar10):
    for name in ("inception.pth", "reference.npz"):
        (tmp_path / name).write_text(name)
    inputs = current.inputs_of(cifar10, "fid", tmp_path / "inception.pth", references=[str(tmp_path / "reference.npz")])
    asked = Wanted(cifar10, "fid", 50_000, inputs)
    right = {"reference": sha256(tmp_path / "reference.npz"), "extractor": sha256(tmp_path / "inception.pth")}
    assert asked.fault(result_of(asked, hashes=right)) is None
    assert "another Inception" in asked.fault(result_of(asked, hashes=right | {"extractor": "ab"}))
    assert "another reference" in asked.fault(result_of(asked, hashes=right | {"reference": "ab"}))
    (tmp_path / "inception.pth").write_text("other")
    assert "another Inception" in asked.fault(result_of(asked, hashes=right))


def test_eval_table_says_why_and_shows_trials_on_request(tmp_path, capsys, monkeypatch, cifar10):
    monkeypatch.chdir(tmp_path)
    asked = Wanted(cifar10, "fid", 8, current.inputs_of(cifar10, "fid"))
    results.write(tmp_path / "r/x.json", result_of(asked))
    assert run_command(table_command.main, "2", "--results", tmp_path / "r") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "trial with 8 images: CIFAR-10, N=5 - " in said and "trials are shown with --trials" in said
    assert "not sampled: CIFAR-10, DDPM* (reproduced)" in said
    assert run_command(table_command.main, "2", "--trials", "--results", tmp_path / "r") == 0
    assert "trial, 8 images" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "rows"), [
    (["--only", "cifar10: N=2"], {"cifar10: N=2"}), (["--only", "N=2"], {f"{name}: N=2" for name in (
        "cifar10", "bedroom", "church")}),
    (["--only", "cifar10"], {"cifar10: DDPM* (reproduced)", *(f"cifar10: N={n}" for n in (2, 3, 5, 10))}),
    (["--config", "configs/ddpm_cifar10.yaml", "--only", "N=2"], {"cifar10: N=2"})])
def test_the_part_of_a_table_that_belongs_to_one_model(tmp_path, words, rows, monkeypatch):
    monkeypatch.chdir(ROOT)
    said = arguments.parse("", papers.Options, Given, words=[*words, "--samples", str(tmp_path)])
    made = papers.make_plan(find("2"), *said)
    assert {papers.title_of(arm) for arm in made.arms} == rows and not made.others
    assert {arm.run.config.name for arm in made.runs.arms} == {"ddpm_cifar10", "ddpm_bedroom", "ddpm_church"}
