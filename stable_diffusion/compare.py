"""One prompt and seed without and with caching: both times, MACs, the speed-up, and the two images side by side.

    python -m stable_diffusion.compare --model checkpoints/stable-diffusion-v1-5 --prompt "a lighthouse at dusk"
    python -m stable_diffusion.compare --config configs/sd_emoji.yaml --prompt "cat face" --out compare.png

Beside the picture, its numbers are written as JSON. A time is of one image, from the prompt to its pixels, measured
once after a warm-up; eval.throughput measures more carefully. No file is downloaded.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from caching.deepcache import DeepCache
from eval.cost.macs import average, giga, step_macs
from runs.cli import command
from runs.errors import UserError
from runs.files import ROOT, write_atomically, write_json
from runs.options import (
    DTYPES,
    add_deepcache_options,
    add_device_options,
    add_sampler_options,
    chosen_guidance,
    plan_deepcache,
    plan_sampler,
    prepare_device,
)
from runs.provenance import provenance
from sampling.noise import SeededNoise
from sampling.samplers import Sampler
from speed.graphs import accelerated
from stable_diffusion.checkpoint import checkpoint_sha256, load_checkpoint
from stable_diffusion.config import load_config
from stable_diffusion.text_to_image import TextToImage, check_text_to_image, latent_size

MACS = ("macs", "macs_fc")      # by the papers' convention, and with attention's products (eval/macs.py)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "sd_v15.yaml",
                        help="configs/sd_*.yaml (default: sd_v15.yaml)")
    parser.add_argument("--model", type=Path, help="a diffusers folder or one CompVis file, instead of the config's")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--negative-prompt", default="", help="what guidance leads away from (default: the empty one)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--height", type=int, help="of the images, in pixels (default: the config's resolution)")
    parser.add_argument("--width", type=int)
    parser.add_argument("--out", type=Path, default=Path("compare.png"), help="the picture (default: %(default)s)")
    sampler = add_sampler_options(parser)
    sampler.add_argument("--guidance", type=float, help="classifier-free guidance; 1 = none")
    add_deepcache_options(parser)
    add_device_options(parser.add_argument_group("the run"))
    parser.set_defaults(interval=5)
    return parser


def psnr(a: np.ndarray, b: np.ndarray) -> float | None:
    """Peak signal-to-noise ratio of two uint8 images in dB; None where they are equal."""
    error = ((a.astype(float) - b) ** 2).mean()
    return float(10 * np.log10(255 ** 2 / error)) if error else None


def side_by_side(panels: dict[str, np.ndarray], path: Path) -> None:
    """Save images, uint8 [height, width, 3] of one size, with a caption below each; small ones are enlarged."""
    height, width, _ = next(iter(panels.values())).shape
    scale = max(1, round(256 / width))
    gap, strip = 8, 44
    sheet = Image.new("RGB", (len(panels) * (scale * width + gap) - gap, scale * height + strip), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for i, (caption, image) in enumerate(panels.items()):
        left = i * (scale * width + gap)
        tile = Image.fromarray(image).resize((scale * width, scale * height), Image.Resampling.NEAREST)
        sheet.paste(tile, (left, 0))
        draw.multiline_text((left + 4, scale * height + 3), caption, fill="black", font=font)
    write_atomically(path, lambda temporary: sheet.save(temporary, format="PNG"))


@command
def main() -> None:
    args = build_parser().parse_args()
    config = load_config(args.config)
    device, dtype = prepare_device(args), DTYPES[args.dtype]
    sampler = plan_sampler(args, config.sampler, config.diffusion)
    guidance = chosen_guidance(args, config.sampler.guidance)
    if args.interval == 1:
        raise UserError("--interval 1 is no caching, and leaves nothing to compare: take 2 or more")
    if args.seed < 0:
        raise UserError(f"--seed must be 0 or more, got {args.seed}")
    if args.out.suffix.lower() != ".png" or not args.out.absolute().parent.is_dir():
        raise UserError(f"--out must be a .png file in a folder that is there, got {args.out}")
    check_text_to_image(config)
    height, width = latent_size(config, args.height, args.width)
    path = args.model or Path(config.checkpoint)
    loaded = load_checkpoint(config, path)
    plan = plan_deepcache(args, sampler.steps, loaded.unet.num_branches, config.sampler.branch)
    inputs = (torch.zeros(1, config.unet.in_channels, height, width), torch.zeros(1, dtype=torch.long),
              torch.zeros(1, config.tokens, config.unet.context_dim))
    full_macs, cached_macs = step_macs(loaded.unet, inputs, plan.branch)
    rows = 1 if guidance == 1 else 2
    model = TextToImage(loaded, config, device, dtype)
    network, in_use = accelerated(model.unet, args, graphs=2)

    def image(sampler: Sampler, cache: DeepCache | None) -> np.ndarray:
        noise = SeededNoise([args.seed], device)
        z = model.latents(sampler, noise(inputs[0].shape[1:]), [args.prompt], args.negative_prompt, guidance, cache,
                          noise, network=network)
        return model.decode(z)[0]

    if model.dropped_tokens([args.prompt]):
        print(f"warning: the end of the prompt is not read; it is longer than {config.tokens} tokens", flush=True)
    for cache in (None, DeepCache(plan.branch, [0])):       # full and cached steps, and what comes before and after
        image(replace(sampler, steps=2), cache)
    images, arms = {}, {}
    for name, cache, full_calls in (("uncached", None, sampler.calls), ("cached", plan.make(), len(plan.full_steps))):
        start = time.perf_counter()
        images[name] = image(sampler, cache)                # pixels on the CPU: nothing is left running
        seconds = time.perf_counter() - start
        mean = average(full_macs, cached_macs, range(full_calls), sampler.calls)
        arms[name] = {"seconds": seconds, "full_calls": full_calls, "calls": sampler.calls,
                      **{key: value * sampler.calls * rows for key, value in zip(MACS, mean, strict=True)}}

    first, second = arms.values()
    result = {"settings": {"model": config.name, "checkpoint_sha256": checkpoint_sha256(path), "prompt": args.prompt,
                           "negative_prompt": args.negative_prompt, "seed": args.seed,
                           "height": height * config.downsampling, "width": width * config.downsampling,
                           **sampler.settings, "guidance": guidance, "dtype": args.dtype,
                           **in_use, "cache": plan.settings},
              **arms, "speed_up": {key: first[key] / second[key] for key in ("seconds", *MACS)},
              "psnr_db": psnr(*images.values()), "provenance": provenance(device)}
    captions = [f"{name}: {arm['seconds']:.2f} s\n{arm['full_calls']} full of {arm['calls']} calls"
                for name, arm in arms.items()]
    side_by_side(dict(zip(captions, images.values(), strict=True)), args.out)
    write_json(args.out.with_suffix(".json"), result)
    print(table(result))
    print(f"{args.out} and {args.out.with_suffix('.json')}")


def table(result: dict) -> str:
    """The numbers for the screen."""
    cache, ratio, found = result["settings"]["cache"], result["speed_up"], result["psnr_db"]
    lines = [f"one image, {result['provenance']['device_name']}, {result['settings']['dtype']}; interval "
             f"{cache['interval']}, branch {cache['branch']}, {cache['schedule']}",
             f"{'':10}{'full / calls':>14}{'seconds':>10}{'MACs (G)':>12}{'with attention (G)':>20}"]
    for name in ("uncached", "cached"):
        arm = result[name]
        calls = f"{arm['full_calls']} / {arm['calls']}"
        lines.append(f"{name:10}{calls:>14}{arm['seconds']:10.2f}" + "".join(
            f"{giga(arm[key]):{width},.2f}" for key, width in zip(MACS, (12, 20), strict=True)))
    lines.append(f"{'speed-up':24}{ratio['seconds']:9.2f}x{ratio['macs']:11.2f}x{ratio['macs_fc']:19.2f}x")
    lines.append("the two images are equal" if found is None else f"PSNR between the two images: {found:.2f} dB")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
