"""SDXL in one file, as base 1.0's and the fine-tunes made of it: what it gives, against diffusers' reading of it."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from conftest import fails, relative_error, settings_of
from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UniPCMultistepScheduler
from open_clip.transformer import TextTransformer
from safetensors.torch import save_file
from test_sd_sample import BETAS, SCHEDULERS, ended  # noqa: F401  fixtures among them
from test_sdxl import POOLED, PROMPTS, SIZE, TOKENS, TOLERANCE, sample, tiny  # noqa: F401

from ldm import first_stage
from run.families import load_config
from run.files import ROOT
from run.settings import load_yaml
from stable_diffusion import checkpoint
from stable_diffusion.checkpoint import load_checkpoint

# ruff: noqa: F811


@pytest.fixture(scope="module")
def one_file(tiny, tmp_path_factory) -> Path:
    """A model as base 1.0's file has it, with open_clip's second text encoder; its tokenizers, no CLIP's, beside it."""
    folder, model = tmp_path_factory.mktemp("file"), load_checkpoint(load_config(tiny), tiny.with_name("model"))
    second = TextTransformer(TOKENS, len(model.tokenizer), width=24, heads=1, layers=2, mlp_ratio=2, output_dim=POOLED)
    torch.nn.init.normal_(second.token_embedding.weight, std=3)
    parts = {"model.diffusion_model.": model.unet.state_dict(),
             "first_stage_model.": first_stage.published_state_dict(model.vae),
             "conditioner.embedders.0.transformer.text_model.": {
                 name.removeprefix("text_model."): value for name, value in model.text_encoder.state_dict().items()},
             "conditioner.embedders.1.model.": second.state_dict() | {"logit_scale": torch.tensor(4.6)}}
    tensors = {prefix + name: value.contiguous() for prefix, part in parts.items() for name, value in part.items()}
    save_file(tensors, folder / "x.safetensors")
    save_file(tensors | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, folder / "v.safetensors")
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(tiny.with_name("model") / name, folder / name)
    return folder / "x.safetensors"


@pytest.fixture
def known_sizes(monkeypatch):
    monkeypatch.setattr(checkpoint, "KL_F8", {
        "block_out_channels": [8, 8], "norm_num_groups": 4, "latent_channels": 4,
        "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2})


def of_diffusers(file: Path, tiny: Path) -> StableDiffusionXLPipeline:
    """diffusers' own reading of a file; of the folder it takes the sizes alone."""
    pipe = StableDiffusionXLPipeline.from_single_file(str(file), config=str(tiny.with_name("model")),
                                                      local_files_only=True, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of(pipe: StableDiffusionXLPipeline, steps: int = 6) -> torch.Tensor:
    x = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)])
    return pipe(PROMPTS, latents=x, num_inference_steps=steps, guidance_scale=3.0, output_type="latent", height=SIZE,
                width=SIZE).images


def test_one_file_gives_what_diffusers_gives_of_it(sample, tiny, one_file, known_sizes, ended,
                                                   tmp_path, capsys):
    assert sample("--model", one_file, "--out", tmp_path / "x") == 0
    pipe = of_diffusers(one_file, tiny)
    pipe.scheduler = SCHEDULERS["ddim"]()
    assert relative_error(ended[0], latents_of(pipe)) < TOLERANCE
    elder = tmp_path / "elder.yaml"
    elder.write_text(yaml.safe_dump({key: value for key, value in yaml.safe_load(tiny.read_text()).items()
                                     if key != "xl"}))
    assert fails(capsys, sample("--model", one_file, "--out", tmp_path / "y", config=elder), "SDXL's", "sdxl.yaml")


@pytest.mark.parametrize(("sampler", "scheduler"), [
    ("ddim", partial(DDIMScheduler, set_alpha_to_one=True, clip_sample=False)),
    ("unipc", partial(UniPCMultistepScheduler, final_sigmas_type="zero"))])
def test_v_at_zero_terminal_snr(sample, tiny, one_file, known_sizes, tmp_path, ended, sampler, scheduler,
                                capsys):
    """From pure noise at the last timestep to a clean image, with what configs/sdxl_v.yaml says of it."""
    file, config = one_file.with_name("v.safetensors"), yaml.safe_load(tiny.read_text())
    shipped = load_yaml(ROOT / "configs" / "sdxl_v.yaml")
    assert fails(capsys, sample("--model", file, "--out", tmp_path / "x"), "predicts v", "`prediction: v`")
    for change, words in (({"prediction": "v"}, ["zero terminal SNR"]), (shipped["diffusion"], [])):
        config |= {"diffusion": change, "sampler": config["sampler"] | {"timesteps": shipped["sampler"]["timesteps"]}}
        (tmp_path / "v.yaml").write_text(yaml.safe_dump(config))
        code = sample("--model", file, "--sampler", sampler, "--steps", 5, "--out", tmp_path / "x",
                      config=tmp_path / "v.yaml")
        assert fails(capsys, code, *words) if words else code == 0
    pipe = of_diffusers(file, tiny)
    pipe.scheduler = scheduler(**BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=True,
                               timestep_spacing="trailing")
    expected = latents_of(pipe, 5)      # which divide 1000; else diffusers' DDIM has other timesteps
    assert pipe.scheduler.timesteps[0] == 999 and expected.isfinite().all()
    assert relative_error(ended[-1], expected) < 2 ** -12       # as much of x_T as diffusers' DDIM leaves out
    assert settings_of(tmp_path / "x")["diffusion"]["zero_terminal_snr"] is True
    base = load_yaml(ROOT / "configs" / "sdxl.yaml")
    assert all(shipped[key] == base[key] for key in ("unet", "xl", "resolution", "downsampling", "tokens"))
