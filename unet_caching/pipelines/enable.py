"""Caching in a diffusers pipeline, in two lines.

    from unet_caching import disable_deepcache, enable_deepcache
    enable_deepcache(pipe, interval=3)      # pipe(...) as before, now one full step in three
    disable_deepcache(pipe)                 # as it was

    with enable_deepcache(pipe, interval=3, forecast=1):
        pipe(...)                           # on in here alone

For pipelines that have a U-Net as `pipe.unet`, for images or videos (docs/pipelines.md lists them), and whose denoising
loop runs in the pipeline's progress bar, as diffusers' own do. The pipeline's modules run as they are: LoRA,
ControlNets, T2I- and IP-Adapters, FreeU, attention processors, offloading and quantised layers act as they do without
caching.

- A step is one network call of the loop, or several that are given the same timestep (`pipelines.loop`); other calls of
  the network compute everything. Schedules are made for the calls of a run; for one less with PLMS (PNDMScheduler with
  skip_prk_steps), which repeats one step: T steps are T + 1 calls there, the last of them a cached one, as in the
  released code (github horseee/DeepCache, 1691a3a). Second-order schedulers, as Heun's, count each of their calls.
- An interval longer than the run leaves one full step, and an order of forecast is lowered to what a run can feed. A
  center beyond the run's steps is an error.
- ControlNets run on every step, and their residuals enter at all skips that a step computes. A cached feature holds
  those of its own full step, as it holds what adapters added to the encoder.
- Calls with gradients compute everything. Pipelines that read attention maps of the same step are refused.
- `torch.compile(pipe.unet)`, before or after: one graph for full steps, one for cached ones.
- Several pipelines may share one U-Net, each with its own settings or without caching, in threads of their own too.
- `logging.getLogger("unet_caching")` tells at the end of each run, at level INFO, what it did and what that saved.
"""

import operator
from dataclasses import fields
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from unet_caching.errors import UserError
from unet_caching.methods.deepcache import DeepCacheOptions
from unet_caching.methods.forecast import ForecastOptions
from unet_caching.pipelines.bar import ProgressBar, as_options_error
from unet_caching.pipelines.install import check, install, uninstall, unwrapped
from unet_caching.pipelines.parts import num_skips
from unet_caching.pipelines.run import recompute
from unet_caching.registry import METHODS, options_by_name
from unet_caching.schedules import check_settings

# Options of methods that say themselves what each call computes, or leave that to DeepCache where it is asked for.
ALONE = {one.name for method in METHODS if method not in (DeepCacheOptions, ForecastOptions) for one in fields(method)}


class Enabled:
    """What `enable_deepcache` returns: in a `with` statement caching ends, or is as before, where that ends."""

    def __init__(self, pipe: DiffusionPipeline, before: ProgressBar | None):
        self.pipe, self.before = pipe, before

    def __enter__(self) -> DiffusionPipeline:
        return self.pipe

    def __exit__(self, *error: Any) -> None:
        disable_deepcache(self.pipe)
        if self.before is not None:
            _switch_on(self.pipe, self.before)


def enable_deepcache(pipe: DiffusionPipeline, interval: int | None = None, branch: int | None = None,
                     schedule: str = "uniform", center: int | None = None, power: float | None = None,
                     **options: Any) -> Enabled:
    """Switch caching on in a pipeline, or change its settings.

    interval: N of 1:N, one full step in every N; 2 and 3 are cautious, the papers go up to 10, 1 does not cache. By
    default 3, or 1 beside a plan, block_schedule, clock or adaptive rule, which say themselves what each call computes.
    branch: 0-based skip that cached steps still compute; 0 saves most, 1 is the paper's for Stable Diffusion and the
    default, 2 for a UNet2DModel.
    schedule: "uniform", or "centered" with the paper's non-uniform center and power (unet_caching/schedules.py).
    options: of all methods in registry.py, by the names that their flags have in the sample commands, files as
    paths: forecast=1 extrapolates what is reused (not of the papers). A plan wants its own scheduler, too:
    unet_caching.pipelines.scheduler.plan_scheduler.
    Raises UserError for settings that cannot be and for a pipeline that cannot be cached; nothing has changed then.
    """
    if interval is None:
        interval = 1 if options.keys() & ALONE else 3
    options |= {"interval": interval, "branch": branch, "schedule": schedule, "center": center, "power": power}
    with as_options_error():
        given = {name: _plain(name, value) for name, value in options.items()}
        check_settings(schedule, given["interval"], center, power)
        bar = ProgressBar(pipe, options_by_name(given))
    unet = _unet(pipe)
    branch = given["branch"]
    if branch is not None and not (isinstance(branch, int) and 0 <= branch < num_skips(unet)):
        raise UserError(f"branch must be from 0 to {num_skips(unet) - 1} for this model, got {branch!r}")
    bar.check(unet)
    before = vars(pipe).get("progress_bar")
    before = before if isinstance(before, ProgressBar) else None
    disable_deepcache(pipe)
    _switch_on(pipe, bar)
    return Enabled(pipe, before)


def disable_deepcache(pipe: DiffusionPipeline) -> None:
    """Give a pipeline its own U-Net's forward back; without effect where caching is off."""
    bar = vars(pipe).get("progress_bar")
    if isinstance(bar, ProgressBar):
        if bar.shadowed is None:
            del pipe.progress_bar
        else:
            pipe.progress_bar = bar.shadowed
    uninstall(pipe)


def refresh_deepcache(pipe: DiffusionPipeline) -> None:
    """Let the next network call of a pipeline's run compute everything: for callbacks that change the prompt, say."""
    recompute(unwrapped(pipe.unet))


def _switch_on(pipe: DiffusionPipeline, bar: ProgressBar) -> None:
    bar.shadowed = vars(pipe).get("progress_bar")
    pipe.progress_bar = bar
    install(pipe)


def _plain(name: str, value: Any) -> Any:
    """An option: numpy's whole numbers as int, files as paths."""
    if name in ("schedule", "clock_preset", "zero_cache"):
        return value
    if isinstance(value, bool):
        raise ValueError(f"{name} is {value}, and should be a number")
    try:
        return Path(value) if isinstance(value, str) else operator.index(value)
    except TypeError:
        return value                        # what cannot be is left to the checks


def _unet(pipe: Any) -> Any:
    """The U-Net of a pipeline. Raises UserError where there is none that can be cached."""
    name = type(pipe).__name__
    if any(kind.__name__ == "ModularPipeline" for kind in type(pipe).__mro__):
        raise UserError(f"a {name} runs its loop in blocks, outside of pipe.progress_bar: take a pipeline class")
    if not isinstance(pipe, DiffusionPipeline) or not hasattr(pipe, "unet"):
        raise UserError(f"a {name} has no pipe.unet: caching is for diffusers pipelines that have their U-Net there")
    for inner, value in vars(pipe).items():
        if isinstance(value, DiffusionPipeline) and getattr(value, "unet", None) is pipe.unet:
            raise UserError(f"the loop of a {name} runs in pipe.{inner}: use enable_deepcache(pipe.{inner})")
    check(unwrapped(pipe.unet))
    return unwrapped(pipe.unet)
