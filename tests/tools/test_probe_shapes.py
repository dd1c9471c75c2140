"""tools/probe_shapes.py: the counting on made-up maps, and all of it on a few scenes."""

import random

import numpy as np
import probe_shapes
import pytest
import shapes
from paths import ROOT

import minillava
from minillava.probe.patching import Patching


@pytest.fixture(scope="module")
def bundled():
    return minillava.load(ROOT / "weights" / "shapes", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def question(bundled):
    """A large blue square in the middle, beside a red circle."""
    things = shapes.Thing("square", "blue", "large", 4), shapes.Thing("circle", "red", "small", 8)
    return probe_shapes.about(bundled, shapes.Scene(200, 200, things, 1), things[0])


def test_hiding_the_object_first_breaks_the_answer_first(question):
    """The deletion test would hide the weakest patches first, or other patches than the map's."""
    grid = question.answered.grid
    rows, columns = np.indices((grid, grid))
    near = -np.maximum(np.abs(rows - 4), np.abs(columns - 4)).astype(float)
    first, last = (probe_shapes.broken_after(question, heat.ravel()) for heat in (near, -near))
    assert first <= 25 < last, "the square's patches lie around the one in the middle"


def test_a_wrong_answer_is_not_asked_about(bundled):
    """A wrong answer would be counted, although nobody knows what it was said of."""
    thing = shapes.Thing("square", "blue", "large", 4)
    red = shapes.Scene(200, 200, (shapes.Thing("square", "red", "large", 4),), 1)
    assert probe_shapes.about(bundled, red, thing) is None


def test_a_flip_is_when_the_other_word_is_ahead():
    """Half of the way between the logits is not the place where the answer changes."""
    moved = Patching(("a", "b"), "", {"x": [1], "y": [2]}, (-6.0, 2.0), np.array([[0.7, 0.8]]))
    assert probe_shapes.flips(moved, "x").tolist() == [False]
    assert probe_shapes.flips(moved, "y").tolist() == [True]


def test_ranks_are_compared_and_not_numbers():
    """One large number would decide the correlation of two tables."""
    rng = random.Random(1)
    table = np.array([rng.random() for _ in range(24)]).reshape(4, 6)
    assert probe_shapes.rank_correlation(table, table**9) == pytest.approx(1)
    assert probe_shapes.rank_correlation(table, -table) == pytest.approx(-1)


@pytest.mark.slow
def test_all_is_measured_on_a_few_scenes(bundled):
    """The committed table could not be made again."""
    text = "\n".join(probe_shapes.measure(bundled, 3))
    assert "| attention | 100.0 | 100.0 |" in text
    assert "3 colour questions: patches hidden until another word" in text
    assert "| 4 | 0.0 | 0.0 | 0.0 | 0.0 | 100.0 |" in text, "only the last position is left to turn"
    assert "the table of 24 heads on both halves: rank correlation" in text


@pytest.mark.slow
def test_what_was_found_is_where_it_should_be(bundled):
    """Maps and patching would be right in the table's numbers by another mistake."""
    asked = probe_shapes.questions(bundled, 6, "tests")
    found = probe_shapes.patched(bundled, asked)
    assert len(found) >= 5
    assert all(probe_shapes.flips(each, "with neighbours")[0] for each in found)
    assert not any(probe_shapes.flips(each, "other patches")[0] for each in found)
