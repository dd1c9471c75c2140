"""A conversation through one cache is the conversation from a fresh start; and the door: lines,
commands, Ctrl-C."""

import contextlib
import io
import json
import os
import select
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from bounds import assert_same_in_float64
from commands import start
from folders import change_config
from paths import REFERENCE, ROOT
from waiting import PATIENCE, wait_until

import minillava
from minillava.chat import conversation as conversing
from minillava.chat.conversation import Conversation
from minillava.cli.doors import enter
from minillava.fast.parallel import OthersEnded
from minillava.generate import speculate
from minillava.generate.generation import generate
from minillava.loop import steps

main = partial(enter, "chat")

WEIGHTS = str(REFERENCE / "plain")
PICTURE, OTHER = (
    str(REFERENCE / "pictures" / "square.png"),
    str(REFERENCE / "pictures" / "grey.png"),
)
BASE = ["--device", "cpu", "--dtype", "float32", "-n", "6"]
QUESTIONS = "What is it?", "What colour is it?", "And why is that?"
TEMPLATES = "llava_v1", "hf", "llava_v0", "llava_llama_2", "chatml_direct"


def load(template: str | None = None, weights=WEIGHTS):
    return minillava.load(weights, device="cpu", dtype="float32", template=template)


NOT_STUCK = torch.tensor([False])


@pytest.fixture
def watch(monkeypatch):
    """`watch(model)`: a dict of what goes on in it: "logits" of every step, "lengths" of every pass
    through the language model, "pictures" encoded, "ids" of the last prompt."""

    def watched(model) -> dict:
        seen = {"logits": [], "lengths": [], "pictures": 0, "ids": None}
        forward, encode = model.language_model.forward, model.encode_images

        def count_positions(inputs, *args, **options):
            seen["lengths"].append(inputs.shape[1])
            return forward(inputs, *args, **options)

        def count_pictures(pixels):
            seen["pictures"] += len(pixels)
            return encode(pixels)

        def keep_logits(model, spliced, *args, **options):
            seen["ids"] = spliced.token_ids[0].tolist()
            for first, end in reversed(spliced.image_spans[0]):
                seen["ids"][first:end] = [-200]
            for step in steps(model, spliced, *args, **options):
                seen["logits"].append(step.logits)
                yield step

        monkeypatch.setattr(model.language_model, "forward", count_positions)
        monkeypatch.setattr(model, "encode_images", count_pictures)
        monkeypatch.setattr(speculate, "steps", keep_logits)
        return seen

    return watched


# --- the conversation -----------------------------------------------------------------------------


@pytest.mark.numeric
@pytest.mark.parametrize("template", TEMPLATES)
def test_every_turn_is_that_of_a_fresh_start_and_reads_only_what_is_new(watch, template):
    """A stale cache would change a later answer, or every turn would read the picture anew."""
    assistant, again = (
        minillava.load(WEIGHTS, device="cpu", dtype="float64", template=template) for _ in range(2)
    )
    conversation, fresh_model = Conversation(assistant), again.model
    pixels = assistant.image_processor([PICTURE])
    seen = watch(assistant.model)
    conversation.add_image(PICTURE)
    before = 0
    for number, question in enumerate(QUESTIONS):
        seen["logits"].clear()
        seen["lengths"].clear()
        answer = conversation.ask(question, max_new_tokens=8)
        turn = conversation.turns[number]
        fresh = generate(
            fresh_model, [seen["ids"]], pixels, max_new_tokens=8, tokenizer=assistant.tokenizer, record="logits",
            stop=assistant.template.stop,
        )  # fmt: skip
        assert answer == turn.answer == fresh.text[0]
        ids = [int(logits.argmax()) for logits in seen["logits"]]
        assert ids == fresh.sequences[0].tolist()
        assert_same_in_float64(torch.stack(seen["logits"]), torch.stack(fresh.logits))

        total = fresh.image_spans[0][0][1] + len(seen["ids"]) - seen["ids"].index(-200) - 1
        assert (seen["lengths"][0], turn.reused + turn.prefilled) == (turn.prefilled, total)
        assert set(seen["lengths"][1:]) <= {1}
        # Nothing of the prompt before is read again, but for its last ids, which may be cut
        # otherwise with the answer.
        assert turn.reused >= before - 2
        before = total
    assert seen["pictures"] == 1


def test_an_answer_that_is_written_as_it_was_generated_is_not_read_again(assistant, monkeypatch):
    """The model's noise is not how its text would be cut into tokens; an answer as a real one
    is."""
    said = "the picture"
    conversation = Conversation(assistant)
    conversation.add_image(PICTURE)
    prompt = assistant.prompt("What?")
    ids = assistant.tokenizer.encode(prompt + " " + said)[len(assistant.tokenizer.encode(prompt)) :]
    forced = iter([*ids, assistant.model.config.eos_token_ids[0]])
    monkeypatch.setattr(
        "minillava.sampling.Sampler.__call__",
        lambda self, logits: (torch.tensor([next(forced)]), logits, NOT_STUCK),
    )
    assert conversation.ask("What?") == said
    forced = iter([assistant.model.config.eos_token_ids[0]])
    assert conversation.ask("Why?") == ""
    first, second = conversation.turns
    assert second.reused == first.prefilled + len(ids)
    # an empty answer is an answer
    assert [turn.finish_reason for turn in conversation.turns] == ["stop", "stop"]


def test_a_second_picture_in_a_later_turn(assistant, watch):
    """A picture of a later turn would take the first one's place, or be read as text."""
    seen = watch(assistant.model)
    conversation = Conversation(assistant, system="Hm.")
    conversation.add_image(PICTURE)
    conversation.ask("What is it?", max_new_tokens=5)
    conversation.add_image(OTHER)
    answer = conversation.ask("And <image>?", max_new_tokens=5)
    pixels = assistant.image_processor([PICTURE, OTHER])
    fresh = generate(
        assistant.model, [seen["ids"]], pixels, max_new_tokens=5, tokenizer=assistant.tokenizer
    )
    assert answer == fresh.text[0]
    assert conversation.turns[1].question == "And <image>?"
    assert conversation.turns[1].prefilled > assistant.model.config.tokens_per_image
    assert seen["pictures"] == 4  # two of them for the fresh start


def test_another_picture_at_the_same_place_is_not_taken_for_the_first(assistant):
    """The ids of two prompts agree while the pictures differ: the old one would be kept."""
    conversation = Conversation(assistant)
    conversation.add_image(PICTURE, "it.png")
    pieces = conversation.stream("What is it?", max_new_tokens=5)
    next(pieces)
    pieces.close()
    conversation.turns.clear()
    conversation.add_image(OTHER, "it.png")
    assert conversation.ask("What is it?", max_new_tokens=5) == assistant.ask(
        OTHER, "What is it?", max_new_tokens=5
    )
    assert conversation.turns[0].prefilled > assistant.model.config.tokens_per_image


def test_an_answer_left_early_is_the_turns_answer(assistant, watch):
    """After an interrupted answer the next question would follow words that nobody saw."""
    conversation = Conversation(assistant)
    conversation.add_image(PICTURE)
    pieces = conversation.stream("What is it?", max_new_tokens=50)
    said = next(pieces) + next(pieces) + next(pieces)
    pieces.close()
    assert said
    assert (conversation.turns[0].answer, conversation.turns[0].finish_reason) == (
        said,
        "interrupted",
    )
    seen = watch(assistant.model)
    answer = conversation.ask("Why?", max_new_tokens=5)
    pixels = assistant.image_processor([PICTURE])
    fresh = generate(
        assistant.model, [seen["ids"]], pixels, max_new_tokens=5, tokenizer=assistant.tokenizer
    )
    assert answer == fresh.text[0]


@pytest.fixture
def say_nothing(monkeypatch):
    """`say_nothing()`: while it is open, every token is <s>, which has no text."""

    @contextlib.contextmanager
    def silent():
        with monkeypatch.context() as patch:
            patch.setattr(
                "minillava.sampling.Sampler.__call__",
                lambda self, logits: (torch.tensor([1]), logits, NOT_STUCK),
            )
            yield

    return silent


def test_the_same_question_again_after_nothing_was_said(assistant, say_nothing):
    """All of its prompt is in the cache then; the last position is read again, for its logits."""
    conversation = Conversation(assistant)
    conversation.add_image(PICTURE)
    with say_nothing():
        pieces = conversation.stream("What is it?")
        assert next(pieces) == ""
        pieces.close()
    assert (conversation.turns, len(conversation.waiting)) == ([], 1)
    assert conversation.ask("What is it?", max_new_tokens=5) == assistant.ask(
        PICTURE, "What is it?", max_new_tokens=5
    )
    assert conversation.turns[0].prefilled == 1


@pytest.mark.parametrize("end", ["close", "go on"])
@pytest.mark.parametrize("then", ["ask", "stop", "refuse", "clear"])
@pytest.mark.parametrize("silent", [False, True])
def test_an_old_stream_leaves_the_newer_conversation_alone(
    assistant, say_nothing, silent, then, end
):
    """Closing an old stream late would change the turns that came after it."""
    conversation, fresh = Conversation(assistant), Conversation(assistant)
    for each in (conversation, fresh):
        each.add_image(PICTURE)
    with say_nothing() if silent else contextlib.nullcontext():
        old = conversation.stream("What is it?", max_new_tokens=50)
        said = next(old)
        assert bool(said) != silent
        # an interruption before the first word leaves the turn that was there before
        if then == "stop":
            newer = conversation.stream("Why?")
            with say_nothing():
                next(newer)
            newer.close()
    if then == "ask":
        conversation.ask("Why?", max_new_tokens=5)
    elif then == "refuse":
        with pytest.raises(ValueError, match="empty"):
            conversation.ask("")
    elif then == "clear":
        conversation.clear()
    if end == "close":
        old.close()
    else:
        with pytest.raises(
            ValueError, match=r"went on without the answer to 'What is it\?'; ask again"
        ):
            next(old)
    if then == "clear":
        assert (conversation.turns, conversation.waiting) == ([], [])
        return
    if not silent:
        pieces = fresh.stream("What is it?", max_new_tokens=50)
        next(pieces)
        pieces.close()
    if then == "ask":
        fresh.ask("Why?", max_new_tokens=5)
    for each in (conversation, fresh):
        each.ask("What colour is it?", max_new_tokens=5)
    told = [
        [(t.question, t.answer, t.finish_reason) for t in each.turns]
        for each in (conversation, fresh)
    ]
    assert told[0] == told[1]
    assert conversation.waiting == []


def test_an_old_stream_does_not_end_a_newer_one(assistant):
    """Closing an old stream would end the answer that is being written."""
    conversation = Conversation(assistant)
    old = conversation.stream("What is it?", max_new_tokens=5)
    next(old)
    newer = conversation.stream("Why?", max_new_tokens=5)
    said = next(newer)
    old.close()
    assert said + "".join(newer) == conversation.turns[1].answer
    assert [turn.finish_reason for turn in conversation.turns] == ["interrupted", "length"]


def test_a_finished_stream_ends_quietly_after_another_question(assistant):
    """The end of an old stream would raise, or be booked on the newer turn."""
    conversation = Conversation(assistant)
    old = conversation.stream("What is it?", max_new_tokens=1)
    next(old)
    conversation.ask("Why?", max_new_tokens=2)
    assert list(old) == []
    assert [turn.finish_reason for turn in conversation.turns] == ["length", "length"]


@pytest.mark.parametrize("layer", [0, 1])
def test_interrupted_while_it_reads_the_question_was_not_asked(assistant, monkeypatch, layer):
    """Some layers have written their keys then, others have not."""
    conversation = Conversation(assistant)
    conversation.ask("Hello.", max_new_tokens=4)
    conversation.add_image(PICTURE)
    with monkeypatch.context() as patch:

        def interrupted(*_):
            raise KeyboardInterrupt

        patch.setattr(assistant.model.language_model.layers[layer].mlp, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            conversation.ask("What is it?", max_new_tokens=4)
    assert (len(conversation.turns), len(conversation.waiting)) == (1, 1)
    other = Conversation(assistant)
    other.ask("Hello.", max_new_tokens=4)
    other.add_image(PICTURE)
    assert conversation.ask("What?", max_new_tokens=6) == other.ask("What?", max_new_tokens=6)


def test_the_cache_grows_as_it_is_needed(assistant, monkeypatch):
    """A cache that grows would lose what it held, or take the whole context's memory at once."""
    expected = assistant.ask(PICTURE, "What is it?", max_new_tokens=40)
    monkeypatch.setattr(conversing, "GROWTH", 16)
    conversation = Conversation(assistant)
    conversation.add_image(PICTURE)
    assert conversation.ask("What is it?", max_new_tokens=40) == expected
    assert (
        conversation.cache.length
        <= conversation.cache.capacity
        < conversation.cache.length + 2 * 16
    )


@pytest.fixture
def endless(folder):
    """A checkpoint whose answers never end by themselves."""
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 447}), encoding="utf-8"
    )
    return folder


@pytest.fixture
def short(endless):
    """One whose context holds 150 positions."""
    change_config(endless, text_config={"max_position_embeddings": 150})
    return str(endless)


def test_a_full_context_is_refused_with_the_numbers_and_clear_helps(short):
    """A full context would cut the question, or leave a session that /clear cannot save."""
    conversation = Conversation(load(weights=short))
    conversation.add_image(PICTURE)
    conversation.ask("What?", max_new_tokens=1000)
    assert (conversation.turns[0].finish_reason, conversation.room) == ("length", 0)
    assert conversation.cache.capacity == 150
    conversation.add_image(OTHER)
    with pytest.raises(
        ValueError, match=r"takes \d{3} positions, the model's context holds 150 .* /clear"
    ):
        conversation.ask("Why?")
    assert (len(conversation.turns), len(conversation.waiting)) == (1, 1)
    conversation.clear()
    assert conversation.ask("What?", max_new_tokens=3)


def test_a_template_of_one_turn_says_so():
    """A template of one turn would drop the first question in silence."""
    conversation = Conversation(load("plain"))
    conversation.ask("a dog", max_new_tokens=2)
    with pytest.raises(ValueError, match="this template holds one turn"):
        conversation.ask("a cat", max_new_tokens=2)


def test_wrong_questions_change_nothing(assistant):
    """A refused question would stay in the conversation and spoil the next answer."""
    conversation = Conversation(assistant)
    for wrong, message in (
        ("", "empty"),
        ("Is <image> red?", "places 1 picture"),
        ("\udcff", "not UTF-8"),
    ):
        with pytest.raises(ValueError, match=message):
            conversation.ask(wrong)
    with pytest.raises(TypeError):
        conversation.ask("What?", max_tokens=3)
    with pytest.raises(ValueError, match="num_return_sequences is 2"):
        conversation.ask("What?", temperature=1, num_return_sequences=2)
    assert conversation.turns == []


# --- the door -------------------------------------------------------------------------------------


@pytest.fixture
def talk(run_main, monkeypatch):
    """`talk(text, *arguments)`: a piped session in this process -> (exit status, stdout,
    stderr)."""

    def piped(text: str | bytes, *arguments: str, weights: str = WEIGHTS) -> tuple[int, str, str]:
        content = text if isinstance(text, bytes) else text.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
        return run_main(main, "-m", weights, *BASE, *arguments)

    return piped


@pytest.fixture(scope="module")
def expected(assistant):
    """Answers to QUESTIONS about PICTURE."""
    conversation = Conversation(assistant)
    conversation.add_image(PICTURE)
    return [conversation.ask(question, max_new_tokens=6) for question in QUESTIONS]


@pytest.mark.parametrize("end", ["", "\n", "\n\n  \n/quit\nnever\n", "\n/exit"])
def test_a_pipe_gets_answers_and_nothing_else(talk, expected, end):
    """Prompts and notes would stand among the answers in a pipe."""
    assert len(set(expected)) == 3
    status, out, err = talk("\n".join(QUESTIONS) + end, "-i", PICTURE)
    assert (status, out, err) == (0, "".join(f"{answer}\n" for answer in expected), "")


def test_no_lines_no_answer(talk):
    """An empty input would be asked as an empty question."""
    assert talk("", "-i", PICTURE) == (0, "", "")


def test_image_and_clear(talk, expected, assistant):
    """/clear would keep the picture, so that the next answer is still about it."""
    status, out, err = talk(f"/image {PICTURE}\n{QUESTIONS[0]}\n/clear\n{QUESTIONS[0]}\n", "-v")
    without = assistant.ask(None, QUESTIONS[0], max_new_tokens=6)
    assert (status, out) == (0, f"{expected[0]}\n{without}\n")
    assert f"{PICTURE}: 16 positions" in err
    assert "pictures are forgotten" in err


def test_verbose_counts_positions(talk, expected):
    """--verbose would not tell what was reused, nor the seed that repeats an answer."""
    status, out, err = talk("\n".join(QUESTIONS), "-i", PICTURE, "-v")
    assert (status, out) == (0, "".join(f"{answer}\n" for answer in expected))
    stages = [line.split()[0] for line in err.splitlines()]
    assert stages == ["load", "encode", *["prefill", "decode"] * 3]
    assert " 0 positions reused, " in err
    assert err.count(" prefilled, first token") == 3
    err = talk(QUESTIONS[0], "-v", "--temperature", "1", "--seed", "11")[2]
    assert "ended by length, seed 11\n" in err


@pytest.mark.parametrize(
    "spelled", ["/image '{}'", '/image "{}" ', "/image file://{}", "'{}'", "{}"]
)
def test_a_dropped_picture_is_added_and_said(talk, expected, tmp_path, spelled):
    """Quotes were part of the name, and success was silent."""
    path = tmp_path / "a b.png"
    shutil.copy(PICTURE, path)
    line = spelled.format(str(path).replace(" ", "%20") if "file:" in spelled else path)
    assert talk(f"{line}\n{QUESTIONS[0]}\n") == (
        0,
        f"{expected[0]}\n",
        "note: 1 picture waits for the next question: a b.png\n",
    )


def test_a_question_behind_a_dropped_picture_is_asked(talk, expected, tmp_path):
    """The question typed after a dropped file would be lost, or taken for a part of its name."""
    path = tmp_path / "a b.png"
    shutil.copy(PICTURE, path)
    assert talk(f"'{path}' {QUESTIONS[0]}\n") == (
        0,
        f"{expected[0]}\n",
        "note: 1 picture waits for the next question: a b.png\n",
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_stdout_that_is_full_ends_the_session_by_its_name(talk, monkeypatch):
    """It was reported as the question's own error, without a name, for each question anew."""
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        status, _, err = talk("\n".join(QUESTIONS), "-q", "-i", PICTURE)
        monkeypatch.undo()
    assert status == 1
    assert err.startswith("error: stdout: No space left on device; ")
    assert err.count("\n") == 1


def test_when_another_process_has_ended_so_does_the_session(talk, monkeypatch):
    """Every later question was read and refused in the same words, as if it were its own fault."""

    def ended(self, *_, **__):
        raise OthersEnded

    monkeypatch.setattr(Conversation, "stream", ended)
    status, out, err = talk("\n".join(QUESTIONS), "-q", "-i", PICTURE)
    assert (status, out, err) == (1, "", f"error: {OthersEnded()}\n")


def test_several_dropped_pictures_are_all_added_or_none(talk, assistant, tmp_path):
    """One wrong path of several would leave the others added, unnoticed."""
    path = tmp_path / "a b.png"
    shutil.copy(PICTURE, path)
    pictures = f"'{path}' {PICTURE}"
    status, out, err = talk(f"/image {pictures}\n{QUESTIONS[0]}\n")
    assert (status, out) == (
        0,
        assistant.ask([PICTURE, PICTURE], QUESTIONS[0], max_new_tokens=6) + "\n",
    )
    assert "note: 2 pictures wait for the next question: a b.png, " in err
    assert err.count("note: several pictures in one prompt: ") == 1
    status, out, err = talk(f"/image {pictures} nowhere.png\n{QUESTIONS[0]}\n")
    assert (status, out) == (1, assistant.ask(None, QUESTIONS[0], max_new_tokens=6) + "\n")
    assert err == "error: nowhere.png: no such picture; check the path\n"


def test_save_to_a_minus_asks_for_a_name(talk, tmp_path, monkeypatch):
    """It wrote a file of that name."""
    monkeypatch.chdir(tmp_path)
    status, out, err = talk("/save -\n")
    assert (status, out, os.listdir()) == (1, "", [])
    assert err == "error: /save -: give a name; ./- is a file that is named so\n"
    assert talk("/save ./-\n")[0] == 0
    assert os.listdir() == ["-"]


def test_save_takes_a_quoted_path(talk, tmp_path):
    """The quotes around a path with a space would become part of the file's name."""
    assert talk(f"/save '{tmp_path / 'a b.json'}'\n/save {tmp_path / 'c d.json'}\n")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a b.json", "c d.json"]


def test_help_goes_to_stderr_and_names_every_command(talk):
    """/help would put its text among the answers, or leave a command out."""
    status, out, err = talk("/help\n")
    assert (status, out) == (0, "")
    for command in ("/image", "/clear", "/save", "/help", "/quit", "/exit"):
        assert command in err
    assert all(line in talk("", "--help")[1] for line in err.splitlines())


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("/imaeg x", "/imaeg: no such command; /help"),
        ("/image", "/image needs a path"),
        ("/save ", "/save needs a path"),
        ("/image nowhere.png", "nowhere.png: no such picture; check the path"),
        ("/nowhere/x.png", "/nowhere/x.png: no such picture; check the path"),
        ("'/nowhere/a b.png'", "/nowhere/a b.png: no such picture; check the path"),
        ("/save nowhere/x.json", "nowhere"),
        ("Is <image> red?", "places 1 picture(s) with <image> but 0 picture(s) were given"),
        (b"\xff", "not UTF-8"),
        (b"a\0b", "NUL bytes"),  # it ended the session
        (b"/save a\0b", "NUL bytes"),
    ],
)
def test_what_is_wrong_is_one_line_and_the_session_goes_on(talk, assistant, line, found):
    """A mistyped line would end the session or be asked as a question; a NUL byte ended it."""
    line = line if isinstance(line, bytes) else line.encode()
    status, out, err = talk(line + f"\n{QUESTIONS[0]}\n".encode())
    assert (status, out) == (1, assistant.ask(None, QUESTIONS[0], max_new_tokens=6) + "\n")
    assert (err.count("\n"), err[:7]) == (1, "error: ")
    assert found in err


def test_save_writes_the_conversation_and_overwrites_only_its_own_file(talk, expected, tmp_path):
    """/save would overwrite a file that the session did not write."""
    path, foreign = tmp_path / "talk.json", tmp_path / "foreign.json"
    foreign.write_text("mine")
    script = f"{QUESTIONS[0]}\n/save {path}\n{QUESTIONS[1]}\n/save {path}\n/save {foreign}\n"
    status, out, err = talk(script, "-i", PICTURE, "--template", "llava_v1", "--system", "")
    assert (status, foreign.read_text()) == (1, "mine")
    assert [line for line in err.splitlines() if line.startswith("error: ")] == [
        f"error: {foreign}: exists already; choose another name"
    ]
    assert sorted(tmp_path.iterdir()) == [foreign, path]
    answers = out.splitlines()
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "minillava": minillava.__version__,
        "weights": WEIGHTS,
        "template": "llava_v1",
        "system": "",
        "turns": [
            {
                "question": f"<image>\n{QUESTIONS[0]}",
                "images": [PICTURE],
                "answer": answers[0],
                "finish_reason": "length",
                "options": {"max_new_tokens": 6, "seed": 0},
            },
            {
                "question": QUESTIONS[1],
                "images": [],
                "answer": answers[1],
                "finish_reason": "length",
                "options": {"max_new_tokens": 6, "seed": 0},
            },
        ],
    }


def test_what_was_sampled_can_be_repeated_from_what_was_saved(talk, assistant, tmp_path):
    """A saved conversation would lack the seed or an option that its answers came from."""
    path = tmp_path / "talk.json"
    talk(
        "\n".join(QUESTIONS) + f"\n/save {path}",
        "-i",
        PICTURE,
        "--temperature",
        "1.5",
        "--top-k",
        "40",
        "--stop",
        "!!",
    )
    again = Conversation(assistant)
    for turn in json.loads(path.read_text(encoding="utf-8"))["turns"]:
        assert set(turn["options"]) == {"max_new_tokens", "temperature", "top_k", "stop", "seed"}
        for image in turn["images"]:
            again.add_image(image)
        assert again.ask(turn["question"], **turn["options"]) == turn["answer"]
    assert len({turn.options.seed for turn in again.turns}) == 3


@pytest.mark.skipif(
    sys.platform != "linux", reason="needs a file system where any bytes are a name"
)
def test_a_picture_whose_name_is_not_utf8_can_be_saved(talk, tmp_path):
    """/save would fail at a picture whose name is not UTF-8."""
    name = os.fsencode(tmp_path) + b"/\xe9.png"
    shutil.copy(PICTURE, name)
    script = b"/image " + name + f"\n{QUESTIONS[0]}\n/save {tmp_path / 'talk.json'}\n".encode()
    assert talk(script)[0] == 0
    saved = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert [os.fsencode(image) for image in saved["turns"][0]["images"]] == [name]


@pytest.mark.parametrize("line", [" /quit", "\t/exit "])
def test_blanks_before_a_command(talk, line):
    """A command after a blank would be asked as a question."""
    assert talk(f"{line}\n{QUESTIONS[0]}\n") == (0, "", "")


def test_ctrl_c_in_a_pipe_ends_the_session_with_130(talk, expected, monkeypatch):
    """In a pipe Ctrl-C would end one answer only, and the script would go on."""
    original, asked = Conversation.stream, []

    def interrupted(self, question, **options):
        asked.append(question)
        for piece in original(self, question, **options):
            yield piece
            if len(asked) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "stream", interrupted)
    status, out, err = talk("\n".join(QUESTIONS), "-i", PICTURE)
    first, second, rest = out.split("\n")
    assert (status, asked, err.strip()) == (130, list(QUESTIONS[:2]), "")
    assert (first, rest) == (expected[0], "")
    assert expected[1].startswith(second)


def test_a_full_context_is_one_line_with_what_to_do(talk, short):
    """A full context would not say that /clear helps, or end the session."""
    script = f"{QUESTIONS[0]}\n{QUESTIONS[1]}\n/clear\n{QUESTIONS[0]}\n"
    status, _, err = talk(script, "-i", PICTURE, "-q", "-n", "1000", weights=short)
    assert (status, err.count("\n")) == (1, 1)
    assert "context holds 150" in err
    assert "/clear" in err
    err = talk(QUESTIONS[0], "-i", PICTURE, "-n", "1000", weights=short)[2]
    assert err == "note: the model's context of 150 positions is full; /clear starts anew\n"


def test_an_unexpected_error_does_not_lose_the_session(talk, expected, monkeypatch, tmp_path):
    """An unexpected error would throw the conversation away before it can be saved."""
    calls = []

    def broken(self, source, name=None, more=False):
        calls.append(name)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Conversation, "add_image", broken)
    status, _, err = talk(f"{QUESTIONS[0]}\n/image {PICTURE}\n/save {tmp_path / 'a.json'}\n")
    assert (status, calls) == (1, [PICTURE])
    assert "error: RuntimeError: out of memory (unexpected: --verbose shows where)\n" in err
    assert (tmp_path / "a.json").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "found"),
    [
        (["-i", "-"], 2, "stdin"),
        (["-n", "0"], 2, "max_new_tokens is 0"),
        (["-i", "nowhere.png"], 1, "no such picture"),
    ],
)
def test_wrong_arguments(talk, arguments, status, found):
    """A wrong argument would show a traceback, or open a session that cannot answer."""
    assert talk("What?\n", *arguments)[:2] == (status, "")
    err = talk("What?\n", *arguments)[2]
    assert err.count("\n") == 1
    assert found in err


# --- in a process of its own, at a terminal -------------------------------------------------------


@pytest.fixture
def terminal(endless):
    """A session whose stdin is a terminal, with an answer that takes minutes: (process, the
    terminal's other end)."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    arguments = ["-m", endless, *BASE, "-n", "4000", "-i", PICTURE]
    process = start("minillava.chat", *arguments, stdin=theirs)
    os.close(theirs)
    yield process, ours
    os.close(ours)
    process.kill()
    process.wait()
    process.stdout.close()
    process.stderr.close()


def read_until(stream, text: bytes) -> bytes:
    """Byte by byte: what comes behind `text` is for the next to read."""
    found = b""
    while text not in found:
        assert select.select([stream], [], [], PATIENCE)[0], found
        more = os.read(stream.fileno(), 1)
        assert more, found
        found += more
    return found


def test_ctrl_c_stops_the_answer_and_keeps_the_session_and_leaves_at_the_second(terminal, tmp_path):
    """One Ctrl-C at the prompt, so also the second of two during an answer, threw the conversation
    away."""
    process, typing = terminal
    read_until(process.stderr, b"> ")
    os.write(typing, b"What is it?\n")
    printed = os.read(process.stdout.fileno(), 1)
    process.send_signal(signal.SIGINT)
    read_until(process.stderr, b"stopped; what it said is kept\n> ")
    path = tmp_path / "talk.json"
    os.write(typing, f"/save {path}\n".encode())
    read_until(process.stderr, b"1 turn(s) written")
    turn = json.loads(path.read_text(encoding="utf-8"))["turns"][0]
    assert (turn["question"], turn["finish_reason"]) == ("<image>\nWhat is it?", "interrupted")
    read_until(process.stderr, b"> ")
    process.send_signal(signal.SIGINT)
    assert b"note: Ctrl-D leaves; so does a second Ctrl-C\n" in read_until(process.stderr, b"> ")
    os.write(typing, b"/help\n")  # whoever goes on has not left with one foot
    read_until(process.stderr, b"\n> ")
    process.send_signal(signal.SIGINT)
    assert b"note: Ctrl-D leaves; so does a second Ctrl-C\n" in read_until(process.stderr, b"> ")
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    printed = (printed + rest).decode()
    assert printed.endswith("\n")
    # stopped between the token and its printing, at most one piece more
    assert turn["answer"].startswith(printed[:-1])


@pytest.mark.slow
def test_the_end_of_the_input_leaves_with_0(terminal):
    """Ctrl-D at the prompt would be reported as a failure, or print on stdout."""
    process, typing = terminal
    assert b"each line is a question; /help lists the commands\n> " in read_until(
        process.stderr, b"> "
    )
    os.write(typing, b"\x04")
    out, _ = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (0, b"")


@pytest.mark.skipif(
    not os.path.exists("/proc/self/stat"), reason="needs /proc to see when it waits for a key"
)
def test_line_editing_at_a_real_terminal(tmp_path):
    """Ctrl-C on a half-typed line clears it, each time; Tab completes a path with a space; a pasted
    paragraph is one question."""
    pty = pytest.importorskip("pty")
    pytest.importorskip("readline")
    shutil.copy(PICTURE, tmp_path / "a b.png")
    command = [sys.executable, "-m", "minillava.chat", "-m", WEIGHTS, *BASE]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    child, typing = pty.fork()
    if child == 0:
        try:
            os.chdir(tmp_path)
            os.execve(sys.executable, command, environment)
        finally:
            os._exit(127)
    with os.fdopen(typing, "r+b", buffering=0) as screen:

        def see(text: bytes) -> None:
            found = b""
            while text not in found:
                assert select.select([screen], [], [], PATIENCE)[0], found
                found += os.read(typing, 1)

        def interrupt() -> None:
            """Once it waits: Python notices a signal while readline works on a key only with the
            next key."""
            state = Path(f"/proc/{child}/stat")
            wait_until(lambda: state.read_text().rpartition(") ")[2][0] == "S", pause=0.01)
            screen.write(b"\x03")

        see(b"note: no picture yet: /image PATH adds one")
        see(b"> ")
        for _ in range(3):
            screen.write(b"half a line")
            see(b"half a line")
            interrupt()
            see(b"note: Ctrl-D leaves")
            see(b"> ")
        screen.write(b"/ima\ta\t\r")
        see(b"1 picture waits for the next question: a b.png")
        see(b"> ")
        screen.write(b"\x1b[200~Is it\nred?\x1b[201~")
        see(b"red?")
        screen.write(b"\r")
        see(b"> ")
        screen.write(b"/save talk.json\r")
        see(b"1 turn(s) written")
        see(b"> ")
        interrupt()
        see(b"note: Ctrl-D leaves")
        see(b"> ")
        interrupt()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    (turn,) = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))["turns"]
    assert (turn["question"], turn["images"]) == ("<image>\nIs it\nred?", ["a b.png"])
