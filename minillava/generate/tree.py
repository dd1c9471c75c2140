"""A tree of guesses, which one pass checks: several tokens may come next, and each goes on its own.

    the last token ─┬─ a ─┬─ b ── c        row 0 is the last token, row i + 1 is guess i:
                    │     └─ d             tokens  a b c d e
                    └─ e                   parents 0 1 2 1 0

A guess sees what came before the pass, the guesses that lead to it, and itself. Its position is
that of its depth, since of the guesses of one depth at most one comes true. A list of guesses is
the tree in which each has one child.

B rows, K key/value heads, D head width, T rows of a pass, S positions with those cached.
"""

from collections.abc import Callable, Container, Sequence
from functools import partial
from heapq import heappop, heappush
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Tree(NamedTuple):
    """Guesses, each after the one it goes on from."""

    tokens: list[int]
    parents: list[int]  # row that each goes on from
    chances: list[float]  # that each comes true, as its drafter thinks; none if it does not say

    def first(self, count: int) -> "Tree":
        return Tree(*(part[:count] for part in self))

    @property
    def is_chain(self) -> bool:
        return self.parents == list(range(len(self.tokens)))

    def child(self, row: int, token: int) -> int | None:
        """The row that goes on from a row with a token."""
        found = zip(self.parents, self.tokens, strict=True)
        return next((i + 1 for i, each in enumerate(found) if each == (row, token)), None)

    def path(self, row: int) -> list[int]:
        """The rows from the last token to a row."""
        return [*self.path(self.parents[row - 1]), row] if row else [0]

    def without(self, refused: Callable[[int], bool], ends: Container[int]) -> "Tree":
        """The tree without refused tokens, what goes on from them, and what follows an end."""
        rows = {0: 0}  # those that are kept, and those of them from which more may follow
        kept = Tree([], [], [])
        for i, (token, parent) in enumerate(zip(self.tokens, self.parents, strict=True)):
            if parent not in rows or refused(token):
                continue
            kept.tokens.append(token)
            kept.parents.append(rows[parent])
            kept.chances.extend(self.chances[i : i + 1])
            if token not in ends:
                rows[i + 1] = len(kept.tokens)
        return kept

    def as_chain(self) -> "Tree":
        """The first guess, the first that goes on from it, and so on."""
        path = [0]
        while path[-1] in self.parents:
            path.append(self.parents.index(path[-1]) + 1)
        places = [row - 1 for row in path[1:]]
        chances = [self.chances[i] for i in places] if self.chances else []
        return chain([self.tokens[i] for i in places])._replace(chances=chances)


def chain(tokens: Sequence[int]) -> Tree:
    return Tree(list(tokens), list(range(len(tokens))), [])


def most_likely(
    tokens: Sequence[Sequence[int]], chances: Sequence[Sequence[float]], count: int
) -> Tree:
    """The `count` guesses that are most likely to come true. tokens, chances: by depth, the best
    first. The chance of a guess is the product of those on its path, as if they did not depend on
    each other. So a guess always comes after the one it goes on from, and the tree of n guesses is
    the first n of a larger one. (Medusa's own trees are such lists, by accuracies that were
    measured once.)"""
    found = Tree([], [], [])
    # minus the guess's chance, its depth, its rank there, its parent's row, the parent's chance
    waiting = [(-chances[0][0], 0, 0, 0, 1.0)]
    while waiting and len(found.tokens) < count:
        minus, depth, rank, parent, before = heappop(waiting)
        found.tokens.append(tokens[depth][rank])
        found.parents.append(parent)
        found.chances.append(-minus)
        if rank + 1 < len(chances[depth]):
            other = -before * chances[depth][rank + 1]
            heappush(waiting, (other, depth, rank + 1, parent, before))
        if depth + 1 < len(chances):
            below = minus * chances[depth + 1][0]
            heappush(waiting, (below, depth + 1, 0, len(found.tokens), -minus))
    return found


def positions_and_mask(
    tree: Tree, past: int, padding_mask: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The positions [B|1,T] of a pass, and what each row sees, bool [B|1,1,T,S]. past: cached
    positions. padding_mask: bool [B, capacity] of the cache, None if nothing is padding."""
    paths = [tree.path(row) for row in range(len(tree.tokens) + 1)]
    seen = torch.ones(1, past, dtype=torch.bool, device=device)
    seen = seen if padding_mask is None else padding_mask[:, :past]
    depths = torch.tensor([len(path) - 1 for path in paths], device=device)
    own = torch.zeros(len(paths), len(paths), dtype=torch.bool)
    for row, path in enumerate(paths):
        own[row, path] = True
    before = seen[:, None, None].expand(-1, 1, len(paths), -1)
    after = own.to(device).expand(len(seen), 1, -1, -1)
    return seen.sum(-1, keepdim=True) + depths, torch.cat([before, after], dim=-1)


def along_paths(attend: Callable[..., Any], tree: Tree, padded: bool) -> Callable[..., Any]:
    """Attention of a tree as if each guess were a step after those that lead to it: the same call,
    with one query, and its path's keys moved to where they would stand in the cache. They are moved
    back at the end, since rejected guesses are known only after the last layer."""
    paths = [tree.path(row) for row in range(len(tree.tokens) + 1)]
    return partial(_attend_rows, attend, paths, padded)


def _attend_rows(
    attend: Callable[..., Any],
    paths: list[list[int]],
    padded: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor | None]:
    past, outs, weights = k.shape[2] - q.shape[2], [], []
    keys, values = k[:, :, past:].clone(), v[:, :, past:].clone()
    for row, path in enumerate(paths):
        end = past + len(path)
        k[:, :, past:end], v[:, :, past:end] = keys[:, :, path], values[:, :, path]
        hidden = None
        if padded and mask is not None:
            hidden = mask[:, :, row : row + 1, [*range(past), *(past + i for i in path)]]
        out, w = attend(q[:, :, row : row + 1], k[:, :, :end], v[:, :, :end], hidden, False)
        outs.append(out)
        if w is not None:
            weights.append(F.pad(w, (0, k.shape[2] - end)))
    k[:, :, past:], v[:, :, past:] = keys, values
    return torch.cat(outs, dim=2), torch.cat(weights, dim=2) if weights else None
