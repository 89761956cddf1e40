"""Our Stable Diffusion U-Net against diffusers', and our caching against the PyPI package DeepCache: results and time.

    python -m scripts.compare_diffusers --threads 1 --repeats 10 --out results/throughput/sd_v15_diffusers_cpu.json
    python -m scripts.compare_diffusers --channels-last --threads 1

Both sides hold the same random weights, in the same memory, and take turns in one process (see eval.throughput); a
ratio below 1 means that ours is faster. Dense: one call of the U-Net. Cached: a whole text-to-image pipeline without
text encoder and autoencoder, DDIM, as many steps as --interval says: one full step, the others cached.
"""

import argparse
import copy
import time
from importlib.metadata import version
from pathlib import Path

import torch
from DeepCache import DeepCacheSDHelper
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from eval import results
from eval.models import load_config
from eval.throughput import Timing, interleave
from sampling.cli import command
from sampling.options import DTYPES, prepare_device
from sampling.provenance import provenance
from sampling.settings import UserError
from stable_diffusion.checkpoint import diffusers_arguments
from stable_diffusion.config import Config
from stable_diffusion.pipeline import enable_deepcache

GUIDANCE = 7.5


def build_pipeline(config: Config, unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    """A pipeline of a U-Net alone: prompts and noise are given, latents come out."""
    scheduler = DDIMScheduler(beta_start=config.diffusion.beta_start, beta_end=config.diffusion.beta_end,
                              beta_schedule=config.diffusion.beta_schedule, clip_sample=False, steps_offset=1)
    pipe = StableDiffusionPipeline(vae=None, text_encoder=None, tokenizer=None, unet=unet, scheduler=scheduler,
                                   safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference as a fraction of their largest magnitude."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def summary(ours: Timing, theirs: Timing, differs: float) -> dict:
    return {"ours": ours.to_json(), "theirs": theirs.to_json(), "ratio": ours.ratio(theirs), "difference": differs}


@torch.inference_mode()
def compare(config: Config, batch_size: int, branch: int, interval: int, device: torch.device, dtype: torch.dtype,
            channels_last: bool, repeats: int, warmup: int) -> dict:
    """Time and compare both sides: JSON-compatible {dense, cached: {ours, theirs, ratio, difference}}.

    difference: of the results, as a fraction of their largest magnitude.
    """
    torch.manual_seed(0)
    theirs = UNet2DConditionModel(sample_size=config.latent_size, **diffusers_arguments(vars(config.unet)))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    nn.Module.to(theirs.eval().requires_grad_(False), device, dtype, memory_format=layout)      # diffusers' own warns
    ours = copy.deepcopy(theirs, {id(tensor): tensor for tensor in theirs.parameters()})        # the same weights
    pipes = {"ours": build_pipeline(config, ours), "theirs": build_pipeline(config, theirs)}

    latents = torch.randn(batch_size, config.unet.in_channels, config.latent_size, config.latent_size)
    text = torch.randn(2, batch_size, config.tokens, config.unet.context_dim)
    latents, text = latents.to(device, dtype), text.to(device, dtype)
    t = torch.tensor(500, device=device)

    def dense(unet: UNet2DConditionModel) -> Tensor:
        return unet(torch.cat([latents, latents]), t, text.flatten(0, 1), return_dict=False)[0]

    def cached(pipe: StableDiffusionPipeline) -> Tensor:
        return pipe(prompt_embeds=text[1], negative_prompt_embeds=text[0], latents=latents, output_type="latent",
                    num_inference_steps=interval, guidance_scale=GUIDANCE).images

    enable_deepcache(pipes["ours"], interval, branch)
    timings = interleave({"ours": lambda: dense(ours), "theirs": lambda: dense(theirs)}, device, repeats, warmup)
    result = {"dense": summary(**timings, differs=difference(dense(ours), dense(theirs)))}

    helper = DeepCacheSDHelper(pipe=pipes["theirs"])
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    timings = interleave({name: lambda pipe=pipe: cached(pipe) for name, pipe in pipes.items()}, device, repeats,
                         warmup)
    result["cached"] = summary(**timings, differs=difference(cached(pipes["ours"]), cached(pipes["theirs"])))
    return result


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/sd_v15.yaml"),
                        help="configs/sd_*.yaml (default: %(default)s)")
    parser.add_argument("--branch", type=int, help="0-based skip (default: the paper's, 1)")
    parser.add_argument("--interval", type=int, default=5, help="N of 1:N (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=1,
                        help="images; with guidance each takes two rows of the batch (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=10, help="timed rounds (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=1, help="untimed rounds before them (default: %(default)s)")
    parser.add_argument("--channels-last", action="store_true", help="weights with channels last, on both sides")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu, cuda, cuda:1 (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the network (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--out", type=Path, help="JSON file for the result, written after the timing")
    args = parser.parse_args()

    config, device, started = load_config(args.config), prepare_device(args), time.time()
    if not isinstance(config, Config):
        raise UserError(f"{args.config} is not a model of Stable Diffusion: take configs/sd_*.yaml")
    branch = config.sampler.branch if args.branch is None else args.branch
    branches = (config.unet.num_res_blocks + 1) * len(config.unet.channel_mult)
    if config.unet.num_res_blocks != 2 or not 0 <= branch < branches - 3:
        raise UserError(f"the package DeepCache caches U-Nets of 2 blocks per level, at branches 0 to {branches - 4}; "
                        f"this one has {config.unet.num_res_blocks}, and the branch is {branch}")
    if args.interval < 2:
        raise UserError(f"--interval must be 2 or more, got {args.interval}")
    if args.repeats < 1 or args.warmup < 1:
        raise UserError(f"--repeats and --warmup must be 1 or more, got {args.repeats} and {args.warmup}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)      # fails before the work, where it fails

    where = provenance(device)
    where["versions"]["DeepCache"] = version("DeepCache")
    print(f"{config.name}: {args.batch_size} images with guidance, {args.dtype}, {where['device']} "
          f"({where['device_name']}), {where['threads']} CPU threads, {args.repeats} rounds", flush=True)
    measured = compare(config, args.batch_size, branch, args.interval, device, DTYPES[args.dtype], args.channels_last,
                       args.repeats, args.warmup)
    print(f"{'':40}{'ours s':>9}{'theirs s':>9}{'ratio':>7}{'difference':>12}")
    for name, row in ((f"one full step ({version('diffusers')} of diffusers)", measured["dense"]),
                      (f"{args.interval} steps, branch {branch} (DeepCache {version('DeepCache')})",
                       measured["cached"])):
        print(f"{name:40}{row['ours']['median']:9.3f}{row['theirs']['median']:9.3f}{row['ratio']:7.3f}"
              f"{row['difference']:12.1e}")
    if args.out:
        settings = {"batch_size": args.batch_size, "dtype": args.dtype, "channels_last": args.channels_last,
                    "branch": branch, "interval": args.interval, "guidance": GUIDANCE, "repeats": args.repeats,
                    "warmup": args.warmup, "weights": "random"}
        results.write(args.out, results.Result(
            "compare_diffusers", config.name, settings, throughput=measured, provenance=where,
            finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), duration_s=round(time.time() - started, 3)))
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
