"""Features kept in parts: resumed, invalidated by pixels alone."""

import os
import shutil

import numpy as np
import pytest
from conftest import save_samples

from eval.metrics import extract as extraction
from eval.metrics.extract import extract
from eval.metrics.images import open_images
from unet_caching.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (14, 8, 10, 3), np.uint8)


class Extractor:
    """Two layers that tell images apart; counts what it computes, and can be stopped on the way."""
    id, layers = "test", {"wide": 5, "narrow": 2}

    def __init__(self, stop_after: float = float("inf")):
        self.computed, self.stop_after = 0, stop_after
        self.mix = np.random.default_rng(1).normal(size=(240, 7)).astype(np.float32)

    def features(self, pixels):
        if self.computed + len(pixels) > self.stop_after:
            raise KeyboardInterrupt
        self.computed += len(pixels)
        out = pixels.reshape(len(pixels), -1).astype(np.float32) @ self.mix
        return {"wide": out[:, :5], "narrow": out[:, 5:]}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(extraction, "PART", 4)


def expected(layer):
    return Extractor().features(PIXELS)[layer]


@pytest.mark.parametrize("kind", ["folder", "npz", "compressed"])
def test_features_are_those_of_the_images_in_order(tmp_path, kind):
    path = tmp_path / "x.npz"
    if kind == "folder":
        path = save_samples(tmp_path / "x", PIXELS)
    else:
        (np.savez if kind == "npz" else np.savez_compressed)(path, PIXELS)
    for _ in range(2):
        found = extract(open_images(path), Extractor(), batch_size=3)
        for layer in ("wide", "narrow"):
            assert np.allclose(found.all(layer), expected(layer), rtol=1e-5)
            assert [len(part) for part in found.parts(layer)] == [4, 4, 4, 2]
    assert found.count == 14


def test_a_stopped_extraction_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, PIXELS)
    with pytest.raises(KeyboardInterrupt):
        extract(open_images(path), Extractor(stop_after=9), batch_size=2)
    rest = Extractor()
    resumed = extract(open_images(path), rest, batch_size=2)
    assert rest.computed == 14 - 8
    np.savez(tmp_path / "whole.npz", PIXELS)
    whole = extract(open_images(tmp_path / "whole.npz"), Extractor(), batch_size=2)
    assert np.array_equal(resumed.all("wide"), whole.all("wide")) and resumed.images_sha256 == whole.images_sha256
    assert not list(tmp_path.rglob("*.tmp"))


def test_pixels_decide_what_is_computed_again(tmp_path):
    folder = save_samples(tmp_path / "x", PIXELS[:12])
    first = extract(open_images(folder), Extractor())

    def again(path=folder):
        extractor = Extractor()
        return extract(open_images(path), extractor), extractor.computed

    for image in folder.glob("000/*.png"):      # touched, as by copying
        os.utime(image, (1, 1))
    same, computed = again()
    assert computed == 0 and same.images_sha256 == first.images_sha256
    copied = shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copy)
    assert again(copied)[1] == 0

    save_samples(folder, PIXELS[12:], first=12)         # grown
    grown, computed = again()
    assert computed == 2 and np.allclose(grown.all("wide"), expected("wide"), rtol=1e-5)

    save_samples(folder, PIXELS[:1], first=5)           # another image
    other, computed = again()
    assert computed == 4 and other.images_sha256 != grown.images_sha256
    assert np.allclose(other.all("wide")[5], expected("wide")[0], rtol=1e-5)

    extractor = Extractor()
    extractor.id = "another network"
    extract(open_images(folder), extractor)
    assert extractor.computed == 14


def test_other_images_of_equal_size_and_time_are_seen(tmp_path):
    """Another npz in the place of one, with its time of modification, as by cp -p."""
    path = tmp_path / "x.npz"
    np.savez(path, PIXELS)
    before, first = path.stat(), extract(open_images(path), Extractor())
    np.savez(path, 255 - PIXELS)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    again = extract(open_images(path), Extractor())
    assert path.stat().st_size == before.st_size and again.images_sha256 != first.images_sha256
    assert np.allclose(again.all("wide"), Extractor().features(255 - PIXELS)["wide"], rtol=1e-5)


def test_a_damaged_part_is_computed_again(tmp_path):
    folder = save_samples(tmp_path / "x", PIXELS)
    extract(open_images(folder), Extractor())
    part = next(folder.glob(".features/*/part-00001.npz"))
    part.write_bytes(part.read_bytes()[:200])
    extractor = Extractor()
    extract(open_images(folder), extractor)
    assert extractor.computed == 4


def test_features_that_are_not_finite_are_refused(tmp_path):
    class Broken(Extractor):
        def features(self, pixels):
            return {name: values + np.nan for name, values in super().features(pixels).items()}

    with pytest.raises(UserError, match=r"wide features .* not finite"):
        extract(open_images(save_samples(tmp_path / "x", PIXELS)), Broken())
    assert not list(tmp_path.rglob("part-*"))


def test_images_that_change_meanwhile_are_refused(tmp_path):
    folder = save_samples(tmp_path / "x", PIXELS)

    class Grows(Extractor):
        def features(self, pixels):
            save_samples(folder, PIXELS[:1], first=99)
            return super().features(pixels)

    with pytest.raises(UserError, match="changed while it was read: wait until it is written"):
        extract(open_images(folder), Grows())
