"""Pictures to pixel values, bit for bit as CLIP's Pillow-based processor does it.

n pictures, R side of a picture for the model in pixels.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minillava.files.pictures import Images, ImageSource, as_list, open_image
from minillava.files.resize import BICUBIC, WHOLE_SQUARE, cut_very_long, pad_and_resize
from minillava.options import ASPECTS, expect_one_of

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ImageProcessor:
    """Open, make RGB, make square and resize (pad first, crop last), normalise.

    aspect "pad" (LLaVA-1.5's training): the picture is centred on a square of the mean colour,
    nothing is lost. aspect "crop" (CLIP's, and the llava-hf default): the short side fits, the ends
    of the long side are cut off. aspect "squash" (SigLIP's): both sides fit, proportions are lost.
    """

    def __init__(
        self,
        image_size: int,
        aspect: str = "pad",
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
    ):
        expect_one_of("image aspect ratio", aspect, ASPECTS)
        self.image_size, self.aspect = image_size, aspect
        self.mean, self.std = tuple(mean), tuple(std)

    def __call__(self, images: Images) -> Tensor:
        """Pictures (paths, `data:` URLs, bytes, files, Pillow images) -> float32 [n, 3, R, R].
        Raises FileNotFoundError or ValueError naming the picture."""
        pixels = [self.normalise(self.square(image)) for image in as_list(images)]
        side = self.image_size
        return torch.stack(pixels) if pixels else torch.empty(0, 3, side, side)

    def square(self, source: ImageSource) -> Image.Image:
        """A picture of any size -> the RGB R x R picture the model sees. Raises FileNotFoundError
        or ValueError if it cannot be opened (see open_image)."""
        image = open_image(source)
        if self.aspect == "pad":
            # The mean colour becomes 0 in `normalise`, up to rounding: a margin of it is no signal.
            colour = tuple(int(255 * m) for m in self.mean)
            if max(image.size) > WHOLE_SQUARE:  # the same bits in less memory
                return pad_and_resize(image, self.image_size, colour)
            image = pad_to_square(image, colour)
        if self.aspect in ("pad", "crop"):
            return resize_and_crop(image, self.image_size)
        return image.resize((self.image_size, self.image_size), BICUBIC)

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


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Short side to `size`, bicubic, then the middle `size` x `size` (transformers,
    CLIPImageProcessorPil)."""
    image = cut_very_long(image, size)
    width, height = image.size
    long = int(size * max(width, height) / min(width, height))
    image = image.resize((size, long) if width <= height else (long, size), BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
