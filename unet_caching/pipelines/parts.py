"""diffusers' U-Nets in parts: one callable between each two skips, in the order of our branches.

A part is one layer of a block. It runs in the block's own forward, on a stand-in for the block that has only this
layer. So the calls of modules, FreeU, checkpointing and differences between versions stay diffusers' code.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor

from unet_caching.nest import Cache

Theirs = Any                # a module of diffusers, whose attributes mypy does not know
Down = Callable[[Tensor], Tensor]
Up = Callable[[Tensor, Tensor, torch.Size], Tensor]         # inner, skip, size of the level above
LAYER = ("resnets", "temp_convs", "attentions", "temp_attentions", "motion_modules")    # in their order in a forward
RESAMPLE = ("downsamplers", "upsamplers")


class Caching(NamedTuple):
    """The caching of a network call."""
    cache: Cache
    asked: Mapping[Theirs, str] = {}        # modules whose residuals the cache may keep -> their keys
    meter: AbstractContextManager | None = None         # a context that counts the call, or None


class Call:
    """One network call. It runs a block's hooks, which diffusers uses to offload groups of layers, around the parts of
    the block that run. adapter: residuals of a T2I-Adapter (arXiv 2302.08453)."""
    inside: Theirs = None                   # the block with hooks whose parts are running

    def __init__(self, caching: Caching, adapter: Sequence[Tensor]):
        self.caching, self.adapter = caching, adapter

    def enter(self, block: Theirs) -> None:
        """Parts of this block run next."""
        if block is not self.inside:
            self.leave()
            if "_diffusers_hook" in block.__dict__:
                self.inside = block
                for hook in reversed(hooks(block)):
                    hook.pre_forward(block)

    def leave(self) -> None:
        """The last part of a block has run."""
        if self.inside is not None:
            block, self.inside = self.inside, None
            for hook in hooks(block):
                hook.post_forward(block, None)


class StandIn:
    """Replaces a module in the forward of its class. It has all attributes of the module, except those given here."""

    def __init__(self, module: Theirs, **own: Any):
        self.__dict__.update(module.__dict__)           # copied, so that attributes are found without __getattr__
        self.__dict__.update(module._modules)
        self.__dict__.update(own)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class Block(StandIn):
    """Replaces a block in the forward of its U-Net, and records its arguments. _answer: makes the value to return."""
    _answer: Callable[[Tensor], Any] | None = None

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._x, self._args, self._kwargs = hidden_states, args, kwargs
        return hidden_states if self._answer is None else self._answer(hidden_states)


def encoder(unet: Theirs, call: Call) -> tuple[list[Block], list[Down]]:
    """The down blocks, and their parts. Part k makes skip k from its input; skip 0 is the output of conv_in."""
    blocks: list[Block] = []
    parts: list[Down] = [lambda x: x]
    for index, module in enumerate(unet.down_blocks):
        layers, first = len(module._modules["resnets"]._modules), len(parts)
        block = Block(module)
        for i in range(layers):
            parts.append(partial(_down, call, block, i))
        if module._modules.get("downsamplers") is not None:
            parts.append(partial(_downsample, call, block))
        skips = len(parts) - first
        block._answer = lambda x, skips=skips: (x, (x,) * skips)
        blocks.append(block)
        if index < len(call.adapter):       # added before the downsampling in blocks with cross-attention, else after
            place = first + layers - 1 if getattr(block, "has_cross_attention", False) else -1
            parts[place] = lambda x, own=parts[place], more=call.adapter[index]: own(x) + more  # type: ignore[misc]
    return blocks, parts


def decoder(unet: Theirs, call: Call) -> tuple[list[Block], list[Up]]:
    """The up blocks, and their parts. Part k takes skip k."""
    blocks: list[Block] = []
    parts: list[Up] = []
    for module in unet.up_blocks:
        block = Block(module)
        blocks.append(block)
        for i in range(len(module._modules["resnets"]._modules)):
            parts.append(partial(_up, call, block, i))
    return blocks, parts[::-1]


def middle(block: Block | None, call: Call, place: int, x: Tensor) -> Tensor:
    """Run the middle block, in parts if its residuals may be kept. place: the index of a T2I-Adapter XL's residual."""
    if block is not None:
        call.enter(block._module)
        if any(name.startswith("middle_block.") for name in call.caching.asked.values()):
            lists = {name: [*modules] for name, modules in block._module.named_children()}
            x = _forward(call, block, lists)(x, *block._args, **block._kwargs)
        else:
            x = block._module(x, *block._args, **block._kwargs)
    extra = call.adapter[place] if place < len(call.adapter) else None
    return x if extra is None or extra.shape != x.shape else x + extra


def _down(call: Call, block: Block, i: int, x: Tensor) -> Tensor:
    call.enter(block._module)
    run = _forward(call, block, layer(block, i), downsamplers=None)
    return run(x, *block._args, **block._kwargs)[0]


def _downsample(call: Call, block: Block, x: Tensor) -> Tensor:
    call.enter(block._module)
    for module in block.downsamplers:
        if type(module) is ResnetBlock2D:
            x = module(x, *block._args[:1] or [block._kwargs["temb"]])
        elif hasattr(module, "input_kwargs_to_split"):      # FreeNoise's split inference
            x = module(hidden_states=x)
        else:
            x = module(x)
    return x


def _up(call: Call, block: Block, i: int, inner: Tensor, skip: Tensor, size: torch.Size) -> Tensor:
    call.enter(block._module)
    if block.__dict__.get("s1"):
        inner = inner.clone()               # FreeU (arXiv 2309.11497) writes into it, and the cache may keep it
    args, kwargs = ((skip,), *block._args[1:]), block._kwargs
    if "res_hidden_states_tuple" in kwargs:
        args, kwargs = block._args, kwargs | {"res_hidden_states_tuple": (skip,)}
    if kwargs.get("upsample_size") is not None:         # if the size of some level is odd; the frames do not change
        kwargs = kwargs | {"upsample_size": (*kwargs["upsample_size"][:-2], *size)}
    last = i == len(block.resnets._modules) - 1
    run = _forward(call, block, layer(block, i), upsamplers=block.upsamplers if last else None)
    return run(inner, *args, **kwargs)


def _forward(call: Call, block: Block, lists: dict[str, list], **more: Any) -> Callable[..., Any]:
    """The forward of a block with only these of its modules. The cache may keep the residuals of some."""
    if call.caching.asked:
        for modules in lists.values():
            for i, module in enumerate(modules):
                if module in call.caching.asked:
                    modules[i] = Kept(module, call.caching.asked[module], call.caching.cache)
    return partial(type(block._module).forward, StandIn(block._module, **lists, **more))


def layer(block: Theirs, i: int) -> dict[str, list]:
    """The i-th layer of a block: the block's lists of modules, each with only the layer's modules."""
    lists, layers = {}, len(block.resnets._modules)
    for name, modules in block._modules.items():
        if name not in RESAMPLE:
            every = [*modules._modules.values()]
            each = len(every) // layers         # AudioLDM2 has several attentions per layer
            lists[name] = every[i * each:(i + 1) * each]
    return lists


def residuals(unet: Theirs) -> Iterator[tuple[Theirs, str]]:
    """The residual modules, with their names in our own U-Nets, so that a block schedule fits both."""
    for side, blocks, k in (("input_blocks", unet.down_blocks, 1), ("output_blocks", unet.up_blocks, 0)):
        for block in blocks:
            for i in range(len(block.resnets)):
                lists = layer(block, i)
                modules = [module for name in LAYER for module in lists.get(name, ()) if module is not None]
                yield from ((module, f"{side}.{k}.{j}") for j, module in enumerate(modules))
                k += 1
            k += getattr(block, "downsamplers", None) is not None
    lists = {} if unet.mid_block is None else dict(unet.mid_block.named_children())
    if lists.keys() == {"resnets", "attentions"} and len(lists["attentions"]) == len(lists["resnets"]) - 1:
        for first, name in enumerate(("resnets", "attentions")):
            for i, module in enumerate(lists[name]):
                if module is not None:
                    yield module, f"middle_block.{2 * i + first}"


class Kept:
    """A module whose residual, the output without the shortcut, a cache may keep."""

    def __init__(self, module: Theirs, name: str, cache: Cache):
        self.module, self.name, self.cache = module, name, cache

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x, listed = [*args, *kwargs.values()][0], kwargs.get("return_dict") is False
        computed: list[Tensor] = []

        def residual() -> Tensor:
            out = self.module(*args, **kwargs)
            whole = out[0] if listed else out
            computed.extend((whole, whole - self.shortcut(x)))
            return computed[1]

        value = self.cache(self.name, residual)
        whole = computed[0] if computed and value is computed[1] else self.shortcut(x) + value
        return (whole,) if listed else whole

    def shortcut(self, x: Tensor) -> Tensor:
        resnet = getattr(self.module, "spatial_res_block", self.module)         # Stable Video Diffusion's
        project = getattr(resnet, "conv_shortcut", None)
        factor = getattr(resnet, "output_scale_factor", getattr(resnet, "rescale_output_factor", 1.0))
        return (x if project is None else project(x)) / factor


def hooks(block: Theirs) -> list:
    """diffusers' hooks on a module, the innermost first."""
    registry = vars(block).get("_diffusers_hook")
    return [] if registry is None else [registry.hooks[name] for name in registry._hook_order]
