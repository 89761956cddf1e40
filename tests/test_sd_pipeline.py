"""DeepCache in diffusers' own pipelines, on tiny random models: their results without it, and the PyPI helper's."""

import copy

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from conftest import relative_error
from diffusers import (
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from sd_pipelines import BETAS, PROMPTS, SIZE, TOLERANCE, build, direct, run
from tiny_pipelines import by_helper

from stable_diffusion.config import Config, Diffusion, Unet
from stable_diffusion.pipeline import load_pipeline
from unet_caching import disable_deepcache, enable_deepcache
from unet_caching.errors import UserError
from unet_caching.schedules import centered


@pytest.mark.parametrize(("cls", "branch", "interval"), [
    *((StableDiffusionPipeline, branch, 3) for branch in (0, 3, 7)), (StableDiffusionImg2ImgPipeline, 1, 2),
    (StableDiffusionInpaintPipeline, 4, 3), (StableDiffusionControlNetPipeline, 2, 2)])
def test_caching_agrees_with_the_helper_of_the_authors(parts, cls, branch, interval):
    pipe = build(parts, cls, layers_per_block=2)
    dense = run(pipe, PROMPTS)
    theirs = by_helper(pipe, branch, interval, lambda pipe: run(pipe, PROMPTS))
    enable_deepcache(pipe, interval=interval, branch=branch)
    ours = run(pipe, PROMPTS)
    assert torch.equal(ours, theirs)
    assert relative_error(ours, dense) > 50 * TOLERANCE


@pytest.mark.parametrize("scheduler", [DDIMScheduler, PNDMScheduler])
def test_image_to_image_counts_from_its_own_first_step(parts, calls, scheduler):
    pipe = build(parts, StableDiffusionImg2ImgPipeline, scheduler)
    enable_deepcache(pipe, interval=2)
    run(pipe, steps=10, strength=0.5)       # 5 steps
    assert calls.take() == "10101" + ("0" if scheduler is PNDMScheduler else "")


def test_centered_schedules_and_runs_that_they_do_not_fit(parts, calls):
    pipe = build(parts)
    enable_deepcache(pipe, interval=3, schedule="centered", center=4, power=1.4)
    run(pipe, steps=12)
    assert calls.take() == "".join("01"[step in centered(12, 3, 4, 1.4)] for step in range(12))
    with pytest.raises(UserError, match=r"4 steps.*center"):
        run(pipe, steps=4)
    assert calls.take() == ""
    run(pipe, steps=12)
    assert calls.take().count("1") == 4


def test_every_run_starts_afresh_whatever_changed(parts, calls):
    pipe = build(parts)
    enable_deepcache(pipe, interval=4)
    first = run(pipe, steps=6)
    assert calls.take() == "100010"
    run(pipe, PROMPTS, steps=5, num_images_per_prompt=2)
    assert calls.take() == "10001"
    run(pipe, steps=6, height=2 * SIZE)
    run(pipe, steps=6, guidance_scale=1.0)
    assert calls.take() == "100010" * 2
    pipe.scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True)
    run(pipe, steps=4)
    assert calls.take() == "10000"
    pipe.scheduler = DDIMScheduler(**BETAS, clip_sample=False)
    run(pipe, timesteps=None, steps=6)
    assert calls.take() == "100010"
    assert torch.equal(run(pipe, steps=6), first)


def test_a_run_that_was_broken_off_leaves_nothing_behind(parts, calls):
    pipe = build(parts)
    enable_deepcache(pipe, interval=4)
    first = run(pipe)
    calls.take()

    def fail(pipe, step, t, tensors):
        if step == 1:
            raise KeyboardInterrupt
        return tensors

    def stop(pipe, step, t, tensors):
        pipe._interrupt = step == 2
        return tensors

    with pytest.raises(KeyboardInterrupt):
        run(pipe, callback_on_step_end=fail)
    assert calls.take() == "10"
    run(pipe, callback_on_step_end=stop)
    assert calls.take() == "100"
    assert torch.equal(run(pipe), first)
    assert calls.take() == "100010"


@pytest.mark.parametrize(("scale", "mask"), [(1.0, "101010"), (3.75, "100010")])
def test_guidance_switched_off_or_halved_midway(parts, calls, scale, mask):
    """Where the batch halves, too, nothing fits that was kept: a full step."""
    pipe = build(parts)

    def switch(pipe, step, t, tensors):
        if step == 1:
            pipe._guidance_scale = scale
            if scale == 1:
                tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
        return tensors

    changed = {"callback_on_step_end": switch, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    plain = run(pipe, **changed)
    assert not torch.equal(plain, run(pipe))
    enable_deepcache(pipe, interval=1)
    assert torch.equal(run(pipe, **changed), plain)
    calls.clear()
    enable_deepcache(pipe, interval=4)
    run(pipe, **changed)
    assert calls.take() == mask


def test_the_unet_may_be_called_directly_and_computes_everything(parts, calls):
    pipe = build(parts)
    before = direct(pipe, 500)
    enable_deepcache(pipe, interval=6)
    run(pipe)
    calls.take()
    for timestep in (500, 500.0, torch.tensor(500), torch.tensor([500]), torch.tensor([500, 500])):
        assert torch.equal(direct(pipe, timestep), before)
    assert calls.take() == "11111"
    output = pipe.unet(torch.zeros(1, 4, 8, 8), 5, torch.zeros(1, 5, 16), return_dict=False)
    assert isinstance(output, tuple) and output[0].shape == (1, 4, 8, 8)


def test_sizes_that_do_not_halve(parts):
    pipe = build(parts)
    latents = torch.randn(1, 4, 15, 13, generator=torch.Generator().manual_seed(0))
    expected = run(pipe, latents=latents)
    enable_deepcache(pipe, interval=1)
    assert torch.equal(run(pipe, latents=latents), expected)


def test_on_and_off_leaves_the_pipeline_as_it_was(parts, calls):
    pipe = build(parts)
    before, unet, state = run(pipe), pipe.unet, dict(vars(pipe))
    calls.take()
    inside, pointers = dict(vars(unet)), {name: value.data_ptr() for name, value in unet.state_dict().items()}
    enable_deepcache(pipe, interval=3)
    enable_deepcache(pipe, interval=2, branch=2)        # replaces the settings
    cached = run(pipe)
    assert calls.take() == "101010" and pipe.unet is unet
    assert {name: value.data_ptr() for name, value in unet.state_dict().items()} == pointers
    for _ in range(2):                                  # the second time it is off already
        disable_deepcache(pipe)
        assert vars(pipe).keys() == state.keys() and vars(unet).keys() == inside.keys()
        assert pipe.unet is unet and torch.equal(run(pipe), before)
    assert set(calls.take()) == {"1"}
    with enable_deepcache(pipe, np.int64(2), branch=np.int64(2)):
        with enable_deepcache(pipe, interval=3) as within:
            run(within)
        assert torch.equal(run(pipe), cached)           # the settings from before come back
        with pytest.raises(KeyError), enable_deepcache(pipe, interval=5):
            raise KeyError
        run(pipe)
    assert calls.take() == "100100" + "101010" * 2
    assert vars(pipe).keys() == state.keys() and vars(unet).keys() == inside.keys()


def test_a_progress_bar_of_the_users_own_goes_on(parts):
    pipe = build(parts)
    totals = []
    own = pipe.progress_bar

    def bar(iterable=None, total=None):
        totals.append(total)
        return own(iterable, total)

    pipe.progress_bar = bar
    enable_deepcache(pipe, interval=2)
    run(pipe, steps=5)
    assert list(pipe.progress_bar([1, 2])) == [1, 2]
    disable_deepcache(pipe)
    assert pipe.progress_bar is bar and totals == [5, None]
    enable_deepcache(pipe, interval=2)
    pipe.progress_bar = bar                             # no more runs are seen: every step is a full one
    disable_deepcache(pipe)
    assert pipe.progress_bar is bar and "forward" not in vars(pipe.unet)


def test_pipelines_that_share_a_unet_keep_their_own_settings(parts, calls):
    pipe = build(parts)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert other.unet is pipe.unet
    enable_deepcache(pipe, interval=3)
    run(other, steps=6, strength=1.0)
    assert calls.take() == "111111"                     # off in this one
    enable_deepcache(other, interval=2)
    run(pipe), run(other, steps=6, strength=1.0)
    assert calls.take() == "100100" + "101010"
    disable_deepcache(pipe)
    run(pipe), run(other, steps=6, strength=1.0)
    assert calls.take() == "111111" + "101010"
    disable_deepcache(other)
    run(pipe)
    assert calls.take() == "111111"
    assert "forward" not in vars(pipe.unet)


def test_moves_and_casts_are_seen_and_stay(parts):
    pipe = build({**parts, "vae": copy.deepcopy(parts["vae"]), "text_encoder": copy.deepcopy(parts["text_encoder"])})
    enable_deepcache(pipe, interval=2)
    pipe.to(torch.bfloat16)
    assert run(pipe).dtype == torch.bfloat16
    disable_deepcache(pipe)
    dense = run(pipe)
    enable_deepcache(pipe, interval=1)
    assert relative_error(run(pipe).float(), dense.float()) < 0.05
    with torch.no_grad():                               # weights changed in place, or put in the place of others
        pipe.unet.conv_out.weight.zero_()
        pipe.unet.conv_out.bias = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    assert (direct(pipe.to(torch.float32), 5) == 1).all()


@pytest.mark.parametrize("hook_first", [True, False])
def test_the_hook_of_a_cpu_offload_still_runs(parts, hook_first):
    pipe, seen, hook = build(parts), [], ModelHook()
    hook.pre_forward = lambda module, *args, **kwargs: seen.append("moved") or (args, kwargs)
    dense = run(pipe)
    switched_on = [lambda: add_hook_to_module(pipe.unet, hook), lambda: enable_deepcache(pipe, interval=2)]
    for step in switched_on if hook_first else reversed(switched_on):
        step()
    cached = run(pipe)
    assert len(seen) == 6 and relative_error(cached, dense) > 50 * TOLERANCE
    if hook_first:
        disable_deepcache(pipe)
        assert torch.equal(run(pipe), dense) and len(seen) == 12
        remove_hook_from_module(pipe.unet)
    else:
        remove_hook_from_module(pipe.unet)
        assert torch.equal(run(pipe), cached) and len(seen) == 6
        disable_deepcache(pipe)
    assert torch.equal(run(pipe), dense)


@pytest.mark.parametrize(("prediction", "theirs_is", "scheduler", "more"), [
    ("noise", "epsilon", PNDMScheduler, {"skip_prk_steps": True}),
    ("v", "v_prediction", DDIMScheduler, {"clip_sample": False})])
def test_a_checkpoint_becomes_a_pipeline_on_our_unet(parts, calls, tmp_path, prediction, theirs_is, scheduler, more):
    theirs = build(parts)
    theirs.scheduler = scheduler(**BETAS, set_alpha_to_one=False, prediction_type=theirs_is, **more)
    theirs.save_pretrained(tmp_path)
    config = Config(name="sd_tiny", unet=Unet(4, 4, 32, [1, 2, 2], 1, [1, 2], 4, 16), resolution=SIZE,
                    downsampling=2, tokens=12, checkpoint="", diffusion=Diffusion(prediction=prediction))
    ours = load_pipeline(config, tmp_path)
    ours.set_progress_bar_config(disable=True)
    assert type(ours.scheduler) is scheduler
    assert relative_error(run(ours), run(theirs)) < TOLERANCE
    assert "0" not in calls.take()
    enable_deepcache(ours, interval=3)
    run(ours, steps=6)
    assert calls.take() == "100100" + ("0" if prediction == "noise" else "")
