"""Whether a row's result depends on the rows that share its pass; tested on this processor, bit by
bit.

A sum of floating-point numbers depends on its order, and a library chooses the order by the number
of rows, too. If it does not, a prompt gets the same answer to the last bit alone and in a batch.

r rows, C width, B batch, H heads, K key/value heads, S keys, D head width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ROWS = (2, 3, 4, 8, 16, 32)


def rows_alike(product: Callable[[Tensor], Tensor], x: Tensor, counts: Sequence[int] = ROWS) -> int:
    """The largest of these counts up to which all rows keep the bits that they have alone; 1 if not
    even two rows do. x [r, C]: each row goes through the product alone, and together with the first
    rows."""
    counts = [count for count in counts if count <= len(x)]
    alone = torch.cat([product(row[None]) for row in x])
    return _longest(lambda count: torch.equal(product(x[:count]), alone[:count]), counts)


def queries_alike(
    attend: Callable[..., tuple[Tensor, Tensor | None]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Sequence[int] = ROWS,
) -> int:
    """The same for attention with one query per row: q [B, H, 1, D], k and v [B, K, S, D]."""
    counts = [count for count in counts if count <= len(q)]
    alone = torch.cat([attend(q[i, None], k[i, None], v[i, None])[0] for i in range(len(q))])
    return _longest(
        lambda n: torch.equal(attend(q[:n], k[:n], v[:n])[0], alone[:n]),
        counts,
    )


def _longest(alike: Callable[[int], bool], counts: Sequence[int]) -> int:
    """The last count before the first that is not alike."""
    longest = 1
    for count in counts:
        if not alike(count):
            break
        longest = count
    return longest
