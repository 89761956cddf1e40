"""The samplers of diffusers on an exact predictor of noise, and what all samplers have in common."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from ddpm.unet import UNet
from unet_caching.samplers.diffusion import Diffusion
from unet_caching.samplers.noise import SeededNoise
from unet_caching.samplers.samplers import (
    SAMPLERS,
    Sampler,
    noise_predictor,
    num_calls,
    timesteps_for,
)
from unet_caching.samplers.solvers import SOLVERS
from unet_caching.samplers.table import Table, table_of
from unet_caching.samplers.timesteps import leading_timesteps

DIFFUSION = Diffusion("scaled_linear", 1000, 0.00085, 0.012)
SHAPE = (2, 4, 4)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def noise() -> torch.Tensor:
    return SeededNoise([0, 1])(SHAPE)


def curved(x, t, step):
    """A predictor that depends on everything, so that a wrong order or state shows."""
    return torch.tanh(x) * (0.3 + t / 1500)


def by_diffusers(scheduler, steps, output=curved):
    """diffusers' own loop, as in its pipelines."""
    scheduler.set_timesteps(steps)
    x = noise() * scheduler.init_noise_sigma
    for step, t in enumerate(scheduler.timesteps):
        x = scheduler.step(output(scheduler.scale_model_input(x, t), t.item(), step), t, x).prev_sample
    return x


# As a user of diffusers makes them; what is not said is diffusers' default.
THEIRS = {
    "ddim": lambda **more: DDIMScheduler(**BETAS, clip_sample=False, **more),
    "plms": lambda **more: PNDMScheduler(**BETAS, skip_prk_steps=True, **more),
    "dpmpp": lambda **more: DPMSolverMultistepScheduler(**BETAS, **more),
    "unipc": lambda **more: UniPCMultistepScheduler(**BETAS, **more),
    "dpmpp3": lambda **more: DPMSolverMultistepScheduler(**BETAS, solver_order=3, **more),
    "deis": lambda **more: DEISMultistepScheduler(**BETAS, solver_order=3, **more)}
LEADING = {name: {"steps_offset": 1, "timestep_spacing": "leading"} for name in THEIRS}
LEADING["ddim"] |= {"set_alpha_to_one": False}
TOLERANCE = dict.fromkeys(THEIRS, 1e-5) | {"deis": 3e-5}       # differences of logarithms lose digits
MULTISTEP = [name for name in THEIRS if "linspace" in SOLVERS[name].spacings]


def apart(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def test_every_sampler_has_its_golden():
    assert THEIRS.keys() == set(SAMPLERS)


@pytest.mark.parametrize("steps", [1, 3, 30])
@pytest.mark.parametrize("name", [name for name in THEIRS if name != "ddim"])
def test_they_are_diffusers_loops(name, steps):
    expected = by_diffusers(THEIRS[name](**LEADING[name]), steps)
    assert apart(Sampler(name, steps, "leading", 0.0, DIFFUSION).run(curved, noise()), expected) < TOLERANCE[name]


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("name", MULTISTEP)
def test_other_spacings_are_diffusers(name, spacing):
    expected = by_diffusers(THEIRS[name](timestep_spacing=spacing), 7)
    assert apart(Sampler(name, 7, spacing, 0.0, DIFFUSION).run(curved, noise()), expected) < TOLERANCE[name]


LIST = "999,940,850,700,500,280,110,30"


@pytest.mark.parametrize("name", ["dpmpp", "dpmpp3"])
def test_listed_timesteps_are_diffusers(name):
    """Its DPM-Solver++ takes a list itself."""
    scheduler = THEIRS[name]()
    own, scheduler.set_timesteps = scheduler.set_timesteps, lambda steps: own(timesteps=list(map(int, LIST.split(","))))
    expected = by_diffusers(scheduler, 8)
    assert apart(Sampler(name, 8, LIST, 0.0, DIFFUSION).run(curved, noise()), expected) < 1e-5


@pytest.mark.parametrize("name", [name for name in THEIRS if name != "plms"])
def test_listed_timesteps_are_those_that_a_spacing_has(name):
    named = Sampler(name, 8, "trailing", 0.0, DIFFUSION)
    as_list = Sampler(name, 8, ",".join(map(str, named.call_timesteps())), 0.0, DIFFUSION)
    assert torch.equal(as_list.run(curved, noise()), named.run(curved, noise()))
    assert Sampler(name, 8, LIST, 0.0, DIFFUSION).call_timesteps() == list(map(int, LIST.split(",")))


@pytest.mark.parametrize(("listed", "steps", "message"), [
    ("999,500", 3, "3 steps, but 2 timesteps are listed"), ("500,999", 2, "must fall"), ("500,500", 2, "must fall"),
    ("1000,3", 2, "from 999 at most"), ("999.5,3", 2, "from 999 at most"), ("999,.5", 2, "is like 999,750"),
    ("999,x", 2, "is like 999,750"), ("999,", 2, "is like 999,750")])
def test_lists_that_cannot_be(listed, steps, message):
    for name in ("ddim", "unipc"):
        with pytest.raises(ValueError, match=message):
            Sampler(name, steps, listed, 0.0, DIFFUSION)
    with pytest.raises(ValueError, match="plms takes timesteps leading or trailing, got '999,500'"):
        Sampler("plms", 2, "999,500", 0.0, DIFFUSION)


FRACTIONS = "999,940.5,850.25,700,500.75,280.5,110.125,30"


@pytest.mark.parametrize("name", [name for name in THEIRS if name != "plms"])
def test_timesteps_may_be_fractions(name):
    """Between two timesteps log-SNR is a line: a list half way in it is half way in images, to second order."""
    def images(by):
        listed = ",".join(f"{t - by:g}" if t < 999 else "999" for t in map(int, LIST.split(",")))
        return Sampler(name, 8, listed, 0.0, DIFFUSION).run(curved, noise())

    assert Sampler(name, 8, FRACTIONS, 0.0, DIFFUSION).call_timesteps() == [float(t) for t in FRACTIONS.split(",")]
    assert apart(images(0.5), (images(0) + images(1)) / 2) < 0.2 * apart(images(0.5), images(0))


@pytest.mark.parametrize("diffusion", [DIFFUSION, Diffusion("cosine")], ids=lambda one: one.beta_schedule)
@pytest.mark.parametrize(("spacing", "steps"), [("trailing", 1), ("trailing", 20), ("karras", 9), (FRACTIONS, 8)])
@pytest.mark.parametrize("name", MULTISTEP)
def test_a_table_is_its_solver(name, spacing, steps, diffusion):
    timesteps, table = table_of(name, steps, spacing, diffusion)
    expected = Sampler(name, steps, spacing, 0.0, diffusion).run(curved, noise())
    ours = Sampler(name, steps, ",".join(map(str, timesteps)), 0.0, diffusion, table)
    assert apart(ours.run(curved, noise()), expected) < 5e-6 and ours.call_timesteps() == timesteps


def test_the_table_of_ddim_and_tables_that_cannot_be():
    timesteps, table = table_of("ddim", 20, "trailing", DIFFUSION)
    ours = Sampler("ddim", 20, ",".join(map(str, timesteps)), 0.0, DIFFUSION, table).run(curved, noise())
    assert apart(ours, Sampler("ddim", 20, "trailing", 0.0, DIFFUSION).run(curved, noise())) < 5e-6
    with pytest.raises(ValueError, match="plms has no table"):
        table_of("plms", 5, "leading", DIFFUSION)
    with pytest.raises(ValueError, match="a solver of 2 network calls"):
        Sampler("unipc", 2, "999,500", 0.0, DIFFUSION, Table((1.0,), ((1.0,),)))
    with pytest.raises(ValueError, match="finite"):
        Sampler("unipc", 1, "999", 0.0, DIFFUSION, Table((float("inf"),), ((1.0,),)))


def test_timesteps_that_others_recommend():
    karras, ays = (Sampler("unipc", 10, name, 0.0, DIFFUSION).call_timesteps() for name in ("karras", "ays"))
    theirs = UniPCMultistepScheduler(**BETAS, use_karras_sigmas=True)
    theirs.set_timesteps(10)
    assert karras == pytest.approx(theirs.timesteps.tolist(), abs=0.51)         # theirs are rounded
    assert ays == [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
    assert Sampler("dpmpp", 10, "karras", 0.0, Diffusion("cosine")).call_timesteps()[:2] == [999, pytest.approx(984.37)]
    for steps, diffusion in ((9, DIFFUSION), (10, Diffusion("cosine"))):
        with pytest.raises(ValueError, match="ays are 10 timesteps, for a model with the noise schedule of Stable"):
            Sampler("unipc", steps, "ays", 0.0, diffusion)


@pytest.mark.parametrize("name", [name for name in THEIRS if name != "plms"])     # its rule is of noises here
@pytest.mark.parametrize("steps", [5, 16])
@torch.no_grad()
def test_networks_that_predict_v(name, steps):
    """Ours is fed the noise that v stands for, diffusers' scheduler v itself."""
    torch.manual_seed(0)
    unet = UNet(8, 3, 3, 32, (1, 2), 1, (4,)).eval()
    predicts_v = Diffusion("scaled_linear", 1000, 0.00085, 0.012, "v")
    x = noise()[:, :1].expand(-1, 3, -1, -1).repeat(1, 1, 2, 2)
    ours = Sampler(name, steps, "leading", 0.0, predicts_v).run(
        noise_predictor(unet, predicts_v, torch.float32, None), x)
    scheduler = THEIRS[name](prediction_type="v_prediction", **LEADING[name])
    scheduler.set_timesteps(steps)
    theirs = x
    for t in scheduler.timesteps:
        theirs = scheduler.step(unet(theirs, t.expand(len(x))), t, theirs).prev_sample
    assert apart(ours, theirs) < 1e-4 and apart(ours, x) > 0.1


@pytest.mark.parametrize(("steps", "spacing"), [(61, "trailing"), (999, "leading")])
@pytest.mark.parametrize("name", MULTISTEP)
def test_timesteps_that_diffusers_gets_wrong_are_refused(name, steps, spacing):
    """It makes 62 steps, down to timestep -1, of 61 trailing ones; 999 leading ones begin at 1000."""
    with pytest.raises(ValueError, match=rf"{name} cannot take {steps} {spacing} timesteps of 1000.*(to -1|from 1000)"):
        Sampler(name, steps, spacing, 0.0, DIFFUSION)
    assert Sampler(name, steps - 1, spacing, 0.0, DIFFUSION).calls == steps - 1


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
    if name not in MULTISTEP:
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
    noisy = name == "deis" or (spacing == "leading" and name not in MULTISTEP)
    end = alphas[0] if noisy else torch.tensor(1.0)
    assert times[0] == first
    assert (x - (end ** 0.5 * x0 + (1 - end) ** 0.5 * eps)).abs().max() < 1e-4


@pytest.mark.parametrize(("settings", "word"), [
    (("euler", 5, "leading", 0.0), "euler"), (("plms", 5, "leading", 1.0), "eta"), (("plms", 5, "quad", 0.0), "quad"),
    (("plms", 0, "leading", 0.0), "1 to 999"), (("dpmpp", 1000, "leading", 0.0), "1 to 999"),
    (("plms", 7, "trailing", 0.0), "divides 1000"), (("plms", 5, "linspace", 0.0), "linspace"),
    (("ddim", 5, "linspace", 0.0), "linspace"), (("ddim", 5, "leading", 2.0), "eta"),
    (("dpmpp", 5, "uniform", 0.0), "dpmpp takes timesteps leading, linspace, trailing, karras, ays, or a list, got "
                                   "'uniform'"),
    (("unipc", 5, "quad", 0.0), "unipc takes"), (("deis", 5, "leading", 0.5), "deis is deterministic: eta is for ddim"),
    (("plms", 5, "uniform", 0.0), "plms takes timesteps leading or trailing, got 'uniform'")])
def test_settings_that_do_not_go_together(settings, word):
    with pytest.raises(ValueError, match=word):
        Sampler(*settings, DIFFUSION)


def test_a_config_of_other_timesteps_gets_stable_diffusions():
    assert [timesteps_for(name, "quad") for name in SAMPLERS] == ["quad", *["leading"] * (len(SAMPLERS) - 1)]
    assert [timesteps_for(name, "trailing") for name in SAMPLERS] == ["trailing"] * len(SAMPLERS)
