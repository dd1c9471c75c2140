"""Drafts save passes and change nothing: every answer is the plain loop's, whatever is guessed."""

import json
import shutil
from functools import partial
from itertools import cycle, product

import pytest
import torch
from bounds import assert_same_in_float64
from models import tiny
from paths import REFERENCE
from safetensors.torch import load_file, save_file

from minillava.assistant import load
from minillava.attention import fused
from minillava.cache import KVCache
from minillava.chat.conversation import Conversation
from minillava.checkpoint.build import build_model
from minillava.checkpoint.config_json import read_config
from minillava.checkpoint.draft import open_language_model
from minillava.checkpoint.stored import StoredWeights
from minillava.fast import processor
from minillava.fast.compiled import Captured
from minillava.fast.passes import COSTS, interpolate, pass_cost
from minillava.generate.contrast import M3ID, VCD
from minillava.generate.draft_model import DraftModel
from minillava.generate.generation import generate
from minillava.generate.lookup import Lookup, look_up
from minillava.generate.speculate import (
    CREDIT,
    LOSS,
    MOST,
    Drafts,
    Pace,
    best_length,
    fork,
    keeps_bits,
)
from minillava.generate.tree import chain
from minillava.loop import Options, steps
from minillava.options import RECORDABLE
from minillava.sampling import Sampler

IDS = [1, 30, -200, 41, 42]


class Scripted:
    """A drafter that knows the answer, and spoils what it is told to."""

    kind, cost = "scripted", 0.0

    def __init__(self, answer, spoil=lambda at, token: token, always=None, more=0):
        self.answer, self.spoil, self.always, self.more = answer, spoil, always, more

    def begin(self, prompt, sampler, pictures):
        return ScriptedDraft(self)


class ScriptedDraft:
    def __init__(self, script):
        self.script, self.at = script, 0

    def propose(self, count):
        assert count > 0
        if self.script.always is not None:
            return [self.script.always] * count
        count += self.script.more
        known = self.script.answer[self.at : self.at + count]
        return [self.script.spoil(self.at + i, token) for i, token in enumerate(known)]

    def accept(self, ids, hidden):
        assert hidden.dim() == 1
        self.at += len(ids)


def drafters(answer, end):
    """By name: no guesses, all right, a third wrong, all wrong, end tokens, more than asked for."""
    return {
        "nothing": Scripted([]),
        "oracle": Scripted(answer),
        "more than asked for": Scripted(answer, more=100),
        "a third is wrong": Scripted(answer, lambda at, token: token if at % 3 else token + 1),
        "never right": Scripted(answer, lambda at, token: token + 1),
        "at random": Scripted(
            torch.randint(
                5, 50, (len(answer),), generator=torch.Generator().manual_seed(0)
            ).tolist()
        ),
        "always the end": Scripted(answer, always=end),
        "lookup": Lookup(),
    }


# Shared heads and a shared table are other shapes of the same loop: the test of all options meets
# them in the default suite, the other tests in .ci/run.
@pytest.fixture(
    scope="module",
    params=["plain", *(pytest.param(name, marks=pytest.mark.slow) for name in ("grouped", "tied"))],
)
def toy(request):
    return load(REFERENCE / request.param, device="cpu", dtype="float64")


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))


def parts(made):
    return [(s.ids, s.text, s.finish_reason) for s in made]


def compare(assistant, spliced, options, count, **rest):
    """Every drafter against the plain loop; returns the reports by name."""
    given = {"tokenizer": assistant.tokenizer, **rest}
    plain = list(steps(assistant.model, spliced, options, **given))
    ids, reports = [s.ids[0] for s in plain], {}
    end = assistant.model.config.eos_token_ids[0]
    for name, drafter in drafters(ids, end).items():
        drafts = Drafts(drafter, count)
        found = list(drafts.steps(assistant.model, spliced, options, **given))
        assert parts(found) == parts(plain), name
        reports[name] = drafts.report
        assert drafts.report.tokens == len(plain)
        assert drafts.report.passes <= len(plain) - 1
        assert sum(drafts.report.lengths) == drafts.report.passes
    return reports


PROMPTS = [[1, 30, 41], IDS, [1, -200, 41, -200, 9]]  # no picture, one, two
OPTIONS = [
    {},
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2},
    {"min_new_tokens": 5},
    {"max_new_tokens": 1},
    {"max_new_tokens": 2},
    {"max_new_tokens": 7},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 1.4, "seed": 4, "top_k": 9, "top_p": 0.9},
    {"temperature": 0.7, "seed": 5, "typical_p": 0.8, "min_p": 0.01},
]


def check_plain(toy, pixels, ids, options, counts):
    pictures = pixels[: ids.count(-200)].double() if -200 in ids else None
    spliced = toy.model.splice([ids], pictures)
    chosen = Options(**{"max_new_tokens": 20, **options})
    for count in counts:
        compare(toy, spliced, chosen, count)


@pytest.mark.parametrize(("ids", "options"), zip(cycle(PROMPTS), OPTIONS, strict=False))
def test_the_answer_is_the_plain_one(toy, pixels, ids, options):
    """A draft decided what was said: a penalty that did not count the guesses, a sample that drew
    another number, an end that was passed."""
    check_plain(toy, pixels, ids, options, (4,))


@pytest.mark.parametrize("ids", PROMPTS)
def test_the_answer_is_the_plain_one_in_float32(pixels, ids):
    """Rows of a pass round otherwise than single steps; what is said must not hang on that."""
    toy = load(REFERENCE / "plain", device="cpu", dtype="float32")
    spliced = toy.model.splice([ids], pixels[: ids.count(-200)] if -200 in ids else None)
    compare(toy, spliced, Options(max_new_tokens=20), 4)


@pytest.mark.parametrize("name", ["grouped", "tied"])
def test_other_shapes_of_a_model_answer_as_the_plain_loop_does(name, pixels):
    """A draft would read the cache of shared heads, or the head of a shared table, otherwise."""
    toy = load(REFERENCE / name, device="cpu", dtype="float64")
    for ids, options in ((PROMPTS[2], OPTIONS[1]), (PROMPTS[0], OPTIONS[8])):
        check_plain(toy, pixels, ids, options, (1,))


@pytest.mark.slow
@pytest.mark.parametrize(("ids", "options"), zip(cycle(PROMPTS), OPTIONS, strict=False))
def test_the_answer_is_the_plain_one_also_with_one_guess(toy, pixels, ids, options):
    """A block of two is the shortest: an index would be right only for longer ones."""
    check_plain(toy, pixels, ids, options, (1,))


def test_who_knows_the_answer_needs_the_fewest_passes(toy, pixels):
    """Right guesses would be read again one by one: drafts would cost time and save none."""
    spliced = toy.model.splice([IDS], pixels[:1].double())
    options = Options(max_new_tokens=22, no_repeat_ngram_size=1, min_new_tokens=22)
    for count in (1, 3, 6):
        reports = compare(toy, spliced, options, count)
        assert reports["oracle"].passes == -(-21 // (count + 1))
        assert reports["oracle"].accepted == 21 - reports["oracle"].passes
        assert reports["never right"].passes == reports["nothing"].passes == 21
        assert reports["never right"].lengths == [21]


@pytest.mark.parametrize("method", [VCD(), M3ID(rate=0.3)])
def test_both_streams_of_contrast_read_the_draft(toy, pixels, method):
    """M3ID weighs by the number of the step, which is the token's and not the block's; its second
    row is shorter, which is padding in the cache."""
    rows = [IDS, [i for i in IDS if i != -200]] if isinstance(method, M3ID) else [IDS, IDS]
    pictures = pixels[: 1 if isinstance(method, M3ID) else 2].double()
    spliced = toy.model.splice(rows, pictures)
    for options in ({}, {"temperature": 1.0, "seed": 7}):
        compare(toy, spliced, Options(max_new_tokens=16, **options), 3, contrast=method)


def test_a_stop_text_ends_inside_a_block(toy, pixels):
    """Ids that follow a stop text in the same block were kept."""
    spliced = toy.model.splice([IDS], pixels[:1].double())
    options = Options(max_new_tokens=20)
    whole = [s.text[0] for s in steps(toy.model, spliced, options, tokenizer=toy.tokenizer)]
    text = "".join(whole)
    for size, at in product((1, 4, 9), (2, 7)):
        stop = text[at : at + size]
        for count in (2, 5):
            compare(toy, spliced, Options(max_new_tokens=20, stop=stop), count)


def test_somebodys_own_process_sees_every_token_once(toy, pixels):
    """It was called for guesses that did not count."""
    spliced, lengths = toy.model.splice([IDS], pixels[:1].double()), []

    def process(scores, history):
        lengths.append(history.shape[1])
        return scores - scores.roll(1, -1) / 3

    options = Options(max_new_tokens=12)
    plain = parts(steps(toy.model, spliced, options, process=process))
    expected, lengths[:] = list(lengths), []
    answer = [ids[0] for ids, _, _ in plain]
    found = Drafts(Scripted(answer, lambda at, token: token + (at == 5)), 4).steps(
        toy.model, spliced, options, process=process
    )
    assert parts(found) == plain
    assert lengths == expected


@pytest.mark.parametrize("contrast", [None, VCD()])
def test_what_is_recorded_is_what_single_steps_record(toy, pixels, contrast):
    """The hidden states of a block stood in one tensor, and its attentions had too many keys."""
    rows = 1 if contrast is None else 2
    spliced = toy.model.splice([IDS] * rows, pixels[:rows].double())
    options, given = Options(max_new_tokens=10), {"record": RECORDABLE, "contrast": contrast}
    plain = list(steps(toy.model, spliced, options, **given))
    answer = [s.ids[0] for s in plain]
    found = Drafts(Scripted(answer, lambda at, token: token + (at == 6)), 3).steps(
        toy.model, spliced, options, **given
    )
    for mine, other in zip(found, plain, strict=True):
        assert mine.ids == other.ids
        for name in ("logits", "scores", "other_logits"):
            a, b = vars(mine)[name], vars(other)[name]
            assert (a is None) == (b is None)
            if a is not None:
                assert_same_in_float64(a, b)
        for name in ("hidden_states", "attentions"):
            for a, b in zip(vars(mine)[name], vars(other)[name], strict=True):
                assert_same_in_float64(a, b)


def test_the_cache_is_as_single_steps_leave_it_whenever_somebody_stops(toy, pixels):
    """A rejected guess stayed in it, or an accepted one was there before its step was shown."""
    spliced = toy.model.splice([IDS], pixels[:1].double())
    length, options = spliced.embeds.shape[1], Options(max_new_tokens=14)

    def cache():
        return KVCache(toy.model.config.text, 1, length + 14, dtype=torch.float64, device="cpu")

    filled, lengths, answer = cache(), [], []
    for step in steps(toy.model, spliced, options, cache=filled):
        lengths.append(filled.length)
        answer.append(step.ids[0])
    fresh = cache()
    with torch.no_grad():  # the same in one pass
        words = toy.model.splice([[*IDS, *answer[:-1]]], pixels[:1].double())
        toy.model.language_model(words.embeds, None, fresh)
    assert fresh.length == filled.length
    for a, b in zip([*fresh.keys, *fresh.values], [*filled.keys, *filled.values], strict=True):
        assert_same_in_float64(a[:, :, : fresh.length], b[:, :, : fresh.length])
    for name, drafter in drafters(answer, toy.model.config.eos_token_ids[0]).items():
        for stopped in (1, 3, 4, 6, len(answer)):
            mine = cache()
            made = Drafts(drafter, 3).steps(toy.model, spliced, options, cache=mine)
            assert [next(made).ids[0] for _ in range(stopped)] == answer[:stopped]
            made.close()
            assert mine.length == lengths[stopped - 1], name
            for a, b in zip(
                [*mine.keys, *mine.values], [*filled.keys, *filled.values], strict=True
            ):
                a, b = a[:, :, : mine.length], b[:, :, : mine.length]
                assert_same_in_float64(a, b)


def test_the_random_numbers_are_those_of_single_steps(toy, pixels, monkeypatch):
    """After so many tokens the generator is where the plain loop leaves it."""
    spliced, states = toy.model.splice([IDS], pixels[:1].double()), []
    real = Sampler.remember

    def remember(self, token_ids, rows=None):
        states.append(self.generators[0].get_state().tolist())
        return real(self, token_ids, rows)

    monkeypatch.setattr(Sampler, "remember", remember)
    options = Options(max_new_tokens=9, temperature=1.0, seed=2)
    answer = [s.ids[0] for s in steps(toy.model, spliced, options)]
    expected, states[:] = list(states), []
    for drafter in drafters(answer, 2).values():
        list(Drafts(drafter, 3).steps(toy.model, spliced, options))
        assert states == expected
        states.clear()


def test_a_fork_draws_what_its_sampler_will_draw(toy):
    """Guesses of another model are right more often with the same random numbers."""
    options = Options(temperature=1.0, seed=8)
    scores = torch.randn(6, 1, 50, generator=torch.Generator().manual_seed(1))
    sampler = Sampler(toy.model.config, toy.model.splice([[1, 5]]).token_ids, options)
    twin = fork(sampler)
    guessed = [int(twin(each)[0]) for each in scores]
    assert [int(sampler(each)[0]) for each in scores] == guessed
    assert len(set(guessed)) > 3


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [("float32", "int8"), ("bfloat16", "int8"), ("float32", "int4"), ("bfloat16", None)],
)
def test_small_weights_give_the_same_bits(dtype, kind):
    """Their products give each row the bits it has alone; one call of attention for all rows did
    not."""
    model = load(REFERENCE.parents[1] / "weights/shapes", dtype=dtype, device="cpu", quantize=kind)
    if kind is None and not keeps_bits(model.model.language_model, 16):
        pytest.skip("this processor's products of several rows in bfloat16 round otherwise")
    picture = REFERENCE / "pictures" / "landscape.png"
    spliced = model.prepare(picture, model.prompt("What is in the picture?"))
    options = Options(max_new_tokens=24, min_new_tokens=24)
    plain = list(steps(model.model, spliced, options))
    answer = [s.ids[0] for s in plain]
    for count in (1, 2, 3, 7, 15):
        found = list(Drafts(Scripted(answer), count).steps(model.model, spliced, options))
        assert len(found) == len(plain)
        for mine, other in zip(found, plain, strict=True):
            assert torch.equal(mine.scores, other.scores), count


def test_what_the_table_does_not_claim_is_not_exact(monkeypatch):
    """Drafts were called exact after one trial whose rows had the bits of single steps by luck."""
    monkeypatch.setattr(processor, "SAME_ROWS", {processor.kind(): {"bfloat16": 4, "int8": 16}})
    folder = REFERENCE.parents[1] / "weights/shapes"
    assert load(folder, dtype="bfloat16", device="cpu").model.language_model.alike == 4
    monkeypatch.setattr(processor, "SAME_ROWS", {})
    language = load(folder, dtype="bfloat16", device="cpu").model.language_model
    assert language.alike == 1
    assert not keeps_bits(language, 2)


def test_a_head_that_is_the_table_of_words_counts_as_well(monkeypatch):
    """It stays in bfloat16 beside layers in int8, and drafts were called exact by theirs alone."""
    monkeypatch.setattr(processor, "SAME_ROWS", {processor.kind(): {"bfloat16": 2, "int8": 16}})
    settings = {"dtype": "bfloat16", "device": "cpu", "quantize": "int8"}
    assert load(REFERENCE / "tied", **settings).model.language_model.alike == 2


def test_what_drafts_are_not_for_is_one_line(toy, pixels):
    """Drafts for a batch or for beams would answer wrongly instead of being refused."""
    spliced = toy.model.splice([IDS, IDS], pixels.double())
    drafts = Drafts(Lookup())
    with pytest.raises(ValueError, match="2 answers at once: drafts are for one"):
        next(drafts.steps(toy.model, spliced, Options()))
    with pytest.raises(ValueError, match="num_beams is 2: drafts are for single answers"):
        next(drafts.steps(toy.model, spliced, Options(num_beams=2)))


def test_nothing_but_words_of_the_model_is_guessed(toy, pixels):
    """A guess of -200, or beyond the table of words, would be an error of the table."""
    spliced = toy.model.splice([IDS], pixels[:1].double())
    plain = parts(steps(toy.model, spliced, Options(max_new_tokens=8)))
    config = toy.model.config
    for bad in (-200, -1, config.image_token_id, config.text.vocab_size, 10**9):
        drafts = Drafts(Scripted([], always=bad), 3)
        assert parts(drafts.steps(toy.model, spliced, Options(max_new_tokens=8))) == plain
        assert drafts.report.drafted == 0


# --- how many tokens are guessed ------------------------------------------------------------------


def flat(rows):
    return 1.0


def by_row(rows):
    return float(rows)


@pytest.mark.parametrize(
    ("rate", "cost", "guess", "expected"),
    [
        (0.0, flat, 0.0, 0),  # an ordinary step
        (0.9, by_row, 0.0, 0),  # every row costs a step
        (0.5, flat, 0.0, MOST),
        (0.5, flat, 0.1, 2),
        (0.9, flat, 0.1, 10),
        (0.9, flat, 2.0, 0),
    ],
)
def test_as_many_guesses_as_pay(rate, cost, guess, expected):
    """By hand, of sum(rate**i) / (cost + guesses · guess): 1, 1.36, 1.46, 1.44 for .5 and .1, and
    3.42, 3.43, 3.42 from 9 to 11 guesses for .9."""
    assert best_length(rate, cost, guess) == expected


def test_the_pace_follows_what_was_right_of_late():
    """The number of guesses would stay as it began, however often they are right, or override a
    fixed one."""
    pace = Pace(None, flat, 0.1)
    assert pace.choose() == 2  # at 0.5
    for _ in range(8):  # one of ten right: a guess is not worth its tenth of a step any more
        assert pace.choose() > 0
        pace.note(chain([5, 6, 7]), 0)
    assert pace.choose() == 0
    for _ in range(40):
        pace.note(chain([5, 6, 7, 8]), 4)
        pace.pay(4, 5)
    assert pace.choose() == MOST
    assert Pace(4, by_row, 9.0).choose() == 4


@pytest.mark.parametrize("stored", COSTS)
@pytest.mark.parametrize("guess_cost", [0.0, 0.1])
def test_a_drafter_that_is_always_wrong_costs_next_to_nothing(stored, guess_cost):
    """In a short answer, what the first wrong guesses cost was a tenth of it."""
    for costs in COSTS[stored].values():
        cost = partial(interpolate, costs)
        pace, taken = Pace(None, cost, guess_cost), 0.0
        for made in range(1, 200):
            count = pace.choose()
            taken += cost(count + 1) / cost(1) + count * guess_cost
            pace.note(chain([5] * count), 0)
            pace.pay(count, 1)
            assert taken <= (1 + LOSS) * made + CREDIT + 1e-9


def test_a_drafter_of_another_model_is_noticed(toy, pixels):
    """Heads whose weights were read in the wrong order accepted nothing, and nothing said so."""
    spliced = toy.model.splice([IDS], pixels[:1].double())
    options = Options(max_new_tokens=24, min_new_tokens=24)
    reports = compare(toy, spliced, options, 4)
    assert "not one was right" in reports["never right"].told()
    assert "not one was right" not in reports["a third is wrong"].told()


def test_where_no_pass_pays_guesses_are_still_watched(toy, pixels):
    """The pace could never learn that they are right."""
    spliced = toy.model.splice([IDS], pixels[:1].double())
    options = Options(max_new_tokens=30, min_new_tokens=30)
    answer = [s.ids[0] for s in steps(toy.model, spliced, options)]

    def cost(rows):  # pays from two guesses in three
        return 1 + 0.68 * (rows - 1)

    drafts = Drafts(Scripted(answer), None, cost)
    assert [s.ids[0] for s in drafts.steps(toy.model, spliced, options)] == answer
    assert drafts.report.lengths[0] > 0
    assert drafts.report.accepted > 0


# --- prompt lookup --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "ends", "expected"),
    [
        ([1, 5, 6, 7, 8, 5, 6], [], [7, 8, 5]),
        ([1, 5, 6, 7, 5, 6, 9, 5, 6], [], [7, 5, 6]),  # the first place, not the latest
        ([1, 5, 6, 7, 8, 9, 6], [], [7, 8, 9]),
        ([1, 2, 3, 4], [], []),
        ([5, 5, 5], [], [5]),
        ([5, 5, 5, 5], [], [5, 5]),
        ([1, 5, 6, 2, 8, 5, 6], [2], []),
        ([1, 5, 6, 7, 2, 5, 6], [2], [7]),
        ([1, 5, -200, 7, 8, 5], [], []),  # up to a picture
        ([], [], []),
        ([3], [], []),
    ],
)
def test_a_lookup_by_hand(ids, ends, expected):
    """A lookup would guess past an end token or a picture, or what came before the wrong match."""
    assert look_up(ids, 3, ends, longest=2) == expected


def test_a_lookup_falls_from_three_to_one():
    """A lookup that began with three ids would find nothing where one is repeated."""
    assert look_up([4, 7, 8, 4, 9, 4], 3, longest=3) == [7, 8, 4]


@pytest.mark.parity
def test_a_lookup_finds_what_transformers_finds():
    """A lookup would miss repetitions that transformers finds, and guess less."""
    candidates = pytest.importorskip("transformers.generation.candidate_generator")
    random = torch.Generator().manual_seed(0)
    found = 0
    for _ in range(300):
        length, count, n = (int(torch.randint(1, 12, (), generator=random)) for _ in range(3))
        ids = torch.randint(1, 5, (1, length), generator=random)
        theirs = candidates.PromptLookupCandidateGenerator(
            eos_token_id=torch.tensor([4]),
            num_output_tokens=count,
            max_matching_ngram_size=n,
            max_length=10**6,
        ).get_candidates(ids)[0][0, length:]
        found += len(theirs) > 0
        assert look_up(ids[0].tolist(), count, [4], longest=n) == theirs.tolist()
    assert found > 100


def test_a_repeated_prompt_is_found(toy, pixels):
    """What was said once is guessed when it is said again."""
    answer = generate(toy.model, [IDS], pixels[:1].double(), max_new_tokens=12).sequences[0]
    draft = Lookup().begin(
        [*answer.tolist(), 7, *answer[:4].tolist()],
        Sampler(toy.model.config, answer[None], Options()),
        (),
    )
    expected = look_up([*answer.tolist(), 7, *answer[:4].tolist()], 5)
    assert draft.propose(5) == expected
    assert expected


# --- how it is asked for --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes():
    return load(REFERENCE.parents[1] / "weights/shapes", dtype="float32", device="cpu")


PICTURE = REFERENCE.parents[1] / "weights/shapes/example-2.png"


def test_an_answer_is_asked_for_with_a_word_or_a_drafter(shapes):
    """One way to ask for drafts would change the answer, take no guess or miscount them."""
    expected = shapes.ask(PICTURE, "Please describe this image in detail.")
    drafts = shapes.drafts("lookup", 3)
    for draft in ("lookup", Lookup(), drafts):
        question = "Please describe this image in detail."
        assert shapes.ask(PICTURE, question, draft=draft) == expected
        assert "".join(shapes.stream(PICTURE, question, draft=draft)) == expected
        assert shapes.ask_each(PICTURE, [question], draft=draft).text == [expected]
    assert drafts.report.drafted > 0
    assert drafts.report.tokens == drafts.report.passes + drafts.report.accepted + 1
    assert set(drafts.report.record()) == {
        "kind", "passes", "drafted", "accepted", "lengths", "exact",
    }  # fmt: skip


def test_a_conversation_goes_on_from_a_drafted_answer(shapes):
    """Its cache held guesses, or lacked accepted ones."""
    for draft in ("lookup", shapes.drafts("lookup", 2), shapes.drafts(Scripted([], always=5), 9)):
        plain, drafted = Conversation(shapes), Conversation(shapes)
        plain.add_image(PICTURE)
        drafted.waiting = list(plain.waiting)
        for question in ("What is in the picture?", "And what is large?", "Where is it?"):
            said = plain.ask(question, max_new_tokens=30, min_new_tokens=9)
            assert drafted.ask(question, max_new_tokens=30, min_new_tokens=9, draft=draft) == said
            assert drafted.positions == plain.positions
            assert drafted.cache.length == plain.cache.length
        # one that is left early, in the middle of a block
        for talk, more in ((plain, {}), (drafted, {"draft": draft})):
            pieces = talk.stream("Describe it again.", min_new_tokens=12, **more)
            for _ in range(4):
                next(pieces)
            pieces.close()
        assert drafted.turns[-1].answer == plain.turns[-1].answer != ""
        assert drafted.ask("Is it red?", draft=draft) == plain.ask("Is it red?")


def test_a_long_conversation_makes_room_while_a_block_is_shown(shapes, monkeypatch):
    """A cache that grows keeps what is in it, and an accepted guess was not yet."""
    monkeypatch.setattr("minillava.chat.conversation.GROWTH", 3)
    plain, drafted = Conversation(shapes), Conversation(shapes)
    for question in ("What is red?", "What is it?"):
        said = plain.ask(question, min_new_tokens=20, max_new_tokens=20)
        answer = plain.positions[-20:]
        for count in (1, 3, 8):
            talk = Conversation(shapes)
            talk.turns, talk.positions = list(drafted.turns), list(drafted.positions)
            draft = shapes.drafts(Scripted(answer), count)
            assert talk.ask(question, min_new_tokens=20, max_new_tokens=20, draft=draft) == said
        drafted = talk


def test_wrong_drafts_are_one_line(shapes):
    """A wrong draft or number of guesses would be a traceback: a class for its object was one."""
    with pytest.raises(ValueError, match="draft is 5, expected a name or a drafter"):
        shapes.ask(PICTURE, draft=5)
    with pytest.raises(ValueError, match=r"draft is <class .*Lookup'>, expected .* as Lookup\(\)"):
        shapes.ask(PICTURE, draft=Lookup)  # was a TypeError, of a call without self
    for tokens in (0, 65, 2.5, True, "many"):
        with pytest.raises(ValueError, match="expected a whole number from 1 to 64, or auto"):
            shapes.drafts("lookup", tokens)
    assert shapes.drafts("lookup", "auto").tokens is None
    with pytest.raises(ValueError, match="num_beams is 3: drafts are for single answers"):
        shapes.ask(PICTURE, draft="lookup", num_beams=3)
    with pytest.raises(ValueError, match="2 answers at once"):
        shapes.ask(PICTURE, ["What?", "Where?"], draft="lookup")
    with pytest.raises(TypeError, match=r"no option 'draft_tokens'.*says how many"):
        shapes.ask(PICTURE, draft="lookup", draft_tokens=3)


def test_a_compiled_step_takes_no_drafts(shapes, monkeypatch):
    """A compiled step reads one token: a block of guesses would fail inside it."""
    monkeypatch.setattr(shapes.model, "decoding", Captured(lambda *given: None))
    with pytest.raises(ValueError, match="do not go with a compiled step"):
        shapes.ask(PICTURE, draft="lookup")


def test_whether_rows_keep_their_bits_is_found_out(shapes):
    """By the model itself: one whose products depend on how many rows there are is not exact."""
    if processor.SAME_ROWS.get(processor.kind(), {}).get("int8", 1) < 16:
        pytest.skip("nothing is claimed for this kind of processor")
    small = load(REFERENCE.parents[1] / "weights/shapes", device="cpu", quantize="int8")
    assert keeps_bits(small.model.language_model, 8)
    drafts = shapes.drafts(Lookup())
    assert drafts.exact == {}
    small.ask(PICTURE, draft=(drafts := small.drafts(Lookup())), max_new_tokens=2)
    assert drafts.exact == {1: True}
    assert drafts.report.exact
    small.ask(PICTURE, draft=drafts, contrast="vcd", max_new_tokens=2)
    assert set(drafts.exact) == {1, 2}

    class Counting(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) + 1e-3 * x.shape[1]

    language = load(REFERENCE / "plain", device="cpu", dtype="float64").model.language_model
    language.layers[0].mlp = Counting(language.layers[0].mlp)
    assert not keeps_bits(language, 8)


# --- what is drawn --------------------------------------------------------------------------------


def markov(seed):
    """Five tokens, of which each hangs on the one before it alone; none ends an answer."""
    model = tiny(5, seed, eos_token_ids=(9,))
    model.language_model.layers = model.language_model.layers[:1]
    model.language_model.layers[0].self_attn.o_proj.weight.data.zero_()
    model.language_model.layers[0].mlp.down_proj.weight.data.zero_()
    return model


def test_a_model_may_say_what_is_never_guessed():
    """A large model said the padding token after a small one had guessed it, read it and gone on:
    the guesses were cut before it, nothing was left to read, and the answer ended in an error."""
    model = markov(0)
    asked = Options(max_new_tokens=60, temperature=1.5, seed=0)
    drafts = Drafts(DraftModel(model.language_model, model.language_model), 3)
    found = parts(drafts.steps(model, model.splice([[1, 4]]), asked))
    assert found == parts(steps(model, model.splice([[1, 4]]), asked))
    assert [model.config.pad_token_id] in [ids for ids, _, _ in found]


@torch.no_grad()
def chances(model, warmth):
    """The probability of each token after each one, [5, 5]."""
    language = model.language_model
    return (language(torch.arange(5)[:, None]).logits[:, 0] / warmth).softmax(-1)


def chi_square(counts, expected):
    """How often counts [n] that far from what is expected, or farther, are drawn by chance."""
    distance = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, distance / 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model", "at random", "lookup"])
def test_what_is_drawn_has_the_chances_of_the_model(name):
    """Tokens that were guessed came too often, or what replaces a wrong guess had the chances of
    the wrong rule. 20,000 tokens, by the one before them, and apart by whether that one was a
    guess that came true."""
    large, small, warmth, length = markov(0), markov(1), 1.5, 250
    language = large.language_model
    counts = torch.zeros(2, 5, 5, dtype=torch.float64)
    for seed in range(80):
        random = torch.randint(5, (length,), generator=torch.Generator().manual_seed(seed))
        drafter = {
            "model": DraftModel(small.language_model, language),
            "at random": Scripted(random.tolist()),
            "lookup": Lookup(),
        }[name]
        drafts = Drafts(drafter, 3)
        options = Options(max_new_tokens=length, temperature=warmth, seed=seed)
        ids = [step.ids[0] for step in drafts.steps(large, large.splice([[1, 4]]), options)]
        for before, token, guessed in zip(ids, ids[1:], drafts.report.guessed, strict=False):
            counts[int(guessed), before, token] += 1
    exact, wrong = chances(large, warmth), chances(small, warmth)
    for table in counts:
        assert table.sum() > 500
        drawn = [i for i in range(5) if table[i].sum()]  # padding is said, but never guessed
        assert len(drawn) >= 4
        assert min(chi_square(table[i], table[i].sum() * exact[i]) for i in drawn) > 1e-4
        assert min(chi_square(table[i], table[i].sum() * wrong[i]) for i in drawn) < 1e-4


@pytest.mark.slow
def test_guesses_come_true_as_often_as_shared_random_numbers_allow():
    """The small model drew with numbers of its own, and its guesses came true less often. Two
    models that race with the same exponential numbers both choose x with the chance
    1 / sum over y of max(p(y) / p(x), q(y) / q(x)) (Daliri et al. 2024)."""
    large, small, warmth, length = markov(0), markov(1), 1.5, 400
    p, q = chances(large, warmth), chances(small, warmth)
    race = torch.maximum(p[:, None] / p[:, :, None], q[:, None] / q[:, :, None])  # [before, x, y]
    alike, apart = (1 / race.sum(-1)).sum(-1), (p - q).abs().sum(-1) / 2
    assert ((1 - apart) / (1 + apart) <= alike).all() and (alike <= 1 - apart).all()
    came = hoped = variance = independent = 0.0
    for seed in range(5):
        drafts = Drafts(DraftModel(small.language_model, large.language_model), 1)
        options = Options(max_new_tokens=length, temperature=warmth, seed=seed)
        ids = [step.ids[0] for step in drafts.steps(large, large.splice([[1, 4]]), options)]
        guessed = drafts.report.guessed
        # After a guess that came true the pass has a row more, for which there was no guess; nor
        # is there one for the last token.
        for i in range(1, length - 1):
            if not guessed[i - 1]:
                came, hoped = came + guessed[i], hoped + float(alike[ids[i - 1]])
                variance += float(alike[ids[i - 1]] * (1 - alike[ids[i - 1]]))
                independent += float((p * q).sum(-1)[ids[i - 1]])
    assert abs(came - hoped) < 4 * variance**0.5
    assert hoped - independent > 8 * variance**0.5


# --- what a pass costs ----------------------------------------------------------------------------


def test_costs_between_the_rows_of_the_table():
    """A pass over more rows than were measured would be an error, or cost nothing more."""
    assert interpolate((1.0, 2.0, 3.0, 5.0, 9.0, 17.0), 1) == 1
    assert interpolate((1.0, 2.0, 3.0, 5.0, 9.0, 17.0), 3) == 2.5
    assert interpolate((1.0, 2.0, 3.0, 5.0, 9.0, 17.0), 32) == 17
    assert interpolate((1.0, 2.0, 3.0, 5.0, 9.0, 17.0), 48) == 25


@pytest.mark.parametrize(("where", "stored"), [(w, s) for w in COSTS for s in COSTS[w]])
def test_a_right_guess_always_pays_where_rows_are_cheap_and_never_where_they_are_not(where, stored):
    """A table of costs would have guesses made that are never right, or none that always are."""

    def cost(rows):
        return interpolate(COSTS[where][stored], rows)

    assert best_length(0.0, cost, 0.0) == 0
    assert best_length(1.0, cost, 0.0) > 0
    if stored in ("int8", "int4"):  # above 16 rows their weights may be made wide
        assert best_length(0.95, cost, 0.0) <= 7


def test_the_cost_is_that_of_this_model(shapes):
    """A quantised model would guess as if its rows cost what those of a plain model do."""
    assert pass_cost(shapes.model.language_model)(1) == 1
    small = load(REFERENCE.parents[1] / "weights/shapes", device="cpu", quantize="int4")
    costs = [pass_cost(each.model.language_model)(8) for each in (small, shapes)]
    assert costs[0] > 1.2 * costs[1]


# --- a small model that guesses -------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The language model of the bundled LLaVA in a folder of its own, as a Llama is stored."""
    source = REFERENCE.parents[1] / "weights/shapes"
    folder = tmp_path_factory.mktemp("llama")
    assistant = load(source, device="cpu", dtype="float32")
    text = assistant.model.config.text
    settings = {name: getattr(text, name) for name in vars(text) if name != "rope_factor"}
    write = {"model_type": "llama", "hidden_act": "silu", **settings}
    (folder / "config.json").write_text(json.dumps(write))
    head = "" if text.tie_word_embeddings else "lm_head."
    tensors = {
        name if head and name.startswith(head) else f"model.{name}": tensor.clone()
        for name, tensor in assistant.model.language_model.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors")
    shutil.copy(source / "tokenizer.model", folder)
    return folder


def copied(folder, to):
    shutil.copytree(folder, to)
    return to


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.5, "seed": 3}, {"no_repeat_ngram_size": 1}]
)
def test_a_model_guesses_what_it_would_say_itself(shapes, options):
    """With the pictures, and for samples with the same random numbers, every guess is right: the
    small model is a copy of the large one."""
    drafts = shapes.drafts(str(REFERENCE.parents[1] / "weights/shapes"), 3)
    question = "Please describe this image in detail."
    asked = {"max_new_tokens": 24, "min_new_tokens": 24, **options}
    assert shapes.ask(PICTURE, question, draft=drafts, **asked) == shapes.ask(
        PICTURE, question, **asked
    )
    assert drafts.report.kind == "model"
    assert drafts.report.passes == -(-23 // 4)
    assert drafts.report.accepted == 23 - drafts.report.passes


def test_a_llama_guesses_by_the_words_alone(shapes, llama):
    """It reads no picture, and is right less often, but the answer is the same; it goes on where
    the answer went on without it."""
    for options in ({}, {"temperature": 1.0, "seed": 5}):
        for count in (1, 4):
            drafts = shapes.drafts(llama, count)
            question, asked = "Is it red?", {"max_new_tokens": 30, "min_new_tokens": 30, **options}
            expected = shapes.ask(PICTURE, question, **asked)
            assert shapes.ask(PICTURE, question, draft=drafts, **asked) == expected
            assert 0 < drafts.report.accepted < drafts.report.drafted
    # without a picture it is the large model
    drafts, asked = shapes.drafts(llama, 3), {"max_new_tokens": 16, "min_new_tokens": 16}
    expected = shapes.ask(None, "Hello", **asked)
    assert shapes.ask(None, "Hello", draft=drafts, **asked) == expected
    assert drafts.report.accepted == drafts.report.drafted > 0


@pytest.mark.parity
@torch.no_grad()
def test_answers_are_those_of_transformers_assisted_generation(shapes, llama, tmp_path):
    """With a small LLaVA that sees the picture, and a Llama that does not: the same ids as
    transformers makes with the same small model."""
    transformers = pytest.importorskip("transformers")
    folder = REFERENCE.parents[1] / "weights/shapes"
    large = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    seeing = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    blind = transformers.LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32)
    count = large.config.vision_config.image_size // large.config.vision_config.patch_size
    for picture, small, given in ((PICTURE, seeing, folder), (None, blind, llama)):
        drafts = shapes.drafts(given, 4)
        prompt = shapes.prompt("What is in the picture?", images=picture is not None)
        ids, pictures = [], {}
        for i in shapes.tokenizer.encode(prompt):
            ids += [large.config.image_token_id] * count**2 if i == -200 else [i]
        if picture is not None:
            pictures = {"pixel_values": shapes.image_processor([picture])}
        small.generation_config.num_assistant_tokens = 4
        small.generation_config.num_assistant_tokens_schedule = "constant"
        ids = torch.tensor([ids])
        theirs = large.generate(
            ids, attention_mask=torch.ones_like(ids), assistant_model=small, do_sample=False,
            max_new_tokens=20, pad_token_id=0, eos_token_id=2, **pictures,
        )  # fmt: skip
        options = shapes.options(max_new_tokens=20)
        spliced = shapes.prepare([] if picture is None else picture, prompt)
        given = [] if picture is None else [picture]
        found = list(drafts.steps(shapes.model, spliced, options, pictures=given))
        assert [step.ids[0] for step in found] == theirs[0, ids.shape[1] :].tolist()
        assert drafts.report.accepted == drafts.report.drafted > 0


@pytest.mark.parity
@torch.no_grad()
def test_vocabularies_of_32000_and_32064_rows_answer_as_transformers_does(tmp_path):
    """The released LLaVA has 32,000 rows, the hub's 64 more, which are no words, and a Llama has
    the first number: either may guess for the other. transformers wants equally many."""
    transformers = pytest.importorskip("transformers")
    import hf

    config = hf.hub_config(**hf.SIZES["toy"], pieces=32_000)
    state = hf.random_state(config, 5)
    theirs, text = hf.model_of(config, state, "float32"), config["text_config"]
    assert text["vocab_size"] == 32_064
    words = {
        name.replace("language_model.", ""): name
        for name in state
        if name.startswith(("model.language_model.", "lm_head."))
    }
    blind = transformers.LlamaForCausalLM(transformers.LlamaConfig(**text)).eval()
    blind.load_state_dict({n: state[old] for n, old in words.items()})
    blind.generation_config.num_assistant_tokens = 4
    blind.generation_config.num_assistant_tokens_schedule = "constant"
    larges, smalls = [], []
    for rows in (32_064, 32_000):
        cut = {n: w[:rows].clone() if len(w) == 32_064 else w for n, w in state.items()}
        for name in [n for n in cut if "post_layernorm" in n or ".layers.2." in n]:
            del cut[name]  # the end of the tower, which is not read
        small = {n: cut[old] for n, old in words.items()}
        write = {**config, "text_config": {**text, "vocab_size": rows}, "vocab_size": rows}
        large_folder, small_folder = tmp_path / f"{rows}-large", tmp_path / f"{rows}-small"
        for folder, settings, tensors in (
            (large_folder, write, hf.rename(cut, "fresh")),
            (small_folder, write["text_config"], small),
        ):
            folder.mkdir()
            hf.write_json(settings, folder / "config.json")
            hf.write_weights(tensors, folder)
        given = {"dtype": torch.float32, "device": torch.device("cpu")}
        read = read_config(large_folder), StoredWeights(large_folder)
        larges.append(build_model(*read, fused, **given))
        language = open_language_model(small_folder, fused, *given.values()).language_model
        assert language.config.vocab_size == rows
        smalls.append(language)
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    asked = {"max_new_tokens": 24, "min_new_tokens": 24}
    for ids in ([1, 30, 31_999, 12], [1, 30, -200, 12]):
        given, seen = hf.inputs(theirs, [ids]), pixels if -200 in ids else None
        del given["position_ids"]
        if seen is not None:
            given["pixel_values"] = seen
        found = theirs.generate(
            **given, assistant_model=blind, do_sample=False, pad_token_id=0,
            eos_token_id=2, **asked,
        )  # fmt: skip
        expected = found[0, given["input_ids"].shape[1] :].tolist()
        for large, small in zip(larges, reversed(smalls), strict=True):
            drafts = Drafts(DraftModel(small, large.language_model), 4)
            made = drafts.steps(large, large.splice([ids], seen), Options(**asked))
            assert [step.ids[0] for step in made] == expected
            assert drafts.report.drafted > 0
            assert -200 in ids or drafts.report.accepted == drafts.report.drafted


def test_a_stored_head_is_the_head_of_a_drafter_too(shapes, llama, tmp_path):
    """A config that ties the head to the table, beside a stored head, was refused as a drafter and
    opened as a LLaVA."""
    folder = copied(llama, tmp_path / "tied")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": True}))
    drafts, asked = shapes.drafts(folder, 3), {"max_new_tokens": 16, "min_new_tokens": 16}
    assert shapes.ask(None, "Hello", draft=drafts, **asked) == shapes.ask(None, "Hello", **asked)
    assert drafts.report.accepted == drafts.report.drafted > 0


def test_a_small_context_ends_the_guesses_and_not_the_answer(shapes, llama, tmp_path):
    """A draft model with a shorter context would be asked past its end, and the answer fail or
    stop."""
    folder = copied(llama, tmp_path / "short")
    settings = json.loads((folder / "config.json").read_text())
    for positions in (20, 60):
        settings["max_position_embeddings"] = positions
        (folder / "config.json").write_text(json.dumps(settings))
        drafts, asked = shapes.drafts(folder, 3), {"max_new_tokens": 20, "min_new_tokens": 20}
        expected = shapes.ask(None, "What is it?", **asked)
        assert shapes.ask(None, "What is it?", draft=drafts, **asked) == expected
        assert (drafts.report.drafted > 0) == (positions == 60)


def test_a_padded_vocabulary_is_the_same_vocabulary(shapes, llama, tmp_path):
    """llava-hf pads 32,000 rows to 32,064; a guess of a padded row would be an error."""
    folder = copied(llama, tmp_path / "padded")
    settings = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = torch.cat([tensors[name], 9 * tensors[name][:8]])
    settings["vocab_size"] += 8
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "model.safetensors")
    drafts, asked = shapes.drafts(folder, 3), {"max_new_tokens": 16, "min_new_tokens": 16}
    expected = shapes.ask(None, "Hello", **asked)
    assert shapes.ask(None, "Hello", draft=drafts, **asked) == expected


def test_a_model_of_other_words_is_refused(shapes, llama, tmp_path):
    """An id that means another word is a wrong guess each time, and nothing would say why."""
    folder = copied(llama, tmp_path / "few")
    settings = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = tensors[name][:100].clone()
    (folder / "config.json").write_text(json.dumps({**settings, "vocab_size": 100}))
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="has a vocabulary of 100 tokens, the model one of"):
        shapes.drafts(folder)
    other = copied(llama, tmp_path / "other")
    shutil.copy(REFERENCE / "plain" / "tokenizer.model", other)
    with pytest.raises(ValueError, match=r"another than the model's|has a vocabulary of"):
        shapes.drafts(other)


def test_a_folder_that_is_no_model_is_one_line(shapes, llama, tmp_path):
    """A draft folder that is missing, damaged or another network would be a traceback."""
    with pytest.raises(FileNotFoundError, match="no such folder"):
        shapes.drafts("look-up")
    broken = copied(llama, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(ValueError, match=r"language_model.norm.weight is missing"):
        shapes.drafts(broken)
    settings = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**settings, "model_type": "gpt2"}))
    with pytest.raises(ValueError, match="model_type is 'gpt2'"):
        shapes.drafts(broken)
    (broken / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": 10**9}))
    with pytest.raises(ValueError, match="num_hidden_layers is 1000000000"):
        shapes.drafts(broken)


def test_a_tree_of_guesses_is_read_in_one_pass(toy):
    """Two ways to go on beside each other: each sees what came before it and nothing of the other,
    as if it had been read alone."""
    language, prompt = toy.model.language_model, torch.tensor([[1, 30, 41, 12]])
    branches = [[5, 6, 7], [9, 8]]

    def cache():
        made = KVCache(language.config, 1, 12, dtype=torch.float64, device="cpu")
        language(prompt, None, made)
        return made

    with torch.no_grad():
        expected = [language(torch.tensor([ids]), None, cache()).logits for ids in branches]
        nodes, depths = torch.tensor([[5, 6, 7, 9, 8]]), torch.tensor([[0, 1, 2, 0, 1]])
        seen = torch.ones(5, 4, dtype=torch.bool)  # all of the prompt
        own = torch.block_diag(torch.ones(3, 3).tril(), torch.ones(2, 2).tril()).bool()
        mask = torch.cat([seen, own], dim=1)[None, None]  # [1, 1, T, S]
        found = language(nodes, None, cache(), positions=4 + depths, mask=mask)
    for each, row in zip(found.logits.split([3, 2], dim=1), expected, strict=True):
        torch.testing.assert_close(each, row, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(language.head(found.hidden), found.logits, rtol=0, atol=0)
