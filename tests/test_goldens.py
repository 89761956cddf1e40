"""Each U-Net, its cache and its samplers against the outputs of the authors' released code (tests/goldens/README.md).

Stable Diffusion's against those of the PyPI package DeepCache too, a helper for diffusers pipelines, whose branch
numbers are ours. Runs of LDM are in test_ldm_sample.py.
"""

import json
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from conftest import HERE, Golden, relative_error
from test_ldm import SMALL, TOLERANCE

import ddpm.checkpoint
import ddpm.unet
import ldm.checkpoint
import ldm.unet
import stable_diffusion.checkpoint
import stable_diffusion.unet
from ldm.diffusers_layout import differences
from stable_diffusion.config import Diffusion as StableDiffusion
from unet_caching.methods.deepcache import DeepCache
from unet_caching.samplers.diffusion import Diffusion, guided
from unet_caching.samplers.solvers import SOLVERS, ddim
from unet_caching.samplers.timesteps import offset_timesteps, quadratic_timesteps, uniform_timesteps
from unet_caching.schedules import centered, uniform

RUNS = {name: json.loads((HERE / "goldens" / f"{name}.json").read_text())[name]["runs"]
        for name in ("ddpm_small", "sd_small")}
SD = {"in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1, 2, 2], "num_res_blocks": 2,
      "attention_resolutions": [2, 1], "num_heads": 8, "context_dim": 32}


class Case(NamedTuple):
    """names: for each branch, those of the feature and of a cached step's output."""
    unet: Any
    io: dict[str, torch.Tensor]
    names: dict[int, tuple[str, str]]


@cache
def case(name: str) -> Case:
    golden = Golden(name)
    if name == "ddpm_small":
        model = golden.manifest["config"]["model"]
        unet = ddpm.unet.UNet(16, model["in_channels"], model["out_ch"], model["ch"], model["ch_mult"],
                              model["num_res_blocks"], model["attn_resolutions"])
        ddpm.checkpoint.load_state_dict(unet, golden.weights)
        names = {branch + 1: (f"cached.branch{branch}", f"out_retrieve.branch{branch}") for branch in range(8)}
    elif name == "ldm_small":
        unet = ldm.unet.UNet(**vars(SMALL.unet))
        ldm.checkpoint.load_state_dict(unet, {key: value for key, value in golden.weights.items()
                                              if key.startswith(ldm.checkpoint.UNET)})
        names = {branch: (f"cached.skip{branch}", f"out_retrieve{'_derived' * (branch > 0)}.skip{branch}")
                 for branch in range(9)}
    else:
        assert not differences(golden.manifest["config"], SD)
        unet = stable_diffusion.unet.UNet(**SD)
        stable_diffusion.checkpoint.load_state_dict(unet, golden.weights)
        names = {3 * layer + block + 1: (f"cached.layer{layer}.block{block}", f"out_retrieve.layer{layer}.block{block}")
                 for layer, block in golden.manifest["valid_layer_block"]}
    return Case(unet.eval(), golden.io, names)


@pytest.mark.parametrize("name", ["ddpm_small", "ldm_small", "sd_small"])
@torch.no_grad()
def test_full_and_cached_forwards_at_every_branch(name):
    unet, io, names = case(name)
    context = [io["fwd.context"]] if "fwd.context" in io else []
    full = io["fwd.x_full"], io["fwd.t_full"].expand(2), *context
    retrieve = io["fwd.x_retrieve"], io["fwd.t_retrieve"].expand(2), *context
    assert relative_error(unet(*full), io["fwd.out_full"]) < TOLERANCE
    assert relative_error(unet(*retrieve), io["fwd.out_full_at_retrieve_input"]) < TOLERANCE
    for branch, (feature, out) in names.items():
        policy = DeepCache(branch, full_steps=[0])
        unet(*full, policy.at(0))
        assert relative_error(policy.feature, io[f"fwd.{feature}"]) < TOLERANCE, branch
        assert relative_error(unet(*retrieve, policy.at(1)), io[f"fwd.{out}"]) < TOLERANCE, branch


def assert_states(states: list[torch.Tensor], golden: torch.Tensor) -> None:
    for state, expected in zip(states[-len(golden):], golden, strict=True):
        assert relative_error(state, expected) < TOLERANCE


@pytest.mark.parametrize("run", RUNS["ddpm_small"], ids=lambda run: run["name"])
def test_runs_of_ddpm(run):
    (unet, io, _), steps, interval, states = case("ddpm_small"), run["steps"], run["N"], []
    timesteps = (quadratic_timesteps if ".quad." in run["name"] else uniform_timesteps)(steps)
    assert timesteps == run["timesteps"]
    full_steps = centered(steps, interval, run["center"], run["pow"]) if run.get("non_uniform") \
        else uniform(steps, interval)
    assert [int(step in full_steps) for step in range(steps)] == run["full_mask"]
    policy = DeepCache(run["branch"] + 1, full_steps)
    ddim(lambda x, t, step: unet(x, torch.full((len(x),), float(t)), policy.at(step)), io["traj.x_T"],
         timesteps, Diffusion("linear").alphas_cumprod(), progress=lambda step, x: states.append(x))
    assert len(states) == steps
    assert_states(states, io[f"{run['name']}.xs"][1:])


@pytest.mark.parametrize("run", RUNS["sd_small"], ids=lambda run: run["name"])
def test_runs_of_stable_diffusion(run):
    (unet, io, _), steps, interval, mask = case("sd_small"), run["steps"], run["N"], run["full_mask"]
    full_steps = [call for call, full in enumerate(mask) if full]
    if run["impl"] == "upstream pipeline":      # its schedule is ours: of `steps`, by the number of the network call
        own = centered(steps, interval, run["center"], run["pow"]) if run.get("uniform") is False \
            else uniform(steps, interval)
        assert full_steps == own if interval > 1 else all(mask)
        branch = 3 * run["layer"] + run["block"] + 1 if interval > 1 else 0
    else:
        branch = run["branch"]

    diffusion, guidance = StableDiffusion(), run["guidance"]
    context = io["traj.prompt_embeds"] if guidance == 1 else \
        torch.cat([io["traj.negative_prompt_embeds"], io["traj.prompt_embeds"]])
    policy, called, states = DeepCache(branch, full_steps), [], []

    def predict(x, t, step):
        called.append(t)
        x = x if guidance == 1 else torch.cat([x, x])
        output = unet(x, torch.full((len(x),), t), context, policy.at(step))
        return output if guidance == 1 else guided(output, guidance)

    if run["scheduler"] == "ddim":
        alphas = diffusion.alphas_cumprod()
        ddim(predict, io["traj.latents"], offset_timesteps(steps), alphas, final_alpha=alphas[0].item(),
             progress=lambda step, x: states.append(x))
    else:
        SOLVERS["plms"].run(predict, io["traj.latents"], steps, "leading", diffusion,
                            progress=lambda step, x: states.append(x))
    assert called == run.get("timesteps", called) and len(called) == len(mask)
    assert_states(states, io[f"{run['name']}.latents"])
