"""Which U-Nets can be taken apart: those of diffusers whose forwards were tried, and whatever proves to be alike."""

from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import diffusers
import torch
from torch import nn

from unet_caching.errors import UserError, one_line
from unet_caching.nest import no_cache
from unet_caching.pipelines.forward import argument_names, cached_forward
from unet_caching.pipelines.parts import RESAMPLE, Caching, num_skips

UNETS = {"UNet2DConditionModel", "UNet2DModel", "UNet3DConditionModel", "UNetMotionModel", "I2VGenXLUNet",
         "UNetSpatioTemporalConditionModel", "AudioLDM2UNet2DConditionModel"}
BLOCKS = {f"{kind}{side}Block{of}" for kind in ("", "CrossAttn") for side in ("Down", "Up")
          for of in ("2D", "3D", "Motion", "SpatioTemporal")} | {
    f"{kind}{side}Block2D" for kind in ("Attn", "SimpleCrossAttn", "DreamLite", "DreamLiteCrossAttn",
                                        "DreamLiteCrossAttnNoSelfAttn") for side in ("Down", "Up")} | {
    "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"}
_DIFFUSERS = str(Path(diffusers.__file__).parent)
_proved: "WeakKeyDictionary[nn.Module, tuple[type, ...]]" = WeakKeyDictionary()      # U-Net -> kinds of its blocks


def check_kind(unet: Any) -> None:
    """Refuse a U-Net that does not consist of layers. Raises UserError that says why."""
    kind = type(unet).__name__
    if not all(isinstance(getattr(unet, name, None), nn.ModuleList) and len(getattr(unet, name))
               for name in ("down_blocks", "up_blocks")) or not hasattr(unet, "mid_block"):
        raise UserError(f"pipe.unet is a {kind} and should be a U-Net with down_blocks, mid_block and up_blocks")
    if any(_is_of_diffusers(base) and base.__name__ in UNETS for base in type(unet).__mro__) and not _known(type(unet)):
        raise UserError(f"pipe.unet is a {kind}, which has a forward of its own")
    for block in (*unet.down_blocks, *unet.up_blocks):
        if not _in_layers(block) or (_is_of_diffusers(type(block)) and not _known(type(block))):
            raise UserError(f"pipe.unet has a {type(block).__name__}, which cannot be taken apart")
    made = 1 + sum(len(block.resnets) + (block.downsamplers is not None) for block in unet.down_blocks)
    if made != num_skips(unet):
        raise UserError(f"pipe.unet is a {kind} that makes {made} skips and takes {num_skips(unet)}")


def prove(unet: Any, asked: frozenset[str], args: tuple, kwargs: dict) -> None:
    """Compare the nest with the forward of a U-Net that is not diffusers', on its first call of a run.

    asked: the residuals that are cached. Raises UserError where they differ.
    """
    kinds = tuple(map(type, (unet, *unet.down_blocks, *unet.up_blocks)))
    if all(map(_known, kinds)) or _proved.get(unet) == kinds:
        return
    own, nested = type(unet).forward(unet, *args, **kwargs), None
    try:
        nested = cached_forward(unet, argument_names(unet), Caching(no_cache, asked), *args, **kwargs)
        why = "it would compute something else"
    except Exception as error:
        why = one_line(error)
    own, nested = (getattr(out, "sample", out) for out in (own, nested))
    if isinstance(own, tuple):
        own, nested = own[0], nested and nested[0]
    if nested is None or not torch.allclose(own, nested, rtol=1e-3, atol=1e-3 * own.abs().max().item()):
        raise UserError(f"pipe.unet is a {kinds[0].__name__}, which cannot be taken apart: {why}")
    _proved[unet] = kinds


def _known(kind: type) -> bool:
    """Whether the forward of a class is diffusers' own, of those that were tried: the name alone proves nothing."""
    forward: Any = kind.forward             # type: ignore[attr-defined]
    return (forward.__qualname__.split(".")[0] in UNETS | BLOCKS
            and getattr(forward, "__code__", check_kind.__code__).co_filename.startswith(_DIFFUSERS))


def _is_of_diffusers(kind: type) -> bool:
    return kind.__module__.startswith("diffusers.")


def _in_layers(block: Any) -> bool:
    """Whether a block has lists of modules, as many or a multiple for each of its ResNet blocks, and nothing else."""
    layers = len(getattr(block, "resnets", None) or ())
    return layers > 0 and all(
        module is None or (isinstance(module, nn.ModuleList) and (name in RESAMPLE or len(module) % layers == 0))
        for name, module in block.named_children()) and not block._parameters
