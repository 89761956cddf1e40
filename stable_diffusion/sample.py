"""Sample images from Stable Diffusion, one for each prompt of a file, with or without caching.

    python -m stable_diffusion.sample --config configs/sd_v15.yaml --prompts parti.tsv --interval 5 --out samples/n5
    python -m stable_diffusion.sample --config configs/sd_emoji.yaml --prompt "cat face" --seeds 0-7 --out samples/cat

Defaults are the paper's settings. Prompts come from .txt (one per line), .csv, .tsv or .json, COCO's captions included
(runs/prompts.py). Image i has prompt i and seed i, the same for any batch size or number of processes; stop it
whenever you like, the same command fills in what is missing. Several processes share the seeds as they come, under
torchrun or as the same command several times. SIGUSR1 and SIGTERM stop it after its batch, with 75. OUT/prompts.csv
lists seed and prompt. No file is downloaded.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from caching.nested import Policy
from runs.cli import command
from runs.errors import UserError
from runs.folder import RunFolder, quoted
from runs.image_model import ImageModel, sample_images
from runs.options import (
    DTYPES,
    add_cache_options,
    add_run_options,
    add_sampler_options,
    chosen_guidance,
    plan_sampler,
    prepare_device,
)
from runs.prompts import prompts_sha256, read_prompts
from sampling.noise import SeededNoise
from stable_diffusion.checkpoint import checkpoint_sha256, load_checkpoint
from stable_diffusion.config import load_config
from stable_diffusion.text_to_image import TextToImage, check_text_to_image, latent_size
from stable_diffusion.unet import UNet

RELEASED_SEED = 42      # of the released evaluation (github horseee/DeepCache, 1691a3a)
BATCH_SIZE = 8


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What decides the image of a seed, caching aside."""
    parser.add_argument("--config", type=Path, required=True, help="configs/sd_*.yaml")
    parser.add_argument("--model", type=Path, help="a diffusers folder or one CompVis file, instead of the config's")
    parser.add_argument("--diffusers-unet", action="store_true",
                        help="run the folder's U-Net through diffusers, without caching: for pruned ones (BK-SDM)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompts", type=Path, help="a file of prompts")
    what.add_argument("--prompt", help="one prompt, for every seed")
    parser.add_argument("--images-per-prompt", type=int, default=1,
                        help="seed s has prompt s // this (default: %(default)s)")
    parser.add_argument("--negative-prompt", default="", help="what guidance leads away from (default: the empty one)")
    parser.add_argument("--height", type=int, help="of the images, in pixels (default: the config's resolution)")
    parser.add_argument("--width", type=int)
    sampler = add_sampler_options(parser)
    sampler.add_argument("--guidance", type=float, help="classifier-free guidance; 1 = none, anything else doubles "
                                                        "the batch")
    sampler.add_argument("--released-noise", action="store_true",
                         help="the released evaluation's noise, the same in every batch: seed 42 is set again for "
                              "each; an image depends on its place in the batch then, and on --batch-size, --dtype and "
                              "the kind of --device")


class Prompts:
    """Which prompt each seed has: seed s has prompt s // per; or every seed the only one, where `per` is None."""

    def __init__(self, prompts: list[str], per: int | None):
        self.prompts, self.per = prompts, per

    @classmethod
    def chosen(cls, args: argparse.Namespace) -> "Prompts":
        """Raises UserError for an unreadable file, and for options that do not go together."""
        if args.images_per_prompt < 1:
            raise UserError(f"--images-per-prompt must be 1 or more, got {args.images_per_prompt}")
        if args.prompts is not None:
            return cls(read_prompts(args.prompts), args.images_per_prompt)
        if args.images_per_prompt != 1:
            raise UserError("--images-per-prompt is for --prompts; with --prompt every seed of --seeds has the same")
        return cls([args.prompt], None)

    @property
    def images(self) -> int:
        """How many images all prompts make; one of a single prompt, unless --seeds says more."""
        return len(self.prompts) * (self.per or 1)

    @property
    def settings(self) -> dict:
        """For run.json. eval.clip_score compares them with its prompts."""
        if self.per is None:
            return {"prompts_sha256": prompts_sha256(self.prompts), "prompts_rule": "one for all seeds"}
        return {"prompts_sha256": prompts_sha256(self.prompts), "prompts_rule": "seed // images_per_prompt",
                "images_per_prompt": self.per}

    def place(self, seed: int) -> int:
        """Which of the prompts a seed has."""
        return 0 if self.per is None else seed // self.per

    def of(self, seed: int) -> str:
        """The prompt of a seed."""
        return self.prompts[self.place(seed)]

    def check(self, seeds: list[int]) -> None:
        """Raises UserError for a seed that has no prompt."""
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
        """For run.json."""
        return {"rule": "released", "seed": RELEASED_SEED, "batch_size": self.batch_size, "device": self.device.type}

    def draw(self, seeds: list[int], shape: tuple[int, ...]) -> Tensor:
        """float32 [seeds, *shape]."""
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


class StableDiffusion(ImageModel):
    """Conditional on a prompt, in the latents of an autoencoder."""

    def __init__(self, args: argparse.Namespace):
        config = load_config(args.config)
        self.config, self.path, self.of_diffusers = config, args.model or Path(config.checkpoint), args.diffusers_unet
        self.device, self.dtype = prepare_device(args), DTYPES[args.dtype]
        self.sampler = plan_sampler(args, config.sampler, config.diffusion)
        self.guidance, self.negative_prompt = chosen_guidance(args, config.sampler.guidance), args.negative_prompt
        if args.released_noise and self.sampler.eta != 0:
            raise UserError("--released-noise is the noise that sampling starts from: it needs --eta 0")
        try:
            with torch.device("meta"):
                self.num_branches = UNet(**vars(config.unet)).num_branches
        except ValueError as error:
            raise UserError(str(error)) from None
        self.prompts = Prompts.chosen(args)
        self.branch, self.images = config.sampler.branch, self.prompts.images
        check_text_to_image(config)
        height, width = latent_size(config, args.height, args.width)
        self.shape = (config.unet.in_channels, height, width)
        self.released = None
        if args.released_noise:
            self.released = ReleasedNoise(args.batch_size, None if self.prompts.per is None else self.images,
                                          self.device, self.dtype)
        self.settings = {"model": config.name, "unet": asdict(config.unet),
                         "height": height * config.downsampling, "width": width * config.downsampling,
                         **self.prompts.settings, "negative_prompt": args.negative_prompt, **self.sampler.settings,
                         "guidance": self.guidance, "noise": self.released.settings if self.released else "per seed",
                         "dtype": args.dtype, "first_stage_dtype": "fp32", "text_encoder_dtype": "fp32"}

    def load(self) -> None:
        loaded = load_checkpoint(self.config, self.path, diffusers_unet=self.of_diffusers)
        self.settings["checkpoint_sha256"] = checkpoint_sha256(self.path)
        if self.of_diffusers:
            self.settings["unet"] = {"diffusers": layout(loaded.unet.config)}
        self.model = TextToImage(loaded, self.config, self.device, self.dtype)
        self.unet = self.model.unet

    def latents(self, seeds: Sequence[int], policy: Policy | None = None, network: nn.Module | None = None,
                report: Callable[[float], None] | None = None) -> Tensor:
        noise = SeededNoise(seeds, self.device)
        x = self.released.draw(seeds, self.shape) if self.released else noise(self.shape)
        return self.model.latents(self.sampler, x, [self.prompts.of(seed) for seed in seeds], self.negative_prompt,
                                  self.guidance, policy, noise, report, network)

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

    def write_listing(self, run: RunFolder) -> None:
        run.write_listing("prompts.csv", "seed,prompt", lambda seed: f"{seed},{quoted(self.prompts.of(seed))}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    add_cache_options(parser)
    add_run_options(parser, BATCH_SIZE, seeds="as many as there are prompts")
    return parser


@command
def main() -> None:
    args = build_parser().parse_args()
    if args.diffusers_unet and (args.interval != 1 or args.block_schedule is not None):
        raise UserError("--diffusers-unet runs a U-Net of any layout through diffusers, where nothing is cached: it "
                        "needs --interval 1, and no --block-schedule")
    sample_images(args, StableDiffusion(args))


def layout(config: dict) -> dict:
    """diffusers' config of a U-Net, without what says where it comes from."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


if __name__ == "__main__":
    main()
