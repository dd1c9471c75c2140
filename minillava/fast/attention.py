"""Attention of few queries in bfloat16, each as if it were alone.

B batch, H heads, K key/value heads, T queries, S keys, D head width.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minillava import attention
from minillava.fast import processor
from minillava.fast.linear import scratch

CACHED = 1 << 21  # numbers of float32 that stay in a processor's cache: 8 MB
TOGETHER = 4  # queries in a product
BLOCK = 64  # keys in a product, or a multiple


class Fused:
    """`attention.fused`, except that one query in bfloat16 is computed by `in_float32` where that
    is faster."""

    def __reduce__(self) -> str:
        return "fused"  # the one below, in whichever process it is read

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
    ) -> tuple[Tensor, None]:
        out = self.each_alone(q, k, v, mask) if q.shape[2] == 1 else None
        return (out, None) if out is not None else attention.fused(q, k, v, mask, causal)

    def each_alone(
        self,
        q: Tensor,
        k: Tensor | Sequence[Tensor],
        v: Tensor | Sequence[Tensor],
        mask: Tensor | None = None,
    ) -> Tensor | None:
        """Attention [B, H, T, D] of the last T of S positions in one call, each query with the bits
        that it has alone; None where that is not possible, and takes a call for each. mask: of
        padding. k and v may be B caches of one row [1, K, S, D], for T = 1; S differs by row."""
        narrow = q.dtype == torch.bfloat16 and q.device.type == "cpu"
        if not narrow or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if processor.has_fast_bfloat16() and processor.kind() not in processor.UPCAST_QUERIES:
            return None
        if isinstance(k, Tensor):
            if q.shape[2] > 1 or mask is not None:
                return in_float32(q, k, v, mask)  # type: ignore[arg-type]
            k, v = k.split(1), v.split(1)  # type: ignore[union-attr]
        return one_each(q, k, v)


fused = Fused()


def in_float32(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of the last T of S positions in bfloat16 on a CPU, [B, H, T, D]; mask: bool [B or
    1, 1, T, S], of padding.

    As many heads as fit into the processor's cache are upcast to float32 at a time, once for all
    queries. The products are always of TOGETHER queries, zeros where there are fewer, and of whole
    BLOCKs of keys. So they have the same shapes for a query alone as for one among others, and add
    up in the same order. One query takes 0.4 of the time of torch's fused attention."""
    (rows, heads, count, width), (groups, length) = q.shape, k.shape[1:3]
    q = q.float().view(rows, groups, -1, count, width) * width**-0.5  # [B, K, H/K, T, D]
    size = blocks(length)
    most = min(groups, max(1, CACHED // (size * width)))  # heads at a time
    memory = scratch(most * size * width, torch.float32).view(-1, size, width)
    memory[:, length:] = 0
    out, parts = torch.empty_like(q), list(shares(count, length))
    for row in range(rows):
        for first in range(0, groups, most):
            some = slice(first, first + most)
            keys, weights = filled(memory, k[row, some]), []
            for queries, seen in parts:
                # [n, H/K, T, D] -> [n, H/K, TOGETHER, D]
                asked = F.pad(q[row, some, :, queries], (0, 0, 0, TOGETHER - seen.shape[0]))
                scores = asked.flatten(1, 2) @ keys[:, : seen.shape[1]].mT
                scores = scores.view(*asked.shape[:3], -1)[:, :, : seen.shape[0]]
                if mask is not None:
                    real = mask[row % len(mask), 0, queries, : seen.shape[1]]
                    scores[..., : real.shape[-1]].masked_fill_(~real, torch.finfo(scores.dtype).min)
                weights.append(scores.masked_fill_(~seen, -torch.inf).softmax(-1))
            values = filled(memory, v[row, some])
            for (queries, seen), each in zip(parts, weights, strict=True):
                each = F.pad(each, (0, 0, 0, TOGETHER - seen.shape[0])).flatten(1, 2)
                found = (each @ values[:, : seen.shape[1]]).unflatten(1, (-1, TOGETHER))
                out[row, some, :, queries] = found[:, :, : seen.shape[0]]
    return out.view(rows, heads, count, width).to(k.dtype)


def one_each(q: Tensor, k: Sequence[Tensor], v: Sequence[Tensor]) -> Tensor:
    """`in_float32` of one query per row, q [B, H, 1, D], over caches of one row, to the last bit
    and in half the time: a small product takes less time than the call, so the rows share whatever
    is not a product, if their numbers of BLOCKs are the same."""
    sizes = [blocks(keys.shape[2]) for keys in k]
    out = torch.empty_like(q)
    for size in {*sizes}:
        some = [i for i, each in enumerate(sizes) if each == size]
        rows = slice(None) if len(some) == len(q) else some
        caches = [(k[i], v[i]) for i in some]
        if k[0].shape[1] * size * q.shape[3] > CACHED:  # one after the other
            found = [in_float32(q[i, None], k[i], v[i]) for i in some]
            out[rows] = torch.cat(found)
        else:
            out[rows] = _one_each(q[rows], caches, size)
    return out


def _one_each(q: Tensor, caches: Sequence[tuple[Tensor, Tensor]], size: int) -> Tensor:
    """Of rows whose keys have one size, in whole BLOCKs."""
    (rows, heads, _, width), groups = q.shape, caches[0][0].shape[1]
    shape = (rows, groups, heads // groups, TOGETHER)
    asked, scores, weights = (
        torch.zeros((*shape, each), dtype=torch.float32) for each in (width, size, size)
    )
    asked[..., 0, :] = (q.float() * width**-0.5).view(*shape[:3], width)
    left, found, chosen = (each.flatten(2, 3) for each in (asked, scores, weights))  # views
    memory = scratch(groups * size * width, torch.float32).view(groups, size, width)
    for row, (keys, _) in enumerate(caches):
        torch.bmm(left[row], filled(memory, keys[0]).mT, out=found[row])
        scores[row, ..., keys.shape[2] :] = -torch.inf
    weights[..., 0, :] = scores[..., 0, :].softmax(-1)
    for row, (_, values) in enumerate(caches):
        memory[:, values.shape[2] :] = 0
        torch.bmm(chosen[row], filled(memory, values[0]), out=left[row])
    return asked[..., 0, :].reshape(q.shape).to(q.dtype)


def blocks(length: int) -> int:
    """A number of keys, rounded up to whole BLOCKs."""
    return -(-length // BLOCK) * BLOCK


def shares(count: int, length: int) -> Iterator[tuple[slice, Tensor]]:
    """At most TOGETHER of the last `count` of `length` positions at a time, those that see equally
    many BLOCKs, and which keys each of them sees: bool [queries, keys]."""
    first = 0
    while first < count:
        before = length - count + 1  # keys that the first query sees
        size = blocks(before + first)
        end = min(first + TOGETHER, count, size - before + 1)
        seen = torch.arange(size) < torch.arange(before + first, before + end)[:, None]
        yield slice(first, end), seen
        first = end


def filled(memory: Tensor, heads: Tensor) -> Tensor:
    """Some heads [n, S, D] in float32, in a memory with room for more positions."""
    memory[: len(heads), : heads.shape[1]] = heads
    return memory[: len(heads)]
