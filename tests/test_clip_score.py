"""The CLIP score with a tiny model of open_clip's, through the command."""

import json

import numpy as np
import open_clip
import pytest
import torch
from conftest import fails, run_command, save_samples
from omegaconf import OmegaConf
from PIL import Image

from eval import clip_score
from run import results
from run.files import ROOT
from run.prompts import prompts_sha256
from unet_caching.errors import UserError

PROMPTS = ["a red cube", "a whale in the sky", "two balls", "Salvador Dalí", "a clock", "an owl"]
NAME = "tiny-for-tests"
CONFIG = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16,
                                          "patch_size": 16},
          "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(its weights' path, the model itself), an architecture that open_clip knows for a while."""
    folder = tmp_path_factory.mktemp("model")
    (folder / f"{NAME}.json").write_text(json.dumps(CONFIG))
    paths, configs = open_clip.factory._MODEL_CONFIG_PATHS[:], dict(open_clip.factory._MODEL_CONFIGS)
    open_clip.add_model_config(folder / f"{NAME}.json")
    torch.manual_seed(0)
    net = open_clip.CLIP(**CONFIG).eval()
    for name, parameter in net.named_parameters():      # as it is created, all texts have nearly the same features
        if "embedding" in name or "proj" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    torch.save(net.state_dict(), folder / "tiny.bin")
    yield folder / "tiny.bin", net
    open_clip.factory._MODEL_CONFIG_PATHS[:] = paths
    open_clip.factory._MODEL_CONFIGS.clear()
    open_clip.factory._MODEL_CONFIGS.update(configs)


@pytest.fixture
def samples(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 40, 48, 3), np.uint8)
    return save_samples(tmp_path / "samples", pixels, settings={})


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


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


@pytest.fixture
def measure(tiny, samples, prompts):
    """The result of the command, on the CPU, of the samples or others."""
    def measured(*args, of=samples, weights=tiny[0]):
        out = prompts.parent / "results" / f"{of.name}.json"
        assert run_command(clip_score.main, "--model", NAME, "--weights", weights, "--samples", of, "--prompts",
                           prompts, "--device", "cpu", "--out", out, *args) == 0
        return results.read(out)
    return measured


def test_the_score_is_the_cosine_by_hand_clamped_at_zero(capsys, tiny, samples, measure):
    expected = by_hand(tiny[1], pixels_of(samples), PROMPTS)
    assert (expected < 0).any() and (expected > 0).sum() > 1      # else clamping is not tested
    result = measure("--batch-size", 4)
    assert result.details["per_image"]["seed"] == list(range(6))
    assert result.details["per_image"]["score"] == pytest.approx(expected.clip(0), abs=1e-3)
    (name, score), = result.metrics.items()
    assert name == f"CLIP score, {NAME} sha256 {result.hashes['weights'][:12]}"
    assert score.value == pytest.approx(expected.clip(0).mean(), abs=1e-3)
    assert score.interval[0] < score.value < score.interval[1] and score.stderr > 0
    assert result.details["clamped"] == (expected < 0).sum() and result.details["complete"] is True
    assert len(result.hashes["weights"]) == 64 and result.hashes["prompts"] == prompts_sha256(PROMPTS)
    assert result.details["precision"] == "fp32" and "commit" in result.provenance and result.duration_s > 0
    assert f"{score.value:.3f}" in capsys.readouterr().out


def test_several_images_share_a_prompt(tmp_path, tiny, samples, prompts, measure):
    prompts.write_text("\n".join(PROMPTS[:3]))
    expected = by_hand(tiny[1], pixels_of(samples), [PROMPTS[i // 2] for i in range(6)]).clip(0)
    result = measure("--images-per-prompt", 2)
    assert result.details["per_image"]["score"] == pytest.approx(expected, abs=1e-3)
    recorded = save_samples(tmp_path / "recorded", pixels_of(samples), settings={
        "images_per_prompt": 2, "prompts_sha256": prompts_sha256(PROMPTS[:3])})
    assert measure(of=recorded).details["per_image"] == result.details["per_image"]


def test_fewer_images_are_scored_only_on_request_and_labelled(capsys, tiny, samples, measure):
    (samples / "000/000002.png").unlink()
    expected = by_hand(tiny[1], pixels_of(samples), PROMPTS[:2] + PROMPTS[3:]).clip(0)
    result = measure("--allow-fewer")
    assert result.details["per_image"]["score"] == pytest.approx(expected, abs=1e-3)
    assert (result.details["complete"], result.images, result.details["expected"]) == (False, 5, 6)
    assert "5 images of 6 expected: NOT the full set" in capsys.readouterr().out


def test_the_difference_of_two_runs_is_paired_by_seed(capsys, tmp_path, samples, measure):
    first = measure()
    second = measure("--against", tmp_path / "results/samples.json",
                     of=save_samples(tmp_path / "second", [np.roll(image, 3, 0) for image in pixels_of(samples)]))
    by, (a, b) = second.details["difference"], (next(iter(one.metrics.values())).value for one in (second, first))
    assert by["mean"] == pytest.approx(a - b, abs=1e-4)
    assert by["interval"][0] <= by["mean"] <= by["interval"][1]
    assert "paired by seed" in capsys.readouterr().out
    itself = clip_score.difference(first, first)
    assert (itself["mean"], itself["interval"]) == (0, [0, 0])


@pytest.mark.parametrize("change, args, message", [
    (lambda d: (d / "samples/000/000002.png").unlink(), [], "5 of 6 images; missing seeds 2: sample them first"),
    (lambda d: (d / "prompts.txt").write_text("a\nb"), [], "seeds of 2 prompts with 1 images each end at 1"),
    (lambda d: (d / "samples/run.json").write_text(json.dumps({"settings": {"prompts_sha256": "0" * 64}})), [],
     "sampled from other prompts"),
    (lambda d: (d / "samples/run.json").write_text(json.dumps({"settings": {"images_per_prompt": 2}})),
     ["--images-per-prompt", 1], "has 2 per prompt"),
    (lambda d: results.write(d / "other.json", results.Result("fidelity")), ["--against", "other.json"],
     "takes a result of eval.clip_score"),
    (lambda d: results.write(d / "other.json", results.Result("clip_score", details={"model": "ViT-g-14"})),
     ["--against", "other.json"], "not measured alike: model ViT-g-14 there, tiny-for-tests here"),
    (None, ["--tag", "openai"], "no weights 'openai' for tiny-for-tests"),
    (None, ["--weights", "nowhere.bin"], "no weights nowhere.bin"),
    (lambda d: (d / "other.bin").write_bytes(b"text"), ["--weights", "other.bin"], "other.bin is damaged"),
    (lambda d: torch.save({"a": torch.ones(1)}, d / "other.bin"), ["--weights", "other.bin"],
     "other.bin does not fit open_clip's tiny-for-tests"),
    (lambda d: torch.save({"positional_embedding": torch.ones(16, 8)}, d / "other.bin"), ["--weights", "other.bin"],
     "other.bin does not fit open_clip's tiny-for-tests: text pos_embed width changed"),
])
def test_bad_input_ends_in_one_line(monkeypatch, tmp_path, capsys, tiny, samples, prompts, change, args, message):
    if change:
        change(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert fails(capsys, run_command(clip_score.main, "--model", NAME, "--weights", tiny[0], "--samples", samples,
                                     "--prompts", prompts, "--out", "out.json", *args), message)
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("args, message", [
    (["--weights", "none.bin"], "open_clip's ViT-g-14; laion2b_s34b_b88k is open_clip_model.safetensors or "
                                "open_clip_pytorch_model.bin of laion/CLIP-ViT-g-14-laion2B-s34B-b88K"),
    (["--model", "ViT-g-99", "--weights", "none.bin"], "open_clip has no model 'ViT-g-99'; near it: ViT-g-14"),
    (["--model", "ViT-L-14", "--weights", "x.bin"], "name yours with --tag, one of openai"),
    (["--model", "ViT-H-14", "--weights", "x.bin", "--tag", "no"], "no weights 'no' for ViT-H-14: choose from"),
])
def test_published_models_say_what_they_need(monkeypatch, tmp_path, capsys, samples, prompts, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.bin").write_bytes(b"")
    assert fails(capsys, run_command(clip_score.main, "--samples", samples, "--prompts", prompts, *args), message)


def test_nothing_is_downloaded_for_models_that_need_further_files(monkeypatch, tmp_path, capsys, tiny, samples,
                                                                  prompts):
    asked = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **_: asked.append(args[0]) or [])
    config = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "hf_tokenizer_name": "nobody/nothing"}}
    (tmp_path / "tiny-hub.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-hub.json")
    code = run_command(clip_score.main, "--samples", samples, "--prompts", prompts, "--model", "tiny-hub", "--weights",
                       tiny[0])
    assert fails(capsys, code, "tiny-hub needs more files than the weights, and they are not on this machine")
    assert asked == []


def test_only_the_papers_weights_give_the_number_of_their_tables():
    published, other = clip_score.PUBLISHED, "0123456789abcdef"
    names = {("ViT-g-14", None, published): "CLIP score", ("ViT-g-14", "laion2b_s34b_b88k", other): "CLIP score",
             ("ViT-g-14", None, other): "CLIP score, ViT-g-14 sha256 0123456789ab",
             ("ViT-g-14", "laion2b_s12b_b42k", other): "CLIP score, ViT-g-14 laion2b_s12b_b42k",
             ("ViT-B-32", None, other): "CLIP score, ViT-B-32 sha256 0123456789ab"}
    found = {key: clip_score.called(*key[:2], "x.bin", key[2]) for key in names}
    assert {key: name for key, (name, _) in found.items()} == names
    assert "in no table of a paper" in found["ViT-g-14", None, other][1][0]
    assert "only --tag says" in found["ViT-g-14", "laion2b_s34b_b88k", other][1][0]
    assert sum(len(notes) for _, notes in found.values()) == 2
    with pytest.raises(UserError, match=r"x.bin is the published file of ViT-g-14 laion2b_s34b_b88k, not ViT-B-32"):
        clip_score.called("ViT-B-32", None, "x.bin", published)
    assert published == next(file["sha256"] for file in OmegaConf.load(ROOT / "scripts" / "downloads.yaml").clip.files)


def test_images_are_prepared_as_the_weights_were_trained(tmp_path):
    weights = tmp_path / "x.bin"
    weights.write_bytes(b"")
    for name, tag, key, value in (("ViT-L-14", "laion2b_s32b_b82k", "mean", (0.5, 0.5, 0.5)),
                                  ("ViT-g-14", None, "resize_mode", "shortest")):
        assert clip_score.preparation_of(open_clip, name, weights, tag)[key] == value
