"""What is asked of a pipeline that cannot be, or is easily computed wrong: in one line at once, or right."""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
from diffusers.models.unets import unet_2d_blocks
from test_sd_pipeline import BETAS, SIZE, build, calls, parts, run, tiny_unet  # noqa: F401  two are fixtures
from torch import Tensor

from unet_caching import disable_deepcache, enable_deepcache
from unet_caching.errors import UserError
from unet_caching.files.fitted import fingerprint
from unet_caching.methods.block_caching import BlockSchedule
from unet_caching.methods.plan import Call, Plan
from unet_caching.pipelines.parts import residuals
from unet_caching.pipelines.scheduler import plan_scheduler
from unet_caching.samplers.table import Table


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


# What can be known is known when caching is switched on

@pytest.mark.parametrize(("settings", "message"), [
    ({"forecast": 7}, "forecast is an order up to"), ({"forecast": -1}, "order"), ({"forecast": 1.5}, "order"),
    ({"plan": "nowhere.json"}, "nowhere.json"), ({"block_schedule": "nowhere.json"}, "nowhere.json"),
    ({"interval": True}, "interval is True"), ({"intervall": 3}, "no option intervall"),
    ({"zero_cache": True, "forecast": 1, "interval": 3}, "zero_cache"), ({"branch": 6}, "branch must be from 0 to 5"),
    ({"branch": -1}, "branch"), ({"branch": 1.0}, "branch"), ({"interval": 0}, "interval"), ({"center": 3}, "center"),
    ({"interval": 2.5}, "interval"), ({"schedule": "centered", "center": 3}, "power"),
    ({"schedule": "cosine"}, "cosine"), ({"schedule": "centered", "power": 1.4}, "center"),
    ({"schedule": "centered", "center": 3, "power": 0.0}, "power"),
    ({"schedule": "centered", "center": -1, "power": 1.4}, "center")])
def test_settings_that_no_run_can_have(parts, settings, message):  # noqa: F811
    """They are refused before anything changes, whether caching is off or on."""
    pipe, settings = build(parts), {"interval": 2} | settings if "plan" not in str(settings) else settings
    for on in (False, True):
        before = dict(vars(pipe))
        with pytest.raises(UserError, match=message) as refused:
            enable_deepcache(pipe, **settings)
        assert "--" not in str(refused.value) and vars(pipe) == before and ("forward" in vars(pipe.unet)) is on
        enable_deepcache(pipe)


def test_files_of_another_unet_and_an_interval_beside_a_plan(parts, tmp_path):  # noqa: F811
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
def test_a_plan_of_named_timesteps_wants_those(parts, tmp_path, spacing):  # noqa: F811
    pipe = build(parts)
    path = save_plan(tmp_path / "plan.json", timesteps=spacing)
    other = {"trailing": "leading", "leading": "trailing"}[spacing]
    wrong = (DDIMScheduler(**BETAS), diffusers.UniPCMultistepScheduler(
        **{key: value for key, value in BETAS.items() if "offset" not in key}, timestep_spacing=other, steps_offset=1))
    enable_deepcache(pipe, plan=path)
    for pipe.scheduler in wrong:
        with pytest.raises(UserError, match=f"made for unipc at other timesteps .* {spacing} in 6 steps: pipe"):
            run(pipe)
    pipe.scheduler = plan_scheduler(path, pipe.scheduler)
    assert run(pipe).isfinite().all()


SCHEDULERS = sorted(name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax"))


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if "Vq" not in name])
def test_a_plan_takes_the_noise_levels_of_any_scheduler_or_refuses_it(parts, tmp_path, name):  # noqa: F811
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
    pipe = build(parts)
    pipe.scheduler = made
    assert made.sigmas.isfinite().all() and run(pipe).isfinite().all()


def test_a_plan_for_zero_terminal_snr(parts, tmp_path):  # noqa: F811
    path, pipe = save_plan(tmp_path / "plan.json"), build(parts)
    with pytest.raises(UserError, match="zero terminal SNR, where a network that predicts noise tells nothing"):
        plan_scheduler(path, DDIMScheduler(**BETAS, rescale_betas_zero_snr=True))
    pipe.scheduler = plan_scheduler(path, DDIMScheduler(**BETAS, rescale_betas_zero_snr=True,
                                                        prediction_type="v_prediction"))
    enable_deepcache(pipe, plan=path)
    assert run(pipe).isfinite().all() and pipe.scheduler.sigmas.isfinite().all()


# Short runs, and what is logged

@pytest.mark.parametrize(("cls", "steps", "inputs"), [(None, 4, {}), (None, 2, {}), (None, 1, {}), (
    StableDiffusionImg2ImgPipeline, 8, {"strength": 0.5})])
def test_short_runs_with_the_settings_of_the_readme(parts, calls, caplog, cls, steps, inputs):  # noqa: F811
    pipe = build(parts) if cls is None else build(parts, cls)
    enable_deepcache(pipe, interval=3, forecast=1)
    run(pipe, steps=steps, **inputs)
    assert calls.take() == {8: "1001", 4: "1001", 2: "10", 1: "1"}[steps]
    assert "next to nothing to reuse" in caplog.text or steps == 1
    assert "--" not in caplog.text and "adds noise" not in caplog.text


def test_a_forecast_under_fresh_noise_is_told_once(parts, caplog):  # noqa: F811
    pipe = build(parts)
    enable_deepcache(pipe, interval=3, forecast=1)
    pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    run(pipe, steps=8)
    run(pipe, steps=8)
    assert caplog.text.count("this scheduler adds noise at every step, where a forecast gains less") == 1


def test_the_log_counts_without_running_anything_again(parts, caplog):  # noqa: F811
    pipe = build(parts)
    ran: Counter = Counter()

    class Own:
        """A user's processor, which does another thing each time."""

        def __init__(self, own):
            self.own = own

        def __call__(self, *args, **kwargs):
            ran["processor"] += 1
            return self.own(*args, **kwargs) * (1 + 0.01 * ran["processor"])

    pipe.unet.set_attn_processor({name: Own(own) for name, own in pipe.unet.attn_processors.items()})
    pipe.unet.conv_in.register_forward_hook(lambda *_: ran.update(["hook"]))
    enable_deepcache(pipe, interval=3)
    images, counts = [], []
    for level in (logging.WARNING, logging.INFO):
        ran.clear()
        with caplog.at_level(level, "unet_caching"):
            images.append(run(pipe))
        counts.append(dict(ran))
    assert torch.equal(*images) and counts[0] == counts[1] and "6 network calls, 2 of them full" in caplog.text


def test_calls_outside_of_a_progress_bar_are_told(parts, calls, caplog):  # noqa: F811
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


def test_guidance_cut_short_and_a_loss_in_the_loop(parts, calls, caplog):  # noqa: F811
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

def test_blocks_that_are_replaced_or_patched(parts, monkeypatch):  # noqa: F811
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
