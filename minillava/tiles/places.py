"""Where in a picture each of its positions lies, for maps of what an answer looked at.

G patches a side of the overview, r rows and c columns of the map of tiles.
"""

import torch
from torch import Tensor

from minillava.config import LlavaConfig
from minillava.tiles.grid import Size, best_canvas, fitted, kept_patches


class Fold:
    """Adds what falls on the tiles of a picture of that size to the patches of its overview that
    show the same place: numbers [..., positions] -> [..., G times G]. The sum stays, but for what
    falls on the ends of rows, which show nothing."""

    def __init__(self, config: LlavaConfig, size: Size):
        vision, canvas = config.vision, best_canvas(size, config.grid)
        self.side = vision.image_size // vision.patch_size  # G
        shape = [length // vision.image_size * self.side for length in canvas]
        kept, inside = kept_patches(size, *shape), fitted(size, canvas)
        edges = (
            [
                (first + i) * vision.patch_size - (whole - length) // 2
                for i in range(end - first + 1)
            ]
            for first, end, whole, length in zip(
                (kept.top, kept.left), (kept.bottom, kept.right), canvas, inside, strict=True
            )
        )
        self.rows, self.columns = (
            shares(torch.tensor(cut, dtype=torch.float32) / length, self.side)  # [G, r], [G, c]
            for cut, length in zip(edges, inside, strict=True)
        )

    def __call__(self, numbers: Tensor) -> Tensor:
        """[..., positions] -> [..., G times G]"""
        count, (rows, columns) = self.side**2, (self.rows, self.columns)
        rows, columns = rows.to(numbers), columns.to(numbers)
        lines = numbers[..., count:].unflatten(-1, (rows.shape[1], columns.shape[1] + 1))[
            ..., : columns.shape[1]
        ]
        return numbers[..., :count] + (rows @ lines @ columns.T).flatten(-2)


def shares(edges: Tensor, side: int) -> Tensor:
    """Which share of each stretch between two neighbouring edges [n+1], fractions of a length, lies
    in each of `side` equal parts of it: [side, n]. What is outside belongs to the nearest part."""
    bounds = torch.arange(side + 1) / side
    bounds[0], bounds[-1] = -torch.inf, torch.inf
    low, high = edges[:-1], edges[1:]
    overlap = torch.minimum(high, bounds[1:, None]) - torch.maximum(low, bounds[:-1, None])
    return overlap.clamp(min=0) / (high - low)
