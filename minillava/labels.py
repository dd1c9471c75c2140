"""What a training predicts: the ids of the answers in a finished conversation."""

from collections.abc import Sequence

from minillava.config import IGNORE_INDEX
from minillava.prompt import render
from minillava.templates import Template
from minillava.tokenizer import Tokenizer, common_prefix


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
