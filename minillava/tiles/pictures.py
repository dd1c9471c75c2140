"""Pictures to tiles, bit for bit as transformers' Pillow-based LLaVA-NeXT processor does it.

k tiles of a picture besides the overview, R their side in pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from minillava.config import LlavaConfig
from minillava.files.pictures import Images, as_list, open_image
from minillava.files.resize import BICUBIC
from minillava.image import CLIP_MEAN, CLIP_STD, ImageProcessor
from minillava.tiles.grid import Size, best_canvas, fitted, map_of


@dataclass(frozen=True)
class Tiled:
    """One picture as the tower reads it. pixels: float32 [1+k,3,R,R], the overview first, then the
    tiles row by row. size: height and width before resizing, by which the padding is taken off."""

    pixels: Tensor
    size: Size


class TileProcessor(ImageProcessor):
    """Open, make RGB, resize to the best canvas of `grid`, centre on black, cut into tiles; before
    them the whole picture squeezed into a square."""

    def __init__(
        self,
        image_size: int,
        grid: Sequence[Size],
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
    ):
        super().__init__(image_size, mean=mean, std=std)
        self.aspect, self.grid = "anyres", tuple(grid)  # its `square` is the overview

    def __call__(self, images: Images) -> list[Tiled]:  # type: ignore[override]
        """Pictures -> one Tiled each. Raises as ImageProcessor."""
        return [self.tiled(open_image(image)) for image in as_list(images)]

    def tiled(self, image: Image.Image) -> Tiled:
        """An open RGB picture -> Tiled."""
        canvas, side = self.canvas(image), self.image_size
        boxes = [
            (left, top, left + side, top + side)
            for top in range(0, canvas.height, side)
            for left in range(0, canvas.width, side)
        ]
        pieces = [self.square(image), *(canvas.crop(box) for box in boxes)]
        pixels = torch.stack([self.normalise(piece) for piece in pieces])
        return Tiled(pixels, (image.height, image.width))

    def boxes(self, size: Size) -> tuple[Size, list[list[int]]]:
        """The canvas of a picture of that size, and for each tile left, top, right, bottom in
        pixels of the picture; beyond its edges is padding."""
        canvas, side = best_canvas(size, self.grid), self.image_size
        inside = fitted(size, canvas)
        offsets = [(whole - length) // 2 for whole, length in zip(canvas, inside, strict=True)]

        def place(at: int, axis: int) -> int:
            return round((at - offsets[axis]) * size[axis] / inside[axis])

        corners = [
            (left, top) for top in range(0, canvas[0], side) for left in range(0, canvas[1], side)
        ]
        return canvas, [
            [place(left, 1), place(top, 0), place(left + side, 1), place(top + side, 0)]
            for left, top in corners
        ]

    def canvas(self, image: Image.Image) -> Image.Image:
        """The picture, resized and centred on black, that is cut into tiles."""
        size = image.height, image.width
        tall, wide = best_canvas(size, self.grid)
        height, width = fitted(size, (tall, wide))
        canvas = Image.new("RGB", (wide, tall))
        resized = image.resize((width, height), BICUBIC)
        canvas.paste(resized, ((wide - width) // 2, (tall - height) // 2))
        return canvas


def positions_of(config: LlavaConfig, picture: Tensor | Tiled) -> int:
    """How many positions one picture takes, as its processor made it."""
    return positions_of_size(config, size_of(picture))


def size_of(picture: Tensor | Tiled) -> Size | None:
    """The size of a picture in tiles; None for a square."""
    return picture.size if isinstance(picture, Tiled) else None


def positions_of_size(config: LlavaConfig, size: Size | None) -> int:
    """How many positions a picture of that size takes in tiles; None: as one square."""
    if size is None:
        return config.tokens_per_image + bool(config.grid)  # and the end of the line
    vision = config.vision
    patches = vision.image_size // vision.patch_size
    map_ = map_of(size, config.grid, vision.image_size, patches)
    return config.tokens_per_image + map_.positions


def most_positions(config: LlavaConfig) -> int:
    """Of a picture in tiles: one that fills the canvas that takes most."""
    return max(positions_of_size(config, canvas) for canvas in config.grid)


def contents_of(picture: Tensor | Tiled) -> bytes:
    """What a picture's processor made of it, as bytes that no other picture has."""
    if isinstance(picture, Tiled):
        return repr(picture.size).encode() + picture.pixels.numpy().tobytes()
    return picture.numpy().tobytes()


def change_pixels(change: Callable[[Tensor], Tensor], pictures: Any) -> Any:
    """Change the pixels of pictures, [n,3,R,R] or a list of Tiled."""
    if isinstance(pictures, Tensor):
        return change(pictures)
    return [Tiled(change(each.pixels), each.size) for each in pictures]
