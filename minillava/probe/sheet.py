"""The picture of --out: for each word its attention, what hiding does to it, the layers in which
the picture is read, and the heads; and where the fact is that two pictures differ in.

L layers, H heads, G patches a side.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from minillava.look.draw import (
    FAINT,
    PAPER,
    SCALE,
    SIGNED,
    Colours,
    Panel,
    colourise,
    heat_map,
    lay_out,
    percent,
    whole_picture,
)
from minillava.probe.report import TOLD, Findings, number, scale_end

LINES = {"answer": (194, 65, 12), "question": (29, 78, 216)}
"""Colours of the curves: who may not attend to the picture."""

LEFT, BELOW, TINY = 30, 18, 11  # of a drawing: room for the numbers beside it, and their size
COLUMNS = {
    "object's patches": "object",
    "with neighbours": "near",
    "other patches": "other",
    "text between": "text",
    "last position": "last",
}
"""Names of positions, short enough for a column."""


def sheet(found: Findings) -> Image.Image:
    """One row of panels for each word, of what was measured."""
    panels = [panel for place, _ in enumerate(found.words) for panel in _of_word(found, place)]
    columns = max(3, len(panels) // len(found.words))
    if columns == 3 and len(found.words) > 5:
        columns = 6
    if found.patching is not None:
        one, other = (word.strip("\u2581 ") for word in found.patching.words)  # no font has it
        draw = partial(
            matrix, found.patching.moved, ends=1, columns=[COLUMNS[n] for n in found.patching.sets]
        )
        below = "by state; white 0, red 1"
        panels.append(Panel(f"from {one} to {other}", below, draw))
    answered = found.answered
    return lay_out(
        answered.picture.size, answered.question, panels, _note(found), _scales(found), columns
    )


def _of_word(found: Findings, place: int) -> list[Panel]:
    """The panels of one word: its number among those that were asked about."""
    answered, word = found.answered, found.words[place]
    text, heat = answered.words[word][0], answered.attention[word]
    draw = partial(heat_map, answered.picture, answered.box)
    share = f"{percent(heat.max())} of {percent(heat.sum())}"
    panels = [whole_picture(answered.picture)]
    panels.append(Panel(f"{text} (attention)", share, partial(draw, heat)))
    if found.occlusion is not None:
        drop = found.maps()[place]
        shown = partial(draw, drop, ends=scale_end(found))
        panels.append(Panel(f"{text} (hidden)", f"{span(drop)} nats", shown))
    if found.knock_out is not None:
        lines = {who: found.of_words(x)[place] for who, x in found.knock_out.curves.items()}
        most = max(float(np.abs(line).max()) for line in lines.values())
        panels.append(
            Panel(f"{text} (cut off)", f"most {number(most)} nats", partial(curves, lines))
        )
    if found.ablation is not None:
        table = found.heads_and_mlps()[place]  # [L, H + 1]
        heads = [str(i) for i in range(table.shape[1] - 1)]
        ends = max(0.01, float(np.abs(table).max()))
        shown = partial(matrix, table, ends=ends, columns=[*heads, "MLP"])
        panels.append(Panel(f"{text} (heads)", f"colours to ±{number(ends)} nats", shown))
    return panels


def span(values: np.ndarray) -> str:
    return f"{number(values.min())} to {number(values.max())}"


def _note(found: Findings) -> str:
    note = (
        "Attention: the mean of the upper half of the layers, each map on a scale of its own; "
        "below it how much went to its hottest patch, of what went to the picture."
    )
    if (hidden := found.occlusion) is not None:
        note += (
            f" Hidden: {hidden.block} x {hidden.block} patches at a time; {TOLD[hidden.hiding]}. "
            "Red: the word became less likely, so this spoke for it. Blue: it became likelier. All "
            "words have this one scale."
        )
    if (cut := found.knock_out) is not None:
        note += (
            f" Cut off: {cut.window} layer(s) at a time, the positions that choose the answer "
            "(orange), or the text between (blue), may not attend to the picture; layers to the "
            "right, nats lost upwards."
        )
    if found.ablation is not None:
        note += " Heads: one at a time is taken out; rows are layers, the last column is the MLP."
    if found.patching is not None:
        note += (
            " From one word to the other: how far the answer goes when these positions have the "
            "other picture's state; rows are states, 0 goes into the first layer."
        )
    return note


def _scales(found: Findings) -> list[tuple[Colours, Sequence[tuple[str, float]]]]:
    scales: list[tuple[Colours, Sequence[tuple[str, float]]]] = [
        (SCALE, (("0", 0), ("attention: hottest patch", 1)))
    ]
    if found.occlusion is not None:
        ends = number(scale_end(found))
        scales.append(
            (SIGNED, ((f"-{ends} nats: likelier", 0), ("0", 0.5), (f"{ends}: less likely", 1)))
        )
    elif found.ablation is not None or found.patching is not None:
        scales.append((SIGNED, (("likelier", 0), ("0", 0.5), ("less likely, or moved", 1))))
    return scales


def matrix(
    values: np.ndarray, size: tuple[int, int], ends: float, columns: Sequence[str]
) -> Image.Image:
    """Numbers [rows, columns] as squares of colour, SIGNED from -ends to ends, rows numbered."""
    image, (width, height) = Image.new("RGB", size, PAPER), size
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(TINY)
    inside = max(1, width - LEFT), max(1, height - BELOW)
    colours = colourise(np.clip((values / ends + 1) / 2, 0, 1), SIGNED).astype(np.uint8)
    image.paste(Image.fromarray(colours).resize(inside, Image.Resampling.NEAREST), (LEFT, 0))
    rows = len(values)
    for i in range(0, rows, max(1, -(-rows * (TINY + 2) // inside[1]))):
        pen.text((LEFT - 5, (i + 0.5) * inside[1] / rows), str(i), FAINT, font, anchor="rm")
    wide, end = inside[0] / len(columns), 0.0
    for i, name in enumerate(columns):
        middle, half = LEFT + (i + 0.5) * wide, font.getlength(name) / 2
        if middle - half >= end:  # those that fit
            pen.text((middle, height - 2), name, FAINT, font, anchor="ms")
            end = middle + half + 4
    return image


def ends_of(lines: np.ndarray) -> tuple[float, float]:
    """Where the axis of curves ends: at 0 or below, and above; not at what is rounding."""
    return min(0.0, round(float(lines.min()), 2)), max(0.01, float(lines.max()))


def curves(lines: Mapping[str, np.ndarray], size: tuple[int, int]) -> Image.Image:
    """Numbers of layers [L] by who was cut off, as lines on one scale."""
    image, (width, height) = Image.new("RGB", size, PAPER), size
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(TINY)
    every = np.stack(list(lines.values()))
    low, high = ends_of(every)
    count = every.shape[1]

    def place(layer: int, value: float) -> tuple[float, float]:
        x = LEFT + 4 + (width - LEFT - 8) * layer / max(1, count - 1)
        return x, 8 + (height - BELOW - 16) * (high - value) / (high - low)

    for value in sorted({low, 0.0, high}):
        _, y = place(0, value)
        pen.line((LEFT, y, width, y), fill=(210, 210, 215))
        pen.text((LEFT - 3, y), number(value), FAINT, font, anchor="rm")
    for layer in range(0, count, max(1, count // 6)):
        pen.text((place(layer, 0)[0], height - 2), str(layer), FAINT, font, anchor="ms")
    for who, line in lines.items():
        points = [place(i, float(x)) for i, x in enumerate(line)]
        pen.line(points if count > 1 else points * 2, fill=LINES[who], width=2)
        for x, y in points if count < 10 else ():
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=LINES[who])
    return image
