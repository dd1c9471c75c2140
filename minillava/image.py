"""Pictures to pixel values, bit for bit as CLIP's Pillow-based processor does it.

n pictures, R side of a picture for the model in pixels.
"""

import base64
import io
import os
import stat
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from minillava.options import ASPECTS

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

MAX_PIXELS = 2 * 89_478_485
"""Pillow's own limit against decompression bombs (about 179 million pixels), here also for the padded square."""
MAX_SIDE = 65_535
"""The longest side of a JPEG, which is the most of the common formats; a header that says more is damaged."""

ImageSource = str | Path | bytes | BinaryIO | Image.Image
Images = ImageSource | Sequence[ImageSource] | None


def as_list(images: Images) -> list[ImageSource]:
    """One picture, several or none (None), as a list."""
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


class ImageProcessor:
    """Open, make RGB, make square, resize, normalise.

    aspect "pad" (LLaVA-1.5's training): the picture is centred on a square of the mean colour, nothing is lost.
    aspect "crop" (CLIP's, and the llava-hf default): the short side fits, the ends of the long side are cut off.
    """

    def __init__(
        self,
        image_size: int,
        aspect: str = "pad",
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
    ):
        if aspect not in ASPECTS:
            raise ValueError(f"unknown image aspect ratio {aspect!r}, expected one of: {', '.join(ASPECTS)}")
        self.image_size, self.aspect, self.mean, self.std = image_size, aspect, tuple(mean), tuple(std)

    def __call__(self, images: Images) -> Tensor:
        """Pictures (paths, `data:` URLs, bytes, files, Pillow images) -> float32 [n, 3, R, R].
        Raises FileNotFoundError or ValueError naming the picture."""
        pixels = [self.normalise(self.square(image)) for image in as_list(images)]
        return torch.stack(pixels) if pixels else torch.empty(0, 3, self.image_size, self.image_size)

    def square(self, source: ImageSource) -> Image.Image:
        """A picture of any size -> the RGB R x R picture the model sees. Raises as `open_image`."""
        image = open_image(source)
        try:
            return self._fit(image)
        except _TooLarge as error:
            raise ValueError(f"{_name(source)}: {error}") from None

    def _fit(self, image: Image.Image) -> Image.Image:
        if self.aspect == "pad":
            # The mean colour, which `normalise` makes 0 up to rounding: a margin of it is no signal.
            image = pad_to_square(image, tuple(int(255 * m) for m in self.mean))
        return resize_and_crop(image, self.image_size)

    def normalise(self, image: Image.Image) -> Tensor:
        """RGB R x R -> float32 [3, R, R]: (value / 255 - mean) / std per channel."""
        x = np.asarray(image, dtype=np.float32) / 255  # [R, R, 3]
        x = (x - np.array(self.mean, dtype=np.float32)) / np.array(self.std, dtype=np.float32)
        return torch.from_numpy(x.transpose(2, 0, 1).copy())


def open_image(source: ImageSource) -> Image.Image:
    """A picture from a path, a `data:` URL, bytes, a file or Pillow; upright (EXIF orientation applied) and RGB.

    The original LLaVA ignores EXIF, so phone photos lie on their side there. Raises FileNotFoundError, or
    ValueError for what is not a picture, is damaged, or is larger than MAX_PIXELS or MAX_SIDE.
    """
    name = _name(source)
    try:
        with warnings.catch_warnings():
            # Pillow warns of what it can do without (damaged EXIF), and of large pictures: MAX_PIXELS is the limit.
            warnings.simplefilter("ignore")
            with nullcontext(source) if isinstance(source, Image.Image) else Image.open(_file(source, name)) as image:
                _check_size(image.size, "the picture")
                image.load()
                return to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such picture; check the path") from None
    except PermissionError as error:
        raise ValueError(f"{name}: cannot be read ({error.strerror}); give the path of a picture file") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: {error}; make the picture smaller") from None
    except (_TooLarge, _NotAFile) as error:
        raise ValueError(f"{name}: {error}") from None
    except Image.UnidentifiedImageError:
        found = "not a picture that Pillow can read, or cut short at its beginning"
        raise ValueError(f"{name}: {found}; convert it to PNG or JPEG") from None
    except Exception as error:
        # On damaged data Pillow's decoders raise anything: OSError, SyntaxError, struct.error, ...
        raise ValueError(f"{name}: the picture is damaged ({error}); save or download it again") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB: transparency on white (as transformers 5), deep greys scaled rather than clipped."""
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N"):
        # "I" is what older Pillow makes of a 16-bit PNG. 65535 / 255 is exactly 257.
        grey = (np.asarray(image).astype(np.float64) / 257).round().clip(0, 255)
        image = Image.fromarray(grey.astype(np.uint8))
    if image.mode == "F" and image.getextrema()[1] <= 1:
        image = image.point(lambda v: v * 255)  # floats are either 0 to 255, as Pillow takes them, or 0 to 1
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.applyTransform(image, ImageCms.buildTransform(lab, srgb, "LAB", "RGB"))
    if image.mode == "La":  # grey with premultiplied alpha
        image = image.convert("LA")
    if {"A", "a"} & set(image.getbands()) or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Centre a picture on a square of one colour, rounding towards the top left (LLaVA, mm_utils.expand2square)."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    _check_size((side, side), "the picture padded to a square")
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Short side to `size`, bicubic, then the middle `size` x `size` (transformers, CLIPImageProcessorPil)."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    new_long = int(size * long / short)
    new = (size, new_long) if width <= height else (new_long, size)
    _check_size(new, "the picture resized for cropping")
    image = image.resize(new, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class _TooLarge(ValueError):
    """The message lacks the picture's name, which the caller knows."""


class _NotAFile(ValueError):
    """As _TooLarge, for a source that is not the path of a picture."""


def _check_size(size: tuple[int, int], what: str) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise _TooLarge(f"{what} is {size[0]} x {size[1]}, more than {MAX_PIXELS} pixels; make it smaller or cut it")
    if max(size) > MAX_SIDE:
        raise _TooLarge(f"{what} is {size[0]} x {size[1]}, with a side of more than {MAX_SIDE} pixels; make it smaller")
    if min(size) < 1:
        raise _TooLarge(f"{what} is {size[0]} x {size[1]}, which holds no pixels; choose another")


def _name(source: ImageSource) -> str:
    """What messages call a picture."""
    if not isinstance(source, (str, Path)):
        return str(source.name) if hasattr(source, "name") else "picture"  # a file knows its name
    if str(source).startswith("data:"):
        return "data: URL"
    return str(source) if str(source).isprintable() and str(source) else repr(str(source))  # always one line


def _check_file(path: str | Path) -> None:
    """Refuse folders, devices, and pipes: opening one would wait for somebody to write to it."""
    try:
        found = None if stat.S_ISREG(os.stat(path).st_mode) else "a folder, pipe or device"
    except FileNotFoundError:
        raise
    except OSError as error:  # links in a circle, a name too long
        found = error.strerror
    except ValueError as error:  # a name with a zero in it
        found = str(error)
    if found:
        raise _NotAFile(f"cannot be read ({found}); give the path of a picture file")


def _file(source: str | Path | bytes | BinaryIO, name: str) -> Path | BinaryIO:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if hasattr(source, "read"):
        return source
    if not isinstance(source, (str, Path)):
        raise _NotAFile(f"found {type(source).__name__}, expected a path, bytes, a file or a Pillow image")
    if name.startswith(("http://", "https://")):
        raise _NotAFile("minillava does not download; save the picture and give its path")
    if name != "data: URL":
        _check_file(source)
        return Path(source)
    header, _, payload = str(source).partition(",")
    if not header.endswith(";base64"):
        raise _NotAFile("expected data:image/png;base64,... and found no ;base64 before the comma")
    try:
        return io.BytesIO(base64.b64decode(payload, validate=True))
    except ValueError as error:
        raise _NotAFile(f"what follows ;base64, is not base64 ({error}); encode the picture again") from None
