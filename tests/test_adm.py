"""eval.adm on an Inception network of the true architecture with random weights, and its metrics by other means."""

import json
import re

import numpy as np
import pytest
import torch
from cleanfid import inception_pytorch
from conftest import run_command, save_samples
from PIL import Image

from eval import adm
from eval.adm import LAYERS
from eval.metrics import evaluator
from eval.metrics.frechet import frechet_distance, mean_and_covariance
from eval.metrics.inception import MODES, Inception, load
from eval.metrics.measure import Sets
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


# The command

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
    return save_samples(folder / "x", PIXELS, settings={"model": "x", "steps": 4}), folder / "ref.npz", arrays


def test_command_from_images_to_json(tmp_path, capsys, files, inception_file, inception, found):
    samples, reference, arrays = files
    common = ("--reference", reference, "--inception", inception_file, "--allow-fewer")
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
    assert 0 <= metrics["precision"] <= 1 and 0 <= metrics["recall"] <= 1
    assert (result["kind"], result["images"], result["settings"]["steps"]) == ("adm", 6, 4)
    assert result["hashes"]["extractor"] == inception.sha256 and len(result["hashes"]["reference"]) == 64
    notes = " ".join(result["details"]["notes"])
    assert "6 images instead of 50000" in notes and "not the published file" in notes
    assert "6 images for 2048 dimensions" in notes and notes.split()[0] in printed.err and "sFID" in printed.out
    assert all(", other weights" in line and re.search(r"\(6 images\)$|  -   \(", line)
               for line in printed.out.splitlines()[1:-1])


@pytest.mark.parametrize("args, change, message", [
    ((), None, "6 of 50000 images"),
    (("--count", 7), None, "6 of 7 images"),
    (("--count", 6), lambda a: a.update(arr_0=PIXELS[:, :20]), "samples are 40x40 pixels and .* is 40x20"),
    (("--count", 6), lambda a: a.pop("mu_s"), "has no mu_s"),
    (("--count", 6), lambda a: a.pop("arr_0"), "no arr_0"),
    (("--count", 6, "--inception", "missing.pth"), None, "no Inception weights missing.pth: get"),
])
def test_bad_input_ends_in_one_line(tmp_path, capsys, files, inception_file, args, change, message):
    samples, reference, arrays = files
    if change:
        change(content := {"arr_0": PIXELS[:5], **arrays})
        reference = tmp_path / "ref.npz"
        np.savez(reference, **content)
    assert run_command(adm.main, "--samples", samples, "--reference", reference, "--inception", inception_file, *args,
                       "--out", tmp_path / "x.json") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ")
    assert re.search(message, error)
    assert not (tmp_path / "x.json").exists()


def test_a_reference_without_statistics_is_judged_by_its_images(tmp_path):
    rng = np.random.default_rng(8)

    class Known:
        def __init__(self, n):
            self.count, self.values = n, {"pool": rng.normal(size=(n, 6)), "logits": rng.normal(size=(n, 5)),
                                          "spatial": rng.normal(size=(n, 4))}
            self.values = {name: value.astype(np.float32) for name, value in self.values.items()}

        def parts(self, layer):
            return [self.values[layer][:9], self.values[layer][9:]]

        def all(self, layer):
            return self.values[layer]

    x, y = Known(40), Known(30)
    found, _, _ = evaluator.scores("adm", Sets(x, None, y), str)
    expected = frechet_distance(*(part for one in (x, y) for part in mean_and_covariance([one.all("spatial")])))
    assert found["sFID"].value == pytest.approx(expected)
    _, unavailable, lines = evaluator.scores("adm", Sets(Known(3), None, y), str)
    assert unavailable.keys() == {"precision", "recall"} and "more than 3" in lines["recall"]
