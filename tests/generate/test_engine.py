"""The engine: every answer among others is the one asked alone, and who leaves costs nobody."""

import queue
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain

import pytest
import torch
from paths import ROOT
from waiting import PATIENCE, wait_until

import minillava
from minillava.fast import row_by_row
from minillava.fast.parallel import OthersEnded
from minillava.files.pictures import open_image
from minillava.generate import engine as engine_file
from minillava.generate.contrast import M3ID, RITUAL, VCD
from minillava.generate.engine import FAILURES, Engine, Failed, Refused, Request, Token
from minillava.generate.lookup import Lookup
from minillava.generate.speculate import Drafts
from minillava.generate.tree import Tree

SHAPES = ROOT / "weights" / "shapes"
LONG = {"min_new_tokens": 400, "max_new_tokens": 400}  # of an answer that does not end by itself


@pytest.fixture(scope="module")
def assistant():
    return minillava.load(SHAPES, device="cpu", dtype="float32")


class Asked:
    """A request that keeps what happens to it. at_first: is called in the engine's thread before
    its first event is kept."""

    def __init__(
        self,
        engine,
        assistant,
        question,
        image=None,
        options=({},),
        at_first: Callable[[], None] | None = None,
        **more,
    ):
        self.events: queue.Queue = queue.Queue()
        self.at_first = at_first
        prompt = assistant.prompt(question, images=image is not None)
        path = None if image is None else SHAPES / f"example-{image}.png"
        pictures = [] if image is None else [(bytes([image]), assistant.image_processor(path)[0])]
        self.request = Request(
            [*assistant.tokenize(prompt), *more.get("prefix", ())],
            pictures,
            [assistant.options(**each) for each in options],
            self.put,
            **more,
        )
        engine.submit(self.request)

    def put(self, number: int, event: Token | Failed) -> None:
        if self.at_first is not None:
            call, self.at_first = self.at_first, None
            call()
        self.events.put((number, event))

    def next(self) -> tuple[int, Token | Failed]:
        return self.events.get(timeout=PATIENCE)

    def all(self) -> dict[int, list]:
        """Every event of each answer, until all have ended."""
        found: dict[int, list] = {n: [] for n in range(len(self.request.options))}
        ended = 0
        while ended < len(found):
            number, event = self.next()
            found[number].append(event)
            ended += isinstance(event, Failed) or event.finish_reason is not None
        return found

    def texts(self) -> list[str]:
        return ["".join(event.text for event in events) for events in self.all().values()]


SETTINGS = {"slots": 4, "waiting": 32, "piece": 64, "pictures": 32}


@pytest.fixture
def start(assistant) -> Iterator:
    """`start(**settings)`: an engine that ends with the test; later=True: whose thread the test
    starts, once everything is asked."""
    made = []

    def begin(later: bool = False, **settings) -> Engine:
        engine = Engine(assistant.model, assistant.tokenizer, **{**SETTINGS, **settings})
        made.append(engine)
        if not later:
            engine.start()
        return engine

    yield begin
    for engine in made:
        engine.drain(0)
        if engine.ident is not None:
            engine.join(PATIENCE)
        assert not engine.is_alive()


MIXED = [
    (1, "How many shapes are there?", {}),
    (2, "Where is the ring?", {"temperature": 1.0, "seed": 3}),
    (3, "Describe this image.", {"max_new_tokens": 5}),
    (1, "What is at the bottom right?", {"temperature": 0.7, "top_p": 0.9, "seed": 8}),
    (None, "What is a ring?", {"max_new_tokens": 8}),
    (2, "Please describe this image in detail.", {"stop": ["ring"]}),
    (3, "Is it red?", {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}),
]


@pytest.fixture(scope="module")
def alone(assistant) -> list[str]:
    """The answers to MIXED, each asked by itself."""
    paths = [image and SHAPES / f"example-{image}.png" for image, _, _ in MIXED]
    return [
        assistant.ask(path, question, **options)
        for path, (_, question, options) in zip(paths, MIXED, strict=True)
    ]


@pytest.mark.parametrize("settings", [{}, {"slots": 2, "piece": 7}, {"slots": 1, "reuse": False}])
def test_answers_among_others_are_those_asked_alone(start, assistant, alone, settings):
    """More than there are slots, so that rows join and leave; prompts are read in pieces."""
    engine = start(**settings)
    asked = [
        Asked(engine, assistant, question, image, [options]) for image, question, options in MIXED
    ]
    for one, expected, (_, question, _) in zip(asked, alone, MIXED, strict=True):
        assert one.texts() == [expected], question


PRECISIONS = [("float32", None), ("bfloat16", None), ("bfloat16", "int8"), ("float32", "int4")]


@pytest.mark.slow
@pytest.mark.numeric
@pytest.mark.parametrize("kept", [False, True], ids=["exact", "same-bits"])
@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: "-".join(filter(None, p)))
def test_an_exact_answer_has_the_same_bits_whoever_is_there(precision, kept, monkeypatch):
    """The last bits would depend on how many rows share a step, or on where the reading of a prompt
    begins behind what is cached; a run that was killed would then end with other answers. With
    --same-bits they are also those of an answer without an engine."""
    monkeypatch.setattr(row_by_row, "PIECE", 48)
    dtype, kind = precision
    one = minillava.load(SHAPES, device="cpu", dtype=dtype, quantize=kind)
    if kept:
        row_by_row.keep_bits(one.model)
    found = []
    for cases in (MIXED, MIXED[::-1], *([case] for case in MIXED)):
        engine = Engine(one.model, one.tokenizer, **{**SETTINGS, "piece": 40}, exact=True)
        engine.start()
        asked = [Asked(engine, one, q, image, [each], logprobs=3) for image, q, each in cases]
        # when a token was chosen is another time each time
        events = [[event._replace(at=0) for event in each.all()[0]] for each in asked]
        found.append(dict(zip([case[:2] for case in cases], events, strict=True)))
        engine.drain(0)
        engine.join(PATIENCE)
        reused = sum(one.request.cached for one in asked)
        assert reused >= 48 or len(cases) == 1
    together, turned, *alone = found
    assert together == turned == {name: events for each in alone for name, events in each.items()}
    for image, question, options in MIXED if kept else []:
        path = None if image is None else SHAPES / f"example-{image}.png"
        text = "".join(event.text for event in together[image, question])
        assert text == one.ask(path, question, **options)


def test_several_answers_to_one_prompt_are_those_of_their_seeds(start, assistant):
    """Answers to one prompt would share a generator, and each depend on the others."""
    options = [{"temperature": 1.0, "seed": seed} for seed in (5, 6, 7)]
    engine = start()
    other = Asked(engine, assistant, "Where is the ring?", 2)
    found = Asked(engine, assistant, "Describe this image.", 1, options).texts()
    picture = SHAPES / "example-1.png"
    assert found == [assistant.ask(picture, "Describe this image.", **each) for each in options]
    assert other.texts() == [assistant.ask(SHAPES / "example-2.png", "Where is the ring?")]


@pytest.mark.parametrize(
    ("settings", "look"),
    [({}, ([1, 3], [0, 2])), ({"slots": 3, "piece": 7}, ([0, 1, 2, 3], [0, 1]))],
)
def test_what_a_token_looked_at_is_the_row_that_chose_it(start, assistant, look, settings):
    """The map would be the next token's, of another row, or of a piece of the prompt alone. The
    reference is the whole attention of one pass over prompt and answer."""
    engine = start(**settings)
    beside = [Asked(engine, assistant, "Describe this image.", 2) for _ in range(2)]
    asked = Asked(engine, assistant, "What is at the bottom right?", 1, look=look)
    (events,) = asked.all().values()
    ids = assistant.tokenize(assistant.prompt("What is at the bottom right?"))
    pixels = assistant.image_processor(SHAPES / "example-1.png")
    with torch.no_grad():
        spliced = assistant.model.splice([[*ids, *(event.id for event in events[:-1])]], pixels)
        output = assistant.model.language_model(spliced.embeds, attentions=True)
    ((begin, end),) = spliced.image_spans[0]
    rows = torch.stack(output.attentions)[look[0]][:, 0, look[1], -len(events) :, begin:end]
    expected = rows.mean((0, 1))  # [answer, P]
    torch.testing.assert_close(
        torch.stack([event.heat for event in events]), expected, rtol=1e-4, atol=1e-6
    )
    assert all(event.heat is None for one in beside for event in one.all()[0])


@pytest.mark.parametrize("method", [VCD(), RITUAL(transform="flip"), M3ID(rate=0.1)])
def test_contrast_among_others_is_contrast_alone(start, assistant, method):
    """The second row would read another picture, or the answer of somebody else."""
    engine, path = start(piece=50), SHAPES / "example-1.png"
    question = "Please describe this image in detail."
    beside = Asked(engine, assistant, question, 2)
    asked = contrasted(engine, assistant, question, method, [{"seed": 0}])
    assert asked.texts() == [assistant.ask(path, question, contrast=method)]
    assert beside.texts() == [assistant.ask(SHAPES / "example-2.png", question)]


def contrasted(engine, assistant, question, method, options, prefix=()) -> Asked:
    ids = [*assistant.tokenize(assistant.prompt(question)), *prefix]
    second_rows = []
    for each in options:
        generator = torch.Generator().manual_seed(each["seed"])
        picture = open_image(SHAPES / "example-1.png")
        (row,), pixels = method.second([ids], [picture], assistant.image_processor, generator)
        own = [] if pixels is None else [(b"other%d" % each["seed"], pixels[0])]
        second_rows.append((row, own))
    more = {"contrast": method, "second_rows": second_rows, "prefix": prefix}
    return Asked(engine, assistant, question, 1, options, **more)


def test_several_answers_with_contrast_are_those_of_their_seeds(start, assistant):
    """Each has noise of its own, and two slots; more than there are would wait for ever."""
    engine, path = start(), SHAPES / "example-1.png"
    options = [{"temperature": 1.0, "seed": seed} for seed in (2, 3)]
    found = contrasted(engine, assistant, "Is it red?", VCD(), options).texts()
    assert found == [assistant.ask(path, "Is it red?", contrast=VCD(), **each) for each in options]
    with pytest.raises(Refused, match="6 answers at once, there are 4 slots"):
        contrasted(engine, assistant, "Is it red?", VCD(), [{"seed": seed} for seed in (1, 2, 3)])


@pytest.mark.parametrize("method", [None, M3ID(rate=0.1)])
def test_an_answer_goes_on_from_its_prefix(start, assistant, method):
    """Going on from half of an answer would give another end: the penalties would not know the
    half, half a character would be lost, or contrast would count its steps from the prefix."""
    engine, options = start(), {"repetition_penalty": 1.2, "seed": 0}
    question = "Please describe this image in detail."
    asked = [partial_answer(engine, assistant, question, method, options, ())]
    (whole,) = asked[0].all().values()
    ids, text = [event.id for event in whole], "".join(event.text for event in whole)
    for count in (1, 4, len(ids) - 1):
        (rest,) = (
            partial_answer(engine, assistant, question, method, options, ids[:count]).all().values()
        )
        assert [event.id for event in rest] == ids[count:]
        begun = "".join(event.text for event in whole[:count])
        assert begun + "".join(event.text for event in rest) == text


def partial_answer(engine, assistant, question, method, options, prefix) -> Asked:
    if method is not None:
        return contrasted(engine, assistant, question, method, [options], prefix)
    return Asked(engine, assistant, question, 1, [options], prefix=prefix)


def test_what_a_prompt_begins_with_is_not_read_again(start, assistant):
    """A second question would encode its picture again, or be answered from another picture's
    cache."""
    engine = start(slots=2)
    first = Asked(engine, assistant, "How many shapes are there?", 1)
    first.all()
    again = Asked(engine, assistant, "What is at the bottom right?", 1)
    assert again.texts() == [
        assistant.ask(SHAPES / "example-1.png", "What is at the bottom right?")
    ]
    patches = assistant.model.config.tokens_per_image
    assert first.request.cached == 0 and again.request.cached > patches
    # another picture in the same place is another prompt
    other = Asked(engine, assistant, "What is at the bottom right?", 2)
    assert other.texts() == [
        assistant.ask(SHAPES / "example-2.png", "What is at the bottom right?")
    ]
    assert other.request.cached < patches


def test_log_probabilities_are_those_of_the_logits(start, assistant):
    """The log-probabilities would be of another step, or of scores that a filter has changed."""
    engine = start()
    (events,) = Asked(engine, assistant, "Is it red?", 1, logprobs=3).all().values()
    ids = assistant.tokenize(assistant.prompt("Is it red?"))
    pixels = assistant.image_processor(SHAPES / "example-1.png")
    with torch.no_grad():
        logits = assistant.model([[*ids, *(event.id for event in events)]], pixels).logits[0]
    log_p = logits[-1 - len(events) : -1].log_softmax(-1)
    for event, row in zip(events, log_p, strict=True):
        (token, logprob), *top = event.logprobs
        assert token == event.id and logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [i for i, _ in top] == row.topk(3).indices.tolist()


def test_who_is_cancelled_leaves_and_the_others_notice_nothing(start, assistant):
    """Before its first token, while its prompt is read, and in the middle of an answer."""
    engine = start(later=True, slots=2, piece=3)

    def leave() -> None:
        for asked in (waiting, answering):
            engine.cancel(asked.request)

    stays = Asked(engine, assistant, "Describe this image.", 1)
    answering = Asked(engine, assistant, "Describe this image.", 2, [LONG], at_first=leave)
    waiting = Asked(engine, assistant, "Describe this image.", 3)
    engine.start()
    assert isinstance(answering.next()[1], Token)
    assert stays.texts() == [assistant.ask(SHAPES / "example-1.png", "Describe this image.")]
    reading = Asked(engine, assistant, "Describe this image.", 2, [LONG, LONG])
    engine.cancel(reading.request)
    wait_until(lambda: not engine.waiting and engine.running == 0)
    assert waiting.events.empty() and not engine.answers


def test_a_full_queue_refuses_with_a_time_to_come_again(start, assistant):
    """A busy server would queue requests without end, or refuse them without saying when to come
    again."""
    engine = start(later=True, slots=1, waiting=2)
    asked, refused = [begun(engine, assistant)], []
    for _ in range(7):
        try:
            asked.append(Asked(engine, assistant, "Describe this image.", 1, [LONG]))
        except Refused as error:
            refused.append(error)
    assert (len(asked), len(refused)) == (3, 5)
    assert {error.code for error in refused} == {"queue_full"}
    assert all(1 <= error.seconds <= 120 for error in refused)


def test_a_drained_engine_finishes_what_runs_and_refuses_the_rest(start, assistant):
    """A server that goes down would cut off running answers, or leave waiting ones without a
    word."""
    engine = start(later=True, slots=1)
    running = begun(engine, assistant)
    waiting = Asked(engine, assistant, "Describe this image.", 2)
    engine.drain(PATIENCE)
    with pytest.raises(Refused, match="going down"):
        Asked(engine, assistant, "Describe this image.", 3)
    engine.start()
    assert running.texts() == [assistant.ask(None, "What is a ring?")]
    assert waiting.all()[0][-1].code == "shutting_down"
    engine.join(PATIENCE)
    assert (engine.is_alive(), engine.state) == (False, "ended")


def test_after_its_grace_an_answer_ends_with_an_error(start, assistant):
    """A server would wait for the longest answer when its time to go down is over."""
    engine = start(later=True)
    over = partial(engine.drain, 0)
    running = Asked(engine, assistant, "Describe this image.", 1, [LONG, LONG], at_first=over)
    engine.start()
    for events in running.all().values():
        assert events[-1].code == "shutting_down"


class Fails:
    """In a layer's place: raises `times` times."""

    def __init__(self, times: int):
        self.left = times

    def __call__(self, *_):
        if self.left:
            self.left -= 1
            raise RuntimeError("out of memory")


def test_a_step_that_fails_costs_its_answers_and_no_later_one(start, assistant):
    """One failed step would end the server, or leave its requests waiting for ever."""
    engine = start()
    layer = assistant.model.language_model.layers[0]
    hook = layer.register_forward_pre_hook(Fails(1))
    try:
        lost = Asked(engine, assistant, "Describe this image.", 1, [{}, {}])
        for (event,) in lost.all().values():
            assert event.code == "engine_failed" and "out of memory" not in event.message
        again = Asked(engine, assistant, "Is it red?", 1)
        assert again.texts() == [assistant.ask(SHAPES / "example-1.png", "Is it red?")]
        assert engine.state == "ok"
    finally:
        hook.remove()


def test_an_engine_that_keeps_failing_says_so(start, assistant, monkeypatch):
    """An engine that fails at every step would take requests for ever and answer none."""
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    engine = start()
    hook = assistant.model.language_model.layers[0].register_forward_pre_hook(Fails(1000))
    try:
        for _ in range(3):
            Asked(engine, assistant, "Is it red?", 1).all()
        engine.join(PATIENCE)
    finally:
        hook.remove()
    assert engine.state == "failed"
    with pytest.raises(Refused, match="ended with an error"):
        Asked(engine, assistant, "Is it red?", 1)


def begun(engine, assistant) -> Asked:
    """A request whose first token is chosen, of an engine without its thread."""
    running = Asked(engine, assistant, "What is a ring?")
    with torch.no_grad():
        engine._admit()
        while running.events.empty():
            engine._read(engine.answers)
    return running


def test_an_engine_that_keeps_failing_does_not_blame_a_new_request(assistant, monkeypatch):
    """The last failure, in the step that running answers take before a picture is encoded, would be
    laid on the request with the picture, and the engine would go on."""
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    engine = Engine(assistant.model, assistant.tokenizer, **SETTINGS)
    running = begun(engine, assistant)
    engine.failures = FAILURES - 1

    def fail(answers) -> None:
        raise RuntimeError("broken")

    engine._decode = fail
    new = Asked(engine, assistant, "Describe this image.", 1)
    engine.start()
    lost, told = running.all()[0][-1].message, new.all()[0][0].message
    engine.drain(0)
    engine.join(PATIENCE)
    assert lost.startswith("the model failed (RuntimeError)")
    assert (told, engine.state) == ("the model's thread has ended: RuntimeError", "failed")


def test_an_end_that_is_final_is_told_to_all_in_its_own_words(assistant):
    """Who asked was told that the request may be sent again, and who waited only the name of the
    error, though a part of the weights was gone. A step that is taken before a picture is encoded
    laid it on the request with the picture, and the engine went on."""
    engine = Engine(assistant.model, assistant.tokenizer, **SETTINGS)
    running = begun(engine, assistant)

    def fail(answers) -> None:
        raise OthersEnded

    engine._decode = fail
    waiting = Asked(engine, assistant, "Describe this image.", 1)
    engine.start()
    told = [asked.all()[0][-1].message for asked in (running, waiting)]
    engine.join(PATIENCE)
    assert told == [str(OthersEnded())] * 2
    assert engine.state == "failed" and isinstance(engine.error, OthersEnded)


def test_logits_that_are_not_finite_cost_one_answer(start, assistant):
    """Rows share a step, and not its accidents."""
    engine = start()
    stays = Asked(engine, assistant, "Describe this image.", 1)
    events: queue.Queue = queue.Queue()
    pixels = torch.full_like(stays.request.pictures[0][1], float("nan"))
    engine.submit(
        Request(
            stays.request.ids,
            [(b"nan", pixels)],
            stays.request.options,
            lambda number, event: events.put(event),
        )
    )
    assert "not finite" in events.get(timeout=PATIENCE).message
    assert stays.texts() == [assistant.ask(SHAPES / "example-1.png", "Describe this image.")]


def test_an_answer_ends_where_its_slot_is_full(assistant):
    """An answer would write past its slot, or a request that fits in none would wait for ever."""
    engine = Engine(assistant.model, assistant.tokenizer, **{**SETTINGS, "slots": 1}, capacity=60)
    engine.start()
    asked = Asked(engine, assistant, "What?", options=[{"min_new_tokens": 90}])
    (events,) = asked.all().values()
    assert len(asked.request.ids) + len(events) == 60
    assert events[-1].finish_reason == "length"
    with pytest.raises(
        Refused, match=r"takes \d+ positions \(1 picture\(s\) of 81 each\)"
    ) as refused:
        Asked(engine, assistant, "What?", 1)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(Refused, match="2 answers at once, there are 1 slots"):
        Asked(engine, assistant, "What?", options=[{}, {}])
    engine.drain(0)
    engine.join(PATIENCE)


# --- drafts ---------------------------------------------------------------------------------------


class Spoilt:
    """A drafter whose guesses are those of another, after `spoil`, which is told their place."""

    cost = 0.0

    def __init__(self, kind, drafter, spoil):
        self.kind, self.drafter, self.spoil = kind, drafter, spoil

    def begin(self, prompt, sampler, pictures):
        return SpoiltDraft(self.drafter.begin(prompt, sampler, pictures), self.spoil)


class SpoiltDraft:
    def __init__(self, draft, spoil):
        self.draft, self.spoil, self.passes = draft, spoil, 0
        self.accept = draft.accept

    def propose(self, count):
        self.passes += 1
        return self.spoil(self.passes, self.draft.propose(count))


def one_wrong(at: int, guesses: list[int]) -> list[int]:
    """Every guess of some passes is right, of others the first or a later one is wrong."""
    return [token + (i == at % 4) for i, token in enumerate(guesses)]


def two_ways(at: int, guesses: list[int]) -> Tree:
    """Beside each guess a wrong one, of which the first comes before it."""
    found = Tree([], [], [])
    row = 0
    for token in guesses:
        for each in (token + 1, token):
            found.tokens.append(each)
            found.parents.append(row)
        row = len(found.tokens)
    return found


GUESSED = ["lookup", "medusa", "right", "one is wrong", "two ways"]


@pytest.fixture(scope="module")
def drafts(assistant) -> dict[str, Drafts]:
    """By name. The model itself guesses right, but for pictures, which it is not shown."""
    right = assistant.drafts(SHAPES, 4).drafter
    spoilt = {"one is wrong": one_wrong, "two ways": two_ways}
    made = {name: Spoilt(name, right, spoil) for name, spoil in spoilt.items()}
    made |= {"lookup": Lookup(), "medusa": assistant.drafts("medusa").drafter, "right": right}
    return {name: Drafts(drafter, 4) for name, drafter in made.items()}


def told(asked: Asked) -> list[list[Token]]:
    """The events of each answer, but for when they came, and whether they were guessed."""
    return [[e._replace(at=0, guessed=None) for e in events] for events in asked.all().values()]


def assert_alike(found: list[list[Token]], expected: list[list[Token]]) -> None:
    """The same tokens and texts; what is told of them but for rounding."""
    for ours, theirs in zip(found, expected, strict=True):
        assert [event[:3] for event in ours] == [event[:3] for event in theirs]
        for one, other in zip(ours, theirs, strict=True):
            pairs = zip(one.logprobs or (), other.logprobs or (), strict=True)
            assert all(mine == (i, pytest.approx(log_p, abs=1e-4)) for mine, (i, log_p) in pairs)
            if other.heat is not None:
                torch.testing.assert_close(one.heat, other.heat, rtol=1e-4, atol=1e-6)


def everything(assistant) -> list[tuple[str, int | None, dict]]:
    """What a request may ask of the engine: a question, its picture, and the rest."""
    plain = [(question, image, {"options": [options]}) for image, question, options in MIXED]
    seeds = [{"temperature": 1.0, "seed": seed} for seed in (5, 6)]
    long = [{"min_new_tokens": 40, "max_new_tokens": 45}]
    prefix = assistant.tokenizer.encode("I see")[1:]
    asked = ({"options": seeds}, {"look": ([1, 3], [0, 2])}, {"prefix": prefix})
    return plain + [
        ("Please describe this image in detail.", 1, more)
        for more in (*asked, {"options": long, "logprobs": 2})
    ]


@pytest.fixture(scope="module")
def undrafted(assistant) -> list[list[list[Token]]]:
    """The answers to all of it, without drafts."""
    engine = Engine(assistant.model, assistant.tokenizer, **SETTINGS)
    asked = [Asked(engine, assistant, q, i, **more) for q, i, more in everything(assistant)]
    engine.start()
    found = [told(each) for each in asked]
    engine.drain(0)
    engine.join(PATIENCE)
    return found


WAYS = [(name, together) for name in GUESSED for together in (False, True)]
BY_DEFAULT = [("two ways", False), ("one is wrong", True)]


@pytest.mark.parametrize(
    ("name", "together"),
    [pytest.param(*way, marks=[pytest.mark.slow] * (way not in BY_DEFAULT)) for way in WAYS],
)
def test_drafts_change_no_answer(start, assistant, drafts, undrafted, name, together):
    """A wrong guess would be said, or stay in the cache; or who joins and leaves would let a
    drafter go on from where it was before. Who is asked together is there before the engine
    begins, so that everything happens in the same order each time."""
    engine, found, asked = start(later=together, drafts=drafts[name]), [], []
    for question, image, more in everything(assistant):
        asked.append(Asked(engine, assistant, question, image, **more))
        found += [] if together else [told(asked[-1])]
    if together:
        engine.start()
        found = [told(each) for each in asked]
    for ours, expected in zip(found, undrafted, strict=True):
        assert_alike(ours, expected)
    drafted, accepted = (
        sum(getattr(each.request, of) for each in asked) for of in ("drafted", "accepted")
    )
    assert 0 < accepted < drafted


def test_guesses_are_made_while_an_answer_is_alone(start, assistant, drafts):
    """A guess would take the place of somebody's token; or an answer that has been among others
    would never be guessed again, or its drafter not know what was said meanwhile."""
    engine, rows = start(later=True, drafts=drafts["right"]), []
    engine.on_step = lambda count, seconds: rows.append(count)
    short: list[Asked] = []

    def join() -> None:
        options = [{"max_new_tokens": 6, "min_new_tokens": 6}]
        short.append(Asked(engine, assistant, "Where is the ring?", None, options))

    options = [{"min_new_tokens": 60, "max_new_tokens": 60}]
    long = Asked(engine, assistant, "What is a ring?", None, options, at_first=join)
    engine.start()
    (events,), (others,) = long.all().values(), short[0].all().values()
    engine.drain(0)
    engine.join(PATIENCE)  # the last step is counted after its tokens are told
    assert "".join(e.text for e in events) == assistant.ask(None, "What is a ring?", **options[0])
    shared = rows.index(2), len(rows) - rows[::-1].index(2)
    assert shared[1] - shared[0] == rows.count(2) <= len(others) - 1
    request = long.request
    assert request.passes == len(rows) and not any(e.guessed for e in others)
    # the first is the prompt's; each pass makes one token beside what was guessed right
    assert [e.guessed for e in events].count(True) == request.accepted
    assert len(events) == 1 + request.passes + request.accepted
    assert any(e.guessed for e in events[-10:])  # alone again


class Listens(Spoilt):
    """Keeps what it is told."""

    def __init__(self, spoil):
        super().__init__("listens", Lookup(), spoil)
        self.heard = []

    def begin(self, prompt, sampler, pictures):
        draft = super().begin(prompt, sampler, pictures)
        learn = draft.accept

        def accept(ids, hidden):
            learn(ids, hidden)
            self.heard.append((ids, hidden))

        draft.accept = accept
        return draft


@pytest.mark.parametrize("spoil", [one_wrong, two_ways])
def test_a_drafter_hears_every_token_and_the_state_that_chose_the_last(start, assistant, spoil):
    """Medusa's heads would guess from the state of another token, or of somebody else's. While an
    answer is among others nothing is told, and then everything at once."""
    drafter = Listens(spoil)
    engine = start(later=True, drafts=Drafts(drafter, 8))
    join = partial(Asked, engine, assistant, "Where is the ring?", 2, [{"max_new_tokens": 6}])
    options = [{"min_new_tokens": 40, "max_new_tokens": 40}]
    asked = Asked(engine, assistant, "Describe this image.", 1, options, at_first=join)
    engine.start()
    (events,) = asked.all().values()
    said = [event.id for event in events]
    heard = [token_id for ids, _ in drafter.heard for token_id in ids]
    assert heard == said[: len(heard)] and len(heard) >= len(said) - 9  # not of the last pass
    assert asked.request.accepted > 0
    ends = assistant.model.config.eos_token_ids
    for ids, hidden in drafter.heard:
        logits = assistant.model.language_model.head(hidden)
        logits[list(ends)] = -torch.inf  # barred, since the answer is still too short
        assert int(logits.argmax()) == ids[-1]


def test_the_next_turn_finds_in_its_slot_what_was_said_and_nothing_else(start, assistant, drafts):
    """Guesses that were wrong would stay in the cache, and the next turn be answered from them."""
    question, found = "Describe this image.", []
    for guesses in (None, drafts["one is wrong"], drafts["two ways"]):
        engine = start(slots=1, drafts=guesses)
        first = Asked(engine, assistant, question, 1, [{"max_new_tokens": 20}])
        ids = [event.id for event in first.all()[0]]
        slot = engine.slots[0]
        assert len(slot.held) == slot.cache.length
        held = list(slot.held)
        again = Asked(engine, assistant, question, 1, prefix=ids)
        found.append((held, again.texts(), again.request.cached))
        assert again.request.cached == len(held)  # all but the last, of which logits are wanted
        assert found[-1] == found[0]
        assert guesses is None or 0 < first.request.accepted < first.request.drafted


def test_contrast_is_not_guessed(start, assistant, drafts):
    """Its two rows have a cache each, of different lengths."""
    engine = start(drafts=drafts["right"])
    asked = contrasted(engine, assistant, "Is it red?", M3ID(rate=0.1), [{"seed": 0}])
    path = SHAPES / "example-1.png"
    assert asked.texts() == [assistant.ask(path, "Is it red?", contrast=M3ID(rate=0.1))]
    assert (asked.request.drafted, asked.request.passes > 0) == (0, True)


def test_what_a_pass_made_before_it_failed_is_told_first(start, assistant, drafts):
    """Who asked would hear of the end and then of more words; or the next answer begin with what
    the failed pass has left in the cache."""
    engine = start(slots=1, drafts=drafts["right"])

    def spoil(layer, inputs, output):
        if output.shape[1] > 1:
            output[:, 1:] = torch.nan

    question = "What is a ring?"
    hook = assistant.model.language_model.lm_head.register_forward_hook(spoil)
    try:
        *told, failed = Asked(engine, assistant, question).all()[0]
    finally:
        hook.remove()
    assert isinstance(failed, Failed) and "not finite" in failed.message
    assert [e.guessed for e in told] == [False, True]  # the prompt's, and row 0 of the first pass
    assert (engine.slots[0].held, engine.slots[0].cache.length) == ([], 0)
    assert Asked(engine, assistant, question).texts() == [assistant.ask(None, question)]


def test_who_has_the_whole_answer_is_told_so_though_its_pass_fails(
    start, assistant, drafts, monkeypatch
):
    """An answer that is over is no longer there to be told of an error: its words were lost, and
    who asked waited for ever."""
    engine, question = start(slots=1, drafts=drafts["right"]), "What is a ring?"
    expected = [e.id for e in Asked(engine, assistant, question).all()[0]][:4]

    def fail(*given):
        monkeypatch.undo()
        raise RuntimeError("no memory")

    monkeypatch.setattr(engine_file, "settle", fail)
    events = Asked(engine, assistant, question, None, [{"max_new_tokens": 4}]).all()[0]
    assert [event.id for event in events] == expected  # by the prompt's pass and one over guesses
    assert events[-1].finish_reason == "length"
    assert Asked(engine, assistant, question).texts() == [assistant.ask(None, question)]


@pytest.mark.parametrize("fails", ["begin", "propose"])
def test_a_drafter_that_fails_ends_no_answer(start, assistant, fails):
    """Guesses decide nothing, but without memory for them the answer ended, and after three the
    server."""

    class Fails(Spoilt):
        def begin(self, prompt, sampler, pictures):
            draft = super().begin(prompt, sampler, pictures)
            draft.propose = self.fail
            return self.fail() if fails == "begin" else draft

        def fail(self, *given):
            raise MemoryError("for guesses")

    engine = start(drafts=Drafts(Fails("fails", Lookup(), one_wrong), 4))
    question = "What is a ring?"
    with pytest.warns(UserWarning, match=r"goes on without guesses: MemoryError\('for guesses'\)"):
        asked = [Asked(engine, assistant, question) for _ in range(4)]
        found = [each.texts() for each in asked]
    assert found == [[assistant.ask(None, question)]] * 4
    assert [each.request.drafted for each in asked] == [0] * 4


def test_a_drafter_that_sees_is_shown_the_pictures(start, assistant):
    """A small LLaVA would guess what it would say without the picture; or the map of a word that
    was guessed be that of the word before it."""
    shown, path = [], SHAPES / "example-1.png"

    def images() -> list:
        shown.append(path)
        return [path]

    found = []
    for drafts in (None, assistant.drafts(SHAPES, 4)):
        more = {"look": ([1, 3], [0, 2]), "images": images}
        asked = Asked(start(drafts=drafts), assistant, "Describe this image.", 1, **more)
        found.append(told(asked))
    assert_alike(found[1], found[0])
    assert shown == [path] and asked.request.accepted == asked.request.drafted > 0


def test_an_exact_engine_takes_no_drafts(assistant, drafts):
    """Its steps have a fixed number of rows, and a pass over guesses another."""
    with pytest.raises(ValueError, match="no drafts"):
        Engine(assistant.model, assistant.tokenizer, **SETTINGS, exact=True, drafts=drafts["right"])


@pytest.mark.slow
@pytest.mark.numeric
@pytest.mark.parametrize("name", ["lookup", "one is wrong"])
@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: "-".join(filter(None, p)))
def test_with_same_bits_drafts_change_no_bit(drafts, precision, name):
    """A guess that was right would give the next token other bits than a step does."""
    dtype, kind = precision
    one = minillava.load(SHAPES, device="cpu", dtype=dtype, quantize=kind)
    row_by_row.keep_bits(one.model)
    found = []
    for guesses in (None, drafts[name]):
        engine = Engine(one.model, one.tokenizer, **SETTINGS, drafts=guesses)
        cases = [(q, i, {"logprobs": 3, **more}) for q, i, more in everything(one)]
        asked = [Asked(engine, one, q, image, **more) for q, image, more in cases]
        engine.start()
        found.append([told(each) for each in asked])
        engine.drain(0)
        engine.join(PATIENCE)
    assert sum(each.request.drafted for each in asked) > 0
    for ours, theirs in zip(*found, strict=True):
        for one, other in zip(chain(*ours), chain(*theirs), strict=True):
            assert one[:4] == other[:4]
            assert (one.heat is None) == (other.heat is None)
            assert one.heat is None or torch.equal(one.heat, other.heat)
