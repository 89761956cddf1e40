"""Find out whether PyTorch's private oneDNN operators exist, run on this CPU, and agree with its public operators."""

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from unet_caching.speed.attention import rowwise_attention
from unet_caching.speed.onednn import conv2d, linear, packed_conv2d, packed_linear

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}        # largest difference, as a fraction of the largest magnitude


@functools.cache
def usable(dtype: torch.dtype) -> bool:
    """Whether the operators can be used in float32 or bfloat16. If not, a line is printed, once, that says why."""
    if reason := unusable(dtype):
        print(f"packed weights: not here, {reason}; going on without", flush=True)
    return reason is None


@torch.no_grad()
def unusable(dtype: torch.dtype) -> str | None:
    """Why the operators cannot be used in a dtype; None if they can."""
    here = f"PyTorch {torch.__version__}"
    if not torch.backends.mkldnn.is_available():
        return f"{here} has no oneDNN"
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return "this CPU has no instructions for bfloat16"
        for name, found, expected in results(dtype):
            if found.shape != expected.shape:
                return f"{name} of {here} has another shape"
            difference = ((found - expected).abs().max() / expected.abs().max()).item()
            if not difference <= LIMITS[dtype]:
                return f"{name} of {here} is off by {difference:.0e}"
    except Exception as error:      # what a missing operator, or one with other arguments, raises
        return f"{here}: {' '.join(str(error).split())[:200]}"
    return None


def results(dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, result of the private operators, result of the public ones) on small random inputs."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, weight, bias = random(2, 5, 40), random(24, 40) / 6, random(24)
    packed, y = packed_linear(weight), F.linear(x, weight, bias)
    for activation, expected in {"none": y, "gelu": F.gelu(y), "sigmoid": y.sigmoid()}.items():
        yield f"linear ({activation})", linear(x, packed, bias, activation), expected
    yield "linear without bias", linear(x, packed, None), F.linear(x, weight)

    x, weight = random(2, 8, 9, 7).contiguous(memory_format=torch.channels_last), random(24, 8, 3, 3)
    for how in (([1, 1], [1, 1], [1, 1], 1), ([2, 2], [0, 0], [1, 1], 1)):          # stride, padding, dilation, groups
        packed = packed_conv2d(weight, x.shape, *how)
        yield "conv2d", conv2d(x, packed, bias, *how), F.conv2d(x, weight, bias, *how)

    query, key, value = (random(1, 50, 2, 24).transpose(1, 2) for _ in range(3))
    yield "attention", rowwise_attention(query, key, value), F.scaled_dot_product_attention(query, key, value)
