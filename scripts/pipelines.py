"""Measure the numbers of docs/pipelines.md, into results/pipelines.jsonl.

    python -m scripts.pipelines macs            of video U-Nets at their real sizes, on the meta device: minutes
    python -m scripts.pipelines noise           does a forecast help if a sampler adds fresh noise at every step? On the
                                                three small models; an hour of a core

A run with fresh noise is compared with the same sampler without caching, on the same seeds and the same noise.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import diffusers
import numpy as np
import torch
from torch import Tensor

from eval.metrics.intervals import mean_estimate
from lab.plans.distances import psnr_to
from run import arguments
from run.cli import command
from run.files import ROOT
from run.image_model import ImageModel, open_model
from run.machine import Machine
from run.provenance import provenance
from run.results import Metric, Result, read_packed, write_packed
from run.seeds import format_seeds, in_batches, parse_seeds
from run.spec import RunSpec
from unet_caching.methods.deepcache import DeepCache
from unet_caching.options import option, required
from unet_caching.pipelines.cost import FULL, Counter, Meter
from unet_caching.pipelines.forward import argument_names, cached_forward
from unet_caching.pipelines.parts import Caching
from unet_caching.policy import Policy

FILE = ROOT / "results/pipelines.jsonl"
BRANCHES = (0, 1, 2)
STEPS, INTERVAL, ORDERS = 50, 3, (0, 1)
MODELS: dict[str, dict] = {"sd_emoji": {"prompts": ROOT / "data/emoji/prompts.txt"}, "ldm_emoji": {}, "ddpm_emoji": {}}
# diffusers' schedulers: class, configuration, and further arguments of step()
SAMPLERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "DDIM, eta 1": ("DDIMScheduler", {"clip_sample": False}, {"eta": 1.0}),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}, {}),
    "SDE-DPM-Solver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++",
                                                         "final_sigmas_type": "zero"}, {})}
# Class, configuration, and the shapes of the arguments of a call with guidance, which doubles the rows.
VIDEO: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]] = {
    **{f"SVD, {n} frames, 576 x 1024": ("UNetSpatioTemporalConditionModel", {"num_attention_heads": (5, 10, 20, 20)}, {
        "sample": (2, n, 8, 72, 128), "encoder_hidden_states": (2, 1, 1024), "added_time_ids": (2, 3)})
       for n in (14, 25)},
    "AnimateDiff, 16 frames, 512 x 512": ("UNetMotionModel", {"cross_attention_dim": 768}, {
        "sample": (2, 4, 16, 64, 64), "encoder_hidden_states": (32, 77, 768)}),
    "ZeroScope, 24 frames, 320 x 576": ("UNet3DConditionModel", {}, {
        "sample": (2, 4, 24, 40, 72), "encoder_hidden_states": (2, 77, 1024)})}


@dataclass(frozen=True)
class Options:
    title: ClassVar[str] = "the measurement"
    what: str = required("macs or noise", word=True, choices=("macs", "noise"))
    seeds: str = option("0-31", "of the runs with fresh noise (default: %(default)s)")


def macs() -> Iterator[Result]:
    """The MACs of a full call, and of a cached call at each branch."""
    for name, (kind, config, shapes) in VIDEO.items():
        started = time.time()
        with torch.device("meta"):
            unet = getattr(diffusers, kind)(**config).eval()
            inputs = {key: torch.empty(shape) for key, shape in shapes.items()} | {"timestep": torch.empty(())}
        meter = Meter(unet.to("meta"))                     # one of its tensors is not on the meta device
        for branch in BRANCHES:
            policy = DeepCache(branch, [0])
            for step, what in enumerate((FULL, branch)):
                with torch.no_grad(), Counter(meter, what):
                    cached_forward(unet, argument_names(unet), Caching(policy.at(step)), **inputs)
        full, *cached = (meter.macs[what] for what in (FULL, *BRANCHES))
        yield Result("macs", name, {"unet": kind, "config": config, "shapes": shapes}, provenance=provenance("cpu"),
                     details={"name": name, "full": full, "cached": cached}).stamped(started)


@torch.no_grad()
def sampled(model: ImageModel, sampler: str, seeds: Sequence[int], policy: Policy | None) -> Tensor:
    """The final latents of a sampler, by seed: [seeds, *shape]."""
    kind, settings, words = SAMPLERS[sampler]
    betas = model.config.diffusion.betas()
    scheduler = getattr(diffusers, kind)(len(betas), trained_betas=betas.tolist(), timestep_spacing="trailing",
                                         **settings)
    scheduler.set_timesteps(STEPS)
    predict, x, draws = model.start(seeds, policy)
    x = x * scheduler.init_noise_sigma
    for step, t in enumerate(scheduler.timesteps):
        noise = predict(scheduler.scale_model_input(x, t), float(t), step)
        x = scheduler.step(noise, t, x, generator=draws.generators, **words).prev_sample
    return x


def noise(seeds: Sequence[int], machine: Machine) -> Iterator[Result]:
    """The PSNR of reuse and forecast to the run without caching."""
    for name, prompts in MODELS.items():
        spec = RunSpec.of(ROOT / f"configs/{name}.yaml", sampler="ddim", steps=STEPS, timesteps="trailing", **prompts)
        runs = [spec.having(interval=INTERVAL, forecast=order).open() for order in ORDERS]
        model = open_model(spec.open(), machine)
        model.load()
        for sampler in SAMPLERS:
            started = time.time()
            batches = in_batches(seeds, machine.batch_size)
            whole = [sampled(model, sampler, batch, None) for batch in batches]
            for order, run in zip(ORDERS, runs, strict=True):
                values = [value for batch, x in zip(batches, whole, strict=True) for value in psnr_to(x, sampled(
                    model, sampler, batch, run.caching.policy(model.device, model.dtype)))]
                yield Result("fresh noise", name, model.settings | {"sampler": sampler, "cache": run.caching.settings},
                             len(seeds), {"PSNR of latents": Metric.of(mean_estimate(np.array(values)))},
                             provenance=provenance(model.device),
                             details={"name": f"{sampler}, order {order}", "seeds": format_seeds(list(seeds)),
                                      "psnr": [round(float(value), 4) for value in values]}).stamped(started)


@command
def main() -> None:
    options, machine = arguments.parse(__doc__, Options, Machine)
    known = {(one.model, one.details["name"]): one for one in (read_packed(FILE) if FILE.is_file() else ())}
    for one in macs() if options.what == "macs" else noise(parse_seeds(options.seeds), machine):
        print(one.model, one.details["name"], *(metric.value for metric in one.metrics.values()), flush=True)
        known[one.model, one.details["name"]] = one
        write_packed(FILE, list(known.values()))


if __name__ == "__main__":
    main()
