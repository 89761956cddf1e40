"""diffusers' U-Nets taken apart: the modules between two skips are one callable, in the order of our branches.

The modules themselves are called, as their blocks call them (diffusers, models/unets/unet_2d_blocks.py): whatever was
added to them runs, and nothing is copied. The residuals that Block Caching may keep have the names that they have in
our own U-Nets: a block schedule fits both.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers.utils.torch_utils import apply_freeu
from torch import Tensor

from unet_caching.nest import Cache
from unet_caching.pipelines.containers import Containers

DOWN = {"DownBlock2D", "CrossAttnDownBlock2D", "AttnDownBlock2D", "SimpleCrossAttnDownBlock2D",
        "ResnetDownsampleBlock2D"}
UP = {"UpBlock2D", "CrossAttnUpBlock2D", "AttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"}
MIDDLE = {"UNetMidBlock2D", "UNetMidBlock2DCrossAttn", "UNetMidBlock2DSimpleCrossAttn"}
Theirs = Any                # a module of diffusers, whose attributes are made at run time
_FREEU = ("s1", "s2", "b1", "b2")
Down = Callable[[Tensor], Tensor]
Up = Callable[[Tensor, Tensor, torch.Size], Tensor]         # inner, skip, size of the level above


class Caching(NamedTuple):
    """What a network call is given to cache by. asked: the residuals that the cache may keep, by name."""
    cache: Cache
    asked: frozenset[str] = frozenset()


class Call(NamedTuple):
    """What the modules of one network call are given besides their input.

    emb: [batch, channels]. context: what cross-attention attends to, as the U-Net has processed it. masks: biases on
    the attention to x and to the context. attention: cross_attention_kwargs. adapter: residuals of a T2I-Adapter.
    sized: whether an upsampling is told its size, where some level does not halve.
    """
    caching: Caching
    emb: Tensor
    containers: Containers
    context: Any = None
    masks: tuple[Tensor | None, Tensor | None] = (None, None)
    attention: dict[str, Any] | None = None
    adapter: Sequence[Tensor] | None = None
    sized: bool = False


def down_parts(unet: Theirs, call: Call) -> list[Down]:
    """The encoder: part k makes skip k of its input."""
    parts: list[Down] = [unet.conv_in]
    for index, block in enumerate(unet.down_blocks):
        for resnet, attention in _layers(block):
            parts.append(partial(_layer, call, block, resnet, attention, f"input_blocks.{len(parts)}"))
        last = len(parts) - 1
        for downsampler in block.downsamplers or ():
            parts.append(partial(_resample, call, block, downsampler))
        if call.adapter and index < len(call.adapter):      # it adds before the downsampling there, else after it
            place = last if _crossing(block) else -1
            parts[place] = _adapted(parts[place], call.adapter[index])
    return parts


def middle_part(unet: Theirs, call: Call) -> Down:
    """The middle block, whole unless its residuals may be kept."""
    block = unet.mid_block
    extra = call.adapter[len(unet.down_blocks)] if call.adapter and len(call.adapter) > len(unet.down_blocks) else None

    def run(x: Tensor) -> Tensor:
        if block is None:
            return x
        call.containers.enter(block)
        if any(name.startswith("middle_block.") for name in call.caching.asked):
            x = _resnet(call, block, block.resnets[0], "middle_block.0", x)
            for i, (attention, resnet) in enumerate(zip(block.attentions, block.resnets[1:], strict=True)):
                if attention is not None:
                    x = _attend(call, block, attention, f"middle_block.{2 * i + 1}", x)
                x = _resnet(call, block, resnet, f"middle_block.{2 * i + 2}", x)
        elif _crossing(block):
            x = block(x, call.emb, encoder_hidden_states=call.context, attention_mask=call.masks[0],
                      cross_attention_kwargs=call.attention, encoder_attention_mask=call.masks[1])
        else:
            x = block(x, call.emb)
        return x if extra is None or extra.shape != x.shape else x + extra      # T2I-Adapter XL
    return run


def up_parts(unet: Theirs, call: Call) -> list[Up]:
    """The decoder: part k takes skip k."""
    parts: list[Up] = []
    for block in unet.up_blocks:
        layers = list(_layers(block))
        for i, (resnet, attention) in enumerate(layers):
            upsamplers = block.upsamplers if i == len(layers) - 1 else None
            parts.append(partial(_up, call, block, resnet, attention, upsamplers, f"output_blocks.{len(parts)}"))
    return parts[::-1]


def residual_names(unet: Theirs) -> Iterator[str]:
    """The residuals that a cache may keep: ResNet blocks and transformers, by the names that our own U-Nets give."""
    k = 1
    for block in unet.down_blocks:
        for _, attention in _layers(block):
            yield from _names(f"input_blocks.{k}", attention)
            k += 1
        k += len(block.downsamplers or ())
    if unet.mid_block is not None:
        yield "middle_block.0"
        for i, attention in enumerate(unet.mid_block.attentions):
            yield from (f"middle_block.{2 * i + 1}",) if attention is not None else ()
            yield f"middle_block.{2 * i + 2}"
    k = 0
    for block in unet.up_blocks:
        for _, attention in _layers(block):
            yield from _names(f"output_blocks.{k}", attention)
            k += 1


def num_skips(unet: Theirs) -> int:
    """How many skips, or branches, a U-Net has."""
    return sum(len(block.resnets) for block in unet.up_blocks)


def _names(part: str, attention: Theirs | None) -> Iterator[str]:
    yield f"{part}.0"
    if attention is not None:
        yield f"{part}.1"


def _layers(block: Theirs) -> Iterator[tuple[Theirs, Theirs | None]]:
    """The ResNet blocks of a block, each with the attention after it."""
    attentions = getattr(block, "attentions", None)
    return zip(block.resnets, [None] * len(block.resnets) if attentions is None else attentions, strict=True)


def _crossing(block: Theirs) -> bool:
    return bool(getattr(block, "has_cross_attention", False))


def _layer(call: Call, block: Theirs, resnet: Theirs, attention: Theirs | None, name: str,
           x: Tensor) -> Tensor:
    call.containers.enter(block)
    x = _resnet(call, block, resnet, f"{name}.0", x)
    return x if attention is None else _attend(call, block, attention, f"{name}.1", x)


def _up(call: Call, block: Theirs, resnet: Theirs, attention: Theirs | None, upsamplers: Theirs | None,
        name: str, inner: Tensor, skip: Tensor, size: torch.Size) -> Tensor:
    own = vars(block)
    if own.get("s1") and all(own.get(key) for key in _FREEU) and block.resolution_idx in (0, 1):
        # FreeU (arXiv 2309.11497) writes into its input, which may be a feature that is kept.
        inner, skip = apply_freeu(block.resolution_idx, inner.clone(), skip, **{key: own[key] for key in _FREEU})
    x = _layer(call, block, resnet, attention, name, torch.cat([inner, skip], dim=1))
    for upsampler in upsamplers or ():
        x = _resample(call, block, upsampler, x, size if call.sized else None)
    return x


def _resample(call: Call, block: Theirs, module: Theirs, x: Tensor, size: torch.Size | None = None) -> Tensor:
    call.containers.enter(block)
    if type(module).__name__ == "ResnetBlock2D":
        return module(x, call.emb)
    return module(x) if size is None else module(x, size)


def _adapted(part: Down, residual: Tensor) -> Down:
    """A part with what a T2I-Adapter (arXiv 2302.08453) adds to its output."""
    return lambda x: part(x) + residual


def _resnet(call: Call, block: Theirs, resnet: Theirs, name: str, x: Tensor) -> Tensor:
    def run() -> Tensor:
        if torch.is_grad_enabled() and getattr(block, "gradient_checkpointing", False):
            return block._gradient_checkpointing_func(resnet, x, call.emb)
        return resnet(x, call.emb)

    def shortcut() -> Tensor:
        return (x if resnet.conv_shortcut is None else resnet.conv_shortcut(x)) / resnet.output_scale_factor
    return _kept(call, name, run, shortcut) if name in call.caching.asked else run()


def _attend(call: Call, block: Theirs, attention: Theirs, name: str, x: Tensor) -> Tensor:
    def run() -> Tensor:
        kind = type(block).__name__
        if not _crossing(block):            # a layer of self-attention; that of a middle block knows the timestep
            return attention(x, temb=call.emb) if kind == "UNetMidBlock2D" else attention(x)
        if "Simple" in kind:
            mask = call.masks[0] if call.masks[0] is not None or call.context is None else call.masks[1]
            return attention(x, encoder_hidden_states=call.context, attention_mask=mask, **(call.attention or {}))
        return attention(x, encoder_hidden_states=call.context, cross_attention_kwargs=call.attention,
                         attention_mask=call.masks[0], encoder_attention_mask=call.masks[1], return_dict=False)[0]
    if name not in call.caching.asked:
        return run()
    return _kept(call, name, run, lambda: x / getattr(attention, "rescale_output_factor", 1.0))


def _kept(call: Call, name: str, run: Callable[[], Tensor], shortcut: Callable[[], Tensor]) -> Tensor:
    """What a module returns, of which the cache may keep the part beside its shortcut."""
    found: list[Tensor] = []

    def residual() -> Tensor:
        whole = run()
        found.extend((whole, whole - shortcut()))
        return found[1]

    value = call.caching.cache(name, residual)
    return found[0] if found and value is found[1] else shortcut() + value
