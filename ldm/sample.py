"""Sample images from a class-conditional latent diffusion model, with or without caching.

    python -m ldm.sample --config configs/ldm_emoji.yaml --interval 10 --seeds 0-99 --out samples/ldm_emoji_n10
    python -m ldm.sample --config configs/ldm_cin256.yaml --interval 10 --out samples/cin256_n10

Defaults are the paper's settings for the model. One image per seed, label included, the same for any batch size or
number of processes; stop it whenever you like, the same command fills in what is missing. Several processes share the
seeds under torchrun, or by giving each its own --seeds and one --out. OUT/images.csv lists seed, label and class name.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from ldm import first_stage
from ldm.checkpoint import checkpoint_sha256, load_checkpoint
from ldm.config import Config, load_config
from ldm.train import class_names
from ldm.unet import UNet
from sampling.cli import command
from sampling.labels import Labels, read_names, write_listing
from sampling.noise import SeededNoise
from sampling.options import (
    DTYPES,
    add_cache_options,
    add_run_options,
    add_sampler_options,
    chosen_guidance,
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
from training import emoji

DECODED_AT_ONCE = 8     # images; what the first stage needs for more would decide the batch size


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="configs/ldm_*.yaml")
    parser.add_argument("--checkpoint", type=Path, help="weights of all three networks, instead of the config's")
    sampler = add_sampler_options(parser)
    sampler.add_argument("--guidance", type=float, help="classifier-free guidance; 1 = none, anything else doubles "
                                                        "the batch")
    parser.add_argument("--labels", default="balanced",
                        help="balanced (default): seed mod the number of classes; random: uniform, from the seed; or a "
                             "list like 207,360 or 0-9, taken in turn")
    add_cache_options(parser)
    add_run_options(parser, batch_size=32)
    return parser


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


@command
def main() -> None:
    args = build_parser().parse_args()
    config = load_config(args.config)
    device, dtype = prepare_device(args), DTYPES[args.dtype]
    sampler = plan_sampler(args, config.sampler, config.diffusion)
    guidance = chosen_guidance(args, config.sampler.guidance)
    try:
        with torch.device("meta"):
            num_branches = UNet(**vars(config.unet)).num_branches
    except ValueError as error:
        raise UserError(str(error)) from None
    plan = plan_cache(args, sampler.steps, num_branches, config.sampler.branch)
    seeds = chosen_seeds(args, config.sampler.images)
    labels = Labels.parse(args.labels, config.num_classes)
    names = names_of_classes(config)
    size = check_sizes(config)
    checkpoint = args.checkpoint or Path(config.checkpoint)
    model = load_checkpoint(config, checkpoint)

    settings = {"model": config.name, "unet": asdict(config.unet), "first_stage": asdict(config.first_stage),
                "num_classes": config.num_classes, "checkpoint_sha256": checkpoint_sha256(checkpoint),
                **sampler.settings, "guidance": guidance, "labels": labels.rule, "dtype": args.dtype,
                "first_stage_dtype": "fp32", "cache": plan.settings}
    run = RunFolder(args.out, settings, provenance(device) | {"compile": args.compile})
    print(labels.describe(seeds), flush=True)

    unet = place(model.unet, device, dtype)
    network = torch.compile(unet, fullgraph=True) if args.compile else unet
    classes = model.classes.to(device, dtype)
    # In float32 for every --dtype: in half precision it would choose other codes, and it runs once for all the steps.
    vq = place(model.first_stage, device)

    def sample(seeds: list[int], report) -> np.ndarray:
        noise = SeededNoise(seeds, device)
        label = torch.tensor([labels.of(seed) for seed in seeds], device=device)
        if guidance != 1:
            label = torch.cat([torch.full_like(label, config.num_classes), label])      # [uncond, cond]
        context = classes(label)[:, None]                                               # [batch, 1 token, context_dim]
        predict = noise_predictor(network, config.diffusion, dtype, plan.make(), [context], guidance)
        z = sampler.run(predict, noise((config.unet.in_channels, size, size)), noise, report)
        return np.concatenate([to_uint8(first_stage.decode(vq, part)) for part in z.split(DECODED_AT_ONCE)])

    made = run.fill(seeds, args.batch_size, sample)
    write_listing(run, labels, names)
    print(summary(args, seeds, made, sampler, plan))


if __name__ == "__main__":
    main()
