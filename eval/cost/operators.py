"""The host's work in a step, counted: on a GPU, a cached step of few kernels takes as long as launching them.

Three counts, on the meta device with the networks at their real size: the operators that Python calls; the operators
that compute something, each of them one kernel of a GPU or a few; and the Python functions outside of PyTorch's
operators.
"""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eval.cost.sides import DeepCacheSDHelper, Helper, Nested, Subject, cached_steps

# Functions of these packages are counted. On the meta device PyTorch's operators run in Python, too.
_COUNTED = ("torch/nn/", "diffusers/", "DeepCache/", "unet_caching/", "ddpm/", "ldm/", "stable_diffusion/")


class Operators(TorchDispatchMode):
    """Counts the outermost operators, as in PyTorch's profiler; in inference mode they arrive whole."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.kernels = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **kwargs or {})
        self.operators += 1
        before = {value.untyped_storage()._cdata for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        self.kernels += function._schema.is_mutable or any(
            value.untyped_storage()._cdata not in before for value in tree_leaves(out) if isinstance(value, Tensor))
        return out


@torch.inference_mode()
def work(run: Callable[[], object]) -> dict[str, int]:
    """The host's work in a call, after a first call: {operators, kernels, functions}."""
    run()
    with Operators() as counted:
        run()
    functions = 0

    def entered(frame: FrameType, event: str, argument: object) -> None:
        nonlocal functions
        functions += event == "call" and any(f"/{part}" in frame.f_code.co_filename for part in _COUNTED)

    sys.setprofile(entered)
    try:
        run()
    finally:
        sys.setprofile(None)
    return {"operators": counted.operators, "kernels": counted.kernels, "functions": functions}


@torch.inference_mode()
def of_cached_steps(subject: Subject) -> dict[str, dict[str, dict[str, int]]]:
    """The work of cached steps, by side and step: ours and a pipeline's, with forecasts, too, the PyPI package's."""
    plain, (theirs, helped) = subject.make("meta", torch.float32)
    inputs = subject.inputs(subject.rows, "meta", torch.float32)
    nested = Nested(theirs)
    sides = {"pipeline": cached_steps(nested, inputs, (0, 1, 2), (0, 1), nested)}
    if plain is not None:
        sides["ours"] = cached_steps(plain, inputs, (0, 1, 2), (0, 1), plain)
    if DeepCacheSDHelper is not None:
        helper = Helper(helped, inputs, (0, 1, 2))
        helper.first()
        sides["helper"] = helper.steps
    return {side: {name: work(run) for name, run in steps.items() if name != "full"}
            for side, steps in sides.items()}
