"""The log of a run as a picture: the loss of each update, its running mean, and the held-out
loss."""

import io
import math
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

SIZE = (640, 360)
FINER = 3  # drawn so much larger, for smooth lines
LEFT, RIGHT, TOP, BOTTOM = 58, 20, 40, 44  # around the axes
INK, GRID, PALE, LOSS, HELD = "#333333", "#e6e6e6", "#bcd0ee", "#2f5fb3", "#d9682a"


def curve(log: Sequence[dict[str, Any]], title: str = "") -> bytes:
    """A PNG of a run's log: of records with `loss` or with `held_out_loss`, both by `update`.
    Raises ValueError if there is no loss in it."""
    losses = [(record["update"], record["loss"]) for record in log if "loss" in record]
    held = [(r["update"], r["held_out_loss"]) for r in log if "held_out_loss" in r]
    if not losses:
        raise ValueError("the log has no update, so there is no loss to draw")
    drawing = _Drawing(max(update for update, _ in losses), [y for _, y in losses + held])
    drawing.axes(title)
    drawing.line(losses, PALE, 1.2)
    drawing.line(_smooth(losses), LOSS, 2.2)
    drawing.line(held, HELD, 1.6, dots=True)
    drawing.legend([("loss of an update", PALE), ("its running mean", LOSS)] + [
        ("held-out rows", HELD)] * bool(held))  # fmt: skip
    file = io.BytesIO()
    drawing.image.resize(SIZE, Image.Resampling.LANCZOS).quantize(64).save(file, "PNG")
    return file.getvalue()


def _smooth(losses: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The mean of each point and of those near it, a tenth of all, none of them to come."""
    width = max(1, len(losses) // 10)
    means = []
    for i, (update, _) in enumerate(losses):
        near = [y for _, y in losses[max(0, i + 1 - width) : i + 1]]
        means.append((update, sum(near) / len(near)))
    return means


class _Drawing:
    """A plane of updates, from 0 to the last, and losses, from 0 to the greatest."""

    def __init__(self, last: int, losses: Sequence[float]):
        self.image = Image.new("RGB", (SIZE[0] * FINER, SIZE[1] * FINER), "white")
        self.pen = ImageDraw.Draw(self.image)
        self.last, self.top = max(1, last), max(*losses, 1e-9) * 1.05

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a point lies in the large picture."""
        across = LEFT + x / self.last * (SIZE[0] - LEFT - RIGHT)
        down = TOP + (1 - y / self.top) * (SIZE[1] - TOP - BOTTOM)
        return across * FINER, down * FINER

    def axes(self, title: str) -> None:
        """Both axes with round numbers, and what they measure."""
        for y in _ticks(self.top):
            (left, level), (right, _) = self.place(0, y), self.place(self.last, y)
            self.pen.line([(left, level), (right, level)], GRID if y else INK, FINER)
            self.text(left - 8 * FINER, level, f"{y:g}", "rm")
        for x in _ticks(self.last):
            across, level = self.place(x, 0)
            self.pen.line([(across, level), (across, level + 4 * FINER)], INK, FINER)
            self.text(across, level + 8 * FINER, f"{x:g}", "ma")
        self.text(LEFT * FINER, 14 * FINER, title or "loss per learnt token", "lt", 14)
        self.text(SIZE[0] * FINER / 2, (SIZE[1] - 6) * FINER, "update", "ms")

    def line(
        self, points: Sequence[tuple[int, float]], colour: str, width: float, dots: bool = False
    ) -> None:
        """The points joined by a line."""
        placed = [self.place(x, y) for x, y in points]
        if len(placed) > 1:
            self.pen.line(placed, colour, round(width * FINER), joint="curve")
        radius = (3.5 if dots else width / 2) * FINER
        for x, y in placed if dots else placed[-1:]:
            self.pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)

    def legend(self, entries: Sequence[tuple[str, str]]) -> None:
        """What each colour is, at the upper right, where a falling curve is not."""
        for i, (text, colour) in enumerate(entries):
            y = (TOP + 12 + 18 * i) * FINER
            x = (SIZE[0] - RIGHT - 150) * FINER
            self.pen.line([(x, y), (x + 18 * FINER, y)], colour, 3 * FINER)
            self.text(x + 26 * FINER, y, text, "lm")

    def text(self, x: float, y: float, text: str, anchor: str, size: int = 12) -> None:
        """A line of text; anchor as Pillow has it."""
        font = ImageFont.load_default(size * FINER)
        self.pen.text((x, y), text, INK, font, anchor)


def _ticks(top: float) -> list[float]:
    """Four to nine round numbers from 0 to `top`: multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(top))
    step = next(s for s in (power / 5, power / 2, power, 2 * power) if top / s < 8)
    return [i * step for i in range(int(top / step) + 1)]
