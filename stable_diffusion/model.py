"""Stable Diffusion from seeds and prompts to images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from run.folder import RunFolder, quoted, to_uint8
from run.image_model import ImageModel
from run.libraries import diffusers, transformers
from run.machine import Machine
from run.spec import Run
from stable_diffusion.checkpoint import load_checkpoint
from stable_diffusion.condition import TextCondition
from stable_diffusion.config import Config
from stable_diffusion.unet import UNet
from unet_caching.errors import UserError
from unet_caching.nest import Cache, no_cache
from unet_caching.samplers.noise import SeededNoise
from unet_caching.speed.accelerate import place

RELEASED_SEED = 42      # of the released evaluation (github horseee/DeepCache, 1691a3a)
DECODED_AT_ONCE = 4     # images; decoding more at once would take more memory than the U-Net does


class ReleasedNoise:
    """The released evaluation's x_T. It sets seed 42 before every batch, so all batches start from the same noise.

    Seed s is row s % batch_size of batch s // batch_size, whichever seeds are sampled now. As in diffusers' pipeline, a
    batch is one draw in the network's dtype and on its device. images: of all batches together, so that the last batch
    is smaller; None: all batches are whole.
    """

    def __init__(self, batch_size: int, images: int | None, device: torch.device, dtype: torch.dtype):
        self.batch_size, self.images, self.device, self.dtype = batch_size, images, device, dtype

    @property
    def settings(self) -> dict:
        """What run.json says of the noise."""
        return {"rule": "released", "seed": RELEASED_SEED, "batch_size": self.batch_size, "device": self.device.type}

    def draw(self, seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        """The noise of each seed: float32 [seeds, *shape]."""
        batches: dict[int, Tensor] = {}
        rows = []
        for seed in seeds:
            size = self.batch_size
            if self.images is not None:
                size = min(size, self.images - seed // size * size)
            if size not in batches:
                generator = torch.Generator(self.device).manual_seed(RELEASED_SEED)
                batches[size] = torch.randn((size, *shape), generator=generator, device=self.device, dtype=self.dtype)
            rows.append(batches[size][seed % self.batch_size])
        return torch.stack(rows).float()


class DiffusersUNet(nn.Module):
    """diffusers' U-Net with the call of ours, a baseline for pruned layouts (BK-SDM). It cannot be cached."""

    def __init__(self, unet: diffusers.UNet2DConditionModel):
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, context: Tensor, *added: Tensor, cache: Cache = no_cache) -> Tensor:
        of_sdxl = dict(zip(("text_embeds", "time_ids"), added, strict=True)) if added else None
        return self.unet(x, t, context, added_cond_kwargs=of_sdxl, return_dict=False)[0]


class StableDiffusion(ImageModel[Config, TextCondition]):
    """A text-to-image model in the latents of an autoencoder.

    The U-Net has the run's dtype. Text encoders and autoencoder are always in float32: they run only once per image,
    and the autoencoders of 1.x and SDXL overflow in float16.
    """

    def __init__(self, run: Run, machine: Machine):
        super().__init__(run, machine)
        config, condition = self.config, self.condition
        config.check_text_to_image()
        if condition.released_noise and self.sampler.eta != 0:
            raise UserError("--released-noise decides only the noise that sampling starts from: it needs --eta 0")
        if condition.diffusers_unet and run.caching:
            raise UserError("--diffusers-unet runs diffusers' U-Net, which is not cached here: it needs --interval 1, "
                            "and no --block-schedule")
        self.prompts = condition.read_prompts()
        self.images = self.prompts.images
        self.shape = (config.unet.in_channels, *condition.latent_size(config))
        self.released = None
        if condition.released_noise:
            self.released = ReleasedNoise(machine.batch_size, None if self.prompts.per is None else self.images,
                                          self.device, self.dtype)
            self.settings["noise"] = self.released.settings

    def read(self, checkpoint: Path) -> None:
        model = load_checkpoint(self.config, checkpoint, self.condition.diffusers_unet, **self.run.weights)
        if not isinstance(model.unet, UNet):
            layout = {key: value for key, value in model.unet.config.items() if not key.startswith("_")}
            self.settings["unet"] = {"diffusers": layout}
        unet = model.unet if isinstance(model.unet, UNet) else DiffusersUNet(model.unet)
        self.unet = place(unet, self.device, self.dtype)
        self.vae = place(model.vae, self.device)
        self.text_encoder = model.text_encoder.to(self.device)
        self.tokenizer, self.second = model.tokenizer, model.second
        if self.second is not None:
            self.second.text_encoder.to(self.device)

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Encode texts in the U-Net's dtype: the context [prompts, tokens, context_dim], and for SDXL the second
        encoder's pooled embedding [prompts, channels]. Equal prompts are encoded once.
        """
        distinct = sorted(set(prompts))
        batch = self._tokens(self.tokenizer, distinct)
        if self.second is None:
            # As in diffusers' pipelines, CLIP also attends to the padding.
            masked = getattr(self.text_encoder.config, "use_attention_mask", False)
            encoded = [self.text_encoder(batch.input_ids, attention_mask=batch.attention_mask if masked else None)[0]]
        else:                               # of both, the states before the last layer, side by side
            first = self.text_encoder(batch.input_ids, output_hidden_states=True)
            second = self.second.text_encoder(self._tokens(self.second.tokenizer, distinct).input_ids,
                                              output_hidden_states=True)
            encoded = [torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds]
        places = [distinct.index(prompt) for prompt in prompts]
        return [value[places].to(self.dtype) for value in encoded]

    def _tokens(self, tokenizer: transformers.PreTrainedTokenizerBase, texts: list[str]) -> transformers.BatchEncoding:
        return tokenizer(texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
                         return_tensors="pt").to(self.device)

    def noise(self, seeds: Sequence[int], draws: SeededNoise) -> Tensor:
        return self.released.draw(seeds, self.shape) if self.released else super().noise(seeds, draws)

    def context(self, seeds: Sequence[int]) -> Sequence[Tensor]:
        """The encoded prompts, and SDXL's micro-conditioning."""
        context, negative = self.encode([self.prompts.of(seed) for seed in seeds]), self.condition.negative_prompt
        if self.run.guidance != 1:
            nothing = self.encode([negative])
            if self.second is not None and self.second.zeros and not negative:
                nothing = [torch.zeros_like(value) for value in nothing]
            context = [torch.cat([none.expand_as(own), own]) for none, own in zip(nothing, context, strict=True)]
        if self.second is not None:
            sizes = torch.tensor([self.condition.sizes(self.config)], device=self.device)
            context.append(sizes.float().repeat(len(context[0]), 1))
        return context

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        parts = (latents / self.vae.config.scaling_factor).split(DECODED_AT_ONCE)
        return np.concatenate([to_uint8(self.vae.decode(part).sample) for part in parts])

    def check_seeds(self, seeds: Sequence[int]) -> None:
        self.prompts.check(seeds)

    def describe(self, seeds: Sequence[int]) -> list[str]:
        return [*self._cut_prompts(seeds), *(["released noise: the same in every batch"] if self.released else [])]

    def _cut_prompts(self, seeds: Sequence[int]) -> list[str]:
        """A warning about prompts that are too long for the text encoder, with the number of tokens that are cut off.
        """
        places, limit = sorted({self.prompts.place(seed) for seed in seeds}), self.tokenizer.model_max_length
        tokens = self.tokenizer([self.prompts.prompts[i] for i in places], verbose=False).input_ids
        cut = [f"{len(ids) - limit} of prompt {i}" for i, ids in zip(places, tokens, strict=True) if len(ids) > limit]
        return [f"warning: {len(cut)} prompt(s) longer than {limit} tokens, start and end included: the last "
                f"{', '.join(cut[:5])}{', ...' if len(cut) > 5 else ''} are cut off"] if cut else []

    def write_listing(self, folder: RunFolder) -> None:
        folder.write_listing("prompts.csv", "seed,prompt", lambda seed: f"{seed},{quoted(self.prompts.of(seed))}")


MODEL = StableDiffusion
