"""Sample images from a DDPM, with or without caching.

    python -m ddpm.sample --config configs/ddpm_emoji.yaml --interval 5 --seeds 0-255 --out samples/emoji_n5
    python -m ddpm.sample --config configs/ddpm_cifar10.yaml --interval 5 --out samples/cifar10_n5

Defaults are the paper's settings for the model. One image per seed, the same for any batch size or number of
processes; stop it whenever you like, the same command fills in what is missing. Several processes share the seeds as
they come, under torchrun or as the same command several times. SIGUSR1 and SIGTERM stop it after its batch, with 75.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from caching.nested import Policy
from ddpm.checkpoint import load_checkpoint
from ddpm.config import load_config
from ddpm.unet import UNet
from runs.cli import command
from runs.errors import UserError
from runs.folder import to_uint8
from runs.image_model import ImageModel, sample_images
from runs.options import (
    DTYPES,
    add_cache_options,
    add_run_options,
    add_sampler_options,
    place,
    plan_sampler,
    prepare_device,
)
from runs.weights import check_md5, sha256
from sampling.noise import SeededNoise
from sampling.samplers import noise_predictor

BATCH_SIZE = 64


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What decides the image of a seed, caching aside."""
    parser.add_argument("--config", type=Path, required=True, help="configs/ddpm_*.yaml")
    parser.add_argument("--checkpoint", type=Path, help="weights, instead of the config's")
    add_sampler_options(parser)


class DDPM(ImageModel):
    """Unconditional, in pixels: its latents are the images."""

    def __init__(self, args: argparse.Namespace):
        config = load_config(args.config)
        self.config, self.md5 = config, config.md5 if args.checkpoint is None else None
        self.device, self.dtype = prepare_device(args), DTYPES[args.dtype]
        self.sampler = plan_sampler(args, config.sampler, config.diffusion)
        try:
            self.unet = UNet(**vars(config.unet))
        except ValueError as error:
            raise UserError(str(error)) from None
        self.num_branches = self.unet.num_branches
        self.branch, self.images = config.sampler.branch, config.sampler.images
        self.checkpoint = args.checkpoint or Path(config.checkpoint)
        self.settings = {"model": config.name, "unet": asdict(config.unet), **self.sampler.settings,
                         "dtype": args.dtype}

    def load(self) -> None:
        if self.md5:
            check_md5(self.checkpoint, self.md5)    # first: a download that was cut short should be called that
        load_checkpoint(self.unet, self.checkpoint)
        self.settings["checkpoint_sha256"] = sha256(self.checkpoint)
        self.unet = place(self.unet, self.device, self.dtype)

    def latents(self, seeds: Sequence[int], policy: Policy | None = None, network: nn.Module | None = None,
                report: Callable[[float], None] | None = None) -> Tensor:
        unet, noise = self.config.unet, SeededNoise(seeds, self.device)
        predict = noise_predictor(self.unet if network is None else network, self.config.diffusion, self.dtype, policy)
        return self.sampler.run(predict, noise((unet.in_channels, unet.resolution, unet.resolution)), noise, report)

    def decode(self, latents: Tensor) -> np.ndarray:
        return to_uint8(latents)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    add_cache_options(parser)
    add_run_options(parser, BATCH_SIZE)
    return parser


@command
def main() -> None:
    args = build_parser().parse_args()
    sample_images(args, DDPM(args))


if __name__ == "__main__":
    main()
