"""Replace a U-Net's forward by the nest: on the object, under hooks and inside torch.compile's wrappers.

The replacement refers only to the U-Net, so that the U-Net can be copied and pickled while caching is on.
"""

from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from unet_caching.errors import UserError
from unet_caching.pipelines.forward import argument_names, cached_forward, check_kind
from unet_caching.pipelines.parts import Caching
from unet_caching.pipelines.run import caching_of_call, wanted


class CachedForward:
    """The forward of a U-Net: the nest in the steps of a run, else the U-Net's own."""

    def __init__(self, unet: nn.Module):
        self.unet, self.names = unet, argument_names(unet)

    def forward(self, *args: Any, caching: Caching | None = None, **kwargs: Any) -> Any:
        """Call the U-Net. caching: set if the call has been counted already, as around a compiled network."""
        if caching is None and not torch.compiler.is_compiling():
            caching = caching_of_call(self.unet, args, kwargs)
        if caching is None:
            return type(self.unet).forward(self.unet, *args, **kwargs)
        if caching.meter is None:
            return cached_forward(self.unet, self.names, caching, *args, **kwargs)
        with caching.meter:
            return cached_forward(self.unet, self.names, caching, *args, **kwargs)


class Counted:
    """A compiled U-Net. Its calls are counted outside of its graphs."""

    def __init__(self, unet: nn.Module, compiled: Any):
        self.unet, self.compiled = unet, compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        caching = caching_of_call(self.unet, args, kwargs)
        more = {} if caching is None else {"caching": caching._replace(meter=None)}
        return self.compiled(*args, **kwargs, **more)


def unwrapped(unet: Any) -> Any:
    """The U-Net without torch.compile's wrapper."""
    return getattr(unet, "_orig_mod", unet)


def check(unet: Any) -> None:
    """Raise a UserError that says why, if the nest cannot run this U-Net."""
    check_kind(unet)
    holder, name = _slot(unet)
    forward = vars(holder).get(name)
    if not (forward is None or _is_ours(forward) or getattr(forward, "__func__", None) is type(unet).forward
            or _is_ours(getattr(forward, "_torchdynamo_orig_callable", None))):
        raise UserError("pipe.unet.forward has been replaced, and caching would not run the replacement; to compile "
                        "use torch.compile(pipe.unet) or pipe.unet.compile()")


def install(pipe: Any) -> None:
    """Put the nest into a pipeline's present U-Net; no effect if it is there. `check` the U-Net first."""
    holder, name = _slot(unet := unwrapped(pipe.unet))
    forward = vars(holder).get(name)
    if _is_ours(getattr(forward, "_torchdynamo_orig_callable", None)):
        setattr(holder, name, Counted(unet, forward).__call__)
    elif not _is_ours(forward):
        setattr(holder, name, CachedForward(unet).forward)
    for holder, name in _compiled(pipe.unet):
        if not isinstance(vars(holder)[name], Counted):
            setattr(holder, name, Counted(unet, vars(holder)[name]))
    wanted.setdefault(unet, WeakSet()).add(pipe)


def uninstall(pipe: Any) -> None:
    """Give a pipeline's present and earlier U-Nets their forward back, unless another pipeline caches with them."""
    now, unets = getattr(pipe, "unet", None), [unet for unet, pipes in list(wanted.items()) if pipe in pipes]
    for unet in [*unets, unwrapped(now)] if isinstance(now, nn.Module) else unets:
        others = wanted.get(unet, WeakSet())
        others.discard(pipe)
        holder, name = _slot(unet)
        if not others and _is_ours(vars(holder).get(name)):
            if holder is unet and name == "forward":
                delattr(unet, name)
            else:
                setattr(holder, name, type(unet).forward.__get__(unet))
        for holder, name in _compiled(now) if not others and unwrapped(now) is unet else ():
            if isinstance(vars(holder)[name], Counted):
                setattr(holder, name, vars(holder)[name].compiled)


def _slot(unet: nn.Module) -> tuple[Any, str]:
    """The object and attribute with a U-Net's innermost forward, inside hooks of accelerate or diffusers if it has any.
    """
    inside = vars(unet)
    references = getattr(inside.get("_diffusers_hook"), "_fn_refs", None)
    if references:
        return references[0], "forward" if references[0].original_forward is None else "original_forward"
    return unet, "_old_forward" if "_old_forward" in inside else "forward"


def _compiled(unet: Any) -> list[tuple[Any, str]]:
    """The objects and attributes with a U-Net's compiled functions, of torch.compile(unet) and unet.compile()."""
    inside = (unwrapped(unet), "_compiled_call_impl")
    return [(unet, "forward")] * (inside[0] is not unet) + [inside] * (vars(inside[0]).get(inside[1]) is not None)


def _is_ours(forward: Any) -> bool:
    return isinstance(getattr(forward, "__self__", None), CachedForward | Counted)
