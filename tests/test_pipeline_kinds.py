"""Caching in more kinds of diffusers' pipelines, on tiny random models: at interval 1 their own, bit for bit."""

from collections.abc import Callable
from functools import partial

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from conftest import relative_error
from diffusers import (
    DDPMScheduler,
    MultiControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from test_pipelines import XL, drawn
from test_sd_pipeline import BETAS, SIZE, build, parts, picture, tiny_controlnet, tiny_unet  # noqa: F401  a fixture

from unet_caching.pipelines.enable import enable_deepcache

IMAGE, OTHER = (torch.from_numpy(picture(seed)).permute(2, 0, 1)[None] for seed in (1, 2))
HALF = torch.zeros(1, 1, SIZE, SIZE)
HALF[..., : SIZE // 2] = 1
EMBEDS = {"prompt_embeds": drawn(1, 7, 16), "negative_prompt_embeds": drawn(1, 7, 16, seed=1),
          "pooled_prompt_embeds": drawn(1, 16), "negative_pooled_prompt_embeds": drawn(1, 16, seed=1)}


def of_xl(parts: dict, cls: type, in_channels: int = 4, nets: int = 0):  # noqa: F811
    """An SDXL pipeline without text encoders."""
    torch.manual_seed(3)
    unet = UNet2DConditionModel(sample_size=SIZE // 2, in_channels=in_channels, **XL).eval()
    levels = {key: value for key, value in XL.items() if key != "up_block_types"}
    controlnets = [tiny_controlnet(**levels) for _ in range(nets)]
    extra = {"controlnet": controlnets[0] if nets == 1 else controlnets} if nets else {}
    pipe = cls(vae=parts["vae"], text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=unet,
               scheduler=diffusers.DDIMScheduler(**BETAS, clip_sample=False), add_watermarker=False, **extra)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def several_controlnets(parts):  # noqa: F811
    torch.manual_seed(1)
    nets = MultiControlNetModel([tiny_controlnet(), tiny_controlnet()])
    pipe = StableDiffusionControlNetPipeline(**parts, unet=tiny_unet(), controlnet=nets,
                                             scheduler=diffusers.DDIMScheduler(**BETAS, clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def upscaler(parts):  # noqa: F811
    torch.manual_seed(1)
    pipe = StableDiffusionUpscalePipeline(
        vae=parts["vae"], text_encoder=parts["text_encoder"], tokenizer=parts["tokenizer"],
        unet=tiny_unet(7, num_class_embeds=1000), low_res_scheduler=DDPMScheduler(),
        scheduler=diffusers.DDIMScheduler(**BETAS, prediction_type="v_prediction", clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def depth(parts):  # noqa: F811
    torch.manual_seed(1)
    kept = {name: parts[name] for name in ("vae", "text_encoder", "tokenizer")}
    pipe = StableDiffusionDepth2ImgPipeline(**kept, unet=tiny_unet(5), depth_estimator=None, feature_extractor=None,
                                            scheduler=diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True))
    pipe.set_progress_bar_config(disable=True)
    return pipe


TEXT = {"prompt": "a cat"}
KINDS: dict[str, tuple[Callable, dict]] = {
    "two ControlNets": (several_controlnets, TEXT | {"image": [IMAGE, OTHER], "height": SIZE, "width": SIZE,
                                                     "controlnet_conditioning_scale": [1.0, 0.5]}),
    "ControlNets for a part of the run": (several_controlnets, TEXT | {
        "image": [IMAGE, OTHER], "height": SIZE, "width": SIZE, "control_guidance_start": [0.0, 0.4],
        "control_guidance_end": [0.5, 1.0]}),
    "guess mode": (several_controlnets, TEXT | {"image": [IMAGE, OTHER], "height": SIZE, "width": SIZE,
                                                "guess_mode": True}),
    "XL, ControlNet": (partial(of_xl, cls=StableDiffusionXLControlNetPipeline, nets=1),
                       EMBEDS | {"image": IMAGE, "height": SIZE, "width": SIZE}),
    "XL, two ControlNets": (partial(of_xl, cls=StableDiffusionXLControlNetPipeline, nets=2),
                            EMBEDS | {"image": [IMAGE, OTHER], "height": SIZE, "width": SIZE}),
    "XL, inpainting with a ControlNet": (partial(of_xl, cls=StableDiffusionXLControlNetInpaintPipeline, nets=1),
                                         EMBEDS | {"image": IMAGE, "mask_image": HALF, "control_image": OTHER,
                                                   "height": SIZE, "width": SIZE, "strength": 0.9}),
    "XL, inpainting": (partial(of_xl, cls=StableDiffusionXLInpaintPipeline),
                       EMBEDS | {"image": IMAGE, "mask_image": HALF, "height": SIZE, "width": SIZE, "strength": 0.9}),
    "XL, a network for inpainting": (partial(of_xl, cls=StableDiffusionXLInpaintPipeline, in_channels=9), EMBEDS | {
        "image": IMAGE, "mask_image": HALF, "height": SIZE, "width": SIZE, "strength": 0.9}),
    "XL, the last half of the steps": (partial(of_xl, cls=StableDiffusionXLImg2ImgPipeline), EMBEDS | {
        "image": drawn(1, 4, SIZE // 2, SIZE // 2), "denoising_start": 0.4}),
    "XL, instructions": (partial(of_xl, cls=StableDiffusionXLInstructPix2PixPipeline, in_channels=8),
                         EMBEDS | {"image": IMAGE, "height": SIZE, "width": SIZE}),
    "instructions": (partial(build, cls=StableDiffusionInstructPix2PixPipeline, in_channels=8),
                     TEXT | {"image": IMAGE}),
    "depth": (depth, TEXT | {"image": IMAGE, "depth_map": drawn(1, SIZE, SIZE), "strength": 0.9}),
    "upscaling": (upscaler, TEXT | {"image": IMAGE})}


def latents(pipe, inputs: dict) -> torch.Tensor:
    images = pipe(**inputs, num_inference_steps=6, output_type="latent",
                  generator=torch.Generator().manual_seed(0)).images
    return torch.as_tensor(images)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_is_its_own_at_interval_1_and_another_with_caching(parts, kind):  # noqa: F811
    make, inputs = KINDS[kind]
    pipe = make(parts)
    plain = latents(pipe, inputs)
    ran: list[int] = []
    handle = pipe.unet.mid_block.register_forward_hook(lambda *_: ran.append(1))
    with enable_deepcache(pipe, interval=1):
        assert torch.equal(latents(pipe, inputs), plain)
    every = len(ran)
    with enable_deepcache(pipe, interval=3):
        cached = latents(pipe, inputs)
    assert len(ran) - every == -(-(every - ("depth" in kind)) // 3)     # PLMS makes a call more than steps
    assert relative_error(cached, plain) > 1e-3
    assert torch.equal(latents(pipe, inputs), plain)
    handle.remove()


# What else the family has

@pytest.mark.parametrize("kind", ["two ControlNets", "XL, ControlNet"])
def test_sequential_offload(parts, kind):  # noqa: F811
    """As enable_sequential_cpu_offload places weights, here with the CPU as the device that computes."""
    make, inputs = KINDS[kind]
    pipe = make(parts)
    plain = latents(pipe, inputs)
    with enable_deepcache(pipe):
        cached = latents(pipe, inputs)
    for first in ("offload", "caching"):
        pipe = make(parts)
        if first == "caching":
            enable_deepcache(pipe, interval=1)
        cpu_offload(pipe.unet, torch.device("cpu"), offload_buffers=True)
        assert pipe.unet.conv_in.weight.is_meta
        if first == "offload":
            enable_deepcache(pipe, interval=1)
        assert torch.equal(latents(pipe, inputs), plain) and not torch.equal(cached, plain)
        with enable_deepcache(pipe):
            assert torch.equal(latents(pipe, inputs), cached)
        assert pipe.unet.conv_in.weight.is_meta
        remove_hook_from_module(pipe.unet, recurse=True)
