"""eval.fidelity: numbers of pairs, LPIPS from a file, the error to a converged run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics.functional.image
import torchvision
from conftest import fails, run_command, save_samples

from eval import fidelity
from eval.metrics.features import EffLite0
from eval.metrics.images import open_images
from eval.metrics.lpips import Lpips
from eval.metrics.measure import PixelMeasure
from run import results
from unet_caching.errors import UserError

HEADS = Path(torchmetrics.functional.image.__file__).parent / "lpips_models" / "alex.pth"


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory):
    """(a file of random weights as torchvision saves them, the network)."""
    torch.manual_seed(0)
    net = torchvision.models.alexnet().eval()
    path = tmp_path_factory.mktemp("alexnet") / "alexnet-owt-7be5be79.pth"
    torch.save(net.state_dict(), path)
    return path, net


def pixels(n, size=40, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), np.uint8)


def by_hand(net, x, y):
    """Section 3 of the paper: unit features after each ReLU, squared differences, weighted per channel, averaged."""
    heads = torch.load(HEADS, weights_only=True, map_location="cpu")
    shift, scale = (torch.tensor(v)[:, None, None] for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    x, y = ((torch.tensor(a).permute(0, 3, 1, 2) / 127.5 - 1 - shift) / scale for a in (x, y))
    total, after = 0, 0
    with torch.no_grad():
        for layer in net.features[:12]:
            x, y = (layer.__class__.forward(layer, a.clone()) for a in (x, y))
            if isinstance(layer, torch.nn.ReLU):
                unit = [a / a.norm(dim=1, keepdim=True).clamp(min=1e-4) for a in (x, y)]
                weights = heads[f"lin{after}.model.1.weight"][0]
                total = total + (weights * (unit[0] - unit[1]) ** 2).sum(1).mean((1, 2))
                after += 1
    return total.numpy()


def test_lpips_is_the_distance_by_hand(alexnet):
    measure = Lpips(alexnet[0])
    x, y = pixels(5), pixels(5, seed=1)
    y[3] = x[3]
    found = measure(x, y)
    assert found == pytest.approx(by_hand(alexnet[1], x, y), rel=1e-3) and found[3] == 0
    assert found == pytest.approx(measure(y, x), rel=1e-5)
    assert np.concatenate([measure(x[:2], y[:2]), measure(x[2:], y[2:])]) == pytest.approx(found, rel=1e-4)


def test_another_backbone_is_not_called_lpips(alexnet, monkeypatch):
    lpips = Lpips(alexnet[0])
    assert lpips.measure.key == "lpips_other_backbone"       # whatever the name of the file says
    lpips.__dict__["sha256"] = "7be5be79" + 56 * "0"
    assert (lpips.measure.key, lpips.measure.name) == ("lpips", "LPIPS")


def test_lpips_refuses_what_is_no_alexnet(tmp_path, alexnet):
    with pytest.raises(UserError, match=r"none\.pth: LPIPS needs alexnet-owt-7be5be79.pth, torchvision's"):
        Lpips(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_bytes(b"text")
    with pytest.raises(UserError, match=r"text\.pth is damaged"):
        Lpips(tmp_path / "text.pth")
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="not torchvision's AlexNet"):
        Lpips(tmp_path / "other.pth")
    torch.save({k: v for k, v in alexnet[1].state_dict().items() if k != "features.3.bias"}, tmp_path / "cut.pth")
    with pytest.raises(UserError, match=r"missing features\.3\.bias"):
        Lpips(tmp_path / "cut.pth")
    measure = Lpips(alexnet[0]).measure
    measure.check_size((31, 64))
    with pytest.raises(UserError, match="at least 31 pixels"):
        measure.check_size((64, 30))
    assert len(measure.of(pixels(1, 31), pixels(1, 31, 1))) == 1


@pytest.fixture(scope="module")
def extractor():
    return EffLite0()


def test_numbers_of_known_differences(tmp_path, extractor):
    base, off = pixels(8), (pixels(8) // 2 + 60).astype(np.uint8)
    against = open_images(save_samples(tmp_path / "base", base))
    result = fidelity.fidelity(open_images(save_samples(tmp_path / "half", np.concatenate([base[:4], off[4:]]))),
                               against, extractor, batch_size=3)
    psnr = 10 * np.log10(255 ** 2 / ((off[4:].astype(float) - base[4:]) ** 2).mean((1, 2, 3)))
    assert result["identical"] == 4 and result["per_image"]["psnr"][:4] == [None] * 4
    assert result["per_image"]["psnr"][4:] == pytest.approx(psnr, abs=1e-4)
    assert result["psnr"]["mean"] == pytest.approx(psnr.mean(), abs=1e-4)
    assert result["per_image"]["ssim"][:4] == pytest.approx([1] * 4, abs=1e-5)
    assert result["per_image"]["feature_distance"][:4] == pytest.approx([0] * 4, abs=1e-6)
    for name in ("psnr", "ssim", "feature_distance"):
        low, high = result[name]["interval"]
        assert low <= result[name]["mean"] <= high

    itself = fidelity.fidelity(against, against, extractor)
    assert itself["identical"] == 8 and itself["psnr"]["mean"] is None and "inf" in fidelity.table(itself)
    json.dumps(itself, allow_nan=False)


def test_images_without_a_partner_are_refused(tmp_path, extractor):
    small, large = (open_images(save_samples(tmp_path / name, pixels(n))) for name, n in (("small", 3), ("large", 5)))
    for pair in ((small, large), (large, small)):
        with pytest.raises(UserError, match=r"2 of the 5 images in .*large have no partner in .*small: seeds 3-4"):
            fidelity.fidelity(*pair, extractor)
    with pytest.raises(UserError, match="40x20"):
        fidelity.fidelity(open_images(save_samples(tmp_path / "cropped", pixels(3)[:, :20])), small, extractor)


def test_the_command_writes_numbers(tmp_path, capsys, alexnet):
    base = pixels(9)
    noise = np.random.default_rng(1).normal(size=base.shape) * np.array([0, 9, 3, 60, 5, 1, 90, 30, 2])[:, None, None,
                                                                                                        None]
    noisy, out = (base + noise).clip(0, 255).astype(np.uint8), tmp_path / "results" / "x.json"
    samples, against = (save_samples(tmp_path / name, images, settings={"name": name})
                        for name, images in (("samples", noisy), ("base", base)))
    assert run_command(fidelity.main, "--samples", samples, "--against", against, "--out", out,
                       "--lpips-backbone", alexnet[0], "--device", "cpu", "--batch-size", 4, "--seeds", "0-8") == 0
    written = results.read(out)
    result = written.details
    assert written.metrics["PSNR"].value == result["psnr"]["mean"] and written.images == 9
    assert result["psnr"]["mean"] == pytest.approx(np.mean(result["per_image"]["psnr"][1:]), rel=1e-6)
    assert written.settings == {"name": "samples"} and result["against_run"] == {"settings": {"name": "base"}}
    assert "LPIPS" not in written.metrics and written.metrics["not LPIPS (backbone)"].interval[0] > 0
    assert result["identical"] == 1 and result["per_image"]["lpips_other_backbone"][0] == 0
    assert result["per_image"]["lpips_other_backbone"] == pytest.approx(by_hand(alexnet[1], noisy, base), rel=1e-3,
                                                                        abs=1e-6)
    low, high = result["lpips_other_backbone"]["interval"]
    assert low < result["lpips_other_backbone"]["mean"] < high
    printed = capsys.readouterr().out
    assert "not LPIPS (backbone)" in printed and "PSNR (dB)" in printed


def test_a_command_with_bad_input_says_so_before_any_work(tmp_path, capsys):
    a, b = (save_samples(tmp_path / name, pixels(2, 20)) for name in "ab")
    for args, message in ((["--batch-size", 0], "--batch-size"),
                          (["--lpips-backbone", "no.pth"], "no file no.pth"), (["--device", "cuda:99"], "cuda:99")):
        assert fails(capsys, run_command(fidelity.main, "--samples", a, "--against", b, "--out", tmp_path / "x.json",
                                         *args), message)
        assert not (tmp_path / "x.json").exists()


def test_the_error_to_a_converged_run_and_how_that_is_decided(tmp_path):
    base = pixels(4, 16) // 2
    runs = {"x": (base + 20, 10), "near": (base + 1, 400), "far": (base + 8, 400), "twice": (base, 800)}
    x, near, far, twice = (open_images(save_samples(tmp_path / name, images, settings={"steps": steps}))
                           for name, (images, steps) in runs.items())
    found = fidelity.to_converged(x, near, twice)                   # 19 to 20: 5 %
    assert fidelity.converged_metrics(found)["RMSE to converged"].value == pytest.approx(19)
    assert (found["steps"], found["twice"]) == (400, {"steps": 800, "mean": 20})
    assert found["moved"] == pytest.approx(0.05)
    found = fidelity.to_converged(x, far, twice)                    # 12 to 20
    assert not found["converged"] and not fidelity.converged_metrics(found)


def test_a_measure_that_is_registered_is_computed_kept_and_printed(tmp_path, monkeypatch, capsys):
    error = PixelMeasure("mean error", key="error", label="error",
                         of=lambda x, y: np.abs(x.astype(float) - y).mean((1, 2, 3)))
    monkeypatch.setattr(fidelity, "PIXELS", (*fidelity.PIXELS, error))
    monkeypatch.setattr(fidelity, "PAIRS", (*fidelity.PAIRS, error))
    base = pixels(4, 16)
    samples, against = (save_samples(tmp_path / name, images) for name, images in (("a", base // 2), ("b", base)))
    assert run_command(fidelity.main, "--samples", samples, "--against", against, "--out", tmp_path / "x.json") == 0
    metric = results.read(tmp_path / "x.json").metrics["mean error"]
    assert metric.value == pytest.approx(np.abs(base // 2 - base.astype(float)).mean()) and metric.interval
    assert "\nerror " in capsys.readouterr().out
