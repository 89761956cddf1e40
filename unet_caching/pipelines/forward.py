"""The forward of a diffusers U-Net as a nest of its own modules.

The U-Net's own forward runs on a stand-in whose blocks only record their arguments. When the last block is called, the
nest runs over the real blocks, and asks a cache for each inner level. All code around the blocks (embeddings, frames
moved into the batch, the output head) is the U-Net's. Without a cache the results are equal, bit for bit.
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
# The classes of diffusers whose forwards were compared with the nest. Any other U-Net is compared on its first call.
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
    """The names of the arguments of a U-Net's forward."""
    return tuple(inspect.signature(type(unet).forward).parameters)[1:]


def cached_forward(unet: Any, names: Sequence[str], caching: Caching, *args: Any, **kwargs: Any) -> Any:
    """`unet(*args, **kwargs)` with a cache. names: of the arguments of its forward. Raises UserError if a ControlNet's
    residuals do not fit."""
    kwargs.update(zip(names, args, strict=False))
    control, adapter = kwargs.pop("down_block_additional_residuals", None), kwargs.pop(ADAPTER, None)
    extra = kwargs.pop("mid_block_additional_residual", None)
    if control is not None and extra is None and adapter is None and ADAPTER in names:
        control, adapter = None, control            # an adapter's residuals under their older name
    call = Call(caching, adapter or ())
    (down, downs), (up, ups) = encoder(unet, call), decoder(unet, call)
    center = None if unet.mid_block is None else Block(unet.mid_block)
    if control is not None:
        control = [*control, 0.0 if extra is None else extra]
        if len(control) != len(downs) + 1:
            raise UserError(f"the ControlNet has {len(control) - 1} residuals for {len(downs)} skips: use a ControlNet "
                            "for this U-Net")

    def run(x: Tensor) -> Tensor:
        try:
            return nest(down[0]._x, downs, partial(middle, center, call, len(down)), ups, caching.cache, control)
        finally:
            call.leave()

    up[-1]._answer = run
    return type(unet).forward(StandIn(unet, down_blocks=down, mid_block=center, up_blocks=up), **kwargs)


def check_kind(unet: Any) -> None:
    """Raise a UserError for a U-Net that does not consist of layers, or whose blocks have been changed."""
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
        raise UserError(f"pipe.unet is a {kind} that makes {made} skips but takes {taken}")


def check_container(name: str, block: nn.Module) -> None:
    """Raise a UserError for a replaced forward or a hook of a block, which the nest would not run."""
    inside = vars(block)
    own = getattr(inside.get("forward"), "__func__", None) is type(block).forward       # put back by a helper
    if ("forward" in inside and not own and not hooks(block)) or "_hf_hook" in inside:
        raise UserError(f"pipe.unet.{name} has a forward of its own, which would not run: undo what put it there "
                        "(DeepCacheSDHelper's disable(), for instance)")
    if inside["_forward_hooks"] or inside["_forward_pre_hooks"]:
        raise UserError(f"pipe.unet.{name} has a forward hook, which would not run: hook the layers inside it")


def prove(unet: Any, asked: Mapping[nn.Module, str], args: tuple, kwargs: dict) -> None:
    """Compare the nest with the forward of a U-Net that is not diffusers', on its first call. asked: as in `Caching`.
    Raises UserError if they differ."""
    kinds = tuple(map(type, (unet, *unet.down_blocks, *unet.up_blocks)))
    if all(map(_known, kinds)) or _proved.get(unet) == kinds:
        return
    kwargs = {**kwargs, "return_dict": False}
    try:
        own = type(unet).forward(unet, *args, **kwargs)[0]
        nested = cached_forward(unet, argument_names(unet), Caching(no_cache, asked), *args, **kwargs)[0]
        if not torch.allclose(own, nested, rtol=0, atol=8 * torch.finfo(own.dtype).eps * own.abs().max().item()):
            raise ValueError("its parts compute something else")
    except Exception as error:
        raise UserError(f"pipe.unet is a {kinds[0].__name__}, which cannot be taken apart: {one_line(error)}") from None
    _proved[unet] = kinds


def _known(kind: type) -> bool:
    """Whether the forward of a class is one of diffusers' that were tried. The name of the class is not enough."""
    forward: Any = inspect.unwrap(kind.forward)         # type: ignore[attr-defined]
    code = getattr(forward, "__code__", _known.__code__)
    return forward.__qualname__.split(".")[0] in UNETS | BLOCKS and code.co_filename.startswith(_DIFFUSERS)


def _in_layers(block: Any) -> bool:
    """Whether a block consists only of lists of modules, with equally many modules for each of its ResNet blocks."""
    layers = len(getattr(block, "resnets", None) or ())
    return layers > 0 and not block._parameters and all(
        isinstance(module, nn.ModuleList) and (name in RESAMPLE or len(module) % layers == 0)
        for name, module in block.named_children())
