"""Where in a picture each of its positions lies, for maps of what an answer looked at.

G patches a side of the overview, r rows and c columns of the map of tiles.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minillava.config import LlavaConfig
from minillava.tiles.grid import Size, best_canvas, fitted, kept_patches


class Fold:
    """Adds what falls on the tiles of a picture of that size to the patches of its overview that
    show the same place: numbers [..., positions] -> [..., G times G]. The sum stays, but for what
    falls on the ends of rows, which show nothing.

    A place of a map that was made smaller is a mean of patches: what falls on it counts for each of
    them by its weight in that mean, and for nothing that lies between them and was passed over.
    """

    def __init__(self, config: LlavaConfig, size: Size):
        vision, canvas = config.vision, best_canvas(size, config.grid)
        tile, step = vision.image_size, vision.patch_size
        self.side = tile // step  # G
        shape = [length // tile * self.side for length in canvas]
        kept, inside = kept_patches(size, *shape), fitted(size, canvas)
        small = kept.shrunk(config.most_tiles, self.side)
        bounds = torch.arange(self.side + 1) * step / tile

        def lines(first: int, end: int, count: int, axis: int) -> Tensor:
            """[G, count]: where the rows or columns of the map lie in the overview."""
            at, length = torch.arange(first, end), inside[axis]
            low = at // self.side * tile + at % self.side * step - (canvas[axis] - length) // 2
            found = shares(low / length, (low + step) / length, bounds)
            return found if count == end - first else found @ weights(end - first, count)

        self.rows = lines(kept.top, kept.bottom, small.rows, 0)  # [G, r]
        self.columns = lines(kept.left, kept.right, small.columns, 1)  # [G, c]

    def __call__(self, numbers: Tensor) -> Tensor:
        """[..., positions] -> [..., G times G]"""
        count, (rows, columns) = self.side**2, (self.rows, self.columns)
        rows, columns = rows.to(numbers), columns.to(numbers)
        lines = numbers[..., count:].unflatten(-1, (rows.shape[1], columns.shape[1] + 1))[
            ..., : columns.shape[1]
        ]
        return numbers[..., :count] + (rows @ lines @ columns.T).flatten(-2)


def weights(before: int, after: int) -> Tensor:
    """How much each of `before` lines counts in each of the `after` that are made of them:
    [before, after]; each column adds up to 1."""
    return F.interpolate(torch.eye(before)[None], after, mode="linear")[0]


def shares(low: Tensor, high: Tensor, bounds: Tensor) -> Tensor:
    """Which share of each stretch from low to high [n], fractions of a length, lies in each of the
    parts between two neighbouring bounds: [parts, n]. What is outside belongs to the nearest
    part."""
    bounds = bounds.clone()
    bounds[0], bounds[-1] = -torch.inf, torch.inf
    overlap = torch.minimum(high, bounds[1:, None]) - torch.maximum(low, bounds[:-1, None])
    return overlap.clamp(min=0) / (high - low)
