"""The second extractor, on an archive as npm publishes it with a small network of the same kinds of layers."""

import base64
import io
import json
import re
import sys
import tarfile

import numpy as np
import pytest

from eval import quality
from eval.metrics import incmixed5
from eval.metrics.incmixed5 import IncMixed5
from eval.metrics.registry import MEASURES
from lab.study.ledger import records_of
from run import results
from run.weights import sha256
from unet_caching.errors import UserError

RNG = np.random.default_rng(0)
NAMED = {"kernel": (3, 3, 3, 32), "beta": (32,), "moving_mean": (32,), "moving_variance": (32,)}


def layer(name, kind, *inputs, **config):
    return {"name": name, "class_name": kind, "config": config, "inbound_nodes": [[[i, 0, 0, {}] for i in inputs]]
            if inputs else []}


def published(path, last="mixed5"):
    """The archive, and its weights as they come out of 8 bits: kernel, beta, moving_mean, moving_variance."""
    window = {"pool_size": [3, 3], "strides": [1, 1]}
    layers = [layer("input_1", "InputLayer"),
              layer("conv2d_1", "Conv2D", "input_1", kernel_size=[3, 3], strides=[2, 2], padding="valid",
                    use_bias=False),
              layer("batch_normalization_1", "BatchNormalization", "conv2d_1", epsilon=0.001, scale=False),
              layer("activation_1", "Activation", "batch_normalization_1", activation="relu"),
              layer("max_pooling2d_1", "MaxPooling2D", "activation_1", padding="valid",
                    **{**window, "strides": [2, 2]}),
              layer("average_pooling2d_1", "AveragePooling2D", "max_pooling2d_1", padding="same", **window),
              layer(last, "Concatenate", "max_pooling2d_1", "average_pooling2d_1", axis=3),
              layer("dense_1", "Dense", last, units=5)]
    weights, raw, values = [], b"", {}
    for name, shape in NAMED.items():
        how = {"dtype": "uint8", "min": -0.5 if "variance" not in name else 0.25, "scale": 0.004}
        stored = RNG.integers(0, 256, shape, np.uint8)
        owner = "conv2d_1" if name == "kernel" else "batch_normalization_1"
        weights.append({"name": f"{owner}/{name}", "shape": list(shape), "dtype": "float32", "quantization": how})
        raw, values[name] = raw + stored.tobytes(), how["min"] + how["scale"] * stored
    model = {"modelTopology": {"model_config": {"config": {"layers": layers}}},
             "weightsManifest": [{"paths": ["group1-shard1of2", "group1-shard2of2"], "weights": weights}]}
    text = re.sub(r'"(\w+)": ', r"\1:", json.dumps(model, separators=(",", ": ")))
    text = text.replace("false", "!1").replace(":0.", ":.").replace(":-0.", ":-.")
    cut = 100
    files = {"model": f"function(){{var r={{}};r.exports={text}}},{{}}", **{
        f"group1-shard{i + 1}of2": f'h.exports="{base64.b64encode(part).decode()}"}},{{}}'
        for i, part in enumerate((raw[:cut], raw[cut:]))}}
    with tarfile.open(path, "w:gz") as archive:
        for name, script in files.items():
            member = tarfile.TarInfo(f"package/dist/models/inception_v3/{name}.min.js")
            member.size = len(script)
            archive.addfile(member, io.BytesIO(script.encode()))
    return values


@pytest.fixture
def archive(tmp_path, monkeypatch):
    path = tmp_path / "nsfwjs.tgz"
    values = published(path)
    monkeypatch.setattr(incmixed5, "SHA256", sha256(path))
    monkeypatch.setattr(incmixed5, "ARCHIVE", path)
    monkeypatch.setattr(incmixed5, "SIZE", 15)
    monkeypatch.setattr(IncMixed5, "layers", {"pooled": 64})
    return path, values


def by_hand(image, w):
    """uint8 [15, 15, 3] -> [64]: the same network, position by position."""
    x, out = image / 255, np.zeros((7, 7, 32))
    for i, j in np.ndindex(7, 7):
        out[i, j] = np.einsum("abc,abcd->d", x[2 * i:2 * i + 3, 2 * j:2 * j + 3], w["kernel"])
    out = ((out - w["moving_mean"]) / np.sqrt(w["moving_variance"] + 0.001) + w["beta"]).clip(0)
    large = np.stack([[out[2 * i:2 * i + 3, 2 * j:2 * j + 3].max((0, 1)) for j in range(3)] for i in range(3)])
    mean = np.stack([[large[max(i - 1, 0):i + 2, max(j - 1, 0):j + 2].mean((0, 1)) for j in range(3)]
                     for i in range(3)])
    return np.concatenate([large, mean], 2).mean((0, 1))


def test_the_network_of_an_archive_by_hand(archive):
    images = RNG.integers(0, 256, (4, 15, 15, 3), np.uint8)
    assert IncMixed5()(images) == pytest.approx(np.stack([by_hand(image, archive[1]) for image in images]), abs=1e-5)


def test_another_archive_is_refused(tmp_path, archive, monkeypatch):
    with pytest.raises(UserError, match=r"no file .*missing.tgz: fetch it with bash scripts/download.sh incmixed5"):
        IncMixed5(archive=tmp_path / "missing.tgz")
    published(tmp_path / "other.tgz")
    with pytest.raises(UserError, match=r"other.tgz is not nsfwjs 4.4.0"):
        IncMixed5(archive=tmp_path / "other.tgz")
    for name, last in (("nothing.tgz", "mixed4"), ("text.tgz", None)):
        path = tmp_path / name
        published(path, last) if last else path.write_bytes(b"text")
        monkeypatch.setattr(incmixed5, "SHA256", sha256(path))
        with pytest.raises(UserError, match=rf"{name} is not npm's package nsfwjs, or is damaged"):
            IncMixed5(archive=path)(np.zeros((1, 15, 15, 3), np.uint8))


def test_quality_by_the_second_extractor(tmp_path, archive, monkeypatch, capsys):
    real, samples = (RNG.integers(0, high, (30, 15, 15, 3)).astype(np.uint8) for high in (256, 200))
    np.savez(tmp_path / "real.npz", real)
    np.savez(tmp_path / "x.npz", samples)
    monkeypatch.setattr(sys, "argv", ["eval.quality", "--extractor", "incmixed5", "--samples", str(tmp_path / "x.npz"),
                                      "--against", str(tmp_path / "real.npz"), "--reference",
                                      str(tmp_path / "real.npz"), "--dims", "4", "--repeats", "4", "--out",
                                      str(tmp_path / "x.json"), "--device", "cpu"])
    quality.main()
    found = results.read(tmp_path / "x.json")
    assert set(found.metrics) == {"FD-IncMixed5", "KID-IncMixed5"} <= set(MEASURES)
    assert found.details["difference"]["KID-IncMixed5"]["value"] > 0
    assert found.hashes["extractor"].startswith("IncMixed5:sha256=")
    assert "KID-IncMixed5 x 1000" in capsys.readouterr().out


def test_a_study_is_judged_by_both_extractors(study, archive):
    content = {"seeds": "0-3", "measure": ["quality"], "extractors": ["incmixed5"], "arms": [{"interval": 2}]}
    path, _ = archive
    path.rename(path.with_name("elsewhere.tgz"))
    code, told = study(content)
    assert code == 2 and "bash scripts/download.sh incmixed5" in told and not list(study.samples.rglob("*.png"))
    path.with_name("elsewhere.tgz").rename(path)
    assert study(content)[0] == 0
    one = records_of(study.folder / "records.jsonl")["uniform_n2"]["quality"]
    names = {f"KID-{name}{end}" for name in ("EffLite0", "IncMixed5") for end in ("", " minus uncached")}
    assert names <= set(one.metrics) and one.hashes["extractor IncMixed5"].startswith("IncMixed5:sha256=")


@pytest.mark.skipif(not incmixed5.ARCHIVE.is_file(), reason="nsfwjs's archive is not here")
def test_the_published_weights_are_of_rgb_from_0_to_1():
    """The running means of the first normalisation are one colour seen through its kernels: that of photographs."""
    weights = incmixed5.read_archive(incmixed5.ARCHIVE).weights
    sums, means = weights["conv2d_1/kernel"].sum((0, 1)).T, weights["batch_normalization_1/moving_mean"]
    colour, left, *_ = np.linalg.lstsq(sums, means, rcond=None)
    assert left[0] < 1e-3 * np.square(means).sum()
    assert 0.65 > colour[0] > colour[1] > colour[2] > 0.4
