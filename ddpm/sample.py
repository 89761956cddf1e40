"""Sample images from a DDPM, with or without caching.

    python -m ddpm.sample --config configs/ddpm_emoji.yaml --interval 5 --seeds 0-255 --out samples/emoji_n5
    python -m ddpm.sample --config configs/ddpm_cifar10.yaml --interval 5 --out samples/cifar10_n5

Defaults are the paper's settings for the model. One image per seed, the same for any batch size or number of
processes; stop it whenever you like, the same command fills in what is missing. Several processes share the seeds
under torchrun, or by giving each its own --seeds and one --out.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from ddpm.checkpoint import load_checkpoint
from ddpm.config import load_config
from ddpm.unet import UNet
from sampling.cli import command
from sampling.noise import SeededNoise
from sampling.options import (
    DTYPES,
    add_cache_options,
    add_run_options,
    add_sampler_options,
    chosen_seeds,
    place,
    plan_cache,
    plan_sampler,
    prepare_device,
    summary,
)
from sampling.provenance import provenance
from sampling.runs import RunFolder, to_uint8
from sampling.samplers import noise_predictor
from sampling.settings import UserError
from sampling.weights import check_md5, sha256


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="configs/ddpm_*.yaml")
    parser.add_argument("--checkpoint", type=Path, help="weights, instead of the config's")
    add_sampler_options(parser)
    add_cache_options(parser)
    add_run_options(parser, batch_size=64)
    return parser


@command
def main() -> None:
    args = build_parser().parse_args()
    config = load_config(args.config)
    device, dtype = prepare_device(args), DTYPES[args.dtype]
    sampler = plan_sampler(args, config.sampler, config.diffusion)
    try:
        unet = UNet(**vars(config.unet))
    except ValueError as error:
        raise UserError(str(error)) from None
    plan = plan_cache(args, sampler.steps, unet.num_branches, config.sampler.branch)
    seeds = chosen_seeds(args, config.sampler.images)
    checkpoint = args.checkpoint or Path(config.checkpoint)
    if config.md5 and args.checkpoint is None:
        check_md5(checkpoint, config.md5)       # first: a download that was cut short should be called that
    load_checkpoint(unet, checkpoint)

    settings = {"model": config.name, "unet": asdict(config.unet), "checkpoint_sha256": sha256(checkpoint),
                **sampler.settings, "dtype": args.dtype, "cache": plan.settings}
    run = RunFolder(args.out, settings, provenance(device) | {"compile": args.compile})

    unet = place(unet, device, dtype)
    network = torch.compile(unet, fullgraph=True) if args.compile else unet
    shape = (config.unet.in_channels, config.unet.resolution, config.unet.resolution)

    def sample(seeds: list[int], report) -> np.ndarray:
        noise = SeededNoise(seeds, device)
        predict = noise_predictor(network, config.diffusion, dtype, plan.make())
        return to_uint8(sampler.run(predict, noise(shape), noise, report))

    made = run.fill(seeds, args.batch_size, sample)
    print(summary(args, seeds, made, sampler, plan))


if __name__ == "__main__":
    main()
