"""Pictures whose square, or whose enlargement, would fill the memory: resized to the same bits."""

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


def cut_very_long(image: Image.Image, size: int) -> Image.Image:
    """Of a picture so long and thin that it would be longer than MAX_SIDE once its short side is
    `size`, the square in the middle, which is all that a crop leaves; any other picture as it
    is."""
    (width, height), short = image.size, min(image.size)
    if int(size * max(image.size) / short) <= MAX_SIDE:
        return image
    left, top = (width - short) // 2, (height - short) // 2
    return image.crop((left, top, left + short, top + short))
