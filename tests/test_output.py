"""Skipped network calls: the whole output reused or forecast, in runs, in costs and in pipelines."""

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from eval.cost.runs import call_macs
from run.spec import RunSpec
from unet_caching.errors import UserError
from unet_caching.pipelines.enable import enable_deepcache
from unet_caching.samplers.noise import SeededNoise
from unet_caching.samplers.samplers import noise_predictor


def test_skipped_calls_give_the_output_of_the_last_full_one(config, unet):
    run = RunSpec.of(config, output_interval=3).open()
    diffusion, seen = run.config.diffusion, []

    def once_in_three(x, t, step):
        if step % 3 == 0:
            seen.append(noise_predictor(unet, diffusion, torch.float32, None)(x, t, step))
        return seen[-1]

    x = SeededNoise([0, 1])((3, 8, 8))
    predict = noise_predictor(unet, diffusion, torch.float32, run.caching.policy())
    with torch.no_grad():
        assert torch.equal(run.sampler.run(predict, x), run.sampler.run(once_in_three, x))
    assert run.caching.settings["full_steps"] == [0, 3, 6] and run.name == "output_n3" and run.full_calls == 3
    hook = [one.hook for one in call_macs(run)]
    assert hook[0] == max(hook) and max(hook[1:3]) < 0.05 * hook[0]


def test_they_are_forecast(config, unet):
    x = SeededNoise([0, 1])((3, 8, 8))
    images = []
    for options in ({}, {"output_interval": 2}, {"output_interval": 2, "forecast": 1}):
        run = RunSpec.of(config, **options).open()
        predict = noise_predictor(unet, run.config.diffusion, torch.float32, run.caching.policy())
        with torch.no_grad():
            images.append(run.sampler.run(predict, x))
    assert (images[2] - images[0]).norm() < (images[1] - images[0]).norm()


@pytest.mark.parametrize(("options", "words"), [
    ({"output_interval": 3, "interval": 2}, "leave out the other caching options"),
    ({"output_interval": 9, "forecast": 1}, "needs 2 full steps"),
    ({"output_interval": 10}, "interval must be from 1")])
def test_refusals(config, options, words):
    with pytest.raises(UserError, match=words):
        RunSpec.of(config, **options).open()


def test_pipelines_take_it():
    torch.manual_seed(0)
    unet = UNet2DModel(8, layers_per_block=1, block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2,
                       up_block_types=("UpBlock2D",) * 2).eval()
    pipe = DDIMPipeline(unet, DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    calls = []
    unet.mid_block.register_forward_hook(lambda *_: calls.append(1))
    with enable_deepcache(pipe, output_interval=4):
        pipe(num_inference_steps=10, generator=torch.Generator().manual_seed(0))
    assert len(calls) == 3
