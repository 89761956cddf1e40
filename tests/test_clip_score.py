"""The CLIP score with a tiny model of open_clip's, through the command."""

import json
import sys

import numpy as np
import open_clip
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

from eval import clip_score
from eval.metrics.intervals import mean_estimate
from run import results
from run.files import ROOT
from run.prompts import prompts_sha256
from unet_caching.errors import UserError

PROMPTS = ["a red cube", "a whale in the sky", "two balls", "Salvador Dalí", "a clock", "an owl"]
CONFIG = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16,
                                          "patch_size": 16},
          "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(its config's path, its weights' path, the model itself)."""
    folder = tmp_path_factory.mktemp("model")
    config = folder / "tiny-for-tests.json"
    config.write_text(json.dumps(CONFIG))
    torch.manual_seed(0)
    net = open_clip.CLIP(**CONFIG).eval()
    for name, parameter in net.named_parameters():      # as it is created, all texts have nearly the same features
        if "embedding" in name or "proj" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    torch.save(net.state_dict(), folder / "tiny.bin")
    return config, folder / "tiny.bin", net


@pytest.fixture
def samples(tmp_path):
    return save(tmp_path / "samples", np.random.default_rng(0).integers(0, 256, (6, 40, 48, 3), np.uint8))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def save(folder, pixels, **settings):
    """A sample folder as stable_diffusion.sample writes it."""
    (folder / "000").mkdir(parents=True)
    for seed, image in enumerate(pixels):
        Image.fromarray(image).save(folder / "000" / f"{seed:06d}.png")
    (folder / "run.json").write_text(json.dumps({"settings": settings}))
    return folder


def by_hand(net, pixels, texts):
    """Resize the shorter side, crop, normalize, encode one image at a time."""
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.48145466, 0.4578275, 0.40821073),
                                                           (0.26862954, 0.26130258, 0.27577711)))
    tokenize, found = open_clip.SimpleTokenizer(context_length=16), []
    for image, text in zip(pixels, texts, strict=True):
        height, width = image.shape[:2]
        small = Image.fromarray(image).resize((32 * width // height, 32), Image.Resampling.BICUBIC)
        left = round((small.width - 32) / 2)
        x = torch.tensor(np.asarray(small.crop((left, 0, left + 32, 32)))).permute(2, 0, 1) / 255
        with torch.no_grad():
            a, b = net.encode_image(((x - mean) / std)[None])[0], net.encode_text(tokenize([text]))[0]
        found.append(100 * (a @ b / (a.norm() * b.norm())).item())
    return np.array(found)


def pixels_of(folder):
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("000/*.png"))]


def run(monkeypatch, tiny, *args):
    options = ["--model-config", tiny[0], "--weights", tiny[1]] if tiny else []
    monkeypatch.setattr(sys, "argv", ["prog", *map(str, [*options, "--device", "cpu", *args])])
    # A second command in one process would find the name taken.
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", open_clip.factory._MODEL_CONFIG_PATHS[:1])
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS",
                        {k: v for k, v in open_clip.factory._MODEL_CONFIGS.items() if k != "tiny-for-tests"})
    clip_score.main()


def measure(monkeypatch, tiny, samples, prompts, *args):
    out = samples.parent / "results" / f"{samples.name}.json"
    run(monkeypatch, tiny, "--samples", samples, "--prompts", prompts, "--out", out, *args)
    return results.read(out)


def test_the_score_is_the_cosine_by_hand_clamped_at_zero(monkeypatch, capsys, tiny, samples, prompts):
    expected = by_hand(tiny[2], pixels_of(samples), PROMPTS)
    assert (expected < 0).any() and (expected > 0).sum() > 1      # else clamping is not tested
    result = measure(monkeypatch, tiny, samples, prompts, "--batch-size", 4)
    assert result.details["per_image"]["seed"] == list(range(6))
    assert result.details["per_image"]["score"] == pytest.approx(expected.clip(0), abs=1e-3)
    (name, score), = result.metrics.items()
    assert name == "image-text score, tiny-for-tests"       # only the published models give a CLIP score
    assert score.value == pytest.approx(expected.clip(0).mean(), abs=1e-3)
    assert score.interval[0] < score.value < score.interval[1] and score.stderr > 0
    assert result.details["clamped"] == (expected < 0).sum() and result.details["complete"] is True
    assert len(result.hashes["weights"]) == 64 and result.hashes["prompts"] == prompts_sha256(PROMPTS)
    assert result.details["precision"] == "fp32" and "commit" in result.provenance
    assert f"{score.value:.3f}" in capsys.readouterr().out


def test_weights_in_safetensors_score_the_same(monkeypatch, tmp_path, tiny, samples, prompts):
    save_file({k: v.contiguous() for k, v in tiny[2].state_dict().items()}, tmp_path / "tiny.safetensors")
    a = measure(monkeypatch, tiny, samples, prompts)
    b = measure(monkeypatch, (tiny[0], tmp_path / "tiny.safetensors"), samples, prompts)
    assert a.details["per_image"] == b.details["per_image"] and a.hashes["weights"] != b.hashes["weights"]


def test_several_images_share_a_prompt(monkeypatch, tmp_path, tiny, samples, prompts):
    prompts.write_text("\n".join(PROMPTS[:3]))
    expected = by_hand(tiny[2], pixels_of(samples), [PROMPTS[i // 2] for i in range(6)]).clip(0)
    given = measure(monkeypatch, tiny, samples, prompts, "--images-per-prompt", 2)
    assert given.details["per_image"]["score"] == pytest.approx(expected, abs=1e-3)
    recorded = save(tmp_path / "recorded", pixels_of(samples), images_per_prompt=2,
                    prompts_sha256=prompts_sha256(PROMPTS[:3]))
    assert measure(monkeypatch, tiny, recorded, prompts).details["per_image"] == given.details["per_image"]


def test_fewer_images_are_scored_only_on_request_and_labelled(monkeypatch, capsys, tiny, samples, prompts):
    (samples / "000/000002.png").unlink()
    expected = by_hand(tiny[2], pixels_of(samples), PROMPTS[:2] + PROMPTS[3:]).clip(0)
    result = measure(monkeypatch, tiny, samples, prompts, "--allow-fewer")
    assert result.details["per_image"]["score"] == pytest.approx(expected, abs=1e-3)
    assert (result.details["complete"], result.images, result.details["expected"]) == (False, 5, 6)
    assert "5 images of 6 expected: NOT the full set" in capsys.readouterr().out


def test_the_difference_of_two_runs_is_paired_by_seed(monkeypatch, capsys, tmp_path, tiny, samples, prompts):
    changed = [np.roll(image, 3, 0) for image in pixels_of(samples)]
    first = measure(monkeypatch, tiny, samples, prompts)
    second = measure(monkeypatch, tiny, save(tmp_path / "second", changed), prompts,
                     "--against", tmp_path / "results/samples.json")
    by, name = second.details["difference"], "image-text score, tiny-for-tests"
    assert by["mean"] == pytest.approx(second.metrics[name].value - first.metrics[name].value, abs=1e-4)
    assert by["interval"][0] <= by["mean"] <= by["interval"][1] and -1 <= by["correlation"] <= 1
    assert "paired by seed" in capsys.readouterr().out
    itself = clip_score.difference(first, first)
    assert (itself["mean"], itself["interval"]) == (0, [0, 0]) and itself["correlation"] == pytest.approx(1)


def test_error_bars_are_the_spread_of_the_mean_over_prompts():
    rng = np.random.default_rng(0)

    def draw(groups, each):
        """Images of one prompt are alike."""
        return (rng.normal(size=(groups, 1)) + 0.2 * rng.normal(size=(groups, each))).ravel()

    spread = np.std([draw(100, 4).mean() for _ in range(400)])
    claimed = mean_estimate(draw(100, 4), groups=np.arange(400) // 4)["stderr"]
    assert 0.75 < claimed / spread < 1.3
    assert mean_estimate(draw(100, 4))["stderr"] < 0.7 * spread       # as if they were independent


@pytest.mark.parametrize("change, args, message", [
    (lambda d: (d / "samples/000/000002.png").unlink(), [], "5 of 6 images; missing seeds 2: sample them first"),
    (lambda d: (d / "prompts.txt").write_text("a\nb"), [], "seed 5, and 2 prompts with 1 images each end at 1"),
    (lambda d: (d / "samples/run.json").write_text(json.dumps({"settings": {"prompts_sha256": "0" * 64}})), [],
     "sampled from other prompts"),
    (lambda d: (d / "samples/run.json").write_text(json.dumps({"settings": {"images_per_prompt": 2}})),
     ["--images-per-prompt", 1], "has 2 per prompt"),
    (None, ["--images-per-prompt", 0], "--images-per-prompt 0"),
    (None, ["--batch-size", 0], "--batch-size must be 1 or more"),
    (None, ["--against", "nowhere.json"], "no result nowhere.json"),
    (lambda d: results.write(d / "other.json", results.Result("fidelity")), ["--against", "other.json"],
     "takes a result of eval.clip_score"),
    (lambda d: results.write(d / "other.json", results.Result("clip_score", details={"model": "ViT-g-14"})),
     ["--against", "other.json"], "not measured alike: model ViT-g-14 there, tiny-for-tests here"),
    (None, ["--tag", "openai"], "no weights 'openai' for tiny-for-tests"),
    (None, ["--weights", "nowhere.bin"], "no weights nowhere.bin"),
    (lambda d: (d / "other.bin").write_bytes(b"text"), ["--weights", "other.bin"], "other.bin is damaged"),
    (lambda d: torch.save({"a": torch.ones(1)}, d / "other.bin"), ["--weights", "other.bin"],
     "other.bin does not fit open_clip's tiny-for-tests"),
    (lambda d: torch.save(open_clip.CLIP(**CONFIG | {"embed_dim": 8}).state_dict(), d / "other.bin"),
     ["--weights", "other.bin"], "other.bin does not fit open_clip's tiny-for-tests"),
    (lambda d: torch.save({"positional_embedding": torch.ones(16, 8)}, d / "other.bin"), ["--weights", "other.bin"],
     "other.bin does not fit open_clip's tiny-for-tests: text pos_embed width changed"),
    (lambda d: (d / "other.json").write_text('{"embed_dim": 1}'), ["--model-config", "other.json"],
     "has no text_cfg, vision_cfg"),
])
def test_bad_input_ends_in_one_line(monkeypatch, tmp_path, capsys, tiny, samples, prompts, change, args, message):
    if change:
        change(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, tiny, "--samples", samples, "--prompts", prompts, "--out", "out.json", *args)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error and error.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("args, message", [
    (["--weights", "none.bin"], "open_clip's ViT-g-14; laion2b_s34b_b88k is open_clip_model.safetensors or "
                                "open_clip_pytorch_model.bin of laion/CLIP-ViT-g-14-laion2B-s34B-b88K"),
    (["--model", "ViT-g-99", "--weights", "none.bin"], "open_clip has no model 'ViT-g-99'; near it: ViT-g-14"),
    (["--model", "ViT-L-14", "--weights", "x.bin"], "say which yours are with --tag, one of openai"),
    (["--model", "ViT-H-14", "--weights", "x.bin", "--tag", "no"], "no weights 'no' for ViT-H-14: choose from"),
])
def test_published_models_say_what_they_need(monkeypatch, tmp_path, capsys, samples, prompts, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(SystemExit):
        run(monkeypatch, None, "--samples", samples, "--prompts", prompts, *args)
    assert message in capsys.readouterr().err


def test_nothing_is_downloaded_for_models_that_need_further_files(monkeypatch, capsys, tiny, samples, prompts):
    asked = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **_: asked.append(args[0]) or [])
    config = json.loads(json.dumps(CONFIG))
    config["text_cfg"]["hf_tokenizer_name"] = "nobody/nothing"
    own = tiny[0].with_name("tiny-hub.json")
    own.write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        run(monkeypatch, None, "--samples", samples, "--prompts", prompts, "--model-config", own, "--weights", tiny[1])
    assert "tiny-hub needs more than the weights, and it is not on this machine" in capsys.readouterr().err
    assert asked == []


def test_a_missing_open_clip_is_named(monkeypatch, capsys, tiny, samples, prompts):
    monkeypatch.setattr(sys, "argv", ["prog", "--samples", str(samples), "--prompts", str(prompts),
                                      "--weights", str(tiny[1])])
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(SystemExit):
        clip_score.main()
    assert "pip install open_clip_torch" in capsys.readouterr().err


def test_only_the_papers_weights_give_the_number_of_their_tables():
    published, other = clip_score.PUBLISHED, "0123456789abcdef"
    names = {("ViT-g-14", None, None, published): "CLIP score",
             ("ViT-g-14", "laion2b_s34b_b88k", None, other): "CLIP score",
             ("ViT-g-14", None, None, other): "CLIP score, ViT-g-14 sha256 0123456789ab",
             ("ViT-g-14", "laion2b_s12b_b42k", None, other): "CLIP score, ViT-g-14 laion2b_s12b_b42k",
             ("ViT-B-32", None, None, other): "CLIP score, ViT-B-32 sha256 0123456789ab",
             ("own", None, "own.json", other): "image-text score, own"}
    assert {which: clip_score.metric_name(*which) for which in names} == names
    assert published == next(file["sha256"] for file in OmegaConf.load(ROOT / "scripts" / "downloads.yaml").clip.files)


@pytest.mark.parametrize("model, tag, digest, message", [
    ("ViT-g-14", None, clip_score.PUBLISHED, None), ("ViT-B-32", None, "0", None),
    ("ViT-g-14", "laion2b_s12b_b42k", "0", None),
    ("ViT-g-14", None, "0", "stands in no table of a paper"),
    ("ViT-g-14", "laion2b_s34b_b88k", "0", "taken from --tag"),
])
def test_weights_that_are_not_the_published_file_are_told(tmp_path, model, tag, digest, message):
    notes = clip_score.check_weights(model, tag, tmp_path / "x.bin", digest)
    assert message in notes[0] if message else not notes


def test_the_published_file_is_no_other_release(tmp_path):
    for model, tag in (("ViT-g-14", "laion2b_s12b_b42k"), ("ViT-B-32", None)):
        with pytest.raises(UserError, match=r"x.bin is the published file of ViT-g-14 laion2b_s34b_b88k, not ViT"):
            clip_score.check_weights(model, tag, tmp_path / "x.bin", clip_score.PUBLISHED)


def test_images_are_prepared_as_the_weights_were_trained(tmp_path):
    weights = tmp_path / "x.bin"
    weights.write_bytes(b"")
    assert clip_score.check_model("ViT-L-14", weights, "laion2b_s32b_b82k")[1]["mean"] == (0.5, 0.5, 0.5)
    assert clip_score.check_model("ViT-g-14", weights)[1]["resize_mode"] == "shortest"
