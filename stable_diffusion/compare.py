"""One prompt and seed without and with caching: both times, MACs, the speed-up, and the two images side by side.

    python -m stable_diffusion.compare --model checkpoints/stable-diffusion-v1-5 --prompt "a lighthouse at dusk"
    python -m stable_diffusion.compare --config configs/sd_emoji.yaml --prompt "cat face" --out compare.png

Beside the picture, its numbers are written as JSON. A time is of one image, from the prompt to its pixels, measured
once after a warm-up; eval.throughput measures more carefully. No file is downloaded.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from eval.cost.macs import costs, giga
from run.cli import command
from run.families import example_inputs
from run.files import ROOT, write_atomically, write_json
from run.image_model import kinds_of_calls, parse_run
from run.machine import Machine
from run.provenance import provenance
from run.psnr import psnr
from stable_diffusion.family import FAMILY
from unet_caching.errors import UserError
from unet_caching.options import option
from unet_caching.policy import Policy
from unet_caching.speed.accelerate import accelerated

MACS = ("macs", "macs_fc")      # by the papers' convention, and with attention's products (eval/macs.py)


@dataclass(frozen=True)
class Options:
    title: ClassVar[str] = "the picture"
    seed: int = option(0, "of the image (default: 0)", least=0)
    out: Path = option(Path("compare.png"), "the picture (default: %(default)s)")


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
    defaults = {"config": ROOT / "configs" / "sd_v15.yaml", "interval": 5}
    spec, args, machine = parse_run(__doc__, Options, Machine, family=FAMILY, defaults=defaults)
    if args.out.suffix.lower() != ".png" or not args.out.absolute().parent.is_dir():
        raise UserError(f"--out must be a .png file in a folder that is there, got {args.out}")
    run = spec.open()
    if not run.caching:
        raise UserError("--interval 1 is no caching, and leaves nothing to compare: take 2 or more")
    from stable_diffusion.model import StableDiffusion  # here: it takes seconds to import
    model = StableDiffusion(run, machine)
    model.check_seeds([args.seed])
    model.load()
    run.refuse_foreign(model.settings)
    for line in model.describe([args.seed]):
        print(line, flush=True)
    network = accelerated(model.unet, machine.compile, machine.cuda_graphs,
                          kinds_of_calls(run) if machine.compile else 1)

    def image(policy: Policy | None) -> np.ndarray:
        return model.decode(model.latents([args.seed], policy, network.network))[0]

    whole, model.sampler = model.sampler, replace(model.sampler, steps=2)
    for policy in (None, model.policy()):       # full and cached steps, and what comes before and after
        image(policy)
    model.sampler = whole
    counted = costs(run.unet, (torch.zeros(1, *model.shape), *example_inputs(run.config)[1:]))
    images: dict[str, np.ndarray] = {}
    arms: dict[str, dict[str, float]] = {}
    for name, policy, in_macs in (("uncached", None, None), ("cached", model.policy(), run.caching.policy("meta"))):
        start = time.perf_counter()
        images[name] = image(policy)            # pixels on the CPU: nothing is left running
        seconds = time.perf_counter() - start
        calls = counted.calls(in_macs, run.calls)
        macs = [sum(values) * run.rows_per_image for values in zip(*calls, strict=True)]
        arms[name] = {"seconds": seconds, "full_calls": run.full_calls if policy else run.calls, "calls": run.calls,
                      **dict(zip(MACS, macs, strict=True))}

    first, second = arms.values()
    error = np.square(images["uncached"].astype(float) - images["cached"]).mean()
    result = {"settings": {**model.settings, "prompt": model.condition.prompt, "seed": args.seed, **network.in_use,
                           "cache": run.caching.settings},
              **arms, "speed_up": {key: first[key] / second[key] for key in ("seconds", *MACS)},
              "psnr_db": float(psnr(error)) if error else None, "provenance": provenance(model.device)}
    captions = [f"{name}: {arm['seconds']:.2f} s\n{arm['full_calls']} full of {arm['calls']} calls"
                for name, arm in arms.items()]
    side_by_side(dict(zip(captions, images.values(), strict=True)), args.out)
    write_json(args.out.with_suffix(".json"), result)
    print(table(result, ", ".join(method.summary for method in run.caching.methods)))
    print(f"{args.out} and {args.out.with_suffix('.json')}")


def table(result: dict, caching: str) -> str:
    """The numbers as text for the screen. caching: the methods in words."""
    ratio, found = result["speed_up"], result["psnr_db"]
    lines = [f"one image, {result['provenance']['device_name']}, {result['settings']['dtype']}; {caching}",
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
