"""Every way to decode against naive.py, which has no cache: greedy ids on the stored checkpoints.

In float64, where no two tokens are so near that the order of a sum decides between them.
"""

import functools

import hf
import naive
import pytest
import torch
from models import stored
from paths import REFERENCE

from minillava.chat.conversation import Conversation
from minillava.generate.generation import generate
from minillava.prompt import render

TOYS = ("plain", "grouped", "tied")
PICTURES = ("landscape", "portrait")
MOST = 12


@functools.cache
def assistant(name: str, attention: str):
    return stored(name, dtype="float64", attention=attention)


@functools.cache
def rows(name: str) -> list[tuple[list[int], torch.Tensor | None]]:
    """Ids and pixels of rows with no, one and two pictures, and of unequal length."""
    facts = hf.read_json(REFERENCE / f"{name}.json")
    files = [REFERENCE / "pictures" / f"{each}.png" for each in facts["batch_pictures"]]
    pixels = assistant(name, "eager").image_processor(files).double()
    found, first = [], 0
    for ids in facts["batch_input_ids"]:
        mine = pixels[first : first + ids.count(hf.IMAGE)]
        found.append((ids, mine if len(mine) else None))
        first += len(mine)
    return found


@functools.cache
def answers(name: str) -> list[list[int]]:
    return [naive.greedy(assistant(name, "eager").model, *row, MOST) for row in rows(name)]


def together(name: str) -> tuple[list[list[int]], torch.Tensor]:
    return [ids for ids, _ in rows(name)], torch.cat([p for _, p in rows(name) if p is not None])


def padded(name: str, model) -> list[list[int]]:
    """The naive answers as a batch returns them."""
    longest = max(map(len, answers(name)))
    return [[*a, *[model.config.pad_token_id] * (longest - len(a))] for a in answers(name)]


both = pytest.mark.parametrize("attention", ["eager", "fused"])
toys = pytest.mark.parametrize("name", TOYS)


@toys
def test_the_naive_answers_can_tell_one_token_from_another(name):
    """Rows that all repeat one token would agree with a loop that never reads what it said."""
    assert min(len({*row}) for row in answers(name)) >= 5
    assert len({tuple(row) for row in answers(name)}) == len(rows(name)) >= 3


@both
@toys
def test_a_row_alone(name, attention):
    """A cache whose positions are off by one still gives fluent answers."""
    model = assistant(name, attention).model
    for (ids, images), expected in zip(rows(name), answers(name), strict=True):
        for options in ({}, {"contrast": None, "second": None}, {"num_beams": 1}):
            found = generate(model, [ids], images, max_new_tokens=MOST, **options)
            assert found.sequences.tolist() == [expected]


@both
@toys
def test_a_batch(name, attention):
    """Padding on the left that is attended, or counted as positions, changes the shorter rows."""
    model = assistant(name, attention).model
    found = generate(model, *together(name), max_new_tokens=MOST)
    assert found.sequences.tolist() == padded(name, model)


@both
@toys
def test_a_batch_with_second_rows_that_have_no_say(name, attention):
    """The rows of contrastive decoding that read along must not reach those that answer."""
    model = assistant(name, attention).model
    ids, images = together(name)
    second = ([[i for i in row if i != hf.IMAGE][::-1] for row in ids], None)
    found = generate(
        model,
        ids,
        images,
        max_new_tokens=MOST,
        second=second,
        contrast=lambda logits, other, step: logits,
    )
    assert found.sequences.tolist() == padded(name, model)


@both
@toys
def test_a_conversation(name, attention):
    """The cache is kept between questions and cut back where the ids differ: a position too many
    or too few of an earlier answer changes the next one."""
    one = assistant(name, attention)
    talk, said, pixels = Conversation(one), [], []
    for question, picture in (("hello <image>", 0), ("the next", None), ("<image> and", 1)):
        if picture is not None:
            file = REFERENCE / "pictures" / f"{PICTURES[picture]}.png"
            talk.add_image(file)
            pixels.append(one.image_processor([file]).double())
        ids = one.tokenizer.encode(render(one.template, [*said, (question, None)], None))
        expected = naive.greedy(one.model, ids, torch.cat(pixels), MOST)
        answer = talk.ask(question, max_new_tokens=MOST)
        assert talk.positions[-len(expected) :] == expected
        assert len(talk.positions) == len(expected) + len(ids) + len(pixels) * (
            one.model.config.tokens_per_image - 1
        )
        said.append((question, answer))
    assert talk.turns[1].reused > 0
