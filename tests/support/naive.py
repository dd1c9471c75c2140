"""The slow way to an answer, too simple to get wrong: what every way to decode is compared with."""

import torch


@torch.no_grad()
def greedy(model, ids: list[int], images: torch.Tensor | None, most: int) -> list[int]:
    """The most likely token each time, for one row: no cache and no batch, the whole text is read
    again for every token. Ends with an end token, which is returned, or after `most` tokens."""
    answer: list[int] = []
    while len(answer) < most and not {*answer} & {*model.config.eos_token_ids}:
        logits = model([[*ids, *answer]], images).logits  # [1, T, V]
        answer.append(int(logits[0, -1].argmax()))
    return answer
