"""Patching (Meng et al. 2022; Zhang & Nanda 2024): a run about picture A goes on with states of a
run about picture B, which differs in one fact. Where the answer then turns to B's, the fact was.

T positions of prompt and what both answers begin with, L layers, C width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minillava.probe.measure import Answered
from minillava.tokenizer import common_prefix

VISIBLE = 8 / 255
"""By how much a value of a pixel must differ to count: less is what a JPEG's compression does."""


@dataclass
class Patching:
    """words: the two tokens that differ, A's and B's, as texts. before: what both answers begin
    with. sets: name -> positions. apart: the logit of B's token minus that of A's, in run A and in
    run B. moved float64 [L + 1, sets]: how far it goes from A's (0) to B's (1) if state l of
    these positions is B's."""

    words: tuple[str, str]
    before: str
    sets: dict[str, list[int]]
    apart: tuple[float, float]
    moved: np.ndarray


@torch.no_grad()
def patch(a: Answered, b: Answered) -> Patching:
    """The same question about two pictures. Raises ValueError if their answers or their patches are
    the same."""
    common = same_beginning(a, b)
    end = a.first + 1 + common
    pair, layers = (a.ids[common], b.ids[common]), len(a.model.language_model.layers)
    sets = position_sets(a, b, end)
    start, goal = (ahead(x, x.kept.states[-1][:, :end], pair) for x in (a, b))
    moved = np.zeros((layers + 1, len(sets)))
    for layer in range(layers + 1):
        for i, positions in enumerate(sets.values()):
            first = positions[0]
            states = a.kept.states[layer][:, first:end].clone()
            states[:, [at - first for at in positions]] = b.kept.states[layer][:, positions]
            last = a.kept.again(states, first, layer)
            moved[layer, i] = (ahead(a, last, pair) - start) / (goal - start)
    pieces = [a.assistant.tokenizer.piece(i) for i in pair]
    before = a.assistant.tokenizer.decode(a.ids[:common])
    return Patching((pieces[0], pieces[1]), before, sets, (start, goal), moved)


def same_beginning(a: Answered, b: Answered) -> int:
    """How many tokens both answers begin with. Raises ValueError as `patch`."""
    if a.first != b.first or a.question != b.question:
        raise ValueError("patching compares two answers to one question")
    common = common_prefix(a.ids, b.ids)
    if common == min(len(a.ids), len(b.ids)):
        raise ValueError(f"both pictures lead to {a.text!r}; ask for what differs between them")
    return common


def patch_work(a: Answered, b: Answered) -> tuple[int, int]:
    """What `patch` will compute: rows, and positions times layers."""
    layers, end = len(a.model.language_model.layers), a.first + 1 + same_beginning(a, b)
    sets = position_sets(a, b, end).values()
    upwards = sum(range(layers + 1))
    return (layers + 1) * len(sets), upwards * sum(end - positions[0] for positions in sets)


def ahead(answered: Answered, last: Tensor, pair: tuple[int, int]) -> float:
    """The logit of B's token minus that of A's, at the last of these positions: last states
    [1, T, C]."""
    language = answered.model.language_model
    found = language.head(language.norm(last[:, -1:]))[0, 0].cpu().double()  # [V]
    return float(found[pair[1]] - found[pair[0]])


def position_sets(a: Answered, b: Answered, end: int) -> dict[str, list[int]]:
    """What is patched together, those that are not empty: the patches in which the pictures differ;
    the same with the patches around them, into which the vision tower has mixed some of it; the
    others; the text after the picture; and the last position, which chooses."""
    differ, start = differing(a, b), a.patches[0]
    if not differ:
        raise ValueError("the two pictures are alike in every patch; there is nothing to patch")
    wide = with_neighbours(differ, a.grid)
    sets = {
        "object's patches": [start + i for i in differ],
        "with neighbours": [start + i for i in wide],
        "other patches": [i for i in range(*a.patches) if i - start not in set(wide)],
        "text between": list(range(a.picture_end, end - 1)),
        "last position": [end - 1],
    }
    return {name: positions for name, positions in sets.items() if positions}


def with_neighbours(patches: Sequence[int], grid: int) -> list[int]:
    """These patches and those that touch them, also at a corner."""
    near = {
        (row + down, column + right)
        for row, column in (divmod(i, grid) for i in patches)
        for down in (-1, 0, 1)
        for right in (-1, 0, 1)
    }
    return sorted(r * grid + c for r, c in near if 0 <= r < grid and 0 <= c < grid)


def differing(a: Answered, b: Answered) -> list[int]:
    """The numbers of the patches with a pixel that differs (VISIBLE), row by row."""
    processor, grid = a.assistant.image_processor, a.grid
    one, other = (np.asarray(processor.square(x.picture), dtype=float) / 255 for x in (a, b))
    side = a.model.config.vision.patch_size
    apart = np.abs(one - other).max(-1)[: grid * side, : grid * side]  # [R, R]
    most = apart.reshape(grid, side, grid, side).max((1, 3))
    return np.flatnonzero(most > VISIBLE).tolist()
