"""Pictures to pixel values, bit for bit as CLIP's Pillow-based processor does it.

n pictures, R side of a picture for the model in pixels.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minillava.files.pictures import MAX_SIDE, Images, ImageSource, as_list, open_image
from minillava.options import ASPECTS

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)

CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

WHOLE_SQUARE = 2048
"""A picture with a longer side is padded while it is resized, in a fraction of its square's
memory."""

EXACT_SIDE = 26_755
"""A tall picture with a longer side is resized down before across; the other order takes up to a
minute."""

BICUBIC = Image.Resampling.BICUBIC


class ImageProcessor:
    """Open, make RGB, make square, resize, normalise.

    aspect "pad" (LLaVA-1.5's training): the picture is centred on a square of the mean colour,
    nothing is lost. aspect "crop" (CLIP's, and the llava-hf default): the short side fits, the ends
    of the long side are cut off.
    """

    def __init__(
        self,
        image_size: int,
        aspect: str = "pad",
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
    ):
        if aspect not in ASPECTS:
            raise ValueError(
                f"unknown image aspect ratio {aspect!r}, expected one of: {', '.join(ASPECTS)}"
            )
        self.image_size, self.aspect, self.mean, self.std = (
            image_size,
            aspect,
            tuple(mean),
            tuple(std),
        )

    def __call__(self, images: Images) -> Tensor:
        """Pictures (paths, `data:` URLs, bytes, files, Pillow images) -> float32 [n, 3, R, R].
        Raises FileNotFoundError or ValueError naming the picture."""
        pixels = [self.normalise(self.square(image)) for image in as_list(images)]
        return (
            torch.stack(pixels) if pixels else torch.empty(0, 3, self.image_size, self.image_size)
        )

    def square(self, source: ImageSource) -> Image.Image:
        """A picture of any size -> the RGB R x R picture the model sees. Raises ValueError or
        FileNotFoundError if it cannot be opened (see open_image)."""
        return self._fit(open_image(source))

    def _fit(self, image: Image.Image) -> Image.Image:
        if self.aspect == "pad":
            # The mean colour, which `normalise` makes 0 up to rounding: a margin of it is no
            # signal.
            colour = tuple(int(255 * m) for m in self.mean)
            if max(image.size) > WHOLE_SQUARE:
                return pad_and_resize(image, self.image_size, colour)
            image = pad_to_square(image, colour)
        return resize_and_crop(image, self.image_size)

    def normalise(self, image: Image.Image) -> Tensor:
        """RGB R x R -> float32 [3, R, R]: (value / 255 - mean) / std per channel."""
        x = np.asarray(image, dtype=np.float32) / 255  # [R, R, 3]
        x = (x - np.array(self.mean, dtype=np.float32)) / np.array(self.std, dtype=np.float32)
        return torch.from_numpy(x.transpose(2, 0, 1).copy())


def pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """Centre a picture on a square of one colour, rounding towards the top left (LLaVA,
    mm_utils.expand2square)."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def pad_and_resize(image: Image.Image, size: int, colour: tuple[int, ...]) -> Image.Image:
    """`pad_to_square`, then a bicubic resize to `size` x `size`, without the memory of the square.

    Pillow resizes in two passes, each rounded to 8 bits: across, where each row is on its own, then
    down. Rows of one colour stay that colour in the first, so only the picture's need it: the same
    bits as with the whole square. (Above EXACT_SIDE a tall picture goes down first, and may differ
    from them by rounding.)
    """
    width, height = image.size
    side = max(width, height)
    if width < height and side > EXACT_SIDE:
        turned = image.resize((width, size), BICUBIC).transpose(Image.Transpose.TRANSPOSE)
        return _pad_and_resize_down(turned, side, colour).transpose(Image.Transpose.TRANSPOSE)
    if width >= height:
        rows = image.resize((size, height), BICUBIC)
    else:
        rows, count = Image.new("RGB", (size, height)), WHOLE_SQUARE**2 // side
        for top in range(0, height, count):
            part = image.crop((0, top, width, min(top + count, height)))
            strip = Image.new("RGB", (side, part.height), colour)
            strip.paste(part, ((side - width) // 2, 0))
            rows.paste(strip.resize((size, part.height), BICUBIC), (0, top))
    return _pad_and_resize_down(rows, side, colour)


def _pad_and_resize_down(rows: Image.Image, side: int, colour: tuple[int, ...]) -> Image.Image:
    """size x height -> size x size: rows of the colour above and below until they are `side`, then
    the pass down."""
    column = Image.new("RGB", (rows.width, side), colour)
    column.paste(rows, (0, (side - rows.height) // 2))
    return column.resize((rows.width, rows.width), BICUBIC)


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Short side to `size`, bicubic, then the middle `size` x `size` (transformers,
    CLIPImageProcessorPil)."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    new_long = int(size * long / short)
    if new_long > MAX_SIDE:  # a thread: what will be seen of it is cut out before it is enlarged
        left, top = (width - short) // 2, (height - short) // 2
        image, new_long = image.crop((left, top, left + short, top + short)), size
    new = (size, new_long) if width <= height else (new_long, size)
    image = image.resize(new, BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
