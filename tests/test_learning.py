"""Learning a run through its sampler: gradients, what is learned, and how it goes on, on a network of a few weights."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import TINY_UNET, relative_error, run_command, tiny_ddpm
from sd_pipelines import SIZE, build, save_plan
from torch import nn

from eval.cost.runs import macs_per_image
from lab.plans import __main__ as plans
from lab.plans.plans import bound_plan
from run.image_model import open_model
from run.machine import Machine
from run.spec import RunSpec
from unet_caching.errors import UserError
from unet_caching.learning import Learned, Learner, Learning, Recomputed, Solved
from unet_caching.methods.plan import Call, Plan, PlanCache
from unet_caching.nest import nest, no_cache
from unet_caching.pipelines.enable import enable_deepcache
from unet_caching.pipelines.learn import learn_plan
from unet_caching.pipelines.scheduler import plan_scheduler
from unet_caching.samplers.diffusion import Diffusion, alpha_at, predicted_noise
from unet_caching.samplers.noise import SeededNoise
from unet_caching.samplers.table import table_of

CPU = Machine(batch_size=4, device="cpu", threads=1)
DIFFUSION = Diffusion("scaled_linear", 1000, 0.00085, 0.012, "v")
SCHEDULE = "beta_schedule: scaled_linear\n  beta_start: 0.00085\n  beta_end: 0.012\n  prediction: v"
ALPHAS = DIFFUSION.alphas_cumprod()
LISTED = "999,930.5,850.75,700.25,500.5,280.5,110.125,30.5"
# Two levels, reused, forecast by both orders, and refreshed in turns.
CALLS = (Call(), Call(), Call(0, (0.9,)), Call(), Call(1, (0.8, 0.3)), Call(0, (1.0, 0.2)), Call(), Call(0))


class Tiny(nn.Module):
    """A nest of two levels in float64, smooth in all that it is given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down, self.up = (nn.ModuleList(nn.Conv2d(channels, 3, 3, padding=1) for channels in (n, n))
                              for n in (3, 6))
        self.double().requires_grad_(False)
        self.forwards = 0

    def forward(self, x, t, cache=no_cache):
        self.forwards += 1
        time = torch.stack([(t / 90).sin(), (t / 200).cos(), t / 999], dim=1)[:, :, None, None]
        down = [lambda x, conv=conv: torch.tanh(conv(x) + time) for conv in self.down]
        up = [lambda inner, skip, size, conv=conv: skip + torch.tanh(conv(torch.cat([inner, skip], 1)))
              for conv in self.up]
        return nest(x, down, torch.sin, up, cache)


@pytest.fixture(scope="module")
def network():
    return Tiny()


def starting(network):
    """What a learner starts runs by: x_T of each seed, and what predicts its noise."""
    def start(seeds, policy):
        def predict(x, t, step):
            v = network(x, torch.as_tensor(t).double().expand(len(x)), cache=policy.at(step))
            return predicted_noise("v", v, x, alpha_at(ALPHAS.double(), t))
        return predict, SeededNoise(seeds, dtype=torch.float64)((3, 4, 4))
    return start


def solved(calls=CALLS, listed=LISTED):
    timesteps, table = table_of("unipc", len(calls), listed, DIFFUSION)
    return Solved(tuple(timesteps), table, tuple(calls))


def sampled(network, run, seeds):
    predict, x = starting(network)(seeds, PlanCache(run.calls))
    return run.table.sample(predict, x, run.timesteps, ALPHAS)


def converged(network):
    """The images of many steps, by seed."""
    timesteps, table = table_of("unipc", 40, "trailing", DIFFUSION)

    def of(seeds):
        return sampled(network, Solved(tuple(timesteps), table, (Call(),) * 40), seeds)
    return of


# Gradients

def test_a_run_that_nothing_is_added_to_is_the_run(network):
    learned = Learned(solved())
    found, _ = learned.sample(starting(network), [0, 1], ALPHAS)
    assert torch.allclose(found, sampled(network, solved(), [0, 1]), rtol=1e-6)
    assert learned.values() == solved()


@pytest.mark.parametrize("last", [None, 2])
def test_gradients_are_those_of_small_differences(network, last):
    """Through full, cached and forecast calls, whose activations are computed a second time for them."""
    learned, start = Learned(solved(), last), starting(Recomputed(network))
    _, clean = learned.sample(starting(network), [5], ALPHAS)
    rows = torch.stack(clean).flatten(1)
    learned.orient((rows @ rows.T / rows.shape[1]).detach())
    target = converged(network)([0, 1])

    def loss():
        return (learned.sample(start, [0, 1], ALPHAS)[0] - target).square().flatten(1).mean(1).log10().mean()

    before = network.forwards
    loss().backward()
    assert network.forwards - before == 2 * len(CALLS)
    places = {"q": [(7, 0), (7, 1), (4, 1), (1, 1)], "times": [(1,), (4,), (7,)],
              "damping": [(2, 0), (4, 0), (4, 1), (5, 1)]}
    for name, parameter in learned.named_parameters():
        for place in places[name]:
            values = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    parameter[place] += step
                    values.append(loss())
                    parameter[place] -= step
            expected = (values[0] - values[1]).item() / 2e-5
            assert parameter.grad[place].item() == pytest.approx(expected, rel=1e-4, abs=1e-8), (name, place)
            assert expected != 0
    assert learned.damping.grad[:2].abs().max() == learned.damping.grad[3].abs().max() == 0     # nothing is forecast


def test_timesteps_keep_their_order():
    learned = Learned(solved())
    with torch.no_grad():
        learned.times.copy_(torch.tensor([5.0, -99, 99, -99, 99, -99, 99, -99]))
    learned.keep_order()
    timesteps = learned.values().timesteps
    assert timesteps[0] == 999 and timesteps[-1] == 0 and list(timesteps) == sorted(set(timesteps), reverse=True)


# Learning

OPTIONS = Learning(iterations=12, batch_size=4, judged_every=4, warmup=2)


def learner(network, folder, run=None, options=OPTIONS, **more):
    return Learner(run or solved(), starting(Recomputed(network)), ALPHAS, converged(network), range(8),
                   range(100, 104), options, folder / "run.state", **more)


def test_it_comes_nearer_and_goes_on_after_a_kill(network, tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    whole = learner(network, tmp_path / "whole").learn()
    assert whole.iteration == max(whole.judged, key=whole.judged.get) > 0 == whole.judged[0]
    assert whole.judged[whole.iteration] > 0.3 and list(whole.judged) == [0, 4, 8, 12]
    error = [(sampled(network, run, range(200, 208)) - converged(network)(range(200, 208))).square().mean()
             for run in (solved(), whole.run)]
    assert error[1] < error[0]

    for kill_at in (3, 5):                      # in iterations, one right after judging
        one = learner(network, tmp_path)
        plain = one._save
        monkeypatch.setattr(one, "_save", lambda one=one, plain=plain, kill_at=kill_at: (
            plain(), one.iteration == kill_at and exec("raise KeyboardInterrupt")))
        with pytest.raises(KeyboardInterrupt):
            one.learn()
    assert learner(network, tmp_path).learn() == whole == learner(network, tmp_path).learn()
    with pytest.raises(ValueError, match=r"run\.state was learned with other settings"):
        learner(network, tmp_path, options=replace(OPTIONS, lr=1.0))


def test_where_learning_harms_the_run_stays_as_it_was(network, tmp_path):
    outcome = learner(network, tmp_path, options=replace(OPTIONS, lr=1e4, iterations=4)).learn()
    assert outcome.iteration == 0 and outcome.run == solved() and outcome.judged[4] < 0


# Plans that were learned

@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tiny_ddpm(tmp_path_factory.mktemp("tiny"), TINY_UNET, steps=8)
    path.write_text(path.read_text().replace("beta_schedule: linear", SCHEDULE))
    return path


def plan_file(config, path, solver=None, calls=CALLS, timesteps=LISTED):
    run = RunSpec.of(config, sampler="unipc", steps=len(calls), timesteps=timesteps).open()
    replace(bound_plan(run, None, calls, None, {"budget": len(calls)}), solver=solver).save(path)
    return path


def latents(config, **options):
    run = RunSpec.of(config, **options).open()
    model = open_model(run, CPU)
    model.load()
    return model.latents([0, 1], model.policy())


def test_a_plan_with_the_table_of_its_sampler_gives_its_images(config, tmp_path):
    _, table = table_of("unipc", 8, LISTED, DIFFUSION)
    own, by_table = plan_file(config, tmp_path / "own.json"), plan_file(config, tmp_path / "table.json", table)
    assert relative_error(latents(config, plan=by_table), latents(config, plan=own)) < 1e-5
    other = replace(table, p=(0.99, *table.p[1:]))
    changed = plan_file(config, tmp_path / "changed.json", other)
    assert relative_error(latents(config, plan=changed), latents(config, plan=own)) > 1e-3
    run = RunSpec.of(config, plan=changed).open()
    assert Plan.load(changed).solver == other == run.sampler.table
    assert "a learned plan of" in run.caching.methods[0].summary
    assert macs_per_image(run) == macs_per_image(RunSpec.of(config, plan=own).open())
    for options, words in (({"sampler": "ddim"}, "sampler unipc there, ddim here"), ({"timesteps": "trailing"},
                           "timesteps 999,"), ({"steps": 3}, "3 steps, but 8 timesteps")):
        with pytest.raises(UserError, match=words):
            one = RunSpec.of(config, plan=changed, **options).open()
            one.refuse_foreign(one.settings)


@pytest.mark.parametrize(("change", "words"), [
    (lambda c: c["values"]["solver"]["q"].pop(), "a solver of 8 network calls"),
    (lambda c: c["values"]["solver"]["p"].__setitem__(0, "1"), r"solver\.p\[0\] is '1' and should be a finite number"),
    (lambda c: c["values"]["solver"].pop("p"), "solver has no p"),
    (lambda c: c["made_for"].update(timesteps="trailing"), "a solver goes with a list of timesteps, not with trailing"),
    (lambda c: c["values"]["solver"]["p"].__setitem__(0, 0.5), "has been changed")])
def test_damaged_solvers_are_refused_in_one_line(config, tmp_path, change, words):
    path = plan_file(config, tmp_path / "plan.json", table_of("unipc", 8, LISTED, DIFFUSION)[1])
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words) as raised:
        Plan.load(path)
    assert "plan.json" in str(raised.value) and "\n" not in str(raised.value)


def test_the_command_learns_plans_and_steps_without_caching(config, tmp_path, capsys):
    words = ["learn", "--config", config, "--plan", plan_file(config, tmp_path / "found.json"), "--calls", 3, "--seeds",
             "0-7", "--held-out-seeds", "10-13", "--report-seeds", "20-23", "--iterations", 2, "--batch-size", 8,
             "--converged-steps", 10, "--device", "cpu", "--work", tmp_path / "work", "--out"]
    assert run_command(plans.main, *words, tmp_path / "one") == 0
    said = capsys.readouterr().out
    made = {name: Plan.load(tmp_path / "one" / f"{name}.json") for name in ("found", "ddpm_tiny_3_steps")}
    for plan in made.values():
        assert plan.notes["learned"]["iteration"] == 2 and plan.notes["learned"]["learnt_on"] == "0-7"
        assert f"{plan.notes['gain']['mean']:+.2f}" in said and plan.notes["distance"]["seeds"] == "20-23"
        assert plan.solver and plan.made_for["timesteps"].startswith("999,") and "." in plan.made_for["timesteps"]
    assert made["found"].notes["learned_from"] == Plan.load(tmp_path / "found.json").sha256
    assert [call.branch for call in made["found"].calls] == [call.branch for call in CALLS]
    assert made["ddpm_tiny_3_steps"].calls == [Call()] * 3 and made["ddpm_tiny_3_steps"].cost == 3

    before = {name: (tmp_path / "one" / f"{name}.json").read_text() for name in made}
    assert run_command(plans.main, *words, tmp_path / "one") == 0               # from what it has kept
    assert before == {name: (tmp_path / "one" / f"{name}.json").read_text() for name in made}
    fresh = [tmp_path / "other" if word == tmp_path / "work" else word for word in words]
    assert run_command(plans.main, *fresh, tmp_path / "kept", "--keep-activations") == 0
    assert before == {name: (tmp_path / "kept" / f"{name}.json").read_text() for name in made}
    assert run_command(plans.main, *words[:3], *words[7:], tmp_path / "no") == 2
    assert "name what to learn: --plan" in capsys.readouterr().err
    words[4] = tmp_path / "one/found.json"
    words[words.index("0-7")], words[words.index("20-23")] = "30-37", "6-9"
    assert run_command(plans.main, *words, tmp_path / "no") == 2
    assert "was found on seeds 0-7,10-13, and the report would use 6-7 of them" in capsys.readouterr().err


# In a pipeline of diffusers

def test_a_pipeline_learns_a_plan(parts, tmp_path):
    pipe = build(parts)
    pipe.unet.requires_grad_(True)
    own, out = pipe.scheduler, tmp_path / "learned.json"
    path = save_plan(tmp_path / "plan.json", CALLS, steps=8, timesteps=LISTED)
    how = Learning(iterations=2, batch_size=2, judged_every=1)
    asked = dict(seeds=range(4), held_out=range(10, 12), options=how, converged_steps=10, guidance_scale=3.0,
                 height=SIZE, width=SIZE)
    made = learn_plan(pipe, path, ["a", "b"], out=out, **asked)
    assert pipe.scheduler is own and all(weight.requires_grad for weight in pipe.unet.parameters())
    assert made == Plan.load(out) and made.solver and made.notes["learned"]["chosen by, dB"] > 0
    counted = []
    pipe.unet.register_forward_pre_hook(lambda *_: counted.append(1))
    assert learn_plan(pipe, path, ["a", "b"], out=out, **asked) == made and not counted     # it had come to its end

    def image(plan):
        pipe.scheduler = plan_scheduler(plan, own)
        with enable_deepcache(pipe, plan=plan):
            return pipe("b", num_inference_steps=8, guidance_scale=3.0, height=SIZE, width=SIZE, output_type="latent",
                        generator=torch.Generator().manual_seed(1)).images

    converged = torch.load(next(tmp_path.glob("*.converged")), weights_only=True)[1]
    assert (image(out) - converged).norm() < (image(path) - converged).norm()

    pipe.unet.half()
    with pytest.raises(UserError, match=r"learned in float32, but pipe\.unet is in torch\.float16"):
        learn_plan(pipe, path, ["a"], out=out, **asked)
