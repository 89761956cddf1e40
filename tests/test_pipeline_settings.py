"""What is asked of a pipeline that cannot be, or is easily computed wrong: in one line at once, or right."""

import logging
from dataclasses import replace

import diffusers
import pytest
import torch
from conftest import relative_error
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionImg2ImgPipeline
from diffusers.models.unets import unet_2d_blocks
from sd_pipelines import BETAS, TOLERANCE, build, drawn, run, save_blocks, save_plan, tiny_unet
from torch import Tensor

from ldm.diffusers_layout import diffusers_state_dict
from stable_diffusion.unet import UNet
from unet_caching import disable_deepcache, enable_deepcache
from unet_caching.errors import UserError
from unet_caching.keep import Keep, joined
from unet_caching.methods.deepcache import DeepCache
from unet_caching.methods.plan import Call, PlanCache
from unet_caching.pipelines.scheduler import plan_scheduler
from unet_caching.policy import Policy
from unet_caching.samplers.diffusion import Diffusion
from unet_caching.samplers.samplers import Sampler, noise_predictor
from unet_caching.samplers.table import table_of
from unet_caching.schedules import uniform

# What can be known is known when caching is switched on

IMPOSSIBLE = [
    ({"forecast": 7}, "forecast is an order up to"), ({"forecast": -1}, "order"), ({"forecast": 1.5}, "order"),
    ({"plan": "nowhere.json"}, "nowhere.json"), ({"block_schedule": "nowhere.json"}, "nowhere.json"),
    ({"interval": True}, "interval must be a number, got True"), ({"intervall": 3}, "no option intervall"),
    ({"zero_cache": True, "forecast": 1, "interval": 3}, "zero_cache"), ({"branch": 6}, "branch must be from 0 to 5"),
    ({"branch": -1}, "branch"), ({"branch": 1.0}, "branch"), ({"interval": 0}, "interval"), ({"center": 3}, "center"),
    ({"interval": 2.5}, "interval"), ({"schedule": "centered", "center": 3}, "power"),
    ({"schedule": "cosine"}, "cosine"), ({"schedule": "centered", "power": 1.4}, "center"),
    ({"schedule": "centered", "center": 3, "power": 0.0}, "power"),
    ({"schedule": "centered", "center": -1, "power": 1.4}, "center")]


def test_settings_that_no_run_can_have(parts):
    """They are refused before anything changes, whether caching is off or on."""
    pipe = build(parts)
    for on in (False, True):
        before = dict(vars(pipe))
        for settings, message in IMPOSSIBLE:
            with pytest.raises(UserError, match=message) as refused:
                enable_deepcache(pipe, **({} if "plan" in settings else {"interval": 2}) | settings)
            assert "--" not in str(refused.value), message
            assert vars(pipe) == before and ("forward" in vars(pipe.unet)) is on, message
        enable_deepcache(pipe)


def test_files_of_another_unet_and_an_interval_beside_a_plan(parts, tmp_path):
    pipe = build(parts)
    other = tiny_unet(block_out_channels=(32, 64, 96))
    save_blocks(tmp_path / "blocks.json", pipe.unet, of=other)
    plan = save_plan(tmp_path / "plan.json", unet=other)
    for settings in ({"block_schedule": tmp_path / "blocks.json"}, {"plan": plan}):
        with pytest.raises(UserError, match="U-Net"):
            enable_deepcache(pipe, **settings)
    own = save_plan(tmp_path / "own.json", unet=pipe.unet)
    enable_deepcache(pipe, plan=own)
    with pytest.raises(UserError, match="interval"):
        enable_deepcache(pipe, interval=3, plan=own)


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_a_plan_of_named_timesteps_wants_those(parts, tmp_path, spacing):
    pipe = build(parts)
    path = save_plan(tmp_path / "plan.json", timesteps=spacing)
    other = {"trailing": "leading", "leading": "trailing"}[spacing]
    wrong = (DDIMScheduler(**BETAS), diffusers.UniPCMultistepScheduler(
        **{key: value for key, value in BETAS.items() if "offset" not in key}, timestep_spacing=other, steps_offset=1))
    enable_deepcache(pipe, plan=path)
    for pipe.scheduler in wrong:
        with pytest.raises(UserError, match=f"made for unipc with {spacing} timesteps in 6 steps, .*: pipe"):
            run(pipe)
    pipe.scheduler = plan_scheduler(path, pipe.scheduler)
    assert run(pipe).isfinite().all()


SCHEDULERS = sorted(name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax"))


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if "Vq" not in name])
def test_a_plan_takes_the_noise_levels_of_any_scheduler_or_refuses_it(tmp_path, name):
    try:
        donor = getattr(diffusers, name)()
    except (ImportError, TypeError, ValueError):
        pytest.skip("needs what is not installed")
    try:
        made = plan_scheduler(save_plan(tmp_path / "plan.json"), donor)
    except UserError as refused:
        assert "betas" in str(refused) or "noise levels" in str(refused) or "zero terminal SNR" in str(refused)
        assert not isinstance(donor, DDIMScheduler)
        return
    made.set_timesteps(6)
    assert torch.allclose(made.alphas_cumprod, donor.alphas_cumprod.to(made.alphas_cumprod), rtol=1e-3, atol=1e-6)
    x = torch.ones(1, 4, 2, 2)
    for t in made.timesteps:
        x = made.step(torch.tanh(x), t, x).prev_sample
    assert made.sigmas.isfinite().all() and x.isfinite().all()


def test_a_plan_for_zero_terminal_snr(parts, tmp_path):
    path, pipe = save_plan(tmp_path / "plan.json"), build(parts)
    with pytest.raises(UserError, match="zero terminal SNR, where a network that predicts noise says nothing"):
        plan_scheduler(path, DDIMScheduler(**BETAS, rescale_betas_zero_snr=True))
    pipe.scheduler = plan_scheduler(path, DDIMScheduler(**BETAS, rescale_betas_zero_snr=True,
                                                        prediction_type="v_prediction"))
    enable_deepcache(pipe, plan=path)
    assert run(pipe).isfinite().all() and pipe.scheduler.sigmas.isfinite().all()


# Short runs, and what is logged

@pytest.mark.parametrize(("cls", "steps", "inputs"), [(None, 4, {}), (None, 1, {}), (
    StableDiffusionImg2ImgPipeline, 8, {"strength": 0.5})])
def test_short_runs_with_the_settings_of_the_readme(parts, calls, caplog, cls, steps, inputs):
    pipe = build(parts) if cls is None else build(parts, cls)
    enable_deepcache(pipe, interval=3, forecast=1)
    run(pipe, steps=steps, **inputs)
    assert calls.take() == {8: "1001", 4: "1001", 1: "1"}[steps]
    assert "next to nothing to reuse" in caplog.text or steps == 1
    assert "--" not in caplog.text and "adds noise" not in caplog.text


def test_a_forecast_under_fresh_noise_is_told_once(parts, caplog):
    pipe = build(parts)
    enable_deepcache(pipe, interval=3, forecast=1)
    pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    run(pipe, steps=8)
    run(pipe, steps=8)
    assert caplog.text.count("this scheduler adds noise at every step, where a forecast gains less") == 1


def test_the_log_counts_without_running_anything_again(parts, caplog):
    pipe, ran = build(parts), []

    def another(module, args, output):
        """A user's hook, which does another thing each time."""
        ran.append(module)
        return output * (1 + 0.01 * len(ran))

    for module in (pipe.unet.conv_in, pipe.unet.down_blocks[0].attentions[0].proj_in):
        module.register_forward_hook(another)
    enable_deepcache(pipe, interval=3)
    images, counts = [], []
    for level in (logging.WARNING, logging.INFO):
        ran.clear()
        with caplog.at_level(level, "unet_caching"):
            images.append(run(pipe))
        counts.append(len(ran))
    assert torch.equal(*images) and counts[0] == counts[1] and "6 network calls, 2 of them full" in caplog.text


def test_calls_outside_of_a_progress_bar_are_told(parts, calls, caplog):
    class NoBar(diffusers.StableDiffusionPipeline):
        def __call__(self, steps: int) -> None:
            for t in range(steps):
                self.unet(torch.ones(1, 4, 8, 8), t, torch.zeros(1, 5, 16))

    pipe = NoBar(**build(parts).components, requires_safety_checker=False)
    enable_deepcache(pipe)
    pipe(9)
    assert not caplog.records
    pipe(3)
    assert set(calls.take()) == {"1"} and "10 network calls of a NoBar were made outside" in caplog.text


def test_guidance_cut_short_and_a_loss_in_the_loop(parts, calls, caplog):
    """A loss through the U-Net has the gradients that it has without caching: such steps compute everything."""
    class Guided(diffusers.StableDiffusionPipeline):
        def __call__(self, steps: int) -> Tensor:
            x, found = torch.full((1, 4, 8, 8), 0.5), []
            self.scheduler.set_timesteps(steps)
            with self.progress_bar(total=steps):
                for t in self.scheduler.timesteps:
                    x = x.detach().requires_grad_()
                    noise = self.unet(x, t, torch.zeros(1, 5, 16)).sample
                    found.append(torch.autograd.grad(noise.square().sum(), x)[0])
                    x = self.scheduler.step(noise, t, x).prev_sample - 0.1 * found[-1]
            return torch.stack(found)

    pipe = Guided(**build(parts).components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    plain = pipe(6)
    enable_deepcache(pipe, interval=3)
    calls.clear()
    assert torch.equal(pipe(6), plain) and calls.take() == "111111"
    assert "6 steps with gradients computed everything" in caplog.text


# What is not as diffusers made it

def test_blocks_that_are_replaced_or_patched(parts, monkeypatch):
    pipe = build(parts)
    kind = type(pipe.unet.down_blocks[0])
    own = {"forward": lambda self, *args, **kwargs: 1 / 0}
    pipe.unet.down_blocks[0].__class__ = type(kind.__name__, (kind,), own)          # another class of the same name
    enable_deepcache(pipe)
    with pytest.raises(UserError, match="cannot be taken apart"):
        run(pipe)
    disable_deepcache(pipe)
    pipe = build(parts)
    theirs = unet_2d_blocks.CrossAttnDownBlock2D.forward

    def patched(self, hidden_states, temb=None, **others):
        hidden_states, skips = theirs(self, hidden_states, temb, **others)
        return 2 * hidden_states, skips

    monkeypatch.setattr(unet_2d_blocks.CrossAttnDownBlock2D, "forward", patched)
    with pytest.raises(UserError, match="CrossAttnDownBlock2D, which cannot be taken apart"):
        enable_deepcache(pipe)


# Our own samplers and block schedules

DIFFUSION = Diffusion("scaled_linear", beta_start=BETAS["beta_start"], beta_end=BETAS["beta_end"])
TEXT = torch.zeros(1, 12, 16)
GIVEN = {"prompt": None, "prompt_embeds": TEXT, "guidance_scale": 1.0, "latents": drawn(1, 4, 8, 8)}


def by_ours(pipe: DiffusionPipeline, sampler: Sampler, cache: Policy) -> Tensor:
    """What our U-Net on a pipeline's weights gives with our sampler."""
    ours = UNet(4, 4, 32, (1, 2, 2), 1, (2, 1), num_heads=4, context_dim=16).eval()
    theirs = pipe.unet.state_dict()
    with torch.no_grad():
        for name, value in diffusers_state_dict(ours).items():
            value.copy_(theirs[name])
    return sampler.run(noise_predictor(ours, DIFFUSION, torch.float32, cache, (TEXT,)), GIVEN["latents"])


@pytest.fixture
def pipe(parts):
    """Whose DDIM is ours."""
    pipe = build(parts)
    pipe.scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False)
    return pipe


def test_a_forecast_in_a_pipeline_is_that_of_our_own_sampler(pipe):
    enable_deepcache(pipe, interval=3, forecast=1)
    theirs = run(pipe, steps=12, **GIVEN)
    cache = DeepCache(1, uniform(12, 3), forecast=1)
    assert relative_error(theirs, by_ours(pipe, Sampler("ddim", 12, "leading", 0.0, DIFFUSION), cache)) < TOLERANCE
    enable_deepcache(pipe, interval=3)
    assert relative_error(theirs, run(pipe, steps=12, **GIVEN)) > 10 * TOLERANCE


@pytest.mark.parametrize(("sampler", "learned"), [("unipc", False), ("dpmpp", False), ("deis", False), ("ddim", True)])
def test_a_plan_in_a_pipeline_is_that_of_our_own_sampler(pipe, tmp_path, sampler, learned):
    """With the scheduler that goes with it; any other is refused."""
    times = "999,900.25,700,480,300,90" if learned else "999,900,700,480,300,90"
    table = replace(table_of(sampler, 6, times, DIFFUSION)[1], p=(1.0, 0.9, 0.8, 0.7, 0.5, 0.1)) if learned else None
    each = [Call(), Call(), Call(0, (0.8,)), Call(), Call(1, (0.9, 0.4)), Call(0)]
    path = tmp_path / "plan.json"
    if learned:                             # the same timesteps and noise levels alone will not do
        pipe.scheduler = plan_scheduler(save_plan(path, each, timesteps=times), pipe.scheduler)
    save_plan(path, each, table, sampler=sampler, timesteps=times)
    enable_deepcache(pipe, plan=path)
    with pytest.raises(UserError, match=f"made for .*{sampler} with 999,900"):
        run(pipe, **GIVEN)

    pipe.scheduler = plan_scheduler(path, pipe.scheduler)
    expected = by_ours(pipe, Sampler(sampler, 6, times, 0.0, DIFFUSION, table), PlanCache(each))
    for again in (False, True):             # the scheduler forgets the run before
        assert relative_error(run(pipe, **GIVEN), expected) < TOLERANCE, again
    with pytest.raises(UserError, match="for a plan of 6 steps: num_inference_steps=6"):
        run(pipe, steps=5, **GIVEN)
    disable_deepcache(pipe)
    assert relative_error(run(pipe, **GIVEN), expected) > 10 * TOLERANCE
    pipe.scheduler.save_config(tmp_path)
    assert "999,900" not in (tmp_path / "scheduler_config.json").read_text()
    loaded = type(pipe.scheduler).__mro__[1].from_pretrained(tmp_path)
    loaded.set_timesteps(5)
    assert len(loaded.timesteps) == 5


@pytest.mark.parametrize("interval", [1, 3])
def test_a_block_schedule_reuses_the_residuals_that_our_own_unet_does(pipe, tmp_path, interval):
    schedule = save_blocks(tmp_path / "blocks.json", pipe.unet)
    plain = run(pipe, **GIVEN)
    enable_deepcache(pipe, interval, block_schedule=str(tmp_path / "blocks.json"))
    theirs = run(pipe, **GIVEN)
    policy = Keep(schedule.blocks if interval == 1 else schedule.outside(1, 6))
    cache = policy if interval == 1 else joined(DeepCache(1, [0, 3]), policy)
    assert relative_error(theirs, by_ours(pipe, Sampler("ddim", 6, "leading", 0.0, DIFFUSION), cache)) < TOLERANCE
    assert relative_error(theirs, plain) > 50 * TOLERANCE
    with pytest.raises(UserError, match="steps"):
        run(pipe, steps=5)
