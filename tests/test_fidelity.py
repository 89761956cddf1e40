"""LPIPS from a file, and the pictures of eval.fidelity; its numbers are tested in test_eval_quality.py."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics.functional.image
import torchvision
from PIL import Image

from eval import fidelity
from eval.metrics.lpips import Lpips
from eval.metrics.measure import PixelMeasure
from eval.tables.plots import worst_pairs
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


def save(folder, images):
    (folder / "000").mkdir(parents=True)
    for seed, image in enumerate(images):
        Image.fromarray(image).save(folder / "000" / f"{seed:06d}.png")
    return folder


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
    measure = Lpips(alexnet[0])
    assert measure.name == "lpips_other_backbone"       # whatever the name of the file says
    measure.__dict__["sha256"] = "7be5be79" + 56 * "0"
    assert measure.name == "lpips" and measure.id.startswith("lpips:v0.1:alex:sha256=7be5be79")


def test_lpips_refuses_what_is_no_alexnet(tmp_path, alexnet):
    with pytest.raises(UserError, match=r"none\.pth: LPIPS needs alexnet-owt-7be5be79.pth, torchvision's"):
        Lpips(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_bytes(b"text")
    with pytest.raises(UserError, match=r"text\.pth is damaged"):
        Lpips(tmp_path / "text.pth")
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="no AlexNet of torchvision"):
        Lpips(tmp_path / "other.pth")
    torch.save({k: v for k, v in alexnet[1].state_dict().items() if k != "features.3.bias"}, tmp_path / "cut.pth")
    with pytest.raises(UserError, match=r"missing features\.3\.bias"):
        Lpips(tmp_path / "cut.pth")
    measure = Lpips(alexnet[0]).measure
    measure.check_size((31, 64))
    with pytest.raises(UserError, match="at least 31 pixels"):
        measure.check_size((64, 30))
    assert len(measure.of(pixels(1, 31), pixels(1, 31, 1))) == 1


def test_the_command_writes_numbers_and_pictures(tmp_path, monkeypatch, capsys, alexnet):
    base = pixels(9)
    noise = np.random.default_rng(1).normal(size=base.shape) * np.array([0, 9, 3, 60, 5, 1, 90, 30, 2])[:, None, None,
                                                                                                        None]
    samples = save(tmp_path / "samples", (base + noise).clip(0, 255).astype(np.uint8))
    out = tmp_path / "results" / "x.json"
    monkeypatch.setattr(sys, "argv", list(map(str, (
        "prog", "--samples", samples, "--against", save(tmp_path / "base", base), "--out", out, "--worst", 3,
        "--lpips-backbone", alexnet[0], "--device", "cpu", "--batch-size", 4))))
    fidelity.main()
    written = results.read(out)
    result = written.details
    assert written.metrics["PSNR"].value == result["psnr"]["mean"] and written.images == 9
    assert "LPIPS" not in written.metrics and written.metrics["not LPIPS (backbone)"].interval[0] > 0
    assert result["identical"] == 1 and result["per_image"]["lpips_other_backbone"][0] == 0
    assert result["per_image"]["lpips_other_backbone"] == pytest.approx(
        by_hand(alexnet[1], (base + noise).clip(0, 255).astype(np.uint8), base), rel=1e-3, abs=1e-6)
    low, high = result["lpips_other_backbone"]["interval"]
    assert low < result["lpips_other_backbone"]["mean"] < high < result["lpips_other_backbone"]["unrelated"]
    assert "not LPIPS (backbone)" in capsys.readouterr().out
    assert sorted(path.name for path in out.parent.iterdir()) == ["x.json", "x_distribution.png", "x_worst.png"]

    # Three columns, and no more: seeds 6, 3 and 7, found again by their pixels.
    with Image.open(out.parent / "x_worst.png") as picture:
        sheet = np.asarray(picture)
    found = [seed for seed in range(9) if contains(sheet, base[seed], scale=4)]
    assert found == [3, 6, 7]


def contains(sheet, image, scale):
    """Whether the enlarged image is somewhere in the sheet."""
    tile = np.asarray(Image.fromarray(image).resize((image.shape[1] * scale, image.shape[0] * scale), 0))
    rows, columns = (sheet[:, :, 0] == tile[0, 0, 0]).nonzero()
    return any(np.array_equal(sheet[r:r + len(tile), c:c + tile.shape[1]], tile)
               for r, c in zip(rows, columns, strict=True))


def test_worst_pairs_are_kept_whatever_the_batches():
    psnr = np.array([30, 12, np.inf, 25, 8, 40, 11.0])
    images = pixels(7, 12)
    for split in (1, 3, 7):
        worst = fidelity.WorstPairs(3)
        for i in range(0, 7, split):
            worst.add(list(range(7))[i:i + split], psnr[i:i + split], images[i:i + split], images[i:i + split] // 2)
        assert [(p, seed) for p, seed, *_ in worst.pairs()] == [(8, 4), (11, 6), (12, 1)]
        assert all(np.array_equal(x, images[s]) and np.array_equal(y, images[s] // 2) for _, s, x, y in worst.pairs())


def test_small_differences_are_amplified_and_large_ones_are_not(tmp_path):
    x = np.full((1, 16, 16, 3), 100, np.uint8)
    for offset, shown in ((1, 64), (10, 160), (100, 200)):      # 64 times, 16 times, twice
        worst_pairs([(20.0, 0, x[0] + offset, x[0])], tmp_path / "x.png")
        with Image.open(tmp_path / "x.png") as picture:
            assert np.asarray(picture)[-20, -20].tolist() == [shown] * 3


def test_identical_runs_have_a_distribution_and_no_worst_pairs(tmp_path):
    result = {"images": 2, "per_image": {"seed": [0, 1], "psnr": [None, None], "ssim": [1.0, 1.0]}}
    result |= {name: {"unrelated": 0.3} for name in ("psnr", "ssim")}
    fidelity.pictures(result, fidelity.WorstPairs(3), tmp_path / "x.json")
    assert [path.name for path in tmp_path.iterdir()] == ["x_distribution.png"]


def test_a_command_with_bad_input_says_so_before_any_work(tmp_path, monkeypatch, capsys):
    a, b = (save(tmp_path / name, pixels(2, 20)) for name in "ab")
    for args, message in ((["--worst", "0"], "--worst must be 1 or more"), (["--batch-size", "0"], "--batch-size"),
                          (["--lpips-backbone", "no.pth"], "no file no.pth"), (["--device", "cuda:99"], "cuda:99")):
        monkeypatch.setattr(sys, "argv", ["prog", "--samples", str(a), "--against", str(b),
                                          "--out", str(tmp_path / "x.json"), *args])
        with pytest.raises(SystemExit) as caught:
            fidelity.main()
        error = capsys.readouterr().err
        assert caught.value.code == 2 and message in error and error.count("\n") == 1
        assert not (tmp_path / "x.json").exists()


def test_the_error_to_a_converged_run_and_how_that_is_decided(tmp_path, monkeypatch, capsys):
    base = pixels(4) // 2
    runs = {"x": (base + 20, 10, {"interval": 5}), "near": (base + 1, 400, {"interval": 1}),
            "far": (base + 8, 400, {}), "twice": (base, 800, {}), "other": (base, 800, {"interval": 2})}
    for name, (images, steps, cache) in runs.items():
        settings = {"model": "m", "steps": steps, "cache": cache}
        (save(tmp_path / name, images) / "run.json").write_text(json.dumps({"settings": settings}))

    def judged(against, twice, *words):
        out = tmp_path / "out" / "x.json"
        monkeypatch.setattr(sys, "argv", list(map(str, (
            "prog", "--samples", tmp_path / "x", "--against", tmp_path / against, "--twice", tmp_path / twice, "--out",
            out, "--device", "cpu", *words))))
        fidelity.main()
        return results.read(out), capsys.readouterr().out

    found, said = judged("near", "twice", "--within", 0.06)         # 19 to 20: 5 %
    metric, by = found.metrics["RMSE to converged"], found.details["convergence"]
    assert metric.value == pytest.approx(19) and found.details["per_image"]["rmse_converged"] == [19] * 4
    assert (by["steps"], by["twice"]) == (400, {"steps": 800, "mean": 20}) and by["moved"] == pytest.approx(0.05)
    assert "800 instead of 400 steps of the other run move the error by 5.0 % (at most 6 %): converged" in said
    assert found.inputs["twice"].endswith("twice") and found.details["twice_run"]["settings"]["steps"] == 800

    found, said = judged("far", "twice")                            # 12 to 20
    assert "RMSE to converged" not in found.metrics and "NOT converged" in said
    for against, twice, message in (("twice", "near", "has 400 steps: twice the 800"), ("near", "other", "cached run"),
                                    ("near", "x", "cached run")):
        with pytest.raises(SystemExit):
            judged(against, twice)
        assert message in capsys.readouterr().err


def test_a_measure_that_is_registered_is_computed_kept_and_printed(tmp_path, monkeypatch, capsys):
    error = PixelMeasure("mean error", key="error", label="error",
                         of=lambda x, y: np.abs(x.astype(float) - y).mean((1, 2, 3)))
    monkeypatch.setattr(fidelity, "PIXELS", (*fidelity.PIXELS, error))
    monkeypatch.setattr(fidelity, "PAIRS", (*fidelity.PAIRS, error))
    base = pixels(4)
    monkeypatch.setattr(sys, "argv", list(map(str, (
        "prog", "--samples", save(tmp_path / "samples", base // 2), "--against", save(tmp_path / "base", base), "--out",
        tmp_path / "x.json", "--device", "cpu"))))
    fidelity.main()
    metric = results.read(tmp_path / "x.json").metrics["mean error"]
    assert metric.value == pytest.approx(np.abs(base // 2 - base.astype(float)).mean()) and metric.interval
    assert "\nerror " in capsys.readouterr().out
