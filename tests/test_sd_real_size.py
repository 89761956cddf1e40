"""Stable Diffusion v1.5 at its real size, with random weights in both public layouts: is what we compute right?

    python -m pytest tests/test_sd_real_size.py --slow -s

diffusers and transformers write the model as a diffusers folder in float16; loaded from it, it is written as one
CompVis file in float32; ours is loaded from that file. The same prompt and noise then go through diffusers' own
StableDiffusionPipeline and our samplers, without caching and with it; theirs is then the PyPI package DeepCache's.
Needs 7 GB of disk for a while, 12 GB of memory and some minutes. -s shows the differences.
"""

import gc
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import HERE, relative_error
from DeepCache import DeepCacheSDHelper
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from test_weight_files import published_state_dict
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.diffusers_layout import diffusers_arguments
from run.families import load_config
from run.weights import save_tensors
from stable_diffusion.checkpoint import KL_F8, Model, load_checkpoint, load_unet
from stable_diffusion.config import Config
from stable_diffusion.text import clip_tokenizer
from unet_caching.methods.deepcache import DeepCache
from unet_caching.samplers.samplers import Sampler, noise_predictor
from unet_caching.schedules import uniform

pytestmark = pytest.mark.slow
PROMPT = "a photo of an astronaut riding a horse"
STEPS, PIXELS = 4, 256
LIMIT = 2e-5            # of the largest magnitude; the released code's own noise is 3e-6


class Run(NamedTuple):
    """One way of sampling; interval 1: without caching."""
    sampler: str
    interval: int
    branch: int


# CLIP ViT-L/14's text model
VIT_L_14 = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
# The PyPI helper looks up the timestep in place of counting calls, so that its schedules for PNDM are others than ours.
RUNS = (Run("ddim", 1, 0), Run("plms", 1, 0), Run("ddim", 2, 1), Run("ddim", 2, 0), Run("ddim", 3, 4))


def make(config: Config, folder: Path) -> None:
    """Write a random model as a diffusers folder, by diffusers and transformers alone."""
    torch.manual_seed(0)
    diffusion = config.diffusion
    pipe = StableDiffusionPipeline(
        AutoencoderKL(**KL_F8), CLIPTextModel(CLIPTextConfig.from_dict(VIT_L_14)), clip_tokenizer(),
        UNet2DConditionModel(**diffusers_arguments(vars(config.unet)), sample_size=config.latent_size),
        PNDMScheduler(diffusion.num_timesteps, diffusion.beta_start, diffusion.beta_end, diffusion.beta_schedule,
                      skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.to(dtype=torch.float16).save_pretrained(folder, variant="fp16")


@torch.no_grad()
def theirs(folder: Path, noise: Tensor, guidance: float) -> dict[Run | str, Tensor]:
    """The latents of each run by diffusers' pipeline and the PyPI helper, and the text's tokens under 'context'."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, variant="fp16", local_files_only=True).to("cpu", torch.float)
    cond, uncond = pipe.encode_prompt(PROMPT, torch.device("cpu"), 1, True)
    found: dict[Run | str, Tensor] = {"context": torch.cat([uncond, cond])}
    schedulers = {"plms": pipe.scheduler, "ddim": DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)}
    for run in RUNS:
        pipe.scheduler = schedulers[run.sampler]
        helper = DeepCacheSDHelper(pipe)
        if run.interval > 1:
            helper.set_params(cache_interval=run.interval, cache_branch_id=run.branch)
            helper.enable()
        found[run] = pipe(PROMPT, num_inference_steps=STEPS, guidance_scale=guidance, latents=noise,
                          output_type="latent").images
        if run.interval > 1:
            helper.disable()
    return found


@torch.no_grad()
def ours(config: Config, model: Model, noise: Tensor) -> dict[Run | str, Tensor]:
    """The same by our samplers."""
    tokens = [model.tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").input_ids
              for text in ("", PROMPT)]
    context = model.text_encoder(torch.cat(tokens))[0]
    found: dict[Run | str, Tensor] = {"context": context}
    for run in RUNS:
        cache = DeepCache(run.branch, uniform(STEPS, run.interval)) if run.interval > 1 else None
        predict = noise_predictor(model.unet, config.diffusion, torch.float32, cache, [context],
                                  config.sampler.guidance)
        found[run] = Sampler(run.sampler, STEPS, "leading", 0.0, config.diffusion).run(predict, noise)
    return found


def test_latents_are_those_of_diffusers_and_of_the_helper(tmp_path):
    config = load_config(HERE.parent / "configs" / "sd_v15.yaml")
    folder, file = tmp_path / "diffusers", tmp_path / "compvis.safetensors"
    make(config, folder)
    save_tensors(published_state_dict(load_checkpoint(config, folder)), file)
    size = PIXELS // config.downsampling
    noise = torch.randn(1, config.unet.in_channels, size, size, generator=torch.Generator().manual_seed(0))
    expected = theirs(folder, noise, config.sampler.guidance)
    gc.collect()                        # before ours is in memory too
    model, halves = load_checkpoint(config, file), load_unet(config, folder).state_dict()
    assert all(torch.equal(value, halves[name]) for name, value in model.unet.state_dict().items())
    del halves

    found = ours(config, model, noise)
    errors = {what: relative_error(found[what], expected[what]) for what in expected}
    for what, error in errors.items():
        moved = relative_error(expected[what], expected[Run(what.sampler, 1, 0)]) if isinstance(what, Run) else 0.0
        print(f"{what!s:50} ours - theirs {error:.1e}, cached - not {moved:.1e}")
        assert error < LIMIT and (not isinstance(what, Run) or (moved > 100 * LIMIT) == (what.interval > 1))
