"""diffusers' U-Nets taken apart: what lies between two skips is one callable, in the order of our branches.

A part is one layer of a block, in the block's own forward: it runs on a stand-in for the block that has this layer
alone. How modules are called, FreeU, checkpointing and what differs from version to version stay diffusers' own, and
nothing is copied. The residuals that Block Caching may keep have the names that they have in our own U-Nets: a block
schedule fits both.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor

from unet_caching.nest import Cache
from unet_caching.pipelines.containers import Containers

Theirs = Any                # a module of diffusers, whose attributes are made at run time
Down = Callable[[Tensor], Tensor]
Up = Callable[[Tensor, Tensor, torch.Size], Tensor]         # inner, skip, size of the level above
LAYER = ("resnets", "temp_convs", "attentions", "temp_attentions", "motion_modules")    # in the order in which they run
RESAMPLE = ("downsamplers", "upsamplers")


class Caching(NamedTuple):
    """What a network call is given to cache by. asked: the residuals that the cache may keep, by name. meter: what the
    call is made in, where it is counted.
    """
    cache: Cache
    asked: frozenset[str] = frozenset()
    meter: AbstractContextManager | None = None


class StandIn:
    """A module in the forward of its class: it has all that the module has, but for what is given here."""

    def __init__(self, module: Theirs, **own: Any):
        self.__dict__.update(module.__dict__)           # so that a step runs few functions in Python
        self.__dict__.update(module._modules)
        self.__dict__.update(own)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


Given = dict[Theirs, tuple[Tensor, tuple, dict[str, Any]]]     # what a U-Net calls each block with: on x, and the rest


class Call(NamedTuple):
    """One network call. adapter: residuals of a T2I-Adapter."""
    caching: Caching
    given: Given
    containers: Containers
    adapter: Sequence[Tensor] = ()


def down_parts(blocks: Sequence[Theirs], call: Call) -> list[Down]:
    """The encoder: part k makes skip k of its input; skip 0 is what conv_in has made."""
    parts: list[Down] = [lambda x: x]
    for index, block in enumerate(blocks):
        for i in range(len(block._modules["resnets"]._modules)):
            parts.append(partial(_down, call, block, i, f"input_blocks.{len(parts)}"))
        last = len(parts) - 1
        if block._modules.get("downsamplers") is not None:
            parts.append(partial(_downsample, call, block))
        if index < len(call.adapter):       # it adds before the downsampling where there is cross-attention, else after
            place = last if getattr(block, "has_cross_attention", False) else -1
            parts[place] = _adapted(parts[place], call.adapter[index])
    return parts


def middle_part(block: Theirs, place: int, call: Call) -> Down:
    """The middle block, whole unless its residuals may be kept. place: of what an adapter adds to it (T2I-Adapter XL).
    """
    extra = call.adapter[place] if place < len(call.adapter) else None

    def run(x: Tensor) -> Tensor:
        if block is None:
            return x
        call.containers.enter(block)
        _, args, kwargs = call.given[block]
        if any(name.startswith("middle_block.") for name in call.caching.asked):
            lists = {name: [*modules] for name, modules in block.named_children()}
            _keep(call, lists, _middle_residuals(block))
            x = type(block).forward(StandIn(block, **lists), x, *args, **kwargs)
        else:
            x = block(x, *args, **kwargs)
        return x if extra is None or extra.shape != x.shape else x + extra
    return run


def up_parts(blocks: Sequence[Theirs], call: Call) -> list[Up]:
    """The decoder: part k takes skip k."""
    parts: list[Up] = []
    for block in blocks:
        for i in range(len(block._modules["resnets"]._modules)):
            parts.append(partial(_up, call, block, i, f"output_blocks.{len(parts)}"))
    return parts[::-1]


def residual_names(unet: Theirs) -> Iterator[str]:
    """The residuals that a cache may keep: ResNet blocks and transformers, by the names that our own U-Nets give."""
    k = 1
    for block in unet.down_blocks:
        for i in range(num_layers(block)):
            yield from (name for *_, name in _residuals(_layer(block, i), f"input_blocks.{k}"))
            k += 1
        k += block.downsamplers is not None
    if unet.mid_block is not None:
        yield from (name for *_, name in _middle_residuals(unet.mid_block))
    k = 0
    for block in unet.up_blocks:
        for i in range(num_layers(block)):
            yield from (name for *_, name in _residuals(_layer(block, i), f"output_blocks.{k}"))
            k += 1


def num_skips(unet: Theirs) -> int:
    """How many skips, or branches, a U-Net has."""
    return sum(map(num_layers, unet.up_blocks))


def num_layers(block: Theirs) -> int:
    """How many layers a down or up block has."""
    return len(block._modules["resnets"]._modules)


def _layer(block: Theirs, i: int) -> dict[str, list]:
    """The lists of a block with what its i-th layer has of them."""
    lists, layers = {}, len(block._modules["resnets"]._modules)
    for name, modules in block._modules.items():
        if name not in RESAMPLE:
            every = [*modules._modules.values()]
            each = len(every) // layers         # AudioLDM2 has several attentions in a layer
            lists[name] = every[i * each:(i + 1) * each]
    return lists


def _residuals(lists: dict[str, list], part: str) -> Iterator[tuple[str, int, str]]:
    """Where the residuals of a layer are, and their names."""
    places = [(kind, i) for kind in LAYER for i, module in enumerate(lists.get(kind, ())) if module is not None]
    yield from ((*place, f"{part}.{j}") for j, place in enumerate(places))


def _middle_residuals(block: Theirs) -> Iterator[tuple[str, int, str]]:
    """Those of a middle block of ResNet blocks with a transformer between any two."""
    lists = dict(block.named_children())
    if lists.keys() == {"resnets", "attentions"} and len(lists["attentions"]) == len(lists["resnets"]) - 1:
        yield "resnets", 0, "middle_block.0"
        for i, attention in enumerate(lists["attentions"]):
            if attention is not None:
                yield "attentions", i, f"middle_block.{2 * i + 1}"
            yield "resnets", i + 1, f"middle_block.{2 * i + 2}"


def _keep(call: Call, lists: dict[str, list], residuals: Iterator[tuple[str, int, str]]) -> None:
    """Let the cache keep the residuals that it asked for."""
    for kind, i, name in residuals:
        if name in call.caching.asked:
            lists[kind][i] = Kept(lists[kind][i], name, call.caching.cache)


def _down(call: Call, block: Theirs, i: int, name: str, x: Tensor) -> Tensor:
    call.containers.enter(block)
    lists, (_, args, kwargs) = _layer(block, i), call.given[block]
    if call.caching.asked:
        _keep(call, lists, _residuals(lists, name))
    return type(block).forward(StandIn(block, downsamplers=None, **lists), x, *args, **kwargs)[0]


def _downsample(call: Call, block: Theirs, x: Tensor) -> Tensor:
    call.containers.enter(block)
    _, args, kwargs = call.given[block]
    for module in block.downsamplers:       # by keyword, as FreeNoise's split inference has it
        x = module(x, *args[:1] or [kwargs["temb"]]) if type(module) is ResnetBlock2D else module(hidden_states=x)
    return x


def _up(call: Call, block: Theirs, i: int, name: str, inner: Tensor, skip: Tensor, size: torch.Size) -> Tensor:
    call.containers.enter(block)
    lists, (_, args, kwargs) = _layer(block, i), call.given[block]
    if call.caching.asked:
        _keep(call, lists, _residuals(lists, name))
    if i < len(block._modules["resnets"]._modules) - 1:
        lists["upsamplers"] = None          # type: ignore[assignment]
    if kwargs.get("upsample_size") is not None:         # where some level does not halve; frames stay as many
        kwargs = kwargs | {"upsample_size": (*kwargs["upsample_size"][:-2], *size)}
    if block.__dict__.get("s1"):
        inner = inner.clone()               # FreeU (arXiv 2309.11497) writes into it, and it may be kept
    return type(block).forward(StandIn(block, **lists), inner, (skip,), *args, **kwargs)


def _adapted(part: Down, residual: Tensor) -> Down:
    """A part with what a T2I-Adapter (arXiv 2302.08453) adds to its output."""
    return lambda x: part(x) + residual


class Kept:
    """A module of which a cache may keep what it adds to its shortcut."""

    def __init__(self, module: Theirs, name: str, cache: Cache):
        self.module, self.name, self.cache = module, name, cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["input_tensor" if "input_tensor" in kwargs else "hidden_states"]
        listed = kwargs.get("return_dict") is False
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
