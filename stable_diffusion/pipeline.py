"""DeepCache in an existing diffusers pipeline of Stable Diffusion 1.x or 2.x, in two lines.

    from stable_diffusion.pipeline import disable_deepcache, enable_deepcache
    enable_deepcache(pipe, interval=5)      # pipe(...) as before, now one full step in five
    disable_deepcache(pipe)                 # as it was

Text-to-image, image-to-image and inpainting (4 and 9 channels), each also with a ControlNet. Our U-Net runs in the
place of `pipe.unet.forward`, on the very parameters of `pipe.unet`, which stays the object it is: what moves, casts or
fuses its weights (`pipe.to`, `fuse_lora`, CPU offload of whole models) is seen at once, and nothing is copied.

How a run is told from the next. All these pipelines run their denoising loop inside
`with self.progress_bar(total=...)`, after they have set `num_timesteps`, the number of network calls to come.
The pipeline's `progress_bar` is wrapped: a run begins where that block is entered and ends where it is left, by an
exception too. Schedules count network calls from there, whatever the timesteps are. They are made for `num_timesteps`
calls; for one less with PLMS (PNDMScheduler with skip_prk_steps), which repeats one step: T steps are T + 1 calls
there, the last of them a cached one, as in the released code (github horseee/DeepCache, 1691a3a). Second-order
schedulers, as Heun's, count each of their calls.

- An interval longer than the run leaves one full step. A center beyond the run's steps is an error.
- A call of `pipe.unet` outside a run, or one of another shape than the feature (guidance switched off midway, say),
  computes everything.
- ControlNets run on every step, and their residuals enter at all skips that a step computes: on a cached step, at the
  skips up to the branch. A cached feature holds the residuals of its own full step.
- Attention is PyTorch's scaled_dot_product_attention: `enable_attention_slicing` and xformers change nothing here.
- Forward hooks on modules inside `pipe.unet` do not run.
- `torch.compile(pipe.unet)`, before or after, compiles our U-Net: one graph for full steps, one for cached ones.
- Several pipelines may share one U-Net, each with its own settings or without caching.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    PNDMScheduler,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from caching.deepcache import DeepCacheOptions
from caching.methods import options_by_name, plan
from caching.nested import Cache, no_cache
from caching.options import MethodOptions, RunShape
from caching.policy import Policy
from caching.schedules import check_settings
from ldm.diffusers_layout import diffusers_arguments, diffusers_names, diffusers_state_dict, unet_arguments
from runs.errors import UserError, as_user_error
from stable_diffusion.checkpoint import load_checkpoint
from stable_diffusion.config import Config, Diffusion
from stable_diffusion.unet import UNet

PIPELINES = (StableDiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline,
             StableDiffusionControlNetPipeline, StableDiffusionControlNetImg2ImgPipeline,
             StableDiffusionControlNetInpaintPipeline)
SAME_ATTENTION = (AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)


def enable_deepcache(pipe: DiffusionPipeline, interval: int, branch: int = 1, schedule: str = "uniform",
                     center: int | None = None, power: float | None = None, **options: Any) -> None:
    """Switch caching on in a pipeline, or change its settings.

    interval: N of 1:N, one full step in every N; 1 runs our U-Net without DeepCache. branch: 0-based skip index, as
    everywhere (the paper's is 1 for this model). schedule: "uniform", or "centered" with the paper's non-uniform
    center and power (caching/schedules.py). options: of all methods in caching/methods.py, by the names that their
    flags have in the sample commands.
    Raises UserError for settings that cannot be and for a pipeline that cannot be cached; nothing has changed then.
    """
    options |= {"interval": interval, "branch": branch, "schedule": schedule, "center": center, "power": power}
    try:
        check_settings(schedule, interval, center, power)
        methods = options_by_name(options)
    except ValueError as error:
        raise UserError(str(error)) from None
    unet = _unet_of(pipe)
    forward = _installed(unet) or CachedForward(unet)
    forward.check()
    if not (isinstance(branch, int) and 0 <= branch < forward.net.num_branches):
        raise UserError(f"branch must be from 0 to {forward.net.num_branches - 1} for this model, got {branch!r}")
    settings = Settings(methods, forward.net.num_branches)
    disable_deepcache(pipe)
    forward.install(pipe)
    pipe.progress_bar = RunStart(pipe, forward, settings)


def disable_deepcache(pipe: DiffusionPipeline) -> None:
    """Give a pipeline its own U-Net's forward back; without effect where DeepCache is off."""
    start = vars(pipe).get("progress_bar")
    if isinstance(start, RunStart):
        start.forward.uninstall(pipe)
        if start.shadowed is None:
            del pipe.progress_bar
        else:
            pipe.progress_bar = start.shadowed
    elif isinstance(pipe, PIPELINES) and pipe.unet is not None:     # the user has set another progress_bar since
        forward = _installed(_unwrapped(pipe.unet))
        if forward is not None:
            forward.uninstall(pipe)


def load_pipeline(config: Config, path: Path) -> StableDiffusionPipeline:
    """A text-to-image pipeline of a checkpoint, on our U-Net, without caching until `enable_deepcache` sets it.

    path: as `stable_diffusion.checkpoint.load_checkpoint` takes it, whose UserErrors it raises. In float32, on the CPU.
    The scheduler is PLMS, as Stable Diffusion's own; DDIM for a network that predicts v, because PNDMScheduler combines
    the v of different timesteps. There is no safety checker.
    """
    model = load_checkpoint(config, path)
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=config.latent_size, **diffusers_arguments(vars(config.unet)))
    unet.load_state_dict(diffusers_state_dict(model.unet), assign=True)
    pipe = StableDiffusionPipeline(
        vae=model.vae, text_encoder=model.text_encoder, tokenizer=model.tokenizer,
        unet=unet.eval().requires_grad_(False), scheduler=scheduler(config.diffusion),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    enable_deepcache(pipe, interval=1)
    return pipe


def scheduler(diffusion: Diffusion) -> PNDMScheduler | DDIMScheduler:
    """diffusers' scheduler for a network's noise schedule and prediction."""
    cosine = diffusion.beta_schedule == "cosine"
    noise = {"num_train_timesteps": diffusion.num_timesteps,
             "beta_schedule": "squaredcos_cap_v2" if cosine else diffusion.beta_schedule,
             **({} if cosine else {"beta_start": diffusion.beta_start, "beta_end": diffusion.beta_end}),
             "steps_offset": 1, "set_alpha_to_one": False}
    if diffusion.prediction == "v":
        return DDIMScheduler(prediction_type="v_prediction", clip_sample=False, **noise)
    return PNDMScheduler(skip_prk_steps=True, **noise)


class Settings(NamedTuple):
    """How one pipeline caches. methods: their options. num_branches: skips of its U-Net."""
    methods: Sequence[MethodOptions]
    num_branches: int

    def cache(self, num_steps: int, calls: int, like: Tensor) -> Policy | None:
        """The policy of one run on tensors like this one; None without caching.

        Raises UserError for a schedule that so few steps do not have.
        """
        fitting = [replace(one, interval=min(one.interval, num_steps)) if isinstance(one, DeepCacheOptions) else one
                   for one in self.methods]
        with as_user_error(f"this run has {num_steps} steps: "):
            found = plan(fitting, RunShape(num_steps, calls, self.num_branches, 1))
            found.check({"steps": num_steps})
        return found.policy(like.device, like.dtype)


class Run:
    """One denoising loop: counts its network calls."""

    def __init__(self, cache: Policy | None):
        self.cache = cache
        self.call = 0
        self.fits: tuple | None = None

    def next(self, x: Tensor) -> Cache:
        """What the next network call, on x, is given as its cache."""
        if self.cache is None:
            return no_cache
        fits = x.shape, x.dtype, x.device
        if fits == self.fits:
            self.cache.at(self.call)
        else:
            self.cache.reset()          # nothing to reuse, or nothing that fits: the next call is a full one
        self.call, self.fits = self.call + 1, fits
        return self.cache


class RunStart:
    """A pipeline's `progress_bar`: the one that it had before, with a run around the loop that it counts."""

    def __init__(self, pipe: DiffusionPipeline, forward: "CachedForward", settings: Settings):
        self.pipe, self.forward, self.settings = pipe, forward, settings
        self.shadowed = vars(pipe).get("progress_bar")      # set on the object by the user; else it is the class's
        self.progress_bar = pipe.progress_bar

    def __call__(self, iterable: Any = None, total: int | None = None) -> Any:
        return self.progress_bar(iterable) if total is None else self._run(total)

    @contextmanager
    def _run(self, total: int) -> Iterator:
        if _unwrapped(self.pipe.unet) is not self.forward.unet:
            raise UserError("pipe.unet is another one than when DeepCache was enabled: call enable_deepcache again")
        plms = self.pipe.scheduler.config.get("skip_prk_steps", False)
        calls, weight = self.pipe.num_timesteps, next(self.forward.unet.parameters())
        run = Run(self.settings.cache(calls - plms, calls, weight))
        self.forward.check()
        outer, self.forward.run = self.forward.run, run     # a callback may run the pipeline within a run
        try:
            with self.progress_bar(total=total) as bar:
                yield bar
        finally:
            self.forward.run = outer


class CachedForward:
    """The forward of a diffusers U-Net, by our U-Net on the same parameters.

    Raises UserError for a U-Net of another architecture.
    """

    def __init__(self, unet: UNet2DConditionModel):
        with torch.device("meta"):
            self.net = UNet(**unet_arguments(unet.config)).eval()
        self.unet = unet
        # Where each of our parameters belongs, with its name in diffusers.
        self.places = [(self.net.get_submodule(path), leaf, name) for own, name in diffusers_names(self.net).items()
                       for path, _, leaf in [own.rpartition(".")]]
        self.run: Run | None = None
        self.pipes: WeakSet[DiffusionPipeline] = WeakSet()      # in which DeepCache is on

    def install(self, pipe: DiffusionPipeline) -> None:
        """Take the place of the U-Net's forward."""
        if not self.pipes:
            slots = vars(self.unet)
            slot = "_old_forward" if "_old_forward" in slots else "forward"     # inside the hook of a CPU offload
            self.shadowed = slots.get(slot)
            setattr(self.unet, slot, self.forward)
        self.pipes.add(pipe)

    def uninstall(self, pipe: DiffusionPipeline) -> None:
        """Give the U-Net its own forward back, unless another pipeline caches with it."""
        self.pipes.discard(pipe)
        if self.pipes:
            return
        slots = vars(self.unet)
        for slot in ("_old_forward", "forward"):        # a hook may have come, or gone, since
            if slots.get(slot) == self.forward:
                if self.shadowed is not None or slot == "_old_forward":
                    setattr(self.unet, slot, self.shadowed or type(self.unet).forward.__get__(self.unet))
                else:
                    delattr(self.unet, slot)

    def check(self) -> None:
        """Take over the U-Net's parameters, as they are now. Raises UserError for layers that ours has not."""
        modules = dict(self.unet.named_modules())
        _refuse_additions(modules)
        theirs = _parameters(modules)
        differing = sorted(theirs.keys() ^ {name for _, _, name in self.places})
        if differing:
            raise UserError(f"pipe.unet is not a plain U-Net of Stable Diffusion: it differs in {', '.join(differing)}")
        for module, leaf, name in self.places:
            if getattr(module, leaf) is not theirs[name]:
                setattr(module, leaf, theirs[name])

    @torch.compiler.disable(recursive=False)        # its counting is not for a graph; the network that it calls is
    def forward(self, sample: Tensor, timestep: Tensor | float | int, encoder_hidden_states: Tensor,
                class_labels: Tensor | None = None, timestep_cond: Tensor | None = None,
                attention_mask: Tensor | None = None, cross_attention_kwargs: dict | None = None,
                added_cond_kwargs: dict | None = None, down_block_additional_residuals: tuple | None = None,
                mid_block_additional_residual: Tensor | None = None,
                down_intrablock_additional_residuals: tuple | None = None,
                encoder_attention_mask: Tensor | None = None,
                return_dict: bool = True) -> UNet2DConditionOutput | tuple[Tensor]:
        """Do as UNet2DConditionModel.forward. Raises UserError for what Stable Diffusion's U-Net does not take."""
        _refuse("class_labels", class_labels is not None, "this U-Net has no classes")
        _refuse("timestep_cond", timestep_cond is not None, "this U-Net is not distilled for a guidance scale")
        for name, mask in (("attention_mask", attention_mask), ("encoder_attention_mask", encoder_attention_mask)):
            _refuse(f"{name} with zeros", mask is not None and not bool((mask == 1).all()),
                    "Stable Diffusion attends to all tokens")
        # The scale of LoRA layers is without effect: there are none that are not fused.
        others = sorted((cross_attention_kwargs or {}).keys() - {"scale"})
        _refuse(f"cross_attention_kwargs {', '.join(others)}", others != [],
                "they are for attention processors, and none runs here")
        added = sorted(key for key, value in (added_cond_kwargs or {}).items() if value is not None)
        _refuse(f"added_cond_kwargs {', '.join(added)}", added != [], "they are of an IP-Adapter or another U-Net")
        control = self._control(down_block_additional_residuals, mid_block_additional_residual,
                                down_intrablock_additional_residuals)
        cache: Cache = no_cache
        if self.run is None:
            self.check()
        else:
            cache = self.run.next(sample)
        t = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        out = self.net(sample, t, encoder_hidden_states, cache=cache, control=control)
        return UNet2DConditionOutput(sample=out) if return_dict else (out,)

    def _control(self, skips: Sequence[Tensor] | None, middle: Tensor | None,
                 within: Sequence[Tensor] | None) -> list[Tensor] | None:
        """A ControlNet's residuals as our U-Net takes them. Raises UserError for those of something else."""
        _refuse("the residuals of a T2I-Adapter", within is not None or (skips is None) != (middle is None),
                "they change the encoder from within")
        if skips is None or middle is None:
            return None
        if len(skips) != self.net.num_branches:
            raise UserError(f"the ControlNet has {len(skips)} residuals for {self.net.num_branches} skips: it is of "
                            "another architecture")
        return [*skips, middle]


def _unwrapped(unet: nn.Module) -> nn.Module:
    """The U-Net in what torch.compile made of it."""
    return getattr(unet, "_orig_mod", unet)


def _unet_of(pipe: DiffusionPipeline) -> UNet2DConditionModel:
    """The U-Net of a pipeline that can be cached. Raises UserError for any other."""
    if not isinstance(pipe, PIPELINES):
        raise UserError(f"{type(pipe).__name__} is not supported: this is for Stable Diffusion 1.x and 2.x, in "
                        f"{', '.join(known.__name__ for known in PIPELINES)}")
    unet = _unwrapped(pipe.unet)
    if not isinstance(unet, UNet2DConditionModel):
        raise UserError(f"pipe.unet is a {type(unet).__name__} and should be a UNet2DConditionModel")
    return unet


def _installed(unet: UNet2DConditionModel) -> CachedForward | None:
    """The forward that already runs in the place of the U-Net's, if one of ours does."""
    owners = (getattr(vars(unet).get(slot), "__self__", None) for slot in ("_old_forward", "forward"))
    return next((owner for owner in owners if isinstance(owner, CachedForward)), None)


# These look at every module at the start of every run; vars() is ten times as fast as hasattr() where nothing is found.

def _is_lora(module: nn.Module) -> bool:
    return "base_layer" in vars(module)["_modules"]


def _parameters(modules: Mapping[str, nn.Module]) -> Mapping[str, nn.Parameter]:
    """A U-Net's parameters by name, without those of LoRA layers around them."""
    layers = tuple(f"{name}." for name, module in modules.items() if _is_lora(module))
    return {f"{name}.{leaf}".replace(".base_layer.", "."): parameter for name, module in modules.items()
            for leaf, parameter in vars(module)["_parameters"].items()
            if parameter is not None and (f"{name}.".endswith(".base_layer.") or not f"{name}.".startswith(layers))}


def _refuse_additions(modules: Mapping[str, nn.Module]) -> None:
    """Refuse what has been added to a U-Net and would not run. Raises UserError."""
    for name, module in modules.items():
        added = vars(module)
        if _is_lora(module):
            # A layer that is switched off takes its weights out of the fused ones again as it runs.
            if module.disable_adapters and module.merged:
                raise UserError("pipe.unet has fused LoRA layers that are switched off: call pipe.unfuse_lora() first")
            if module.active_adapters and not (module.disable_adapters or module.merged):
                raise UserError("pipe.unet has LoRA layers that are not fused, which would not run: call "
                                "pipe.fuse_lora() first")
        processor = added.get("processor") or added["_modules"].get("processor")
        if processor is not None and type(processor) not in SAME_ATTENTION:
            raise UserError(f"pipe.unet has an attention processor of its own, {type(processor).__name__} at {name}, "
                            "which would not run: call pipe.unet.set_default_attn_processor() first")
        if all(added.get(scale) for scale in ("s1", "s2", "b1", "b2")):
            raise UserError("FreeU is on, which would not run: call pipe.disable_freeu() first")
        if name and ("_hf_hook" in added or "_diffusers_hook" in added):
            raise UserError(f"pipe.unet has a hook at {name} (sequential or group offload, layerwise casting), which "
                            "would not run: offload whole models, with pipe.enable_model_cpu_offload()")
    if "encoder_hid_proj" in modules:
        raise UserError("pipe.unet has an IP-Adapter, which is not supported: call pipe.unload_ip_adapter() first")


def _refuse(what: str, given: bool, reason: str) -> None:
    if given:
        raise UserError(f"DeepCache does not take {what}: {reason}")
