"""Attention by oneDNN's matrix products, some rows of scores at a time, so that they stay in a core's cache."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from unet_caching.speed.onednn import linear, opaque, packed_linear

PRODUCTS = 2**23        # tokens * keys * width of a head; with fewer, PyTorch's attention is faster
SCORES = 2**22          # bytes of attention scores at a time for each thread, which fit into its cache
LINE = 64               # bytes of a cache line
ALIASES = 64            # cache lines: rows of scores whose distance is a multiple of this evict each other
VECTOR = 16             # sums in a register of AVX-512
SHIFT = 38.0            # e**x is sigmoid(x - SHIFT) * e**SHIFT, up to a relative error of e**(x - SHIFT)


@opaque(lambda query, key, value: query.new_empty(query.transpose(1, 2).shape).transpose(1, 2))
def rowwise_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention, some rows of one head at a time: [batch, heads, tokens, width], with tokens before heads in memory.

    The softmax is powers over their sum, the product with a column of ones. PyTorch subtracts the largest score first,
    which changes nothing unless a power overflows; heads that are near an overflow are left to PyTorch. In bfloat16,
    powers are the tail of a sigmoid, which is fused into the product, so that scores are not rounded before.
    Zeros fill the last register of a row of values, and lengthen rows of scores that would evict each other.
    """
    batch, heads, tokens, width = query.shape
    keys, line = key.shape[2], LINE // key.element_size()
    rows = max(1, SCORES * torch.get_num_threads() // (keys * key.element_size()))
    more = 0 if keys % (ALIASES * line) else line
    sigmoids = query.dtype == torch.bfloat16
    base, least, most = (math.e, 2**-100, 2**-9) if sigmoids else (2, 2**-60, 2**60)       # range of exact sums
    scaled_key = F.pad(key * (1 / (math.log(base) * math.sqrt(width))), (0, 0, 0, more))
    with_ones = F.pad(F.pad(value, (0, 1), value=1), (0, -(width + 1) % VECTOR, 0, more))
    shift = key.new_full((keys + more,), -SHIFT)

    def powers(part: Tensor, k: Tensor) -> Tensor:
        return linear(part, k, shift, "sigmoid") if sigmoids else linear(part, k, None).exp2_()

    out = query.new_empty(batch, tokens, heads, width)
    for i in range(batch):
        for head in range(heads):
            q, k, v = (x[i, head] for x in (query, scaled_key, with_ones))
            k, v = packed_linear(k), packed_linear(v.t())
            sums = torch.cat([linear(powers(part, k), v, None) for part in q.split(rows)])
            mean, total, _ = sums.tensor_split([width, width + 1], dim=1)
            lowest, highest = torch.aminmax(total)
            if least < lowest and highest < most:
                torch.div(mean, total, out=out[i, :, head])
            else:
                q, k, v = (x[i:i + 1, head] for x in (query, key, value))
                out[i, :, head] = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """F.scaled_dot_product_attention, by oneDNN where it is faster."""
    products = query.shape[2] * key.shape[2] * query.shape[3]
    return (rowwise_attention if products >= PRODUCTS else F.scaled_dot_product_attention)(query, key, value)
