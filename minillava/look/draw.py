"""The pictures of look.py, drawn with Pillow and numpy: a heat map per word, and the patches as the
model sees them.

G patches a side, W and H width and height of a picture.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SCALE = ((255, 252, 236), (254, 217, 118), (251, 141, 50), (203, 24, 38), (92, 0, 48))
"""Colours from nothing to the hottest, evenly spaced: each darker than the one before, so it reads
in grey as well."""

SIGNED = ((8, 48, 107), (78, 148, 202), (247, 247, 245), (239, 110, 70), (122, 4, 3))
"""Colours from the most negative to the most positive number, nothing in the middle."""

INK, FAINT, PAPER = (25, 25, 30), (105, 105, 115), (255, 255, 255)

WIDTH, MARGIN, GAP = 1200, 28, 18
INSIDE = WIDTH - 2 * MARGIN
QUESTION_HIGH, WORD_HIGH, NOTE_HIGH, SCALE_HIGH = 28, 28, 20, 58  # lines, and the colour scale
SCALE_WIDE = 520

BLACK_STAYS = 0.4
"""How light black becomes under a heat map, so that colours show on dark pictures too."""


Colours = Sequence[tuple[int, int, int]]


def colourise(values: np.ndarray, scale: Colours = SCALE) -> np.ndarray:
    """Numbers from 0 to 1 -> colours of a scale, float [..., 3]."""
    steps = np.linspace(0, 1, len(scale))
    return np.stack(
        [np.interp(values, steps, channel) for channel in zip(*scale, strict=True)], axis=-1
    )


def heat_map(
    picture: Image.Image,
    box: Sequence[float],
    heat: np.ndarray,
    size: tuple[int, int],
    ends: float | None = None,
) -> Image.Image:
    """A picture scaled to `size` in greys, coloured by heat [G, G], 0 to its largest number; what
    the model does not see of it (cropped) is hatched, its hottest patch framed. box: left, top,
    right, bottom of the square of patches in pixels of the picture. ends: of numbers with a sign,
    how far the scale SIGNED goes to both sides; patches are shown as they are, and none is
    framed."""
    grid, (left, top, right, bottom) = len(heat), box
    # The picture's corners in units of patches; what lies outside of the square becomes 0.
    extent = [
        (0 - left) / (right - left) * grid, (0 - top) / (bottom - top) * grid,
        (picture.width - left) / (right - left) * grid,
        (picture.height - top) / (bottom - top) * grid,
    ]  # fmt: skip

    def spread(values, how):
        image = Image.fromarray(values.astype(np.float32))
        return np.asarray(image.transform(size, Image.Transform.EXTENT, extent, how))  # [H, W]

    if ends is None:
        values, scale = spread(heat / max(heat.max(), 1e-12), Image.Resampling.BILINEAR), SCALE
    else:
        values, scale = (spread(heat / ends, Image.Resampling.NEAREST) + 1) / 2, SIGNED
    seen = spread(np.ones((grid, grid)), Image.Resampling.NEAREST) > 0
    grey = np.asarray(picture.resize(size).convert("L"), dtype=np.float32)[..., None] / 255
    coloured = colourise(values, scale) * (BLACK_STAYS + (1 - BLACK_STAYS) * grey)  # [H, W, 3]
    hatching = np.add(*np.indices(seen.shape)) % 8 < 2
    coloured[~seen] = np.where(hatching, 150, 225)[~seen][:, None]
    image = Image.fromarray(coloured.astype(np.uint8))
    if ends is None:
        _frame(image, extent, divmod(int(heat.argmax()), grid))
    return image


def _frame(image: Image.Image, extent: Sequence[float], patch: tuple[int, int]) -> None:
    """Draw a frame around a patch (row, column). extent: the corners in units of patches."""
    (row, column), (left, top, right, bottom) = patch, extent
    x = [(at - left) / (right - left) * image.width for at in (column, column + 1)]
    y = [(at - top) / (bottom - top) * image.height for at in (row, row + 1)]
    pen, edges = ImageDraw.Draw(image), (x[0], y[0], x[1], y[1])
    pen.rectangle(edges, outline=PAPER, width=3)
    pen.rectangle(edges, outline=INK, width=1)


class Panel(NamedTuple):
    """A picture on a sheet, with a line and a faint line below it. draw: makes it in a size."""

    text: str
    below: str
    draw: Callable[[tuple[int, int]], Image.Image]
    colour: tuple[int, int, int] = INK


def draw_words(
    picture: Image.Image,
    box: Sequence[float],
    words: Sequence[tuple[str, np.ndarray]],
    question: str,
    note: str,
) -> Image.Image:
    """The picture, and for each word (text, heat [G, G]) its map with the word below, row by row; a
    colour scale."""
    panels = [whole_picture(picture)]
    for text, heat in words:
        share = f"{percent(heat.max())} of {percent(heat.sum())}"
        panels.append(Panel(text, share, partial(heat_map, picture, box, heat)))
    labels = (("0", 0), ("half", 0.5), ("hottest patch of the word (framed)", 1))
    return lay_out(picture.size, question, panels, note, [(SCALE, labels)])


def whole_picture(picture: Image.Image) -> Panel:
    return Panel("the picture", f"{picture.width} x {picture.height}", picture.resize, FAINT)


def lay_out(
    shape: tuple[int, int],
    question: str,
    panels: Sequence[Panel],
    note: str,
    scales: Sequence[tuple[Colours, Sequence[tuple[str, float]]]],
    columns: int | None = None,
) -> Image.Image:
    """A sheet: the question, panels row by row, all of one shape (width, height), one or two colour
    scales with labels (text, place from 0 to 1), and a note. columns: as many as fit, if None."""
    columns = columns or _columns(len(panels))
    cell = min(380, (INSIDE - (columns - 1) * GAP) // columns)
    size = _fitted(shape, cell)
    caption, small, large = (
        ImageFont.load_default(s) for s in (17 if columns == 8 else 21, 14, 20)
    )
    head, notes = wrap(question, large, INSIDE), wrap(note, small, INSIDE)
    top = MARGIN + QUESTION_HIGH * len(head) + GAP
    cell_high = size[1] + WORD_HIGH + NOTE_HIGH + GAP
    bottom = top + -(-len(panels) // columns) * cell_high  # of the panels
    height = bottom + SCALE_HIGH + NOTE_HIGH * len(notes) + MARGIN
    sheet = Image.new("RGB", (WIDTH, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, line in enumerate(head):
        pen.text((MARGIN, MARGIN + QUESTION_HIGH * i), line, INK, large)
    for i, panel in enumerate(panels):
        x, y = MARGIN + i % columns * (cell + GAP), top + i // columns * cell_high
        sheet.paste(panel.draw(size), (x + (cell - size[0]) // 2, y))
        middle, y = x + cell // 2, y + size[1] + 4
        pen.text(
            (middle, y), shorten(panel.text, caption, cell), panel.colour, caption, anchor="ma"
        )
        pen.text((middle, y + WORD_HIGH), panel.below, FAINT, small, anchor="ma")
    for i, (scale, labels) in enumerate(scales):
        _draw_scale(sheet, pen, (MARGIN + i * (SCALE_WIDE + 80), bottom), scale, labels)
    for i, line in enumerate(notes):
        pen.text((MARGIN, height - MARGIN - NOTE_HIGH * (len(notes) - i)), line, FAINT, small)
    return sheet


def _fitted(shape: tuple[int, int], cell: int) -> tuple[int, int]:
    """The size of a picture of this shape in a cell: as wide, and at most 1.4 times as high."""
    ratio = min(cell / shape[0], 1.4 * cell / shape[1])
    return max(1, round(shape[0] * ratio)), max(1, round(shape[1] * ratio))


def _columns(panels: int) -> int:
    """How many panels stand side by side: few are large, many are small."""
    if panels < 4:
        return max(2, panels)
    return 4 if panels < 13 else 6 if panels < 61 else 8


def remarks(
    words: Sequence[tuple[str, np.ndarray]], box: Sequence[float], size: tuple[int, int]
) -> str:
    """What to know when reading the maps of words (text, heat [G, G]) on a picture of that size;
    box as in `heat_map`."""
    (left, top, right, bottom), (width, height) = box, size
    text = (
        "Each map has a scale of its own: a word that hardly used the picture burns as hot as one "
        "that did."
    )
    if right - left > width or bottom - top > height:
        text += " Shares are of the whole padded picture."
    outside = {}  # in the order of the words, each once
    for word, heat in words:
        row, column = divmod(int(heat.argmax()), len(heat))
        x, y = ((at + 0.5) / len(heat) for at in (column, row))
        if not (0 <= left + x * (right - left) < width and 0 <= top + y * (bottom - top) < height):
            outside[word] = None
    if outside:
        text += (
            " The hottest patch lies in the padding, beside what is shown, for: "
            f"{', '.join(outside)}."
        )
    return text


def _draw_scale(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    scale: Colours,
    labels: Sequence[tuple[str, float]],
) -> None:
    (x, y), small = corner, ImageFont.load_default(14)
    # [16, SCALE_WIDE, 3]
    bar = colourise(np.linspace(0, 1, SCALE_WIDE), scale)[None].repeat(16, 0).astype(np.uint8)
    sheet.paste(Image.fromarray(bar), corner)
    pen.rectangle((x - 1, y - 1, x + SCALE_WIDE, y + 16), outline=FAINT)
    for text, at in labels:
        anchor = {0: "la", 1: "ra"}.get(at, "ma")
        pen.text((x + at * SCALE_WIDE, y + 21), text, INK, small, anchor=anchor)


def draw_grid(square: Image.Image, grid: int) -> Image.Image:
    """The square that the model sees, pixel for pixel enlarged, cut into its patches; rows and
    columns numbered."""
    times = max(1, 1000 // square.width)
    cell, edge = square.width * times / grid, 34
    sheet = Image.new(
        "RGB", (square.width * times + 2 * edge, square.height * times + 2 * edge), PAPER
    )
    sheet.paste(
        square.resize((square.width * times, square.height * times), Image.Resampling.NEAREST),
        (edge, edge),
    )
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    end = edge + grid * cell
    for i in range(grid + 1):
        at = edge + i * cell
        for line in ((at, edge, at, end), (edge, at, end, at)):
            pen.line(line, fill=PAPER, width=3)
            pen.line(line, fill=INK, width=1)
    for i in range(grid):
        at = edge + (i + 0.5) * cell
        pen.text((at, edge / 2), str(i), INK, font, anchor="mm")
        pen.text((edge / 2, at), str(i), INK, font, anchor="mm")
    return sheet


def wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Text in lines no wider than `width`; a word that is alone wider is shortened."""
    lines = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(shorten(word, font, width))
    return lines


def shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, cut to `width` with an ellipsis if it is wider."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def listed(numbers: Sequence[int]) -> str:
    """[0, 2, 3, 4] as "0, 2-4"."""
    runs: list[list[int]] = []
    for i in numbers:
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def percent(share: float) -> str:
    return f"{100 * share:.{1 if share >= 0.01 else 2}f}%"
