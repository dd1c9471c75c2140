"""Pictures to pixel values, bit for bit as CLIP's Pillow-based processor does it.

n pictures, R side of a picture for the model in pixels.
"""

import base64
import binascii
import io
import os
import re
import stat
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote_to_bytes

import numpy as np
import torch
from PIL import Image, ImageCms
from torch import Tensor

from minillava.metadata import has_removable_metadata, turn_upright, without_metadata
from minillava.options import ASPECTS

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

MAX_PIXELS = 2 * 89_478_485
"""Pillow's own limit against decompression bombs (about 179 million pixels): of the picture itself."""
MAX_SIDE = 65_535
"""The longest side of a JPEG, which is the most of the common formats; a header that says more is damaged."""
WHOLE_SQUARE = 2048
"""A picture with a longer side is padded while it is resized, in a fraction of its square's memory."""
EXACT_SIDE = 26_755
"""A tall picture with a longer side is resized down before across; the other order takes up to a minute."""

BICUBIC = Image.Resampling.BICUBIC

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
        """A picture of any size -> the RGB R x R picture the model sees. Raises ValueError or
        FileNotFoundError if it cannot be opened (see open_image)."""
        return self._fit(open_image(source))

    def _fit(self, image: Image.Image) -> Image.Image:
        if self.aspect == "pad":
            # The mean colour, which `normalise` makes 0 up to rounding: a margin of it is no signal.
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


def open_image(source: ImageSource) -> Image.Image:
    """A picture from a path, a `data:` URL, bytes, a file or Pillow; upright (EXIF orientation applied) and RGB.

    The original LLaVA ignores EXIF, so phone photos lie on their side there. Metadata that cannot be read is no reason
    to refuse pixels that can. Raises FileNotFoundError, or ValueError for what is not a picture, is damaged, or is
    larger than MAX_PIXELS or MAX_SIDE.
    """
    name = _name(source)
    try:
        file = source if isinstance(source, Image.Image) else _file(source, name)
        try:
            image = _decode(file)
        except (_Refused, Image.DecompressionBombError):
            raise
        except Exception as error:
            # Pillow gives up on some metadata that others skip. The first error is the one to report.
            try:
                image = _decode(_without_metadata(file))
            except Exception:
                raise error from None
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such picture; check the path") from None
    except PermissionError as error:
        raise ValueError(f"{name}: cannot be read ({error.strerror}); give the path of a picture file") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: {str(error).rstrip('.')}; make the picture smaller") from None
    except _Refused as error:
        raise ValueError(f"{name}: {error}") from None
    except Image.UnidentifiedImageError:
        found = "not a picture that Pillow can read, or cut short at its beginning"
        raise ValueError(f"{name}: {found}; convert it to PNG or JPEG") from None
    except Exception as error:
        # On damaged data Pillow's decoders raise anything: OSError, SyntaxError, struct.error, ...
        raise ValueError(f"{name}: the picture is damaged ({error}); save or download it again") from error
    image.info = {}  # what is upright now must not be turned again
    image.filename = name  # a later complaint about it can say which picture it is
    return image


def _decode(file: Image.Image | Path | BinaryIO) -> Image.Image:
    """Pixels, upright and RGB. Raises _Refused for a picture that is too large, and whatever Pillow does."""
    with warnings.catch_warnings():
        # Pillow warns of what it can do without (damaged EXIF), and of large pictures: MAX_PIXELS is the limit.
        warnings.simplefilter("ignore")
        with nullcontext(file) if isinstance(file, Image.Image) else Image.open(file) as image:
            _check_size(image.size)
            image.load()
            return to_rgb(turn_upright(image))


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
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def pad_and_resize(image: Image.Image, size: int, colour: tuple[int, int, int]) -> Image.Image:
    """`pad_to_square`, then a bicubic resize to `size` x `size`, without the memory of the square.

    Pillow resizes in two passes, each rounded to 8 bits: across, where each row is on its own, then down. Rows of one
    colour stay that colour in the first, so only the picture's need it: the same bits as with the whole square. (Above
    EXACT_SIDE a tall picture goes down first, and may differ from them by rounding.)
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


def _pad_and_resize_down(rows: Image.Image, side: int, colour: tuple[int, int, int]) -> Image.Image:
    """size x height -> size x size: rows of the colour above and below until they are `side`, then the pass down."""
    column = Image.new("RGB", (rows.width, side), colour)
    column.paste(rows, (0, (side - rows.height) // 2))
    return column.resize((rows.width, rows.width), BICUBIC)


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Short side to `size`, bicubic, then the middle `size` x `size` (transformers, CLIPImageProcessorPil)."""
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


class _Refused(ValueError):
    """A source that Pillow need not be asked about; the message lacks its name, which the caller knows."""


def _check_size(size: tuple[int, int]) -> None:
    found = f"the picture is {size[0]} x {size[1]}"
    if size[0] * size[1] > MAX_PIXELS:
        raise _Refused(f"{found}, more than {MAX_PIXELS} pixels; make it smaller or cut it")
    if max(size) > MAX_SIDE:
        raise _Refused(f"{found}, with a side of more than {MAX_SIDE} pixels; make it smaller")
    if min(size) < 1:
        raise _Refused(f"{found}, which holds no pixels; choose another")


def _name(source: ImageSource) -> str:
    """What messages call a picture."""
    if isinstance(source, Image.Image):
        return str(vars(source).get("filename") or "picture")  # Pillow notes the file, open_image any source
    if not isinstance(source, (str, Path)):
        name = source.name if hasattr(source, "name") else None  # a file knows its name
        return name if isinstance(name, str) else "picture"
    if _is_data_url(source):
        return "data: URL"
    return str(source) if str(source).isprintable() and str(source) else repr(str(source))  # always one line


def _is_data_url(source: str | Path) -> bool:
    return str(source)[:100].lstrip()[:5].lower() == "data:"


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
        raise _Refused(f"cannot be read ({found}); give the path of a picture file")


def _file(source: str | Path | bytes | BinaryIO, name: str) -> Path | BinaryIO:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if hasattr(source, "read"):
        return source
    if not isinstance(source, (str, Path)):
        raise _Refused(
            f"found {type(source).__name__}, expected a path, bytes, a file or a Pillow image "
            "(Image.fromarray makes one of a uint8 array [height, width, 3])"
        )
    if name.lower().startswith(("http://", "https://")):
        raise _Refused("minillava does not download; save the picture and give its path")
    if _is_data_url(source):
        return io.BytesIO(_read_data_url(str(source)))
    if not os.path.lexists(source):  # `~` is the home folder, unless a file is really called so
        source = os.path.expanduser(source)
    _check_file(source)
    return Path(source)


def _read_data_url(url: str) -> bytes:
    """What a `data:` URL holds, as browsers read it: percent escapes, white space and missing padding are no mistake,
    nor is the alphabet of URLs (-_). Raises _Refused."""
    header, comma, payload = url.strip().partition(",")
    if not comma:
        raise _Refused("expected data:image/png;base64,... and found no comma")
    is_base64 = re.search(r";\s*base64\s*$", header, re.IGNORECASE)
    if not is_base64 and "%" not in payload:
        raise _Refused("expected data:image/png;base64,... and found no ;base64 before the comma")
    try:
        content = unquote_to_bytes(payload)
        if not is_base64:
            return content
        content = b"".join(content.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
        return base64.b64decode(content + b"=" * (-len(content) % 4), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        found = "a letter outside UTF-8" if isinstance(error, UnicodeEncodeError) else error
        raise _Refused(f"what follows ;base64, is not base64 ({found}); encode the picture again") from None


def _without_metadata(file: Path | BinaryIO) -> BinaryIO:
    """A file that Pillow could not open, once more without its metadata. Raises ValueError where that is no help, and
    whatever a file raises that cannot be read again."""
    with open(file, "rb") if isinstance(file, Path) else nullcontext(file) as again:
        again.seek(0)
        head = again.read(16)
        if not has_removable_metadata(head):  # so that gigabytes of something else are not read
            raise ValueError("not a format whose metadata can be left out")
        return io.BytesIO(without_metadata(head + again.read()))
