"""Sample images from a class-conditional latent diffusion model, with or without caching.

    python -m ldm.sample --config configs/ldm_emoji.yaml --interval 10 --seeds 0-99 --out samples/ldm_emoji_n10
    python -m ldm.sample --config configs/ldm_cin256.yaml --interval 10 --out samples/cin256_n10

Defaults are the paper's settings for the model. One image per seed, label included, the same for any batch size or
number of processes; stop it whenever you like, the same command fills in what is missing. Several processes share the
seeds as they come, under torchrun or as the same command several times. SIGUSR1 and SIGTERM stop it after its batch,
with 75. OUT/images.csv lists seed, label and class name.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from caching.nested import Policy
from ldm import first_stage
from ldm.checkpoint import checkpoint_sha256, load_checkpoint
from ldm.config import Config, load_config
from ldm.train import class_names
from ldm.unet import UNet
from runs.cli import command
from runs.errors import UserError
from runs.folder import RunFolder, to_uint8
from runs.image_model import ImageModel, sample_images
from runs.labels import Labels, read_names, write_listing
from runs.options import (
    DTYPES,
    add_cache_options,
    add_run_options,
    add_sampler_options,
    chosen_guidance,
    place,
    plan_sampler,
    prepare_device,
)
from sampling.noise import SeededNoise
from sampling.samplers import noise_predictor
from training import emoji

BATCH_SIZE = 32
DECODED_AT_ONCE = 8     # images; what the first stage needs for more would decide the batch size


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What decides the image of a seed, caching aside."""
    parser.add_argument("--config", type=Path, required=True, help="configs/ldm_*.yaml")
    parser.add_argument("--checkpoint", type=Path, help="weights of all three networks, instead of the config's")
    sampler = add_sampler_options(parser)
    sampler.add_argument("--guidance", type=float, help="classifier-free guidance; 1 = none, anything else doubles "
                                                        "the batch")
    parser.add_argument("--labels", default="balanced",
                        help="balanced (default): seed mod the number of classes; random: uniform, from the seed; or a "
                             "list like 207,360 or 0-9, taken in turn")


def names_of_classes(config: Config) -> list[str] | None:
    """Names in the order of the labels: the config's file, or the classes it was trained on; None without either."""
    if config.class_names is not None:
        return read_names(Path(config.class_names), config.num_classes)
    if config.train is not None:
        groups = config.train.groups
        names = class_names(groups, [row for row in emoji.read_index() if row.split == "train" and row.group in groups])
        if len(names) != config.num_classes:
            raise UserError(f"num_classes is {config.num_classes}, but the groups have {len(names)} classes: {names}")
        return names
    return None


def check_sizes(config: Config) -> int:
    """Width and height of the latents. Raises UserError where the U-Net and the first stage do not fit together."""
    stage, levels = config.first_stage, len(config.unet.channel_mult)
    factor = 2 ** (len(stage.ch_mult) - 1)
    if not config.unet.in_channels == config.unet.out_channels == stage.z_channels:
        raise UserError(f"the U-Net has {config.unet.in_channels} channels in and {config.unet.out_channels} out, the "
                        f"latents have {stage.z_channels}")
    if stage.resolution % (factor * 2 ** (levels - 1)):
        raise UserError(f"images of {stage.resolution} pixels are not divisible by {factor} in the first stage and "
                        f"{2 ** (levels - 1)} in the U-Net")
    return stage.resolution // factor


class LDM(ImageModel):
    """Conditional on a class, in the latents of a first stage."""

    def __init__(self, args: argparse.Namespace):
        config = load_config(args.config)
        self.config, self.checkpoint = config, args.checkpoint or Path(config.checkpoint)
        self.device, self.dtype = prepare_device(args), DTYPES[args.dtype]
        self.sampler = plan_sampler(args, config.sampler, config.diffusion)
        self.guidance = chosen_guidance(args, config.sampler.guidance)
        try:
            with torch.device("meta"):
                self.num_branches = UNet(**vars(config.unet)).num_branches
        except ValueError as error:
            raise UserError(str(error)) from None
        self.branch, self.images = config.sampler.branch, config.sampler.images
        self.labels = Labels.parse(args.labels, config.num_classes)
        self.names = names_of_classes(config)
        self.size = check_sizes(config)
        self.settings = {"model": config.name, "unet": asdict(config.unet), "first_stage": asdict(config.first_stage),
                         "num_classes": config.num_classes, **self.sampler.settings, "guidance": self.guidance,
                         "labels": self.labels.rule, "dtype": args.dtype, "first_stage_dtype": "fp32"}

    def load(self) -> None:
        model = load_checkpoint(self.config, self.checkpoint)
        self.settings["checkpoint_sha256"] = checkpoint_sha256(self.checkpoint)
        self.unet = place(model.unet, self.device, self.dtype)
        self.classes = model.classes.to(self.device, self.dtype)
        # In float32 for every --dtype: in half precision it would choose other codes, and it runs once for all the
        # steps.
        self.first_stage = place(model.first_stage, self.device)

    def latents(self, seeds: Sequence[int], policy: Policy | None = None, network: nn.Module | None = None,
                report: Callable[[float], None] | None = None) -> Tensor:
        noise = SeededNoise(seeds, self.device)
        label = torch.tensor([self.labels.of(seed) for seed in seeds], device=self.device)
        if self.guidance != 1:
            label = torch.cat([torch.full_like(label, self.config.num_classes), label])     # [uncond, cond]
        context = self.classes(label)[:, None]                                  # [batch, 1 token, context_dim]
        network = self.unet if network is None else network
        predict = noise_predictor(network, self.config.diffusion, self.dtype, policy, [context], self.guidance)
        return self.sampler.run(predict, noise((self.config.unet.in_channels, self.size, self.size)), noise, report)

    def decode(self, latents: Tensor) -> np.ndarray:
        parts = latents.split(DECODED_AT_ONCE)
        return np.concatenate([to_uint8(first_stage.decode(self.first_stage, part)) for part in parts])

    def describe(self, seeds: Sequence[int]) -> list[str]:
        return [self.labels.describe(seeds)]

    def write_listing(self, run: RunFolder) -> None:
        write_listing(run, self.labels, self.names)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    add_cache_options(parser)
    add_run_options(parser, BATCH_SIZE)
    return parser


@command
def main() -> None:
    args = build_parser().parse_args()
    sample_images(args, LDM(args))


if __name__ == "__main__":
    main()
