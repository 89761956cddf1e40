"""Stable Diffusion's U-Net, its cache, DDIM and PLMS against the outputs of the authors' released code.

And against those of the PyPI package DeepCache, a helper for diffusers pipelines, whose branch numbers are ours.
"""

import json

import pytest
import torch
from conftest import HERE, relative_error
from torch import nn

from ldm.diffusers_layout import differences
from ldm.unet import ResBlock, SpatialTransformer
from stable_diffusion.checkpoint import load_state_dict
from stable_diffusion.config import Diffusion
from stable_diffusion.unet import UNet
from unet_caching.methods.deepcache import DeepCache
from unet_caching.nest import Cond
from unet_caching.samplers.diffusion import guided
from unet_caching.samplers.solvers import SOLVERS, ddim
from unet_caching.samplers.timesteps import offset_timesteps
from unet_caching.schedules import centered, uniform

TOLERANCE = 2e-5        # of the largest magnitude; the authors' own noise floor is 3e-6
MANIFEST = json.loads((HERE / "goldens" / "sd_small.json").read_text())["sd_small"]


@pytest.fixture(scope="module")
def unet(sd_golden) -> UNet:
    sizes = {"in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1, 2, 2],
             "num_res_blocks": 2, "attention_resolutions": [2, 1], "num_heads": 8, "context_dim": 32}
    assert not differences(sd_golden.manifest["config"], sizes)
    unet = UNet(**sizes).eval()
    load_state_dict(unet, sd_golden.weights)
    return unet


@torch.no_grad()
def test_full_forward(unet, sd_golden):
    io = sd_golden.io
    for x, t, out in (("x_full", "t_full", "out_full"), ("x_retrieve", "t_retrieve", "out_full_at_retrieve_input")):
        assert relative_error(unet(io[f"fwd.{x}"], io[f"fwd.{t}"].expand(2), io["fwd.context"]),
                              io[f"fwd.{out}"]) < TOLERANCE


@pytest.mark.parametrize(("layer", "block"), MANIFEST["valid_layer_block"])
@torch.no_grad()
def test_cached_forward_at_every_branch(unet, sd_golden, layer, block):
    io = sd_golden.io
    cache = DeepCache(3 * layer + block + 1, full_steps=[0])
    unet(io["fwd.x_full"], io["fwd.t_full"].expand(2), io["fwd.context"], cache.at(0))
    assert relative_error(cache.feature, io[f"fwd.cached.layer{layer}.block{block}"]) < TOLERANCE
    out = unet(io["fwd.x_retrieve"], io["fwd.t_retrieve"].expand(2), io["fwd.context"], cache.at(1))
    assert relative_error(out, io[f"fwd.out_retrieve.layer{layer}.block{block}"]) < TOLERANCE


@pytest.mark.parametrize("run", MANIFEST["runs"], ids=lambda run: run["name"])
def test_trajectory(unet, sd_golden, run):
    io, steps, interval, mask = sd_golden.io, run["steps"], run["N"], run["full_mask"]
    full_steps = [call for call, full in enumerate(mask) if full]
    if run["impl"] == "upstream pipeline":      # its schedule is ours: of `steps`, by the number of the network call
        own = centered(steps, interval, run["center"], run["pow"]) if run.get("uniform") is False \
            else uniform(steps, interval)
        assert full_steps == own if interval > 1 else all(mask)
        branch = 3 * run["layer"] + run["block"] + 1 if interval > 1 else 0
    else:
        branch = run["branch"]

    diffusion, guidance = Diffusion(), run["guidance"]
    context = io["traj.prompt_embeds"] if guidance == 1 else \
        torch.cat([io["traj.negative_prompt_embeds"], io["traj.prompt_embeds"]])
    cache = DeepCache(branch, full_steps)
    called, states = [], []

    def predict(x, t, step):
        called.append(t)
        x = x if guidance == 1 else torch.cat([x, x])
        output = unet(x, torch.full((len(x),), t), context, cache.at(step))
        return output if guidance == 1 else guided(output, guidance)

    def progress(step, x):
        states.append(x)

    if run["scheduler"] == "ddim":
        alphas = diffusion.alphas_cumprod()
        ddim(predict, io["traj.latents"], offset_timesteps(steps), alphas, final_alpha=alphas[0].item(),
             progress=progress)
    else:
        SOLVERS["plms"].run(predict, io["traj.latents"], steps, "leading", diffusion, progress=progress)
    assert called == run.get("timesteps", called) and len(called) == len(mask)
    golden = io[f"{run['name']}.latents"]
    for state, expected in zip(states[-len(golden):], golden, strict=True):
        assert relative_error(state, expected) < TOLERANCE


# What the goldens are too coarse to tell

def test_epsilons(unet):
    for name, module in unet.named_modules():
        if isinstance(module, nn.GroupNorm):
            inside_transformer = isinstance(unet.get_submodule(name.rpartition(".")[0]), SpatialTransformer)
            assert module.eps == (1e-6 if inside_transformer else 1e-5), name
        if isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-5, name


@pytest.mark.parametrize(("kind", "eps"), [(ResBlock, 1e-5), (SpatialTransformer, 1e-6)])
@torch.no_grad()
def test_epsilons_in_the_output(unet, kind, eps):
    """Inputs whose variance is as small as epsilon are normalised to sqrt(variance / (variance + epsilon))."""
    module = next(module for module in unet.modules() if isinstance(module, kind))
    norm = module.in_layers[0] if kind is ResBlock else module.norm
    x = torch.randn(1, norm.num_channels, 16, 16, generator=torch.Generator().manual_seed(0)) * eps ** 0.5
    seen = []
    hook = norm.register_forward_hook(lambda module, args, output: seen.append(output))
    module(x, Cond(torch.zeros(1, 128), torch.zeros(1, 7, 32)))
    hook.remove()
    groups = x.reshape(1, 32, -1)
    expected = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, keepdim=True, correction=0) + eps).sqrt()
    expected = expected.reshape(x.shape) * norm.weight[:, None, None] + norm.bias[:, None, None]
    assert torch.allclose(seen[0], expected, atol=1e-4)
