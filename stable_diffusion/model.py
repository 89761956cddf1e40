"""Stable Diffusion from seeds and prompts to images."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from run.folder import RunFolder, quoted
from run.image_model import ImageModel
from run.machine import Machine
from run.prompts import prompts_sha256, read_prompts
from run.spec import Run
from stable_diffusion.checkpoint import checkpoint_sha256, load_checkpoint
from stable_diffusion.condition import SIZED, TextCondition
from stable_diffusion.config import Config
from stable_diffusion.text_to_image import TextToImage, check_text_to_image, latent_size
from stable_diffusion.unet import UNet
from unet_caching.errors import UserError
from unet_caching.nest import Network
from unet_caching.policy import Policy
from unet_caching.samplers.noise import SeededNoise

RELEASED_SEED = 42      # of the released evaluation (github horseee/DeepCache, 1691a3a)


class Prompts:
    """The prompt of each seed: seed s has prompt s // per, or, where `per` is None, every seed has the only one."""

    def __init__(self, prompts: list[str], per: int | None):
        self.prompts, self.per = prompts, per

    @classmethod
    def chosen(cls, condition: TextCondition) -> "Prompts":
        """The prompts that a run asks for. Raises UserError for an unreadable file, and without file and prompt."""
        if condition.prompts is not None:
            return cls(read_prompts(condition.prompts), condition.images_per_prompt)
        if condition.prompt is None:
            raise UserError("what should the images show? Give --prompts, a file, or --prompt, a text")
        return cls([condition.prompt], None)

    @property
    def images(self) -> int:
        """How many images all prompts make: one of a single prompt, unless --seeds says more."""
        return len(self.prompts) * (self.per or 1)

    @property
    def settings(self) -> dict:
        """What run.json says of them; eval.clip_score compares it with its prompts."""
        if self.per is None:
            return {"prompts_sha256": prompts_sha256(self.prompts), "prompts_rule": "one for all seeds"}
        return {"prompts_sha256": prompts_sha256(self.prompts), "prompts_rule": "seed // images_per_prompt",
                "images_per_prompt": self.per}

    def place(self, seed: int) -> int:
        """The place of a seed's prompt among them."""
        return 0 if self.per is None else seed // self.per

    def of(self, seed: int) -> str:
        """The prompt of a seed."""
        return self.prompts[self.place(seed)]

    def check(self, seeds: Sequence[int]) -> None:
        """Refuse a seed that has no prompt. Raises UserError."""
        if self.per is not None and max(seeds) >= self.images:
            raise UserError(f"seed {max(seeds)} has no prompt: {len(self.prompts)} prompts, {self.per} image(s) of "
                            f"each, are seeds 0-{self.images - 1}")


class ReleasedNoise:
    """The released evaluation's x_T: it sets seed 42 before every batch, so all batches start from the same noises.

    Seed s is row s % batch_size of batch s // batch_size, whatever else is sampled now. A batch is one draw in the
    network's dtype on its device, as diffusers' pipeline makes it; the last one, of `images` in all, is smaller
    (None: no last one).
    """

    def __init__(self, batch_size: int, images: int | None, device: torch.device, dtype: torch.dtype):
        self.batch_size, self.images, self.device, self.dtype = batch_size, images, device, dtype

    @property
    def settings(self) -> dict:
        """What run.json says of it."""
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


def describe_dropped(dropped: dict[int, int], limit: int) -> str:
    """A warning about prompts that are cut, with how much of them is lost."""
    some = ", ".join(f"{tokens} of prompt {i}" for i, tokens in list(dropped.items())[:5])
    return (f"warning: {len(dropped)} prompt(s) longer than {limit} tokens, start and end included; not read are the "
            f"last {some} tokens{', ...' if len(dropped) > 5 else ''}")


def settings(run: Run) -> dict[str, Any]:
    """What run.json says of a run: prompts that are not there yet, and what hangs on the machine, are left out."""
    config, asked = cast(Config, run.config), cast(TextCondition, run.spec.condition)
    height, width = latent_size(config, asked.height, asked.width)
    absent = asked.prompts is not None and not asked.prompts.exists()
    prompts = Prompts([], asked.images_per_prompt) if absent else Prompts.chosen(asked)
    height, width = height * config.downsampling, width * config.downsampling
    of_sizes = {} if config.xl is None else {"xl": asdict(config.xl), "sizes": asked.sizes(height, width)}
    return {"unet": asdict(config.unet), "height": height, "width": width, **of_sizes,
            **{key: value for key, value in prompts.settings.items() if not (absent and key == "prompts_sha256")},
            "negative_prompt": asked.negative_prompt, "guidance": run.guidance,
            **({} if asked.released_noise else {"noise": "per seed"}), "first_stage_dtype": "fp32",
            "text_encoder_dtype": "fp32"}


class StableDiffusion(ImageModel[Config, TextCondition]):
    """A model conditional on a prompt, in the latents of an autoencoder."""

    def __init__(self, run: Run, machine: Machine):
        super().__init__(run, machine)
        config, asked = self.config, self.condition
        if asked.released_noise and self.sampler.eta != 0:
            raise UserError("--released-noise is the noise that sampling starts from: it needs --eta 0")
        if asked.diffusers_unet and run.caching:
            raise UserError("--diffusers-unet runs a U-Net of any layout through diffusers, where nothing is cached: "
                            "it needs --interval 1, and no --block-schedule")
        self.negative_prompt = asked.negative_prompt
        self.prompts = Prompts.chosen(asked)
        self.images = self.prompts.images
        check_text_to_image(config)
        height, width = latent_size(config, asked.height, asked.width)
        self.shape = (config.unet.in_channels, height, width)
        self.sizes = asked.sizes(height * config.downsampling, width * config.downsampling)
        if config.xl is None and any(getattr(asked, name) is not None for name in SIZED):
            raise UserError(f"--original-size, --crop and --target-size are for SDXL: {config.name} knows of no sizes")
        self.released = None
        if asked.released_noise:
            self.released = ReleasedNoise(machine.batch_size, None if self.prompts.per is None else self.images,
                                          self.device, self.dtype)
        self.settings = run.settings | ({"noise": self.released.settings} if self.released else {})

    def load(self) -> None:
        loaded = load_checkpoint(self.config, self.run.checkpoint, self.condition.diffusers_unet)
        self.settings["checkpoint_sha256"] = checkpoint_sha256(self.run.checkpoint)
        if not isinstance(loaded.unet, UNet):
            self.settings["unet"] = {"diffusers": layout(loaded.unet.config)}
        self.model = TextToImage(loaded, self.config, self.device, self.dtype, self.sizes)
        self.unet = self.model.unet

    def latents(self, seeds: Sequence[int], policy: Policy | None = None, network: Network | None = None,
                report: Callable[[float], None] | None = None) -> Tensor:
        noise = SeededNoise(seeds, self.device)
        x = self.released.draw(seeds, self.shape) if self.released else noise(self.shape)
        return self.model.latents(self.sampler, x, [self.prompts.of(seed) for seed in seeds], self.negative_prompt,
                                  self.run.guidance, policy, noise, report, network)

    def decode(self, latents: Tensor) -> np.ndarray:
        return self.model.decode(latents)

    def check_seeds(self, seeds: Sequence[int]) -> None:
        self.prompts.check(seeds)

    def describe(self, seeds: Sequence[int]) -> list[str]:
        places = sorted({self.prompts.place(seed) for seed in seeds})
        dropped = self.model.dropped_tokens([self.prompts.prompts[i] for i in places])
        dropped = {places[i]: tokens for i, tokens in dropped.items()}
        lines = [describe_dropped(dropped, self.model.tokenizer.model_max_length)] if dropped else []
        return [*lines, *(["released noise: the same in every batch"] if self.released else [])]

    def write_listing(self, folder: RunFolder) -> None:
        folder.write_listing("prompts.csv", "seed,prompt", lambda seed: f"{seed},{quoted(self.prompts.of(seed))}")


def layout(config: dict) -> dict:
    """diffusers' config of a U-Net, without what says where it comes from."""
    return {key: value for key, value in config.items() if not key.startswith("_")}
