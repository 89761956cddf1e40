"""PLMS and DPM-Solver++ on an exact predictor of noise, and what the samplers have in common."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PNDMScheduler

from sampling import dpm_solver, plms
from sampling.ddim import ddim, leading_timesteps, offset_timesteps
from sampling.diffusion import Diffusion
from sampling.noise import SeededNoise
from sampling.samplers import SAMPLERS, Sampler, num_calls, timesteps_for

DIFFUSION = Diffusion("scaled_linear", 1000, 0.00085, 0.012)
SHAPE = (2, 4, 4)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def noise() -> torch.Tensor:
    return SeededNoise([0, 1])(SHAPE)


def curved(x, t, step):
    """A predictor that depends on everything, so that a wrong order or state shows."""
    return torch.tanh(x) * (0.3 + t / 1500)


def by_diffusers(scheduler, steps):
    """diffusers' own loop, as in its pipelines."""
    scheduler.set_timesteps(steps)
    x = noise() * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(curved(scheduler.scale_model_input(x, t), t.item(), None), t, x).prev_sample
    return x


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 30])
@pytest.mark.parametrize(("run", "theirs"), [
    (plms.plms, lambda: PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1)),
    (dpm_solver.dpm_solver, lambda: DPMSolverMultistepScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"))])
def test_they_are_diffusers_loops(run, theirs, steps):
    expected = by_diffusers(theirs(), steps)
    assert (run(curved, noise(), steps, DIFFUSION.betas()) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("diffusion", [DIFFUSION, Diffusion(), Diffusion("cosine")], ids=lambda d: d.beta_schedule)
def test_they_run_on_the_noise_schedule_of_the_config(diffusion):
    for made in (plms.scheduler(10, diffusion.betas()), dpm_solver.scheduler(10, diffusion.betas())):
        assert torch.equal(made.alphas_cumprod, diffusion.alphas_cumprod())


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_calls_and_progress(name, steps):
    sampler = Sampler(name, steps, "leading", 0.0, DIFFUSION)
    called, done = [], []
    sampler.run(lambda x, t, step: (called.append((t, step)), 0.1 * x)[1], noise(), progress=done.append)
    assert [step for _, step in called] == list(range(sampler.calls)) and sampler.calls == num_calls(name, steps)
    assert sampler.calls == (steps + 1 if name == "plms" and steps > 1 else steps)
    assert done == [(step + 1) / sampler.calls for step in range(sampler.calls)]
    times = [t for t, _ in called]
    assert times == sorted(times, reverse=True)
    if name != "dpmpp":
        assert sorted(set(times)) == leading_timesteps(steps)
    if name == "plms" and steps > 1:
        assert times[1] == times[2] and len(set(times)) == steps


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction", ["noise", "v"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_exact_noise_of_one_image_leads_to_it(name, spacing, prediction):
    """A predictor that knows x_0 makes all steps exact, wherever they end."""
    alphas, x0 = DIFFUSION.alphas_cumprod(), torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(9))
    eps = noise()
    sampler = Sampler(name, 10, spacing, 0.0, Diffusion("scaled_linear", 1000, 0.00085, 0.012, prediction))
    times = []

    def predict(x, t, step):
        times.append(t)
        return (x - alphas[t] ** 0.5 * x0) / (1 - alphas[t]) ** 0.5

    first = {"leading": 901, "trailing": 999}[spacing]
    x = sampler.run(predict, alphas[first] ** 0.5 * x0 + (1 - alphas[first]) ** 0.5 * eps)
    end = alphas[0] if spacing == "leading" and name != "dpmpp" else torch.tensor(1.0)
    assert times[0] == first
    assert (x - (end ** 0.5 * x0 + (1 - end) ** 0.5 * eps)).abs().max() < 1e-4


def test_leading_and_offset_timesteps_agree_where_the_steps_divide():
    assert leading_timesteps(50) == offset_timesteps(50)
    assert leading_timesteps(45)[-1] == 969 and offset_timesteps(45)[-1] == 978
    alphas = DIFFUSION.alphas_cumprod()
    by_name = Sampler("ddim", 7, "leading", 0.0, DIFFUSION).run(curved, noise())
    assert torch.equal(by_name, ddim(curved, noise(), leading_timesteps(7), alphas, final_alpha=alphas[0].item()))


@pytest.mark.parametrize(("settings", "word"), [
    (("euler", 5, "leading", 0.0), "euler"), (("plms", 5, "leading", 1.0), "eta"), (("plms", 5, "quad", 0.0), "quad"),
    (("plms", 0, "leading", 0.0), "1 to 999"), (("dpmpp", 1000, "leading", 0.0), "1 to 999"),
    (("plms", 7, "trailing", 0.0), "divides 1000"), (("plms", 5, "linspace", 0.0), "linspace"),
    (("ddim", 5, "linspace", 0.0), "linspace"), (("ddim", 5, "leading", 2.0), "eta"),
    (("dpmpp", 5, "uniform", 0.0), "uniform")])
def test_settings_that_do_not_go_together(settings, word):
    with pytest.raises(ValueError, match=word):
        Sampler(*settings, DIFFUSION)


def test_a_config_of_other_timesteps_gets_stable_diffusions():
    assert [timesteps_for(name, "quad") for name in SAMPLERS] == ["quad", "leading", "leading"]
    assert [timesteps_for(name, "trailing") for name in SAMPLERS] == ["trailing"] * 3
