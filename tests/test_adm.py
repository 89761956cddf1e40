"""eval.adm on an Inception network of the true architecture with random weights, and its metrics by other means."""

import json
import re

import numpy as np
import pytest
import scipy.linalg
import torch
from cleanfid import inception_pytorch
from conftest import run_command
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.image.kid import poly_mmd

from eval import adm
from eval.adm import LAYERS, open_reference
from eval.metrics import evaluator, inception_scores
from eval.metrics.frechet import GROUPS, Moments, frechet_distance, frechet_of_parts
from eval.metrics.images import open_images
from eval.metrics.inception import MODES, Inception, load
from eval.metrics.intervals import Share, jackknife
from eval.metrics.kernel import kid_of_subsets
from eval.metrics.measure import Sets, Unavailable
from run.npz import pack
from unet_caching.errors import UserError

RNG = np.random.default_rng(0)


def pictures(n, size=40):
    """Smooth random images, not all alike: uint8 [n, size, size, 3]."""
    small = RNG.integers(0, 256, (n, 6, 6, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
                     for image in small])


PIXELS = pictures(6)


def as_input(pixels):
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def close(value, expected, tolerance=1e-5):
    return np.abs(value - expected).max() <= tolerance * np.abs(expected).max()


@pytest.fixture(scope="module")
def inception(inception_file):
    return Inception(inception_file, "adm", LAYERS)


@pytest.fixture(scope="module")
def found(inception):
    return inception.features(PIXELS)


@pytest.fixture(scope="module")
def other_net(inception_file):
    """pytorch-fid's network, as clean-fid carries it, with the same weights: built on torchvision's layers."""
    original = inception_pytorch.load_state_dict_from_url
    inception_pytorch.load_state_dict_from_url = lambda *_, **__: torch.load(inception_file, weights_only=True)
    try:
        return inception_pytorch.fid_inception_v3().eval().requires_grad_(False)
    finally:
        inception_pytorch.load_state_dict_from_url = original


def other_features(net, prepared):
    """(pool, output of Mixed_6d.branch1x1) by the blocks of pytorch-fid."""
    seen = []
    hook = net.Mixed_6d.branch1x1.register_forward_hook(lambda _m, _i, output: seen.append(output))
    original = inception_pytorch.fid_inception_v3
    inception_pytorch.fid_inception_v3 = lambda: net
    try:
        blocks = inception_pytorch.InceptionV3([3], resize_input=False, normalize_input=False).eval()
    finally:
        inception_pytorch.fid_inception_v3 = original
    with torch.no_grad():
        pool = blocks(prepared)[0].flatten(1)
    hook.remove()
    return pool.numpy(), seen[0].numpy()


# The network

def test_features_are_those_of_torch_fidelity(inception_file, found):
    net = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=inception_file)
    pool, logits = (values.numpy() for values in net(as_input(PIXELS)))
    assert np.array_equal(found["pool"], pool) and np.array_equal(found["logits"], logits)
    assert found["pool"].std() > 0.01 and np.ptp(found["pool"], axis=0).max() > 0.01       # they tell images apart


def test_layers_agree_with_another_implementation(found, other_net):
    prepared = MODES["adm"](as_input(PIXELS))
    assert prepared.shape[2:] == (299, 299) and -1 <= prepared.min() < prepared.max() < 1
    pool, branch = other_features(other_net, prepared)
    assert close(found["pool"], pool)
    assert branch.shape == (6, 192, 17, 17) and found["spatial"].shape == (6, 2023)
    # 17 x 17 positions, row by row, the 7 channels together
    assert close(found["spatial"].reshape(6, 17, 17, 7), branch.transpose(0, 2, 3, 1)[..., :7])
    assert close(found["logits"], pool @ other_net.fc.weight.numpy().T)
    assert not close(found["logits"], other_net.fc(torch.from_numpy(pool)).numpy())      # with the bias


def test_resizing_is_tensorflow_1s():
    """Corner-anchored: output pixel i lies at input position i * 40 / 299."""
    image = np.zeros((1, 40, 40, 3), np.uint8)
    image[0, :, :, 0], image[0, :, :, 1] = np.arange(40) * 6, (np.arange(40) * 6)[:, None]
    at = np.minimum(np.arange(299) * 40 / 299, 39) * 6
    x = MODES["adm"](as_input(image))[0].numpy()
    assert np.abs(x[0] - (at[None] - 128) / 128).max() < 1e-5 and np.abs(x[1] - (at[:, None] - 128) / 128).max() < 1e-5


def test_features_do_not_depend_on_the_batch(inception, found):
    alone = inception.features(PIXELS[2:3])
    assert all(close(alone[layer][0], found[layer][2]) for layer in LAYERS)


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("Mixed_6d.branch1x1.conv.weight"), "does not fit .*Mixed_6d.branch1x1.conv.weight"),
    (lambda s: s.update({"fc.weight": torch.zeros(1000, 2048)}), "1008 classes .*1000 classes.*another network"),
    (lambda s: s.pop("fc.weight"), "no fc.weight"), (lambda s: s.clear(), "does not hold named tensors"),
])
def test_weights_of_another_network_are_refused(tmp_path, inception_file, change, message):
    state = torch.load(inception_file, weights_only=True)
    change(state)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError, match=message):
        load(tmp_path / "x.pth")


def test_weights_that_are_missing_or_run_code_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no Inception weights .*nothing.pth: get https://.*6726825d.pth"):
        Inception(tmp_path / "nothing.pth", "adm")
    torch.save({"fc.weight": np.array}, tmp_path / "code.pth")
    with pytest.raises(UserError, match="wants numpy"):
        Inception(tmp_path / "code.pth", "adm")


# Metrics on random features

def gaussians(n, d, rng):
    return (rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)).astype(np.float32)


def in_parts(x, size=70):
    return [x[i:i + size] for i in range(0, len(x), size)]


def test_moments_are_numpys_however_the_features_are_cut():
    x = gaussians(500, 12, np.random.default_rng(1)) + 1000
    for size in (70, 500, 1):
        mu, sigma = Moments(in_parts(x, size), groups=5).statistics()
        assert np.allclose(mu, x.astype(np.float64).mean(0), rtol=1e-12)
        assert np.allclose(sigma, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-8)
    moments = Moments([x], groups=4)
    assert moments.counts.tolist() == [125] * 4
    without = [moments.statistics(g)[0] for g in range(4)]
    assert np.allclose(np.mean(without, 0), x.astype(np.float64).mean(0), rtol=1e-12)


def test_frechet_agrees_with_scipy_and_the_closed_form():
    rng = np.random.default_rng(2)
    x, y = (gaussians(400, 16, rng) for _ in range(2))
    mu1, cov1, mu2, cov2 = (f(a.astype(np.float64)) for a in (x, y)
                            for f in (lambda a: a.mean(0), lambda a: np.cov(a, rowvar=False)))
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(cov1 + cov2) - 2 * np.trace(scipy.linalg.sqrtm(cov1 @ cov2)).real
    assert frechet_of_parts(in_parts(x), mu2, cov2).value == pytest.approx(expected, rel=1e-8)
    # y = scale * x + shift, whose covariances commute
    scaled = frechet_of_parts(in_parts(x), 3 * mu1 + 1, 9 * cov1).value
    assert scaled == pytest.approx(((2 * mu1 + 1) ** 2).sum() + 4 * np.trace(cov1), rel=1e-8)


@pytest.mark.parametrize("ranks", [(120, 20), (20, 120), (20, 20), (0, 20)])
def test_frechet_of_singular_covariances_by_the_nuclear_norm(ranks):
    rng = np.random.default_rng(9)
    a, b = (rng.normal(size=(150, rank)) for rank in ranks)
    mu, scale = np.zeros(150), (a ** 2).sum() + (b ** 2).sum()
    expected = scale - 2 * np.linalg.svd(a.T @ b, compute_uv=False).sum()
    assert frechet_distance(mu, a @ a.T, mu, b @ b.T) == pytest.approx(expected, abs=1e-12 * scale)


def test_the_jackknife_is_the_spread_over_new_samples():
    rng = np.random.default_rng(3)
    draws = [(rng.normal(size=(400, 6)) * 1.3 + 0.4).astype(np.float32) for _ in range(100)]
    found = [frechet_of_parts(in_parts(x), np.zeros(6), np.eye(6)) for x in draws[:30]]
    spread = np.std([frechet_of_parts([x], np.zeros(6), np.eye(6), groups=0).value for x in draws])
    assert 0.75 < np.mean([estimate.stderr for estimate in found]) / spread < 1.35
    values = rng.normal(size=20)
    assert jackknife([np.delete(values, i).mean() for i in range(20)]) == pytest.approx(
        values.std(ddof=1) / 20 ** 0.5)
    assert np.isnan(frechet_of_parts([draws[0]], np.zeros(6), np.eye(6), groups=0).stderr)


def test_inception_score_by_hand_and_its_dependence_on_order():
    logits = 3 * np.random.default_rng(4).normal(size=(23, 7)).astype(np.float32)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    blocks = [p[:10], p[10:20], p[20:]]
    scores = [np.exp(np.mean(np.sum(b * (np.log(b) - np.log(b.mean(0))), 1))) for b in blocks]
    found = inception_scores.inception_score(in_parts(logits, 4), split=10)
    assert found.blocks == pytest.approx(scores, rel=1e-10)
    assert found.mean == pytest.approx(np.mean(scores)) and found.deviation == pytest.approx(np.std(scores))
    assert found.estimate.stderr == pytest.approx(np.std(scores, ddof=1) / 3 ** 0.5)
    by_class = logits[np.argsort(logits.argmax(1), kind="stable")]
    assert inception_scores.inception_score([by_class], split=10).mean < 0.8 * found.mean


def test_precision_and_recall_by_brute_force(monkeypatch):
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(60, 4)), rng.normal(size=(43, 4)) * 0.8 + 1
    monkeypatch.setattr(inception_scores, "_PR_ROWS", 7)

    def inside(points, balls):
        radii = [sorted(np.linalg.norm(balls - ball, axis=1))[3] for ball in balls]       # itself is the nearest
        return np.mean([any(np.linalg.norm(point - ball) <= r for ball, r in zip(balls, radii, strict=True))
                        for point in points])

    precision, recall = inception_scores.precision_recall(x.astype(np.float32), y.astype(np.float32))
    assert 0.1 < precision.value < 0.95 and 0.1 < recall.value < 0.95
    assert precision.value == pytest.approx(inside(x, y), abs=1e-6)
    assert recall.value == pytest.approx(inside(y, x), abs=1e-6)
    assert precision.of == 60 and np.isnan(recall.stderr)
    low, high = Share(1.0, 100).interval
    assert 0.95 < low < 0.97 and high == pytest.approx(1)


def test_kid_agrees_with_torchmetrics():
    rng = np.random.default_rng(6)
    x, y = (gaussians(80, 9, rng) / 3 for _ in range(2))
    expected = poly_mmd(*(torch.from_numpy(a).double() for a in (x, y)), degree=3, gamma=None, coef=1.0).item()
    found = kid_of_subsets(x, y)        # a subset is the whole set here
    assert found.size == 80 and found.mean == pytest.approx(expected, rel=1e-9)


# The command

def save(folder, pixels):
    for seed, image in enumerate(pixels):
        (folder / "000").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / "000" / f"{seed:06d}.png")
    (folder / "run.json").write_text(json.dumps({"settings": {"model": "x", "steps": 4}}))
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Samples, and a reference in ADM's layout: images of another distribution, and statistics of more of them."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(7)
    arrays = {}
    for keys, d in ((("mu", "sigma"), 2048), (("mu_s", "sigma_s"), 2023)):
        root = rng.normal(size=(d, 8))
        arrays |= {keys[0]: rng.normal(size=d), keys[1]: np.diag(rng.uniform(0.1, 1, d)) + root @ root.T / 8}
    np.savez(folder / "ref.npz", arr_0=255 - PIXELS[:5], **arrays)
    return save(folder / "x", PIXELS), folder / "ref.npz", arrays


def test_command_from_images_to_json(tmp_path, capsys, files, inception_file, inception, found):
    samples, reference, arrays = files
    common = ("--reference", reference, "--inception", inception_file, "--allow-fewer", "--groups", 0)
    assert run_command(adm.main, "--samples", samples, *common, "--out", tmp_path / "results" / "x.json") == 0
    printed = capsys.readouterr()
    result = json.loads((tmp_path / "results" / "x.json").read_text())
    # these weights are not the published ones, and so no number may pass for an FID
    assert all(name.endswith(", other weights") for name in result["metrics"])
    metrics = {name.split(",")[0]: metric["value"] for name, metric in result["metrics"].items()}

    def by_formula(layer, mu, sigma):
        x = found[layer].astype(np.float64)
        centred = (x - x.mean(0)) / np.sqrt(len(x) - 1)
        shared = np.sqrt(np.clip(np.linalg.eigvalsh(centred @ sigma @ centred.T), 0, None)).sum()     # rank 5
        return ((x.mean(0) - mu) ** 2).sum() + np.trace(sigma) + (centred ** 2).sum() - 2 * shared

    assert metrics["FID"] == pytest.approx(by_formula("pool", arrays["mu"], arrays["sigma"]), rel=1e-6)
    assert metrics["sFID"] == pytest.approx(by_formula("spatial", arrays["mu_s"], arrays["sigma_s"]), rel=1e-6)
    p = np.exp(found["logits"].astype(np.float64) - found["logits"].max())
    p /= p.sum(1, keepdims=True)
    assert metrics["IS"] == pytest.approx(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()), rel=1e-6)
    assert 0 <= metrics["precision"] <= 1 and 0 <= metrics["recall"] <= 1 and "KID" in metrics
    assert (result["kind"], result["images"], result["settings"]["steps"]) == ("adm", 6, 4)
    assert result["hashes"]["extractor"] == inception.sha256 and len(result["hashes"]["reference"]) == 64
    notes = " ".join(result["details"]["notes"])
    assert "6 images where 50000 are expected" in notes and "not the published file" in notes
    assert "6 images for 2048 dimensions" in notes and notes.split()[0] in printed.err and "sFID" in printed.out
    assert all(", other weights" in line for line in printed.out.splitlines()[1:-1])


def test_samples_packed_for_adm_are_read_as_they_are(tmp_path, files):
    pack(files[0], range(6), tmp_path / "packed.npz")
    assert np.array_equal(np.load(tmp_path / "packed.npz")["arr_0"], PIXELS)
    assert np.array_equal(np.concatenate(list(open_images(tmp_path / "packed.npz").batches(4))), PIXELS)


@pytest.mark.parametrize("args, change, message", [
    ((), None, "6 of the 50000 images expected"),
    (("--count", 7), None, "6 of the 7 images expected"),
    (("--count", 6, "--groups", 1), None, "--groups must be 2 or more"),
    (("--count", 6), lambda a: a.update(arr_0=PIXELS[:, :20]), "samples are 40x40 pixels and .* is 40x20"),
    (("--count", 6), lambda a: a.pop("mu_s"), "has no mu_s"),
    (("--count", 6), lambda a: a.update(mu=np.zeros(64)), r"mu and sigma are \[64\]"),
    (("--count", 6), lambda a: a.pop("arr_0"), "no arr_0"),
    (("--count", 6), lambda a: a.update(mu=np.full(2048, np.nan)), "finite"),
    (("--count", 6, "--inception", "missing.pth"), lambda a: None, "no Inception weights missing.pth: get"),
])
def test_bad_input_ends_in_one_line(tmp_path, capsys, files, inception_file, args, change, message):
    samples, reference, arrays = files
    if change:
        content = {"arr_0": PIXELS[:5], **arrays}
        if args[-1] == "missing.pth":
            content = {"arr_0": PIXELS[:5]}
        change(content)
        reference = tmp_path / "ref.npz"
        np.savez(reference, **content)
    assert run_command(adm.main, "--samples", samples, "--reference", reference, "--inception", inception_file, *args,
                       "--out", tmp_path / "x.json") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ")
    assert re.search(message, error)
    assert not (tmp_path / "x.json").exists()


def test_a_truncated_reference_is_refused(tmp_path, files):
    samples = open_images(files[0])
    np.savez(tmp_path / "ref.npz", arr_0=PIXELS)
    whole = (tmp_path / "ref.npz").read_bytes()
    (tmp_path / "ref.npz").write_bytes(whole[:-400])
    with pytest.raises(UserError, match="truncated or not an npz"):
        open_reference(tmp_path / "ref.npz", samples)
    with pytest.raises(UserError, match=r"VIRTUAL_imagenet256_labeled\.npz"):
        open_reference(tmp_path / "nothing.npz", samples)


def test_a_reference_without_statistics_is_judged_by_its_images(tmp_path):
    rng = np.random.default_rng(8)

    class Known:
        def __init__(self, n):
            self.values = {"pool": rng.normal(size=(n, 6)), "logits": rng.normal(size=(n, 5)),
                           "spatial": rng.normal(size=(n, 4))}
            self.values = {name: value.astype(np.float32) for name, value in self.values.items()}

        def parts(self, layer):
            return in_parts(self.values[layer], 9)

        def all(self, layer):
            return self.values[layer]

    x, y = Known(40), Known(30)
    found = {name: score for name, _, score in evaluator.scores("adm", Sets(x, None, y, GROUPS))}
    expected = frechet_of_parts([x.all("spatial")], *Moments([y.all("spatial")]).statistics())
    assert found["sFID"].metric.value == pytest.approx(expected.value) and found["sFID"].metric.interval
    few = {name: score for name, _, score in evaluator.scores("adm", Sets(Known(3), None, y, GROUPS))}
    assert isinstance(few["precision"], Unavailable) and "more than 3" in str(few["recall"])
