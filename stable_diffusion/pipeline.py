"""A Stable Diffusion checkpoint as a diffusers pipeline, for unet_caching/pipelines/enable.py to cache in."""

from pathlib import Path

from ldm.diffusers_layout import diffusers_unet
from run.libraries import diffusers
from stable_diffusion.checkpoint import load_checkpoint
from stable_diffusion.config import Config, Diffusion
from stable_diffusion.parts import scheduler_config
from stable_diffusion.unet import UNet


def load_pipeline(config: Config, path: Path
                  ) -> diffusers.StableDiffusionPipeline | diffusers.StableDiffusionXLPipeline:
    """A text-to-image pipeline of a checkpoint in any layout, in float32 on the CPU, without caching.

    path: as in `stable_diffusion.checkpoint.load_checkpoint`.
    The scheduler is PLMS, as in the authors' code, but DDIM for a network that predicts v, because PNDMScheduler
    combines the v of different timesteps. There is no safety checker.
    Raises UserError as `load_checkpoint` does, and for a network that takes an image.
    """
    config.check_text_to_image()
    model = load_checkpoint(config, path)
    assert isinstance(model.unet, UNet)
    unet = diffusers_unet(config, model.unet, sample_size=config.latent_size)
    parts = {"vae": model.vae, "text_encoder": model.text_encoder, "tokenizer": model.tokenizer,
             "unet": unet, "scheduler": scheduler(config.diffusion)}
    if model.second is not None:
        return diffusers.StableDiffusionXLPipeline(
            **parts, text_encoder_2=model.second.text_encoder, tokenizer_2=model.second.tokenizer,
            force_zeros_for_empty_prompt=model.second.zeros, add_watermarker=False)
    return diffusers.StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None,
                                             requires_safety_checker=False)


def scheduler(diffusion: Diffusion) -> diffusers.PNDMScheduler | diffusers.DDIMScheduler:
    """diffusers' scheduler for a network's noise schedule and prediction."""
    settings = scheduler_config(diffusion) | {"steps_offset": 1, "set_alpha_to_one": False}
    if diffusion.zero_terminal_snr:
        settings |= {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    if diffusion.prediction == "v":
        return diffusers.DDIMScheduler(clip_sample=False, **settings)
    return diffusers.PNDMScheduler(skip_prk_steps=True, **settings)
