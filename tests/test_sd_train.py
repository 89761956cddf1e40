"""Training of the small text-conditional model: its captions, its autoencoder, and what it writes."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import HERE, relative_error
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn

from lab import train
from ldm import first_stage
from run.prompts import read_prompts
from run.training import emoji
from stable_diffusion.autoencoder import from_first_stage
from stable_diffusion.checkpoint import load_checkpoint
from stable_diffusion.family import FAMILY
from stable_diffusion.text import minilm

FIRST_STAGE = {"resolution": 32, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "z_channels": 3, "n_embed": 8}
CONFIG = {
    "name": "sd_tiny", "resolution": 32, "downsampling": 2, "tokens": 12, "checkpoint": "unused",
    "unet": {"in_channels": 3, "out_channels": 3, "model_channels": 32, "channel_mult": [1, 1], "num_res_blocks": 1,
             "attention_resolutions": [1], "num_heads": 2, "context_dim": 384},
    "diffusion": {"prediction": "v"}, "sampler": {"sampler": "ddim", "steps": 2},
    "train": {"groups": ["Food & Drink"],
              "loop": {"images": 16, "batch_size": 4, "warmup": 4}}}
PROMPTS = ["hot pepper", "pizza, blob style"]


# The data

def test_captions_say_the_name_and_perhaps_the_style():
    row = emoji.Emoji("dog-face", "Animals & Nature", "noto-v1", "train")
    assert (row.caption(), row.caption(style=False)) == ("dog face, blob style", "dog face")
    assert set(emoji.STYLES) == {row.style for row in emoji.read_index()}


def test_the_prompts_are_names_of_both_splits():
    groups = FAMILY.load_config(HERE.parent / "configs" / "sd_emoji.yaml").train.groups
    names = {split: {caption for row in emoji.read_index() if row.group in groups and row.split == split
                     for caption in (row.caption(), row.caption(style=False))} for split in ("train", "held-out")}
    prompts = read_prompts(HERE.parent / "data" / "emoji" / "prompts.txt")
    assert len(prompts) == len(set(prompts)) == 96
    assert set(prompts[:64]) <= names["train"] and set(prompts[64:]) <= names["held-out"]
    tokenizer = minilm(16)[1]
    assert all(len(tokenizer(caption).input_ids) <= 16 for caption in names["train"] | names["held-out"])


# The autoencoder

def test_the_autoencoder_is_the_first_stage_normalised():
    torch.manual_seed(0)
    vq = first_stage.build(**FIRST_STAGE).eval()
    for parameter in vq.parameters():       # so that no bias is zero
        nn.init.normal_(parameter, std=0.1)
    mean, deviation = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2.0, 0.5, 3.0])
    vae = from_first_stage(vq, mean, deviation)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        latents = first_stage.encode(vq, images)
        expected = (latents - mean[:, None, None]) / deviation[:, None, None]
        assert relative_error(posterior.mode(), expected) < 1e-5
        assert posterior.std.max() < 1e-6
        assert relative_error(vae.decode(expected).sample, first_stage.decode(vq, latents, quantize=False)) < 1e-4


# The objective

class Reads(nn.Module):
    """Stands for a U-Net: its output is the largest entry of each context."""

    def forward(self, x, t, context):
        return x * 0 + context.amax((1, 2))[:, None, None, None]


@pytest.mark.parametrize("drop_text, drop_style, used", [(1.0, 0.0, {0}), (0.0, 1.0, {2, 4}), (0.0, 0.0, {1, 3})])
def test_texts_are_dropped_as_configured(tmp_path, drop_text, drop_style, used):
    """Each text is a column that only a batch with its index reads."""
    settings = {"drop_text": drop_text, "drop_style": drop_style, "bf16": False}
    config = FAMILY.load_config(write(tmp_path, train=CONFIG["train"] | settings))
    texts = torch.full((5, 2, 3), float("nan"))
    texts[list(used)] = 1.0
    loss = train.error_of_texts(config, torch.zeros(2, 3, 4, 4), texts, torch.tensor([[1, 2], [3, 4]]))
    batch = torch.tensor([0, 1, 0, 1])
    assert loss(Reads(), batch, torch.Generator().manual_seed(0)).isfinite()
    texts[list(used)[-1]] = float("nan")
    assert loss(Reads(), batch, torch.Generator().manual_seed(0)).isnan()


# The command

def write(folder: Path, **changes) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG | changes))
    return path


def run(monkeypatch, folder: Path, **changes) -> None:
    arguments = {"config": write(folder, **changes), "first-stage": folder / "first_stage.safetensors",
                 "first-stage-config": folder / "ldm.yaml", "out": folder / "out",
                 "device": "cpu"}
    monkeypatch.setattr("sys.argv", ["train", *(f"--{name}={value}" for name, value in arguments.items())])
    train.main()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with a random first stage and its config."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    vq = first_stage.build(**FIRST_STAGE)
    save_file({name: value.contiguous() for name, value in first_stage.published_state_dict(vq).items()},
              folder / "first_stage.safetensors")
    ldm = yaml.safe_load((HERE.parent / "configs" / "ldm_emoji.yaml").read_text())
    (folder / "ldm.yaml").write_text(yaml.safe_dump(ldm | {"first_stage": FIRST_STAGE}))
    return folder


@pytest.fixture(scope="module")
def trained(inputs) -> Path:
    """The folder after a few steps on a few images, in two parts."""
    load_groups = emoji.load_groups
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(emoji, "load_groups", lambda *args: tuple(part[:8] for part in load_groups(*args)))
        run(monkeypatch, inputs, train=CONFIG["train"] | {"loop": CONFIG["train"]["loop"] | {"images": 8}})
        run(monkeypatch, inputs)
    return inputs


def test_training_writes_a_folder_that_diffusers_samples_with(trained):
    folder = trained / "out" / "sd_tiny"
    ours = load_checkpoint(FAMILY.load_config(trained / "tiny.yaml"), folder)
    theirs = UNet2DConditionModel.from_pretrained(folder / "unet").float().eval()
    x, context = torch.randn(2, 3, 16, 16), torch.randn(2, 12, 384)
    t = torch.tensor([10, 900])
    with torch.no_grad():
        output = ours.unet(x, t, context)
        assert relative_error(theirs(x, t, context).sample, output) < 1e-4
    assert output.std() > 1e-3
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae").float(), text_encoder=ours.text_encoder,
        tokenizer=ours.tokenizer, unet=theirs, scheduler=PNDMScheduler.from_pretrained(folder / "scheduler"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(PROMPTS, height=32, width=32, num_inference_steps=2, output_type="pt").images
    assert images.shape == (2, 3, 32, 32) and images.isfinite().all() and not torch.equal(images[0], images[1])


def test_training_was_resumed(trained):
    state = torch.load(trained / "out" / "state.pt", weights_only=True)
    assert state["seen"] == 16
    weights = load_checkpoint(FAMILY.load_config(trained / "tiny.yaml"), trained / "out" / "sd_tiny").unet.state_dict()
    assert all(torch.equal(value.half(), weights[name].half()) for name, value in state["ema"].items())


@pytest.mark.parametrize("changes, message", [
    ({"train": None}, "no train section"),
    ({"train": CONFIG["train"] | {"groups": ["Food"]}}, "no emoji of 'Food': choose from"),
    ({"downsampling": 4}, r"\(4, 3, 384\), but \(2, 3, 384\)"),
    ({"unet": CONFIG["unet"] | {"num_heads": 3}}, "3 heads do not divide"),
])
def test_bad_input_is_one_line(inputs, tmp_path, monkeypatch, capsys, changes, message):
    folder = shutil.copytree(inputs, tmp_path / "inputs", ignore=shutil.ignore_patterns("out"))
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, folder, **changes)
    assert exit.value.code == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and re.search(message, error)
    assert not (folder / "out").exists()
