"""The DDPM U-Net, its cache and DDIM against the outputs of the authors' released code."""

import json

import pytest
import torch
from conftest import HERE, relative_error

from ddpm.checkpoint import load_state_dict
from ddpm.unet import UNet
from unet_caching.methods.deepcache import DeepCache
from unet_caching.samplers.diffusion import Diffusion
from unet_caching.samplers.solvers import ddim
from unet_caching.samplers.timesteps import quadratic_timesteps, uniform_timesteps
from unet_caching.schedules import centered, uniform

TOLERANCE = 2e-5        # of the largest magnitude; the authors' own noise floor is 3e-6


@pytest.fixture(scope="module")
def unet(ddpm_golden):
    model = ddpm_golden.manifest["config"]["model"]
    unet = UNet(16, model["in_channels"], model["out_ch"], model["ch"], model["ch_mult"], model["num_res_blocks"],
                model["attn_resolutions"]).eval()
    load_state_dict(unet, ddpm_golden.weights)
    return unet


@torch.no_grad()
def test_full_forward(unet, ddpm_golden):
    io = ddpm_golden.io
    assert relative_error(unet(io["fwd.x_full"], io["fwd.t_full"]), io["fwd.out_full"]) < TOLERANCE
    assert relative_error(unet(io["fwd.x_retrieve"], io["fwd.t_retrieve"]),
                          io["fwd.out_full_at_retrieve_input"]) < TOLERANCE


@pytest.mark.parametrize("released_branch", range(8))
@torch.no_grad()
def test_cached_forward_at_every_branch(unet, ddpm_golden, released_branch):
    io = ddpm_golden.io
    cache = DeepCache(branch=released_branch + 1, full_steps=[0])
    unet(io["fwd.x_full"], io["fwd.t_full"], cache.at(0))
    assert relative_error(cache.feature, io[f"fwd.cached.branch{released_branch}"]) < TOLERANCE
    out = unet(io["fwd.x_retrieve"], io["fwd.t_retrieve"], cache.at(1))
    assert relative_error(out, io[f"fwd.out_retrieve.branch{released_branch}"]) < TOLERANCE


RUNS = json.loads((HERE / "goldens" / "ddpm_small.json").read_text())["ddpm_small"]["runs"]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["name"])
def test_trajectory(unet, ddpm_golden, run):
    steps, interval = run["steps"], run["N"]
    timesteps = (quadratic_timesteps if ".quad." in run["name"] else uniform_timesteps)(steps)
    assert timesteps == run["timesteps"]
    full_steps = centered(steps, interval, run["center"], run["pow"]) if run.get("non_uniform") \
        else uniform(steps, interval)
    assert [int(step in full_steps) for step in range(steps)] == run["full_mask"]

    golden = ddpm_golden.io[f"{run['name']}.xs"]
    cache = DeepCache(run["branch"] + 1, full_steps)
    states = []
    ddim(lambda x, t, step: unet(x, torch.full((len(x),), float(t)), cache.at(step)), ddpm_golden.io["traj.x_T"],
         timesteps, Diffusion("linear").alphas_cumprod(), progress=lambda step, x: states.append(x))
    for state, expected in zip(states, golden[1:], strict=True):
        assert relative_error(state, expected) < TOLERANCE
