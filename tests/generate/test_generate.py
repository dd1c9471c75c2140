"""The loop: when it stops, what it returns, what it refuses. Which tokens it chooses is in the
parity tests."""

import re
from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from bounds import assert_same_in_float64, assert_within, gamma
from folders import change_config
from models import stored

from minillava.files.tokenizer_files import AddedToken
from minillava.generate.generation import generate
from minillava.loop import Options, steps
from minillava.options import RECORDABLE
from minillava.streaming import Row


@pytest.fixture(scope="module")
def toy(reference):
    return stored(attention="eager")


@pytest.fixture(scope="module")
def pixels(toy):
    return torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))


IDS = [1, 30, -200, 41, 42]


@contextmanager
def ending_with(model, token_id):
    """The model as if `token_id` ended answers and 7 were the padding."""
    original = model.config
    model.config = replace(original, eos_token_ids=(token_id,), pad_token_id=7)
    try:
        yield
    finally:
        model.config = original


def test_shapes_of_what_is_recorded(toy, pixels):
    """As transformers gives them: a step's hidden states are those of its new positions, the
    first step's those of the prompt."""
    result = generate(
        toy.model,
        [IDS],
        pixels[:1],
        max_new_tokens=3,
        record=("scores", "logits", "hidden_states", "attentions"),
    )
    config = toy.model.config
    length, layers, heads = (
        4 + config.tokens_per_image,
        config.text.num_hidden_layers,
        config.text.num_attention_heads,
    )
    assert result.sequences.shape == (1, 3)
    assert result.image_spans == [[(2, 2 + config.tokens_per_image)]]
    assert [tuple(x.shape) for x in result.logits] == [(1, config.text.vocab_size)] * 3
    # greedy: nothing between
    assert all(torch.equal(a, b) for a, b in zip(result.logits, result.scores, strict=True))
    for step, (states, weights) in enumerate(
        zip(result.hidden_states, result.attentions, strict=True)
    ):
        queries, keys = (length, length) if step == 0 else (1, length + step)
        assert [tuple(s.shape) for s in states] == [(1, queries, config.text.hidden_size)] * (
            layers + 1
        )
        assert [tuple(w.shape) for w in weights] == [(1, heads, queries, keys)] * layers
        for w in weights:
            one = torch.ones(1, heads, queries, dtype=torch.float64)
            assert_within(w.sum(-1), (one, gamma(2 * w.shape[-1] + 1, w.dtype) * one))
            assert w.triu(1 + keys - queries).count_nonzero() == 0
    assert torch.equal(toy.model.language_model.head(states[-1])[:, -1], result.logits[-1])


def test_what_was_not_asked_for_is_none(toy, pixels):
    """An empty tuple reads like a recording of nothing."""
    result = generate(toy.model, [IDS], pixels[:1], max_new_tokens=1)
    assert (result.scores, result.logits, result.hidden_states, result.attentions, result.text) == (
        None,
    ) * 5


@pytest.mark.numeric
def test_a_fused_model_records_the_weights_of_eager(reference):
    """The library's call has no weights to give."""
    models = [stored(dtype="float64", attention=a).model for a in ("fused", "eager")]
    first, second = (
        generate(model, [[1, 30, 41]], max_new_tokens=2, record=("attentions",)) for model in models
    )
    for ours, theirs in zip(first.attentions, second.attentions, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert_same_in_float64(a, b)


def test_the_end_token_stops_its_row_and_the_rest_is_padding(toy, pixels):
    """A row that has ended is decoded along with the others, and what it says then is no answer."""
    rows = [IDS, [1, 99, -200, 12]]
    free = generate(toy.model, rows, pixels, max_new_tokens=8).sequences
    # a token that only the first row produces
    end = next(int(t) for t in free[0, 1:] if t not in free[1])
    at = free[0].tolist().index(end)
    with ending_with(toy.model, end):
        result = generate(toy.model, rows, pixels, max_new_tokens=8)
    assert result.sequences[0].tolist() == [*free[0, : at + 1].tolist(), *[7] * (7 - at)]
    assert torch.equal(result.sequences[1], free[1])
    assert result.finish_reason == ["stop", "length"]


def test_no_forward_pass_after_the_last_token(toy, pixels):
    """Its logits would be thrown away, after a whole step."""
    calls = []
    hook = toy.model.language_model.register_forward_hook(lambda *args: calls.append(1))
    try:
        generate(toy.model, [IDS], pixels[:1], max_new_tokens=4)
        assert len(calls) == 4  # one prefill, three decode steps
        first = int(generate(toy.model, [IDS], pixels[:1], max_new_tokens=1).sequences)
        calls.clear()
        with ending_with(toy.model, first):
            generate(toy.model, [IDS], pixels[:1], max_new_tokens=4)
        assert len(calls) == 1
    finally:
        hook.remove()


def test_the_head_sees_one_position_at_prefill(toy, pixels):
    """Logits of the whole prompt are positions times vocabulary: 80 MB for one picture."""
    seen = []
    hook = toy.model.language_model.lm_head.register_forward_hook(
        lambda *args: seen.append(args[1][0].shape[1])
    )
    try:
        generate(toy.model, [IDS], pixels[:1], max_new_tokens=2)
    finally:
        hook.remove()
    assert seen == [1, 1]


def test_interleaved_loops_do_not_disturb_each_other(toy, pixels):
    """A cache or a generator that is kept on the model would be shared."""
    prompts = [
        toy.model.splice([row], pixels[i : i + 1]) for i, row in enumerate((IDS, [1, 99, -200, 12]))
    ]
    options = Options(max_new_tokens=6, temperature=1.0, seed=5)
    alone = [[int(s.token_ids) for s in steps(toy.model, p, options)] for p in prompts]
    loops = [steps(toy.model, p, options) for p in prompts]
    mixed = [(int(a.token_ids), int(b.token_ids)) for a, b in zip(*loops, strict=True)]
    assert [list(x) for x in zip(*mixed, strict=True)] == alone


def test_a_seed_reproduces_a_sample_whatever_else_draws(toy, pixels):
    """Drawn from torch's global generator, it would depend on the process."""

    def sample(seed):
        torch.rand(1)  # somebody else uses the global generator
        return generate(toy.model, [IDS], pixels[:1], max_new_tokens=12, temperature=1.5, seed=seed)

    first = sample(3)
    assert torch.equal(first.sequences, sample(3).sequences)
    assert not torch.equal(first.sequences, sample(4).sequences)
    unseeded = sample(None)
    assert torch.equal(unseeded.sequences, sample(unseeded.seed).sequences)


def test_end_tokens_are_barred_until_enough_is_said(toy, pixels):
    """All of them: a model may have several."""
    free = generate(toy.model, [IDS], pixels[:1], max_new_tokens=6).sequences[0].tolist()
    with ending_with(toy.model, free[1]):
        assert (
            generate(toy.model, [IDS], pixels[:1], max_new_tokens=6).sequences[0].tolist()
            == free[:2]
        )
        longer = generate(
            toy.model, [IDS], pixels[:1], max_new_tokens=6, min_new_tokens=3, record="scores"
        )
    assert longer.sequences.shape[1] >= 3
    assert free[1] not in longer.sequences[0, :3]
    assert [bool(s[0, free[1]].isinf()) for s in longer.scores[:4]] == [True, True, True, False][
        : len(longer.scores)
    ]


def test_a_stop_text_ends_an_answer_however_much_should_be_said(toy, pixels):
    """Only ends of the vocabulary are barred, as in transformers."""
    whole = generate(toy.model, [IDS], pixels[:1], max_new_tokens=12, tokenizer=toy.tokenizer)
    options = {"tokenizer": toy.tokenizer, "stop": whole.text[0][3:6]}
    result = generate(toy.model, [IDS], pixels[:1], max_new_tokens=12, min_new_tokens=12, **options)
    assert result.finish_reason == ["stop"]


def test_what_must_not_repeat_counts_the_pictures_patches_and_no_padding(toy, pixels):
    """A patch is the image id, which every patch but the last is followed by."""
    image_id = toy.model.config.image_token_id

    def barred(row, size):
        pictures = pixels[: row.count(-200)]
        found = [
            generate(
                toy.model,
                rows,
                pictures,
                max_new_tokens=1,
                no_repeat_ngram_size=size,
                record="scores",
            )
            for rows in ([row], [[1, *[9] * 40], row])
        ]
        alone, padded = (x.scores[0][-1].isinf().nonzero().flatten().tolist() for x in found)
        assert alone == padded
        return alone

    assert barred(IDS, 1) == sorted({*(i for i in IDS if i >= 0), image_id})
    assert barred([1, 30, -200], 2) == [image_id]
    assert barred([1, 30, -200, 41, -200], 2) == sorted([image_id, 41])
    assert barred([1, 30], 2) == []


@pytest.mark.numeric
def test_several_samples_stand_in_adjacent_rows(reference, pixels):
    """Repeated as a whole instead, the batch would give each prompt another's samples."""
    toy = stored(dtype="float64", attention="eager")
    rows = [[1, 99, -200, 12], IDS]
    options = {"temperature": 1.2, "seed": 4, "max_new_tokens": 6, "tokenizer": toy.tokenizer}
    found = generate(toy.model, rows, pixels, num_return_sequences=3, record="logits", **options)
    assert (
        len(found.sequences),
        len(found.text),
        len(found.finish_reason),
        len(found.image_spans),
    ) == (6, 6, 6, 6)
    assert len(set(found.text)) > 2
    for prompt in (found.logits[0][:3], found.logits[0][3:]):
        assert_same_in_float64(prompt, prompt[:1].expand(3, -1))
    repeated = generate(
        toy.model, [rows[0]] * 3 + [rows[1]] * 3, pixels.repeat_interleave(3, 0), **options
    )
    assert torch.equal(found.sequences, repeated.sequences)


def test_a_stop_text_ends_the_answer_and_is_cut(toy, pixels):
    """Its beginning may come a token before its end, and must not be shown."""
    whole = generate(toy.model, [IDS], pixels[:1], max_new_tokens=12, tokenizer=toy.tokenizer)
    stop = whole.text[0][3:6]
    result = generate(
        toy.model,
        [IDS],
        pixels[:1],
        max_new_tokens=12,
        tokenizer=toy.tokenizer,
        stop=[stop, "never"],
    )
    assert result.text[0] == whole.text[0][: whole.text[0].index(stop)]
    assert result.finish_reason == ["stop"]
    assert torch.equal(result.sequences, whole.sequences[:, : result.sequences.shape[1]])


class Letters:
    """A tokenizer of single letters, to see what Row holds back."""

    by_id: ClassVar[dict] = {
        1: AddedToken("<box>", 1, special=True),
        2: AddedToken("<loc>", 2),
    }

    class sentencepiece:
        vocab_size, is_control, is_unknown, is_byte = (
            lambda: 128,
            lambda i: i == 0,
            lambda i: False,
            lambda i: False,
        )
        id_to_piece = staticmethod(chr)


def feed(text, stop, end=None):
    row = Row((0,), Letters, stop)
    return [
        row.feed(ord(c), last=i == len(text) - 1) for i, c in enumerate(text)
    ], row.finish_reason


def test_text_that_may_become_a_stop_text_is_held_back():
    """What was printed cannot be taken back; what turned out to be none must be printed after
    all."""
    assert feed("a##b", ["###"]) == (["a", "", "", "##b"], "length")
    assert feed("a###", ["###"]) == (["a", "", "", ""], "stop")
    assert feed("aab", ["ab", "b!"]) == (["", "a", ""], "stop")
    assert feed("xab\0", ["abc"]) == (["x", "", "", "ab"], "stop")  # the end token comes first
    assert feed("ab", ["abc"]) == (["", "ab"], "length")


def test_a_stop_text_may_hold_a_token_that_is_not_shown():
    """What ends a turn of ChatML is such a token (`<|im_end|>`): it is in no text, so a search in
    the shown text never found it."""
    assert feed("a\1b", ["<box>"]) == (["a", "", ""], "stop")
    assert feed("a\1b", ["a<box>b"]) == (["", "", ""], "stop")
    assert feed("ab\1c", ["b<b"]) == (["a", "", "", ""], "stop")
    assert feed("a\1cd", ["a<box>b"]) == (["", "", "ac", "d"], "length")  # held, but not shown
    assert feed("a\1b", ["box "]) == (["a", "", "b"], "length")
    assert feed("a\2b", ["<loc>"]) == (["a", "", ""], "stop")  # a token that is shown


def test_a_stop_text_of_megabytes_costs_no_more_than_what_is_held():
    """Compared whole, or copied, at every token, it would cost more than the model."""

    class Counting(str):
        def startswith(self, end):
            looked.append(len(end))
            return super().startswith(end)

        def __getitem__(self, at):
            raise AssertionError("no part of a stop text is copied")

    looked, stop = [], Counting("y" * 50_000_000)
    assert feed("yyxy", [stop]) == (["", "", "yyx", "y"], "length")
    assert sum(looked) < 20


def test_a_prompt_that_fills_the_context_is_refused_with_its_numbers(toy, pixels):
    """Past the context the rotary angles are ones that the model never saw, and it answers all
    the same."""
    context = toy.model.config.text.context
    with pytest.raises(
        ValueError, match=rf"prompt takes {context} positions \(1 picture.*context holds {context}"
    ):
        generate(toy.model, [[1] * (context - 16) + [-200]], pixels[:1])


def test_an_answer_ends_where_the_context_does(folder):
    """Positions that no cache and no rotary table was made for."""
    change_config(folder, text_config={"max_position_embeddings": 64})
    model = stored(folder).model
    context = model.config.text.context
    result = generate(model, [[1] * (context - 3)], max_new_tokens=50)
    assert context == 64
    assert (result.sequences.shape[1], result.finish_reason) == (3, ["length"])


def test_numbers_that_are_not_finite_are_refused(reference, pixels):
    """The largest of NaN is id 0, and an answer of it looks like an empty one."""
    broken = stored()
    broken.model.language_model.norm.weight.data[3] = float("nan")
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"not finite.*--dtype float32"):
            generate(broken.model, [IDS], pixels[:1], temperature=temperature)


def test_unknown_records_and_stop_without_tokenizer(toy):
    """A misspelt record would be None, as what was not asked for."""
    with pytest.raises(
        ValueError, match=r"cannot record \['attention'\], expected some of: scores"
    ):
        generate(toy.model, [[1, 2]], record=("attention",))
    with pytest.raises(ValueError, match="need a tokenizer"):
        generate(toy.model, [[1, 2]], stop=["x"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected a whole number of at least 1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5, expected a whole number"),
        ({"temperature": -1}, "temperature is -1, expected a number from 0"),
        ({"temperature": 1e-9}, "temperature is 1e-09, expected 0 .greedy. or at least"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": 1, "top_p": 1.5}, "top_p is 1.5, expected a number from 0 to 1"),
        ({"temperature": 1, "top_p": 0}, "top_p is 0, expected a number above 0"),
        ({"temperature": 1, "top_k": -2}, "top_k is -2"),
        ({"temperature": 1, "min_p": 2}, "min_p is 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0, expected a number from 0.01 to 100"),
        ({"stop": [5]}, "one of stop is 5, expected a text"),
        ({"stop": b"x"}, "one of stop is 120, expected a text"),
        ({"stop": 5}, "stop is 5, expected a text or a list of texts"),
        ({"stop": 0}, "stop is 0, expected a text or a list of texts"),
        # it was read to its end by the check, and then stopped nothing
        ({"stop": (s for s in "ab")}, "stop is <generator .*, expected a text or a list of texts"),
        ({"max_new_tokens": None}, "max_new_tokens is None, expected a whole number of at least 1"),
        ({"min_new_tokens": None}, "min_new_tokens is None, expected a whole number of at least 0"),
        ({"temperature": None}, "temperature is None, expected a number from 0"),
        ({"num_beams": None}, "num_beams is None, expected a whole number of at least 1"),
        ({"num_return_sequences": None}, "num_return_sequences is None, expected a whole number"),
        ({"length_penalty": None}, "length_penalty is None, expected a number from -10"),
        ({"seed": (1, None)}, "seed is None, expected a whole number"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"top_k": 5}, "set a temperature above 0"),
        ({"top_p": 0.5}, "set a temperature above 0"),
        ({"min_p": 0.5}, "set a temperature above 0"),
        ({"typical_p": 0.5}, "set a temperature above 0"),
        ({"temperature": 1, "typical_p": 0}, "typical_p is 0, expected a number above 0"),
        ({"num_return_sequences": 2}, "set a temperature above 0"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1"),
        ({"min_new_tokens": 1.5}, "min_new_tokens is 1.5, expected a whole number"),
        ({"num_beams": 0}, "num_beams is 0, expected a whole number of at least 1"),
        (
            {"num_beams": 2, "num_return_sequences": 3},
            "num_return_sequences is 3, but num_beams is 2",
        ),
        (
            {"num_beams": 2, "early_stopping": "maybe"},
            "early_stopping is 'maybe', expected False, True or \"never\"",
        ),
        ({"num_beams": 2, "early_stopping": 1}, "early_stopping is 1, expected"),
        (
            {"num_beams": 2, "length_penalty": float("inf")},
            "length_penalty is inf, expected a number from -10 to 10",
        ),
        ({"length_penalty": 2.0}, "about beams: set num_beams above 1"),
        ({"early_stopping": True}, "about beams: set num_beams above 1"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    """top_p of 90 keeps everything, and a temperature below zero prefers the worst."""
    with pytest.raises(ValueError, match=message):
        Options(**options)


def test_one_stop_text_need_not_be_a_list_and_empty_ones_match_nothing():
    """A str is a sequence of its letters, and the empty text is in every text."""
    assert Options(stop="###").stop == ("###",)
    assert Options(stop=["", "a"]).stop == ("a",)
    assert Options(stop=None).stop == ()


def test_a_half_character_at_the_end_is_the_same_text_however_it_ended(toy):
    """Both ends of an answer flush what the decoder holds, as decoding the ids at once does."""
    half = toy.tokenizer.encode("😀")[1:-1]
    texts = []
    for ids, last in ((half, True), ([*half, toy.tokenizer.eos_id], False)):
        row = Row((toy.tokenizer.eos_id,), toy.tokenizer, ())
        texts.append(
            "".join(row.feed(i, last=last and n == len(ids) - 1) for n, i in enumerate(ids))
        )
    assert texts[0] == texts[1] == toy.tokenizer.decode(half)


def test_the_penalty_reaches_pictures_only_where_they_have_an_id(toy, pixels):
    """In transformers a picture is an id of the prompt; in the original dialect it has none, and
    none is penalised."""
    model, image_id = toy.model, toy.model.config.image_token_id

    def scores(**change):
        original = model.config
        model.config = replace(original, **change)
        try:
            taken = generate(
                model,
                [IDS],
                pixels[:1],
                max_new_tokens=1,
                repetition_penalty=2.0,
                record=RECORDABLE[:2],
            )
        finally:
            model.config = original
        return taken.logits[0][0], taken.scores[0][0]

    logits, penalised = scores()
    assert penalised[image_id] == (
        logits[image_id] * 2 if logits[image_id] < 0 else logits[image_id] / 2
    )
    logits, penalised = scores(image_token_id=model.config.text.vocab_size)
    assert (logits != penalised).nonzero().flatten().tolist() == sorted(
        i for i in set(IDS) if i >= 0
    )


def test_second_pictures_follow_the_first_to_their_device(toy, pixels, monkeypatch):
    """Those that contrast makes lie on the CPU; beside pictures on a GPU they were a
    RuntimeError."""
    seen = []
    monkeypatch.setattr(
        toy.model, "splice", lambda ids, images: seen.append(images) or toy.model.no_such_step
    )
    with pytest.raises(AttributeError, match="no_such_step"):
        generate(
            toy.model,
            [IDS],
            pixels[:1].to("meta"),
            second=([IDS], pixels[:1]),
            contrast=lambda a, b, step: a,
        )
    assert (seen[0].device.type, len(seen[0])) == ("meta", 2)


def test_no_token_left_is_an_error(toy, pixels):
    """A cut that leaves one token and a bar on all tokens said before: nothing to choose, not id
    0."""
    only = lambda logits, other, step: torch.full_like(logits, -float("inf")).index_fill(  # noqa: E731
        1, torch.tensor([30]), 0
    )
    with pytest.raises(ValueError, match="no token is left"):
        generate(
            toy.model, [IDS], pixels[:1], second=([IDS], pixels[:1]), contrast=only,
            no_repeat_ngram_size=1, max_new_tokens=2,
        )  # fmt: skip


# --- sampling of one's own ------------------------------------------------------------------------


def only(*allowed):
    """A process that leaves these tokens."""
    return lambda scores, history: torch.full_like(scores, -float("inf")).index_copy(
        1, torch.tensor(allowed), scores[:, list(allowed)]
    )


def test_process_sees_scores_after_penalties_and_before_temperature(toy, pixels):
    """A `process` would see other scores or ids than promised, or change the loop's by working in
    place."""
    seen = []

    def watch(scores, history):
        seen.append((scores.clone(), history.clone()))
        scores.zero_(), history.zero_()  # it may work in place: nobody else reads its copies
        return seen[-1][0]

    options = {
        "max_new_tokens": 3,
        "temperature": 0.5,
        "repetition_penalty": 1.5,
        "seed": 1,
        "record": "scores",
    }
    plain = generate(toy.model, [IDS, IDS[:1]], pixels[:1], **options)
    watched = generate(toy.model, [IDS, IDS[:1]], pixels[:1], process=watch, **options)
    assert watched.sequences.tolist() == plain.sequences.tolist()
    assert all(
        torch.equal(scores / 0.5, after)
        for (scores, _), after in zip(seen, plain.scores, strict=True)
    )
    image, patches = toy.model.config.image_token_id, toy.model.config.tokens_per_image
    assert seen[2][1].tolist() == [
        [1, 30, *[image] * patches, 41, 42, *plain.sequences[0, :2].tolist()],
        [*[-1] * (patches + 3), 1, *plain.sequences[1, :2].tolist()],
    ]


def test_process_decides_with_filters_beams_and_contrast(toy, pixels):
    """Beside filters, beams or contrast, a `process` would be left out and barred tokens be
    said."""
    for options in (
        {},
        {"temperature": 1.0, "top_k": 1, "seed": 3},
        {"num_beams": 3},
        {"second": ([IDS], pixels[1:]), "contrast": lambda logits, other, step: 2 * logits - other},
    ):
        found = generate(
            toy.model, [IDS], pixels[:1], max_new_tokens=4, process=only(50, 60), **options
        )
        assert set(found.sequences.flatten().tolist()) <= {50, 60}


@pytest.mark.parametrize(
    ("process", "message"),
    [
        (
            lambda scores, history: None,
            r"process returned NoneType, expected a tensor \[1, \d+\] float32",
        ),
        (
            lambda scores, history: scores[0],
            r"process returned a tensor \[\d+\] float32 on cpu, expected \[1, \d+\]",
        ),
        (lambda scores, history: scores.double(), "float64 on cpu, expected .* float32 on cpu"),
        (lambda scores, history: scores.abs() / 0, r"process returned NaN or \+inf"),
        (lambda scores, history: scores * float("nan"), r"process returned NaN or \+inf"),
        (lambda scores, history: scores - float("inf"), "no token is left to choose: .*process"),
    ],
)
def test_what_process_may_not_return(toy, pixels, process, message):
    """A `process` that forgets to return, or returns NaN, would be a traceback or an answer of id
    0."""
    for options in ({}, {"num_beams": 2}):
        with pytest.raises(
            ValueError, match=message.replace("[1,", "[[12],") if options else message
        ) as caught:
            generate(toy.model, [IDS], pixels[:1], max_new_tokens=2, process=process, **options)
        assert "\n" not in str(caught.value)


# --- lengths and options are known before anything is computed ------------------------------------


def test_a_prompt_too_long_is_refused_before_anything_is_computed(toy, pixels, monkeypatch):
    """It took gigabytes to look up megabytes of ids, and seconds to encode pictures, before the
    refusal."""

    def computed(*args):
        raise AssertionError("this was computed")

    monkeypatch.setattr(type(toy.model), "encode_images", computed)
    monkeypatch.setattr(type(toy.model.language_model.embed_tokens), "forward", computed)
    context, each = toy.model.config.text.context, toy.model.config.tokens_per_image
    pictures = context // each + 1
    with pytest.raises(
        ValueError,
        match=rf"{1 + pictures * each} positions \({pictures} picture\(s\) of {each} each\)",
    ):
        generate(toy.model, [[1], [1, *[-200] * pictures]], torch.zeros(pictures, 3, 56, 56))
    for ids in ([[1] * context], torch.ones(1, context, dtype=torch.long), [1] * context):
        with pytest.raises(
            ValueError,
            match=f"the prompt takes {context} positions .* holds {context} with the answer",
        ):
            generate(toy.model, ids)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("max_tokens", "'max_tokens': did you mean max_new_tokens?"),
        ("temprature", "did you mean temperature?"),
        ("topk", "did you mean top_k?"),
        ("do_sample", "set temperature above 0 to sample"),
        ("max_length", "max_new_tokens counts the answer's tokens alone"),
        ("xyz", "expected some of: max_new_tokens, min_new_tokens, temperature"),
    ],
)
def test_an_unknown_option_names_the_nearest(toy, name, message):
    """A misspelt option would be ignored, or be refused without the name that was meant."""
    with pytest.raises(TypeError, match=re.escape(message)):
        generate(toy.model, [[1]], **{name: 1})
