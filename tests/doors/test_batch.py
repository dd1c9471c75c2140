"""Files of questions: what is written, in which order, and that a run killed at any time loses and
repeats nothing."""

import base64
import contextlib
import io
import json
import multiprocessing
import os
import queue
import random
import threading
import time
from functools import cache, partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from paths import REFERENCE
from waiting import PATIENCE, wait_until

from minillava.batch import run as batch
from minillava.batch.flags import make_parser
from minillava.batch.journal import Journal
from minillava.batch.questions import Question, read_questions
from minillava.batch.run import WINDOW, plan, read_prompts
from minillava.batch.together import Together
from minillava.cli.doors import enter
from minillava.cli.messages import Messages, duration
from minillava.files import disk
from minillava.generate.contrast import METHODS
from minillava.generate.engine import Failed, Refused, Token
from minillava.llava import Llava

main = partial(enter, "batch")

WEIGHTS, PICTURES = str(REFERENCE / "plain"), str(REFERENCE / "pictures")
NAMES = ("square.png", "grey.png", "landscape.png", "portrait.png")
LENGTH = 6
KILLS = 4
BASE = [
    "-m",
    WEIGHTS,
    "--device",
    "cpu",
    "--dtype",
    "float32",
    "-n",
    str(LENGTH),
    "--images",
    PICTURES,
]


def lines(count: int) -> list[dict]:
    """Questions of many lengths, two on each picture, every ninth without one."""
    questions = [
        {
            "question_id": f"q{i}",
            "image": NAMES[i // 2 % 4],
            "text": "What is it? " + "Look. " * (i * 7 % 11),
        }
        for i in range(count)
    ]
    return [{**q, "image": None} if i % 9 == 8 else q for i, q in enumerate(questions)]


def write(path: Path, questions: list[dict | str | bytes]) -> None:
    encoded = [
        json.dumps(question).encode() if isinstance(question, dict) else question
        for question in questions
    ]
    path.write_bytes(b"".join(line + b"\n" for line in encoded))


@pytest.fixture
def run(tmp_path, run_main):
    """`run(questions, *arguments)`: the command in this process -> (exit status, records,
    stderr)."""

    def in_process(
        questions: list[dict | bytes] | None, *arguments: str
    ) -> tuple[int, list[dict] | None, str]:
        if questions is not None:
            write(tmp_path / "q.jsonl", questions)
        files = ["--questions", str(tmp_path / "q.jsonl"), "--answers", str(tmp_path / "a.jsonl")]
        status, out, err = run_main(main, *BASE, *files, *arguments)
        assert out == ""
        answers = tmp_path / "a.jsonl"
        return (
            status,
            list(map(json.loads, answers.read_text().splitlines())) if answers.exists() else None,
            err,
        )

    return in_process


def expected(assistant, question: dict, **options) -> str:
    return asked(assistant, question.get("image"), question["text"], **options)


@cache  # many tests ask the same questions
def asked(assistant, image: str | None, text: str, **options) -> str:
    picture = image and os.path.join(PICTURES, image)
    return assistant.ask(picture, text, max_new_tokens=LENGTH, **options)


# --- answers --------------------------------------------------------------------------------------


def test_the_records_are_those_that_llavas_scripts_read_and_nothing_else_is_left(run, tmp_path):
    """A field of another name would break LLaVA's scripts, and the journal would be left behind."""
    questions = [
        {"question_id": 7, "image": "grey.png", "text": "Was ist das für ein Bild?", "label": "no"}
    ]
    status, records, err = run(questions)
    assert (status, err) == (0, f"note: 1 answer in {tmp_path}/a.jsonl\n")
    assert [list(record) for record in records] == [
        ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    ]
    record = records[0]
    assert (record["question_id"], record["prompt"], record["model_id"]) == (
        7,
        questions[0]["text"],
        "plain",
    )
    assert record["metadata"] == {"finish_reason": "length"}  # an answer that -n cut
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "q.jsonl"]


@pytest.mark.parametrize("size", [1, 3, 8, 50])
def test_batches_answer_as_one_by_one_and_in_the_order_of_the_questions(
    run, assistant, size, tmp_path
):
    """A batch sorts its questions by length: its answers could differ or lie in that order."""
    questions = lines(23)
    status, records, err = run(questions, "--batch-size", size)
    assert (status, err) == (0, f"note: 23 answers in {tmp_path}/a.jsonl\n")
    assert [record["question_id"] for record in records] == [
        question["question_id"] for question in questions
    ]
    assert [record["text"] for record in records] == [
        expected(assistant, question) for question in questions
    ]
    assert len({record["answer_id"] for record in records}) == len(questions)


def test_batches_are_of_similar_length_and_neighbours_stay_near(assistant):
    """A short question beside a long one would be padded, and a far one hold back the file."""
    questions = read_questions(b"\n".join(json.dumps(q).encode() for q in lines(200)), PICTURES)
    prompts = read_prompts(assistant, questions, None)
    batches = plan(assistant, questions, prompts, LENGTH, 4)
    assert sorted(question.line for some in batches for question in some) == list(range(1, 201))
    spread = [max(len(q.text) for q in some) - min(len(q.text) for q in some) for some in batches]
    with_pictures = [
        width for width, some in zip(spread, batches, strict=True) if all(q.images for q in some)
    ]
    # of the 60 letters between the shortest and the longest
    assert sum(with_pictures) / len(with_pictures) < 10 < 60
    assert all(abs(a.line - b.line) < WINDOW * 4 for some in batches for a in some for b in some)


def test_questions_with_different_room_do_not_share_a_batch(assistant):
    """Near the end of the context a long neighbour would shorten an answer."""
    questions = [Question(i, i, "x " * i) for i in range(1, 5)]
    lengths = [
        len(assistant.tokenizer.encode(assistant.prompt(q.text, images=0))) for q in questions
    ]
    context = assistant.model.config.text.max_position_embeddings
    longest = context - lengths[1]  # the third and the fourth have less room than that
    prompts = read_prompts(assistant, questions, None)
    batches = plan(assistant, questions, prompts, longest, 8)
    assert [[question.line for question in some] for some in batches] == [[4], [3], [2, 1]]


def test_questions_may_share_an_id_and_name_several_pictures_or_none(run, assistant):
    """Questions that share an id would be taken for one, or get one another's pictures."""
    questions = [
        {"question_id": 1, "image": ["square.png", "grey.png"], "text": "Which is brighter?"},
        {"question_id": 1, "text": "Hello?"},
        {"question_id": 1, "image": str(REFERENCE / "pictures" / "grey.png"), "text": "Hello?"},
        {"question_id": 1, "image": "grey.png", "text": "Hello?"},
    ]
    status, records, _ = run(questions)
    assert (status, len(records), len({record["answer_id"] for record in records})) == (0, 4, 4)
    both = [os.path.join(PICTURES, name) for name in ("square.png", "grey.png")]
    assert records[0]["text"] == assistant.ask(both, "Which is brighter?", max_new_tokens=LENGTH)
    assert records[2]["text"] == records[3]["text"] == expected(assistant, questions[3])


def test_ids_that_repeat_get_a_note(run):
    """Ids that repeat, which no scorer can tell apart, would pass without a word."""
    twice = [{"question_id": name, "text": "Hello?"} for name in (1, 2, 1, "1")]
    assert "note: 1 question_id(s) stand on more than one question (1, for one)" in run(twice)[2]
    assert "question_id(s)" not in run(twice[:2], "--overwrite")[2]


def test_pictures_inside_the_file_and_by_url(run, assistant):
    """They were joined to the folder, and the whole of a picture stood in the error."""
    path = REFERENCE / "pictures" / "grey.png"
    inside = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    question = {"question_id": 1, "text": "Hello?", "image": "grey.png"}
    status, records, _ = run([{**question, "image": url} for url in (inside, path.as_uri())])
    assert status == 0
    assert {record["text"] for record in records} == {expected(assistant, question)}
    damaged = [{**question, "image": inside.replace(",", ",*")}, {**question, "image": "x" * 99999}]
    status, records, _ = run(damaged, "--overwrite")
    assert status == 1
    assert max(len(record["error"]) for record in records) < 400


def test_samples_depend_on_the_line_and_not_on_the_batch(run, assistant):
    """Another batch size would sample other answers, so that no run could be repeated."""
    questions = lines(10)
    sampling = ["--temperature", "1.5", "--seed", "40"]
    _, records, _ = run(questions, *sampling, "--batch-size", "4")
    found = [record["text"] for record in records]
    assert found == [
        expected(assistant, question, temperature=1.5, seed=40 + number)
        for number, question in enumerate(questions, start=1)
    ]
    _, records, _ = run(None, *sampling, "--batch-size", "1", "--overwrite")
    assert found == [record["text"] for record in records]
    _, records, _ = run(None, "--temperature", "1.5", "--overwrite")
    assert records[0]["text"] == expected(assistant, questions[0], temperature=1.5, seed=1)


def test_template_system_beams_and_contrast_reach_the_answers(run, assistant):
    """A flag would be accepted and not reach the answers."""
    questions = lines(3)
    for flags, options in (
        (["--system", "Hm."], {"system": "Hm."}),
        (["--num-beams", "3"], {"num_beams": 3}),
        (["--contrast", "m3id"], {"contrast": METHODS["m3id"]()}),
    ):
        _, records, _ = run(questions, *flags, "--overwrite")
        assert [r["text"] for r in records] == [
            expected(assistant, question, **options) for question in questions
        ]
    _, records, _ = run(questions, "--template", "plain", "--overwrite")
    assert [r["text"] for r in records] != [expected(assistant, question) for question in questions]


@pytest.mark.parametrize("method", ["vcd", "ritual"])
def test_contrast_changes_the_picture_by_each_question_s_own_seed(run, assistant, method):
    """The changed pixels of a square were asked whether they are true, which ended the command."""
    questions = lines(3)
    status, records, _ = run(questions, "--contrast", method, "--seed", "5")
    assert status == 0
    assert [record["text"] for record in records] == [
        expected(assistant, question, contrast=method, seed=5 + number)
        for number, question in enumerate(questions, start=1)
    ]


@pytest.mark.parametrize(("size", "encoded"), [(4, 4), (1, 12), (0, 12)])
def test_a_picture_of_many_questions_is_encoded_once(run, monkeypatch, size, encoded):
    """A picture with many questions would be encoded anew for each of them."""
    made = []
    original = Llava.encode_images
    monkeypatch.setattr(Llava, "encode_images", lambda *a: made.append(a) or original(*a))
    questions = [{"question_id": i, "image": NAMES[i % 4], "text": "What?"} for i in range(12)]
    assert run(questions, "--image-cache", size, "--batch-size", "2")[0] == 0
    assert len(made) == encoded


def test_an_empty_file_and_blank_lines(run):
    """A blank line would be an error in the answers, and an empty file would fail."""
    assert run([])[:2] == (0, [])
    question = {"question_id": 1, "text": "Hello?"}
    status, records, _ = run(
        [b"", question, b" \r", {**question, "question_id": 2}, b""], "--overwrite"
    )
    assert (status, [record["question_id"] for record in records]) == (0, [1, 2])


def test_a_file_from_windows_without_a_last_newline(run, tmp_path):
    """The last question of a file without a newline at its end would be lost."""
    question = '{"question_id": 1, "text": "Hello?"}'
    (tmp_path / "q.jsonl").write_bytes(f"{question}\r\n{question}".encode("utf-8-sig"))
    assert [record["question_id"] for record in run(None)[1]] == [1, 1]


def test_a_question_of_windows_is_the_question_typed(run):
    """A byte order mark and carriage returns, copied into the JSON from a file, were tokens."""
    texts = "One?\nTwo?", "\ufeffOne?\r\nTwo?\r"
    _, records, _ = run([{"question_id": 1, "text": text} for text in texts])
    assert [record["prompt"] for record in records] == ["One?\nTwo?"] * 2


# --- what can go wrong ----------------------------------------------------------------------------

BAD = [
    (b"{", {"line": 2}, "line 2 is not JSON"),
    (b"\xff", {"line": 2}, "line 2 is not JSON"),
    (b"[" * 100_000, {"line": 2}, "line 2 is not JSON"),
    (b"[1]", {"line": 2}, "line 2 is list, expected an object"),
    ({"text": "What?"}, {"line": 2}, "question_id is null, expected a text or a whole number"),
    ({"question_id": True, "text": "What?"}, {"line": 2}, "question_id is true"),
    ({"question_id": 5}, {"question_id": 5}, "line 2: text is null, expected the question"),
    ({"question_id": 5, "text": 3}, {"question_id": 5}, "text is 3"),
    ({"question_id": 5, "text": "?", "image": [1]}, {"question_id": 5}, "image is [1]"),
    ({"question_id": 5, "text": " "}, {"question_id": 5}, "the question is empty"),
    ({"question_id": 5, "text": "<image>?"}, {"question_id": 5}, "0 picture(s) were given"),
    ({"question_id": 5, "text": "\ud800?"}, {"question_id": 5}, "UTF-8"),
    ({"question_id": 5, "text": "long " * 5000}, {"question_id": 5}, "the model's context holds"),
    (
        {"question_id": 5, "text": "?", "image": "none.png"},
        {"question_id": 5},
        "none.png: no such picture",
    ),
    ({"question_id": 5, "text": "?", "image": "\0"}, {"question_id": 5}, "null"),
    ({"question_id": 5, "text": "?", "image": "."}, {"question_id": 5}, "cannot be read"),
    (
        {"question_id": 5, "text": "?", "image": str(REFERENCE / "plain.json")},
        {"question_id": 5},
        "not a picture",
    ),
]


@pytest.mark.parametrize(("line", "name", "message"), BAD, ids=range(len(BAD)))
def test_a_bad_question_becomes_a_record_and_the_others_are_answered(
    run, assistant, line, name, message
):
    """One bad line would end the whole run, or vanish from the answers without a word."""
    first, last = lines(2)
    status, records, err = run([first, line, last])
    assert status == 1
    assert [record.get("text") for record in records] == [
        expected(assistant, first),
        None,
        expected(assistant, last),
    ]
    assert list(records[1]) == [*name, "error"]
    assert name.items() <= records[1].items()
    assert message in records[1]["error"]
    assert err.startswith("error: 1 of 3 questions have no answer; ")
    assert err.count("\n") == 1
    assert message in err


def test_a_broken_picture(run, tmp_path):
    """A picture cut in half would be answered as if it were whole."""
    content = (REFERENCE / "pictures" / "square.png").read_bytes()
    (tmp_path / "half.png").write_bytes(content[: len(content) // 2])
    status, records, _ = run(
        [{"question_id": 1, "image": str(tmp_path / "half.png"), "text": "What?"}]
    )
    assert status == 1
    assert "the picture is damaged" in records[0]["error"]


@pytest.mark.parametrize(
    ("arguments", "status", "found"),
    [
        (["--batch-size", "0"], 2, "batch_size is 0"),
        (["--image-cache", "-1"], 2, "image_cache is -1"),
        (["--top-p", "0.5"], 2, "temperature"),
        (["--contrast", "vcd", "--cd-beta", "2"], 2, "beta is 2.0"),
        (["--contrast", "vcd", "--num-beams", "2"], 2, "leave one"),
        # a line of the answers file holds one answer
        (["--num-return-sequences", "1"], 2, "unrecognized"),
        (["--images", "nowhere"], 1, "nowhere: no such folder of pictures"),
        (["--answers", "nowhere/a.jsonl"], 2, "nowhere/a.jsonl: no such folder"),
        (["--questions", "nowhere.jsonl"], 1, "nowhere.jsonl: no such file of questions"),
        (["-m", "nowhere"], 1, "nowhere: no such folder of weights"),
    ],
)
def test_wrong_usage_is_one_line(run, tmp_path, arguments, status, found):
    """Wrong usage would show a traceback, or leave a file of answers behind."""
    code, records, err = run(lines(1), *arguments)
    assert (code, records, err.count("\n")) == (status, None, 1)
    assert found in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q.jsonl"]


def test_the_questions_are_never_overwritten_by_the_answers(run, tmp_path):
    """`--answers q.jsonl --overwrite` would replace the user's questions."""
    status, _, err = run(lines(1), "--answers", tmp_path / "q.jsonl", "--overwrite")
    assert (status, "same file" in err) == (2, True)
    assert (tmp_path / "q.jsonl").exists()


def test_help_describes_every_flag_and_offers_none_that_cannot_be_used():
    """--help would offer --num-return-sequences, which a file of one answer a line cannot hold."""
    parser = make_parser()
    assert all(action.help for action in parser._actions)
    assert "--num-beams" in parser.format_help()
    assert "--num-return-sequences" not in parser.format_help()
    assert "asks again only what became an error" in " ".join(parser.format_help().split())


def test_a_full_gpu_says_what_to_do(run, monkeypatch):
    """A full GPU would end in CUDA's own words, without the flag that helps."""

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Llava, "encode_images", full)
    status, records, err = run(lines(1))
    assert (status, records) == (1, None)
    assert "smaller --batch-size" in err


@pytest.mark.parametrize("size", [1, 2], ids=["fetched", "refused"])
def test_an_engine_that_ends_leaves_what_it_answered_before(size):
    """An answer that was finished before the engine ended was dropped, and made again by the next
    run."""

    class Ends:
        """An engine that answers one question, fails at the second, and takes no third."""

        asked = 0

        def submit(self, question: Question) -> None:
            self.asked += 1
            if self.asked == 3:
                raise Refused("engine_failed", "ended")
            good, failed = Token(1, "", "stop", None), Failed("", "", RuntimeError("broken"))
            together.ended.put((question, good if self.asked == 1 else failed, "Two."))

        def start(self, *_) -> None: ...

        drain = join = start

    together = object.__new__(Together)
    together.engine, together.ended, together.size = Ends(), queue.Queue(), size
    together.request = lambda question: question
    found = together.answers([Question(line, line, "?", []) for line in range(3)])
    (question, (answer, *_)), *others = next(found)
    assert (question.line, answer, others) == (0, "Two.", [])
    with pytest.raises(RuntimeError, match="broken"):
        next(found)


# --- going on -------------------------------------------------------------------------------------


def interrupt(patch, after: int) -> None:
    """Ctrl-C once `after` new answers are in the journal."""
    add, left = Journal.add, [after]

    def interrupted(journal, records):
        some = dict([*records.items()][: left[0]])
        add(journal, some)
        left[0] -= len(some)
        if not left[0]:
            raise KeyboardInterrupt

    patch.setattr(Journal, "add", interrupted)


@pytest.fixture
def stopped(run, monkeypatch, tmp_path):
    """`stopped(after)`: a run of 20 questions, four at a time, that gets Ctrl-C once four times
    `after` new answers are in the journal."""

    def until(after: int) -> bytes:
        with monkeypatch.context() as patch:
            interrupt(patch, 4 * after)
            assert run(lines(20), "--batch-size", "4")[0] == 130
        return (tmp_path / "a.jsonl.partial").read_bytes()

    return until


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The answers file of a run of 20 questions that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    write(folder / "q.jsonl", lines(20))
    files = ["--questions", str(folder / "q.jsonl"), "--answers", str(folder / "a.jsonl")]
    assert main([*BASE, *files, "--batch-size", "4"]) == 0
    return (folder / "a.jsonl").read_bytes()


def count_asked(monkeypatch) -> list[int]:
    """The lines asked from now on."""
    asked, found = Together.request, []

    def counted(together, question):
        found.append(question.line)
        return asked(together, question)

    monkeypatch.setattr(Together, "request", counted)
    return found


def test_after_ctrl_c_only_the_rest_is_asked(run, stopped, whole, tmp_path, monkeypatch):
    """After Ctrl-C the same command would ask everything again, or write another file."""
    stopped(2)
    assert not (tmp_path / "a.jsonl").exists()
    asked = count_asked(monkeypatch)
    status, _, err = run(None, "--batch-size", "4")
    ready, written, _ = err.split("\n")
    assert (status, ready) == (0, "note: 8 of 20 answered before; going on")
    assert written == f"note: 20 answers in {tmp_path}/a.jsonl"
    assert len(asked) == 12
    assert (tmp_path / "a.jsonl").read_bytes() == whole
    assert not (tmp_path / "a.jsonl.partial").exists()


@pytest.mark.parametrize("cut", [1, 2, 20, 300, 700])
def test_a_torn_end_is_dropped_and_asked_again(run, stopped, whole, tmp_path, cut):
    """700 bytes are several lines, so a batch of which some answers are there."""
    journal = stopped(3)
    (tmp_path / "a.jsonl.partial").write_bytes(journal[:-cut])
    assert run(None, "--batch-size", "4")[0] == 0
    assert (tmp_path / "a.jsonl").read_bytes() == whole


@pytest.mark.parametrize("cut", [1, 20])
def test_what_is_asked_after_a_torn_end_is_kept(run, stopped, whole, tmp_path, monkeypatch, cut):
    """Tear, go on, stop, go on: the torn line must not spoil those written behind it."""
    (tmp_path / "a.jsonl.partial").write_bytes(stopped(2)[:-cut])
    stopped(2)
    asked = count_asked(monkeypatch)
    assert run(None, "--batch-size", "4")[0] == 0
    assert (len(asked), (tmp_path / "a.jsonl").read_bytes()) == (20 - 7 - 8, whole)


def test_a_journal_of_another_kind_of_device_is_refused(run, stopped, monkeypatch):
    """Answers of a CPU and a GPU, whose rounding differs, would be mixed in one file."""
    stopped(1)
    monkeypatch.setattr(batch, "choose_device", lambda name: "cuda:1")
    status, _, err = run(None, "--batch-size", "4")
    assert (status, "was begun with other device;" in err) == (1, True)
    monkeypatch.setattr(batch, "choose_device", lambda name: "cpu:1")  # of the same kind
    assert run(None, "--batch-size", "4")[0] == 0


def test_a_torn_header_is_begun_again(run, stopped, whole, tmp_path):
    """A run killed while it wrote the journal's first line could never go on."""
    journal = stopped(1)
    (tmp_path / "a.jsonl.partial").write_bytes(journal[:30])
    assert run(None, "--batch-size", "4")[0] == 0
    assert (tmp_path / "a.jsonl").read_bytes() == whole


def test_what_is_no_record_at_the_end_is_dropped(run, stopped, whole, tmp_path):
    """Bytes that a crash left at the end of the journal would be taken for an answer."""
    journal = stopped(1)
    (tmp_path / "a.jsonl.partial").write_bytes(journal + bytes(100) + b"\n7\n")
    assert run(None, "--batch-size", "4")[0] == 0
    assert (tmp_path / "a.jsonl").read_bytes() == whole


def test_another_batch_size_goes_on_too(run, stopped, whole, tmp_path):
    """A run out of memory could not go on with a smaller --batch-size."""
    stopped(2)
    status, records, _ = run(None, "--batch-size", "3")
    assert (status, [record["text"] for record in records]) == (
        0,
        [json.loads(line)["text"] for line in whole.splitlines()],
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--repetition-penalty", "1.1"], "repetition_penalty"),
        (["--template", "vicuna_v1", "--system", "Hm."], "system, template"),
        (None, "questions"),
        (["-m", str(REFERENCE / "tied")], "weights"),
    ],
)
def test_a_journal_of_another_run_is_refused_and_kept(run, stopped, tmp_path, change, named):
    """Answers of two models or settings would be mixed in one file, or the older ones lost."""
    journal = stopped(1)
    questions = lines(21) if change is None else None
    status, records, err = run(questions, *(change or []), "--batch-size", "4")
    assert (status, records) == (1, None)
    assert f"a.jsonl.partial was begun with other {named}; repeat that run's command" in err
    assert "--overwrite" in err
    assert err.count("\n") == 1
    assert (tmp_path / "a.jsonl.partial").read_bytes() == journal
    assert run(None, *(change or []), "--overwrite")[0] == 0
    assert not (tmp_path / "a.jsonl.partial").exists()


def test_a_file_that_is_no_journal_is_refused_and_kept(run, tmp_path):
    """A user's own file with the journal's name would be overwritten."""
    (tmp_path / "a.jsonl.partial").write_text("my notes")
    status, records, err = run(lines(1))
    assert (status, records) == (1, None)
    assert "was begun with other settings" in err
    assert (tmp_path / "a.jsonl.partial").read_text() == "my notes"


def test_a_finished_file_is_left_alone_unless_told_otherwise(
    run, stopped, whole, tmp_path, monkeypatch
):
    """Also where the run was killed between the answers' name and the end of the journal."""
    journal = stopped(2)
    (tmp_path / "a.jsonl").write_bytes(whole)
    asked = count_asked(monkeypatch)
    status, _, err = run(None, "--batch-size", "4")
    assert (status, asked, (tmp_path / "a.jsonl").read_bytes()) == (0, [], whole)
    assert "is finished already" in err
    assert not (tmp_path / "a.jsonl.partial").exists()
    (tmp_path / "a.jsonl.partial").write_bytes(journal)
    (tmp_path / "a.jsonl").write_text("{}\n")
    assert run(None, "--batch-size", "4", "--overwrite")[0] == 0
    assert (len(asked), (tmp_path / "a.jsonl").read_bytes()) == (20, whole)


@pytest.mark.parametrize(
    "change",
    [
        ["--repetition-penalty", "1.1"],
        ["-m", str(REFERENCE / "tied")],
        lambda content: content[: content.rindex(b"{")],  # a record less
        lambda content: content + content.splitlines(keepends=True)[0],
        lambda content: b"".join(content.splitlines(keepends=True)[::-1]),
        lambda content: content.replace(b"q1", b"q9"),
        lambda content: b"my thesis",
        lambda content: b"7\n8\n9\n",
        lambda content: b'{"question_id": "q0", "text": "Yes."}\n' * 3,  # not by minillava.batch
    ],
    ids=range(9),
)
def test_a_finished_file_of_another_run_is_refused_and_kept(run, tmp_path, monkeypatch, change):
    """Another file under the answers' name would pass as finished, or be overwritten."""
    run(lines(3))
    answers = tmp_path / "a.jsonl"
    if callable(change):
        answers.write_bytes(change(answers.read_bytes()))
    before, asked = answers.read_bytes(), count_asked(monkeypatch)
    files = ["--questions", str(tmp_path / "q.jsonl"), "--answers", str(answers)]
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        status = main([*BASE, *files, "-q", *([] if callable(change) else change)])
    assert (status, asked, answers.read_bytes()) == (1, [], before)
    assert "does not hold the answers of this command" in errors.getvalue()
    assert "--overwrite" in errors.getvalue()
    assert errors.getvalue().count("\n") == 1


def test_other_questions_are_not_finished_already(run):
    """An edited question would keep its old answer, since the file has as many lines."""
    questions = lines(3)
    run(questions)
    status, _, err = run([*questions[:2], {**questions[2], "text": "Another one?"}])
    assert (status, "does not hold the answers" in err) == (1, True)


def test_errors_are_asked_again_and_nothing_else(run, tmp_path, monkeypatch, whole):
    """The folder of pictures was mistyped: the same command with the right one mends it, also when
    it is killed."""
    (tmp_path / "empty").mkdir()
    status, records, err = run(lines(20), "--batch-size", "4", "--images", tmp_path / "empty")
    assert (status, sum("error" in record for record in records)) == (1, 18)
    with monkeypatch.context() as patch:
        interrupt(patch, 4)
        assert run(None, "--batch-size", "4")[0] == 130
    found = count_asked(monkeypatch)
    status, _, err = run(None, "--batch-size", "4")
    assert (status, (tmp_path / "a.jsonl").read_bytes()) == (0, whole)
    assert err.splitlines(keepends=True)[0] == "note: 6 of 20 answered before; going on\n"
    without = [i for i, question in enumerate(lines(20), 1) if question["image"] is None]
    assert len(set(found)) == len(found) == 14 and not set(without) & set(found)
    assert run(None, "--batch-size", "4")[2].endswith("nothing to do (--overwrite starts anew)\n")
    assert not (tmp_path / "a.jsonl.partial").exists()


def test_an_error_that_stays_one_is_told_again(run, monkeypatch):
    """A second run would exit with 0 although a question still has no answer."""
    questions = [b"{", lines(1)[0]]
    assert run(questions)[0] == 1
    asked = count_asked(monkeypatch)
    status, records, err = run(None)
    assert (status, asked, records[0]["line"]) == (1, [], 1)
    assert "error: 1 of 2 questions have no answer" in err


def start(folder: Path) -> BaseProcess:
    """The command in a process of its own, forked from one that has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["minillava.batch"])
    files = ["--questions", str(folder / "q.jsonl"), "--answers", str(folder / "a.jsonl")]
    process = context.Process(target=main, args=([*BASE, *files, "--batch-size", "2", "-q"],))
    process.start()
    return process


def kill_and_go_on(folder: Path, kills: int, seed: int) -> list[int]:
    """Start the command and kill it, some time after its first new answer, `kills` times; then let
    it finish. How many answers each kill found on disk."""
    chance, found = random.Random(seed), []
    journal, answers = folder / "a.jsonl.partial", folder / "a.jsonl"

    def size() -> int:
        with contextlib.suppress(FileNotFoundError):  # it is removed at the end
            return journal.stat().st_size
        return 0

    while len(found) < kills:
        before, process = size(), start(folder)
        wait_until(lambda: not process.is_alive() or size() != before, pause=0.002)  # noqa: B023
        time.sleep(chance.uniform(0, 0.1))
        process.kill()
        process.join()
        if answers.exists():  # it was faster: another one is begun, to be killed
            answers.unlink()
            journal.unlink(missing_ok=True)
            found.clear()
            continue
        found.append(max(0, journal.read_bytes().count(b"\n") - 1))
    process = start(folder)
    process.join(timeout=PATIENCE)
    assert process.exitcode == 0
    return found


@pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL")
@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_file(tmp_path, monkeypatch):
    """A kill at an unlucky moment would lose an answer or write one twice."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "calm").mkdir()
    for folder in (tmp_path, tmp_path / "calm"):
        write(folder / "q.jsonl", lines(40))
    start(tmp_path / "calm").join(timeout=PATIENCE)
    found = kill_and_go_on(tmp_path, kills=KILLS, seed=0)
    assert found == sorted(found)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "calm" / "a.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "calm", "q.jsonl"]


@pytest.mark.parametrize("moment", ["before the rename", "after the rename"])
def test_killed_around_the_rename(run, stopped, whole, tmp_path, monkeypatch, moment):
    """A kill beside the last rename would leave a journal that blocks the finished file."""
    stopped(4)
    replace = os.replace

    def killed(*paths):
        if moment == "after the rename":
            replace(*paths)
        raise KeyboardInterrupt  # what is on disk is what a kill leaves

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        assert run(None, "--batch-size", "4")[0] == 130
    assert (tmp_path / "a.jsonl.partial").exists()
    assert (tmp_path / "a.jsonl").exists() == (moment == "after the rename")
    assert run(None, "--batch-size", "4")[0] == 0
    assert (tmp_path / "a.jsonl").read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "q.jsonl"]


def test_verbose_tells_how_far_it_is(run):
    """Hours of work would pass without a word about how much is left."""
    _, _, err = run(lines(3), "--verbose")
    assert "3 answered, 0 to go, " in err
    assert "per second" in err


# --- forms of the questions file ------------------------------------------------------------------

SOME = [
    {"question_id": 1, "image": "grey.png", "text": "Où est 星?"},
    {"question_id": "b", "text": "Hello?"},
]
FORMS = {
    "an array over several lines": json.dumps(SOME, indent=2).encode(),
    "an array in one line": json.dumps(SOME).encode(),
    "an array, a question a line": ("[\n" + ",\n".join(map(json.dumps, SOME)) + "\n]\n").encode(),
    "objects over several lines": "\n".join(
        json.dumps(question, indent=1) for question in SOME
    ).encode(),
    "objects in one line": " ".join(map(json.dumps, SOME)).encode(),
    "a byte order mark": json.dumps(SOME, ensure_ascii=False, indent=1).encode("utf-8-sig"),
    "PowerShell's encoding": "\r\n".join(
        json.dumps(question, ensure_ascii=False) for question in SOME
    ).encode("utf-16"),
    "ends of line of old systems": "\r".join(map(json.dumps, SOME)).encode(),
}


@pytest.mark.parametrize("content", FORMS.values(), ids=FORMS)
def test_every_form_of_questions_gets_the_answers_of_json_lines(run, tmp_path, assistant, content):
    """An array over several lines became a file of errors, after minutes at 7B."""
    (tmp_path / "q.jsonl").write_bytes(content)
    status, records, _ = run(None)
    assert status == 0
    assert [record["text"] for record in records] == [
        expected(assistant, question) for question in SOME
    ]


def test_a_bad_object_of_an_array_is_named_by_its_place(run, tmp_path):
    """In an array over several lines the error would name a line that holds no question."""
    (tmp_path / "q.jsonl").write_text(json.dumps([SOME[1], 7], indent=2))
    status, records, err = run(None)
    assert (status, records[1]["question"]) == (1, 2)
    assert "question 2 is int, expected an object" in err


REFUSED = {
    "ScienceQA": (
        json.dumps([{"id": "4", "conversations": [{"from": "human", "value": "?"}]}]),
        "LLaVA's conversation",
    ),
    "training lines": ('{"id": "4", "conversations": []}\n' * 2, "LLaVA's conversations"),
    "an object": (
        json.dumps({"info": {}, "questions": SOME}, indent=1),
        'a list "questions" inside an object',
    ),
    "CSV": ("question_id,image,text\n1,a.png,What?\n", "comma-separated values"),
    "TSV": ("question_id\timage\ttext\n1\ta.png\tWhat?\n", "tab-separated values"),
    "a torn array": (json.dumps(SOME, indent=2)[:-9], "begins as a JSON array, but is not JSON"),
    "a torn array, a question a line": (
        "[" + ",\n".join(map(json.dumps, SOME * 2)),
        "begins as a JSON array",
    ),
    "brackets": ("[" * 100_000, "begins as a JSON array"),
    "text": ("What is it?\n", "line 1 is not JSON"),
    "other names": ('{"id": 1, "question": "What?"}', "question_id is null"),
    "no encoding": (b'{"question_id": 1, "text": "caf\xe9"}', "it is not UTF-8"),
    "UTF-16 without a mark": (
        json.dumps(SOME[0]).encode("utf-16-le"),
        "UTF-16 without a byte order mark",
    ),
    "a picture": ((REFERENCE / "pictures" / "grey.png").read_bytes(), "save it as UTF-8"),
}


@pytest.mark.parametrize(("content", "found"), REFUSED.values(), ids=REFUSED)
def test_a_file_without_questions_is_refused_before_the_model_is_opened(
    run, tmp_path, monkeypatch, content, found
):
    """A wrong file of questions would be noticed only after minutes of reading a model."""
    monkeypatch.setattr(
        "minillava.assistant.load", lambda *_, **__: pytest.fail("opened the model")
    )
    (tmp_path / "q.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    status, records, err = run(None)
    assert (status, records, err.count("\n")) == (1, None, 1)
    assert err.startswith(f"error: {tmp_path}/q.jsonl: ")
    assert found in err
    assert [path.name for path in tmp_path.iterdir()] == ["q.jsonl"]


def test_a_file_named_minus_is_asked_by_its_path(tmp_path, monkeypatch, capsys):
    """`--questions ./-` waited for stdin: the path of a file named "-" is "-" as well."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    write(Path("-"), [{"question_id": 3, "text": "What is it?"}])
    assert main([*BASE, "-q", "--questions", "./-", "--answers", "a.jsonl"]) == 0
    assert json.loads(Path("a.jsonl").read_text())["question_id"] == 3
    assert capsys.readouterr() == ("", "")


def test_questions_from_stdin_and_from_a_pipe(run, tmp_path, monkeypatch, assistant):
    """A pipe, which can be read only once, would seem empty at the second look."""
    questions = lines(2)
    content = b"".join(json.dumps(question).encode() + b"\n" for question in questions)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    _, records, _ = run(None, "--questions", "-")
    assert [record["text"] for record in records] == [
        expected(assistant, question) for question in questions
    ]
    read, write = os.pipe()
    with open(write, "wb") as file:
        file.write(content)
    status, _, err = run(None, "--questions", f"/dev/fd/{read}")
    os.close(read)
    assert (status, "finished already" in err) == (0, True)  # the same questions


# --- where the answers go -------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="names of open files, links and modes")
def test_answers_go_through_pipes_and_links(run, tmp_path, assistant):
    """A link would be replaced by a file, and a pipe would be opened as a file to rename."""
    read, write = os.pipe()
    assert run(lines(1), "--answers", f"/dev/fd/{write}")[:2] == (0, None)
    os.close(write)
    with open(read, encoding="utf-8") as file:
        assert [json.loads(line)["text"] for line in file] == [expected(assistant, lines(1)[0])]
    (tmp_path / "real").touch(0o600)
    (tmp_path / "a.jsonl").symlink_to("real")
    assert run(lines(1))[0] == 0
    assert run(lines(2), "--overwrite")[0] == 0
    assert os.readlink(tmp_path / "a.jsonl") == "real"
    assert (tmp_path / "real").read_bytes().count(b"\n") == 2
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "q.jsonl", "real"]


def test_answers_never_replace_what_is_read(run, tmp_path):
    """`--answers mine.png --overwrite` would destroy a picture that the questions name."""
    picture = tmp_path / "mine.png"
    picture.write_bytes((REFERENCE / "pictures" / "grey.png").read_bytes())
    before = picture.read_bytes()
    question = {"question_id": 1, "image": str(picture), "text": "What?"}
    status, _, err = run([question], "--answers", picture, "--overwrite")
    assert (status, "is a picture of the questions" in err, picture.read_bytes()) == (
        1,
        True,
        before,
    )
    (tmp_path / "x.partial").write_bytes(json.dumps(question).encode())
    status, _, err = run(
        None, "--questions", tmp_path / "x.partial", "--answers", tmp_path / "x", "--overwrite"
    )
    assert (status, "x.partial is read" in err) == (2, True)


def test_overwriting_keeps_the_old_answers_until_the_new_are_whole(
    run, whole, stopped, tmp_path, monkeypatch
):
    """Killed in the middle, the same command without --overwrite goes on with the new ones."""
    (tmp_path / "a.jsonl").write_text('"old"\n')
    with monkeypatch.context() as patch:
        interrupt(patch, 8)
        assert (
            run(
                [*lines(20)], "--batch-size", "4", "--overwrite", "--answers", tmp_path / "a.jsonl"
            )[0]
            == 130
        )
    assert (tmp_path / "a.jsonl").read_text() == '"old"\n'
    counted = count_asked(monkeypatch)
    assert run(None, "--batch-size", "4")[0] == 0
    assert (len(counted), (tmp_path / "a.jsonl").read_bytes()) == (12, whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "q.jsonl"]


def test_a_full_disk_says_what_is_kept_and_the_same_command_goes_on(run, tmp_path, monkeypatch):
    """A full disk at the end would lose every answer, or not say that they are kept."""

    def full(path, _):
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(batch, "write_whole", full)
        status, records, err = run(lines(3))
    assert (status, records, err.count("\n")) == (1, None, 1)
    assert err.startswith(f"error: {tmp_path}/a.jsonl: No space left on device; ")
    assert f"{tmp_path}/a.jsonl.partial keeps 3 answer(s), and the same command goes on" in err
    status, records, err = run(None)
    assert (status, len(records), "3 of 3 answered before" in err) == (0, 3, True)


def test_what_a_killed_run_left_beside_its_answers_goes_with_the_next(run, tmp_path):
    """Temporary files of killed runs would pile up beside the answers."""
    assert run(lines(2))[0] == 0
    for name in ("a.jsonl.123.new", "a.jsonl.partial.123.new"):
        (tmp_path / name).write_text("torn")
    assert run(None)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "q.jsonl"]


@pytest.mark.skipif(disk.fcntl is None, reason="there are no such locks")
def test_a_second_run_waits_and_goes_on_with_what_the_first_leaves(
    run, stopped, whole, tmp_path, monkeypatch
):
    """Both did all the work. The first is killed here, which gives its lock back."""
    stopped(2)
    noted, busy = [], threading.Event()
    note = Messages.note

    def listened(messages, text):
        noted.append(text)
        if "another run is at" in text:
            busy.set()
        note(messages, text)

    monkeypatch.setattr(Messages, "note", listened)
    asked, found = count_asked(monkeypatch), []
    with Journal(tmp_path / "a.jsonl.partial", {}).alone(
        lambda: pytest.fail("nobody else is here")
    ):
        second = threading.Thread(target=lambda: found.append(run(None, "--batch-size", "4")[0]))
        second.start()
        assert busy.wait(timeout=PATIENCE)
        assert not asked
    second.join(timeout=PATIENCE)
    assert (found, len(asked), (tmp_path / "a.jsonl").read_bytes()) == ([0], 12, whole)


def test_the_time_left_is_never_0_minutes():
    """Half a minute before its end the run would say that 0 minutes are left."""
    assert [duration(seconds) for seconds in (0, 29.6, 89, 90, 600, 30000)] == [
        "0 s",
        "30 s",
        "89 s",
        "2 min",
        "10 min",
        "8.3 h",
    ]
