"""`stable_diffusion.sample` through the command line, on tiny random models in diffusers' layout."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import fails, pixels, run_command, same, settings_of
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lab.fit.__main__ import main as fit_main
from run.folder import image_path
from run.prompts import prompts_sha256
from stable_diffusion.model import ReleasedNoise, StableDiffusion
from stable_diffusion.sample import main
from stable_diffusion.unet import UNet

TOLERANCE = 2e-5
TOKENS, SIZE = 12, 16
UNET = {"in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1,
        "attention_resolutions": [1], "num_heads": 4, "context_dim": 16}
CONFIG = {"name": "sd_tiny", "unet": UNET, "resolution": SIZE, "downsampling": 2, "tokens": TOKENS,
          "sampler": {"sampler": "plms", "steps": 6, "guidance": 3.0, "branch": 1}}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PROMPTS = ["red fox", "a dog, asleep", 'the "cup"', "red fox", "moon"]
LEVELS = {"block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 16, "attention_head_dim": 4,
          "sample_size": SIZE // 2, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
          "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
FULL = {"skip_prk_steps": True, "steps_offset": 1}


def make_folder(folder: Path, unet: UNet2DConditionModel | None = None) -> Path:
    """A tiny model with random weights, as diffusers writes it."""
    torch.manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz,\""
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    text = CLIPTextConfig(vocab_size=len(tokens), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                          num_attention_heads=2, max_position_embeddings=TOKENS, bos_token_id=len(tokens) - 2,
                          eos_token_id=len(tokens) - 1)
    encoder = CLIPTextModel(text)
    torch.nn.init.normal_(encoder.get_input_embeddings().weight, std=3)     # so that prompts show in the images
    pipe = StableDiffusionPipeline(
        unet=unet or UNet2DConditionModel(**LEVELS), text_encoder=encoder, scheduler=PNDMScheduler(**BETAS, **FULL),
        vae=AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
                          down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2),
        tokenizer=CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[],
                                model_max_length=TOKENS),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """The config of a tiny model; its folder and its prompts beside it."""
    folder = tmp_path_factory.mktemp("tiny")
    make_folder(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return write_config(folder / "tiny.yaml", folder / "model")


def write_config(path: Path, model: Path, **changes) -> Path:
    path.write_text(yaml.safe_dump(CONFIG | {"checkpoint": str(model)} | changes))
    return path


@pytest.fixture
def sample(tiny):
    """The command within this process, on the file of prompts unless others are given; returns its exit code."""
    def run(*args, config=tiny) -> int:
        prompts = [] if "--prompts" in args or "--prompt" in args else ["--prompts", tiny.with_name("prompts.txt")]
        return run_command(main, "--config", config, "--threads", 1, "--device", "cpu", *prompts, *args)
    return run


@pytest.fixture
def ended(monkeypatch) -> list[torch.Tensor]:
    """The latents that each batch ends with."""
    found, latents = [], StableDiffusion.latents

    def watched(self, *args):
        found.append(latents(self, *args))
        return found[-1]
    monkeypatch.setattr(StableDiffusion, "latents", watched)
    return found


SCHEDULERS = {
    "plms": lambda: PNDMScheduler(**BETAS, **FULL),
    "ddim": lambda: DDIMScheduler(**BETAS, steps_offset=1, set_alpha_to_one=False, clip_sample=False),
    "dpmpp": lambda: DPMSolverMultistepScheduler(**BETAS, steps_offset=1, timestep_spacing="leading")}


@pytest.mark.parametrize(("name", "steps"), [("plms", 6), ("ddim", 6), ("dpmpp", 16)])
def test_the_command_gives_what_diffusers_pipeline_gives(sample, tiny, tmp_path, ended, name, steps):
    """Latents and images of every prompt, from the same noise, with guidance and a negative prompt.

    6 steps do not divide 1000.
    """
    assert sample("--sampler", name, "--steps", steps, "--negative-prompt", "green", "--out", tmp_path / "x") == 0
    pipe = StableDiffusionPipeline.from_pretrained(tiny.with_name("model"), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = SCHEDULERS[name]()
    x = torch.stack([torch.randn(4, SIZE // 2, SIZE // 2, generator=torch.Generator().manual_seed(seed))
                     for seed in range(5)])
    given = {"latents": x, "negative_prompt": ["green"] * 5, "num_inference_steps": steps, "guidance_scale": 3.0}
    theirs = pipe(PROMPTS, output_type="latent", **given).images
    assert (ended[0] - theirs).abs().max() < TOLERANCE * theirs.abs().max()
    images = (255 * pipe(PROMPTS, output_type="np", **given).images).round().astype(int)
    ours = pixels(tmp_path / "x")
    assert all(np.abs(ours[seed] - images[seed]).max() <= 1 for seed in range(5))
    settings = settings_of(tmp_path / "x")
    assert (settings["sampler"], settings["timesteps"], settings["steps"]) == (name, "leading", steps)


@pytest.mark.parametrize("sampler", [["plms"], ["ddim", "--eta", 1]], ids=lambda words: words[0])
def test_an_image_depends_on_its_seed_alone(sample, tmp_path, monkeypatch, sampler):
    common = ["--sampler", *sampler, "--steps", 2, "--interval", 2]
    whole, ranks = tmp_path / "whole", tmp_path / "ranks"
    assert sample(*common, "--batch-size", 5, "--out", whole) == 0 and len(pixels(whole)) == 5
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert sample(*common, "--batch-size", 2, "--seeds", "3-4" if rank == "1" else "0-4", "--out", ranks) == 0
    assert same(whole, ranks, tolerance=1)
    assert (whole / "prompts.csv").read_text() == (ranks / "prompts.csv").read_text()


def test_released_noise_goes_by_the_place_in_the_batch(sample, tmp_path, capsys):
    common = ["--released-noise", "--steps", 2, "--batch-size", 2]
    assert sample(*common, "--out", tmp_path / "a") == 0
    assert "released noise" in capsys.readouterr().out
    a = pixels(tmp_path / "a")
    for seeds in ("1", "3-4", "0-4"):           # other batches than in one go
        assert sample(*common, "--seeds", seeds, "--out", tmp_path / "b") == 0
    assert same(tmp_path / "a", tmp_path / "b", tolerance=1)
    assert sample(*common, "--prompt", "red fox", "--seeds", "0-4", "--out", tmp_path / "c") == 0
    c = pixels(tmp_path / "c")                  # of one prompt, all batches are the same
    assert np.abs(c[0] - c[2]).max() <= 1 and np.abs(c[1] - c[3]).max() <= 1 and np.abs(c[0] - c[1]).max() > 1
    assert np.abs(c[0] - a[0]).max() <= 1       # seed 0 has this prompt there
    assert settings_of(tmp_path / "a")["noise"] == {"rule": "released", "seed": 42, "batch_size": 2, "device": "cpu"}
    assert fails(capsys, sample("--released-noise", "--batch-size", 3, "--steps", 3, "--out", tmp_path / "a"),
                 "noise.batch_size")
    assert fails(capsys, sample("--released-noise", "--sampler", "ddim", "--eta", 1, "--out", tmp_path / "d"), "eta")


def test_released_noise_is_what_a_pipeline_draws_after_seeding():
    shape = (4, 8, 8)
    for images, seeds in ((10, [3, 4, 7]), (None, [3, 4, 7]), (6, [3, 4, 5])):
        drawn = ReleasedNoise(4, images, torch.device("cpu"), torch.float32).draw(seeds, shape)
        for x, seed in zip(drawn, seeds, strict=True):
            torch.manual_seed(42)
            size = 4 if images is None else min(4, images - seed // 4 * 4)
            assert torch.equal(x, torch.randn(size, *shape)[seed % 4])


def test_prompts_and_seeds(sample, tmp_path, capsys):
    out = tmp_path / "x"
    assert sample("--images-per-prompt", 2, "--steps", 2, "--out", out) == 0
    with open(out / "prompts.csv", newline="") as file:
        assert [(row["seed"], row["prompt"]) for row in csv.DictReader(file)] == [
            (str(seed), PROMPTS[seed // 2]) for seed in range(10)]
    settings = settings_of(out)
    assert (settings["prompts_sha256"], settings["images_per_prompt"]) == (prompts_sha256(PROMPTS), 2)
    assert settings["first_stage_dtype"] == settings["text_encoder_dtype"] == "fp32"
    assert fails(capsys, sample("--images-per-prompt", 2, "--seeds", "9-10", "--out", tmp_path / "y"), "seeds 0-9")
    (tmp_path / "other.txt").write_text("red fox\n" * 5)
    assert fails(capsys, sample("--prompts", tmp_path / "other.txt", "--images-per-prompt", 2, "--steps", 2, "--out",
                                out), "prompts_sha256")
    assert sample("--steps", 2, "--prompt", "moon", "--out", tmp_path / "one") == 0
    assert pixels(tmp_path / "one").keys() == {0}


def test_what_is_not_read_of_long_prompts_is_said(sample, tmp_path, capsys):
    assert sample("--steps", 2, "--prompt", "abcdefghijklmnop", "--out", tmp_path / "x") == 0
    assert "1 prompt(s) longer than 12 tokens" in (out := capsys.readouterr().out) and "last 6 of prompt 0" in out
    (tmp_path / "long.txt").write_text("moon\nabcdefghijklmnop\nabcdefghijklmnop\n")
    assert sample("--steps", 2, "--prompts", tmp_path / "long.txt", "--seeds", "0-1", "--out", tmp_path / "y") == 0
    assert "1 prompt(s)" in (out := capsys.readouterr().out) and "last 6 of prompt 1 " in out   # of those asked for


def test_caching_is_counted_by_call(sample, tmp_path, monkeypatch, capsys):
    """PLMS makes a call more than steps; the schedule is that of the steps."""
    full, forward = [], UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda self, x, t, context, cache: (        # but for what is traced
        x.is_meta or full.append(not cache.reused), forward(self, x, t, context, cache))[1])
    for name, mask in {"plms": "1001000", "ddim": "100100", "dpmpp": "100100"}.items():
        full.clear()
        assert sample("--sampler", name, "--interval", 3, "--seeds", 0, "--out", tmp_path / name) == 0
        assert "".join("01"[run] for run in full) == mask
        assert f"2 full of {len(mask)} network calls" in capsys.readouterr().out
    assert settings_of(tmp_path / "plms")["cache"]["full_steps"] == [0, 3]


def test_sizes(sample, tmp_path, capsys):
    assert sample("--steps", 2, "--seeds", 0, "--height", 26, "--width", 8, "--out", tmp_path / "x") == 0
    assert Image.open(image_path(tmp_path / "x", 0)).size == (8, 26)          # 13 latents high: they need not halve
    assert fails(capsys, sample("--height", 17, "--out", tmp_path / "y"), "multiple of 2")


def test_a_pruned_layout_runs_through_diffusers(sample, tmp_path, capsys, ended):
    torch.manual_seed(1)
    pruned = UNet2DConditionModel(**LEVELS | {"mid_block_type": None})
    folder = make_folder(tmp_path / "pruned", pruned)
    common = ["--model", folder, "--steps", 4, "--seeds", "0-1"]
    assert fails(capsys, sample(*common, "--out", tmp_path / "x"), "mid_block_type")
    assert fails(capsys, sample(*common, "--diffusers-unet", "--interval", 2, "--out", tmp_path / "x"), "--interval 1")
    assert not (tmp_path / "x").exists()
    assert sample(*common, "--diffusers-unet", "--out", tmp_path / "x") == 0
    pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    x = torch.stack([torch.randn(4, SIZE // 2, SIZE // 2, generator=torch.Generator().manual_seed(seed))
                     for seed in range(2)])
    theirs = pipe(PROMPTS[:2], latents=x, num_inference_steps=4, guidance_scale=3.0, output_type="latent").images
    assert (ended[-1] - theirs).abs().max() < TOLERANCE * theirs.abs().max()
    assert settings_of(tmp_path / "x")["unet"]["diffusers"]["mid_block_type"] is None


def test_nothing_is_fitted_to_diffusers_unet(tiny, tmp_path, capsys):
    out = tmp_path / "changes.json"
    code = run_command(fit_main, "changes", "--config", tiny, "--prompt", "red fox", "--diffusers-unet", "--steps", 2,
                       "--seeds", 0, "--device", "cpu", "--out", out)
    assert fails(capsys, code, "--diffusers-unet") and not out.exists()


# Bad input

@pytest.mark.parametrize(("change", "word"), [
    (["--eta", "0.5"], "ddim"), (["--timesteps", "quad"], "plms"), (["--steps", "0"], "from 1 to 999"),
    (["--model", "nowhere"], "nowhere"), (["--prompts", "nowhere.txt"], "nowhere.txt"),
    (["--images-per-prompt", "0"], "images-per-prompt"), (["--prompt", "x", "--images-per-prompt", "2"], "--prompt "),
    (["--seeds", "5"], "seeds 0-4")])
def test_bad_options_are_one_line_and_leave_nothing(sample, tmp_path, capsys, change, word):
    assert fails(capsys, sample("--out", tmp_path / "out", *change), word)
    assert not (tmp_path / "out").exists()


def test_bad_files_are_one_line(sample, tiny, tmp_path, capsys):
    """Of weights: tests/weight_cases.py."""
    out = tmp_path / "out"
    (tmp_path / "empty.txt").write_text("")
    assert fails(capsys, sample("--prompts", tmp_path / "empty.txt", "--out", out), "no prompts")
    folder = Path(shutil.copytree(tiny.with_name("model"), tmp_path / "sdxl"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionXLPipeline"}))
    for flags in ([], ["--diffusers-unet"]):
        assert fails(capsys, sample("--model", folder, *flags, "--out", out), "StableDiffusionXLPipeline")
    inpainting = write_config(tmp_path / "inpainting.yaml", tmp_path, unet=UNET | {"in_channels": 9})
    assert fails(capsys, sample("--out", out, config=inpainting), "9 channels")
    assert not out.exists()


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_an_overflow_is_reported_and_not_saved(sample, tiny, tmp_path, capsys, part):
    folder = Path(shutil.copytree(tiny.with_name("model"), tmp_path / "large"))
    file = folder / part / "diffusion_pytorch_model.safetensors"
    name, tensors = {"unet": "conv_out.weight", "vae": "decoder.conv_out.weight"}[part], load_file(file)
    save_file(tensors | {name: torch.full_like(tensors[name], 3e38)}, file)
    assert fails(capsys, sample("--model", folder, "--steps", 2, "--out", tmp_path / "x"), "not finite", "--dtype")
    assert not list((tmp_path / "x").glob("*/*.png"))


def test_the_kind_of_weights_is_said(sample, tiny, tmp_path, capsys):
    """On screen and in run.json; either kind may be taken, and folders from before this was said go on."""
    folder = Path(shutil.copytree(tiny.with_name("model"), tmp_path / "model"))
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"conv_out.bias": tensors["conv_out.bias"] + 1}, file.with_suffix(".non_ema.safetensors"))
    common = ["--model", folder, "--steps", 2, "--seeds", 0]
    for name, kind in (("default", "EMA"), ("yes", "EMA"), ("no", "plain")):
        words = [] if name == "default" else ["--ema", name]
        assert sample(*common, *words, "--out", tmp_path / name) == 0
        said = json.loads((tmp_path / name / "run.json").read_text())["provenance"]["weights"]
        assert said.startswith(f"{kind} weights; ") and said in capsys.readouterr().out
    assert same(tmp_path / "default", tmp_path / "yes") and not same(tmp_path / "default", tmp_path / "no")
    assert settings_of(tmp_path / "default") == settings_of(tmp_path / "yes")
    assert fails(capsys, sample(*common, "--ema", "no", "--out", tmp_path / "default"), "checkpoint_sha256")
    assert sample("--steps", 2, "--seeds", 0, "--unet", folder, "--vae", folder, "--out", tmp_path / "parts") == 0
    assert same(tmp_path / "parts", tmp_path / "default")
    assert fails(capsys, sample("--steps", 2, "--ema", "yes", "--out", tmp_path / "x"), "leave out --ema")
