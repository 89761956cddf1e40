"""The forward of a U-Net as a nest over its own modules.

The U-Net's own forward runs, on a stand-in for it whose blocks only note what they are called with; where the last of
them is called the nest runs over the real ones, and a cache is asked for each inner level. What is around the blocks
(embeddings, frames moved into the batch, the head) is its own, and without a cache the results are, bit for bit.
"""

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import diffusers
import torch
from torch import Tensor, nn

from unet_caching.errors import UserError, one_line
from unet_caching.nest import nest, no_cache
from unet_caching.pipelines.parts import RESAMPLE, Block, Caching, Call, StandIn, decoder, encoder, hooks, middle

ADAPTER = "down_intrablock_additional_residuals"
# The classes whose forwards were compared with the nest; of others' networks each is, on its first call.
UNETS = {"UNet2DConditionModel", "UNet2DModel", "UNet3DConditionModel", "UNetMotionModel", "I2VGenXLUNet",
         "UNetSpatioTemporalConditionModel", "AudioLDM2UNet2DConditionModel"}
BLOCKS = {f"{kind}{side}Block{of}" for side in ("Down", "Up") for kinds, of in (
    (("", "CrossAttn"), "3D"), (("", "CrossAttn"), "Motion"), (("", "CrossAttn"), "SpatioTemporal"),
    (("", "Attn", "CrossAttn", "SimpleCrossAttn", "DreamLite", "DreamLiteCrossAttn", "DreamLiteCrossAttnNoSelfAttn"),
     "2D")) for kind in kinds} | {"ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"}
SIDES = ("down_blocks", "up_blocks")
_DIFFUSERS = str(Path(diffusers.__file__).parent)
_proved: "WeakKeyDictionary[nn.Module, tuple[type, ...]]" = WeakKeyDictionary()      # U-Net -> kinds of its blocks


def argument_names(unet: Any) -> tuple[str, ...]:
    """Of its forward."""
    return tuple(inspect.signature(type(unet).forward).parameters)[1:]


def cached_forward(unet: Any, names: Sequence[str], caching: Caching, *args: Any, **kwargs: Any) -> Any:
    """`unet(*args, **kwargs)`, with a cache. names: of the arguments of its forward. Raises UserError for residuals of
    a ControlNet that do not fit."""
    kwargs.update(zip(names, args, strict=False))
    control, adapter = kwargs.pop("down_block_additional_residuals", None), kwargs.pop(ADAPTER, None)
    extra = kwargs.pop("mid_block_additional_residual", None)
    if control is not None and extra is None and adapter is None and ADAPTER in names:
        control, adapter = None, control            # the name that an adapter's residuals had before
    call = Call(caching, adapter or ())
    (down, downs), (up, ups) = encoder(unet, call), decoder(unet, call)
    center = None if unet.mid_block is None else Block(unet.mid_block)
    if control is not None:
        control = [*control, 0.0 if extra is None else extra]
        if len(control) != len(downs) + 1:
            raise UserError(f"the ControlNet has {len(control) - 1} residuals for {len(downs)} skips: it is of another "
                            "architecture")

    def run(x: Tensor) -> Tensor:
        try:
            return nest(down[0]._x, downs, partial(middle, center, call, len(down)), ups, caching.cache, control)
        finally:
            call.leave()

    up[-1]._answer = run
    return type(unet).forward(StandIn(unet, down_blocks=down, mid_block=center, up_blocks=up), **kwargs)


def check_kind(unet: Any) -> None:
    """Refuse a U-Net that does not consist of layers, or whose blocks would not run as they are. Raises UserError."""
    kind = type(unet).__name__
    if not all(isinstance(getattr(unet, side, None), nn.ModuleList) and len(getattr(unet, side)) for side in SIDES):
        raise UserError(f"pipe.unet is a {kind} and should be a U-Net with down_blocks, mid_block and up_blocks")
    theirs = {base.__name__ for base in type(unet).__mro__ if base.__module__.startswith("diffusers.")}
    if theirs & UNETS and not _known(type(unet)):
        raise UserError(f"pipe.unet is a {kind}, which has a forward of its own")
    for side in SIDES:
        for i, block in enumerate(getattr(unet, side)):
            if not _in_layers(block) or (type(block).__module__.startswith("diffusers.") and not _known(type(block))):
                raise UserError(f"pipe.unet has a {type(block).__name__}, which cannot be taken apart")
            check_container(f"{side}.{i}", block)
    made = 1 + sum(len(one.resnets) + (getattr(one, "downsamplers", None) is not None) for one in unet.down_blocks)
    if made != (taken := sum(len(block.resnets) for block in unet.up_blocks)):
        raise UserError(f"pipe.unet is a {kind} that makes {made} skips and takes {taken}")


def check_container(name: str, block: nn.Module) -> None:
    """Refuse what is around the forward of a block and would not run. Raises UserError."""
    inside = vars(block)
    own = getattr(inside.get("forward"), "__func__", None) is type(block).forward       # put back by a helper
    if ("forward" in inside and not own and not hooks(block)) or "_hf_hook" in inside:
        raise UserError(f"pipe.unet.{name} has a forward of its own, which would not run: undo what put it there "
                        "(DeepCacheSDHelper's disable(), for instance)")
    if inside["_forward_hooks"] or inside["_forward_pre_hooks"]:
        raise UserError(f"pipe.unet.{name} has a forward hook, which would not run: hook the layers inside it")


def prove(unet: Any, asked: Mapping[nn.Module, str], args: tuple, kwargs: dict) -> None:
    """Compare the nest with the forward of a U-Net that is not diffusers', on its first call. asked: as `Caching`'s.
    Raises UserError where they differ."""
    kinds = tuple(map(type, (unet, *unet.down_blocks, *unet.up_blocks)))
    if all(map(_known, kinds)) or _proved.get(unet) == kinds:
        return
    kwargs = {**kwargs, "return_dict": False}
    try:
        own = type(unet).forward(unet, *args, **kwargs)[0]
        nested = cached_forward(unet, argument_names(unet), Caching(no_cache, asked), *args, **kwargs)[0]
        if not torch.allclose(own, nested, rtol=0, atol=8 * torch.finfo(own.dtype).eps * own.abs().max().item()):
            raise ValueError("it would compute something else")
    except Exception as error:
        raise UserError(f"pipe.unet is a {kinds[0].__name__}, which cannot be taken apart: {one_line(error)}") from None
    _proved[unet] = kinds


def _known(kind: type) -> bool:
    """Whether the forward of a class is diffusers' own, of those that were tried: a name alone proves nothing."""
    forward: Any = inspect.unwrap(kind.forward)         # type: ignore[attr-defined]
    code = getattr(forward, "__code__", _known.__code__)
    return forward.__qualname__.split(".")[0] in UNETS | BLOCKS and code.co_filename.startswith(_DIFFUSERS)


def _in_layers(block: Any) -> bool:
    """Whether a block has lists of modules, as many or a multiple for each of its ResNet blocks, and nothing else."""
    layers = len(getattr(block, "resnets", None) or ())
    return layers > 0 and not block._parameters and all(
        isinstance(module, nn.ModuleList) and (name in RESAMPLE or len(module) % layers == 0)
        for name, module in block.named_children())
