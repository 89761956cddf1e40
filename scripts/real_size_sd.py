"""Stable Diffusion v1.5 at its real size, with random weights in both public layouts: is what we compute right?

    python -m scripts.real_size_sd --out samples/real_size_sd                        512 pixels
    python -m scripts.real_size_sd --out samples/real_size_sd --resolution 256       4 times quicker

diffusers and transformers write the model as a diffusers folder in float16; loaded from it, it is written as one
CompVis file in float32; ours is loaded from that file. The same prompt and noise then go through diffusers' own
StableDiffusionPipeline and our samplers, without caching and with it; theirs is then the PyPI package DeepCache's.
Needs 7 GB of disk and 12 GB of memory; a second run reuses the model. The result goes to OUT/real_size_sd.json.
"""

import argparse
import gc
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
import transformers
from DeepCache import DeepCacheSDHelper
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.diffusers_layout import diffusers_arguments
from run import arguments
from run.cli import command
from run.files import ROOT, write_json
from run.machine import prepare_device
from run.provenance import provenance
from run.weights import save_tensors
from stable_diffusion.checkpoint import (
    KL_F8,
    Model,
    load_checkpoint,
    load_unet,
    published_state_dict,
)
from stable_diffusion.config import Config, load_config
from stable_diffusion.text import VIT_L_14, clip_tokenizer
from unet_caching.errors import UserError
from unet_caching.methods.deepcache import DeepCache
from unet_caching.samplers.samplers import Sampler, noise_predictor
from unet_caching.schedules import uniform

CONFIG = ROOT / "configs" / "sd_v15.yaml"
PROMPT = "a photo of an astronaut riding a horse"
SEED = 0
LIMIT = 2e-5            # of the largest magnitude; the released code's own noise is 3e-6


class Run(NamedTuple):
    """One way of sampling; interval 1: without caching."""
    sampler: str
    interval: int
    branch: int

    @property
    def name(self) -> str:
        return f"{self.sampler}, no caching" if self.interval == 1 else \
            f"{self.sampler}, N={self.interval}, branch {self.branch}"


# The PyPI helper looks up the timestep in place of counting calls, so that its schedules for PNDM are others than ours.
RUNS = (Run("ddim", 1, 0), Run("plms", 1, 0), Run("ddim", 2, 1), Run("ddim", 2, 0), Run("ddim", 3, 4))


def make(config: Config, folder: Path) -> None:
    """Write a random model as a diffusers folder, by diffusers and transformers alone: whole, or not at all."""
    torch.manual_seed(SEED)
    diffusion = config.diffusion
    pipe = StableDiffusionPipeline(
        AutoencoderKL(**KL_F8), CLIPTextModel(CLIPTextConfig.from_dict(VIT_L_14)), clip_tokenizer(),
        UNet2DConditionModel(**diffusers_arguments(vars(config.unet)), sample_size=config.latent_size),
        PNDMScheduler(diffusion.num_timesteps, diffusion.beta_start, diffusion.beta_end, diffusion.beta_schedule,
                      skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        pipe.to(dtype=torch.float16).save_pretrained(temporary, variant="fp16")
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@torch.no_grad()
def theirs(folder: Path, noise: Tensor, steps: int, guidance: float, device: torch.device) -> dict[str, Tensor]:
    """The latents of each run by diffusers' pipeline and the PyPI helper, and the text's tokens under 'context'."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, variant="fp16", local_files_only=True)
    pipe.to(device, torch.float32)
    pipe.set_progress_bar_config(disable=True)
    cond, uncond = pipe.encode_prompt(PROMPT, device, 1, True)
    found = {"context": torch.cat([uncond, cond])}
    schedulers = {"plms": pipe.scheduler, "ddim": DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)}
    for run in RUNS:
        print(f"diffusers: {run.name}", flush=True)
        pipe.scheduler = schedulers[run.sampler]
        helper = DeepCacheSDHelper(pipe)
        if run.interval > 1:
            helper.set_params(cache_interval=run.interval, cache_branch_id=run.branch)
            helper.enable()
        found[run.name] = pipe(PROMPT, num_inference_steps=steps, guidance_scale=guidance, latents=noise.to(device),
                               output_type="latent").images
        if run.interval > 1:
            helper.disable()
    return found


@torch.no_grad()
def ours(config: Config, model: Model, noise: Tensor, steps: int, device: torch.device) -> dict[str, Tensor]:
    """The same by our samplers."""
    tokens = [model.tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").input_ids
              for text in ("", PROMPT)]
    context = model.text_encoder.to(device)(torch.cat(tokens).to(device))[0]
    unet, found = model.unet.to(device), {"context": context}
    for run in RUNS:
        print(f"ours: {run.name}", flush=True)
        cache = DeepCache(run.branch, uniform(steps, run.interval)) if run.interval > 1 else None
        predict = noise_predictor(unet, config.diffusion, torch.float32, cache, [context], config.sampler.guidance)
        found[run.name] = Sampler(run.sampler, steps, "leading", 0.0, config.diffusion).run(predict, noise.to(device))
    return found


def relative(value: Tensor, other: Tensor) -> float:
    """The largest difference as a fraction of the largest magnitude."""
    return ((value - other).abs().max() / other.abs().max()).item()


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and the result")
    parser.add_argument("--steps", type=arguments.whole, default=4, help="sampling steps (default: %(default)s)")
    parser.add_argument("--resolution", type=arguments.whole, default=512,
                        help="pixels, a multiple of 64 (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--threads", type=arguments.whole, help="CPU threads (default: all cores)")
    parser.set_defaults(batch_size=1)
    args = parser.parse_args()
    if args.steps < max(run.interval for run in RUNS):
        raise UserError(f"--steps must be {max(run.interval for run in RUNS)} or more, got {args.steps}")
    if args.resolution < 64 or args.resolution % 64:
        raise UserError(f"--resolution must be a multiple of 64, got {args.resolution}")
    device = prepare_device(args.device, args.threads)
    diffusers.utils.logging.set_verbosity_error()       # it warns of casting
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()

    config = load_config(CONFIG)
    folder, file = args.out / "diffusers", args.out / "compvis.safetensors"
    args.out.mkdir(parents=True, exist_ok=True)
    if not folder.is_dir():
        print("making the model: the diffusers folder", flush=True)
        make(config, folder)
    if not file.is_file():
        print("making the model: the CompVis file", flush=True)
        save_tensors(published_state_dict(load_checkpoint(config, folder)), file)

    size = args.resolution // config.downsampling
    noise = torch.randn(1, config.unet.in_channels, size, size, generator=torch.Generator().manual_seed(SEED))
    expected = theirs(folder, noise, args.steps, config.sampler.guidance, device)
    gc.collect()                        # before ours is in memory too
    model = load_checkpoint(config, file)
    halves = load_unet(config, folder).state_dict()
    same_weights = all(torch.equal(value, halves[name]) for name, value in model.unet.state_dict().items())
    del halves
    found = ours(config, model, noise, args.steps, device)

    dense = {run.sampler: expected[run.name] for run in RUNS if run.interval == 1}
    rows = [{"run": run.name, **run._asdict(), "error": relative(found[run.name], expected[run.name]),
             "moved_by_caching": relative(expected[run.name], dense[run.sampler]) if run.interval > 1 else None}
            for run in RUNS]
    context_error = relative(found["context"], expected["context"])
    passed = same_weights and all(error < LIMIT for error in (context_error, *(row["error"] for row in rows)))
    print(f"\n{args.resolution} pixels, {args.steps} steps; differences as fractions of the largest magnitude\n"
          f"{'':28}{'ours - theirs':>15}{'cached - not':>15}")
    print(f"{'text encoder':28}{context_error:15.1e}")
    for row in rows:
        moved = "" if row["moved_by_caching"] is None else f"{row['moved_by_caching']:.1e}"
        print(f"{row['run']:28}{row['error']:15.1e}{moved:>15}")
    print(f"weights of both layouts equal: {'yes' if same_weights else 'NO'}; "
          f"all differences below {LIMIT:.0e}: {'yes' if passed else 'NO'}")
    write_json(args.out / "real_size_sd.json", {
        "settings": {"model": config.name, "resolution": args.resolution, "steps": args.steps, "seed": SEED,
                     "prompt": PROMPT, "guidance": config.sampler.guidance, "limit": LIMIT},
        "same_weights": same_weights, "context_error": context_error, "runs": rows, "passed": passed,
        "provenance": provenance(device)})
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
