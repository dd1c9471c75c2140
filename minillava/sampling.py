"""From logits to the next token: pure functions on [B, V] float32, in the order transformers
applies them.

repetition penalty, no repeated n-grams, then, only when sampling: temperature, top-k, top-p, min-p,
typical-p. A removed token gets -inf. keep: how many tokens, those it likes best, a filter leaves at
least.
"""

import torch
from torch import Tensor

REMOVED = float("-inf")


def repetition_penalty(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens already in the row less likely (Keskar et al. 2019). seen: bool [B,V]."""
    # Divide a positive score, multiply a negative one: both move it down.
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def no_repeat_ngram(scores: Tensor, history: Tensor, size: int) -> Tensor:
    """Remove every token that would end a run of `size` tokens that is in the row already (Paulus
    et al. 2017). history: the row's ids so far [B,S], -1 where it is padding on the left."""
    vocabulary, length = scores.shape[1], history.shape[1]
    if length < size:
        return scores
    runs = history.unfold(1, size, 1)  # [B, S - size + 1, size]
    repeats = (runs[..., :-1] == history[:, None, length - size + 1 :]).all(-1)  # [B, S - size + 1]
    last = runs[..., -1]
    # What is no repetition, padding and ids that the model cannot say are removed from a column of
    # no token.
    last = torch.where(repeats & (last >= 0) & (last < vocabulary), last, vocabulary)
    removed = scores.new_zeros((len(scores), vocabulary + 1), dtype=torch.bool).scatter_(
        1, last, True
    )
    return scores.masked_fill(removed[:, :-1], REMOVED)


def temperature(scores: Tensor, value: float) -> Tensor:
    """Below 1 sharpens the distribution, above 1 flattens it."""
    return scores / value


def top_k(scores: Tensor, k: int) -> Tensor:
    """Keep the k best; tokens tied with the k-th stay."""
    kth = scores.topk(min(k, scores.shape[-1])).values[:, -1:]  # [B, 1]
    return scores.masked_fill(scores < kth, REMOVED)


def top_p(scores: Tensor, p: float, keep: int = 1) -> Tensor:
    """Keep the smallest set of best tokens whose probability reaches p (Holtzman et al. 2020)."""
    # Summed from the least likely upwards, as transformers does: in float32 the two directions
    # differ.
    ascending, order = scores.sort(descending=False)
    remove = ascending.softmax(-1).cumsum(-1) <= 1 - p
    remove[:, -keep:] = False
    return scores.masked_fill(remove.scatter(1, order, remove), REMOVED)


def min_p(scores: Tensor, p: float, keep: int = 1) -> Tensor:
    """Keep the tokens at least p times as likely as the best one."""
    probabilities = scores.softmax(-1)
    remove = probabilities < p * probabilities.amax(-1, keepdim=True)
    remove.scatter_(1, probabilities.topk(min(keep, scores.shape[-1])).indices, False)
    return scores.masked_fill(remove, REMOVED)


def typical_p(scores: Tensor, p: float, keep: int = 1) -> Tensor:
    """Keep the smallest set of tokens that reaches probability p, taking first those whose
    surprise, -log probability, is nearest to the expected one, the entropy (Meister et al. 2022);
    tokens tied with the last one stay."""
    log_p = scores.log_softmax(-1)
    # [B, 1]; a removed token is -inf times 0
    entropy = -(log_p * log_p.exp()).nansum(-1, keepdim=True)
    distance, order = (-log_p - entropy).abs().sort()
    reached = scores.gather(1, order).softmax(-1).cumsum(-1)
    last = (reached < p).sum(1, keepdim=True).clamp(max=scores.shape[1] - 1)  # [B, 1]
    remove = distance > distance.gather(1, last)
    remove[:, :keep] = False
    return scores.masked_fill(remove.scatter(1, order, remove), REMOVED)


def draw(scores: Tensor, generator: torch.Generator, count: int = 1) -> Tensor:
    """`count` different tokens per row at random, in proportion to softmax(scores). [B,V] ->
    [B,count]"""
    return torch.multinomial(scores.softmax(-1), count, generator=generator)
