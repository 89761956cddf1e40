"""Image sets, EffLite0 features, distances and fidelity, through their public interfaces."""

import io
import json
import math
import os
import struct
import sys
import zlib

import numpy as np
import pytest
import scipy.linalg
import torch
from matplotlib import cbook
from PIL import Image, ImageFilter
from torchmetrics.image.kid import poly_mmd

from eval import fidelity, quality
from eval.metrics import frechet
from eval.metrics.features import EffLite0, features_of
from eval.metrics.images import from_array, open_images
from eval.metrics.small_sets import FrechetInBasis, KernelDistance, nearest_neighbours, pca_basis, real_floor
from run import results
from run.folder import seeds_there
from run.training import emoji
from unet_caching.errors import UserError

GROUP = "Smileys & Emotion"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The networks here are small: threads that wait for a busy core cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def extractor():
    return EffLite0()


@pytest.fixture(scope="module")
def smileys():
    """72 training images, uint8 [72, 32, 32, 3]."""
    pixels, _ = emoji.load(32, "train", GROUP)
    return pixels[np.random.default_rng(0).permutation(len(pixels))[:72]]


def save(folder, pixels, first=0, run=True):
    """A sample folder as the samplers write it."""
    for seed, image in enumerate(pixels, first):
        path = folder / f"{seed // 1000:03d}" / f"{seed:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    if run:
        (folder / "run.json").write_text(json.dumps({"settings": {"interval": 5}}))
    return folder


def png_of_16_bits(path, pixels):
    """RGB of 16 bits a channel, which Pillow reads but does not write: uint16 [height, width, 3]."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def blurred(pixels, radius):
    return np.stack([np.asarray(Image.fromarray(a).filter(ImageFilter.GaussianBlur(radius))) for a in pixels])


def gaussians(rng, dims, n):
    mix = rng.normal(size=(dims, dims))
    return rng.normal(size=(n, dims)) @ mix + rng.normal(size=dims)


# Reading images

def test_a_sample_folder_is_read_by_seed_in_batches(tmp_path, smileys):
    save(tmp_path, smileys[:5], first=998)
    (tmp_path / "grid.png").write_bytes(b"a picture of all samples, not one of them")
    images = open_images(tmp_path)
    assert (len(images), images.seeds, images.size) == (5, [998, 999, 1000, 1001, 1002], (32, 32))
    batches = list(images.batches(2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert np.array_equal(np.concatenate(batches), smileys[:5])
    assert images.run() == {"settings": {"interval": 5}}


def test_a_plain_folder_is_read_by_name_and_an_npz_as_it_lies(tmp_path, smileys):
    (tmp_path / "plain").mkdir()
    for name, image in zip("cab", smileys, strict=False):
        Image.fromarray(image).save(tmp_path / "plain" / f"{name}.png")
    images = open_images(tmp_path / "plain")
    assert images.names == ["a.png", "b.png", "c.png"] and images.seeds is None and images.run() is None
    assert np.array_equal(np.concatenate(list(images.batches(2))), smileys[[1, 2, 0]])

    for write in (np.savez, np.savez_compressed):
        write(tmp_path / "x.npz", smileys[:5])
        images = open_images(tmp_path / "x.npz")
        assert np.array_equal(np.concatenate(list(images.batches(2))), smileys[:5])



@pytest.mark.parametrize("make, call, message", [
    (lambda d, p: None, {}, "no PNG images"),
    (lambda d, p: save(d, p[:3]), {"expected": 4}, "3 of the 4"),
    (lambda d, p: save(d, p[:3]), {"seeds": range(5)}, r"3 of the 5 .* missing seeds 3-4"),
    (lambda d, p: save(d, p[:3]), {"seeds": [7]}, r"0 of the 1 .* missing seeds 7"),
    (lambda d, p: (save(d, p[:2]), save(d, p[:1, :16], first=2)), {}, r"mixed sizes: .*000002.png is 32x16"),
    (lambda d, p: (d / save(d, p[:2]) / "000/000001.png").write_bytes(
        (d / "000/000001.png").read_bytes()[:300]), {}, "000001.png is truncated"),
    (lambda d, p: (d / save(d, p[:2]) / "000/000001.png").write_bytes(b"text"), {}, "000001.png is truncated or not"),
    (lambda d, p: Image.fromarray(p[0]).convert("RGBA").save(d / "0.png"), {}, "mode RGBA"),
    (lambda d, p: Image.fromarray(p[0, :, :, 0].astype(np.uint16)).save(d / "0.png"), {}, "mode I;16"),
    (lambda d, p: png_of_16_bits(d / "0.png", p[0] * np.uint16(257)), {}, "0.png has 16 bits a channel"),
    (lambda d, p: [Image.fromarray(p[0]).save(d / f"{name}.png") for name in ("1", "01")], {}, "two images of seed 1"),
    (lambda d, p: Image.fromarray(p[2]).save(save(d, p[:2]) / "000/000002.jpg"), {}, "000002.jpg and 0 more lie among"),
    (lambda d, p: Image.fromarray(p[2]).save(save(d, p[:2]) / "000/000002.PNG"), {}, "000002.PNG and 0 more lie among"),
    (lambda d, p: Image.fromarray(p[2]).save(save(d, p[:2]) / "000/000001 copy.png"), {},
     "000001 copy.png and 0 more lie among the images of seeds, like 000000.png"),
    (lambda d, p: os.mkfifo(save(d, p[:2]) / "000/000002.png"), {}, "000002.png is no regular file"),
    (lambda d, p: (d / save(d, p[:2]) / "000/000001.png").write_bytes(claiming(60_000)), {}, "truncated or not an"),
    (lambda d, p: (d / save(d, p[:2]) / "000/000001.png").write_bytes(claiming(9_000)), {}, "claims to have 9000x9000"),
    (lambda d, p: (d / save(d, p[:2]) / "run.json").write_text('{"settings": null}'), {"run": True},
     r"run.json is damaged: settings is None and should be keys with values"),
    (lambda d, p: Image.fromarray(p[2]).save(save(d, p[:2], run=False) / "cat.png"), {},
     "holds images itself and in 000/"),
])
def test_bad_folders_are_named_in_one_line(tmp_path, smileys, make, call, message):
    make(tmp_path, smileys)
    run = call.pop("run", False)
    with pytest.raises(UserError, match=message) as caught:
        images = open_images(tmp_path, **call)
        list(images.batches(4))
        if run:
            images.run()
    assert "\n" not in str(caught.value)


def claiming(size: int) -> bytes:
    """A PNG whose header claims so many pixels a side."""
    with io.BytesIO() as buffer:
        Image.new("RGB", (1, 1)).save(buffer, format="PNG")
        content = buffer.getvalue()
    header = b"IHDR" + struct.pack(">II", size, size) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


@pytest.mark.parametrize("seeds", [range(3), [1, 2], [4, 0, 2]])
def test_exactly_the_seeds_that_were_asked_for(tmp_path, smileys, seeds):
    """Whatever else is there, of a folder and of an npz alike."""
    folder = save(tmp_path / "x", smileys[:6])
    (folder / "000/000001 copy.png").write_bytes(b"anything")
    np.savez_compressed(tmp_path / "x.npz", smileys[:6])
    for path in (folder, tmp_path / "x.npz"):
        images = open_images(path, seeds)
        assert images.seeds == sorted(seeds) and len(images) == len(seeds)
        assert np.array_equal(np.concatenate(list(images.batches(2))), smileys[sorted(seeds)])
        assert images.reopen().fingerprint == images.fingerprint != open_images(path, [0, 5]).fingerprint
    assert seeds_there(folder) == list(range(6))


def test_bad_npz_are_named_in_one_line(tmp_path, smileys):
    path = tmp_path / "x.npz"

    def refused(message):
        with pytest.raises(UserError, match=message):
            list(open_images(path).batches(4))

    refused("no images at")
    for array, message in ((smileys / 255, "float64"), (smileys[0], r"\[32, 32, 3\]"), (smileys[:0], "no images")):
        np.savez(path, array)
        refused(message)
    np.savez(path, samples=smileys)
    refused("no arr_0")
    np.savez(path, smileys)
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    refused("truncated or not an npz")
    path.write_bytes(whole[:5000] + bytes(9) + whole[5009:])
    refused("damaged")


# Features

def test_the_network_sees_what_is_in_a_photograph(extractor):
    """Grace Hopper in uniform, at the network's own resolution; and drawings as the features use them."""
    photo = Image.open(cbook.get_sample_data("grace_hopper.jpg")).convert("RGB")
    photo = photo.crop((0, 44, 512, 556)).resize((224, 224))
    with torch.no_grad():
        logits = extractor.net(torch.tensor(np.asarray(photo)).permute(2, 0, 1)[None] / 127.5 - 1)
    assert logits.argmax().item() == 652        # military uniform

    pixels, rows = emoji.load(32)
    drawings = {"soccer-ball": 805, "violin": 889, "pretzel": 932, "hourglass-done": 604}
    for name, label in drawings.items():
        image = next(pixels[i] for i, row in enumerate(rows) if (row.name, row.style) == (name, "twemoji"))
        features = torch.from_numpy(extractor(image[None]))
        assert features.shape == (1, 1280)
        assert extractor.net._fc(features).argmax().item() == label, name


def test_features_do_not_depend_on_the_batch(extractor, smileys):
    images = from_array(smileys[:7], "smileys", [str(i) for i in range(7)])
    one, many = (features_of(images, extractor, batch_size).values for batch_size in (1, 7))
    assert np.abs(one - many).max() < 1e-4 * np.abs(many).max()


def test_features_are_kept_until_an_image_changes(tmp_path, extractor, smileys):
    save(tmp_path, smileys[:4])
    first = features_of(open_images(tmp_path), extractor)
    before = first.values

    class Refuses(EffLite0):
        def __call__(self, pixels):
            raise AssertionError("computed again")

    again = features_of(open_images(tmp_path), Refuses())
    assert np.array_equal(before, again.values) and first.images_sha256 == again.images_sha256

    save(tmp_path, smileys[9:10], first=2)
    changed = features_of(open_images(tmp_path), extractor)
    assert changed.images_sha256 != first.images_sha256
    assert [np.allclose(a, b) for a, b in zip(before, changed.values, strict=True)] == [True, True, False, True]

    other = Refuses()
    other.__dict__["id"] = "another network"
    with pytest.raises(AssertionError, match="computed again"):
        features_of(open_images(tmp_path), other)

    for kept in tmp_path.glob(".features/*/part-00000.npz"):
        kept.write_bytes(kept.read_bytes()[:1000])
    assert np.allclose(features_of(open_images(tmp_path), extractor).values, changed.values)
    assert not list(tmp_path.rglob(".*.tmp"))


# Distances

def test_frechet_distance_is_the_closed_form_where_covariances_commute():
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    a, b, mu = rng.uniform(0.1, 4, 6), rng.uniform(0.1, 4, 6), rng.normal(size=6)
    value = frechet.frechet_distance(mu, turn * a @ turn.T, np.zeros(6), turn * b @ turn.T)
    assert value == pytest.approx((mu ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-12)


def test_frechet_distance_agrees_with_scipy():
    rng = np.random.default_rng(1)
    (mu1, cov1), (mu2, cov2) = (frechet.mean_and_covariance(gaussians(rng, 20, 400)) for _ in range(2))
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * scipy.linalg.sqrtm(cov1 @ cov2).real)
    assert frechet.frechet_distance(mu1, cov1, mu2, cov2) == pytest.approx(expected, rel=1e-8)
    assert frechet.frechet_distance(mu1, cov1, mu1, cov1) == pytest.approx(0, abs=1e-8 * np.trace(cov1))


def test_too_few_images_for_the_dimensions_warn_and_too_many_dimensions_are_refused():
    features = np.random.default_rng(0).normal(size=(16, 20))
    with pytest.warns(UserWarning, match="16 images for 20 dimensions"):
        frechet.warn_of_few(features)
    with pytest.raises(UserError, match="choose 1 to 15"):
        pca_basis(features, 16)


def test_pca_basis_finds_the_directions_of_largest_variance():
    rng = np.random.default_rng(2)
    turn, _ = np.linalg.qr(rng.normal(size=(10, 10)))
    x = (rng.normal(size=(5000, 10)) * [9, 7, 5, *[0.1] * 7]) @ turn.T + 3
    basis = pca_basis(x, 3)
    assert np.allclose(np.abs(basis.directions.T @ turn[:, :3]), np.eye(3), atol=0.05)
    assert basis.explained > 0.999 and np.allclose(basis(x).mean(0), 0)
    assert np.allclose(basis(x).std(0), [9, 7, 5], rtol=0.05)


def test_kid_agrees_with_torchmetrics():
    rng = np.random.default_rng(3)
    x, y = gaussians(rng, 12, 90), gaussians(rng, 12, 70)
    # torchmetrics divides by the size of one set throughout, so its two must be of one size.
    expected = poly_mmd(torch.tensor(x[:70]), torch.tensor(y), degree=3, gamma=None, coef=1.0).item()
    assert KernelDistance(y, 12).estimate(x[:70]).value == pytest.approx(expected, rel=1e-10)

    def k(a, b):
        return (a @ b / 12 + 1) ** 3
    brute = (np.mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
             + np.mean([k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
             - 2 * np.mean([k(a, b) for a in x for b in y]))
    assert KernelDistance(y, 12).estimate(x).value == pytest.approx(brute, rel=1e-10)


def test_error_bars_are_the_spread_over_new_samples():
    rng = np.random.default_rng(4)
    reference = rng.normal(size=(600, 8))
    draws = [rng.normal(size=(150, 8)) * 1.3 + 0.4 for _ in range(80)]
    for distance in (FrechetInBasis(reference, 4), KernelDistance(reference, 4)):
        spread = np.std([distance.estimate(x, 2).value for x in draws])
        claimed = np.mean([distance.estimate(x, 60).stderr for x in draws[:10]])
        assert 0.75 < claimed / spread < 1.35
    unbiased = [distance.estimate(rng.normal(size=(40, 8)), 2).value for _ in range(80)]
    assert abs(np.mean(unbiased)) < 3 * np.std(unbiased) / 80 ** 0.5


@pytest.mark.parametrize("kind", [FrechetInBasis, KernelDistance])
def test_paired_differences_cover_zero_and_find_what_separate_intervals_miss(kind):
    rng = np.random.default_rng(7)
    distance = kind(rng.normal(size=(400, 6)), 4)

    def paired(x, y):
        return distance.difference(x, y, 24)[:2]

    def separate_error(x, y):
        """Of the difference, if the two runs were independent."""
        return np.hypot(*(distance.estimate(z, 24).stderr for z in (x, y)))

    def runs(shift, trials, n=100, shared=0.95):
        """Images of a seed share most of what varies, as cached and uncached ones do."""
        for _ in range(trials):
            common, *own = rng.normal(size=(3, n, 6))
            x, y = (1.2 * (shared ** 0.5 * common + (1 - shared) ** 0.5 * z) + 0.4 for z in own)
            yield x + shift, y

    value, error = np.array([paired(x, y) for x, y in runs(0, 80)]).T
    assert 0.88 <= (np.abs(value) < 1.96 * error).mean() <= 0.99
    assert 0.8 < np.sqrt((error ** 2).mean()) / value.std() < 1.25
    value, error, separate = np.array([(*paired(x, y), separate_error(x, y)) for x, y in runs(0.1, 20)]).T
    assert (value > 1.96 * error).mean() > 0.9          # found
    assert (value > 1.96 * separate).mean() < 0.3       # missed without pairs


def test_paired_differences_are_the_differences_of_the_distances():
    rng = np.random.default_rng(8)
    reference, x, y = (gaussians(rng, 6, n) for n in (200, 50, 50))
    for distance in (FrechetInBasis(reference, 3), KernelDistance(reference, 3)):
        of_one = [distance.estimate(z, 5).value for z in (x, y)]
        assert distance.difference(x, y, 5).value == pytest.approx(of_one[0] - of_one[1], rel=1e-9)
        assert distance.difference(x, x, 5)[:2] == (0, 0)
        with pytest.raises(ValueError, match="50 and 49 images cannot be paired"):
            distance.difference(x, y[:49], 5)


def test_floor_is_at_matched_sizes_and_below_a_different_set():
    rng = np.random.default_rng(5)
    reference, held_out = rng.normal(size=(300, 12)), rng.normal(size=(60, 12))
    distances = FrechetInBasis(reference, 6), KernelDistance(reference, 6)
    same, other = rng.normal(size=(100, 12)), rng.normal(size=(100, 12)) * 1.5 + 0.5
    for real, sizes in ((None, ("split", 100, 200)), (held_out, ("held-out", 60, 300))):
        near = real_floor(distances, same, real, repeats=40)
        far = real_floor(distances, other, real, repeats=40)
        assert (near["kind"], near["n"], near["reference_n"]) == sizes
        for name in (quality.FD, quality.KID):
            low, high = near[name]["real"]["range"]
            assert low < near[name]["samples"]["mean"] < high
            assert far[name]["samples"]["range"][0] > far[name]["real"]["range"][1]


def test_nearest_neighbours_find_the_copies():
    rng = np.random.default_rng(6)
    reference = rng.normal(size=(400, 5))
    chosen = rng.permutation(400)[:300]
    indices, found = nearest_neighbours(reference[chosen] + 1e-3, reference)
    assert np.array_equal(indices, chosen) and np.allclose(found, 1e-3 * 5 ** 0.5)


# Fidelity

def test_fidelity_of_known_differences(tmp_path, extractor, smileys):
    base = open_images(save(tmp_path / "base", smileys[:8]))
    off = (smileys[:8] // 2 + 60).astype(np.uint8)
    half = open_images(save(tmp_path / "half", np.concatenate([smileys[:4], off[4:]])))
    result = fidelity.fidelity(half, base, extractor, batch_size=3)
    squared = ((off[4:].astype(float) - smileys[4:8]) ** 2).mean((1, 2, 3))
    psnr = 10 * np.log10(255 ** 2 / squared)
    assert result["identical"] == 4 and result["per_image"]["psnr"][:4] == [None] * 4
    assert result["per_image"]["psnr"][4:] == pytest.approx(psnr, abs=1e-4)
    assert result["psnr"]["mean"] == pytest.approx(psnr.mean(), abs=1e-4)
    assert result["per_image"]["ssim"][:4] == pytest.approx([1] * 4, abs=1e-5)
    assert result["per_image"]["feature_distance"][:4] == pytest.approx([0] * 4, abs=1e-6)
    for name, worse in (("psnr", min), ("ssim", min), ("feature_distance", max)):
        low, high = result[name]["interval"]
        assert low <= result[name]["mean"] <= high
        assert worse(result[name]["unrelated"], result[name]["mean"]) == result[name]["unrelated"]

    itself = fidelity.fidelity(base, base, extractor)
    assert itself["identical"] == 8 and itself["psnr"]["mean"] is None and "inf" in fidelity.table(itself)
    json.dumps(itself, allow_nan=False)


def test_fidelity_falls_with_blur(tmp_path, extractor, smileys):
    base = open_images(save(tmp_path / "base", smileys[:16]))
    results = [fidelity.fidelity(open_images(save(tmp_path / f"blur{r}", blurred(smileys[:16], r))), base, extractor)
               for r in (0.5, 1, 2)]
    for name, sign in (("psnr", -1), ("ssim", -1), ("feature_distance", 1)):
        values = [sign * result[name]["mean"] for result in results]
        assert values == sorted(values) and len(set(values)) == 3


def test_fidelity_refuses_images_without_a_partner(tmp_path, extractor, smileys):
    small = open_images(save(tmp_path / "small", smileys[:3]))
    large = open_images(save(tmp_path / "large", smileys[:5]))
    for pair in ((small, large), (large, small)):
        with pytest.raises(UserError, match=r"2 of the 5 images in .*large have no partner in .*small: seeds 3-4"):
            fidelity.fidelity(*pair, extractor)
    cropped = open_images(save(tmp_path / "cropped", smileys[:3, :16]))
    with pytest.raises(UserError, match="32x16"):
        fidelity.fidelity(cropped, small, extractor)


# The commands

def run(monkeypatch, module, *args):
    monkeypatch.setattr(sys, "argv", ["prog", *map(str, args)])
    module.main()


def test_quality_command_orders_blur_and_traces_its_numbers(tmp_path, monkeypatch, capsys, extractor, smileys):
    np.savez(tmp_path / "reference.npz", emoji.load(32, "train", GROUP)[0][::3])
    scores = []
    for radius in (0, 1, 2):
        folder = save(tmp_path / f"blur{radius}", blurred(smileys, radius))
        out = tmp_path / "results" / f"{radius}.json"
        run(monkeypatch, quality, "--samples", folder, "--reference", tmp_path / "reference.npz", "--dims", 16,
            "--repeats", 40, "--out", out, "--count", 72)
        written = results.read(out)
        scores.append([written.metrics[name].value for name in (quality.FD, quality.KID)])
    assert scores == sorted(scores) and scores[0][1] < scores[1][1] < scores[2][1]
    result = written.details
    floor, = result["floors"]
    assert floor[quality.FD]["real"]["range"][1] < floor[quality.FD]["samples"]["range"][0]
    assert floor[quality.KID]["real"]["range"][1] < floor[quality.KID]["samples"]["range"][0]
    assert (floor["n"], floor["reference_n"]) == (72, 164)
    assert written.settings == {"interval": 5} and written.hashes["extractor"] == extractor.id
    assert result["samples"]["images"] == 72 and len(result["reference"]["sha256"]) == 64
    assert "commit" in written.provenance and quality.FD in capsys.readouterr().out


def test_quality_command_tells_the_difference_to_another_run(tmp_path, monkeypatch, capsys, smileys):
    np.savez(tmp_path / "reference.npz", emoji.load(32, "train", GROUP)[0][::5])
    sharp, soft = (save(tmp_path / name, blurred(smileys[:40], radius)) for name, radius in (("sharp", 0), ("soft", 1)))
    args = ("--reference", tmp_path / "reference.npz", "--dims", 8, "--repeats", 20, "--out", tmp_path / "q.json")
    run(monkeypatch, quality, "--samples", soft, "--against", sharp, *args)
    by = results.read(tmp_path / "q.json").details["difference"]
    for name in (quality.FD, quality.KID):
        assert 0 < by[name]["interval"][0] < by[name]["value"] < by[name]["interval"][1]
    assert by["against"]["images"] == 40 and "sharp, paired by seed" in capsys.readouterr().out
    (sharp / "000/000003.png").unlink()
    with pytest.raises(SystemExit):
        run(monkeypatch, quality, "--samples", soft, "--against", sharp, *args)
    assert "1 of the 40 images in" in capsys.readouterr().err


def test_unfinished_runs_are_judged_only_on_request(tmp_path, monkeypatch, capsys, smileys):
    samples, whole = (save(tmp_path / name, smileys[:n]) for name, n in (("x", 39), ("whole", 40)))
    for folder in (samples, whole):
        (folder / "sessions.jsonl").write_text('{"seeds": "0-39"}\n')
    args = {quality: ("--reference", whole, "--dims", 8, "--repeats", 2), fidelity: ("--against", samples)}
    for module in (quality, fidelity):
        with pytest.raises(SystemExit):
            run(monkeypatch, module, "--samples", samples, *args[module])
        assert "lacks 1 images that its runs were asked for, seeds 39" in capsys.readouterr().err
        run(monkeypatch, module, "--samples", samples, *args[module], "--allow-fewer", "--out", tmp_path / "x.json")
        assert "warning: " in capsys.readouterr().err
        assert "seeds 39" in results.read(tmp_path / "x.json").details["notes"][0]
    (samples / "sessions.jsonl").write_text('{"seeds": "0-99"}\n')
    run(monkeypatch, fidelity, "--samples", samples, "--against", samples, "--seeds", "0-38")     # just what is meant


def test_emoji_references_have_held_out_images():
    reference, held_out = quality.open_reference(f"emoji:{GROUP}", (32, 32))
    assert (len(reference), len(held_out)) == (707, 103)
    # the split is by name: no held-out glyph is in the reference in another style
    assert not {name.split("/")[1] for name in reference.names} & {name.split("/")[1] for name in held_out.names}


@pytest.mark.parametrize("reference, message", [
    ("emoji:Smileys", "no emoji of 'Smileys': choose from"),
    ("nowhere", "no images at nowhere"),
])
def test_commands_end_bad_input_in_one_line(tmp_path, monkeypatch, capsys, smileys, reference, message):
    folder = save(tmp_path / "x", smileys[:2])
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, quality, "--samples", folder, "--reference", reference, "--out", tmp_path / "out.json")
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "out.json").exists()


def test_fidelity_command_writes_a_table_and_json(tmp_path, monkeypatch, capsys, smileys):
    base = save(tmp_path / "base", smileys[:6])
    cached = save(tmp_path / "cached", blurred(smileys[:6], 1))
    run(monkeypatch, fidelity, "--samples", cached, "--against", base, "--seeds", "0-5", "--out", tmp_path / "f.json")
    result = results.read(tmp_path / "f.json")
    assert result.images == 6 and result.settings == {"interval": 5}
    assert result.details["against_run"] == {"settings": {"interval": 5}}
    assert math.isclose(result.metrics["PSNR"].value, np.mean(result.details["per_image"]["psnr"]), rel_tol=1e-6)
    assert "PSNR (dB)" in capsys.readouterr().out
