"""fast/row_by_row.py: an answer has the same bits whoever shares its passes, and otherwise is the
plain one but for rounding."""

import json

import pytest
import torch
from bounds import assert_same_in_float64
from paths import REFERENCE, ROOT

import minillava
from minillava.cache import KVCache
from minillava.chat.conversation import Conversation
from minillava.cli.doors import enter
from minillava.fast import processor, row_by_row
from minillava.fast.passes import pass_cost
from minillava.fast.row_by_row import RowByRow, keep_bits, padding, reusable, rows_together
from minillava.files.pictures import open_image
from minillava.generate.contrast import VCD
from minillava.generate.generation import generate
from minillava.generate.lookup import Lookup
from minillava.generate.speculate import Drafts, Pace
from minillava.loop import Options, steps

pytestmark = pytest.mark.numeric

WEIGHTS = ROOT / "weights" / "shapes"
QUESTIONS = ("Describe.", "How many shapes are there, and what is red?", "What is at the top left?")
PRECISIONS = [("float32", None), ("bfloat16", None), ("bfloat16", "int8"), ("float32", "int4")]
LONG = Options(max_new_tokens=9, min_new_tokens=9)


@pytest.fixture(scope="module", params=PRECISIONS, ids=lambda p: "-".join(filter(None, p)))
def exact(request):
    """The bundled model, in pieces of a few positions, so that its short prompts have several."""
    dtype, kind = request.param
    assistant = minillava.load(WEIGHTS, device="cpu", dtype=dtype, quantize=kind)
    keep_bits(assistant.model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_by_row, "PIECE", 48)
        yield assistant


@pytest.fixture(scope="module")
def prompts(exact):
    """ids and patches, of three prompts of different lengths."""
    ids = [exact.tokenizer.encode(exact.prompt(question)) for question in QUESTIONS]
    assert len(set(map(len, ids))) == 3
    return ids, [exact.encode(WEIGHTS / f"example-{i}.png") for i in (1, 2, 3)]


def logits(assistant, ids, patches, options=LONG, **rest):
    """Of every step, [steps, B, V]."""
    spliced = assistant.model.splice(ids, patches)
    return torch.stack([step.logits for step in steps(assistant.model, spliced, options, **rest)])


def alone(assistant, prompts, i, **rest):
    return logits(assistant, [prompts[0][i]], [prompts[1][i]], **rest)


def test_a_row_of_a_batch_has_the_bits_it_has_alone(exact, prompts):
    """Its neighbours are longer, so that it is padded; and they end at other steps."""
    batch = logits(exact, *prompts)
    for i in range(3):
        assert torch.equal(batch[:, i], alone(exact, prompts, i)[:, 0]), i


def test_rows_that_go_together_have_the_bits_of_rows_that_do_not(exact, prompts):
    """With --same-bits, a last bit would depend on how many rows one product takes."""
    language = exact.model.language_model
    together = logits(exact, *prompts)
    own, language.together = language.together, 1
    try:
        assert torch.equal(logits(exact, *prompts), together)
        language.together = 2
        if own > 1:
            assert torch.equal(logits(exact, *prompts), together)
    finally:
        language.together = own


def test_pictures_that_are_encoded_together_have_the_bits_they_have_alone(exact, prompts):
    """With --same-bits, a picture's features would depend on the pictures encoded along with it."""
    pictures = [WEIGHTS / f"example-{i}.png" for i in (1, 2, 3)]
    pixels = torch.cat([exact.image_processor(open_image(path)) for path in pictures])
    pixels = pixels.to(exact.model.language_model.embed_tokens.weight.dtype)
    assert torch.equal(exact.model.encode_images(pixels), torch.stack(prompts[1]))


def test_drafts_have_the_bits_of_single_steps(exact, prompts):
    """Guesses that are right, and some that are wrong."""
    ids, patches = [prompts[0][0]], [prompts[1][0]]
    plain = logits(exact, ids, patches)
    drafts = Drafts(Lookup(), tokens=3)
    spliced = exact.model.splice(ids, patches)
    drafted = torch.stack([step.logits for step in drafts.steps(exact.model, spliced, LONG)])
    assert torch.equal(drafted, plain)
    assert drafts.report.exact


def test_guesses_that_are_steps_of_their_own_do_not_pay(exact):
    """They were chosen by what a pass over several rows costs, which this model never runs."""
    cost = pass_cost(exact.model.language_model)
    assert [cost(rows) for rows in (1, 2, 5)] == [1, 2, 5]
    assert Pace(None, cost, guess_cost=0.0).choose() == 0


def test_attention_of_the_caller_s_makes_no_draft_of_a_prompt(exact, prompts):
    """Any `attend` was taken for the sign of a draft, whose tokens are steps."""
    language, seen = exact.model.language_model, []

    def attend(q, *rest):
        seen.append(q.shape[2])
        return language.attend(q, *rest)

    ids = torch.tensor([prompts[0][1]]).clamp(min=0)
    outputs = []
    for given in ({"attend": attend}, {}):
        weight = language.embed_tokens.weight
        cache = KVCache(language.config, 1, ids.shape[1] + 1, dtype=weight.dtype, device="cpu")
        with torch.no_grad():
            outputs.append(language(ids, None, cache, **given).logits)
            outputs.append(language(ids[:, :1], None, cache, **given).logits)
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
    assert max(seen) == min(row_by_row.PIECE, ids.shape[1])
    assert min(seen) == 1


def test_a_second_turn_has_the_bits_of_a_fresh_start(exact, prompts):
    """A prefix is reused in whole pieces of a prompt; what was decoded is read again."""
    picture, options = WEIGHTS / "example-1.png", {"max_new_tokens": 6}

    def talk(*questions):
        talk = Conversation(exact)
        talk.add_image(picture)
        for question in questions:
            talk.ask(question, **options)
        return talk

    later = talk(*QUESTIONS)
    assert later.turns[1].reused > 0
    assert all(turn.reused % row_by_row.PIECE == 0 for turn in later.turns)
    fresh = Conversation(exact)
    fresh.turns = [*later.turns[:2]]
    fresh.ask(QUESTIONS[2], **options)
    assert fresh.turns[2].reused == 0
    assert fresh.turns[2].answer == later.turns[2].answer
    end = later.prompt_length
    for ours, theirs in zip(
        (*later.cache.keys, *later.cache.values),
        (*fresh.cache.keys, *fresh.cache.values),
        strict=True,
    ):
        assert torch.equal(ours[:, :, :end], theirs[:, :, :end])


def test_it_is_the_plain_model_computed_in_another_order(monkeypatch):
    """In float64, where orders do not show: logits, and all that is recorded, at its place."""
    monkeypatch.setattr(row_by_row, "PIECE", 8)
    ids = [[1, *range(30, 50)], [1, 30, 31], [1, *range(40, 57)]]
    record = ("hidden_states", "attentions", "logits")

    def answers(model):
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "record": record}
        return generate(model.double(), ids, **options)

    model = minillava.load(REFERENCE / "plain", device="cpu", dtype="float32").model
    expected = answers(model)
    keep_bits(model)
    found = answers(model)
    assert torch.equal(found.sequences, expected.sequences)
    padded = model.splice(ids).padding_mask
    for name in record:
        for one, other in zip(getattr(found, name), getattr(expected, name), strict=True):
            parts = (x if isinstance(x, tuple) else (x,) for x in (one, other))
            for a, b in zip(*parts, strict=True):
                if a.dim() > 2 and a.shape[-2] == padded.shape[1]:
                    # of the prompt: what padding saw means nothing
                    real = padded[:, :, None] if a.dim() == 3 else padded[:, None, :, None]
                    a, b = a.masked_fill(~real, 0), b.masked_fill(~real, 0)
                assert_same_in_float64(a.double(), b.double(), name)


def test_contrast_and_beams_answer_as_before(exact, prompts):
    """A model that keeps the bits would fail on contrast's second rows or on beams."""
    ids, patches = [prompts[0][0]], [prompts[1][0]]
    other = torch.zeros_like(patches[0])
    spliced = exact.model.splice(ids * 2, [patches[0], other])
    made = list(steps(exact.model, spliced, LONG, contrast=VCD()))
    assert torch.equal(made[0].logits, alone(exact, prompts, 0)[0])
    beams = generate(exact.model, ids, patches, max_new_tokens=5, num_beams=3)
    assert beams.sequences.shape[0] == 1


# --- the parts ------------------------------------------------------------------------------------


def test_padding_is_counted_on_the_left_only():
    """A hole in the middle would be counted as padding, and real positions be cut off."""
    assert padding(None, 2) == [0, 0]
    real = torch.tensor([[True, True, True], [False, False, True]])
    assert padding(real, 2) == [0, 2]
    assert padding(torch.tensor([[True, False, True]]), 1) is None


def test_a_prompt_with_holes_is_answered_as_the_plain_model_does(assistant):
    """Padding that came in the middle of the ids: nothing is promised of it, but its answer."""
    model = minillava.load(REFERENCE / "plain", device="cpu", dtype="float32").model
    ids, mask = torch.tensor([[1, 30, 31, 32]]), torch.tensor([[1, 1, 0, 1]])
    plain = model.language_model(ids, mask.bool(), cache_of(model, 4)).logits
    keep_bits(model)
    assert torch.equal(model.language_model(ids, mask.bool(), cache_of(model, 4)).logits, plain)
    assert torch.equal(model([[1, 30, 31, 32]]).logits, model.language_model(ids).logits)


def cache_of(model, capacity):
    return KVCache(model.config.text, 1, capacity, dtype=torch.float32, device="cpu")


def test_rows_go_together_where_the_table_says_so(monkeypatch):
    """Rows would go together where nobody measured that their bits stay, or never, which is
    slow."""

    def together(name="plain", attention="fused", dtype="bfloat16", quantize=None):
        settings = {"attention": attention, "dtype": dtype, "quantize": quantize, "device": "cpu"}
        return rows_together(minillava.load(REFERENCE / name, **settings).model.language_model)

    monkeypatch.setattr(processor, "kind", lambda: "amx")
    monkeypatch.setattr(processor, "SAME_ROWS", {"amx": {"bfloat16": 32, "int8": 16}})
    assert together() == 32
    assert together(quantize="int8") == 16
    assert together(dtype="float32") == 1
    assert together(attention="eager") == 1  # torch's own products
    assert together("tied") == 1  # the head is one, too
    monkeypatch.setattr(processor, "kind", lambda: "arm")
    assert together() == 1


def test_whole_pieces_of_a_prompt_are_reused(monkeypatch):
    """A prefix that ends inside a piece would be reused, and its next piece have other bits."""
    language = RowByRow.__new__(RowByRow)
    monkeypatch.setattr(row_by_row, "PIECE", 256)
    assert reusable(language, 700, 600) == 512
    assert reusable(language, 255, 600) == 0
    assert reusable(object(), 700, 600) == 700


def test_the_flag_gives_the_same_answer_and_not_with_a_compiled_step(run_main):
    """--same-bits would change the answer, take drafts for inexact, or be ignored beside
    --compile."""
    main = lambda argv: enter("generate", argv)  # noqa: E731
    picture = ["-i", str(WEIGHTS / "example-1.png"), "--device", "cpu", "-q"]
    plain = run_main(main, *picture)
    assert plain[0] == 0
    assert run_main(main, *picture, "--same-bits") == plain
    told = [
        json.loads(run_main(main, *picture, "--same-bits", "--json", "--logprobs", "2", *more)[1])
        for more in ([], ["--draft", "lookup", "--draft-tokens", "4"])
    ]
    assert told[0]["tokens"] == told[1]["tokens"]
    assert told[1]["draft"]["exact"] is True
    assert told[1]["draft"]["drafted"] > 0
    status, _, err = run_main(main, *picture, "--same-bits", "--compile")
    assert status == 1
    assert "leave out --compile or --same-bits" in err
