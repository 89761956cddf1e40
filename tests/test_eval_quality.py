"""Features of EfficientNet-Lite0, and the distances of small sets that eval.quality tells."""

import numpy as np
import pytest
import torch
from conftest import fails, run_command, save_samples
from matplotlib import cbook
from PIL import Image, ImageFilter

from eval import quality
from eval.metrics.features import EffLite0, features_of
from eval.metrics.images import from_array
from run import results
from run.training import emoji
from unet_caching.errors import UserError

GROUP = "Smileys & Emotion"
NAMES = quality.FD, quality.KID


@pytest.fixture(scope="module")
def extractor():
    return EffLite0()


@pytest.fixture(scope="module")
def smileys():
    """36 training images, uint8 [36, 32, 32, 3]."""
    pixels, _ = emoji.load(32, "train", GROUP)
    return pixels[np.random.default_rng(0).permutation(len(pixels))[:36]]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """118 others; their features are kept beside them."""
    path = tmp_path_factory.mktemp("real") / "reference.npz"
    np.savez(path, emoji.load(32, "train", GROUP)[0][::6])
    return path


def blurred(pixels, radius):
    return np.stack([np.asarray(Image.fromarray(a).filter(ImageFilter.GaussianBlur(radius))) for a in pixels])


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
    images = [from_array(smileys[:7], "smileys", [f"{i} {n}" for i in range(7)]) for n in (1, 7)]
    one, many = (features_of(some, extractor, n).all() for some, n in zip(images, (1, 7), strict=True))
    assert np.abs(one - many).max() < 1e-4 * np.abs(many).max()


def test_quality_command_orders_blur_and_traces_its_numbers(tmp_path, capsys, extractor, smileys, reference):
    """And tells the difference between two runs of the same seeds."""
    scores, found = [], []
    folders = [save_samples(tmp_path / f"blur{radius}", blurred(smileys, radius), settings={"interval": 5})
               for radius in (0, 1, 2)]
    for folder in folders:
        more = ("--against", folders[0]) if folder == folders[2] else ()
        out = tmp_path / "results" / f"{folder.name}.json"
        assert run_command(quality.main, "--samples", folder, "--reference", reference, "--dims", 8, "--repeats", 30,
                           "--out", out, "--count", 36, *more) == 0
        found.append(results.read(out))
        scores.append([found[-1].metrics[name].value for name in NAMES])
    assert scores[0] < scores[1] < scores[2] and scores[0][1] < scores[1][1] < scores[2][1]
    written = found[2]
    floor, = written.details["floors"]
    assert all(floor[name]["real"]["range"][1] < floor[name]["samples"]["range"][0] for name in NAMES)
    assert (floor["n"], floor["reference_n"]) == (36, 82)
    assert written.settings == {"interval": 5} and written.hashes["extractor"] == extractor.id
    assert written.details["samples"]["images"] == 36 and len(written.details["reference"]["sha256"]) == 64
    by, printed = found[2].details["difference"], capsys.readouterr().out
    assert all(0 < by[name]["interval"][0] < by[name]["value"] < by[name]["interval"][1] for name in NAMES)
    assert by["against"]["images"] == 36 and "blur0, paired by seed" in printed and quality.FD in printed
    (folders[0] / "000/000003.png").unlink()
    code = run_command(quality.main, "--samples", folders[1], "--against", folders[0], "--reference", reference)
    assert fails(capsys, code, "1 of the 36 images in")


def test_emoji_references_have_held_out_images():
    reference, held_out = quality.open_reference(f"emoji:{GROUP}", (32, 32))
    assert (len(reference), len(held_out)) == (707, 103)
    # the split is by name: no held-out glyph is in the reference in another style
    assert not {name.split("/")[1] for name in reference.names} & {name.split("/")[1] for name in held_out.names}


@pytest.mark.parametrize("reference, message", [
    ("emoji:Smileys", "no emoji of 'Smileys': choose from"), ("nowhere", "no images at nowhere"),
    ("small.npz", "take a reference of the same size")])
def test_commands_end_bad_input_in_one_line(tmp_path, monkeypatch, capsys, smileys, reference, message):
    folder = save_samples(tmp_path / "x", smileys[:2])
    np.savez(tmp_path / "small.npz", smileys[:2, :16])
    monkeypatch.chdir(tmp_path)
    assert fails(capsys, run_command(quality.main, "--samples", folder, "--reference", reference, "--out", "out.json"),
                 message)
    assert not (tmp_path / "out.json").exists()
    with pytest.raises(UserError, match="emoji are square"):
        quality.open_reference("emoji:all", (32, 16))
