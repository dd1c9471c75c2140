"""The order in which rows are learnt: a pure function of a seed and an epoch.

LLaVA groups rows by kind and length, so that an update has rows of one kind and the rows of a
micro-batch are of like length (llava_trainer.py). An update takes a block: `parts` micro-batches of
`batch` rows.
"""

from collections.abc import Sequence

import torch
from torch import Generator


def rows_in_order(
    lengths: Sequence[int], order: str, batch: int, parts: int, seed: int, epoch: int
) -> list[int]:
    """The row numbers of an epoch. lengths: words of each row, negative for rows without a picture
    (`grouped` needs both). order: length, shuffle, file."""
    if order == "file":
        return list(range(len(lengths)))
    generator = Generator().manual_seed(seed + epoch)
    if order == "shuffle":
        return shuffled(len(lengths), generator)
    return grouped(lengths, batch, parts, generator)


def micro_batches(order: Sequence[int], batch: int, parts: int) -> list[list[list[int]]]:
    """Updates of micro-batches of row numbers. The last update may be smaller; no row comes
    twice."""
    updates = blocks(order, batch * parts)
    return [blocks(update, batch) for update in updates]


def grouped(lengths: Sequence[int], batch: int, parts: int, generator: Generator) -> list[int]:
    """LLaVA's order by kind and length. The last blocks of both kinds, which may be smaller, come
    together at the end, in the order of the file."""
    kinds = [
        [i for i, length in enumerate(lengths) if (length > 0) is pictures]
        for pictures in (True, False)
    ]
    if not all(kinds):
        return _by_length(lengths, batch, parts, generator)
    size = batch * parts
    cut = []
    for rows in kinds:
        own = [abs(lengths[i]) for i in rows]
        cut.append(blocks([rows[i] for i in _by_length(own, batch, parts, generator)], size))
    whole = [block for some in cut for block in some[:-1]]
    mixed = [whole[i] for i in shuffled(len(whole), generator)]
    return [i for block in mixed for i in block] + sorted(cut[0][-1] + cut[1][-1])


def _by_length(lengths: Sequence[int], batch: int, parts: int, generator: Generator) -> list[int]:
    """Shuffled, and within each block dealt into micro-batches of about equal total length."""
    order = []
    for block in blocks(shuffled(len(lengths), generator), batch * parts):
        longest_first = sorted(block, key=lambda i: lengths[i], reverse=True)
        order += [i for part in _deal(longest_first, lengths, parts) for i in part]
    return order


def _deal(rows: list[int], lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Give each row to the part that is not full and has the least length so far; the rows of a
    block that does not divide evenly are dealt in turn."""
    if len(rows) % parts:
        return [rows[i::parts] for i in range(parts)]
    dealt: list[list[int]] = [[] for _ in range(parts)]
    totals = [0] * parts
    for row in rows:
        free = [i for i in range(parts) if len(dealt[i]) < len(rows) // parts]
        least = min(free, key=lambda i: totals[i])  # the first of equals
        dealt[least].append(row)
        totals[least] += lengths[row]
    return dealt


def shuffled(count: int, generator: Generator) -> list[int]:
    return torch.randperm(count, generator=generator).tolist()


def blocks(items: Sequence, size: int) -> list[list]:
    """Cut into lists of `size`, the last one shorter."""
    return [list(items[i : i + size]) for i in range(0, len(items), size)]
