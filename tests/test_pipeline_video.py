"""Caching in video pipelines: the U-Net's own forward at interval 1, the PyPI helper's bits at interval 3."""

import pytest
import torch
from DeepCache import DeepCacheSDHelper
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKLTemporalDecoder,
    DDIMScheduler,
    EulerDiscreteScheduler,
    MotionAdapter,
    StableVideoDiffusionPipeline,
    TextToVideoSDPipeline,
    UNet2DConditionModel,
    UNet3DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from test_sd_pipeline import BETAS, parts  # noqa: F401  parts: a fixture
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from unet_caching import enable_deepcache

SIZES = {"block_out_channels": (32, 64), "in_channels": 4, "out_channels": 4}


def blocks(kind: str) -> dict:
    """The types of a U-Net's blocks, those with attention outermost."""
    return {"down_block_types": (f"CrossAttnDownBlock{kind}", f"DownBlock{kind}"),
            "up_block_types": (f"UpBlock{kind}", f"CrossAttnUpBlock{kind}")}


def stable_video(text: dict) -> tuple:
    unet = UNetSpatioTemporalConditionModel(
        **SIZES | {"in_channels": 8}, **blocks("SpatioTemporal"), layers_per_block=2, sample_size=16,
        cross_attention_dim=32, num_attention_heads=8, projection_class_embeddings_input_dim=96,
        addition_time_embed_dim=32)
    vae = AutoencoderKLTemporalDecoder(block_out_channels=[32, 64], in_channels=3, out_channels=3, latent_channels=4,
                                       down_block_types=["DownEncoderBlock2D"] * 2)
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(
        hidden_size=32, projection_dim=32, num_hidden_layers=1, num_attention_heads=4, image_size=32,
        intermediate_size=37, patch_size=16))
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        sigma_max=700.0, sigma_min=0.002, timestep_type="continuous", use_karras_sigmas=True)
    pipe = StableVideoDiffusionPipeline(unet=unet.eval(), vae=vae.eval(), image_encoder=encoder.eval(),
                                        scheduler=scheduler,
                                        feature_extractor=CLIPImageProcessor(crop_size=32, size=32))
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return pipe, {"image": image, "num_frames": 2, "min_guidance_scale": 1.0, "max_guidance_scale": 2.5, "height": 32,
                  "width": 32}


def animated(text: dict) -> tuple:
    unet = UNet2DConditionModel(**SIZES, **blocks("2D"), layers_per_block=2, sample_size=8, cross_attention_dim=16,
                                norm_num_groups=2)
    adapter = MotionAdapter(block_out_channels=(32, 64), motion_layers_per_block=2, motion_norm_num_groups=2,
                            motion_num_attention_heads=4)
    for parameter in adapter.parameters():      # which would else begin as nothing
        torch.nn.init.normal_(parameter, std=0.1)
    pipe = AnimateDiffPipeline(**text, unet=unet.eval(), motion_adapter=adapter.eval(),
                               scheduler=DDIMScheduler(**BETAS, clip_sample=False))
    return pipe, {"prompt": "a cat", "num_frames": 3, "height": 16, "width": 16}


def text_to_video(text: dict) -> tuple:
    unet = UNet3DConditionModel(**SIZES, **blocks("3D"), layers_per_block=1, sample_size=32, cross_attention_dim=16,
                                attention_head_dim=4, norm_num_groups=2)
    pipe = TextToVideoSDPipeline(**text, unet=unet.eval(), scheduler=DDIMScheduler(**BETAS, clip_sample=False))
    return pipe, {"prompt": "a cat", "num_frames": 3, "height": 16, "width": 16}


@pytest.mark.parametrize(("make", "branches"), [
    pytest.param(stable_video, (0, 1, 2), id="stable video"), pytest.param(animated, (0, 1, 2), id="AnimateDiff"),
    pytest.param(text_to_video, (0, 1), id="text to video")])
def test_video_pipelines(make, branches, parts):  # noqa: F811
    torch.manual_seed(0)
    pipe, words = make({key: parts[key] for key in ("vae", "text_encoder", "tokenizer")})
    pipe.set_progress_bar_config(disable=True)

    def frames() -> torch.Tensor:
        return pipe(**words, num_inference_steps=6, output_type="latent",
                    generator=torch.Generator().manual_seed(0)).frames

    plain = frames()
    with enable_deepcache(pipe, interval=1):
        assert torch.equal(frames(), plain)
    for branch in branches:
        helper = DeepCacheSDHelper(pipe)
        helper.set_params(cache_interval=3, cache_branch_id=branch)
        helper.enable()
        theirs = frames()
        helper.disable()
        with enable_deepcache(pipe, interval=3, branch=branch):
            ours = frames()
        assert torch.equal(ours, theirs) and not torch.equal(ours, plain)
    with enable_deepcache(pipe, interval=3, forecast=1):
        assert frames().isfinite().all()
    assert torch.equal(frames(), plain)
