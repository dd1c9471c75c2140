"""A picture from any source, as upright RGB; or an error of one line that says what is wrong with
it."""

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
from typing import Any, BinaryIO, TypeGuard
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from minillava.files.disk import ADVICE, refused
from minillava.files.metadata import has_removable_metadata, turn_upright, without_metadata

MAX_PIXELS = 2 * 89_478_485
"""Pillow's own limit against decompression bombs (about 179 million pixels): of the picture
itself."""

MAX_SIDE = 65_535
"""The longest side of a JPEG, which is the most of the common formats; a header that says more is
damaged."""

STRIP = 1 << 22
"""Pixels that are made RGB at a time: what that takes besides the result is then below 100 MB."""

LONGEST_NAME = 200
"""Characters of a source's name that a message shows; a data: URL or its base64 has millions."""

INVISIBLE = "".join(
    map(
        chr,
        (0xFEFF, *range(0x200B, 0x2010), 0x2060, *range(0x202A, 0x202F), *range(0x2066, 0x206A)),
    )
)
"""Marks without a width, which copying brings along: around a path or a URL nobody means them."""

ImageSource = str | Path | bytes | BinaryIO | Image.Image

Images = ImageSource | Sequence[ImageSource] | None


def are_several(images: object) -> TypeGuard[Sequence[Any]]:
    """Whether `images` is a list, or behaves like one, and is not one picture's path or bytes."""
    return isinstance(images, Sequence) and not isinstance(images, (str, bytes, bytearray))


def as_list(images: Images) -> list[ImageSource]:
    """One picture, several or none (None), as a list."""
    if images is None:
        return []
    # a TypeGuard says nothing of what remains
    return list(images) if are_several(images) else [images]  # type: ignore[list-item]


def open_image(source: ImageSource) -> Image.Image:
    """A picture from a path, a `data:` URL, bytes, a file or Pillow; upright (EXIF orientation
    applied) and RGB.

    The original LLaVA ignores EXIF, so it sees phone photos on their side. A picture whose pixels
    can be read is not refused for metadata that cannot. Raises FileNotFoundError, PermissionError,
    or ValueError if the source is not a picture, is damaged, or is larger than MAX_PIXELS or
    MAX_SIDE.
    """
    name = name_of(source)
    try:
        file = source if isinstance(source, Image.Image) else _file(source, name)
        image = _decode_with_or_without_metadata(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such picture; check the path") from None
    except PermissionError as error:
        raise refused(name if error.filename is None else error.filename, error) from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: {str(error).rstrip('.')}; make the picture smaller") from None
    except Refused as error:
        raise ValueError(f"{name}: {error}") from None
    except UnidentifiedImageError:
        found = "not a picture that Pillow can read, or cut short at its beginning"
        raise ValueError(f"{name}: {found}; convert it to PNG or JPEG") from None
    except Exception as error:
        # On damaged data Pillow's decoders raise anything: OSError, SyntaxError, struct.error, ...
        raise ValueError(
            f"{name}: the picture is damaged ({error}); save or download it again"
        ) from error
    if image is source:
        if not image.info and vars(image).get("filename"):
            return image  # this function opened it before
        image = image.copy()
    image.info = {}  # the picture is upright now and must not be turned again
    vars(image)["filename"] = name  # so that a later error can name the picture
    return image


def _decode_with_or_without_metadata(file: Image.Image | Path | BinaryIO) -> Image.Image:
    """Pillow gives up on some metadata that others skip. The first error is the one to report."""
    try:
        return _decode(file)
    except (Refused, Image.DecompressionBombError):
        raise
    except Exception as error:
        if isinstance(file, Image.Image):
            raise
        try:
            return _decode(_without_metadata(file))
        except Exception:
            raise error from None


def _decode(file: Image.Image | Path | BinaryIO) -> Image.Image:
    """Decode a picture to upright RGB. Raises Refused if it is too large, and whatever Pillow
    raises."""
    with warnings.catch_warnings():
        # Pillow warns of what it does not need (damaged EXIF), and of large pictures, for which
        # MAX_PIXELS is our limit.
        warnings.simplefilter("ignore")
        with nullcontext(file) if isinstance(file, Image.Image) else Image.open(file) as image:
            check_size(image.size)
            image.load()
            return to_rgb(turn_upright(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to RGB: transparency becomes white (as in transformers 5), and greys
    of more than 8 bits are scaled rather than clipped. RGB is returned as it is; any other mode is
    converted in strips, so that memory has one copy only."""
    if image.mode == "RGB" and image.info.get("transparency") is None:
        return image
    # floats are either 0 to 255, as Pillow takes them, or 0 to 1
    unit = image.mode == "F" and image.getextrema()[1] <= 1  # type: ignore[operator]  # one band
    width, height = image.size
    rows = max(1, STRIP // width)
    if height <= rows:
        return _to_rgb(image, unit)
    result = Image.new("RGB", image.size)
    for top in range(0, height, rows):
        part = image.crop((0, top, width, min(top + rows, height)))
        result.paste(_to_rgb(part, unit), (0, top))
    return result


def _to_rgb(image: Image.Image, unit: bool) -> Image.Image:
    """Convert one strip to RGB. unit: whether its floats are 0 to 1."""
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N"):
        # "I" is what older Pillow makes of a 16-bit PNG. 65535 / 255 is exactly 257.
        grey = (np.asarray(image).astype(np.float64) / 257).round().clip(0, 255)
        image = Image.fromarray(grey.astype(np.uint8))
    if unit:
        image = image.point(lambda v: v * 255)
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        to_srgb = ImageCms.buildTransform(lab, srgb, "LAB", "RGB")
        # it returns None only for a transform in place
        return ImageCms.applyTransform(image, to_srgb)  # type: ignore[return-value]
    if image.mode == "La":  # grey with premultiplied alpha
        image = image.convert("LA")
    if {"A", "a"} & set(image.getbands()) or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


class Refused(ValueError):
    """A source that is refused before Pillow sees it. The message does not name the source; the
    caller adds the name."""


def check_size(size: tuple[int, int]) -> None:
    found = f"the picture is {size[0]} x {size[1]}"
    if size[0] * size[1] > MAX_PIXELS:
        raise Refused(f"{found}, more than {MAX_PIXELS} pixels; make it smaller or cut it")
    if max(size) > MAX_SIDE:
        raise Refused(f"{found}, with a side of more than {MAX_SIDE} pixels; make it smaller")
    if min(size) < 1:
        raise Refused(f"{found}, which holds no pixels; choose another")


def name_of(source: ImageSource) -> str:
    """The name of a picture in messages."""
    if isinstance(source, Image.Image):
        # Pillow notes the file, open_image any source
        return str(vars(source).get("filename") or "picture")
    if not isinstance(source, (str, Path)):
        name = source.name if hasattr(source, "name") else None  # an open file has its name
        return name if isinstance(name, str) else "picture"
    if is_data_url(source):
        return "data: URL"
    name = str(source)
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME // 2]} ... {name[-LONGEST_NAME // 4 :]}"
    return name if name.isprintable() and name else repr(name)  # always one line


def is_data_url(source: str | Path) -> bool:
    return re.match(rf"[\s{INVISIBLE}\"']*data:", str(source)[:100], re.IGNORECASE) is not None


def is_file_url(source: str) -> bool:
    return re.match(r"\s*file:/", source[:100], re.IGNORECASE) is not None


def path_of_url(text: str) -> str:
    """file:///a%20b, file://localhost/a%20b and file:/a%20b are /a b; any other text is itself."""
    found = re.match(r"\s*file:(?://(?:localhost)?)?(?=/)", text, re.IGNORECASE)
    if not found:
        return text
    rest = unquote(text[found.end() :], errors="surrogateescape")
    return rest.removeprefix("/") if re.match("/[A-Za-z]:", rest) else rest  # /C:/a.png


def _check_file(path: str | Path) -> None:
    """Raises Refused for folders, devices, and pipes: opening a pipe would wait until somebody
    writes to it."""
    try:
        found = None if stat.S_ISREG(os.stat(path).st_mode) else "a folder, pipe or device"
    except (FileNotFoundError, PermissionError):
        raise
    except OSError as error:  # links in a circle, a name too long
        advice = ADVICE.get(error.errno or 0, "give the path of a picture file")
        raise Refused(f"cannot be read ({error.strerror}); {advice}") from None
    except ValueError as error:  # a name with NUL in it
        found = str(error)
    if found:
        raise Refused(f"cannot be read ({found}); give the path of a picture file")


def _file(source: str | Path | bytes | BinaryIO, name: str) -> Path | BinaryIO:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if not isinstance(source, (str, Path)):
        if hasattr(source, "read"):
            return source
        raise Refused(
            f"found {type(source).__name__}, expected a path, bytes, a file or a Pillow image "
            "(Image.fromarray makes one of a uint8 array [height, width, 3])"
        )
    if name.lower().startswith(("http://", "https://")):
        raise Refused("minillava does not download; save the picture and give its path")
    if is_data_url(source):
        return io.BytesIO(_read_data_url(str(source)))
    if not os.path.lexists(source):  # a file of exactly this name goes first
        if isinstance(source, str) and is_file_url(source):
            source = path_of_url(source)
        source = os.path.expanduser(source)  # `~` is the home folder
        if _looks_like_base64(str(source)):
            raise Refused(
                "cannot be read as a path, and looks like base64; write data:image/png;base64, "
                "before it"
            )
    _check_file(source)
    return Path(source)


def _looks_like_base64(text: str) -> bool:
    """Whether a path that does not exist is the content of a picture: only the letters of base64,
    and either too many for a name or beginning as PNG, JPEG, GIF and WebP do."""
    begins = text.lstrip().startswith(("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR"))
    return (begins or len(text) > LONGEST_NAME) and (
        re.fullmatch(r"[\w+/\-\s]+=*\s*", text, re.ASCII) is not None
    )


def _read_data_url(url: str) -> bytes:
    """The bytes of a `data:` URL, read as browsers read it. Percent escapes, white space, missing
    padding and the alphabet of URLs (-_) are accepted; what follows # is ignored, and so are quotes
    around the URL and characters without a width. Raises Refused."""
    url = url.strip().strip(INVISIBLE).strip()
    if url[0] in "\"'":
        url = url.strip(url[0]).strip()
    url = url.partition("#")[0]
    quoted = re.match(r'(?:[^",]+|"[^"]*")*', url)  # a comma in quotes does not end it
    header = quoted[0] if quoted else ""
    if not url.startswith(",", len(header)):
        header = url.partition(",")[0]
    comma, payload = url[len(header) : len(header) + 1], url[len(header) + 1 :]
    if not comma:
        raise Refused("expected data:image/png;base64,... and found no comma")
    is_base64 = re.search(r";\s*base64\s*$", header, re.IGNORECASE)
    if not is_base64 and "%" not in payload:
        raise Refused("expected data:image/png;base64,... and found no ;base64 before the comma")
    try:
        if is_base64 and not payload.isascii():
            payload = "".join(payload.split()).translate(dict.fromkeys(map(ord, INVISIBLE)))
        content = unquote_to_bytes(payload)
        if not is_base64:
            return content
        content = b"".join(content.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
        return base64.b64decode(content + b"=" * (-len(content) % 4), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        found = "a letter outside UTF-8" if isinstance(error, UnicodeEncodeError) else error
        raise Refused(
            f"what follows ;base64, is not base64 ({found}); encode the picture again"
        ) from None


def _without_metadata(file: Path | BinaryIO) -> BinaryIO:
    """The content, without metadata, of a file that Pillow could not open. Raises ValueError for a
    format whose metadata cannot be removed, and whatever a file raises that cannot be read
    again."""
    with open(file, "rb") if isinstance(file, Path) else nullcontext(file) as again:
        again.seek(0)
        head = again.read(16)
        if not has_removable_metadata(head):  # otherwise gigabytes of another format would be read
            raise ValueError("not a format whose metadata can be left out")
        return io.BytesIO(without_metadata(head + again.read()))
