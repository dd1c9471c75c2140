"""The metadata of a picture file: the orientation, which is needed, and the rest, which is not.

Cameras, editors and messengers write metadata that breaks the format's rules. Every viewer shows
such a picture, and so must we.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress

from PIL import Image

TURNS: dict[int | None, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by its EXIF orientation; with any other value it is upright as it
is stored."""

ORIENTATION = 0x0112

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"

PNG_PIXELS = b"IHDR", b"PLTE", b"TRNS", b"IDAT", b"IEND"
"""The chunks of a PNG without which its pixels are others, by their names in capitals: one whose
name is damaged is still one of them."""


def turn_upright(image: Image.Image) -> Image.Image:
    """A loaded picture, turned as its EXIF, else its XMP, says.

    Pillow's `exif_transpose` is not used. It refuses a picture for one malformed tag: it stops
    reading at that tag, and it writes all tags back, also those out of range.
    """
    turn = TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int | None:
    """The orientation, 1 to 8; None if none can be read."""
    info = image.info
    exif, xmp = (
        info.get("exif"),
        info.get("xmp") or info.get("XML:com.adobe.xmp") or _jpeg_xmp(image),
    )
    found = None
    with suppress(Exception):  # Pillow's readers raise anything on damaged data
        if hasattr(image, "tag_v2"):
            # Pillow has turned a TIFF already, and returns None
            return image.getexif().get(ORIENTATION)
        # ImageMagick writes three lines, then hexadecimal
        if exif is None and "Raw profile type exif" in info:
            exif = bytes.fromhex("".join(info["Raw profile type exif"].split("\n")[3:]))
        if exif is not None:
            found = _read_orientation(exif)
        elif not xmp:
            found = image.getexif().get(ORIENTATION)  # what a caller wrote since
    if found is None:
        xmp = xmp.encode(errors="replace") if isinstance(xmp, str) else xmp
        match = re.search(rb"""tiff:Orientation\s*(?:=\s*["']|>)\s*([0-9])(?![0-9])""", xmp)
        found = int(match[1]) if match else None
    return found


def _jpeg_xmp(image: Image.Image) -> bytes:
    """The XMP of a JPEG, from its segments, as newer Pillows put it in `info["xmp"]`; b"" if there
    is none."""
    begin = b"http://ns.adobe.com/xap/1.0/\0"
    # only Pillow's JPEG class has this list of segments
    segments = (data for _, data in getattr(image, "applist", ()) if data.startswith(begin))
    return next(segments, begin)[len(begin) :]


def _read_orientation(exif: bytes) -> int | None:
    """The orientation in the first directory of EXIF data, None if there is none. Raises
    struct.error if the directory lies outside the data."""
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None or exif[2:4] not in (b"*\0", b"\0*"):
        return None
    (start,) = struct.unpack_from(f"{order}I", exif, 4)
    (entries,) = struct.unpack_from(f"{order}H", exif, start)
    for at in range(start + 2, min(start + 2 + 12 * entries, len(exif) - 11), 12):
        tag, kind, count = struct.unpack_from(f"{order}HHI", exif, at)
        letter = {3: "H", 4: "I", 8: "h", 9: "i"}.get(kind)  # whole numbers of 16 and 32 bits
        # the value is in the entry itself
        if tag == ORIENTATION and letter and 0 < count * struct.calcsize(letter) <= 4:
            return struct.unpack_from(f"{order}{letter}", exif, at + 8)[0]
    return None


def has_removable_metadata(head: bytes) -> bool:
    """Whether `without_metadata` knows the format of a file that begins with `head`."""
    return head.startswith((JPEG, PNG)) or _is_webp(head) or _is_avif(head)


def without_metadata(content: bytes) -> bytes:
    """The same JPEG, PNG, WebP or AVIF without what changes neither pixels nor orientation; any
    other file unchanged."""
    if content.startswith(JPEG):
        return _jpeg_without_metadata(content)
    if content.startswith(PNG):
        return PNG + b"".join(_png_chunks(content))
    if _is_webp(content):
        chunks = b"".join(_webp_chunks(content))
        return b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WEBP" + chunks
    if _is_avif(content):  # the item that holds EXIF or XMP gets a type that no decoder looks for
        return re.sub(rb"(infe.{8})(?:Exif|mime)", rb"\1skip", content, flags=re.DOTALL)
    return content


def _is_webp(content: bytes) -> bool:
    return content[:4] == b"RIFF" and content[8:12] == b"WEBP"


def _is_avif(content: bytes) -> bool:
    return content[4:12] in (b"ftypavif", b"ftypavis")


def _jpeg_without_metadata(content: bytes) -> bytes:
    """A JPEG without comments and APP segments. APP1, which has EXIF and XMP, stays, and so do the
    segments that say what colours mean."""
    kept, at = [content[:2]], 2
    # until the pixels begin
    while content[at : at + 1] == b"\xff" and content[at + 1 : at + 2] != b"\xda":
        kind = content[at + 1]
        if kind == 0xFF:  # a fill byte
            at += 1
            continue
        end = at + 2 + int.from_bytes(content[at + 2 : at + 4], "big")
        # JFIF and Adobe; decoders skip shorter ones
        says_colours = kind in (0xE0, 0xEE) and end - at >= 16
        if kind == 0xE1 or says_colours or not (kind == 0xFE or 0xE0 <= kind <= 0xEF):
            kept.append(content[at:end])
        at = end
    return b"".join([*kept, content[at:]])


def _png_chunks(content: bytes) -> Iterator[bytes]:
    """The chunks that change pixels: those that no decoder may skip (the first letter of the name
    says so). Of the others, those with the orientation, if they are sound."""
    at = len(PNG)
    while at < len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        chunk, kind = content[at:end], content[at + 4 : at + 8]
        sound = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        orients = kind == b"eXIf" or chunk[8:].startswith(b"XML:com.adobe.xmp\0\0")
        optional = kind.isalpha() and kind[:1].islower() and kind.upper() not in PNG_PIXELS
        if not optional or (orients and sound):
            yield chunk
        if kind == b"IEND":
            return
        at = end


def _webp_chunks(content: bytes) -> Iterator[bytes]:
    """The chunks with pixels, and EXIF as far as the file has it; the header then says that there
    is no other metadata."""
    at = 12
    while at + 8 <= len(content):
        kind, size = content[at : at + 4], int.from_bytes(content[at + 4 : at + 8], "little")
        chunk = content[at + 8 : at + 8 + size]
        if kind == b"VP8X":
            chunk = bytes([chunk[0] & ~0x24]) + chunk[1:]
        if kind == b"EXIF":
            yield kind + struct.pack("<I", len(chunk)) + chunk + bytes(len(chunk) % 2)
        elif kind in (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"):
            yield content[at : at + 8] + chunk + bytes(size % 2)
        at += 8 + size + size % 2
