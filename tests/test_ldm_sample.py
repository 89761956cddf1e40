"""`ldm.sample` and `run.npz` through the command line, on a tiny random model."""

import collections
import csv
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import (
    HERE,
    Golden,
    fails,
    pixels,
    relative_error,
    run_command,
    same,
    save_samples,
    settings_of,
)
from PIL import Image
from safetensors.torch import save_file
from test_ldm import SMALL, TOLERANCE
from torch import nn

from eval.metrics.images import open_images
from ldm import first_stage
from ldm.checkpoint import Model, published_state_dict
from ldm.sample import main
from ldm.unet import UNet
from run import npz
from run.folder import image_path
from run.labels import Labels
from unet_caching.errors import UserError

CLASSES = 5
CONFIG = {
    "name": "tiny", "num_classes": CLASSES,
    "unet": {"in_channels": 3, "out_channels": 3, "model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1,
             "attention_resolutions": [2], "num_heads": 1, "context_dim": 8},
    "first_stage": {"resolution": 16, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "z_channels": 3,
                    "n_embed": 64},
    "sampler": {"steps": 6, "eta": 0.0, "guidance": 1.5, "branch": 0, "images": 10}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """The config of a tiny random model, its checkpoint and its class names beside it."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    model = Model(UNet(**CONFIG["unet"]), first_stage.build(**CONFIG["first_stage"]), nn.Embedding(CLASSES + 1, 8))
    nn.init.normal_(model.classes.weight, std=5)                 # so that the label shows in the image
    save_file({name: value.contiguous() for name, value in published_state_dict(model).items()},
              folder / "tiny.safetensors")
    (folder / "names.txt").write_text("\n".join(["goldfish", "daisy, yellow", 'the "cup"', "pier", "abaya"]) + "\n")
    return write_config(folder / "tiny.yaml", folder / "tiny.safetensors", class_names=str(folder / "names.txt"))


def write_config(path: Path, checkpoint: Path, **changes) -> Path:
    path.write_text(yaml.safe_dump(CONFIG | {"checkpoint": str(checkpoint)} | changes))
    return path


@pytest.fixture
def sample(tiny):
    """The command within this process; returns its exit code."""
    return lambda *args, config=tiny: run_command(main, "--config", config, "--threads", 1, "--device", "cpu", *args)


def listing(folder: Path) -> list[dict[str, str]]:
    with open(folder / "images.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---- labels

def test_balanced_labels_are_exactly_balanced():
    labels = Labels.parse("balanced", 1000)
    assert labels.counts(list(range(50_000))) == [50] * 1000
    assert [labels.of(seed) for seed in (0, 999, 1000, 2207)] == [0, 999, 0, 207]
    assert "50 images of each of 1000" in labels.describe(list(range(50_000)))
    assert "not even: 0 to 1 images" in labels.describe(list(range(10)))


def test_random_labels_are_uniform_and_fixed():
    labels = Labels.parse("random", 10)
    counts = labels.counts(list(range(10_000)))
    assert min(counts) > 850 and max(counts) < 1150
    assert [labels.of(seed) for seed in range(12)] == [5, 2, 1, 3, 6, 5, 1, 4, 3, 7, 0, 7]     # for good


def test_listed_labels_go_round():
    assert [Labels.parse("207,360", 1000).of(seed) for seed in range(4)] == [207, 360, 207, 360]
    assert [Labels.parse("0-9", 10).of(seed) for seed in range(12)] == [*range(10), 0, 1]


@pytest.mark.parametrize(("text", "word"), [
    ("1000", "0 to 999"), ("5-1000", "0 to 999"), ("-1", "balanced, random or a list"), ("cats", "balanced, random"),
    ("", "balanced, random"), ("3,", "cannot be read"), ("1,1", "twice"), ("1.5", "cannot be read")])
def test_bad_labels(text, word):
    with pytest.raises(UserError, match=word):
        Labels.parse(text, 1000)


def test_labels_come_back_from_run_json():
    for text in ("balanced", "random", "3,1"):
        labels = Labels.parse(text, 10)
        assert Labels.from_settings(json.loads(json.dumps({"labels": labels.rule, "num_classes": 10}))) == labels
    assert Labels.from_settings({"unet": {}}) is None


# ---- runs

def test_an_image_depends_on_its_seed_alone(sample, tmp_path):
    common = ["--interval", 2, "--steps", 3, "--eta", 1, "--labels", "random"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert sample(*common, "--batch-size", 10, "--out", whole) == 0
    assert len(pixels(whole)) == 10                             # as many as the config says
    for seeds in ("7-9", "0-2", "0-9"):                         # in pieces, then filled in
        assert sample(*common, "--batch-size", 3, "--seeds", seeds, "--out", parts) == 0
    assert same(whole, parts, tolerance=1)                      # rounding differs by batch size
    assert listing(whole) == listing(parts)


def test_labels_steer_the_image_but_not_its_noise(sample, tmp_path, monkeypatch):
    from unet_caching.samplers import solvers
    started = collections.defaultdict(list)
    ddim = solvers.ddim

    def watched(predict, x, *args, **kwargs):
        started[out].append(x)
        return ddim(predict, x, *args, **kwargs)

    monkeypatch.setattr(solvers, "ddim", watched)
    for out, labels in (("a", "balanced"), ("b", "random"), ("c", "4")):
        assert sample("--labels", labels, "--seeds", "0-4", "--steps", 3, "--out", tmp_path / out) == 0
    assert torch.equal(started["a"][0], started["b"][0]) and torch.equal(started["a"][0], started["c"][0])
    a, c = pixels(tmp_path / "a"), pixels(tmp_path / "c")
    assert [np.array_equal(a[seed], c[seed]) for seed in range(5)] == [False] * 4 + [True]


def test_guidance(sample, tmp_path, monkeypatch):
    """Guidance 1 runs single batches; near 1, the doubled batch gives the same images."""
    batches = []
    forward = UNet.forward

    def watched(self, x, *args, **kwargs):
        if not x.is_meta:       # what is traced computes nothing
            batches.append(len(x))
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(UNet, "forward", watched)
    common = ["--seeds", "0-2", "--interval", 2]
    for name, guidance in (("one", 1), ("near", 1.0000001), ("two", 4)):
        batches.clear()
        assert sample(*common, "--guidance", guidance, "--out", tmp_path / name) == 0
        assert set(batches) == {3 if guidance == 1 else 6} and len(batches) == 6
    assert same(tmp_path / "one", tmp_path / "near", tolerance=1)
    assert not same(tmp_path / "one", tmp_path / "two", tolerance=2)


RUNS = [run for run in json.loads((HERE / "goldens" / "ldm_small.json").read_text())["ldm_small"]["runs"]
        if run["sampler"] == "ddim"]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["name"])
def test_the_command_follows_the_released_code(sample, tmp_path, monkeypatch, run):
    """From the released code's x_T and labels to its last latent, through all of the command."""
    golden, ended = Golden("ldm_small"), []
    weights = tmp_path / "golden.safetensors"
    save_file(golden.weights, weights)
    config = write_config(tmp_path / "golden.yaml", weights, **{
        key: asdict(getattr(SMALL, key)) for key in ("unet", "first_stage")}, num_classes=10)
    decode = first_stage.decode
    monkeypatch.setattr("run.image_model.SeededNoise", lambda seeds, device: lambda shape: golden.io["traj.x_T"])
    monkeypatch.setattr(first_stage, "decode", lambda vq, z: (ended.append(z), decode(vq, z))[1])
    labels = ",".join(map(str, golden.io["cond.labels"].tolist()))
    schedule = ["--schedule", "released-ldm", "--power", run["pow"]] if run.get("nonuniform") else []
    assert sample("--steps", 8, "--guidance", run["scale"], "--interval", run["N"] or 1, *schedule, "--labels", labels,
                  "--seeds", "0-1", "--out", tmp_path / "out", config=config) == 0
    assert relative_error(ended[0], golden.io[f"{run['name']}.xs"][-1]) < TOLERANCE


def test_number_formats(sample, tmp_path, monkeypatch):
    """The U-Net, and its context, in half precision; the first stage in float32."""
    seen = set()
    forward, decode = UNet.forward, first_stage.decode
    monkeypatch.setattr(UNet, "forward", lambda self, x, t, context, cache: (
        seen.add((x.dtype, context.dtype)), forward(self, x, t, context, cache))[1])
    monkeypatch.setattr(first_stage, "decode", lambda vq, z: (seen.add((z.dtype, vq.dtype)), decode(vq, z))[1])
    common = ["--seeds", 0, "--steps", 4, "--interval", 2]
    assert sample(*common, "--dtype", "bf16", "--out", tmp_path / "bf16") == 0
    assert seen == {(torch.bfloat16,) * 2, (torch.float32,) * 2}
    assert sample(*common, "--out", tmp_path / "fp32") == 0
    a, b = pixels(tmp_path / "bf16"), pixels(tmp_path / "fp32")
    assert all(np.abs(a[seed] - b[seed]).mean() < 2 for seed in a)     # of 255; some processors round more than others


def test_run_json_and_listing(sample, tmp_path, capsys):
    out = tmp_path / "run"
    assert sample("--labels", "2,1", "--seeds", "0-2", "--out", out) == 0
    assert "2 classes" in capsys.readouterr().out
    settings = settings_of(out)
    assert (settings["labels"], settings["num_classes"], settings["guidance"], settings["eta"]) == ([2, 1], 5, 1.5, 0)
    assert len(settings["checkpoint_sha256"]) == 64 and settings["timesteps"]
    assert [tuple(row.values()) for row in listing(out)] == [
        ("0", "2", 'the "cup"'), ("1", "1", "daisy, yellow"), ("2", "2", 'the "cup"')]
    assert sample("--labels", "2,1", "--seeds", "7", "--out", out) == 0
    assert [row["seed"] for row in listing(out)] == ["0", "1", "2", "7"]        # of all that is there


def test_the_shipped_models_classes_have_names():
    from ldm.model import names_of_classes
    from run.families import load_config
    names = names_of_classes(load_config(HERE.parent / "configs" / "ldm_emoji.yaml"))
    assert len(names) == 5 and names[0].startswith("Smileys & Emotion, ")
    assert names_of_classes(load_config(HERE.parent / "configs" / "ldm_cin256.yaml")) is None


# ---- bad input

@pytest.mark.parametrize(("change", "word"), [
    (["--labels", "5"], "0 to 4"), (["--labels", "0-9"], "0 to 4"), (["--labels", "dogs"], "labels"),
    (["--guidance", "-1"], "guidance"), (["--steps", "1000"], "999"), (["--schedule", "released-ldm"], "power"),
    (["--schedule", "released-ldm", "--power", "-1", "--interval", "2"], "power")])
def test_bad_options_are_one_line_and_leave_nothing(sample, tmp_path, capsys, change, word):
    assert fails(capsys, sample("--out", tmp_path / "out", *change), word)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("changes", "word"), [
    ({"class_names": "nowhere.txt"}, "nowhere.txt"), ({"num_classes": 6}, "names"),
    ({"num_classes": 6, "class_names": None}, "embedding.weight is [6, 8] and should be [7, 8]"),
    ({"diffusion": {"prediction": "x"}}, "'x'"), ({"diffusion": {"beta_schedule": "sine"}}, "sine"),
    ({"first_stage": CONFIG["first_stage"] | {"z_channels": 4}}, "channels"),
    ({"first_stage": CONFIG["first_stage"] | {"resolution": 18}}, "cannot be downsampled"),
    ({"unet": CONFIG["unet"] | {"model_channels": 40}}, "32"),
])
def test_bad_configs_are_one_line(sample, tiny, tmp_path, capsys, changes, word):
    config = yaml.safe_load(tiny.read_text()) | changes
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(config))
    assert fails(capsys, sample("--out", tmp_path / "out", config=tmp_path / "bad.yaml"), word)
    assert not (tmp_path / "out").exists()


# ---- npz

@pytest.fixture
def folder(tmp_path) -> Path:
    """Of 12 images with random labels of 5 classes."""
    made = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), np.uint8)
    return save_samples(tmp_path / "samples", made, settings={"labels": "random", "num_classes": 5})


@pytest.fixture
def pack():
    return lambda *args: run_command(npz.main, *args)


def test_npz_round_trip(pack, folder, tmp_path):
    out = tmp_path / "x.npz"
    assert pack("--samples", folder, "--seeds", "9-11,0-3", "--out", out) == 0
    seeds = [0, 1, 2, 3, 9, 10, 11]
    expected = np.stack([np.asarray(Image.open(image_path(folder, seed))) for seed in seeds])
    with np.load(out) as loaded:
        assert loaded.files == ["arr_0", "arr_1"]
        assert loaded["arr_0"].dtype == np.uint8 and np.array_equal(loaded["arr_0"], expected)
        assert loaded["arr_1"].dtype == np.int64
        assert loaded["arr_1"].tolist() == [Labels("random", 5).of(seed) for seed in seeds]
    images = open_images(out)
    assert len(images) == 7 and images.size == (16, 16)
    assert np.array_equal(np.concatenate(list(images.batches(3))), expected)
    before = out.read_bytes()
    assert pack("--samples", folder, "--seeds", "0-3,9-11", "--out", out) == 0
    assert out.read_bytes() == before                                   # the same images, the same file
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples", "x.npz"]


def test_npz_without_classes(pack, folder, tmp_path):
    run = json.loads((folder / "run.json").read_text())
    del run["settings"]["labels"]
    (folder / "run.json").write_text(json.dumps(run))
    assert pack("--samples", folder, "--seeds", "0-11", "--out", tmp_path / "x.npz") == 0
    assert np.load(tmp_path / "x.npz").files == ["arr_0"]


def test_npz_of_an_incomplete_folder_is_refused(pack, folder, tmp_path, capsys):
    out = tmp_path / "x.npz"
    image_path(folder, 5).unlink()
    capsys.readouterr()
    assert fails(capsys, pack("--samples", folder, "--seeds", "0-19", "--out", out), "11 of the 20", "5,12-19")
    (folder / "run.json").unlink()
    assert fails(capsys, pack("--samples", folder, "--seeds", "0", "--out", out), "no run.json")
    assert fails(capsys, pack("--samples", tmp_path / "none", "--seeds", "0", "--out", out), "none")
    assert not list(tmp_path.glob("*x.npz*"))


def test_npz_that_does_not_fit_the_disk_is_refused(pack, folder, tmp_path, capsys, monkeypatch):
    capsys.readouterr()
    size = 12 * 16 * 16 * 3
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 ** 6, 10 ** 6 - size, size))
    out = tmp_path / "x.npz"
    assert fails(capsys, pack("--samples", folder, "--seeds", "0-11", "--out", out), "13,408 bytes", "9,216 free")
    assert [path.name for path in tmp_path.iterdir()] == ["samples"]
    assert fails(capsys, pack("--samples", folder, "--seeds", "0", "--out", tmp_path / "no" / "x.npz"), "no folder")
    monkeypatch.undo()
    npz.pack(folder, range(12), out)
    assert size < out.stat().st_size < 13_408
