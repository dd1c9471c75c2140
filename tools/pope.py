#!/usr/bin/env python3
"""Scores answers to POPE (Li et al. 2023: "Is there a ... in the image?") in the three ways that papers do.

    python tools/pope.py --questions coco_pope_popular.jsonl --answers answers.jsonl

Questions are JSON lines {question_id, image, text, label[, category]}, answers {question_id, text[, prompt]} as
`minillava.batch` and LLaVA write them. "yes" is the positive class. The scorers, each as its authors published it:

- llava (llava/eval/eval_pope.py): the text up to the first full stop, without commas, cut at spaces (not at the ends of
  lines); "no" if No, not or no is among these words, else "yes".
- vcd (experiments/eval/eval_pope.py): letters in lower case, words or not: where "yes" is right, right if "yes" is
  anywhere in the text; where "no" is right, right if "no" is ("know" will do). Its reading depends on the label.
- ritual (eval_bench/pope_eval_llava.py): one verdict per line of the answer, without full stops and commas; "no" if one
  of No, not, no, NO or a word in n't is in it, else "yes". An answer of several lines makes several verdicts, which are
  compared with the labels of the questions that follow. The published script reads a category per run, so the shift is
  here within a category; verdicts beyond the last label count in the yes-ratio only.

Answers are matched by question_id, where the published scripts go by the order of the lines; of two answers to one
question the first counts. A figure that would divide by zero is left out, where they end with an error.
Exit status: 0 all questions answered, 1 some are not or a file cannot be read, 2 wrong usage.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
    return [not any(w in ("No", "not", "no", "NO") or w.endswith("n't") for w in words) for words in lines]


# From an answer and the truth, True for yes, to verdicts, True for yes.
SCORERS = {"llava": llava, "vcd": vcd, "ritual": ritual}


@dataclass
class Question:
    text: str
    truth: bool
    category: str


@dataclass
class Answers:
    """What an answers file holds. The lists are ids, in the order of the file (missing: of the questions)."""

    texts: dict = field(default_factory=dict)  # by question id
    missing: list = field(default_factory=list)
    duplicate: list = field(default_factory=list)
    unknown: list = field(default_factory=list)
    errors: list = field(default_factory=list)  # ids, or {"line": n} where minillava.batch could not read one
    another_prompt: list = field(default_factory=list)  # the answer says that it was asked something else


def read_lines(path: Path) -> list[tuple[str, dict]]:
    """(where, object) for each line that is not blank. Raises ValueError for what is not a JSON object."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); expected one object per line") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: found {type(record).__name__}, expected an object")
        found.append((f"{path}, line {number}", record))
    return found


def read_questions(path: Path) -> dict[int | str, Question]:
    """By id, in the order of the file. Raises ValueError for a line without text or label, or for an id twice."""
    questions = {}
    for where, record in read_lines(path):
        for key in ("question_id", "text", "label"):
            if key not in record:
                raise ValueError(f"{where}: has no {key}; give the POPE file that has it")
        name, label = record["question_id"], str(record["label"]).strip().lower()
        if not isinstance(name, (int, str)):
            raise ValueError(f"{where}: question_id is {name!r}, expected a number or a text")
        if label not in ("yes", "no"):
            raise ValueError(f"{where}: label is {record['label']!r}, expected yes or no")
        if name in questions:
            raise ValueError(f"{where}: question_id {name!r} for the second time; score each POPE file by itself")
        questions[name] = Question(record["text"], label == "yes", str(record.get("category", "all")))
    if not questions:
        raise ValueError(f"{path}: holds no questions")
    return questions


def read_answers(path: Path, questions: dict[int | str, Question]) -> Answers:
    """Raises ValueError for a line that is neither an answer nor an error."""
    answers = Answers()
    for where, record in read_lines(path):
        name = record.get("question_id")
        if "error" in record:
            answers.errors.append({"line": record.get("line")} if name is None else name)
        elif not isinstance(name, (int, str)) or not isinstance(record.get("text"), str):
            raise ValueError(f"{where}: expected question_id and text, or an error")
        elif name not in questions:
            answers.unknown.append(name)
        elif name in answers.texts:
            answers.duplicate.append(name)
        else:
            answers.texts[name] = record["text"]
            if record.get("prompt", questions[name].text) != questions[name].text:
                answers.another_prompt.append(name)
    answers.missing = [name for name in questions if name not in answers.texts]
    return answers


def count(scorer: str, pairs: Sequence[tuple[str, bool]]) -> dict[str, int]:
    """pairs: the answers of one category with the truth. TP, FP, TN, FN, and all verdicts and those that are yes."""
    verdicts = [verdict for text, truth in pairs for verdict in SCORERS[scorer](text, truth)]
    counts = dict.fromkeys(("TP", "FP", "TN", "FN"), 0)
    for said, (_, truth) in zip(verdicts, pairs, strict=False):  # ritual may say more than there are questions
        counts[("T" if said == truth else "F") + ("P" if said else "N")] += 1
    return {**counts, "verdicts": len(verdicts), "yes": sum(verdicts)}


def figures(counts: dict[str, int]) -> dict[str, float | None]:
    """The five of POPE, None where there is nothing to divide by."""

    def ratio(part: float, whole: float) -> float | None:
        return part / whole if whole else None

    right, said, true = (counts[a] + counts[b] for a, b in (("TP", "TN"), ("TP", "FP"), ("TP", "FN")))
    return {
        "accuracy": ratio(right, sum(counts[name] for name in ("TP", "FP", "TN", "FN"))),
        "precision": ratio(counts["TP"], said),
        "recall": ratio(counts["TP"], true),
        "F1": ratio(2 * counts["TP"], said + true) if counts["TP"] else None,  # 2 P R / (P + R), P and R written out
        "yes-ratio": ratio(counts["yes"], counts["verdicts"]),
    }


def score(scorer: str, questions: dict[int | str, Question], texts: dict[int | str, str]) -> dict[str, dict]:
    """Per category and "overall": how many answers, counts and figures."""
    by_category = {question.category: [] for question in questions.values()}
    for name, question in questions.items():
        if name in texts:
            by_category[question.category].append((texts[name], question.truth))
    asked = {category: len(pairs) for category, pairs in by_category.items()}
    counted = {category: count(scorer, pairs) for category, pairs in by_category.items()}
    if len(counted) > 1 or "all" not in counted:
        overall = {key: sum(counts[key] for counts in counted.values()) for key in next(iter(counted.values()))}
    else:
        overall, counted = counted["all"], {}  # a file without categories
    counted["overall"], asked["overall"] = overall, len(texts)
    return {name: {"answers": asked[name], **counts, **figures(counts)} for name, counts in counted.items()}


def disagreements(questions: dict[int | str, Question], texts: dict[int | str, str]) -> list[dict]:
    """The answers that the three read differently, each answer by itself; several lines are several verdicts."""
    found = []
    for name, question in questions.items():
        if name not in texts:
            continue
        read = {scorer: verdicts(texts[name], question.truth) for scorer, verdicts in SCORERS.items()}
        if len({tuple(verdicts) for verdicts in read.values()}) > 1:
            said = {scorer: " ".join("yes" if v else "no" for v in verdicts) for scorer, verdicts in read.items()}
            found.append({"question_id": name, "label": "yes" if question.truth else "no", **said, "text": texts[name]})
    return found


def evaluate(question_file: Path, answers_file: Path, scorers: Sequence[str]) -> dict:
    """Everything that is printed. Raises OSError or ValueError for files that cannot be read."""
    questions = read_questions(question_file)
    answers = read_answers(answers_file, questions)
    prompts = "".join(f"{question.text}\0" for question in questions.values())
    return {
        "question_file": str(question_file),
        "questions": len(questions),
        "sha256_of_prompts": hashlib.sha256(prompts.encode()).hexdigest(),  # the texts in order, \0 behind each
        "answers_file": str(answers_file),
        "answered": len(answers.texts),
        **{name: ids for name, ids in vars(answers).items() if name != "texts"},
        "scores": {scorer: score(scorer, questions, answers.texts) for scorer in scorers},
        "disagreements": disagreements(questions, answers.texts),
    }


def report(result: dict) -> str:
    """As text and a markdown table, figures in per cent."""
    lines = [
        f"questions: {result['questions']} in {result['question_file']}, prompts sha256 {result['sha256_of_prompts']}",
        f"answers: {result['answered']} in {result['answers_file']}",
    ]
    kinds = {
        "missing": "questions have no answer and are not in the figures",
        "errors": "lines are errors instead of answers",
        "duplicate": "further answers to a question that had one; the first counts",
        "unknown": "answers to questions that are not in the file",
        "another_prompt": "answers name another prompt than the question's text",
    }
    for kind, meaning in kinds.items():
        ids = result[kind]
        more = ", ..." if len(ids) > SHOWN else ""
        listed = f" ({', '.join(json.dumps(name) for name in ids[:SHOWN])}{more})" if ids else ""
        lines.append(f"{kind.replace('_', ' ')}: {len(ids)} {meaning}{listed}")
    names = ("accuracy", "precision", "recall", "F1", "yes-ratio")
    lines += ["", f"| scorer | category | answers | {' | '.join(names)} |", "|---|---|" + "---:|" * 6]
    for scorer, categories in result["scores"].items():
        for category, row in categories.items():
            cells = ["–" if row[name] is None else f"{100 * row[name]:.2f}" for name in names]
            lines.append(f"| {scorer} | {category} | {row['answers']} | {' | '.join(cells)} |")
    rest = result["scores"].get("ritual", {}).get("overall", {})
    if rest and (more := rest["verdicts"] - rest["answers"]):
        lines += ["", f"ritual: {more} verdict(s) more than answers, from further lines: what follows them is shifted"]
    differing = result["disagreements"]
    lines += ["", f"The scorers disagree about {len(differing)} of {result['answered']} answers."]
    for one in differing[:SHOWN]:
        read = ", ".join(f"{scorer} {one[scorer]}" for scorer in SCORERS)
        lines.append(f"- {one['question_id']} (label {one['label']}): {read}: {json.dumps(one['text'])}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", "--question-file", type=Path, required=True, metavar="FILE")
    parser.add_argument("--answers", "--answers-file", type=Path, required=True, metavar="FILE")
    parser.add_argument("--scorer", choices=[*SCORERS, "all"], default="all", help="default: all")
    parser.add_argument("--json", action="store_true", help="one JSON object, with all ids and disagreements")
    options = parser.parse_args(argv)
    scorers = list(SCORERS) if options.scorer == "all" else [options.scorer]
    try:
        result = evaluate(options.questions, options.answers, scorers)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result, ensure_ascii=False) if options.json else report(result))
    return 1 if result["missing"] else 0


if __name__ == "__main__":
    sys.exit(main())
