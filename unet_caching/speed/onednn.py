"""PyTorch's operators for weights in the layout of oneDNN's kernels.

They are private operators of PyTorch's compiler: other releases may lack them, and some CPUs lack the instructions.
unet_caching/speed/probe.py finds out whether they can be used.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LIBRARY = torch.library.Library("deepcache", "FRAGMENT")


def opaque(fake: Callable[..., Tensor]) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Make a function an operator for torch.compile, which does not look inside. fake: makes a result of equal shape.

    torch.library.custom_op cannot be used: in earlier releases it needs the storage of its arguments, and packed
    weights have none.
    """
    def decorate(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        name = function.__name__
        LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"deepcache::{name}", fake, lib=LIBRARY)
        in_graph = getattr(torch.ops.deepcache, name)
        return lambda *args: (in_graph if torch.compiler.is_compiling() else function)(*args)
    return decorate


def packed_linear(weight: Tensor) -> Tensor:
    """Pack the weight [out, in] of a linear layer."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())


@opaque(lambda x, weight, bias, activation="none": x.new_empty(*x.shape[:-1], len(weight)))
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """x [..., in], weight packed or [out, in] -> [..., out]. activation: none, sigmoid, gelu (the exact one)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")


def packed_conv2d(weight: Tensor, shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
                  dilation: Sequence[int], groups: int) -> Tensor:
    """Pack the weight [out, in / groups, height, width] of a convolution in the best layout for inputs of a shape."""
    return torch.ops.mkldnn._reorder_convolution_weight(weight.detach(), padding, stride, dilation, groups, list(shape))


def _like_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
                 dilation: Sequence[int], groups: int) -> Tensor:
    size = [(n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True)]
    return torch.empty(len(x), len(weight), *size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@opaque(_like_conv2d)
def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
           dilation: Sequence[int], groups: int) -> Tensor:
    """x [batch, in, height, width] with channels last, weight packed -> [batch, out, height, width], channels last."""
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, padding, stride, dilation, groups, "none", [], "")
