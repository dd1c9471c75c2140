"""From logits to the next token: pure functions on [B, V] float32, in the order transformers applies them.

repetition penalty, then, only when sampling: temperature, top-k, top-p, min-p. A removed token gets -inf.
"""

import torch
from torch import Tensor

REMOVED = float("-inf")


def repetition_penalty(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens already in the row less likely (Keskar et al. 2019). seen: bool [B,V]."""
    # Divide a positive score, multiply a negative one: both move it down.
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def temperature(scores: Tensor, value: float) -> Tensor:
    """Below 1 sharpens the distribution, above 1 flattens it."""
    return scores / value


def top_k(scores: Tensor, k: int) -> Tensor:
    """Keep the k best; tokens tied with the k-th stay."""
    kth = scores.topk(min(k, scores.shape[-1])).values[:, -1:]  # [B, 1]
    return scores.masked_fill(scores < kth, REMOVED)


def top_p(scores: Tensor, p: float) -> Tensor:
    """Keep the smallest set of best tokens whose probability reaches p (Holtzman et al. 2020)."""
    # Summed from the least likely upwards, as transformers does: in float32 the two directions differ.
    ascending, order = scores.sort(descending=False)
    remove = ascending.softmax(-1).cumsum(-1) <= 1 - p
    remove[:, -1] = False  # the best token always stays
    return scores.masked_fill(remove.scatter(1, order, remove), REMOVED)


def min_p(scores: Tensor, p: float) -> Tensor:
    """Keep the tokens at least p times as likely as the best one."""
    probabilities = scores.softmax(-1)
    return scores.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), REMOVED)


def draw(scores: Tensor, generator: torch.Generator) -> Tensor:
    """One token per row at random, in proportion to softmax(scores). [B,V] -> [B]"""
    return torch.multinomial(scores.softmax(-1), 1, generator=generator).squeeze(1)
