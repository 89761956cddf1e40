"""Layers that replace a network's own on a CPU, with the same results up to rounding, in less time.

PyTorch multiplies float32 matrices by MKL. On the AMD processor of results/throughput that is less than half as fast as
oneDNN with packed weights. PyTorch also reorders the weights of a convolution in every call. The layers here pack their
weights once. They add in another order than PyTorch, so results differ by rounding, in float32 by 3e-6 of the largest
magnitude.
"""

import platform
from typing import Any

import torch
from torch import Tensor, nn

from unet_caching.nest import Cond, Residual
from unet_caching.speed.attention import attention
from unet_caching.speed.onednn import conv2d, linear, packed_conv2d, packed_linear
from unet_caching.speed.probe import usable

DTYPES = (torch.float32, torch.bfloat16)


def packable(network: nn.Module) -> bool:
    """Whether oneDNN has kernels for a network: on an x86 CPU, in float32 or bfloat16 (see `speed.probe`)."""
    weight = next(network.parameters(), None)
    return (weight is not None and weight.device.type == "cpu" and weight.dtype in DTYPES
            and platform.machine() in ("x86_64", "AMD64") and usable(weight.dtype))


def pack(module: nn.Module) -> nn.Module:
    """Replace a network's layers by faster ones. The network is returned, or its replacement if it is a single layer.

    The best layout of a convolution depends on the size of its input, so it is packed when it first runs uncompiled.
    For inference only: packed weights have no gradients and cannot be saved.
    """
    fast = replacement(module)
    if fast is not module:
        fast.train(module.training)
    for name, child in fast.named_children():
        setattr(fast, name, pack(child))
    return fast


def replacement(module: nn.Module) -> nn.Module:
    """The layer that replaces another, which is the layer itself if there is no faster one.

    Layers of our U-Nets are recognised by the names of their parts, attention also by its `kind`.
    """
    if type(module) is nn.Linear:
        return Linear(module.weight, module.bias)
    if type(module) is nn.Conv2d:
        if module.kernel_size == module.stride == (1, 1) and module.padding in ((0, 0), "valid") and module.groups == 1:
            return PerPixel(module)
        return Conv2d(module) if module.padding_mode == "zeros" and not isinstance(module.padding, str) else module
    parts = {name for name, _ in module.named_children()}
    if isinstance(module, Residual) and parts == {"norm", "q", "k", "v", "proj_out"}:
        return PixelAttention(module)
    if getattr(module, "kind", None) == "attention" and parts == {"to_q", "to_k", "to_v", "to_out"}:
        return TokenAttention(module)
    if type(module).__name__ == "GEGLU" and parts == {"proj"}:
        return GEGLU(module)
    return module


def waiting(network: nn.Module) -> bool:
    """Whether some convolutions have not run yet, and so are not packed."""
    return any(isinstance(module, Conv2d) and not module.packed for module in network.modules())


def frozen(value: Tensor) -> nn.Parameter:
    """A frozen parameter."""
    return nn.Parameter(value.detach(), requires_grad=False)


def arguments(layer: nn.Conv2d) -> dict[str, Any]:
    """The arguments for another convolution like this one, without weights."""
    names = "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"
    return {name: getattr(layer, name) for name in names} | {"bias": layer.bias is not None, "device": "meta"}


class Linear(nn.Linear):
    """nn.Linear with a packed weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        self.weight = frozen(packed_linear(weight))
        if bias is not None:
            self.bias = frozen(bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Conv2d(nn.Conv2d):
    """nn.Conv2d that packs its weight when it first runs. Its result has channels last.

    The packed layout depends on the input's size: in the wrong one some sizes take three times as long. A network
    should run once before it is compiled (unet_caching/speed/compiled.py): what has not run stays unpacked.
    """

    def __init__(self, layer: nn.Conv2d):
        super().__init__(**arguments(layer))
        self.weight, self.bias, self.packed = layer.weight, layer.bias, False

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        how: Any = self.stride, self.padding, self.dilation, self.groups
        if not self.packed and not torch.compiler.is_compiling():
            self.packed, self.weight = True, frozen(packed_conv2d(self.weight, x.shape, *how))
        return conv2d(x, self.weight, self.bias, *how) if self.packed else super().forward(x)


class PerPixel(nn.Conv2d):
    """A 1x1 convolution by the kernels of linear layers; in bfloat16 those of convolutions are far slower."""

    def __init__(self, layer: nn.Conv2d):
        super().__init__(**arguments(layer))
        self.weight, self.bias = frozen(packed_linear(layer.weight.flatten(1))), layer.bias

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        return linear(pixels, self.weight, self.bias).permute(0, 3, 1, 2)


class GEGLU(nn.Module):
    """A gated layer with its projection in two halves, so that the GELU is fused into the gate's product."""

    def __init__(self, layer: Any):
        super().__init__()
        self.value, self.gate = map(Linear, layer.proj.weight.chunk(2), layer.proj.bias.chunk(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.value(x).mul_(linear(x, self.gate.weight, self.gate.bias, "gelu"))


class TokenAttention(nn.Module):
    """LDM's attention over tokens, by `unet_caching.speed.attention`."""
    kind = "attention"

    def __init__(self, layer: Any):
        super().__init__()
        self.key, self.num_heads = layer.key, layer.num_heads
        self.to_q, self.to_k, self.to_v, self.to_out = layer.to_q, layer.to_k, layer.to_v, layer.to_out

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)        # [batch, heads, tokens, width]
                   for tokens in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return self.to_out(attention(q, k, v).transpose(1, 2).flatten(2))            # [batch, tokens, channels]


class PixelAttention(Residual):
    """DDPM's attention over pixels, by `unet_caching.speed.attention`."""
    kind = "transformer"

    def __init__(self, block: Any):
        super().__init__()
        self.key, self.norm, self.proj_out = block.key, block.norm, block.proj_out
        self.q, self.k, self.v = block.q, block.k, block.v

    def residual(self, x: Tensor, cond: Cond) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        return self.proj_out(attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape))     # one head
