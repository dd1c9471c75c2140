"""--draft of generate, chat and batch: the same answers, what is said of them, what is refused."""

import io
import json
import re
import sys

import pytest
from commands import status_of
from paths import ROOT

from minillava.cli.doors import enter

WEIGHTS = ROOT / "weights" / "shapes"
PICTURE = WEIGHTS / "example-2.png"
ASKED = ["-m", WEIGHTS, "-i", PICTURE, "-p", "Please describe this image in detail."]


def run(capsys, door, *arguments):
    status = status_of(lambda argv: enter(door, argv), list(arguments))
    done = capsys.readouterr()
    return status, done.out, done.err


def test_the_answer_is_the_same_and_json_tells_what_it_took(capsys):
    """Guessing ahead would change the answer, or keep its cost from the user."""
    _, plain, _ = run(capsys, "generate", *ASKED)
    for draft, kind in (("lookup", "lookup"), (WEIGHTS, "model"), ("medusa", "medusa")):
        status, out, err = run(capsys, "generate", *ASKED, "--draft", draft, "-v")
        assert (status, out) == (0, plain)
        assert f"\ndrafts   {kind}: 20 tokens, 1 from the prompt, 19 in " in err
        told = json.loads(run(capsys, "generate", *ASKED, "--draft", draft, "--json")[1])
        assert told["text"] + "\n" == plain
        assert set(told["draft"]) == {"kind", "passes", "drafted", "accepted", "lengths", "exact"}
        assert told["draft"]["kind"] == kind
        assert sum(told["draft"]["lengths"]) == told["draft"]["passes"]
    assert "draft" not in json.loads(run(capsys, "generate", *ASKED, "--json")[1])


def test_tokens_at_a_time(capsys):
    """--draft-tokens would be accepted and not change how many tokens are guessed."""
    found = [
        json.loads(
            run(capsys, "generate", *ASKED, "--draft", WEIGHTS, "--draft-tokens", count, "--json")[
                1
            ]
        )["draft"]["passes"]
        for count in (1, 4, 19)
    ]
    assert found == [10, 4, 1]


@pytest.mark.parametrize("door", ["generate", "chat", "batch"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--draft-tokens", "3"], "--draft-tokens 3 needs --draft"),
        (["--draft", "lookup", "--draft-tokens", "0"], "'0', expected 1 to 64, or auto"),
        (["--draft", "lookup", "--draft-tokens", "many"], "'many', expected 1 to 64, or auto"),
        (["--draft", "lookup", "--compile"], "--draft and --compile do not go together"),
        (["--draft", "lookup", "--num-beams", "2"], "--draft and --num-beams do not go together"),
    ],
)
def test_what_does_not_go_together_is_wrong_usage(capsys, door, flags, message):
    """Before a model is opened."""
    if door == "chat" and "--num-beams" in flags:
        return  # which it does not have
    needed = ["--questions", "q", "--answers", "a"] if door == "batch" else []
    status, out, err = run(capsys, door, "-m", WEIGHTS, *needed, *flags)
    assert (status, out) == (2, "")
    assert message in err


def test_several_answers_take_no_drafts(capsys):
    """--draft would be ignored without a word where several answers are asked for."""
    flags = ["--draft", "lookup", "--num-return-sequences", "2", "--temperature", "1"]
    status, _, err = run(capsys, "generate", *ASKED, *flags)
    assert status == 2
    assert "--draft and --num-return-sequences do not go together" in err


def test_a_draft_that_is_none_is_one_line(capsys, tmp_path):
    """A mistyped folder of a draft would show a traceback, or be answered without it."""
    status, out, err = run(capsys, "generate", "-q", *ASKED, "--draft", tmp_path / "none")
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert "no such folder" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("draft", ["none", "medusa:none"])
def test_batch_says_that_there_is_no_such_drafter(capsys, tmp_path, draft):
    """It said that answers were kept, and that the same command would go on."""
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "text": "Why?"}\n')
    files = ["--questions", tmp_path / "q.jsonl", "--answers", tmp_path / "a.jsonl"]
    status, _, err = run(capsys, "batch", "-q", "-m", WEIGHTS, *files, "--draft", draft)
    assert status == 1
    assert len(err.splitlines()) == 1
    assert "keeps" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["q.jsonl"]


@pytest.mark.parametrize("draft", ["", "medusa:"])
def test_a_drafter_without_a_name_is_refused(capsys, draft):
    """An unset variable in medusa:$DIR would take other heads than those that were meant."""
    status, out, err = run(capsys, "generate", "-q", *ASKED, "--draft", draft)
    assert (status != 0, out) == (True, "")
    assert "--draft" in err or "expected" in err
    assert len(err.splitlines()) == 1


def test_a_chat_goes_on(capsys, monkeypatch):
    """A rejected guess left in the cache would spoil the next answer of a chat."""
    found = []
    for flags in ([], ["--draft", "lookup", "--draft-tokens", "3", "-v"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("What is red?\nAnd again: what is red?\n"))
        found.append(run(capsys, "chat", "-m", WEIGHTS, "-i", PICTURE, *flags))
    assert found[0][:2] == found[1][:2]
    assert found[1][2].count("\ndrafts   lookup: ") == 2


def test_batch_asks_one_after_the_other_and_says_so(capsys, tmp_path):
    """Its answers are those of a run without drafts, which may go on with it."""
    questions = tmp_path / "q.jsonl"
    lines = [
        {"question_id": i, "image": PICTURE.name, "text": text}
        for i, text in enumerate(("What is red?", "Describe it.", "Where is the ring?"))
    ]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = ["-m", WEIGHTS, "--questions", questions, "--images", WEIGHTS]
    plain, drafted = tmp_path / "plain.jsonl", tmp_path / "drafted.jsonl"
    for flags in (["--answers", plain], ["--answers", drafted, "--draft", WEIGHTS]):
        status, _, err = run(capsys, "batch", *asked, *flags)
        assert status == 0
    assert "drafts are for one question at a time: --batch-size is 1" in err
    assert drafted.read_text() == plain.read_text()


def terminal(monkeypatch, colours=True):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "" if colours else "1")


def test_a_terminal_shows_in_green_what_was_guessed(capsys, monkeypatch):
    """The colours were those of the tokens before or after, or the text under them another."""
    shown = [*ASKED, "--draft", WEIGHTS, "--draft-tokens", 3, "--show-drafts"]
    _, plain, _ = run(capsys, "generate", *ASKED)
    assert run(capsys, "generate", *shown)[1] == plain  # no terminal, no colours
    terminal(monkeypatch)
    _, found, _ = run(capsys, "generate", *shown)
    assert re.sub(r"\033\[\d+m", "", found) == plain
    # one token from the prompt, then three guesses and the token after them
    words = re.findall(r" ?[\w]+|\.", plain)
    own = re.split(r"(?:\033\[32m.*?\033\[0m)+", found)
    assert [each for each in own if each.strip()] == words[::4]
    terminal(monkeypatch, colours=False)
    assert run(capsys, "generate", *shown)[1] == plain
    status, _, err = run(capsys, "generate", *shown, "--json")
    assert status == 2 and "--show-drafts colours a text" in err
    status, _, err = run(capsys, "generate", *ASKED, "--show-drafts")
    assert status == 2 and "--show-drafts needs --draft" in err


def test_a_chat_shows_its_guesses_in_each_answer(capsys, monkeypatch):
    """The second answer was coloured as the first one."""
    asked = ["-m", WEIGHTS, "-i", PICTURE, "--draft", WEIGHTS, "--draft-tokens", 2, "--show-drafts"]
    found = []
    for colours in (False, True):
        monkeypatch.setattr("sys.stdin", io.StringIO("Describe this image.\nWhat is red?\n"))
        terminal(monkeypatch, colours)
        found.append(run(capsys, "chat", *asked)[1])
    assert re.sub(r"\033\[\d+m", "", found[1]) == found[0]
    for line in found[1].splitlines():
        assert not line.startswith("\033[32m")  # the first token is never guessed
        assert "\033[32m" in line


def test_a_trace_marks_what_was_guessed(capsys):
    """Each token counted as a step of its own, and nothing told which positions were guessed."""
    asked = ["trace", *ASKED, "--draft", WEIGHTS, "--draft-tokens", 3, "--depth", "outline"]
    _, out, err = run(capsys, *asked, "--steps", "all", "--json", "-v")
    rows = [json.loads(line) for line in out.splitlines()]
    answer = next(row["value"] for row in rows if row["name"] == "answer")
    drafts = {row["step"]: row["value"] for row in rows if row["name"] == "draft"}
    assert list(drafts) == [1, 2, 3, 4, 5]
    assert [i for step in drafts.values() for i, _, _ in step] == [
        i for at, i in enumerate(answer["ids"]) if at % 4
    ]
    assert {mark for step in drafts.values() for _, _, mark in step} == {"accepted"}
    tokens = [row["value"][0][0] for row in rows if re.fullmatch(r"token(\.\d)?", row["name"])]
    assert tokens == answer["ids"]
    # a pass reads the last token and three guesses; the trial whether it is exact is not traced
    lengths = [row["shape"] for row in rows if row["name"] == "positions"]
    assert lengths[1:] == [[1, 4]] * 5
    assert "drafts   model: 20 tokens" in err
    _, out, _ = run(capsys, *asked, "--steps", "2", "--json")
    assert {json.loads(row).get("step") for row in out.splitlines()} == {None, 2}
    _, _, err = run(capsys, *asked, "--steps", "9")
    assert "the answer ended after 6 pass(es): there is no step 9" in err
    status, _, err = run(capsys, *asked, "--compare", "dtype=float32", "dtype=bfloat16")
    assert status == 2 and "--draft is about one run" in err
