"""The log-likelihood of given answers to one question. The question is prefilled once.

n answers, m the tokens of the longest one, V vocabulary.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minillava.cache import KVCache
from minillava.config import IGNORE_INDEX
from minillava.llama import upcast
from minillava.llava import Llava
from minillava.options import remaining_context
from minillava.tokenizer import common_prefix


@torch.no_grad()
def score_answers(
    model: Llava, rows: Sequence[tuple[list[int], list[int]]], pixels: Tensor, per_token: bool
) -> list[float]:
    """The log-likelihood of the labelled tokens of each row (ids and labels, as `encode_answers`
    makes them), in nats; per_token: their mean. pixels: of the pictures, which all rows share.
    Raises ValueError if the longest answer does not fit the context or a likelihood is not
    finite."""
    prompt, ids, labels = _split(rows)
    spliced = model.splice([prompt], pixels)
    length, device = spliced.embeds.shape[1], spliced.embeds.device
    ids, labels, longest = ids.to(device), labels.to(device), ids.shape[1]  # [n, m]
    room = remaining_context(model.config, length)
    if longest > room:
        raise ValueError(
            f"the longest answer takes {longest} tokens, the model's context has room for {room}"
        )
    cache = KVCache(
        model.config.text, 1, length + longest, dtype=spliced.embeds.dtype, device=device
    )
    first = model.language_model(spliced.embeds, spliced.padding_mask, cache, last_only=True).logits
    cache.select_rows(torch.zeros(len(rows), dtype=torch.long, device=device))
    rest = model.language_model(ids, None, cache).logits  # [n, m, V]
    logits = torch.cat([first.expand(len(rows), -1, -1), rest[:, :-1]], dim=1)  # [n, m, V]
    found = -F.cross_entropy(
        upcast(logits).transpose(1, 2), labels, ignore_index=IGNORE_INDEX, reduction="none"
    ).sum(1)
    if not found.isfinite().all():
        raise ValueError(
            "a likelihood is not finite: damaged weights or a dtype too narrow; try dtype float32"
        )
    return (found / (labels != IGNORE_INDEX).sum(1) if per_token else found).tolist()


def _split(rows: Sequence[tuple[list[int], list[int]]]) -> tuple[list[int], Tensor, Tensor]:
    """The ids with which all rows begin, up to the first label, and the rest of each row: ids and
    labels [n, m].

    The rest is padded on the right: causal attention never attends to later positions."""
    shared = min(common_prefix(rows[0][0], ids) for ids, _ in rows)
    begins = [next(i for i, x in enumerate(labels) if x != IGNORE_INDEX) for _, labels in rows]
    shared = min(shared, *begins)
    longest = max(len(ids) for ids, _ in rows)
    ids, labels = (
        torch.tensor([row[i][shared:] + [fill] * (longest - len(row[i])) for row in rows])
        for i, fill in enumerate((0, IGNORE_INDEX))
    )
    return rows[0][0][:shared], ids, labels
