"""Byte-pair merges, as a tokenizer.json lists them: which two neighbours of a word become one
piece, and in what order."""

import heapq
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NO_MODEL = (
    "there is no tokenizer.model beside it, without which minillava writes no folder in "
    "another layout; copy that of this language model if it has one"
)

Ranks = dict[tuple[str, str], int]
"""A pair of pieces -> its place in the file's list; the lowest is merged first."""


def read_merges(path: Path, merges: Sequence[Any], ids: dict[str, int]) -> Ranks:
    """The pairs and their order. A file writes a pair as two texts, or as one text with a space
    between them. Raises ValueError if a pair does not make a piece of `ids`."""
    try:
        pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]
        known = all(len(p) == 2 and p[0] + p[1] in ids for p in pairs)
    except TypeError:
        known = False
    if not known:
        raise ValueError(f"{path}: merges are not pairs of its pieces; download it again")
    return {(a, b): rank for rank, (a, b) in enumerate(pairs)}


def merge(word: str, ranks: Ranks) -> list[str]:
    """Merge the pair of the lowest rank, the leftmost of several, until no pair is left."""
    parts, count = list(word), len(word)
    before, after = list(range(-1, count - 1)), [*range(1, count), -1]

    def candidate(left: int, right: int) -> tuple[int, int, int, str, str] | None:
        if left < 0 or right < 0 or (parts[left], parts[right]) not in ranks:
            return None
        pair = (parts[left], parts[right])
        return ranks[pair], left, right, *pair

    heap = [found for i in range(count - 1) if (found := candidate(i, i + 1))]
    heapq.heapify(heap)
    while heap:
        _, left, right, *pair = heapq.heappop(heap)
        if after[left] != right or [parts[left], parts[right]] != pair:
            continue  # one of the two was merged with another neighbour
        parts[left], parts[right] = parts[left] + parts[right], ""
        after[left] = after[right]
        if after[left] >= 0:
            before[after[left]] = left
        for found in (candidate(before[left], left), candidate(left, after[left])):
            if found:
                heapq.heappush(heap, found)
    return [part for part in parts if part]
