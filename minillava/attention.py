"""Attention twice: `eager`, written out to be read and recorded, and `fused`, one library call.

Both compute the same function of the same inputs; the tests hold them against each other. Give a
mask or causal, not both; causal needs T == S. B batch, H heads, K key/value heads, T queries, S
keys, D head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def eager(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """softmax(q·kᵀ / √D)·v, and the softmax itself (Vaswani et al. 2017, eq. 1).

    q [B,H,T,D], k and v [B,K,S,D], mask bool [B|1,1,T,S] with True where a query may look.
    Returns the output [B,H,T,D] and the attention weights [B,H,T,S].
    """
    groups = q.shape[1] // k.shape[1]
    k, v = repeat_heads(k, groups), repeat_heads(v, groups)  # [B, H, S, D]
    # A dot product of D numbers has a standard deviation of about √D; without dividing, the softmax
    # gives almost all weight to one key.
    scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5  # [B, H, T, S]
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()  # [T, S]
    if mask is not None:
        # The smallest finite number, not -inf: a row that may see nothing then becomes uniform
        # instead of 0/0, and in every other row its exponential is exactly zero.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    # In float32 even for half-precision weights, as in transformers: the sum over all keys would
    # otherwise lose the small ones.
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = torch.softmax(scores, dim=-1, dtype=wide).to(q.dtype)
    return torch.matmul(weights, v), weights


def fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, None]:
    """The same function in one kernel that never stores the weights; there are none to return.

    `causal` aligns the triangle to the upper left, so it is only right when T == S.
    """
    grouped = q.shape[1] != k.shape[1]
    sdpa = F.scaled_dot_product_attention
    return sdpa(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped), None


def repeat_heads(x: Tensor, groups: int) -> Tensor:
    """Grouped-query attention: `groups` query heads share one key/value head. [B,K,S,D] ->
    [B,K·groups,S,D]"""
    if groups == 1:
        return x
    # As transformers writes it, and not repeat_interleave: for a single key/value head this makes
    # no copy, and a matrix product over a copy adds up in another order.
    return x[:, :, None].expand(-1, -1, groups, -1, -1).reshape(x.shape[0], -1, *x.shape[2:])


ATTENTION = {"eager": eager, "fused": fused}
