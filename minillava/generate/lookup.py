"""Prompt lookup (Saxena 2023): what followed the last words when they were said before, in the
prompt or in the answer. It costs nothing, and is right where an answer repeats."""

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
    """At most `count` ids from behind the first place where the last n are found, n from `longest`
    down to 1, as transformers looks for them. Up to a picture (-200) or an end token."""
    for n in range(min(longest, len(ids) - 1), 0, -1):
        tail = ids[-n:]
        for start in range(n, len(ids)):
            if ids[start - n : start] == tail:
                found = ids[start : start + count]
                stops = (i for i, x in enumerate(found) if x < 0 or x in ends)
                return found[: next(stops, len(found))]
    return []
