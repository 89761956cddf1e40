"""Which calls of a U-Net a denoising loop makes, and which of these belong to one step.

A loop is the invocation of a function that opened the pipeline's progress bar: one frame on the stack of one thread. It
makes a network call itself or through methods of its pipeline. The calls of a callback, of another pipeline inside a
callback, and after the loop was broken off are not the loop's. Two calls belong to one step if they get the same
timestep: the same element of the loop's tensor, by its place in memory, so that no call waits for a GPU. Elements with
equal values are different steps (PLMS, Heun). If a loop makes a new tensor for each call, values are compared.
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
    """One call of a function that runs a denoising loop, by id and code: keeping the frame would keep its tensors."""

    def __init__(self, frame: FrameType, pipe: object):
        self.id, self.code, self.kind = id(frame), frame.f_code, type(pipe)

    def makes(self, frame: FrameType | None) -> bool:
        """Whether the loop makes the network call that is running in `frame`."""
        between: list[CodeType] = []
        while frame is not None and not (id(frame) == self.id and frame.f_code is self.code):
            if frame.f_code.co_filename != _DECORATOR:
                between.append(frame.f_code)
            frame = frame.f_back
        if frame is None:                   # the loop has ended, or runs in another thread
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
    """The number of network calls that a loop will make. iterable, total: its arguments to the progress bar."""
    scheduler = getattr(pipe, "scheduler", None)
    if hasattr(iterable, "__len__"):
        if type(scheduler).__name__ == "RePaintScheduler":      # steps back add noise without a call
            return 1 + sum(bool(later < sooner) for sooner, later in pairwise(iterable))
        return 2 * len(iterable) - 1 if type(scheduler).__name__ == "KarrasVeScheduler" else len(iterable)
    number = getattr(pipe, "_num_timesteps", None)
    if number is not None and "_num_timesteps" in loop.code.co_names:       # else it is an older run's
        return number
    assert total is not None
    steps: int | None = getattr(scheduler, "num_inference_steps", None)
    if scheduler is None or steps is None:      # the loop uses another scheduler, for an inversion, say
        return total
    return max(total, len(scheduler.timesteps) - getattr(scheduler, "order", 1) * (steps - total))


class Timestep:
    """The timestep of a network call. It keeps the tensor, so that no other tensor gets its place in memory."""

    def __init__(self, value: Tensor | float | int):
        self.value = value
        if isinstance(value, Tensor):
            self.place = value.data_ptr()
            self.version = 0 if value.is_inference() else value._version        # inference tensors have no version

    def same(self, other: "Timestep") -> bool:
        """Whether both belong to one step."""
        a, b = self.value, other.value
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b
        if self.place == other.place:
            return self.version == other.version        # after an in-place write it is another step
        if a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr():
            return False                    # another element
        return a.flatten()[0].item() == b.flatten()[0].item()
