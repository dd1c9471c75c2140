"""Attention of one query in bfloat16 on a processor without instructions for it.

B batch, H heads, K key/value heads, S keys, D head width.
"""

import torch
from torch import Tensor

from minillava import attention
from minillava.fast.linear import convert, is_emulated, scratch

CACHED = 1 << 21  # numbers of float32 that stay in a processor's cache: 8 MB


def fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, None]:
    """`attention.fused`, except that one query in emulated bfloat16 is computed by `one_query`."""
    if q.shape[2] == 1 and is_emulated(q) and not torch.is_grad_enabled():
        return one_query(q, k, v, mask), None
    return attention.fused(q, k, v, mask, causal)


def one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`fused` for T = 1 and bfloat16 on a CPU without instructions for it: as many heads as fit
    into the processor's cache are upcast to float32 at a time, which takes 0.4 of the single
    kernel's time."""
    (rows, heads, _, width), (groups, length) = q.shape, k.shape[1:3]
    q = q.float().view(rows, groups, -1, width) * width**-0.5  # [B, K, H/K, D]
    count = max(1, CACHED // (length * width))
    out = torch.empty_like(q)
    memory = scratch(min(count, groups) * length * width, torch.float32).view(-1, length, width)
    for row in range(rows):
        for first in range(0, groups, count):
            some = slice(first, first + count)
            scores = convert(k[row, some], memory) @ q[row, some].mT  # [n, S, H/K]
            if mask is not None:
                scores.masked_fill_(
                    ~mask[row % len(mask), 0, 0, :, None], torch.finfo(scores.dtype).min
                )
            out[row, some] = scores.softmax(1).mT @ convert(v[row, some], memory)
    return out.view(rows, heads, 1, width).to(k.dtype)
