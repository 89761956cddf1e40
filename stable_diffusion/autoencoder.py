"""The small models' autoencoder: LDM's, trained with codes, as Stable Diffusion's kind, which has none."""

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor


@torch.no_grad()
def from_first_stage(vq: VQModel, mean: Tensor, deviation: Tensor) -> AutoencoderKL:
    """An AutoencoderKL that gives (latents - mean) / deviation for the latents of `vq`, and decodes them unquantised.

    mean, deviation: [channels], of the latents before quantisation, so that those of the result are of mean 0 and
    deviation 1, as diffusion expects them; scaling_factor is 1. Its posterior has no spread to speak of (variance
    e^-30).
    """
    channels = vq.config.latent_channels
    names = ("down_block_types", "up_block_types", "block_out_channels", "layers_per_block", "latent_channels",
             "sample_size", "norm_num_groups", "act_fn")
    vae = AutoencoderKL(**{name: vq.config[name] for name in names}, scaling_factor=1.0, force_upcast=False)
    tensors = {name: value.clone() for name, value in vq.state_dict().items() if not name.startswith("quantize.")}

    def widened(value: Tensor, size: torch.Size) -> Tensor:
        """Add zeros for the part of the posterior that is its log variance."""
        wide = torch.zeros(size)
        wide[tuple(slice(extent) for extent in value.shape)] = value
        return wide

    # The normalisation is linear, so the two 1x1 convolutions take it in.
    tensors["quant_conv.weight"] /= deviation[:, None, None, None]
    tensors["quant_conv.bias"] = (tensors["quant_conv.bias"] - mean) / deviation
    weight = tensors["post_quant_conv.weight"]                              # [channels, channels, 1, 1]
    tensors["post_quant_conv.bias"] += weight[:, :, 0, 0] @ mean
    tensors["post_quant_conv.weight"] = weight * deviation[None, :, None, None]
    for name, value in vae.state_dict().items():
        tensors[name] = widened(tensors[name], value.shape)
    tensors["quant_conv.bias"][channels:] = -30.0
    vae.load_state_dict(tensors)
    return vae.eval().requires_grad_(False)
