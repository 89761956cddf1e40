"""A loaded model on its device, which makes images of prompts and noise: for stable_diffusion.sample and compare."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, VQModel
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedTokenizerBase

from run.folder import check_finite, to_uint8
from stable_diffusion.checkpoint import Model
from stable_diffusion.config import Config
from unet_caching.errors import UserError
from unet_caching.nest import Cache, Network, no_cache
from unet_caching.policy import Policy
from unet_caching.samplers.noise import SeededNoise
from unet_caching.samplers.samplers import Sampler, noise_predictor
from unet_caching.speed.accelerate import place

DECODED_AT_ONCE = 4     # images; what the autoencoder needs for more would decide the batch size


class DiffusersUNet(nn.Module):
    """diffusers' U-Net, called as ours: the baseline for pruned layouts (BK-SDM). It cannot be cached."""

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, context: Tensor, *added: Tensor, cache: Cache = no_cache) -> Tensor:
        of_sdxl = dict(zip(("text_embeds", "time_ids"), added, strict=True)) if added else None
        return self.unet(x, t, context, added_cond_kwargs=of_sdxl, return_dict=False)[0]


def latent_size(config: Config, height: int | None, width: int | None) -> tuple[int, int]:
    """The height and width of the latents of images of so many pixels (None: the config's). Raises UserError."""
    found = [config.resolution if given is None else given for given in (height, width)]
    for side, pixels in zip(("height", "width"), found, strict=True):
        if pixels < 1 or pixels % config.downsampling:
            raise UserError(f"--{side} must be a multiple of {config.downsampling} pixels, by which the autoencoder "
                            f"downsamples, got {pixels}")
    return found[0] // config.downsampling, found[1] // config.downsampling


def check_text_to_image(config: Config) -> None:
    """Refuse a U-Net that takes more than latents, as for inpainting. Raises UserError."""
    if config.unet.in_channels != config.unet.out_channels:
        raise UserError(f"{config.name} takes {config.unet.in_channels} channels and predicts "
                        f"{config.unet.out_channels}: it needs an image besides the prompt; use it from Python, in a "
                        "diffusers pipeline (unet_caching/pipelines/enable.py)")


class TextToImage:
    """A model on its device: the U-Net in `dtype`; text encoders and autoencoder in float32, whatever the dtype is.

    They run once for all the steps, and the autoencoders of 1.x and SDXL overflow in float16.
    sizes: what an SDXL is told of them (`stable_diffusion.unet`).
    """

    def __init__(self, model: Model, config: Config, device: torch.device, dtype: torch.dtype,
                 sizes: Sequence[int] = ()):
        self.config, self.device, self.dtype, self.sizes = config, device, dtype, sizes
        unet = model.unet if not isinstance(model.unet, UNet2DConditionModel) else DiffusersUNet(model.unet)
        self.unet = place(unet, device, dtype)
        self.vae: AutoencoderKL | VQModel = place(model.vae, device)
        self.text_encoder = model.text_encoder.to(device)
        self.tokenizer, self.second = model.tokenizer, model.second
        if self.second is not None:
            self.second.text_encoder.to(device)

    def dropped_tokens(self, prompts: Sequence[str]) -> dict[int, int]:
        """The prompts that are longer than the text encoder takes: index -> how many of its tokens are not read."""
        lengths = [len(ids) for ids in self.tokenizer(list(prompts), verbose=False).input_ids]
        limit = self.tokenizer.model_max_length
        return {i: length - limit for i, length in enumerate(lengths) if length > limit}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """What the U-Net is given of texts, in its dtype: the context [prompts, tokens, context_dim]; SDXL's also the
        second encoder's summary [prompts, channels]. Equal prompts are encoded once.
        """
        distinct = sorted(set(prompts))
        batch = self._tokens(self.tokenizer, distinct)
        if self.second is None:
            # As diffusers' pipelines: CLIP attends to the padding too.
            masked = getattr(self.text_encoder.config, "use_attention_mask", False)
            found = [self.text_encoder(batch.input_ids, attention_mask=batch.attention_mask if masked else None)[0]]
        else:                               # both attended to before their last layers, side by side
            first = self.text_encoder(batch.input_ids, output_hidden_states=True)
            second = self.second.text_encoder(self._tokens(self.second.tokenizer, distinct).input_ids,
                                              output_hidden_states=True)
            found = [torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds]
        places = [distinct.index(prompt) for prompt in prompts]
        return [value[places].to(self.dtype) for value in found]

    def _tokens(self, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> BatchEncoding:
        return tokenizer(texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
                         return_tensors="pt").to(self.device)

    def conditions(self, prompts: Sequence[str], negative_prompt: str, guidance: float) -> list[Tensor]:
        """What the U-Net is given beside x and t: `encode` of the prompts, and what SDXL is told of sizes.

        With guidance of the doubled batch [uncond, cond].
        """
        found = self.encode(prompts)
        if guidance != 1:
            nothing = self.encode([negative_prompt])
            if self.second is not None and self.second.zeros and not negative_prompt:
                nothing = [torch.zeros_like(value) for value in nothing]
            found = [torch.cat([none.expand_as(own), own]) for none, own in zip(nothing, found, strict=True)]
        if self.second is not None:
            found.append(torch.tensor([self.sizes], device=self.device).float().repeat(len(found[0]), 1))
        return found

    @torch.no_grad()
    def latents(self, sampler: Sampler, x: Tensor, prompts: Sequence[str], negative_prompt: str, guidance: float,
                cache: Policy | None = None, noise: SeededNoise | None = None,
                progress: Callable[[float], None] | None = None, network: Network | None = None) -> Tensor:
        """Sample the latents of an image for each prompt, from x: [prompts, channels, height, width], float32.

        network: what takes the place of the U-Net (see `run.image_model.ImageModel.latents`).
        Raises UserError where they are not finite.
        """
        context = self.conditions(prompts, negative_prompt, guidance)
        predict = noise_predictor(self.unet if network is None else network, self.config.diffusion, self.dtype, cache,
                                  context, guidance)
        return check_finite(sampler.run(predict, x, noise, progress))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents -> images: uint8 [n, height, width, 3]."""
        parts = (latents / self.vae.config.scaling_factor).split(DECODED_AT_ONCE)
        return np.concatenate([to_uint8(self.vae.decode(part).sample) for part in parts])
