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
from unet_caching.samplers.samplers import SAMPLERS, Sampler, noise_predictor, timesteps_for
from unet_caching.samplers.solvers import SOLVERS
from unet_caching.samplers.table import Table, table_of

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
    for step, t in enumerate(scheduler.timesteps):
        x = scheduler.step(curved(scheduler.scale_model_input(x, t), t.item(), step), t, x).prev_sample
    return x


# As a user of diffusers makes them; what is not said is diffusers' default.
THEIRS = {
    "ddim": lambda **more: DDIMScheduler(**BETAS, clip_sample=False, **more),
    "plms": lambda **more: PNDMScheduler(**BETAS, skip_prk_steps=True, **more),
    "dpmpp": lambda **more: DPMSolverMultistepScheduler(**BETAS, **more),
    "unipc": lambda **more: UniPCMultistepScheduler(**BETAS, **more),
    "dpmpp3": lambda **more: DPMSolverMultistepScheduler(**BETAS, solver_order=3, **more),
    "deis": lambda **more: DEISMultistepScheduler(**BETAS, solver_order=3, **more)}
TOLERANCE = dict.fromkeys(THEIRS, 1e-5) | {"deis": 3e-5}       # differences of logarithms lose digits
MULTISTEP = [name for name in THEIRS if "linspace" in SOLVERS[name].spacings]
LISTED = [name for name in THEIRS if name != "plms"]


def theirs(name, spacing, **more):
    """diffusers' scheduler of a spacing. DDIM and PLMS end on a clean image where timesteps trail, else on noise."""
    more |= {} if name in MULTISTEP else {"set_alpha_to_one": spacing == "trailing"}
    more |= {"steps_offset": 1} if spacing == "leading" else {}
    return THEIRS[name](timestep_spacing=spacing, **more)


def apart(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize(("name", "spacing", "steps"), [
    (name, spacing, steps) for name in SAMPLERS for spacing, numbers in (
        ("leading", (1, 3, 30)), ("trailing", (10,)), ("linspace", (7,)))
    for steps in numbers if spacing in SOLVERS[name].spacings])
def test_they_are_diffusers_loops(name, spacing, steps):
    sampler, called, done = Sampler(name, steps, spacing, 0.0, DIFFUSION), [], []

    def predict(x, t, step):
        called.append(step)
        return curved(x, t, step)

    expected = by_diffusers(theirs(name, spacing), steps)
    assert apart(sampler.run(predict, noise(), progress=done.append), expected) < TOLERANCE[name]
    calls = steps + (name == "plms" and steps > 1)
    assert called == list(range(calls)) and sampler.calls == calls
    assert done == [(call + 1) / calls for call in range(calls)]


LIST = "999,940,850,700,500,280,110,30"


@pytest.mark.parametrize("name", ["dpmpp", "dpmpp3"])
def test_listed_timesteps_are_diffusers(name):
    """Its DPM-Solver++ takes a list itself."""
    scheduler = THEIRS[name]()
    own, scheduler.set_timesteps = scheduler.set_timesteps, lambda steps: own(timesteps=list(map(int, LIST.split(","))))
    expected = by_diffusers(scheduler, 8)
    assert apart(Sampler(name, 8, LIST, 0.0, DIFFUSION).run(curved, noise()), expected) < 1e-5


@pytest.mark.parametrize(("listed", "steps", "message"), [
    ("999,500", 3, "3 steps, but 2 timesteps are listed"), ("500,999", 2, "must fall"), ("500,500", 2, "must fall"),
    ("1000,3", 2, "from 999 at most"), ("999.5,3", 2, "from 999 at most"), ("999,.5", 2, "is like 999,750"),
    ("999,x", 2, "is like 999,750"), ("999,", 2, "is like 999,750")])
def test_lists_that_cannot_be(listed, steps, message):
    for name in ("ddim", "unipc"):
        with pytest.raises(ValueError, match=message):
            Sampler(name, steps, listed, 0.0, DIFFUSION)


FRACTIONS = "999,940.5,850.25,700,500.75,280.5,110.125,30"


@pytest.mark.parametrize("name", LISTED)
def test_timesteps_may_be_listed_and_be_fractions(name):
    """Between two timesteps log-SNR is a line: a list half way in it is half way in images, to second order."""
    def images(by):
        listed = ",".join(f"{t - by:g}" if t < 999 else "999" for t in map(int, LIST.split(",")))
        return Sampler(name, 8, listed, 0.0, DIFFUSION).run(curved, noise())

    assert Sampler(name, 8, FRACTIONS, 0.0, DIFFUSION).call_timesteps() == [float(t) for t in FRACTIONS.split(",")]
    assert apart(images(0.5), (images(0) + images(1)) / 2) < 0.2 * apart(images(0.5), images(0))
    named = Sampler(name, 8, "trailing", 0.0, DIFFUSION)
    as_list = Sampler(name, 8, ",".join(map(str, named.call_timesteps())), 0.0, DIFFUSION)
    assert torch.equal(as_list.run(curved, noise()), named.run(curved, noise()))


@pytest.mark.parametrize(("name", "spacing", "steps", "diffusion"), [
    ("ddim", "trailing", 20, DIFFUSION), *((name, *run) for name in MULTISTEP for run in (
        ("trailing", 1, DIFFUSION), ("trailing", 20, Diffusion("cosine")), ("karras", 9, Diffusion("cosine")),
        (FRACTIONS, 8, DIFFUSION)))])
def test_a_table_is_its_solver(name, spacing, steps, diffusion):
    timesteps, table = table_of(name, steps, spacing, diffusion)
    expected = Sampler(name, steps, spacing, 0.0, diffusion).run(curved, noise())
    ours = Sampler(name, steps, ",".join(map(str, timesteps)), 0.0, diffusion, table)
    assert apart(ours.run(curved, noise()), expected) < 5e-6 and ours.call_timesteps() == timesteps


def test_tables_that_cannot_be():
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
        with pytest.raises(ValueError, match="ays are 10 timesteps for the noise schedule of Stable"):
            Sampler("unipc", steps, "ays", 0.0, diffusion)


@pytest.mark.parametrize("name", LISTED)       # the rule of PLMS is of noises here
@torch.no_grad()
def test_networks_that_predict_v(name):
    """Ours is fed the noise that v stands for, diffusers' scheduler v itself."""
    torch.manual_seed(0)
    unet = UNet(8, 3, 3, 32, (1, 2), 1, (4,)).eval()
    predicts_v = Diffusion("scaled_linear", 1000, 0.00085, 0.012, "v")
    x = noise()[:, :1].expand(-1, 3, -1, -1).repeat(1, 1, 2, 2)
    ours = Sampler(name, 16, "leading", 0.0, predicts_v).run(
        noise_predictor(unet, predicts_v, torch.float32, None), x)
    scheduler, expected = theirs(name, "leading", prediction_type="v_prediction"), x
    scheduler.set_timesteps(16)
    for t in scheduler.timesteps:
        expected = scheduler.step(unet(expected, t.expand(len(x))), t, expected).prev_sample
    assert apart(ours, expected) < 1e-4 and apart(ours, x) > 0.1


@pytest.mark.parametrize(("name", "steps", "spacing"), [("dpmpp", 61, "trailing"), ("unipc", 999, "leading")])
def test_timesteps_that_diffusers_gets_wrong_are_refused(name, steps, spacing):
    """It makes 62 steps, down to timestep -1, of 61 trailing ones; 999 leading ones begin at 1000."""
    with pytest.raises(ValueError, match=rf"{name} cannot take {steps} {spacing} timesteps of 1000.*(to -1|from 1000)"):
        Sampler(name, steps, spacing, 0.0, DIFFUSION)
    assert Sampler(name, steps - 1, spacing, 0.0, DIFFUSION).calls == steps - 1


@pytest.mark.parametrize(("settings", "word"), [
    (("euler", 5, "leading", 0.0), "euler"), (("plms", 0, "leading", 0.0), "1 to 999"),
    (("dpmpp", 1000, "leading", 0.0), "1 to 999"), (("plms", 7, "trailing", 0.0), "divides 1000"),
    (("ddim", 5, "linspace", 0.0), "linspace"), (("ddim", 5, "leading", 2.0), "eta"),
    (("dpmpp", 5, "uniform", 0.0), "dpmpp takes timesteps leading, linspace, trailing, karras, ays, or a list, got "
                                   "'uniform'"),
    (("deis", 5, "leading", 0.5), "deis is deterministic: eta is for ddim"),
    (("plms", 2, "999,500", 0.0), "plms takes timesteps leading or trailing, got '999,500'")])
def test_settings_that_do_not_go_together(settings, word):
    with pytest.raises(ValueError, match=word):
        Sampler(*settings, DIFFUSION)


def test_a_config_of_other_timesteps_gets_stable_diffusions():
    assert [timesteps_for(name, "quad") for name in SAMPLERS] == ["quad", *["leading"] * (len(SAMPLERS) - 1)]
    assert [timesteps_for(name, "trailing") for name in SAMPLERS] == ["trailing"] * len(SAMPLERS)
