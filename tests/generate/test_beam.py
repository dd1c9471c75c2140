"""Beam search against trying every answer there is; equality with transformers is in
test_parity_live.py."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from bounds import assert_same_in_float64
from models import stored, tiny

from minillava.generate import beam
from minillava.generate.generation import generate
from minillava.loop import Options, steps

pytestmark = pytest.mark.numeric

V, END, PAD = 5, 2, 0
PROMPTS = [[1, 3, -200, 4], [1, 4], [1, 3, 3, 4, 1]]
PICTURE = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1)).double()


@pytest.fixture(scope="module")
def model():
    """Five words, so that all answers can be tried; float64, so that none of them tie by
    rounding."""
    return tiny(V, seed=3, image_token_id=V, pad_token_id=PAD)


@pytest.fixture(scope="module")
def toy(reference):
    return stored(dtype="float64")


@pytest.fixture
def ends(toy):
    """`ends(id, ...)`: the toy as if these ended its answers."""
    original = toy.model.config

    def change(*ids):
        toy.model.config = replace(original, eos_token_ids=ids)

    yield change
    toy.model.config = original


def search(model, row, **options):
    images = PICTURE if -200 in row else None
    return beam.search(
        model, model.splice([row], images), Options(**options), record=("scores", "logits")
    )


@torch.no_grad()
def every_answer(
    model, row, length: int, penalty: float, least: int = 0
) -> list[tuple[float, tuple[int, ...]]]:
    """(score, ids) of all answers of up to `length` tokens, the best first, each scored without a
    cache."""
    images = PICTURE if -200 in row else None
    answers = set()
    for ids in product(range(V), repeat=length):
        answers.add(ids[: ids.index(END) + 1] if END in ids else ids)
    found = []
    for ids in answers:
        if len(ids) <= least and ids[-1] == END:
            continue
        log_p = model([[*row, *ids]], images).logits[0, -len(ids) - 1 : -1].log_softmax(-1)
        total = sum(float(p[i]) for p, i in zip(log_p, ids, strict=True))
        found.append((total / len(ids) ** penalty, ids))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("row", PROMPTS[:2])
@pytest.mark.parametrize("penalty", [-2.0, 0.0, 1.0, 3.0])
def test_with_a_beam_for_every_beginning_it_finds_the_best_of_all_answers(model, row, penalty):
    """early_stopping "never" stops only when nothing better can come, so this is exact."""
    options = {
        "num_beams": V**2,
        "num_return_sequences": 6,
        "length_penalty": penalty,
        "early_stopping": "never",
    }
    found = search(model, row, max_new_tokens=3, **options)
    expected = every_answer(model, row, 3, penalty)[:6]
    assert [
        tuple(ids[:n]) for ids, n in zip(found.sequences.tolist(), found.lengths, strict=True)
    ] == [ids for _, ids in expected]
    torch.testing.assert_close(
        found.scores, torch.tensor([score for score, _ in expected]).double()
    )
    assert found.finish_reason == ["stop" if ids[-1] == END else "length" for _, ids in expected]
    for ids, n in zip(found.sequences.tolist(), found.lengths, strict=True):
        assert ids[n:] == [PAD] * (found.sequences.shape[1] - n)


def test_a_length_penalty_moves_the_choice_between_short_and_long(model):
    """Unless it is 0, when a longer answer can only be less likely."""
    lengths = {
        penalty: search(model, PROMPTS[0], num_beams=4, length_penalty=penalty, early_stopping="never",
                        max_new_tokens=6).lengths[0]
        for penalty in (-3.0, 3.0)
    }  # fmt: skip
    assert lengths[-3.0] < lengths[3.0] == 6


def test_min_new_tokens_bars_short_answers(model):
    """Barred after the beams are chosen, an end would leave beams without a token."""
    options = {
        "num_beams": V**2,
        "num_return_sequences": 4,
        "length_penalty": -2.0,
        "early_stopping": "never",
    }
    found = search(model, PROMPTS[0], max_new_tokens=3, min_new_tokens=2, **options)
    expected = every_answer(model, PROMPTS[0], 3, -2.0, least=2)[:4]
    assert [tuple(ids) for ids in found.sequences.tolist()] == [ids for _, ids in expected]
    assert min(found.lengths) == 3


@pytest.mark.parametrize("early", [False, True, "never"])
@pytest.mark.parametrize("options", [{}, {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3}])
def test_a_row_of_a_batch_equals_the_row_alone(toy, ends, early, options):
    """Rows finish at different times, and beams change places within their own row only."""
    rows = [[1, 30, -200, 41, 42], [1, 99, 12], [1, 7, 8, 9, 10, 11, 12]]
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    options = {
        "num_beams": 3,
        "num_return_sequences": 2,
        "early_stopping": early,
        "max_new_tokens": 10,
        **options,
    }
    free = generate(toy.model, rows, pixels, **options).sequences
    ends(2, int(free[0, 2]), int(free[4, 4]))  # answers of several lengths
    together = generate(toy.model, rows, pixels, tokenizer=toy.tokenizer, **options)
    assert len(together.sequences) == 6
    for i, row in enumerate(rows):
        images = pixels if -200 in row else None
        alone = generate(toy.model, [row], images, tokenizer=toy.tokenizer, **options)
        mine, width = slice(2 * i, 2 * i + 2), alone.sequences.shape[1]
        assert torch.equal(together.sequences[mine, :width], alone.sequences)
        assert (together.sequences[mine, width:] == toy.model.config.pad_token_id).all()
        assert_same_in_float64(together.sequences_scores[mine], alone.sequences_scores)
        assert (together.text[mine], together.finish_reason[mine]) == (
            alone.text,
            alone.finish_reason,
        )
    assert together.image_spans == [[(2, 18)], [(2, 18)], [], [], [], []]
    assert set(together.finish_reason) == {"stop", "length"} or early is True


def test_scores_are_the_sums_of_what_was_recorded_along_each_answer(toy):
    """What is recorded follows the beams: a step's row belongs to whichever answer came from it."""
    found = generate(
        toy.model, [[1, 30, 41], [1, 9]], num_beams=4, num_return_sequences=3, max_new_tokens=6, length_penalty=0.7,
        repetition_penalty=1.2, record=("scores", "logits", "hidden_states", "attentions"),
    )  # fmt: skip
    rows = torch.arange(6)
    scores = torch.stack(
        [step[rows, ids] for step, ids in zip(found.scores, found.sequences.T, strict=True)]
    )
    assert_same_in_float64(scores.sum(0) / 6**0.7, found.sequences_scores)
    # the penalty stands between them
    assert not torch.equal(found.scores[3], found.logits[3].log_softmax(-1))
    for step, (states, weights) in enumerate(
        zip(found.hidden_states, found.attentions, strict=True)
    ):
        assert_same_in_float64(toy.model.language_model.head(states[-1])[:, -1], found.logits[step])
        assert {tuple(w.shape[2:]) for w in weights} == {(3, 3) if step == 0 else (1, 3 + step)}
    whole = toy.model([[1, 30, 41, *found.sequences[1].tolist()]]).logits[0, 2:-1]
    assert_same_in_float64(torch.stack([step[1] for step in found.logits]), whole)


def test_an_end_in_the_first_step_is_an_answer_like_others(toy, ends):
    """All beams begin as one: the end of the first token must not finish them all."""
    first = int(generate(toy.model, [[1, 30, 41]], max_new_tokens=1).sequences)
    ends(first)
    found = generate(
        toy.model,
        [[1, 30, 41]],
        num_beams=3,
        num_return_sequences=3,
        max_new_tokens=5,
        length_penalty=-9.0,
    )
    assert found.sequences[0].tolist() == [first] + [toy.model.config.pad_token_id] * (
        found.sequences.shape[1] - 1
    )
    assert len({tuple(row) for row in found.sequences.tolist()}) == 3


def forward_passes(toy, **options) -> int:
    calls = []
    hook = toy.model.language_model.register_forward_hook(lambda *_: calls.append(1))
    try:
        generate(toy.model, [[1, 30, 41]], num_beams=2, **options)
    finally:
        hook.remove()
    return len(calls)


def test_it_stops_when_nothing_more_can_change(toy, ends):
    """Every second id ends an answer, so two have soon; the modes differ in how long they hope for
    better."""
    ends(*range(0, toy.model.config.text.vocab_size, 2))
    passes = {
        early: forward_passes(toy, max_new_tokens=40, early_stopping=early)
        for early in (True, False, "never")
    }
    assert passes[True] <= passes[False] <= passes["never"] <= 40
    assert passes[True] < 10 < passes["never"]


def test_a_budget_of_one_token(toy):
    """The answers are there after prefill, without a pass more."""
    assert forward_passes(toy, max_new_tokens=1) == 1
    found = generate(
        toy.model,
        [[1, 30, 41]],
        num_beams=4,
        num_return_sequences=4,
        max_new_tokens=1,
        record="logits",
    )
    assert found.sequences[:, 0].tolist() == found.logits[0][0].topk(4).indices.tolist()


def test_pictures_and_prompt_are_read_once(toy):
    """Repeated for each beam before prefill, they are computed as often as there are beams."""
    seen = []
    tower = toy.model.vision_tower.register_forward_hook(
        lambda _, given, out: seen.append(len(out))
    )
    language = toy.model.language_model.register_forward_hook(
        lambda _, given, out: seen.append(len(given[0]))
    )
    try:
        generate(
            toy.model,
            [[1, -200], [1, -200]],
            torch.randn(2, 3, 56, 56),
            num_beams=3,
            max_new_tokens=3,
        )
    finally:
        tower.remove()
        language.remove()
    assert seen == [2, 2, 6, 6]


def test_a_seed_reproduces_beam_samples(toy):
    """Beams draw several tokens at once, from the answer's own generator like all."""

    def sample(seed):
        torch.rand(1)  # somebody else uses the global generator
        return generate(
            toy.model, [[1, 30, 41]], num_beams=3, temperature=1.5, seed=seed, max_new_tokens=8
        ).sequences

    assert torch.equal(sample(1), sample(1))
    assert len({tuple(sample(seed)[0].tolist()) for seed in range(4)}) > 1


def test_stop_texts_are_cut_from_finished_answers(toy):
    """Beams go on beyond a stop text, which is found in the whole answer."""
    options = {"num_beams": 3, "max_new_tokens": 10, "tokenizer": toy.tokenizer}
    whole = generate(toy.model, [[1, 30, 41]], **options)
    stop = whole.text[0][3:5]
    cut = generate(toy.model, [[1, 30, 41]], stop=stop, **options)
    assert cut.text[0] == whole.text[0][: whole.text[0].index(stop)]
    assert cut.finish_reason == ["stop"]
    assert torch.equal(cut.sequences, whole.sequences)
    with pytest.raises(ValueError, match="need a tokenizer"):
        generate(toy.model, [[1, 2]], num_beams=2, stop=["x"])


def test_ask_and_stream_give_the_best_beam(toy):
    """No token is final before the search ends: streamed as they come, they would be of several
    answers."""
    options = {"num_beams": 3, "max_new_tokens": 6}
    ids = toy.tokenizer.encode(toy.prompt("What?", images=0))
    (expected,) = generate(toy.model, [ids], tokenizer=toy.tokenizer, **options).text
    assert toy.ask(None, "What?", **options) == expected
    assert list(toy.stream(None, "What?", **options)) == [expected]


def test_what_does_not_go_with_beams_is_refused(toy):
    """The loop knows no beams, and contrast's second rows do not follow them."""
    with pytest.raises(ValueError, match=r"num_beams is 3: beams go through generate\(\)"):
        next(steps(toy.model, toy.model.splice([[1, 2]]), Options(num_beams=3)))
    with pytest.raises(ValueError, match="without contrast"):
        generate(
            toy.model, [[1, 2]], second=([[1, 3]], None), contrast=lambda a, b, _: a, num_beams=3
        )
    with pytest.raises(ValueError, match=r"cannot record \['beams'\]"):
        generate(toy.model, [[1, 2]], num_beams=3, record="beams")
    with pytest.raises(ValueError, match="context holds"):
        generate(toy.model, [[1] * toy.model.config.text.max_position_embeddings], num_beams=2)
