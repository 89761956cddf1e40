"""Weights in the layout in which a CPU's kernels read them, reordered once instead of on every call.

PyTorch multiplies float32 matrices by MKL, less than half as fast on the AMD processor of results/throughput as oneDNN
with packed weights, and reorders the weights of a convolution anew each time that it runs. What is here are the
operators of PyTorch's oneDNN for weights packed beforehand, and attention made of its matrix products.
Sums are taken in another order than PyTorch's: results agree to rounding, 3e-6 of the largest magnitude in float32.
"""

import math
import platform
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DTYPES = (torch.float32, torch.bfloat16)
PRODUCTS = 2**23        # tokens * keys * width of a head: with fewer, PyTorch's attention is faster
SCORES = 2**22          # bytes of attention scores at a time, for each thread: they stay in its cache
LINE = 64               # bytes of a line of the cache
ALIASES = 64            # lines: rows of scores that lie a multiple of this apart displace each other in the cache
VECTOR = 16             # sums that a register of AVX-512 holds
SHIFT = 38.0            # e**x is sigmoid(x - SHIFT) * e**SHIFT but for a part of e**(x - SHIFT)


def packable(network: nn.Module) -> bool:
    """Whether oneDNN has kernels for this network here: on an x86 CPU, in float32 or (natively) bfloat16."""
    weight = next(network.parameters(), None)
    return (weight is not None and weight.device.type == "cpu" and weight.dtype in DTYPES
            and platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
            and (weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def pack(module: nn.Module) -> nn.Module:
    """Pack the weights of a network's linear layers and convolutions, in place, and replace its attention function.

    The best layout of a convolution depends on the size of its input: it is packed when it first runs, eagerly.
    For inference only: packed weights have no gradients and cannot be saved.
    """
    if type(module) is nn.Linear:
        module.__class__ = Linear
        module.weight = _packed(module.weight)
    elif type(module) is nn.Conv2d and _per_pixel(module):
        module.__class__ = PerPixel
        module.weight = _packed(module.weight.flatten(1))
    elif type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        module.__class__, module.packed = Conv2d, False
    elif getattr(module, "gated", False):
        module.__class__ = GEGLU
        module.halve()
    else:
        if hasattr(module, "attend"):
            module.attend = attention
        for child in module.children():
            pack(child)
    return module


def _packed(weight: Tensor) -> nn.Parameter:
    """The weight [out, in] of a linear layer, packed."""
    return nn.Parameter(torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous()), requires_grad=False)


def waiting(network: nn.Module) -> bool:
    """Whether convolutions are still to be packed, when they first run."""
    return any(isinstance(module, Conv2d) and not module.packed for module in network.modules())


def _per_pixel(conv: nn.Conv2d) -> bool:
    """Whether a convolution is a linear layer of each pixel's channels."""
    return conv.kernel_size == conv.stride == (1, 1) and conv.padding in ((0, 0), "valid") and conv.groups == 1


def operator(fake: Callable[..., Tensor]) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Make a function opaque to torch.compile, to which it is an operator whose result looks like `fake`'s."""
    def decorate(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        in_graph = torch.library.custom_op(f"deepcache::{function.__name__}", function, mutates_args=())
        in_graph.register_fake(fake)
        return lambda *args: (in_graph if torch.compiler.is_compiling() else function)(*args)
    return decorate


@operator(lambda x, weight, bias, activation="none": x.new_empty(*x.shape[:-1], len(weight)))
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """x [..., in], weight packed or [out, in] -> [..., out]. activation: none, sigmoid, gelu (the exact one)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")


def _like_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
                 dilation: Sequence[int], groups: int) -> Tensor:
    size = [(n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True)]
    return torch.empty(len(x), len(weight), *size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@operator(_like_conv2d)
def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
           dilation: Sequence[int], groups: int) -> Tensor:
    """x [batch, in, height, width] with channels last, weight packed -> likewise."""
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, padding, stride, dilation, groups, "none", [], "")


@operator(lambda query, key, value: query.new_empty(query.transpose(1, 2).shape).transpose(1, 2))
def rowwise_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of some rows of one head at a time: [batch, heads, tokens, width], a view of heads behind tokens.

    The softmax is powers over their sum, the product with a column of ones. PyTorch's subtracts the largest score
    first, which changes nothing as long as no power overflows; heads where that is near are left to PyTorch. In
    bfloat16, powers are the tail of a sigmoid: it is part of the product, so that scores are not rounded before.
    Zeros fill the last register of a row of values, and lengthen rows of scores that would displace each other.
    """
    batch, heads, tokens, width = query.shape
    keys, line = key.shape[2], LINE // key.element_size()
    rows = max(1, SCORES * torch.get_num_threads() // (keys * key.element_size()))
    more = 0 if keys % (ALIASES * line) else line
    sigmoids = query.dtype == torch.bfloat16
    base, least, most = (math.e, 2**-100, 2**-9) if sigmoids else (2, 2**-60, 2**60)       # sums that lose nothing
    scaled_key = F.pad(key * (1 / (math.log(base) * math.sqrt(width))), (0, 0, 0, more))
    with_ones = F.pad(F.pad(value, (0, 1), value=1), (0, -(width + 1) % VECTOR, 0, more))
    shift = key.new_full((keys + more,), -SHIFT)

    def powers(part: Tensor, k: Tensor) -> Tensor:
        return linear(part, k, shift, "sigmoid") if sigmoids else linear(part, k, None).exp2_()

    out = query.new_empty(batch, tokens, heads, width)
    for i in range(batch):
        for head in range(heads):
            q, k, v = (x[i, head] for x in (query, scaled_key, with_ones))
            k, v = map(torch.ops.mkldnn._reorder_linear_weight, (k, v.t().contiguous()))
            sums = torch.cat([linear(powers(part, k), v, None) for part in q.split(rows)])
            mean, total, _ = sums.tensor_split([width, width + 1], dim=1)
            lowest, highest = torch.aminmax(total)
            if least < lowest and highest < most:
                torch.div(mean, total, out=out[i, :, head])
            else:
                out[i, :, head] = F.scaled_dot_product_attention(*(x[i:i + 1, head] for x in (query, key, value)))
    return out.transpose(1, 2)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """F.scaled_dot_product_attention, by oneDNN where that is quicker."""
    products = query.shape[2] * key.shape[2] * query.shape[3]
    return (rowwise_attention if products >= PRODUCTS else F.scaled_dot_product_attention)(query, key, value)


class Linear(nn.Linear):
    """nn.Linear with a packed weight."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class GEGLU(nn.Module):
    """A `gated` module's projection as two: the GELU is part of the product that makes the gate."""
    gated = False

    def halve(self) -> None:
        weights, biases = self.proj.weight.chunk(2), self.proj.bias.chunk(2)
        for name, weight, bias in zip(("value", "gate"), weights, biases, strict=True):
            half = Linear(weight.shape[1], weight.shape[0], device="meta")
            half.weight, half.bias = _packed(weight), nn.Parameter(bias.clone(), requires_grad=False)
            setattr(self, name, half)
        del self.proj

    def forward(self, x: Tensor) -> Tensor:
        return self.value(x).mul_(linear(x, self.gate.weight, self.gate.bias, "gelu"))


class Conv2d(nn.Conv2d):
    """nn.Conv2d that packs its weight when it first runs; channels are last in its result.

    In the wrong layout some sizes take three times as long, so the input's is needed. A compiled network should run
    once before it is compiled (speed/compiled.py): what has not, stays PyTorch's.
    """
    packed: bool

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        if not self.packed and not torch.compiler.is_compiling():
            self.packed, self.weight = True, nn.Parameter(torch.ops.mkldnn._reorder_convolution_weight(
                self.weight.detach(), self.padding, self.stride, self.dilation, self.groups, list(x.shape)),
                requires_grad=False)
        if not self.packed:
            return super().forward(x)
        return conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class PerPixel(nn.Conv2d):
    """A 1x1 convolution, by the kernels of linear layers: those of convolutions are far slower in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        return linear(pixels, self.weight, self.bias).permute(0, 3, 1, 2)
