"""What a training predicts, and how far off it is: the ids of the answers in a finished
conversation, and the loss.

B batch, T tokens, V vocabulary.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from minillava.config import IGNORE_INDEX
from minillava.llama import upcast
from minillava.prompt import render
from minillava.templates import Template
from minillava.tokenizer import Tokenizer


def encode_answers(
    tokenizer: Tokenizer,
    template: Template,
    turns: Sequence[tuple[str, str]],
    system: str | None = None,
) -> tuple[list[int], list[int]]:
    """The ids of a finished conversation, and its labels: the ids of the answers and of what ends
    them, IGNORE_INDEX elsewhere. Answers begin where the prompt ends that the model would see, and
    end where the next question changes how the text is cut; LLaVA counts words for it, and drops a
    conversation if the counts disagree (train.py, preprocess_v1)."""
    ids = tokenizer.encode(render(template, turns, system))
    labels = [IGNORE_INDEX] * len(ids)
    for i, (question, _) in enumerate(turns):
        opened = tokenizer.encode(render(template, [*turns[:i], (question, None)], system))
        finished = tokenizer.encode(render(template, turns[: i + 1], system))
        start, end = len(opened), common_prefix(finished, ids)
        labels[start:end] = ids[start:end]
    return ids, labels


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two texts begin with together."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def next_token_loss(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy, "mean" or "sum", of predicting each label from the position before it. logits
    [B,T,V], labels [B,T].

    In float32, as in transformers, since it sums over the whole vocabulary. Raises ValueError when
    every label is ignored: the mean over nothing is NaN.
    """
    # [B, T]: position t predicts token t + 1
    following = F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
    if (following == IGNORE_INDEX).all():
        raise ValueError(
            f"every label is ignored ({IGNORE_INDEX}): there is nothing to take a loss of"
        )
    logits, following = upcast(logits).flatten(0, 1), following.flatten()
    return F.cross_entropy(logits, following, ignore_index=IGNORE_INDEX, reduction=reduction)
