"""The small models' autoencoder: LDM's first stage, which has codes, as an AutoencoderKL, which has none."""

import copy

import torch
from torch import Tensor

from ldm.first_stage import normalise
from run.libraries import diffusers


@torch.no_grad()
def from_first_stage(vq: diffusers.VQModel, mean: Tensor, deviation: Tensor) -> diffusers.AutoencoderKL:
    """An AutoencoderKL whose latents are (latents of `vq` - mean) / deviation, decoded without quantisation.

    mean, deviation: [channels], of the latents before quantisation, so that the new latents have mean 0 and deviation
    1, as diffusion expects. scaling_factor is 1. The posterior's variance is e^-30, practically none.
    """
    names = ("down_block_types", "up_block_types", "block_out_channels", "layers_per_block", "latent_channels",
             "sample_size", "norm_num_groups", "act_fn")
    vae = diffusers.AutoencoderKL(**{name: vq.config[name] for name in names}, scaling_factor=1.0, force_upcast=False)
    vq = copy.deepcopy(vq)
    normalise(vq, mean, deviation)
    tensors, own = vq.state_dict(), vae.state_dict()
    for name, wide in own.items():
        wide.zero_()            # the other channels are the posterior's log variance
        wide[tuple(slice(extent) for extent in tensors[name].shape)] = tensors[name]
    own["quant_conv.bias"][vq.config.latent_channels:] = -30.0
    vae.load_state_dict(own)
    return vae.eval().requires_grad_(False)
