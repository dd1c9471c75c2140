"""Resizing pictures whose padded square, or whose enlargement, would fill the memory; the result
has the same bits."""

from PIL import Image

from minillava.files.pictures import MAX_SIDE

WHOLE_SQUARE = 2048
"""A picture with a longer side is padded while it is resized, in a fraction of its square's
memory."""

EXACT_SIDE = 26_755
"""A tall picture with a longer side is resized down before across; the other order takes up to a
minute."""

BICUBIC = Image.Resampling.BICUBIC


def pad_and_resize(image: Image.Image, size: int, colour: tuple[int, ...]) -> Image.Image:
    """`image.pad_to_square`, then a bicubic resize to `size` x `size`, without the memory of the
    square.

    Pillow resizes in two passes, each rounded to 8 bits: first across, row by row, then down. A row
    of one colour keeps that colour in the first pass, so only the picture's own rows need it, and
    the bits are those of the whole square. (Above EXACT_SIDE a tall picture is first resized down,
    and may differ by rounding.)
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
    """The second pass, size x height -> size x size: add rows of the colour above and below up to
    `side` rows, then resize down."""
    column = Image.new("RGB", (rows.width, side), colour)
    column.paste(rows, (0, (side - rows.height) // 2))
    return column.resize((rows.width, rows.width), BICUBIC)


def cut_very_long(image: Image.Image, size: int) -> Image.Image:
    """The square in the middle of a very long picture, which is all that a crop leaves; any other
    picture unchanged. A picture is very long if its long side would exceed MAX_SIDE once its short
    side is `size`."""
    (width, height), short = image.size, min(image.size)
    if int(size * max(image.size) / short) <= MAX_SIDE:
        return image
    left, top = (width - short) // 2, (height - short) // 2
    return image.crop((left, top, left + short, top + short))
