"""The forward of a U-Net as a nest over its own modules.

The U-Net's own forward runs, on a stand-in for it whose blocks only note what they are given; where the last of them is
called the nest runs over the real ones, and a cache is asked for each inner level. What is around the blocks
(embeddings, frames moved into the batch, the head) is diffusers' own in every version. Without a cache the results are
the U-Net's, bit for bit.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from unet_caching.errors import UserError
from unet_caching.nest import nest
from unet_caching.pipelines.containers import Containers
from unet_caching.pipelines.parts import Caching, Call, Given, StandIn, Theirs, down_parts, middle_part, up_parts

ADAPTER = "down_intrablock_additional_residuals"


def argument_names(unet: Theirs) -> tuple[str, ...]:
    """Of its forward."""
    return tuple(inspect.signature(type(unet).forward).parameters)[1:]


def cached_forward(unet: Theirs, names: Sequence[str], caching: Caching, *args: Any, **kwargs: Any) -> Any:
    """`unet(*args, **kwargs)`, with a cache. names: of the arguments of its forward.

    Raises UserError for residuals of a ControlNet that do not fit.
    """
    kwargs.update(zip(names, args, strict=False))
    control, adapter = kwargs.pop("down_block_additional_residuals", None), kwargs.pop(ADAPTER, None)
    extra = kwargs.pop("mid_block_additional_residual", None)
    if control is not None and extra is None and adapter is None and ADAPTER in names:
        control, adapter = None, control            # the name that an adapter's residuals had before
    down, middle, up = [*unet.down_blocks], unet.mid_block, [*unet.up_blocks]
    call = Call(caching, {}, Containers((*down, *up)), adapter or ())
    downs, ups = down_parts(down, call), up_parts(up, call)
    if control is not None:
        control = [*control, 0.0 if extra is None else extra]
        if len(control) != len(downs) + 1:
            raise UserError(f"the ControlNet has {len(control) - 1} residuals for {len(downs)} skips: it is of another "
                            "architecture")

    def run() -> Tensor:
        first = next(iter(call.given.values()))[0]          # what the first block is to compute on
        try:
            return nest(first, downs, middle_part(middle, len(down), call), ups, caching.cache, control)
        finally:
            call.containers.leave()

    own = StandIn(unet, down_blocks=list(map(partial(_Down, _given=call.given), down)),
                  mid_block=None if middle is None else _Block(middle, _given=call.given),
                  up_blocks=list(map(partial(_Up, _given=call.given, _run=None), up)))
    own.up_blocks[-1]._run = run
    return type(unet).forward(own, **kwargs)


class _Block(StandIn):
    """A block in the forward of its U-Net, which notes what it is given."""
    _given: Given

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._given[self._module] = hidden_states, args, kwargs
        return hidden_states


class _Down(_Block):
    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        self._given[self._module] = hidden_states, args, kwargs
        modules = self._module._modules
        skips = len(modules["resnets"]._modules) + (modules.get("downsamplers") is not None)
        return hidden_states, (hidden_states,) * skips


class _Up(_Block):
    _run: Callable[[], Tensor] | None

    def __call__(self, hidden_states: Tensor, res_hidden_states_tuple: tuple[Tensor, ...], *args: Any,
                 **kwargs: Any) -> Tensor:
        self._given[self._module] = hidden_states, args, kwargs
        return hidden_states if self._run is None else self._run()
