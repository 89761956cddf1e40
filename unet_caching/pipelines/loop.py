"""Which calls of a U-Net are a denoising loop's own, and which of those belong to one step.

A loop is the invocation of a function that opened the pipeline's progress bar: one frame on the stack of one thread. It
makes a network call itself, or through methods of its pipeline: not so a callback's, another pipeline's inside a
callback, and those after the loop was broken off. Two calls are of one step if they are given the same timestep: the
same element of the tensor that the loop walks along, by its place in memory, which no GPU need be waited for. Elements
of equal value are different steps (PLMS, Heun). Where a loop makes a tensor of its own for each call, values count.
"""

import inspect
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor

_FOLDER = str(Path(torch.__file__).parent)
_DECORATOR = f"{_FOLDER}/utils/_contextlib.py"                      # @torch.no_grad()
_MODULE = (f"{_FOLDER}/nn/modules/module.py", f"{_FOLDER}/_dynamo/eval_frame.py", f"{Path(__file__).parent}/install.py")


class Loop:
    """One invocation of a function that runs a denoising loop: by number and code, since a frame keeps its tensors."""

    def __init__(self, frame: FrameType, pipe: object):
        self.id, self.code, self.kind = id(frame), frame.f_code, type(pipe)

    def makes(self, frame: FrameType | None) -> bool:
        """Whether it makes the network call that is running in `frame`."""
        between: list[CodeType] = []
        while frame is not None and not (id(frame) == self.id and frame.f_code is self.code):
            if frame.f_code.co_filename != _DECORATOR:
                between.append(frame.f_code)
            frame = frame.f_back
        if frame is None:                   # it has ended, or runs in another thread
            return False
        while between and between[-1].co_filename not in _MODULE:
            if not self._is_method(between.pop()):
                return False
        return True

    def _is_method(self, code: CodeType) -> bool:
        method = inspect.getattr_static(self.kind, code.co_name, None)
        method = getattr(method, "__func__", method)
        return getattr(inspect.unwrap(method) if callable(method) else None, "__code__", None) is code


def num_calls(pipe: Any, loop: Loop, iterable: Any, total: int | None) -> int:
    """How often a loop will call the network. iterable, total: what it gives to the progress bar."""
    scheduler = getattr(pipe, "scheduler", None)
    if hasattr(iterable, "__len__"):
        if type(scheduler).__name__ == "RePaintScheduler":      # steps back add noise, and make no call
            return 1 + sum(bool(later < sooner) for sooner, later in pairwise(iterable))
        return 2 * len(iterable) - 1 if type(scheduler).__name__ == "KarrasVeScheduler" else len(iterable)
    number = getattr(pipe, "_num_timesteps", None)
    if number is not None and "_num_timesteps" in loop.code.co_names:       # else it is of an older run
        return number
    assert total is not None
    steps: int | None = getattr(scheduler, "num_inference_steps", None)
    if scheduler is None or steps is None:      # another scheduler counts, that of an inversion, say
        return total
    return max(total, len(scheduler.timesteps) - getattr(scheduler, "order", 1) * (steps - total))


class Timestep:
    """What a network call was given as its timestep. It holds the tensor, whose place in memory nothing else takes."""

    def __init__(self, value: Tensor | float | int):
        self.value = value
        if isinstance(value, Tensor):
            self.place = value.data_ptr()
            self.version = 0 if value.is_inference() else value._version        # those cannot tell what was written

    def same(self, other: "Timestep") -> bool:
        """Whether both are of one step."""
        a, b = self.value, other.value
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b
        if self.place == other.place:
            return self.version == other.version        # written to in place it is another
        if a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr():
            return False                    # another element
        return a.flatten()[0].item() == b.flatten()[0].item()
