"""eval.fid: preparation of images in every mode, references and where they come from, the commands."""

import copy
import io
import pickle
import sys

import lmdb
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cleanfid.resize import build_resizer
from conftest import fails, run_command
from PIL import Image

from eval import fid
from eval.metrics.extract import extract
from eval.metrics.images import open_images
from eval.metrics.inception import MODES, Inception
from eval.metrics.sources import cifar10, open_source
from run import results
from unet_caching.errors import UserError

RNG = np.random.default_rng(0)
PIXELS = np.stack([np.asarray(Image.fromarray(image).resize((40, 40), Image.Resampling.BICUBIC))
                   for image in RNG.integers(0, 256, (9, 6, 6, 3), np.uint8)])


@pytest.fixture(scope="module")
def inception(inception_file):
    return Inception(inception_file, "pytorch-fid")


@pytest.fixture(scope="module")
def made(tmp_path_factory, inception):
    """(samples npz, reference npz of mode pytorch-fid): 5 and 4 images, their features kept beside them."""
    folder = tmp_path_factory.mktemp("made")
    np.savez(folder / "x.npz", PIXELS[:5])
    np.savez(folder / "real.npz", PIXELS[5:])
    real = open_images(folder / "real.npz")
    fid.write_reference(folder / "ref.npz", real, extract(real, inception), inception)
    return folder / "x.npz", folder / "ref.npz"


# Preparing images

def test_every_mode_prepares_images_as_its_library_does():
    noise = RNG.integers(0, 256, (3, 40, 40, 3), np.uint8)
    x = torch.from_numpy(noise).permute(0, 3, 1, 2)
    prepared = {mode: MODES[mode](x) for mode in MODES}
    enlarged = F.interpolate(x.float() / 255, size=(299, 299), mode="bilinear", align_corners=False, antialias=False)
    assert torch.equal(prepared["pytorch-fid"], 2 * enlarged - 1)
    resized = torch.from_numpy(np.stack([build_resizer("clean")(image) for image in noise])).permute(0, 3, 1, 2)
    assert torch.equal(prepared["clean"], (resized - 128) / 128)
    by_hand = np.asarray(Image.fromarray(noise[0, :, :, 1].astype(np.float32)).resize((299, 299), Image.BICUBIC))
    assert np.allclose(prepared["clean"][0, 1], (by_hand.clip(0, 255) - 128) / 128)
    # clean-fid's version of pytorch-fid differs by rounding alone, the others by the way of resizing
    assert torch.allclose(prepared["legacy_pytorch"], prepared["pytorch-fid"], atol=1e-5)
    assert torch.equal(prepared["legacy_tensorflow"], prepared["adm"])
    distinct = [prepared[mode] for mode in ("pytorch-fid", "clean", "adm")]
    assert all((a - b).abs().max() > 0.05 for i, a in enumerate(distinct) for b in distinct[:i])


def with_mode(inception, mode):
    other = copy.copy(inception)
    other.mode = mode
    return other


# References

def opened(path, samples, mode=None):
    return fid.open_reference(path, mode, open_images(samples))


def test_a_reference_remembers_what_it_is_of(made, inception):
    samples, path = made
    reference, features = opened(path, samples), inception.features(PIXELS[5:])["pool"].astype(np.float64)
    mu, sigma = reference.statistics["pool"]
    assert np.allclose(mu, features.mean(0), rtol=1e-5, atol=1e-8)
    assert np.allclose(sigma, np.cov(features, rowvar=False), rtol=1e-3, atol=1e-8)
    assert (reference.mode, reference.details["reference_images"]) == ("pytorch-fid", 4)
    assert reference.weights == inception.sha256


def write(path, **content):
    np.savez(path, **{key: value for key, value in content.items() if value is not None})
    return path


@pytest.mark.parametrize("change, mode, message", [
    ({"mu": None}, None, "has no mu"),
    ({"mu": np.zeros(64)}, None, r"mu and sigma are \[64\]"),
    ({"sigma": np.full((2048, 2048), np.inf)}, None, "finite"),
    ({"size": np.array([256, 256])}, None, "samples are 40x40 pixels and .* is 256x256"),
    ({}, "clean", "has mode pytorch-fid, not clean"),
    ({"mode": "other"}, None, "not one of pytorch-fid, clean"),
    ({"format": 99}, None, "has format 99"),
    ({"count": None}, None, "damaged or not a reference"),
    ({"format": None, "arr_0": PIXELS[:2, :9]}, None, "is a reference of ADM's evaluator"),
])
def test_a_reference_that_does_not_fit_is_refused(tmp_path, made, change, mode, message):
    with np.load(made[1]) as file:
        reference = write(tmp_path / "ref.npz", **{**file, **change})
    with pytest.raises(UserError, match=message) as caught:
        opened(reference, made[0], mode)
    assert "\n" not in str(caught.value)


def test_bad_arguments_end_in_one_line(tmp_path, capsys, made, inception_file):
    for args, message in (
            (("--samples", made[0], "--reference", made[1]), "5 of 50000 images"),
            (("--samples", made[0], "--reference", tmp_path / "no.npz", "--allow-fewer"), "make-reference"),
            (("make-reference", "--from", tmp_path / "no", "--out", tmp_path / "r.npz"), "no images at"),
            (("make-reference", "--from", made[0], "--count", 6, "--out", tmp_path / "r.npz"), "from 2 to 5, got 6"),
            (("make-reference", "--from", made[1], "--size", 64, "--out", tmp_path / "no" / "r.npz"), "no arr_0")):
        assert fails(capsys, run_command(fid.main, *args, "--inception", inception_file), message)
    assert not list(tmp_path.iterdir())


# The commands

def test_commands_from_real_images_to_json(tmp_path, capsys, made, inception_file, inception):
    samples, _ = made
    reference, out = tmp_path / "new" / "tf.npz", tmp_path / "out" / "x.json"
    assert run_command(fid.main, "make-reference", "--from", samples.with_name("real.npz"), "--out", reference,
                       "--mode", "legacy_tensorflow", "--inception", inception_file) == 0
    assert "4 images of 40x40" in capsys.readouterr().out
    with np.load(reference) as file:            # a regular covariance is quicker than that of 4 images
        write(reference, **{**file, "sigma": file["sigma"] + 0.01 * np.eye(2048)})
    assert run_command(fid.main, "--samples", samples, "--reference", reference, "--inception", inception_file,
                       "--count", 5, "--out", out) == 0
    printed, result = capsys.readouterr(), results.read(out)
    name = "FID (clean-fid, legacy_tensorflow), other weights"
    assert set(result.metrics) == {name} and name in printed.out
    x = with_mode(inception, "legacy_tensorflow").features(PIXELS[:5])["pool"].astype(np.float64)
    mu, sigma = opened(reference, samples).statistics["pool"]
    centred = (x - x.mean(0)) / 2
    shared = np.sqrt(np.clip(np.linalg.eigvalsh(centred @ sigma @ centred.T), 0, None)).sum()
    expected = ((x.mean(0) - mu) ** 2).sum() + np.trace(sigma) + (centred ** 2).sum() - 2 * shared
    assert result.metrics[name].value == pytest.approx(expected, rel=1e-6)
    assert result.kind == "fid" and result.images == 5 and len(result.hashes["images"]) == 64
    assert {"reference", "extractor"} <= set(result.hashes) and "not the published file" in printed.err


def test_a_published_file_serves_too(tmp_path, made):
    with np.load(made[1]) as file:
        reference = opened(write(tmp_path / "x.npz", mu=file["mu"], sigma=file["sigma"]), made[0], "clean")
    assert reference.name == "clean-{}" and "x.npz does not name its network" in reference.notes[0]
    assert reference.images is None and reference.weights is None


@pytest.mark.parametrize("change, message", [
    ({"mode": "clean"}, "clean-fid is not installed"), ({"extractor_sha256": "f" * 64}, "other Inception weights")])
def test_a_reference_needs_its_library_and_its_network(tmp_path, monkeypatch, capsys, made, inception_file, change,
                                                       message):
    monkeypatch.setitem(sys.modules, "cleanfid.resize", None)
    with np.load(made[1]) as file:
        reference = write(tmp_path / "x.npz", **{**file, **change})
    assert fails(capsys, run_command(fid.main, "--samples", made[0], "--reference", reference, "--inception",
                                     inception_file, "--allow-fewer"), message)


# Where real images come from

def batches(folder, content=None):
    """CIFAR-10's five files: rows of 1024 red, 1024 green, 1024 blue values."""
    folder.mkdir(exist_ok=True)
    images = RNG.integers(0, 256, (10, 32, 32, 3), np.uint8)
    for i in range(5):
        data = images[2 * i:2 * i + 2].transpose(0, 3, 1, 2).reshape(2, 3072)
        with open(folder / f"data_batch_{i + 1}", "wb") as file:
            pickle.dump(content or {"data": data, "labels": [0, 1], "batch_label": "x"}, file, protocol=2)
    return images


def test_cifar10_is_read_from_its_python_batches(tmp_path):
    images = batches(tmp_path / "cifar-10-batches-py")
    for path in (tmp_path, tmp_path / "cifar-10-batches-py"):
        found = open_source(path)
        assert found.size == (32, 32) and np.array_equal(np.concatenate(list(found.batches(3))), images)
    few = open_source(tmp_path, count=4)
    assert len(few) == 4 and np.array_equal(np.concatenate(list(few.batches(3))), images[:4])


class Runs:
    def __reduce__(self):
        return print, ("code that a pickle ran",)


@pytest.mark.parametrize("content, message", [
    ({"data": Runs()}, r"data_batch_1 is damaged, or not CIFAR-10's: it wants builtins.print|__builtin__.print"),
    ({"data": np.zeros((2, 5), np.uint8)}, "no uint8 data of 3072 columns"),
    ({"fine_labels": [1]}, "no uint8 data"),
])
def test_pickles_of_anything_else_are_refused(tmp_path, capsys, content, message):
    batches(tmp_path / "x", content)
    with pytest.raises(UserError, match=message):
        cifar10(tmp_path / "x")
    assert "ran" not in capsys.readouterr().out
    (tmp_path / "x" / "data_batch_3").unlink()
    with pytest.raises(UserError, match="lacks data_batch_3"):
        cifar10(tmp_path / "x")


def test_lsun_is_cropped_as_for_ddim(tmp_path):
    images = [Image.fromarray(RNG.integers(0, 256, size, np.uint8)) for size in ((20, 31, 3), (33, 16, 3), (16, 16))]

    def write(i, cut=None):
        with io.BytesIO() as buffer, lmdb.open(str(tmp_path)) as env, env.begin(write=True) as transaction:
            images[i].save(buffer, "png")
            transaction.put(b"%d" % i, buffer.getvalue()[:cut])

    for i in range(3):
        write(i)
    found = np.concatenate(list(open_source(tmp_path, size=16).batches(2)))
    wide = images[0].resize((24, 16), Image.Resampling.BILINEAR).crop((4, 0, 20, 16))      # int(16 * 31 / 20) = 24
    tall = images[1].crop((0, 8, 16, 24))                                                  # (33 - 16) / 2 = 8.5 -> 8
    assert np.array_equal(found, np.stack([np.asarray(image.convert("RGB")) for image in (wide, tall, images[2])]))
    assert len(open_source(tmp_path, 16, 2)) == 2
    write(1, cut=60)
    with pytest.raises(UserError, match="the picture 1 is damaged"):
        list(open_source(tmp_path, size=16).batches(2))


def test_photographs_of_any_size_become_a_reference(tmp_path):
    """COCO's are of mixed sizes, some of them grey."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for name, shape in (("a.jpg", (60, 90, 3)), ("b.jpg", (80, 50)), ("c.png", (48, 48, 3))):
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(tmp_path / "photos" / name)
    images = open_source(tmp_path / "photos", 48)
    pixels = np.concatenate(list(images.batches(2)))
    assert pixels.shape == (3, 48, 48, 3) and (pixels[1, ..., 0] == pixels[1, ..., 2]).all()
    assert np.array_equal(pixels[2], np.asarray(Image.open(tmp_path / "photos/c.png")))
    with pytest.raises(UserError, match=r"images of 48x48 pixels, which --size cannot change"):
        np.savez(tmp_path / "x.npz", pixels)
        open_source(tmp_path / "x.npz", 32)
