"""Rows of a data file: what is wrong with them is told before a model is opened, and labels are
exactly the answers."""

import itertools
import json
import random
import re

import pytest

from minillava.config import IGNORE_INDEX
from minillava.finetune.rows import as_seen, check_template, encode_row, read_rows
from minillava.labels import encode_answers
from minillava.prompt import render
from minillava.templates import TEMPLATES
from minillava.tokenizer import Tokenizer


def human(text: str) -> dict:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict:
    return {"from": "gpt", "value": text}


@pytest.fixture
def write(tmp_path):
    """`write(rows)`: a data file beside two pictures, a.png and b.png."""
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"not read here")
    (tmp_path / "empty.png").touch()

    def in_file(rows: list, lines: bool = False):
        path = tmp_path / "rows.json"
        text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
        path.write_text(text, encoding="utf-8")
        return path

    return in_file


GOOD = {"id": "x", "image": "a.png", "conversations": [human("<image>\nWhat?"), gpt("A cat.")]}


@pytest.mark.parametrize("lines", [False, True])
def test_a_file_of_llava_is_read_as_it_is(write, lines):
    """A file of LLaVA would have to be rewritten first, or lose a turn."""
    text = {"id": 2, "conversations": [human("Hi"), gpt("Hello"), human("So?"), gpt("Well")]}
    found = read_rows(write([GOOD, text], lines))
    assert found.problems == {}
    assert [row.turns for row in found.rows] == [
        (("<image>\nWhat?", "A cat."),),
        (("Hi", "Hello"), ("So?", "Well")),
    ]
    assert [len(row.pictures) for row in found.rows] == [1, 0]
    assert [row.words for row in found.rows] == [4, -4]
    assert "2 rows (1 with a picture, 1 of text alone), 3 answers" in found.counts()


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("What?<image>", "<image>\nWhat?"),
        ("<image> What? <image>", "<image>\nWhat?"),
        ("<image>", "<image>\n"),
    ],
)
def test_one_picture_goes_in_front_of_its_question(write, asked, expected):
    """A mark after the question would put the picture where LLaVA never had it."""
    row = {**GOOD, "conversations": [human(asked), gpt("Yes.")]}
    (found,) = read_rows(write([row])).rows
    assert found.turns == ((expected, "Yes."),)


def test_several_pictures_stay_where_they_are_marked(write):
    """Several pictures would all go to the front, so that the question loses its sense."""
    row = {"image": ["a.png", "b.png"], "conversations": [human("<image> or <image>?"), gpt("A")]}
    (found,) = read_rows(write([row])).rows
    assert (len(found.pictures), found.turns) == (2, (("<image> or <image>?", "A"),))


def test_rows_of_several_pictures_are_counted(write):
    """Nobody would be told that the model never saw such rows."""
    row = {"image": ["a.png", "b.png"], "conversations": [human("<image> or <image>?"), gpt("A")]}
    told = read_rows(write([row, GOOD])).counts()
    assert "; 1 rows with several pictures, of which LLaVA-1.5 never saw one" in told
    assert "several" not in read_rows(write([GOOD])).counts()


def test_what_has_no_counterpart_is_left_out_and_counted(write):
    """The original masks a whole row that ends with a question."""
    listed = [gpt("early"), human("Hi"), gpt("Hello"), human("and?")]
    found = read_rows(write([{"conversations": listed}]))
    assert (found.first_dropped, found.last_dropped) == (1, 1)
    assert found.rows[0].turns == (("Hi", "Hello"),)
    spoken = [{"from": "system", "value": "Be brief."}, *listed[1:3]]
    assert read_rows(write([{"conversations": spoken}])).rows[0].system == "Be brief."
    assert read_rows(write([GOOD, GOOD])).repeated == 1


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"image": "no.png"}, "names a picture that is not there"),
        ({"image": "a" * 5000}, "names a picture that is not there"),
        ({"image": "empty.png"}, "names a picture of no bytes"),
        ({"image": 3}, "has an `image` that is not the name of a file"),
        ({"image": None}, "says <image> but names no picture"),
        ({"image": ["a.png", "b.png"]}, "another number of pictures than of markers"),
        ({"conversations": [human("What?"), gpt("A")]}, "no question says <image>"),
        (
            {"conversations": [human("<image>a"), gpt("b"), human("<image>c"), gpt("d")]},
            "marks one picture in several questions",
        ),
        ({"conversations": [human("<image>a"), gpt(" ")]}, "has an empty answer"),
        ({"conversations": [human("<image>a"), human("b"), gpt("c")]}, "two questions"),
        ({"conversations": [human("<image>a")]}, "no question with an answer"),
        ({"conversations": []}, "no question with an answer"),
        ({"conversations": "x"}, "no list of `conversations`"),
        ({"conversations": [{"from": "cat", "value": "x"}]}, "is not {from: human or gpt"),
        ({"conversations": [{"from": "human", "value": None}]}, "is not {from: human or gpt"),
    ],
)
def test_each_bad_row_is_named_before_anything_is_learnt(write, changed, problem):
    """The originals die hours in, or learn in silence from a row without its picture."""
    path = write([GOOD, {**GOOD, "id": "bad", **changed}, GOOD])
    found = read_rows(path)
    assert len(found.rows) == 2
    with pytest.raises(ValueError, match=re.escape(problem)) as caught:
        found.refuse(path)
    assert "row 'bad' (1)" in str(caught.value)
    assert "--skip-bad" in str(caught.value)


def test_the_first_offenders_of_a_kind_are_named_and_the_rest_counted(write):
    """Thousands of bad rows would fill the screen."""
    path = write([{**GOOD, "id": i, "image": "no.png"} for i in range(9)])
    with pytest.raises(ValueError, match="9 row") as caught:
        read_rows(path).refuse(path)
    assert "'4' (4) and 4 more" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"[1,", b"{", b"\xff\xfe\x00", b"\0"])
def test_a_file_that_is_no_list_of_rows_is_refused_in_one_line(tmp_path, content):
    """A broken or empty file would be a traceback, or a run that learns nothing."""
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.json") as caught:
        read_rows(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no such file of rows"):
        read_rows(tmp_path / "nowhere.json")


def test_captions_are_learnt_without_their_question(write, llama_tokenizer):
    """With a newline behind the picture the caption began with another token."""
    row = {**GOOD, "conversations": [human("Describe.\n<image>"), gpt("a cat on a mat")]}
    (found,) = read_rows(write([row]), plain=True).rows
    tokenizer = Tokenizer(llama_tokenizer)
    example = encode_row(found, tokenizer, TEMPLATES["plain"], 576, 2048)
    assert example.ids == [1, -200, 263, 6635, 373, 263, 1775, 13]
    assert example.labels == [-100, -100, 263, 6635, 373, 263, 1775, 13]
    assert example.positions == 583
    text = {"conversations": [human("Hi"), gpt("Hello")]}
    assert "no caption of one picture" in str(read_rows(write([text]), plain=True).problems)


def test_labels_are_the_answers_and_their_ends(write, reference):
    """The question would be learnt too, or the answer's end token not, so that it never stops."""
    tokenizer = Tokenizer(reference / "plain" / "tokenizer.model")
    answers = ("ASSISTANT: </s>", "<unk> 😀\n\nUSER: x", "b")
    turns = [("<image>\nA </s>?", answers[0]), ("USER:", answers[1]), ("\n c", answers[2])]
    ids, labels = encode_answers(tokenizer, TEMPLATES["vicuna_v1"], turns)
    assert all(label in (token, IGNORE_INDEX) for token, label in zip(ids, labels, strict=True))
    learnt, now = [], []
    for label in labels:
        if label != IGNORE_INDEX:
            now.append(label)
        elif now:
            learnt.append(now)
            now = []
    learnt.append(now)
    assert [tokenizer.decode(some).strip() for some in learnt] == [a.strip() for a in answers]
    assert all(some[-1] == tokenizer.eos_id for some in learnt)


WORDS = ["</s>", "ASSISTANT:", "USER: x", "<unk>", "<s>", "😀", "\n\n", " ", "a", "red", "é", "0"]


@pytest.mark.parametrize("template", ["vicuna_v1", "llava_v1"])
@pytest.mark.parametrize("seed", range(25))
def test_labels_of_any_conversation_are_its_answers(reference, template, seed):
    """Counting words, the original masks a whole row whose text looks like its separators, or
    learns a part of the question."""
    drawn = random.Random(seed)
    tokenizer = Tokenizer(reference / "plain" / "tokenizer.model")

    def text() -> str:
        return "x" + drawn.choice(["", " "]).join(drawn.choices(WORDS, k=drawn.randrange(6)))

    turns = [(text(), text()) for _ in range(drawn.randrange(1, 4))]
    ids, labels = encode_answers(tokenizer, TEMPLATES[template], turns)
    assert all(label in (token, IGNORE_INDEX) for token, label in zip(ids, labels, strict=True))
    runs = [
        [label for _, label in run]
        for kept, run in itertools.groupby(enumerate(labels), lambda at: at[1] != IGNORE_INDEX)
        if kept
    ]
    assert [tokenizer.decode(run).strip() for run in runs] == [
        answer.strip() for _, answer in turns
    ]
    assert all(run[-1] == tokenizer.eos_id for run in runs)


@pytest.mark.parametrize("seed", range(10))
def test_where_counting_succeeds_labels_are_those_that_were_counted(reference, seed):
    """Labels by construction would differ from those that LLaVA-1.5 was trained on. Its rule: the
    text is cut at `</s>` and at ` ASSISTANT: `, pieces are encoded alone and their lengths added
    up, less 2 for each question (its BOS, and the lone space of its end)."""
    drawn = random.Random(seed)
    tokenizer = Tokenizer(reference / "plain" / "tokenizer.model", legacy=True)
    words = ["red", "square", "a", "0", "é", "USER", "left of", "😀"]
    turns = [
        tuple(" ".join(drawn.choices(words, k=drawn.randrange(1, 6))) for _ in range(2))
        for _ in range(drawn.randrange(1, 5))
    ]
    ids, labels = encode_answers(tokenizer, TEMPLATES["vicuna_v1"], turns)
    text = str(render(TEMPLATES["vicuna_v1"], turns))
    counted, at = [IGNORE_INDEX] * len(ids), 1
    for some in text.split("</s>")[:-1]:
        question = some.split(" ASSISTANT: ")[0] + " ASSISTANT: "
        asked, length = len(tokenizer.encode(question)) - 2, len(tokenizer.encode(some))
        counted[at + asked : at + length] = ids[at + asked : at + length]
        at += length
    assert at == len(ids)  # or the original would mask all of it
    assert labels == counted


def test_a_row_is_cut_at_its_end_and_never_inside_a_picture(write, reference):
    """The original cuts ids before the splice and positions after it, which loses answers."""
    tokenizer = Tokenizer(reference / "plain" / "tokenizer.model")
    (row,) = read_rows(write([GOOD])).rows
    whole = encode_row(row, tokenizer, TEMPLATES["vicuna_v1"], 9, 10_000)
    assert (whole.positions, whole.cut) == (len(whole.ids) + 8, False)
    some = encode_row(row, tokenizer, TEMPLATES["vicuna_v1"], 9, whole.positions - 1)
    assert (some.ids, some.cut, len(some.pictures)) == (whole.ids[:-1], True, 1)
    at = whole.ids.index(-200)
    none = encode_row(row, tokenizer, TEMPLATES["vicuna_v1"], 9, at + 8)
    assert (none.ids, none.pictures, none.learnt) == (whole.ids[:at], (), 0)


def test_a_template_that_never_ends_an_answer_is_refused(reference):
    """A model trained with it never stops."""
    tokenizer = Tokenizer(reference / "plain" / "tokenizer.model")
    with pytest.raises(ValueError, match="never learn to stop"):
        check_template(TEMPLATES["hf"], tokenizer, [2])
    for name in ("llava_v1", "vicuna_v1", "llava_llama_2", "plain", "llava_v0"):
        check_template(TEMPLATES[name], tokenizer, [2])


def test_a_row_is_shown_with_what_is_learnt(write, reference):
    """--check would show other tokens than those that are learnt."""
    tokenizer = Tokenizer(reference / "plain" / "tokenizer.model")
    (row,) = read_rows(write([GOOD])).rows
    example = encode_row(row, tokenizer, TEMPLATES["vicuna_v1"], 9, 2048)
    numbers, text, ids = as_seen(example, tokenizer).splitlines()
    read = len(example.ids) - 1 - example.learnt
    assert numbers == (
        f"row 'x' (0): {example.positions} positions, 9 of pictures, {read} read, "
        f"{example.learnt} learnt, ends with </s>"
    )
    learnt = text.partition("[[")[2].removesuffix("]]")
    assert learnt.endswith("</s>") and "<image>" in text.partition("[[")[0]
    assert ids.split() == [str(i) for i in example.ids]
