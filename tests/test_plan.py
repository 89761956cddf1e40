"""Plans: what each network call computes, as a policy, as a file and as an option of every command."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY_UNET, run_command
from peft import LoraConfig
from test_forecast import CALLS, UNEVEN, Plain, sample
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ddpm.unet import UNet as PixelUNet
from eval.cost.runs import call_macs, costs_of, macs_per_image
from lab.plans.__main__ import main as plans_main
from lab.plans.candidates import deepcache_calls
from run.families import build, example_inputs
from run.seeds import parse_seeds
from run.spec import RunSpec
from unet_caching.errors import UserError
from unet_caching.files.fitted import fingerprint
from unet_caching.methods.deepcache import DeepCache
from unet_caching.methods.plan import SAMPLING, Call, Plan, PlanCache, PlanOptions
from unet_caching.options import RunShape
from unet_caching.registry import bind, options_by_name
from unet_caching.samplers.table import table_of

# All depths, in an order in which levels go stale while others are refreshed.
MIXED = [Call(), Call(1), Call(2, (1.0,)), Call(0), Call(), Call(1, (1.0,)), Call(0, (0.5,)), Call(2, (1.0,)),
         Call(0, (1.0, 1.0)), Call(1, (1.0,)), Call(3), Call(0), Call(), Call(0, (1.0,)), Call(2), Call(1, (0.7,))]


@pytest.mark.parametrize(("branch", "order"), [(0, 0), (1, 1), (3, 2)])
def test_the_papers_schedules_as_plans(latent_unet, branch, order):
    ours = PlanCache(deepcache_calls(branch, UNEVEN, CALLS, order, 0.9))
    assert torch.equal(sample(latent_unet, ours), sample(latent_unet, DeepCache(branch, UNEVEN, order, 0.9)))
    assert len(ours.kept) == 1 + order + (order > 0)


def test_a_plan_that_computes_everything_is_no_cache(latent_unet):
    policy = PlanCache([Call()] * CALLS)
    assert torch.equal(sample(latent_unet, policy), sample(latent_unet, None))
    assert policy.kept == {} and not policy.owns(0)


def test_which_call_refreshes_which_level():
    """Each level's feature is its number + the call that computed it / 100: what is seen tells when that was."""
    policy = PlanCache([Call(), Call(2), Call(1), Call(0), Call(1), Call(2), Call(0)])
    seen = []
    for step in range(7):
        policy.at(step)
        for level in range(3):
            made = []
            value = policy(level, lambda level=level, made=made: made.append(1) or torch.tensor(level + step / 100))
            if not made:
                seen.append(value.item())
                break                               # what lies inside is not asked for
    assert seen == pytest.approx([2.00, 1.01, 0.02, 1.01, 2.00, 0.05])


def test_depths_mixed_over_a_run(latent_unet):
    expected, policy = sample(latent_unet, Plain(MIXED)), PlanCache(MIXED)
    first = sample(latent_unet, policy)
    assert torch.allclose(first, expected, atol=1e-5 * expected.abs().max().item())
    policy.reset()
    assert policy.kept == {}
    for _ in range(2):                                  # a run that begins at call 0 again needs no reset
        assert torch.equal(sample(latent_unet, policy), first)


@pytest.mark.parametrize(("calls", "words"), [
    ([], "at least one"), ([Call(0)], "call 0 .* must compute everything"), ([Call(), Call(-1)], "call 1 .* 0 or more"),
    ([Call(), Call(None, (1.0,))], "call 1 .* nothing to forecast"), ([Call(), Call(0, (float("inf"),))], "finite")])
def test_what_is_no_plan(calls, words):
    with pytest.raises(ValueError, match=words):
        PlanCache(calls)


def test_calls_that_cannot_be(latent_unet):
    with pytest.raises(RuntimeError, match="call 1 is to reuse the level at branch 9"):
        sample(latent_unet, PlanCache([Call(), Call(9)]))
    with pytest.raises(RuntimeError, match="2 network calls, and none for call 2"):
        sample(latent_unet, PlanCache([Call()] * 2))


# Files

def made(config, calls=MIXED) -> Plan:
    """A plan for the tiny model, with what it costs."""
    spec = RunSpec.of(config, sampler="dpmpp", steps=len(calls), timesteps="trailing").open()
    costs = costs_of(spec)
    known = [Call() if (call.branch or 0) >= spec.unet.num_branches else call for call in calls]
    of_calls = costs.calls(PlanCache(known), len(calls))
    macs = {name: sum(getattr(one, name) for one in of_calls) for name in ("hook", "fc")}
    return Plan(json.loads(json.dumps(spec.made_for())), list(calls), None, macs, costs.full._asdict())


@pytest.fixture
def file(config, tmp_path):
    path = tmp_path / "best.json"
    made(config).save(path)
    return path


def test_a_file_comes_back(config, file):
    found = Plan.load(file)
    assert found == made(config) and found.calls == MIXED
    assert 4 < found.cost < 16
    found.check({"model": "ddpm_tiny", "sampler": "dpmpp", "steps": 16, "guidance": 3.0, "checkpoint_sha256": "any"})


# In every door

def test_macs_are_those_of_a_real_run(config, file):
    """PyTorch's own counter over all calls, on the CPU, with attention as matrix products."""
    run = RunSpec.of(config, plan=file).open()
    network = PixelUNet(**TINY_UNET).eval()
    policy, x = run.caching.policy(), torch.zeros(1, 3, 8, 8)
    counted = []
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for step in range(run.calls):
            with FlopCounterMode(display=False) as counter:
                network(x, torch.zeros(1), cache=policy.at(step))
            counted.append(counter.get_total_flops() // 2)
    assert counted == [one.fc for one in call_macs(run)]
    assert macs_per_image(run)._asdict() == run.caching.methods[0].plan.macs
    assert run.full_calls == 3 and [sorted(keys) for keys in run.reused[:4]] == [[], [1], [2], [0]]


def test_a_plan_brings_its_sampler_and_is_refused_by_another(config, file):
    run = RunSpec.of(config, plan=str(file)).open()
    assert (run.sampler.name, run.steps, run.sampler.timesteps, run.calls) == ("dpmpp", 16, "trailing", 16)
    assert run.name == "plan_best_dpmpp_steps16_trailing"
    assert RunSpec.of(config, **run.spec.options).open().name == run.name
    with pytest.raises(UserError, match="steps 16 there, 12 here"):
        RunSpec.of(config, plan=file, steps=12).open()
    other = RunSpec.of(config, plan=file, sampler="unipc").open()
    with pytest.raises(UserError, match="sampler dpmpp there, unipc here"):
        other.refuse_foreign(other.brief)
    with pytest.raises(UserError, match=r"no plan .*nowhere\.json"):
        RunSpec.of(config, plan="nowhere.json").open()


@pytest.mark.parametrize(("options", "words"), [
    ({"interval": 3}, "leave out --interval"), ({"forecast": 1}, "leave out --forecast")])
def test_no_other_method_beside_a_plan(config, file, options, words):
    with pytest.raises(UserError, match=words):
        RunSpec.of(config, plan=file, **options).open()


def test_a_plan_of_a_bigger_network_is_refused(config, tmp_path):
    path = tmp_path / "big.json"
    made(config, [Call(), Call(5)]).save(path)
    with pytest.raises(ValueError, match="another model: it has branch 5, this model has branches 0 to 3"):
        bind(options_by_name({"plan": path}), RunShape(2, 2, 4, 1))
    assert isinstance(bind([PlanOptions(path)], RunShape(2, 2, 6, 1)).policy(), PlanCache)
    with pytest.raises(ValueError, match="has 2 network calls, this run makes 3"):
        bind([PlanOptions(path)], RunShape(2, 3, 6, 1))


@pytest.mark.parametrize("model", ["ddpm_emoji", "ldm_emoji", "sd_emoji"])
def test_a_network_has_one_fingerprint_in_every_layout(model):
    """In ours, on the meta device, and in diffusers', where adapters come on top."""
    run = RunSpec.of(model).open()
    x, _, *context = example_inputs(run.config)
    own = fingerprint(run.unet, x.shape[1], context[0].shape[-1] if context else None)
    theirs = run.family.theirs(run.config, build(run.config, "cpu"))

    def of(unet):
        return fingerprint(unet, unet.config.in_channels, getattr(unet.config, "cross_attention_dim", None))

    assert of(theirs) == own != fingerprint(run.unet, x.shape[1], 77)
    if context:
        theirs.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"]))
        assert of(theirs) == own


@pytest.mark.parametrize("file", sorted(Path("checkpoints/plans").glob("*.json")) + sorted(
    Path("checkpoints/plans/searched").glob("*.json")), ids=lambda file: file.stem)
def test_plans_that_are_shipped(file):
    """They belong to the weights beside them, cost what they say, and are within their budget."""
    found = Plan.load(file)
    run = RunSpec.of(found.made_for["model"], plan=file).open()
    assert found.made_for["checkpoint_sha256"] == run.family.checkpoint_sha256(run.checkpoint)
    run.refuse_foreign(run.brief)
    assert macs_per_image(run).hook == pytest.approx(found.macs["hook"] * run.rows_per_image)
    assert found.cost <= found.notes["budget"] + 1e-9 and found.notes["distance"]["interval"]
    used = {seed for said in (found.notes, found.notes.get("learned", {})) for key in ("learnt_on", "chosen_on")
            if key in said for seed in parse_seeds(said[key])}
    assert used and used.isdisjoint(parse_seeds(found.notes["distance"]["seeds"]))


# Another model's

PLAN_OF_LDM = "checkpoints/plans/ldm_emoji_18.json"


def test_a_plan_is_written_for_another_model(tmp_path):
    """It does the same there, at its own cost, and is for any weights and guidance of that model alone."""
    out = tmp_path / "plan.json"
    words = ("--plan", PLAN_OF_LDM, "--config", "configs/sd_v15.yaml", "--out", out)
    assert run_command(plans_main, "transfer", *words) == 0
    own, made = Plan.load(PLAN_OF_LDM), Plan.load(out)
    assert made.calls == own.calls and made.made_for["checkpoint_sha256"] is None and made.guidance is None
    assert made.notes["distance"] is None and made.notes["found_on"] == "ldm_emoji"
    run = RunSpec.of("configs/sd_v15.yaml", plan=out, prompt="a dog", guidance=9.0).open()
    assert (run.sampler.name, run.steps, run.sampler.timesteps) == tuple(own.made_for[key] for key in SAMPLING)
    assert [one / 2 for one in macs_per_image(run)] == list(made.macs.values()) and made.cost > own.cost
    run.refuse_foreign(run.settings | {"checkpoint_sha256": "any"})
    other = RunSpec.of("ldm_emoji", plan=out).open()
    with pytest.raises(UserError, match="model sd_v15 there, ldm_emoji here"):
        other.refuse_foreign(other.settings)


def test_a_plan_too_deep_for_a_model_is_not_written(tmp_path, capsys):
    deep = Plan.load(PLAN_OF_LDM)
    deep.calls[1] = Call(11)
    deep.save(tmp_path / "deep.json")
    words = ("--plan", tmp_path / "deep.json", "--config", "configs/sdxl.yaml", "--out", tmp_path / "plan.json")
    assert run_command(plans_main, "transfer", *words) == 2
    assert "branch 11, and sdxl has branches 0" in capsys.readouterr().err and not (tmp_path / "plan.json").exists()


def test_a_learned_solver_goes_to_models_of_the_same_noise_schedule(tmp_path, capsys):
    file, learned, out = Path("checkpoints/plans/sd_emoji_8.json"), tmp_path / "learned.json", tmp_path / "plan.json"
    found, run = Plan.load(file), RunSpec.of("sd_emoji", plan=file, prompt="a dog").open()
    _, table = table_of(*(found.made_for[key] for key in SAMPLING), run.config.diffusion)
    replace(found, solver=table).save(learned)
    words = ("transfer", "--plan", learned, "--out", out, "--config")
    assert run_command(plans_main, *words, "configs/ldm_cin256.yaml") == 2 and not out.exists()
    assert "the noise schedule of sd_emoji, which ldm_cin256 is not known to have" in capsys.readouterr().err
    assert run_command(plans_main, *words, "configs/sd_v15.yaml") == 0 and Plan.load(out).solver == table
