#!/usr/bin/env python3
"""Scores answers to POPE (Li et al. 2023: "Is there a ... in the image?") in the three ways that
papers do.

    python tools/pope.py --questions coco_pope_popular.json --answers pope-answers.jsonl
    python tools/pope.py --questions coco/*.json --asked llava_pope_test.jsonl --answers pope-answers.jsonl

--questions are POPE's files with labels, {question_id, image, text, label[, category]}; answers are
{question_id, text[, prompt]} as `minillava.batch` and LLaVA write them; JSON lines or an array.
"yes" is the positive class. The scorers, each as its authors published it:

- llava (llava/eval/eval_pope.py): the text up to the first full stop, without commas, cut at spaces
  (not at the ends of lines); "no" if No, not or no is among these words, else "yes".
- vcd (experiments/eval/eval_pope.py): letters in lower case, words or not: where "yes" is right,
  right if "yes" is anywhere in the text; where "no" is right, right if "no" is ("know" will do).
  Its reading depends on the label.
- ritual (eval_bench/pope_eval_llava.py): one verdict per line of the answer, without full stops and
  commas; "no" if one of No, not, no, NO or a word in n't is in it, else "yes". An answer of several
  lines makes several verdicts, which are compared with the labels of the questions that follow. The
  published script reads a category per run, so the shift is here within a category; verdicts beyond
  the last label count in the yes-ratio only.

Answers are matched by question_id, where the published scripts go by the order of the lines. An
answer that names another prompt than the question's text is left out; an instruction after the text
is not another prompt. POPE's files are each numbered from 1, and LLaVA's file of all of them is
not: --asked is then the file that was asked, and its questions are found among the labels by
category, picture and text. The category of a label is its field, or else the word in the file's
name. Without --asked such answers are refused, since the ids of one category would fit the labels
of another. A figure that would divide by zero is left out, where the published scripts end with an
error.

Exit status: 0 each question has one answer and each answer its question, 1 otherwise or a
file cannot be read, 2 wrong usage.
"""

import interrupts

if __name__ == "__main__":
    interrupts.leave_at_once()

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

# run from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from minillava.cli.arguments import Parser
from minillava.cli.messages import print_json, run
from minillava.files.text import decode

CATEGORIES = ("random", "popular", "adversarial")
"""How POPE draws what is not there. Its files have this word in their names, and no field for
it."""
SHOWN = 5
"""How many ids or answers a report names; --json has all."""


def llava(text: str, truth: bool) -> list[bool]:
    words = text.partition(".")[0].replace(",", "").split(" ")
    return [not {"No", "not", "no"} & set(words)]


def vcd(text: str, truth: bool) -> list[bool]:
    text = text.lower()
    return ["yes" in text if truth else "no" not in text]


def ritual(text: str, truth: bool) -> list[bool]:
    lines = [line.replace(".", "").replace(",", "").split(" ") for line in text.strip().split("\n")]
    return [
        not any(w in ("No", "not", "no", "NO") or w.endswith("n't") for w in words)
        for words in lines
    ]


# From an answer and the truth, True for yes, to verdicts, True for yes.
SCORERS = {"llava": llava, "vcd": vcd, "ritual": ritual}


@dataclass
class Question:
    """image: its name without folders, None where the file has none. category: None where nothing
    says it."""

    question_id: int | str
    text: str
    truth: bool
    image: str | None
    category: str | None


@dataclass
class Answers:
    """What an answers file holds. The lists are ids, in the order of the file (missing: of the
    questions)."""

    texts: dict = field(default_factory=dict)  # by question id
    # ids, or {"label_id": n} of a question that was not asked
    missing: list = field(default_factory=list)
    duplicate: list = field(default_factory=list)
    unknown: list = field(default_factory=list)
    # ids, or {"line": n} where minillava.batch could not read one
    errors: list = field(default_factory=list)
    # the answer says that it was asked something else
    another_prompt: list = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Each question has one answer, and each answer is to one of the questions."""
        return not (self.missing or self.duplicate or self.unknown or self.another_prompt)


def read_lines(path: Path) -> list[tuple[str, dict]]:
    """(where, object) for each line that is not blank, or for each entry of a JSON array. Raises
    ValueError for what is not a JSON object, and FileNotFoundError with what to do."""
    try:
        content = decode(path.read_bytes(), str(path))
    except FileNotFoundError:
        unfinished = path.with_name(f"{path.name}.partial").exists()
        step = (
            "minillava.batch has not finished it: give its command again"
            if unfinished
            else "check the name"
        )
        raise FileNotFoundError(f"{path}: no such file; {step}") from None
    try:
        array = json.loads(content) if content.lstrip().startswith("[") else None
    except (ValueError, RecursionError):
        array = None  # lines that begin with a bracket, or damaged: the lines will tell
    if isinstance(array, list):
        named = [
            (f"{path}, entry {number}", record) for number, record in enumerate(array, start=1)
        ]
    else:
        named = []
        for number, line in enumerate(content.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.removeprefix("\ufeff"))  # files put behind one another
                named.append((f"{path}, line {number}", record))
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{path}, line {number}: not JSON ({error}); expected one object per line"
                ) from None
    for where, record in named:
        if not isinstance(record, dict):
            raise ValueError(f"{where}: found {type(record).__name__}, expected an object")
    return named


def read_questions(
    path: Path, needed: Sequence[str] = ("question_id", "text", "label")
) -> list[Question]:
    """In the order of the file. A file without labels (`needed` leaves them out) has no truth:
    False throughout. Raises ValueError for a line without what is needed."""
    questions = []
    for where, record in read_lines(path):
        for key in needed:
            if key not in record:
                raise ValueError(f"{where}: has no {key}; give the POPE file that has it")
        name, label = record["question_id"], str(record.get("label", "no")).strip().lower()
        if type(name) not in (int, str):  # a bool is an int, and True is 1
            raise ValueError(f"{where}: question_id is {name!r}, expected a number or a text")
        if label not in ("yes", "no"):
            raise ValueError(f"{where}: label is {record['label']!r}, expected yes or no")
        if not isinstance(record["text"], str):
            raise ValueError(f"{where}: text is {record['text']!r}, expected the question")
        questions.append(
            Question(name, record["text"], label == "yes", _picture(record), _category(record))
        )
    if not questions:
        raise ValueError(f"{path}: holds no questions")
    return questions


def _picture(record: dict) -> str | None:
    image = record.get("image")
    return PureWindowsPath(image).name if isinstance(image, str) else None  # both kinds of slashes


def _category(record: dict) -> str | None:
    return None if record.get("category") is None else str(record["category"])


def same_question(a: str, b: str) -> bool:
    """Whether two texts are one question, of which one may end in an instruction ("Answer with yes
    or no.")."""
    a, b = (text.replace("\r\n", "\n").replace("<image>", "").strip() for text in (a, b))
    short, long = sorted((a, b), key=len)
    rest = long.removeprefix(short)
    if short == long:
        return True
    ended = rest[0] == "\n" or (rest[0].isspace() and short.endswith(("?", ".", "!")))
    return bool(short) and long.startswith(short) and ended


def label_questions(paths: Sequence[Path], asked: Collection[str] = ()) -> list[Question]:
    """The questions of all label files. asked: the categories that were asked. Where a question has
    no category of its own, it is the one word of `asked` or of CATEGORIES in the file's name.
    Raises ValueError if there is none."""
    found = []
    for path in paths:
        words = re.split(r"[^0-9a-z]+", path.stem.lower())
        named = [category for category in {*asked, *CATEGORIES} if category.lower() in words]
        if len(named) != 1:
            named = (
                list(asked)
                if len(asked) == 1
                else [path.stem]
                if len(paths) > 1 and not asked
                else [None]
            )
        for question in read_questions(path):
            if question.category is None:
                (question.category,) = named
            if question.category is None and asked:
                known = ", ".join(sorted(asked))
                step = "put the word into its name"
                raise ValueError(f"{path}: of which category are its labels ({known})? {step}")
            found.append(question)
    return found


def by_id(questions: Sequence[Question]) -> dict[int | str, Question]:
    """Raises ValueError for an id twice."""
    found = {}
    for question in questions:
        name = question.question_id
        if name in found:
            step = "give the file that was asked, with unique ids, as --asked"
            raise ValueError(
                f"question_id {name!r} for the second time among the questions; {step}"
            )
        found[name] = question
    return found


def renumber(
    labels: Sequence[Question], asked: Sequence[Question]
) -> tuple[dict[int | str, Question], list, list]:
    """The questions with labels by the ids under which they were asked, in the order of the labels;
    the ids of labels that nobody asked about; and the ids asked that have no label although their
    category has some. Two are one question if category, picture and text agree; of equal ones the
    first goes with the first."""
    free: dict[tuple, list[Question]] = {}
    categories = {question.category for question in asked}
    for question in by_id(asked).values():
        free.setdefault((question.category, question.image), []).append(question)
    found, left, used = {}, [], set()
    for label in labels:
        key = (None if categories == {None} else label.category, label.image)
        alike = [
            question for question in free.get(key, []) if same_question(question.text, label.text)
        ]
        used.add(key[0])
        if not alike:
            left.append({"label_id": label.question_id})
            continue
        if len(alike) > 1 and key[0] is None:
            ids = ", ".join(repr(question.question_id) for question in alike[:2])
            raise ValueError(
                f"question_id {ids} ask the same, and no category says which has the label"
            )
        free[key].remove(alike[0])
        found[alike[0].question_id] = label
    extra = [
        q.question_id for (category, _), group in free.items() if category in used for q in group
    ]
    return found, left, extra


def read_answers(
    path: Path, questions: dict[int | str, Question], elsewhere: Collection[int | str] = ()
) -> Answers:
    """elsewhere: ids of questions that are known, but have no label here. Raises ValueError for a
    line that is neither an answer nor an error, and for answers whose ids may be another numbering
    than the questions', or several numberings at once."""
    answers, strangers, again, contradicts = Answers(), [], set(), False
    for where, record in read_lines(path):
        name = record.get("question_id")
        if "error" in record:
            answers.errors.append({"line": record.get("line")} if name is None else name)
        elif type(name) not in (int, str) or not isinstance(record.get("text"), str):
            raise ValueError(f"{where}: expected question_id and text, or an error")
        elif name in elsewhere:
            continue
        elif name not in questions:
            answers.unknown.append(name)
            if isinstance(record.get("prompt"), str):
                strangers.append(record["prompt"])
        elif not _answers(record, questions[name]):
            answers.another_prompt.append(name)
        elif name in answers.texts:
            answers.duplicate.append(name)
            if _category(record) is None:
                again.add(name)
                contradicts |= record["text"] != answers.texts[name]
        else:
            answers.texts[name] = record["text"]
    texts = {question.text for question in questions.values()}
    fits = {prompt: any(same_question(prompt, text) for text in texts) for prompt in {*strangers}}
    if alike := sum(fits[prompt] for prompt in strangers):
        raise ValueError(
            f"{path}: {alike} answers have ids that the questions have not, and prompts that they "
            "have "
            f"(question_id {answers.unknown[0]!r}, ...): ids and labels may not belong together; "
            "give the file that was asked as --asked"
        )
    if contradicts and len(again) > max(1, len(questions) / 2):
        raise ValueError(
            f"{path}: {len(again)} of {len(questions)} questions have several answers, which differ "
            "and name no category: they may be those of several files of labels, each numbered from "
            "1; give the answers to one of them, or put the category into each answer"
        )
    answers.missing = [name for name in questions if name not in answers.texts]
    return answers


def _answers(record: dict, question: Question) -> bool:
    """Whether an answer is to this question, by all that it says about it: prompt, picture and
    category, if any."""
    prompt, image, category = (
        record.get("prompt", question.text),
        _picture(record),
        _category(record),
    )
    return (
        isinstance(prompt, str)
        and same_question(prompt, question.text)
        and (None in (image, question.image) or image == question.image)
        and (None in (category, question.category) or category == question.category)
    )


def count(scorer: str, pairs: Sequence[tuple[str, bool]]) -> dict[str, int]:
    """pairs: the answers of one category with the truth. TP, FP, TN, FN, and all verdicts and those
    that are yes."""
    verdicts = [verdict for text, truth in pairs for verdict in SCORERS[scorer](text, truth)]
    counts = dict.fromkeys(("TP", "FP", "TN", "FN"), 0)
    # ritual may say more than there are questions
    for said, (_, truth) in zip(verdicts, pairs, strict=False):
        counts[("T" if said == truth else "F") + ("P" if said else "N")] += 1
    return {**counts, "verdicts": len(verdicts), "yes": sum(verdicts)}


def figures(counts: dict[str, int]) -> dict[str, float | None]:
    """The five of POPE, None where there is nothing to divide by."""

    def ratio(part: float, whole: float) -> float | None:
        return part / whole if whole else None

    right, said, true = (
        counts[a] + counts[b] for a, b in (("TP", "TN"), ("TP", "FP"), ("TP", "FN"))
    )
    return {
        "accuracy": ratio(right, sum(counts[name] for name in ("TP", "FP", "TN", "FN"))),
        "precision": ratio(counts["TP"], said),
        "recall": ratio(counts["TP"], true),
        # 2 P R / (P + R), P and R written out
        "F1": ratio(2 * counts["TP"], said + true) if counts["TP"] else None,
        "yes-ratio": ratio(counts["yes"], counts["verdicts"]),
    }


def score(
    scorer: str, questions: dict[int | str, Question], texts: dict[int | str, str]
) -> dict[str, dict]:
    """Per category and "overall": how many answers, counts and figures."""
    by_category = {question.category or "all": [] for question in questions.values()}
    for name, question in questions.items():
        if name in texts:
            by_category[question.category or "all"].append((texts[name], question.truth))
    asked = {category: len(pairs) for category, pairs in by_category.items()}
    counted = {category: count(scorer, pairs) for category, pairs in by_category.items()}
    if len(counted) > 1 or "all" not in counted:
        overall = {
            key: sum(counts[key] for counts in counted.values())
            for key in next(iter(counted.values()))
        }
    else:
        overall, counted = counted["all"], {}  # a file without categories
    counted["overall"], asked["overall"] = overall, len(texts)
    return {
        name: {"answers": asked[name], **counts, **figures(counts)}
        for name, counts in counted.items()
    }


def disagreements(questions: dict[int | str, Question], texts: dict[int | str, str]) -> list[dict]:
    """The answers that the three read differently, each answer by itself; several lines are several
    verdicts."""
    found = []
    for name, question in questions.items():
        if name not in texts:
            continue
        read = {
            scorer: verdicts(texts[name], question.truth) for scorer, verdicts in SCORERS.items()
        }
        if len({tuple(verdicts) for verdicts in read.values()}) > 1:
            said = {
                scorer: " ".join("yes" if v else "no" for v in verdicts)
                for scorer, verdicts in read.items()
            }
            found.append(
                {
                    "question_id": name,
                    "label": "yes" if question.truth else "no",
                    **said,
                    "text": texts[name],
                }
            )
    return found


def evaluate(
    question_files: Sequence[Path],
    answers_file: Path,
    scorers: Sequence[str],
    asked_file: Path | None = None,
) -> dict:
    """Everything that is printed. Raises OSError or ValueError for files that cannot be read or do
    not fit."""
    left, extra, elsewhere = [], [], set()
    if asked_file is None:
        questions = by_id(label_questions(question_files))
    else:
        asked = read_questions(asked_file, ("question_id", "text", "image"))
        labels = label_questions(question_files, {question.category for question in asked} - {None})
        questions, left, extra = renumber(labels, asked)
        if not questions:
            raise ValueError(
                f"{asked_file}: asks none of the questions that have labels; give labels of its "
                "categories"
            )
        elsewhere = {question.question_id for question in asked} - questions.keys() - set(extra)
    answers = read_answers(answers_file, questions, elsewhere)
    answers.missing += left
    prompts = "".join(f"{question.text}\0" for question in questions.values())
    return {
        "question_file": ", ".join(map(str, question_files)),
        "questions": len(questions),
        # the texts in order, \0 behind each
        "sha256_of_prompts": hashlib.sha256(prompts.encode()).hexdigest(),
        "answers_file": str(answers_file),
        "answered": len(answers.texts),
        "complete": answers.complete,
        **{name: ids for name, ids in vars(answers).items() if name != "texts"},
        "scores": {scorer: score(scorer, questions, answers.texts) for scorer in scorers},
        "disagreements": disagreements(questions, answers.texts),
    }


def report(result: dict) -> str:
    """As text and a markdown table, figures in per cent."""
    lines = [
        f"questions: {result['questions']} in {result['question_file']}, prompts sha256 "
        f"{result['sha256_of_prompts']}",
        f"answers: {result['answered']} in {result['answers_file']}",
    ]
    kinds = {
        "missing": "questions have no answer and are not in the figures",
        "errors": "lines are errors instead of answers",
        "duplicate": "further answers to a question that had one; the first is in the figures",
        "unknown": "answers to questions that are not in the file",
        "another_prompt": "answers name another prompt, picture or category and are not in the figures",
    }
    for kind, meaning in kinds.items():
        ids = result[kind]
        more = ", ..." if len(ids) > SHOWN else ""
        listed = f" ({', '.join(json.dumps(name) for name in ids[:SHOWN])}{more})" if ids else ""
        lines.append(f"{kind.replace('_', ' ')}: {len(ids)} {meaning}{listed}")
    names = ("accuracy", "precision", "recall", "F1", "yes-ratio")
    lines += [
        "",
        f"| scorer | category | answers | {' | '.join(names)} |",
        "|---|---|" + "---:|" * 6,
    ]
    for scorer, categories in result["scores"].items():
        for category, row in categories.items():
            cells = ["–" if row[name] is None else f"{100 * row[name]:.2f}" for name in names]
            lines.append(f"| {scorer} | {category} | {row['answers']} | {' | '.join(cells)} |")
    rest = result["scores"].get("ritual", {}).get("overall", {})
    if rest and (more := rest["verdicts"] - rest["answers"]):
        lines += [
            "",
            f"ritual: {more} verdict(s) more than answers, from further lines: what follows them "
            "is shifted",
        ]
    differing = result["disagreements"]
    lines += ["", f"The scorers disagree about {len(differing)} of {result['answered']} answers."]
    for one in differing[:SHOWN]:
        read = ", ".join(f"{scorer} {one[scorer]}" for scorer in SCORERS)
        lines.append(
            f"- {one['question_id']} (label {one['label']}): {read}: {json.dumps(one['text'])}"
        )
    if not result["complete"]:
        lines += [
            "",
            "Not every question has one answer and every answer its question: exit status 1.",
        ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--questions", "--question-file", type=Path, nargs="+", required=True, metavar="FILE"
    )
    parser.add_argument("--asked", type=Path, metavar="FILE", help="the questions as they were asked, where their ids "
                        "are not those of --questions (LLaVA's llava_pope_test.jsonl)")  # fmt: skip
    parser.add_argument("--answers", "--answers-file", type=Path, required=True, metavar="FILE")
    parser.add_argument("--scorer", choices=[*SCORERS, "all"], default="all", help="default: all")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object, with all ids and disagreements"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show where an error happened")
    options = parser.parse_args(argv)
    scorers = list(SCORERS) if options.scorer == "all" else [options.scorer]

    def body() -> int:
        result = evaluate(options.questions, options.answers, scorers, options.asked)
        if options.json:
            print_json(result)
        else:
            print(report(result))
        return 0 if result["complete"] else 1

    return run(body, options.verbose, prints=True)


if __name__ == "__main__":
    interrupts.end(main)
