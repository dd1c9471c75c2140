"""minillava.pope: the three published readings of an answer, figures computed by hand, and what a
file lacks."""

import hashlib
import importlib
import io
import json
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from paths import ROOT

from minillava.cli.doors import enter
from minillava.pope import SCORERS, same_question

main = partial(enter, "pope")


@pytest.fixture
def write(tmp_path):
    """`write(name, records)`: a JSON lines file; a text stands as it is."""

    def written(name, records):
        path = tmp_path / name
        text = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)
        path.write_bytes(text.encode())  # a "\r" of a record stays
        return str(path)

    return written


@pytest.fixture
def score(write, run_main):
    """`score(questions, answers, *flags)` -> (exit status, stdout, stderr); as lists of (id,
    label[, category]) and of (id, text) or whole records."""

    def scored(questions, answers, *flags):
        questions = [
            dict(
                zip(("question_id", "label", "category"), q, strict=False),
                image="x.jpg",
                text=f"Is {q[0]}?",
            )
            if isinstance(q, tuple)
            else q
            for q in questions
        ]
        answers = [
            dict(zip(("question_id", "text"), a, strict=True)) if isinstance(a, tuple) else a
            for a in answers
        ]
        files = write("questions.jsonl", questions), write("answers.jsonl", answers)
        return run_main(main, "--questions", files[0], "--answers", files[1], *flags)

    return scored


@pytest.mark.parametrize(
    ("text", "llava", "vcd_where_yes", "vcd_where_no", "ritual"),
    [
        ("Yes", "yes", "yes", "yes", "yes"),
        ("No", "no", "no", "no", "no"),
        ("Yes, there is a dog.", "yes", "yes", "yes", "yes"),
        ("No, there is no dog.", "no", "no", "no", "no"),
        ("I know snow", "yes", "no", "no", "yes"),  # neither "yes" nor a word no
        ("Yes, I know.", "yes", "yes", "no", "yes"),  # right for vcd, whatever is true
        ("There is a dog.", "yes", "no", "yes", "yes"),  # wrong for vcd, whatever is true
        ("There is one. It is not red.", "yes", "no", "no", "no"),  # llava reads one sentence
        ("There isn't.", "yes", "no", "yes", "no"),
        ("NO", "yes", "no", "no", "no"),
        ("no.", "no", "no", "no", "no"),
        ("It does not, I think", "no", "no", "no", "no"),
        ("not, so", "no", "no", "no", "no"),  # commas are removed
        ("No!", "yes", "no", "no", "yes"),  # exclamation marks are not
        ("No\nYes", "yes", "yes", "no", "no yes"),  # llava: one word, "No\nYes"
        ("Yes\nThere is.", "yes", "yes", "yes", "yes yes"),
        ("", "yes", "no", "yes", "yes"),
    ],
)
def test_readings(text, llava, vcd_where_yes, vcd_where_no, ritual):
    """An answer would be read otherwise than by the script whose figures are compared."""
    read = lambda scorer, truth: " ".join(  # noqa: E731
        "yes" if v else "no" for v in SCORERS[scorer](text, truth)
    )
    for truth, vcd in ((True, vcd_where_yes), (False, vcd_where_no)):
        assert (read("llava", truth), read("vcd", truth), read("ritual", truth)) == (
            llava,
            vcd,
            ritual,
        )


QUESTIONS = [
    (1, "yes", "random"),
    (2, "yes", "random"),
    (3, "no", "random"),
    (4, "no", "random"),
    (5, "yes", "popular"),
    (6, "no", "popular"),
]
ANSWERS = [
    (1, "Yes"),
    (2, "I know snow"),
    (3, "I know snow"),
    (4, "No"),
    (5, "No."),
    (6, "There isn't."),
]


def test_figures_by_hand(score):
    """Accuracy, precision or F1 would be another formula, or a division by zero."""
    status, out, err = score(QUESTIONS, ANSWERS, "--json")
    assert (status, err) == (0, "")
    scores = json.loads(out)["scores"]
    assert list(scores) == ["llava", "vcd", "ritual"]
    assert {tuple(categories) for categories in scores.values()} == {
        ("random", "popular", "overall")
    }
    names = (
        "answers",
        "TP",
        "FP",
        "TN",
        "FN",
        "accuracy",
        "precision",
        "recall",
        "F1",
        "yes-ratio",
    )

    def row(scorer, category):
        return [scores[scorer][category][name] for name in names]

    # random: 1 yes/yes, 2 yes/yes, 3 yes/no, 4 no/no (said/true); popular: 5 no/yes, 6 yes/no
    assert row("llava", "random") == pytest.approx([4, 2, 1, 1, 0, 3 / 4, 2 / 3, 1, 4 / 5, 3 / 4])
    assert row("llava", "popular") == [2, 0, 1, 0, 1, 0, 0, 0, None, 1 / 2]
    assert row("llava", "overall") == pytest.approx(
        [6, 2, 2, 1, 1, 1 / 2, 1 / 2, 2 / 3, 4 / 7, 4 / 6]
    )
    # 2 has no "yes", 3 has a "no" in "know"; 6 has no "no"
    assert row("vcd", "random") == pytest.approx([4, 1, 0, 2, 1, 3 / 4, 1, 1 / 2, 2 / 3, 1 / 4])
    assert row("vcd", "overall") == pytest.approx(
        [6, 1, 1, 2, 2, 1 / 2, 1 / 2, 1 / 3, 2 / 5, 2 / 6]
    )
    # 6 ends in n't
    assert row("ritual", "popular") == [2, 0, 0, 1, 1, 1 / 2, None, 0, None, 0]


def test_answers_of_several_lines_shift_what_follows_in_ritual_only(score):
    """RITUAL reads a line as an answer: the shift would be missing there or reach the others."""
    answers = [(1, "Yes.\nIt is not red."), *ANSWERS[1:]]
    result = json.loads(score(QUESTIONS, answers, "--json")[1])["scores"]
    assert result["llava"] == json.loads(score(QUESTIONS, ANSWERS, "--json")[1])["scores"]["llava"]
    # verdicts yes no yes yes no; the labels yes yes no no take the first four, the yes-ratio all of
    # them
    random = result["ritual"]["random"]
    assert [random[name] for name in ("TP", "FP", "TN", "FN", "verdicts", "yes")] == [
        1,
        2,
        0,
        1,
        5,
        3,
    ]
    assert (random["accuracy"], random["yes-ratio"]) == (1 / 4, 3 / 5)
    assert result["ritual"]["popular"]["accuracy"] == 1 / 2  # the shift ends with the category
    assert "ritual: 1 verdict(s) more than answers" in score(QUESTIONS, answers)[1]


def test_the_report_says_what_was_scored_and_where_the_scorers_disagree(score):
    """The report would not say which questions were scored, or hide the disputed answers."""
    status, out, err = score(QUESTIONS, ANSWERS)
    assert (status, err) == (0, "")
    prompts = hashlib.sha256("".join(f"Is {i}?\0" for i in range(1, 7)).encode()).hexdigest()
    assert (
        f"questions: 6 in {out.split(' in ')[1].split(',')[0]}, prompts sha256 {prompts}\n" in out
    )
    assert "| llava | random | 4 | 75.00 | 66.67 | 100.00 | 80.00 | 75.00 |\n" in out
    assert "| ritual | popular | 2 | 50.00 | – | 0.00 | – | 0.00 |\n" in out
    assert "The scorers disagree about 3 of 6 answers.\n" in out
    assert '- 2 (label yes): llava yes, vcd no, ritual yes: "I know snow"\n' in out
    assert '- 6 (label no): llava yes, vcd yes, ritual no: "There isn\'t."\n' in out


def test_a_byte_order_mark_is_no_part_of_the_first_line(score):
    """A byte order mark would make the first line of a file no JSON."""
    marked = ["\ufeff" + json.dumps({"question_id": 1, "text": "Is 1?", "label": "yes"})]
    status, out, _ = score(
        marked, ["\ufeff" + json.dumps({"question_id": 1, "text": "Yes"})], "--json"
    )
    assert (status, json.loads(out)["answered"]) == (0, 1)


@pytest.mark.parametrize("scorer", ["llava", "vcd", "ritual"])
def test_one_scorer_alone(score, scorer):
    """--scorer would be ignored, and all three be printed."""
    rows = [
        line
        for line in score(QUESTIONS, ANSWERS, "--scorer", scorer)[1].splitlines()
        if line.startswith("| ")
    ]
    assert [row.split(" | ")[0] for row in rows[1:]] == [f"| {scorer}"] * 3


def test_questions_without_categories_are_one(score):
    """Labels without a category would have no figures at all."""
    scores = json.loads(score([q[:2] for q in QUESTIONS], ANSWERS, "--json")[1])["scores"]
    assert list(scores["llava"]) == ["overall"]
    assert scores["llava"]["overall"]["accuracy"] == 1 / 2


def test_order_does_not_matter(score):
    """Answers in another order would be scored by other questions' labels."""
    assert score(QUESTIONS, ANSWERS[::-1])[1] == score(QUESTIONS, ANSWERS)[1]


def test_nothing_is_dropped_in_silence(score):
    """Missing, doubled or foreign answers would leave a score that looks whole."""
    answers = [
        {"question_id": 1, "text": "Yes", "prompt": "Is 1?"},
        (1, "No"),
        {"question_id": 2, "error": "x.jpg: no such picture"},
        {"line": 7, "error": "not JSON"},
        {
            "question_id": 3,
            "text": "No",
            "prompt": "Is 3 black? Please answer this question with one word.",
        },
        (99, "Yes"),
        {"question_id": 4, "error": "killed"},
        (4, "No"),
        "",
    ]
    status, out, err = score(QUESTIONS, answers)
    assert (status, err) == (1, "")
    for line in (
        "answers: 2 in ",
        "missing: 4 questions have no answer and are not in the figures (2, 3, 5, 6)\n",
        'errors: 3 lines are errors instead of answers (2, {"line": 7}, 4)\n',
        "duplicate: 1 further answers to a question that had one; the first is in the figures "
        "(1)\n",
        "unknown: 1 answers to questions that are not in the file (99)\n",
        "another prompt: 1 answers name another prompt, picture or category and are not in the "
        "figures (3)\n",
        "| llava | random | 2 | 100.00 | 100.00 | 100.00 | 100.00 | 50.00 |\n",
        "| llava | popular | 0 | – | – | – | – | – |\n",
    ):
        assert line in out
    result = json.loads(score(QUESTIONS, answers, "--json")[1])
    assert (result["missing"], result["unknown"], result["errors"]) == (
        [2, 3, 5, 6],
        [99],
        [2, {"line": 7}, 4],
    )


def test_no_answers_at_all(score):
    """A file without answers would be a division by zero, or have exit status 0."""
    status, out, err = score(QUESTIONS, [])
    assert (status, err) == (1, "")
    assert "missing: 6 " in out
    assert "(1, 2, 3, 4, 5, ...)" in out


@pytest.mark.parametrize(
    ("questions", "answers", "message"),
    [
        (["{"], [], "questions.jsonl, line 1: not JSON"),
        (["[]"], [], "questions.jsonl: holds no questions"),
        (["[[]]"], [], "questions.jsonl, entry 1: found list, expected an object"),
        (["["], [], "questions.jsonl, line 1: not JSON"),
        (["[" * 100_000], [], "questions.jsonl, line 1: not JSON"),
        (
            [{"question_id": True, "text": "Is 1?", "label": "yes"}],
            [],
            "question_id is True, expected a number",
        ),
        (
            [{"question_id": 1, "text": ["Is 1?"], "label": "yes"}],
            [],
            "text is ['Is 1?'], expected the question",
        ),
        ([], [], "questions.jsonl: holds no questions"),
        (
            [(1, "yes"), (2,)],
            [],
            "questions.jsonl, line 2: has no label; give the POPE file that has it",
        ),
        ([(1, "maybe")], [], "line 1: label is 'maybe', expected yes or no"),
        (
            [(1, "yes"), (1, "no")],
            [],
            "question_id 1 for the second time among the questions; give the file that was asked",
        ),
        ([([1], "yes")], [], "line 1: question_id is [1], expected a number or a text"),
        ([(1, "yes")], ["nonsense"], "answers.jsonl, line 1: not JSON"),
        (
            [(1, "yes")],
            [{"question_id": 1}],
            "answers.jsonl, line 1: expected question_id and text, or an error",
        ),
    ],
)
def test_a_damaged_file_is_one_line(score, questions, answers, message):
    """A damaged file would be a traceback, or a wrong label be counted as no."""
    status, out, err = score(questions, answers)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert message in err


def test_a_file_that_is_not_there(capsys, tmp_path):
    """It was an error number without a next step."""
    assert main(["--questions", str(tmp_path / "no.jsonl"), "--answers", "no.jsonl"]) == 1
    assert (
        capsys.readouterr().err == f"error: {tmp_path / 'no.jsonl'}: no such file; check the name\n"
    )


def test_answers_that_batch_has_not_finished(score, write, capsys, tmp_path):
    """An unfinished run's answers would be called missing, without saying how to go on."""
    write("answers.jsonl.partial", [])
    questions = write("questions.jsonl", [{"question_id": 1, "text": "Is 1?", "label": "yes"}])
    assert main(["--questions", questions, "--answers", str(tmp_path / "answers.jsonl")]) == 1
    assert (
        "no such file; minillava.batch has not finished it: give its command again\n"
        in capsys.readouterr().err
    )


def test_a_file_that_is_no_text(capsys, tmp_path):
    """A file that is not UTF-8 would be a traceback."""
    (tmp_path / "q.jsonl").write_bytes(b'{"question_id": "caf\xe9"}')
    assert main(["--questions", str(tmp_path / "q.jsonl"), "--answers", "no.jsonl"]) == 1
    assert "q.jsonl: not text in utf-8 (" in capsys.readouterr().err


def test_files_in_the_encodings_that_batch_reads(write, capsys, tmp_path):
    """Labels that PowerShell wrote were refused, although batch asks them."""
    label = {"question_id": 1, "text": "Is 1 caf\xe9?", "label": "yes"}
    content = json.dumps(label, ensure_ascii=False) + "\r\n"
    (tmp_path / "q.jsonl").write_text(content, encoding="utf-16", newline="")
    answers = write("a.jsonl", [{"question_id": 1, "text": "Yes"}])
    arguments = ["--questions", str(tmp_path / "q.jsonl"), "--answers", answers]
    assert main(arguments) == 0
    assert "answers: 1 in" in capsys.readouterr().out
    (tmp_path / "q.jsonl").write_bytes(  # two files put behind one another
        b"\xef\xbb\xbf"
        + json.dumps(label).encode()
        + b"\n\xef\xbb\xbf"
        + json.dumps(label | {"question_id": 2}).encode()
    )
    assert main(arguments) == 1
    assert "missing: 1 " in capsys.readouterr().out


@pytest.fixture
def files(write):
    """Flags of labels and an answer, which cp1252 and ASCII cannot say."""
    questions = write("q.jsonl", [{"question_id": 1, "text": "Is 1?", "label": "no"}])
    return [
        *("--questions", questions),
        *("--answers", write("a.jsonl", [{"question_id": 1, "text": "know \u661f"}])),
    ]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_terminal_without_the_letters(files, monkeypatch, encoding, flags):
    """It was a traceback."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    assert main([*files, *flags]) == 0
    sys.stdout.flush()
    said = raw.getvalue().decode(encoding)
    if flags:  # JSON is whole in any encoding
        assert json.loads(said)["disagreements"][0]["text"] == "know \u661f"
    else:
        assert "| llava | overall | 1 | 0.00 |" in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize(
    ("redirection", "status", "said"),
    [
        (">/dev/full", 1, "error: stdout: No space left on device"),  # it was a traceback
        (">&-", 1, "error: stdout is closed, "),
        ("| head -c 0", 0, ""),
        ("--answers no.jsonl 2>&-", 1, ""),  # its error went to stdout, where the figures go
        ("--nonsense 2>&-", 2, ""),
    ],
)
def test_streams_that_are_full_or_closed(files, redirection, status, said):
    """A full stdout was a traceback, and with stderr closed errors went among the figures."""
    words = [sys.executable, str(ROOT / "tools" / "pope.py"), *files]
    command = f"set -o pipefail; {shlex.join(words)} {redirection}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == bool(said)


@pytest.mark.parity
@pytest.mark.parametrize(
    "name", ["bench", "eval_shapes", "gpu_check", "make_reference", "point_shapes", "pope"]
)
def test_wrong_usage_of_a_tool_is_one_line_on_stderr(name, monkeypatch, capsys):
    """With stderr closed, argparse prints usage on stdout."""
    if name in ("gpu_check", "make_reference"):
        pytest.importorskip("transformers")
    tool = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [name, "--nonsense"])
    with pytest.raises(SystemExit, match="2"):
        tool.main()
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), err[:7]) == ("", 1, "error: ")
    monkeypatch.setattr(sys, "stderr", None)
    with pytest.raises(SystemExit, match="2"):
        tool.main()
    assert capsys.readouterr().out == ""


def test_answers_whose_ids_begin_anew_without_a_category_are_refused(of_llava, capsys):
    """The first category's answers were scored by another one's labels: 0 %."""
    of_llava.answers = [
        {**answer, "question_id": i % 3 + 1} for i, answer in enumerate(of_llava.answers)
    ]
    status, found = scored(of_llava.arguments("popular", asked=False), capsys)
    assert status == 1
    assert "3 of 3 questions have several answers, which differ and name no category" in found
    for answer, asked in zip(of_llava.answers, of_llava.asked, strict=True):
        answer["category"] = asked["category"]
    status, found = scored(of_llava.arguments("popular", asked=False), capsys)
    # those of other categories are left out, and told
    assert (status, found["overall"]) == (1, 1.0)


@pytest.mark.parametrize(
    ("prompt", "text", "same"),
    [
        ("Is it red?", "Is it red?", True),
        ("Is it red?\nAnswer the question using a single word or phrase.", "Is it red?", True),
        ("Is it red? Please answer this question with one word.", "Is it red?", True),
        ("Is it red?", "Is it red?\nAnswer the question using a single word or phrase.", True),
        ("<image>\nIs it red?\r\nYes or no?", "Is it red?\r\n", True),
        ("Is it red\nYes or no?", "Is it red", True),
        ("Is it redder?", "Is it red", False),
        ("Is it red hot?", "Is it red", False),
        ("Is it blue?", "Is it red?", False),
        ("Is it red?", "", False),
    ],
)
def test_an_instruction_is_no_part_of_a_question(prompt, text, same):
    """An added instruction would make all answers foreign, or another question pass as the same."""
    assert same_question(prompt, text) is same


@pytest.mark.parametrize("ids", ["unique", "repeated"])
def test_answers_to_other_prompts_are_no_answers(score, ids):
    """They were scored, with exit status 0."""
    answers = [
        {"question_id": i, "prompt": f"Is {i + (i > 1)}?", "text": "No"} for i in range(1, 7)
    ]
    answers += [{"question_id": 1, "prompt": "Is 1?", "text": "Yes"}] * (ids == "repeated")
    status, out, _ = score(QUESTIONS, answers)
    assert status == 1
    assert "another prompt: 5 answers" in out
    assert "| llava | overall | 1 | 0.00 |" in out
    assert f"duplicate: {int(ids == 'repeated')} further" in out
    assert out.endswith("exit status 1.\n")


@pytest.mark.parametrize(("key", "value"), [("image", "other/y.jpg"), ("category", "popular")])
def test_answers_about_another_picture_or_category_are_no_answers(score, key, value):
    """The answer about another picture would be scored, since its question reads the same."""
    answers = [{"question_id": 1, "text": "Yes", key: value}]
    result = score([(1, "yes", "random")], answers, "--json")
    assert (result[0], json.loads(result[1])["another_prompt"]) == (1, [1])
    answers[0][key] = {"image": "any\\folder/x.jpg", "category": "random"}[key]
    assert score([(1, "yes", "random")], answers)[0] == 0


OBJECTS = {"red star": "yes", "red circle": "no", "blue circle": "yes"}


class Llava:
    """LLaVA's form: one file asked, with ids 1.., 10000001.., 20000001..; a file of labels from 1
    for each category. Every answer is right but those of adversarial, which are wrong."""

    categories = ("adversarial", "popular", "random")

    def __init__(self, write):
        self.asked, self.answers, self.write, self.labels = [], [], write, {}
        for start, category in zip((0, 10_000_000, 20_000_000), self.categories, strict=True):
            labels = []
            for i, (what, label) in enumerate(OBJECTS.items(), start=1):
                text, picture = f"Is there a {what} in the image?", "x.jpg"
                labels.append(
                    {"question_id": i, "image": f"val/{picture}", "text": text, "label": label}
                )
                prompt = f"{text}\nAnswer the question using a single word or phrase."
                one = {
                    "question_id": start + i,
                    "image": picture,
                    "text": prompt,
                    "category": category,
                }
                self.asked.append(one)
                said = label if category != "adversarial" else "no" if label == "yes" else "yes"
                self.answers.append(
                    {"question_id": start + i, "prompt": prompt, "text": said.title()}
                )
            self.labels[category] = labels

    def arguments(self, *categories, asked=True):
        files = [self.write(f"coco_pope_{name}.json", self.labels[name]) for name in categories]
        given = ["--asked", self.write("asked.jsonl", self.asked)] if asked else []
        return [
            "--questions",
            *files,
            *given,
            "--answers",
            self.write("answers.jsonl", self.answers),
            "--json",
        ]


@pytest.fixture
def of_llava(write):
    return Llava(write)


def scored(arguments, capsys):
    """(exit status, accuracy by category)."""
    status, (out, err) = main(arguments), capsys.readouterr()
    assert (out == "") == bool(err)
    return status, {
        name: row["accuracy"] for name, row in json.loads(out)["scores"]["llava"].items()
    } if out else err


@pytest.mark.parametrize("category", Llava.categories)
def test_ids_that_begin_anew_in_each_file_of_labels_are_refused(of_llava, capsys, category):
    """The answers to adversarial, ids 1 to 3, were scored against every file, with exit status
    0."""
    status, found = scored(of_llava.arguments(category, asked=False), capsys)
    assert status == 1
    assert (
        "6 answers have ids that the questions have not, and prompts that they have (question_id "
        "10000001" in found
    )
    assert "--asked" in found


@pytest.mark.parametrize("category", Llava.categories)
def test_with_what_was_asked_each_answer_finds_its_label(of_llava, capsys, category):
    """Where ids begin anew, an answer would be scored by another category's label."""
    right = float(category != "adversarial")
    assert scored(of_llava.arguments(category), capsys) == (0, {category: right, "overall": right})


def test_all_files_of_labels_at_once(of_llava, capsys):
    """The categories would be mixed when their files are given together."""
    status, found = scored(of_llava.arguments(*Llava.categories), capsys)
    assert (status, found) == (
        0,
        {"adversarial": 0, "popular": 1, "random": 1, "overall": pytest.approx(2 / 3)},
    )
    status, found = scored(of_llava.arguments(*Llava.categories, asked=False), capsys)
    assert (status, "for the second time among the questions" in found) == (1, True)


def test_labels_in_another_order_and_other_forms_of_file(of_llava, write, capsys):
    """An array, a byte order mark, carriage returns, a category as a field instead of the file's
    name."""
    labels = [{**label, "category": "popular"} for label in of_llava.labels["popular"][::-1]]
    of_llava.labels["popular"] = of_llava.labels["popular"][::-1]
    arguments = of_llava.arguments("popular")
    expected = (0, {"popular": 1, "overall": 1})
    assert scored(arguments, capsys) == expected
    for lines in (
        ["\ufeff" + json.dumps(labels, indent=1)],
        [json.dumps(label) + "\r" for label in labels],
    ):
        arguments[1] = write("labels.json", lines)
        assert scored(arguments, capsys) == expected


def test_one_file_with_all_labels_whose_ids_repeat(of_llava, write, capsys):
    """Labels whose ids repeat in one file would overwrite one another."""
    labels = [
        {**label, "category": name} for name in Llava.categories for label in of_llava.labels[name]
    ]
    arguments = of_llava.arguments("random")
    arguments[1] = write("labels.json", labels)
    assert scored(arguments, capsys)[1] == {
        "adversarial": 0,
        "popular": 1,
        "random": 1,
        "overall": pytest.approx(2 / 3),
    }


def test_labels_whose_category_nothing_says(of_llava, write, capsys):
    """Labels of an unknown category would be matched to whichever comes first."""
    arguments = of_llava.arguments("random")
    arguments[1] = write("labels.json", of_llava.labels["random"])
    status, found = scored(arguments, capsys)
    assert (
        status,
        "of which category are its labels (adversarial, popular, random)?" in found,
    ) == (1, True)


def test_labels_of_a_category_that_was_not_asked(of_llava, capsys):
    """Labels that nobody asked about would be scored as all missing, or by foreign answers."""
    of_llava.asked = [one for one in of_llava.asked if one["category"] == "adversarial"]
    of_llava.answers = of_llava.answers[:3]
    status, found = scored(of_llava.arguments("random"), capsys)
    assert (status, "asks none of the questions that have labels" in found) == (1, True)


def test_what_was_asked_without_categories(of_llava, write, capsys):
    """Ids that stand for several questions would be scored by the first that has them."""
    of_llava.asked = [{k: v for k, v in one.items() if k != "category"} for one in of_llava.asked]
    status, found = scored(of_llava.arguments("random"), capsys)
    assert (status, "no category says which has the label" in found) == (1, True)
    of_llava.asked, of_llava.answers = of_llava.asked[3:6], of_llava.answers[3:6]
    assert scored(of_llava.arguments("random"), capsys) == (0, {"random": 1, "overall": 1})


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        (lambda found: found.answers.pop(), {"missing"}),
        (lambda found: found.labels["random"].pop(), {"unknown"}),
        (lambda found: found.asked.pop(), {"missing", "unknown"}),
        (lambda found: found.answers.append(found.answers[-1]), {"duplicate"}),
        (lambda found: found.answers.append({"question_id": 7, "text": "Yes"}), {"unknown"}),
        (
            lambda found: found.answers[-1].update(prompt="Is there a dog?"),
            {"missing", "another_prompt"},
        ),
        # of another category, whose labels are not given
        (lambda found: found.answers.pop(0), set()),
        (lambda found: found.answers.reverse(), set()),
    ],
)
def test_whatever_does_not_fit_ends_with_status_1(of_llava, capsys, change, kinds):
    """An incomplete score would end with exit status 0, and a script take it for whole."""
    change(of_llava)
    status, result = main(of_llava.arguments("random")), json.loads(capsys.readouterr().out)
    found = {name for name in ("missing", "unknown", "duplicate", "another_prompt") if result[name]}
    assert (status, result["complete"], found) == (int(bool(kinds)), not kinds, kinds)
