"""Pictures to tiles, bit for bit as transformers' Pillow-based processors of LLaVA-NeXT and
LLaVA-OneVision do it.

k tiles of a picture besides the overview, R their side in pixels.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from minillava.config import LlavaConfig
from minillava.files.pictures import Images, ImageSource, as_list, open_image
from minillava.files.resize import BICUBIC
from minillava.image import CLIP_MEAN, CLIP_STD, ImageProcessor
from minillava.tiles.grid import Size, best_canvas, fitted, map_of


@dataclass(frozen=True)
class Tiled:
    """One picture as the tower reads it. pixels: float32 [1+k,3,R,R], the overview first, then the
    tiles row by row. size: height and width before resizing, by which the padding is taken off;
    None for one that is a square alone."""

    pixels: Tensor
    size: Size | None


class TileProcessor(ImageProcessor):
    """Open, make RGB, resize to the best canvas of `grid`, centre on black, cut into tiles; before
    them the whole picture squeezed into a square.

    alone: only a prompt's single picture is cut into tiles, and each of several is a padded square,
    as LLaVA-OneVision was trained.
    """

    def __init__(
        self,
        image_size: int,
        grid: Sequence[Size],
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        alone: bool = False,
    ):
        super().__init__(image_size, mean=mean, std=std)
        self.aspect, self.grid = "anyres", tuple(grid)  # its `square` is the overview
        self.padded = ImageProcessor(image_size, "pad", mean, std) if alone else None

    def __call__(self, images: Images) -> list[Tiled]:  # type: ignore[override]
        """The pictures of a prompt -> one Tiled each. Raises as ImageProcessor."""
        pictures = as_list(images)
        return [self.one(picture, len(pictures) > 1) for picture in pictures]

    def one(self, source: ImageSource, several: bool) -> Tiled:
        """A picture of a prompt that has it alone, or several."""
        if several and self.padded is not None:
            return Tiled(self.padded(source), None)
        return self.tiled(open_image(source))

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


def one_of(processor: ImageProcessor, picture: ImageSource, several: bool) -> Tensor | Tiled:
    """A picture of a prompt, [3,R,R] or in tiles, as its processor makes it beside others (several)
    or alone."""
    if isinstance(processor, TileProcessor):
        return processor.one(picture, several)
    return processor(picture)[0]


def change_by_others(processor: ImageProcessor) -> bool:
    """Whether a picture is read in another way when a prompt has several."""
    return square_maker(processor, True) is not processor


def key_of(processor: ImageProcessor, content: bytes, several: bool) -> bytes:
    """A digest for what the processor makes of a picture, beside others (several) or alone.
    content: its bytes, or its name."""
    key = hashlib.sha256(content).digest()
    return hashlib.sha256(key).digest() if several and change_by_others(processor) else key


def square_maker(processor: ImageProcessor, several: bool) -> ImageProcessor:
    """What makes the square, or the overview, of a picture beside others (several) or alone."""
    if several and isinstance(processor, TileProcessor) and processor.padded is not None:
        return processor.padded
    return processor


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
    map_ = map_of(size, config.grid, vision.image_size, patches, config.most_tiles)
    return config.tokens_per_image + map_.positions


def most_positions(config: LlavaConfig) -> int:
    """Of a picture in tiles, whatever its size. One that fills a canvas has not the most where
    large maps are made smaller, so every number of rows and of columns is tried."""
    step, sizes = config.vision.patch_size, set[Size]()
    for tall, wide in config.grid:
        sizes |= {(height, wide) for height in range(step, tall, step)} | {(tall, wide)}
        sizes |= {(tall, width) for width in range(step, wide, step)}
    return max(positions_of_size(config, size) for size in sizes)


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
