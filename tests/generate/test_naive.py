"""Every way to decode against naive.py, which has no cache: greedy ids on the stored checkpoints.

In float64, where no two tokens are so near that the order of a sum decides between them.
"""

import functools
from functools import partial
from itertools import product

import hf
import naive
import pytest
import torch
from models import stored
from paths import REFERENCE

from minillava.batch import run
from minillava.batch.questions import Question
from minillava.batch.together import Together
from minillava.chat.conversation import Conversation
from minillava.fast import ahead
from minillava.fast.compiled import Captured, step
from minillava.generate.contrast import M3ID, RITUAL, VCD
from minillava.generate.generation import generate
from minillava.generate.lookup import Lookup
from minillava.generate.speculate import Drafts
from minillava.loop import Options
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


# Each toy and each attention is in one of these pairs; .ci/run has the others, too.
PAIRS = {("plain", "fused"), ("grouped", "eager"), ("tied", "fused")}
toys_and_attention = pytest.mark.parametrize(
    ("name", "attention"),
    [
        pytest.param(*pair, marks=[] if pair in PAIRS else pytest.mark.slow)
        for pair in product(TOYS, ("eager", "fused"))
    ],
)
toys = pytest.mark.parametrize("name", TOYS)


@toys
def test_the_naive_answers_can_tell_one_token_from_another(name):
    """Rows that all repeat one token would agree with a loop that never reads what it said."""
    assert min(len({*row}) for row in answers(name)) >= 5
    assert len({tuple(row) for row in answers(name)}) == len(rows(name)) >= 3


@toys_and_attention
def test_a_row_alone(name, attention):
    """A cache whose positions are off by one still gives fluent answers."""
    model = assistant(name, attention).model
    for (ids, images), expected in zip(rows(name), answers(name), strict=True):
        for options in ({}, {"contrast": None, "second": None}, {"num_beams": 1}):
            found = generate(model, [ids], images, max_new_tokens=MOST, **options)
            assert found.sequences.tolist() == [expected]


@toys_and_attention
def test_a_batch(name, attention):
    """Padding on the left that is attended, or counted as positions, changes the shorter rows."""
    model = assistant(name, attention).model
    found = generate(model, *together(name), max_new_tokens=MOST)
    assert found.sequences.tolist() == padded(name, model)


@toys_and_attention
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


@toys
@pytest.mark.parametrize("captured", [False, True])
def test_a_step_ahead(name, captured, monkeypatch):
    """As on a GPU: the step that was begun before an answer's end was known is taken back, or the
    next token is read off a cache that is one position too long."""
    model = assistant(name, "fused").model
    decoding = Captured(partial(step, model.language_model)) if captured else ahead.decode_ahead
    monkeypatch.setattr(model, "decoding", decoding)
    for overlaps in (True, False):
        monkeypatch.setattr(ahead, "overlaps_reading", lambda device, said=overlaps: said)
        found = generate(model, *together(name), max_new_tokens=MOST)
        assert found.sequences.tolist() == padded(name, model)
        for (ids, images), expected in zip(rows(name), answers(name), strict=True):
            found = generate(model, [ids], images, max_new_tokens=MOST)
            assert found.sequences.tolist() == [expected]


@toys_and_attention
@pytest.mark.parametrize(
    "method", [VCD(alpha=0, beta=0), RITUAL(alpha=0, beta=0), M3ID(rate=0, beta=0)], ids=repr
)
def test_a_contrast_that_adds_nothing(name, attention, method):
    """Each method's second rows, where its factor is zero: a second row that is read as a first
    one, or the reverse, answers otherwise."""
    model = assistant(name, attention).model
    for (ids, images), expected in zip(rows(name), answers(name), strict=True):
        second = ([ids[::-1]], images.flip(-1) if images is not None else None)
        found = generate(model, [ids], images, max_new_tokens=MOST, second=second, contrast=method)
        assert found.sequences.tolist() == [expected]


@toys_and_attention
@pytest.mark.parametrize("most", [1, 3])
def test_drafts(name, attention, most):
    """A guess that is wrong leaves no position in the cache, one that is right is not read twice."""
    model = assistant(name, attention).model
    for (ids, images), expected in zip(rows(name), answers(name), strict=True):
        drafts = Drafts(Lookup(), most)
        made = drafts.steps(model, model.splice([ids], images), Options(max_new_tokens=MOST))
        assert [each.ids[0] for each in made] == expected


@toys_and_attention
def test_a_file_of_questions(name, attention):
    """The door batch asks questions of unequal length together, with pictures and without, padded
    or each in a slot of the engine, and an answer must not depend on its neighbours."""
    one, files = assistant(name, attention), [REFERENCE / "pictures" / f"{p}.png" for p in PICTURES]
    files = [str(file) for file in files]
    asked = [("hello", [files[0]]), ("what is it, and where is it", [files[1]]), ("a", [])]
    expected = []
    for text, shown in asked:
        ids = one.tokenizer.encode(one.prompt(text, images=len(shown)))
        pixels = one.image_processor(shown).double() if shown else None
        expected.append(one.tokenizer.decode(naive.greedy(one.model, ids, pixels, MOST)))
    assert len({*expected}) == len(expected)
    questions = [Question(i, text=text, images=shown) for i, (text, shown) in enumerate(asked, 1)]
    found = run.ask(one, questions, 0, {"max_new_tokens": MOST})
    assert [answer for answer, _, _ in found] == expected
    prompts = run.read_prompts(one, questions, None)
    most = max(run.lengths_of(one, questions, prompts).values())
    together = Together(one, prompts, most, {"max_new_tokens": MOST}, size=2, pictures=1)
    told = {q.line: answer for some in together.answers(questions) for q, (answer, *_) in some}
    assert [told[line] for line in (1, 2, 3)] == expected


@toys_and_attention
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
