"""The pictures of look.py, drawn with Pillow and numpy: a heat map per word, and the patches as the
model sees them.

G patches a side, W and H width and height of a picture.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SCALE = ((255, 252, 236), (254, 217, 118), (251, 141, 50), (203, 24, 38), (92, 0, 48))
"""Colours from nothing to the hottest, evenly spaced: each darker than the one before, so it reads
in grey as well."""

INK, FAINT, PAPER = (25, 25, 30), (105, 105, 115), (255, 255, 255)

WIDTH, MARGIN, GAP = 1200, 28, 18
QUESTION_HIGH, WORD_HIGH, NOTE_HIGH, SCALE_HIGH = 28, 28, 20, 58  # lines, and the colour scale

BLACK_STAYS = 0.4
"""How light black becomes under a heat map, so that colours show on dark pictures too."""


def colourise(values: np.ndarray) -> np.ndarray:
    """Numbers from 0 to 1 -> colours of SCALE, float [..., 3]."""
    steps = np.linspace(0, 1, len(SCALE))
    return np.stack(
        [np.interp(values, steps, channel) for channel in zip(*SCALE, strict=True)], axis=-1
    )


def heat_map(
    picture: Image.Image, box: Sequence[float], heat: np.ndarray, size: tuple[int, int]
) -> Image.Image:
    """A picture scaled to `size` in greys, coloured by heat [G, G], 0 to its largest number; what
    the model does not see of it (cropped) is hatched, its hottest patch framed. box: left, top,
    right, bottom of the square of patches in pixels of the picture."""
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

    values = spread(heat / max(heat.max(), 1e-12), Image.Resampling.BILINEAR)
    seen = spread(np.ones((grid, grid)), Image.Resampling.NEAREST) > 0
    grey = np.asarray(picture.resize(size).convert("L"), dtype=np.float32)[..., None] / 255
    coloured = colourise(values) * (BLACK_STAYS + (1 - BLACK_STAYS) * grey)  # [H, W, 3]
    hatching = np.add(*np.indices(seen.shape)) % 8 < 2
    coloured[~seen] = np.where(hatching, 150, 225)[~seen][:, None]
    image = Image.fromarray(coloured.astype(np.uint8))
    row, column = divmod(int(heat.argmax()), grid)
    x, y = ((at - low) / (high - low) for at, low, high in (
        (np.array([column, column + 1]), extent[0], extent[2]),
        (np.array([row, row + 1]), extent[1], extent[3]),
    ))  # fmt: skip
    edges = x[0] * size[0], y[0] * size[1], x[1] * size[0], y[1] * size[1]
    pen = ImageDraw.Draw(image)
    pen.rectangle(edges, outline=PAPER, width=3)
    pen.rectangle(edges, outline=INK, width=1)
    return image


def draw_words(
    picture: Image.Image,
    box: Sequence[float],
    words: Sequence[tuple[str, np.ndarray]],
    question: str,
    note: str,
) -> Image.Image:
    """The picture, and for each word (text, heat [G, G]) its map with the word below, row by row; a
    colour scale."""
    count = len(words) + 1
    columns = _columns(count)
    cell = min(380, (WIDTH - 2 * MARGIN - (columns - 1) * GAP) // columns)
    scale = min(cell / picture.width, 1.4 * cell / picture.height)
    size = tuple(max(1, round(length * scale)) for length in picture.size)
    caption, small, large = (
        ImageFont.load_default(s) for s in (17 if columns == 8 else 21, 14, 20)
    )
    head, notes = (wrap(t, f, WIDTH - 2 * MARGIN) for t, f in ((question, large), (note, small)))
    top = MARGIN + QUESTION_HIGH * len(head) + GAP
    cell_high = size[1] + WORD_HIGH + NOTE_HIGH + GAP
    bottom = top + -(-count // columns) * cell_high  # of the panels
    height = bottom + SCALE_HIGH + NOTE_HIGH * len(notes) + MARGIN
    sheet = Image.new("RGB", (WIDTH, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, line in enumerate(head):
        pen.text((MARGIN, MARGIN + QUESTION_HIGH * i), line, INK, large)
    shown = f"{picture.width} x {picture.height}"
    panels = [("the picture", shown, picture.resize(size), FAINT)]
    for text, heat in words:
        share = f"{percent(heat.max())} of {percent(heat.sum())}"
        panels.append((text, share, heat_map(picture, box, heat, size), INK))
    for i, (text, below, panel, colour) in enumerate(panels):
        x, y = MARGIN + i % columns * (cell + GAP), top + i // columns * cell_high
        sheet.paste(panel, (x + (cell - size[0]) // 2, y))
        middle, y = x + cell // 2, y + size[1] + 4
        pen.text((middle, y), shorten(text, caption, cell), colour, caption, anchor="ma")
        pen.text((middle, y + WORD_HIGH), below, FAINT, small, anchor="ma")
    _draw_scale(sheet, pen, bottom)
    for i, line in enumerate(notes):
        pen.text((MARGIN, height - MARGIN - NOTE_HIGH * (len(notes) - i)), line, FAINT, small)
    return sheet


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


def _draw_scale(sheet: Image.Image, pen: ImageDraw.ImageDraw, y: int) -> None:
    length, small = 520, ImageFont.load_default(14)
    # [16, length, 3]
    bar = colourise(np.linspace(0, 1, length))[None].repeat(16, 0).astype(np.uint8)
    sheet.paste(Image.fromarray(bar), (MARGIN, y))
    pen.rectangle((MARGIN - 1, y - 1, MARGIN + length, y + 16), outline=FAINT)
    labels = (("0", 0, "la"), ("half", 0.5, "ma"), ("hottest patch of the word (framed)", 1, "ra"))
    for text, at, anchor in labels:
        pen.text((MARGIN + at * length, y + 21), text, INK, small, anchor=anchor)


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
