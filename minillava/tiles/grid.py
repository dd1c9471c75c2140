"""The arithmetic of tiles: which canvas a picture gets, and which places of it are the picture.

A size is (height, width), as transformers has it. R side of a tile in pixels, G its patches a side.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

Size = tuple[int, int]


class Kept(NamedTuple):
    """Rows and columns of a map of patches that show the picture; the others show padding."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def rows(self) -> int:
        return self.bottom - self.top

    @property
    def columns(self) -> int:
        return self.right - self.left

    @property
    def positions(self) -> int:
        """Each row is followed by the vector that ends a line."""
        return self.rows * (self.columns + 1)

    def shrunk(self, most: int, patches: int) -> "Kept":
        """The rows and columns that LLaVA-OneVision makes of a large map: about as many patches as
        `most` tiles have, where it has more than 1.1 times as many in each direction; 0: all."""
        ratio = math.sqrt(self.rows * self.columns / (most * patches**2)) if most else 0.0
        if ratio <= 1.1:
            return self
        return Kept(0, max(int(self.rows // ratio), 1), 0, max(int(self.columns // ratio), 1))


def best_canvas(size: Size, grid: Sequence[Size]) -> Size:
    """The canvas of `grid` that keeps most pixels of a picture; of several the one that wastes
    least, and of several of those the first.

    The order decides for pictures below one tile: the hub's list begins with two tiles side by
    side, the original's, whose pairs are (width, height), with two above each other.
    """
    height, width = size

    def worth(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - canvas[0] * canvas[1]

    return max(grid, key=worth)  # the first of the largest


def fitted(size: Size, canvas: Size) -> Size:
    """The size that a picture is resized to so that it fills one direction of its canvas."""
    (height, width), (tall, wide) = size, canvas
    across, down = wide / width, tall / height
    if across < down:
        return min(math.ceil(height * across), tall), wide
    return tall, min(math.ceil(width * down), wide)


def kept_patches(size: Size, rows: int, columns: int) -> Kept:
    """Which of a canvas's patches show the picture, by its size before resizing.

    Rounded as transformers does: the original cuts 14.999999999999998 down to 14, which leaves out
    two rows or columns of some sizes, such as 110 x 176. A sliver, say 5000 x 3, may keep none.
    """
    height, width = size
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return Kept(padding, rows - padding, 0, columns)
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return Kept(0, rows, padding, columns - padding)


def map_of(size: Size, grid: Sequence[Size], side: int, patches: int, most: int = 0) -> Kept:
    """The patches that a picture has after the overview. side: R; patches: G; most: of the tiles
    whose patches a map may have (`Kept.shrunk`)."""
    tall, wide = best_canvas(size, grid)
    kept = kept_patches(size, tall // side * patches, wide // side * patches)
    return kept.shrunk(most, patches)
