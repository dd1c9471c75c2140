"""Rows that teach the bundled model a new shape, and how its answers about it are counted."""

import json

import eval_shapes
import pytest
import shape_rows
import shapes

from minillava.finetune.rows import read_rows


@pytest.fixture(scope="module")
def hearts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows") / "hearts"
    shape_rows.write_rows("heart", 40, 0, folder)
    return folder


def test_rows_are_of_llavas_form_and_half_of_them_show_the_new_shape(hearts):
    """finetune would refuse the rows, or learn the new shape and forget the old ones."""
    found = read_rows(hearts / "rows.json")
    assert not found.problems
    assert len(found.rows) == 40 * shape_rows.DIALOGUES
    described = [
        answer
        for row in found.rows
        for _, answer in row.turns
        if answer.startswith("I see") and answer != shapes.EMPTY
    ]
    new = sum("heart" in answer for answer in described)
    assert 0.25 < new / len(described) < 0.75  # 40 tosses of a coin: three standard deviations
    assert not any(f"{c} {s}" in answer for s, c in shapes.HELD_OUT for answer in described)


def test_the_same_seed_makes_the_same_rows(hearts, tmp_path):
    """A figure of the tutorial would be of other rows than the reader's."""
    shape_rows.write_rows("heart", 40, 0, tmp_path / "again")
    shape_rows.write_rows("heart", 40, 1, tmp_path / "other")
    names = sorted(path.name for path in hearts.iterdir())
    for name in names:
        assert (hearts / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    first, other = (
        json.loads((f / "rows.json").read_text("utf-8")) for f in (hearts, tmp_path / "other")
    )
    assert first != other


def test_no_scene_that_is_asked_about_was_learnt():
    """Held-out accuracy would be that of rows known by heart."""
    learnt = {shapes.draw(shape_rows.make_scene("heart", i, 0)[0]).tobytes() for i in range(100)}
    asked = {picture.tobytes() for _, picture in eval_shapes.items_of_shape("heart", 100)}
    assert len(asked) > 90 and not asked & learnt


@pytest.mark.parametrize(
    ("knows", "hearts", "old"), [(True, "100.0", "100.0"), (False, "0.0", "0.0")]
)
def test_answers_are_counted_for_new_and_old_shapes(knows, hearts, old):
    """A model that forgot all it knew would look as good as one that learnt."""
    table = eval_shapes.report_shape(
        lambda items: [dialogue.turns[-1][1] if knows else "?" for dialogue, _ in items],
        5,
        "heart",
    )
    assert f"| all | {hearts} | {old} |" in table
    asked = eval_shapes.items_of_shape("heart", 5)
    assert all(any("heart" in text for turn in d.turns for text in turn) for d, _ in asked)


def test_the_bundled_model_was_not_taught_the_new_shapes():
    """A shape that it knows could not be learnt."""
    assert not {*shapes.NEW_SHAPES} & {*shapes.SHAPES}
    assert not {*shapes.pairs_of("heart")} & {*shapes.PAIRS}
