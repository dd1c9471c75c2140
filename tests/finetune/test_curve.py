"""The picture of a run's log."""

import io

import pytest
from PIL import Image

from minillava.finetune.curve import FINER, HELD, LOSS, SIZE, _Drawing, _ticks, curve

LOG = [{"update": 0, "held_out_loss": 3.0, "answers": []}]
LOG += [{"update": i, "loss": 4.0 / i} for i in range(1, 41)]
LOG += [{"update": 40, "held_out_loss": 0.5, "answers": []}]


def colours(png: bytes) -> set[tuple[int, int, int]]:
    return {colour for _, colour in opened(png).getcolors(1 << 20)}


def opened(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png)).convert("RGB")


def near(found: set[tuple[int, int, int]], name: str) -> bool:
    wanted = tuple(int(name[i : i + 2], 16) for i in (1, 3, 5))
    return any(max(abs(a - b) for a, b in zip(c, wanted, strict=True)) < 24 for c in found)


def test_the_curve_shows_losses_and_held_out_losses():
    """A picture of axes alone, or one whose held-out rows are missing."""
    png = curve(LOG)
    assert opened(png).size == SIZE and len(png) < 60_000
    assert near(colours(png), LOSS) and near(colours(png), HELD)
    alone = curve([record for record in LOG if "loss" in record])
    assert near(colours(alone), LOSS) and not near(colours(alone), HELD)


def test_points_lie_where_their_numbers_say():
    """A falling loss would be drawn as a rising one, or outside the axes."""
    drawing = _Drawing(40, [4.0, 0.1])
    (left, high), (right, low) = drawing.place(0, 4.0), drawing.place(40, 0.1)
    assert 0 < left < right < SIZE[0] * FINER and 0 < high < low < SIZE[1] * FINER
    middle = drawing.place(20, 2.05)
    assert middle == pytest.approx(((left + right) / 2, (high + low) / 2))


@pytest.mark.parametrize("top", [0.013, 0.9, 1.0, 4.2, 99.0, 5198.0])
def test_axes_have_a_few_round_numbers(top):
    """An axis would have none, or so many that they lie on each other."""
    ticks = _ticks(top)
    assert 3 <= len(ticks) <= 9 and ticks[0] == 0 and ticks[-1] <= top
    assert all(len(f"{tick:g}") <= 6 for tick in ticks)


def test_one_update_is_a_curve_and_none_is_not():
    """A run of one update would end in a division by zero after all was learnt."""
    assert opened(curve([{"update": 1, "loss": 0.0}])).size == SIZE
    with pytest.raises(ValueError, match="no update"):
        curve([{"update": 0, "held_out_loss": 1.0}])
