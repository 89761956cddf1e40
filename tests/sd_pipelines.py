"""Tiny random pipelines of Stable Diffusion and SDXL, how they are run, and what is fitted to them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from unet_caching.files.fitted import fingerprint
from unet_caching.methods.block_caching import BlockSchedule
from unet_caching.methods.plan import Call, Plan
from unet_caching.pipelines.parts import residuals
from unet_caching.samplers.table import Table

TOLERANCE = 2e-5
LEVELS = {"block_out_channels": (32, 64, 64), "layers_per_block": 1, "cross_attention_dim": 16,
          "attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
PROMPTS = ["a red cat", "two dogs"]
SIZE = 16               # of images, in pixels; latents are half as large


def tiny_unet(in_channels: int = 4, **changes) -> UNet2DConditionModel:
    return UNet2DConditionModel(**{
        "sample_size": SIZE // 2, "in_channels": in_channels,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), **LEVELS, **changes}).eval()


def tiny_controlnet(**changes) -> ControlNetModel:
    net = ControlNetModel(**LEVELS | changes, conditioning_embedding_out_channels=(8, 8)).eval()
    for block in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
        torch.nn.init.normal_(block.weight, std=0.2)        # they start at zero
    return net


def random_parts() -> dict:
    """What a pipeline is made of, but for the U-Net, the scheduler and a ControlNet."""
    torch.manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    text = CLIPTextConfig(vocab_size=len(tokens), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                          num_attention_heads=2, max_position_embeddings=12, bos_token_id=52, eos_token_id=53)
    return {"vae": AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
                                 down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2),
            "text_encoder": CLIPTextModel(text).eval(),
            "tokenizer": CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[],
                                       model_max_length=12),
            "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def build(parts: dict, cls: type = StableDiffusionPipeline, scheduler: type = DDIMScheduler, in_channels: int = 4,
          **unet) -> DiffusionPipeline:
    """A pipeline with random weights of its own U-Net (and ControlNet)."""
    torch.manual_seed(1)
    extra = {DDIMScheduler: {"clip_sample": False}, PNDMScheduler: {"skip_prk_steps": True}}.get(scheduler, {})
    components = parts | {"unet": tiny_unet(in_channels, **unet), "scheduler": scheduler(**BETAS, **extra)}
    if "ControlNet" in cls.__name__:
        components["controlnet"] = tiny_controlnet(**unet)
    pipe = cls(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((SIZE, SIZE, 3), dtype=np.float32)


MASK = np.kron(np.array([[0, 1], [0, 0]], dtype=np.float32), np.ones((SIZE // 2, SIZE // 2), dtype=np.float32))
INPUTS = {
    StableDiffusionPipeline: {"height": SIZE, "width": SIZE},
    StableDiffusionImg2ImgPipeline: {"image": picture(1)[None], "strength": 0.6},
    StableDiffusionInpaintPipeline: {"image": picture(1)[None], "mask_image": MASK, "height": SIZE, "width": SIZE},
    StableDiffusionControlNetPipeline: {"image": picture(2)[None], "height": SIZE, "width": SIZE}}


def run(pipe: DiffusionPipeline, prompt: str | list[str] = "a cat", seed: int = 0, steps: int = 6, **inputs) -> Tensor:
    """The latents that a pipeline ends with: [images, 4, height, width]."""
    kind = next(cls for cls in INPUTS if type(pipe) is cls)
    settings = INPUTS[kind] | {"num_inference_steps": steps, "output_type": "latent"} | inputs
    if isinstance(prompt, list):        # one input picture for each prompt
        settings |= {name: np.repeat(value, len(prompt), axis=0) for name, value in settings.items()
                     if name in ("image", "control_image")}
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **settings).images


class Calls(list):
    """For each call of a U-Net, in order, whether the middle block ran in it."""

    def __str__(self) -> str:
        return "".join("01"[ran] for ran in self)

    def take(self) -> str:
        """The calls since the last time, as a mask: 1 = full."""
        mask = str(self)
        self.clear()
        return mask


@contextmanager
def counted() -> Iterator[Calls]:
    """The calls of U-Nets meanwhile."""
    seen = Calls()
    middle = None               # of the U-Net that was called last; a ControlNet has one too

    def called(module, *_):
        nonlocal middle
        if isinstance(module, UNet2DConditionModel):
            middle = module.mid_block
            seen.append(False)

    def ran(module, *_):
        if module is middle:
            seen[-1] = True

    handles = [register_module_forward_pre_hook(called), register_module_forward_hook(ran)]
    yield seen
    for handle in handles:
        handle.remove()


def direct(pipe: DiffusionPipeline, timestep, **inputs) -> Tensor:
    """One call of `pipe.unet`, outside any run."""
    generator = torch.Generator().manual_seed(3)
    x, text = (torch.randn(2, *shape, generator=generator) for shape in ((pipe.unet.config.in_channels, 8, 8), (5, 16)))
    with torch.no_grad():
        return pipe.unet(x, timestep, encoder_hidden_states=text, **inputs).sample


# SDXL

XL = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
      "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (32, 64),
      "layers_per_block": 2, "attention_head_dim": (2, 4), "cross_attention_dim": 16,
      "transformer_layers_per_block": (1, 2), "use_linear_projection": True, "addition_embed_type": "text_time",
      "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build_xl(parts: dict, cls: type = StableDiffusionXLPipeline) -> DiffusionPipeline:
    torch.manual_seed(3)
    unet = UNet2DConditionModel(**{"sample_size": SIZE // 2, "in_channels": 4} | XL).eval()
    pipe = cls(parts["vae"], None, None, None, None, unet, DDIMScheduler(**BETAS, clip_sample=False),
               add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_xl(pipe, **inputs) -> Tensor:
    settings = {"prompt_embeds": drawn(1, 7, 16), "negative_prompt_embeds": drawn(1, 7, 16, seed=1),
                "pooled_prompt_embeds": drawn(1, 16), "negative_pooled_prompt_embeds": drawn(1, 16, seed=1),
                "num_inference_steps": 6, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    own = ({"image": torch.from_numpy(picture(1)).permute(2, 0, 1)[None], "strength": 0.6}
           if "Img2Img" in type(pipe).__name__ else {"height": SIZE, "width": SIZE})
    return pipe(**settings | own | inputs).images


# What is fitted

def made_for(sampler: str = "unipc", steps: int = 6, timesteps: str = "trailing", unet=None) -> dict:
    own = {} if unet is None else {"fingerprint": fingerprint(unet, 4, 16)}
    return {"model": "tiny", "unet": {}, "checkpoint_sha256": None, "sampler": sampler, "steps": steps,
            "timesteps": timesteps} | own


def save_plan(path: Path, each: Sequence[Call] = (), table: Table | None = None, **about) -> Path:
    """each: of its calls; one full in three, unless said otherwise."""
    usual = [Call() if i % 3 == 0 else Call(0) for i in range(about.get("steps", 6))]
    Plan(made_for(**about), list(each) or usual, None, {"hook": 1, "fc": 1}, {"hook": 1, "fc": 1}, table).save(path)
    return path


def save_blocks(path: Path, unet, steps: int = 6, of=None) -> BlockSchedule:
    """The residuals of a U-Net, every other one computed more often. of: the U-Net that it says it was made for."""
    each = [[step for step in full if step < steps] for full in ([0, 3], [0, 2, 4])]
    blocks = {name: each[i % 2] for i, (_, name) in enumerate(residuals(unet))}
    schedule = BlockSchedule(made_for("ddim", steps, "leading", of), steps, "all", None, blocks, {}, {})
    schedule.save(path)
    return schedule
