"""Prompt lookup (Saxena 2023): the guess is what followed the last tokens at an earlier place in
the prompt or the answer. It costs nothing, and is right if an answer repeats itself."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from minillava.sampling import Sampler

LONGEST = 3
"""As many of the last tokens are looked for at first."""


class Lookup:
    """The drafter (see speculate.py)."""

    kind, cost = "lookup", 0.0

    def begin(self, prompt: list[int], sampler: Sampler, pictures: Sequence[Any]) -> "LookupDraft":
        return LookupDraft(prompt, sampler.end_ids.tolist())


class LookupDraft:
    def __init__(self, prompt: list[int], ends: list[int]):
        self.ids, self.ends = list(prompt), ends

    def propose(self, count: int) -> list[int]:
        return look_up(self.ids, count, self.ends)

    def accept(self, ids: list[int], hidden: Tensor) -> None:
        self.ids += ids


def look_up(
    ids: list[int], count: int, ends: Sequence[int] = (), longest: int = LONGEST
) -> list[int]:
    """At most `count` ids that follow the first place where the last n ids are found, for n from
    `longest` down to 1, as in transformers. They end before a picture (-200) or an end token."""
    for n in range(min(longest, len(ids) - 1), 0, -1):
        tail = ids[-n:]
        for start in range(n, len(ids)):
            if ids[start - n : start] == tail:
                found = ids[start : start + count]
                stops = (i for i, x in enumerate(found) if x < 0 or x in ends)
                return found[: next(stops, len(found))]
    return []
