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
from sampling.ddim import ddim, final_alpha, make_timesteps
from sampling.diffusion import predicted_noise
from sampling.noise import SeededNoise
from sampling.options import (
    DTYPES,
    add_cache_options,
    add_run_options,
    add_sampler_options,
    at,
    chosen_eta,
    chosen_seeds,
    place,
    plan_cache,
    prepare_device,
    summary,
)
from sampling.provenance import provenance
from sampling.runs import RunFolder, to_uint8
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
    device = prepare_device(args)
    steps = config.sampler.steps if args.steps is None else args.steps
    spacing = args.timesteps or config.sampler.timesteps
    eta = chosen_eta(args, config.sampler.eta)
    try:
        timesteps = make_timesteps(spacing, steps, config.diffusion.num_timesteps)
        alphas = config.alphas_cumprod()
        unet = UNet(**vars(config.unet))
    except ValueError as error:
        raise UserError(str(error)) from None
    plan = plan_cache(args, steps, unet.num_branches, config.sampler.branch)
    seeds = chosen_seeds(args, config.sampler.images)
    checkpoint = args.checkpoint or Path(config.checkpoint)
    if config.md5 and args.checkpoint is None:
        check_md5(checkpoint, config.md5)       # first: a download that was cut short should be called that
    load_checkpoint(unet, checkpoint)

    settings = {"model": config.name, "unet": asdict(config.unet), "diffusion": asdict(config.diffusion),
                "checkpoint_sha256": sha256(checkpoint), "sampler": "ddim", "steps": steps, "timesteps": spacing,
                "eta": eta, "dtype": args.dtype, "cache": plan.settings}
    run = RunFolder(args.out, settings, provenance(device) | {"compile": args.compile})

    unet = place(unet, device, DTYPES[args.dtype])
    network = torch.compile(unet, fullgraph=True) if args.compile else unet
    shape = (config.unet.in_channels, config.unet.resolution, config.unet.resolution)

    def sample(seeds: list[int], report) -> np.ndarray:
        noise, cache = SeededNoise(seeds, device), plan.make()

        def predict(x: torch.Tensor, t: int, step: int) -> torch.Tensor:
            t_batch = torch.full((len(x),), t, device=device)
            output = network(x.to(DTYPES[args.dtype]), t_batch, at(cache, step))
            return predicted_noise(config.diffusion.prediction, output.float(), x, alphas[t].item())

        return to_uint8(ddim(predict, noise(shape), timesteps, alphas, eta, noise,
                             final_alpha(spacing, alphas), lambda step, x: report((step + 1) / steps)))

    made = run.fill(seeds, args.batch_size, sample)
    print(summary(args, seeds, made, steps, plan))


if __name__ == "__main__":
    main()
