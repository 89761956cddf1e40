"""Caching in diffusers' pipelines of all kinds, on tiny random models: their own results, and what can fool a count."""

import logging

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from conftest import relative_error
from diffusers import (
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from peft import LoraConfig
from sd_pipelines import (
    BETAS,
    SIZE,
    TOLERANCE,
    build,
    build_xl,
    drawn,
    picture,
    run,
    run_xl,
    tiny_controlnet,
    tiny_unet,
)
from tiny_pipelines import built, by_helper
from torch import Tensor, nn

from unet_caching.errors import UserError
from unet_caching.pipelines import check_diffusers
from unet_caching.pipelines.enable import enable_deepcache


@pytest.mark.parametrize(("cls", "branches"), [(StableDiffusionXLPipeline, (0, 4)),
                                               (StableDiffusionXLImg2ImgPipeline, (1,))])
def test_sdxl_is_its_own_without_caching_and_the_helpers_with_it(parts, cls, branches):
    pipe = build_xl(parts, cls)
    plain = run_xl(pipe)
    with enable_deepcache(pipe, interval=1):
        assert torch.equal(run_xl(pipe), plain)
    for branch in branches:
        theirs = by_helper(pipe, branch, 3, run_xl)
        with enable_deepcache(pipe, branch=branch):
            assert torch.equal(run_xl(pipe), theirs)
        assert relative_error(theirs, plain) > 1e-3
    assert torch.equal(run_xl(pipe), plain)


ZERO = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
KARRAS = {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"}


@pytest.mark.parametrize(("name", "number", "more"), [      # number: of network calls in 5 steps
    ("DDIM", 5, ZERO), ("DDPM", 5, {}), ("PNDM", 6, {}), ("LMSDiscrete", 5, {}), ("EulerDiscrete", 5, ZERO),
    ("EulerAncestralDiscrete", 5, {}), ("HeunDiscrete", 9, KARRAS), ("KDPM2Discrete", 9, {}),
    ("KDPM2AncestralDiscrete", 9, {}), ("DPMSolverMultistep", 5, ZERO), ("DPMSolverSinglestep", 5, {}),
    ("UniPCMultistep", 5, KARRAS), ("DEISMultistep", 5, {}), ("LCM", 5, {}), ("TCD", 5, {})])
def test_every_scheduler_made_from_that_of_the_pipeline(parts, calls, name, number, more):
    pipe = build(parts, scheduler=PNDMScheduler)
    pipe.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(pipe.scheduler.config, **more)
    plain = run(pipe, steps=5)
    enable_deepcache(pipe, interval=1)
    assert torch.equal(run(pipe, steps=5), plain)           # and finite
    calls.clear()
    enable_deepcache(pipe, interval=2)
    cached = run(pipe, steps=5)
    mask = "".join("10"[call % 2] for call in range(number))
    assert calls.take() == mask and not torch.equal(cached, plain) and cached.isfinite().all()
    run(pipe, steps=1)
    assert calls.take().startswith("1")


def test_tiles_of_a_panorama_have_a_feature_each(calls):
    """As where the network is called once for all of them."""
    pipe = built(diffusers.StableDiffusionPanoramaPipeline)

    def panorama(tiles: int) -> Tensor:
        return pipe("a cat", height=SIZE, width=640, num_inference_steps=4, view_batch_size=tiles,
                    output_type="latent", generator=torch.Generator().manual_seed(0)).images

    plain = panorama(1)
    with enable_deepcache(pipe, interval=1):
        assert torch.equal(panorama(1), plain)
    calls.clear()
    with enable_deepcache(pipe, interval=3):
        cached = panorama(1)
        assert calls.take() == "111" + 6 * "0" + "111"
        assert relative_error(panorama(3), cached) < TOLERANCE < relative_error(plain, cached)


# What is added to a U-Net acts

def lora(pipe) -> None:
    torch.manual_seed(2)
    for name in ("style", "person"):
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"], init_lora_weights=False), name)
    pipe.unet.set_adapters(["style", "person"], [1.0, 0.5])


def ip_adapter(pipe) -> None:
    torch.manual_seed(2)
    keys = {}
    for i, name in enumerate(pipe.unet.attn_processors):
        attention = pipe.unet.get_submodule(name.removesuffix(".processor"))
        if attention.is_cross_attention:
            width = attention.to_q.out_features
            keys |= {f"{i}.to_k_ip.weight": torch.randn(width, 16), f"{i}.to_v_ip.weight": torch.randn(width, 16)}
    projection = {"proj.weight": torch.randn(64, 8), "proj.bias": torch.randn(64), "norm.weight": torch.ones(16),
                  "norm.bias": torch.zeros(16)}
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": keys}])
    pipe.set_ip_adapter_scale(0.7)


def freeu(pipe) -> None:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)


def tiles(pipe) -> None:
    for module in pipe.unet.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"


class Halved:
    """An attention processor of a user's own."""

    def __init__(self, own):
        self.own = own

    def __call__(self, *args, **kwargs):
        return 0.5 * self.own(*args, **kwargs)


def processors(pipe) -> None:
    pipe.unet.set_attn_processor({name: Halved(own) for name, own in pipe.unet.attn_processors.items()})


IP = {"ip_adapter_image_embeds": [torch.cat([torch.zeros(1, 1, 8), drawn(1, 1, 8)])]}
ADDITIONS = {ip_adapter: IP, freeu: {}, tiles: {}, processors: {}}


@pytest.mark.parametrize("add", ADDITIONS)
def test_what_is_added_to_a_unet_acts(parts, add):
    pipe = build(parts)
    bare = run(pipe)
    with enable_deepcache(pipe):
        bare_cached = run(pipe)
        add(pipe)
        cached = run(pipe, **ADDITIONS[add])
    plain = run(pipe, **ADDITIONS[add])
    with enable_deepcache(pipe, interval=1):
        assert torch.equal(run(pipe, **ADDITIONS[add]), plain)
    for one, other in ((plain, bare), (cached, bare_cached), (cached, plain)):
        assert relative_error(one, other) > 1e-3


def test_lora_weights_change_between_calls_and_scale_within_them(parts):
    pipe = build(parts)
    bare = run(pipe, steps=4)
    lora(pipe)

    def settings():
        yield run(pipe, steps=4)
        yield run(pipe, steps=4, cross_attention_kwargs={"scale": 0.3})
        pipe.unet.set_adapters(["person"], [1.0])
        yield run(pipe, steps=4)
        pipe.unet.disable_lora()
        yield run(pipe, steps=4)
        pipe.unet.enable_lora()
        pipe.unet.set_adapters(["style", "person"], [1.0, 0.5])

    plain = list(settings())
    assert torch.equal(plain[3], bare) and relative_error(plain[0], bare) > 1e-3
    with enable_deepcache(pipe, interval=1):
        assert all(map(torch.equal, settings(), plain))
    with enable_deepcache(pipe):
        cached = list(settings())
    assert min(relative_error(a, b) for i, a in enumerate(cached) for b in cached[:i]) > 1e-4
    pipe.fuse_lora()
    fused = run(pipe, steps=4)
    with enable_deepcache(pipe, interval=1):
        assert torch.equal(run(pipe, steps=4), fused)


def skip_shapes(unet, inputs: dict) -> list[list[torch.Size]]:
    """The shapes of all skips: that of conv_in, then of each down block."""
    found = []
    handles = [unet.conv_in.register_forward_hook(lambda module, _, out: found.append([out.shape])),
               *(block.register_forward_hook(lambda module, _, out: found.append([skip.shape for skip in out[1]]))
                 for block in unet.down_blocks)]
    unet(**inputs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("kind", [build, build_xl])
@torch.no_grad()
def test_residuals_of_adapters_and_controlnets(parts, kind):
    pipe = kind(parts)
    unet = pipe.unet
    inputs = {"sample": drawn(2, 4, 8, 8), "timestep": 500, "encoder_hidden_states": drawn(2, 5, 16),
              "added_cond_kwargs": {"text_embeds": drawn(2, 16), "time_ids": torch.ones(2, 6)}}
    skips = skip_shapes(unet, inputs)
    # A T2I-Adapter adds before the downsampling where a block has attention, else after it.
    blocks = [drawn(*shapes[-2 if hasattr(block, "attentions") and block.downsamplers else -1])
              for block, shapes in zip(unet.down_blocks, skips[1:], strict=True)]
    middle = drawn(*skips[-1][-1], seed=9)
    control = {"down_block_additional_residuals": [drawn(*shape, seed=5) for shapes in skips for shape in shapes],
               "mid_block_additional_residual": middle}
    bare = unet(**inputs).sample
    for case in ({"down_intrablock_additional_residuals": blocks}, control,
                 {"down_intrablock_additional_residuals": [*blocks, middle]},
                 {"down_intrablock_additional_residuals": blocks, **control}):
        def fresh(case=case):               # diffusers takes them off the list
            return {key: list(value) if isinstance(value, list) else value for key, value in case.items()}
        plain = unet(**inputs, **fresh()).sample
        with enable_deepcache(pipe, interval=1), pipe.progress_bar(total=1):
            assert torch.equal(unet(**inputs, **fresh()).sample, plain)
        assert relative_error(plain, bare) > 1e-3
    control["down_block_additional_residuals"] = control["down_block_additional_residuals"][:3]
    with enable_deepcache(pipe, interval=1), pipe.progress_bar(total=1), \
            pytest.raises(UserError, match="3 residuals for 6 skips"):
        unet(**inputs, **control)


def test_diffusers_that_is_too_old_is_refused_at_import():
    check_diffusers("0.30.0")
    check_diffusers("1.2.0.dev0")
    check_diffusers(diffusers.__version__)
    with pytest.raises(ImportError, match=r"needs diffusers 0\.30 or newer, but 0\.29\.2 is installed: pip install"):
        check_diffusers("0.29.2")


@pytest.mark.parametrize(("settings", "first"), [
    ({"controlnet_conditioning_scale": [1.0, 0.5], "control_guidance_start": [0.0, 0.4],
      "control_guidance_end": [0.5, 1.0]}, "offload"), ({"guess_mode": True}, "caching")])
def test_two_controlnets_and_sequential_offload(parts, settings, first):
    """As enable_sequential_cpu_offload places weights, here with the CPU as the device that computes."""
    torch.manual_seed(1)
    images = [torch.from_numpy(picture(i)).permute(2, 0, 1)[None] for i in (1, 2)]
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **parts, unet=tiny_unet(), controlnet=diffusers.MultiControlNetModel([tiny_controlnet(), tiny_controlnet()]),
        scheduler=DDIMScheduler(**BETAS, clip_sample=False))
    pipe.set_progress_bar_config(disable=True)

    def latents() -> Tensor:
        return pipe("a cat", images, height=SIZE, width=SIZE, num_inference_steps=4, output_type="latent",
                    generator=torch.Generator().manual_seed(0), **settings).images

    plain = latents()
    with enable_deepcache(pipe):
        cached = latents()
    if first == "caching":
        enable_deepcache(pipe, interval=1)
    cpu_offload(pipe.unet, torch.device("cpu"), offload_buffers=True)
    enable_deepcache(pipe, interval=1)
    assert torch.equal(latents(), plain) and not torch.equal(cached, plain)
    with enable_deepcache(pipe):
        assert torch.equal(latents(), cached)
    assert pipe.unet.conv_in.weight.is_meta


# Layers that are quantised, or stored in another number format

def torch_int8(unet: nn.Module) -> None:
    torch.ao.quantization.quantize_dynamic(unet, {nn.Linear}, torch.qint8, inplace=True)


def layerwise_casting(unet: nn.Module) -> None:
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", [torch_int8, layerwise_casting])
def test_quantised_layers(parts, caplog, change):
    pipe = build_xl(parts)
    before = run_xl(pipe)
    change(pipe.unet)
    plain = run_xl(pipe)
    assert not torch.equal(plain, before)               # they act
    with enable_deepcache(pipe, interval=1):
        assert torch.equal(run_xl(pipe), plain)
    theirs = by_helper(pipe, 1, 3, run_xl)
    with enable_deepcache(pipe, interval=3, branch=1), caplog.at_level(logging.INFO, "unet_caching"):
        assert torch.equal(run_xl(pipe), theirs) and not torch.equal(theirs, plain)
    assert "caching in 6 network calls" in caplog.text
