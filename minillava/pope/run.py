"""What `python -m minillava.pope` does: labels and answers become figures."""

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from minillava.cli.messages import print_json
from minillava.pope.files import by_id, label_questions, read_answers, read_questions, renumber
from minillava.pope.scores import FIGURES, SCORERS, disagreements, score

SHOWN = 5
"""How many ids or answers a report names; --json has all."""


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


PROBLEMS = {
    "missing": "questions have no answer and are not in the figures",
    "errors": "lines are errors instead of answers",
    "duplicate": "further answers to a question that had one; the first is in the figures",
    "unknown": "answers to questions that are not in the file",
    "another_prompt": "answers name another prompt, picture or category and are not in the figures",
}


def report(result: dict) -> str:
    """What `evaluate` found, as text and a markdown table, figures in per cent."""
    lines = [
        f"questions: {result['questions']} in {result['question_file']}, prompts sha256 "
        f"{result['sha256_of_prompts']}",
        f"answers: {result['answered']} in {result['answers_file']}",
    ]
    for kind, meaning in PROBLEMS.items():
        ids = result[kind]
        more = ", ..." if len(ids) > SHOWN else ""
        listed = f" ({', '.join(json.dumps(name) for name in ids[:SHOWN])}{more})" if ids else ""
        lines.append(f"{kind.replace('_', ' ')}: {len(ids)} {meaning}{listed}")
    lines += ["", *_table(result["scores"]), *_shifted(result["scores"]), ""]
    differing = result["disagreements"]
    lines.append(f"The scorers disagree about {len(differing)} of {result['answered']} answers.")
    for one in differing[:SHOWN]:
        read = ", ".join(f"{scorer} {one[scorer]}" for scorer in SCORERS)
        lines.append(
            f"- {one['question_id']} (label {one['label']}): {read}: {json.dumps(one['text'])}"
        )
    if not result["complete"]:
        told = "Not every question has one answer and every answer its question: exit status 1."
        lines += ["", told]
    return "\n".join(lines)


def _table(scores: dict[str, dict]) -> list[str]:
    lines = [
        f"| scorer | category | answers | {' | '.join(FIGURES)} |",
        "|---|---|" + "---:|" * (1 + len(FIGURES)),
    ]
    for scorer, categories in scores.items():
        for category, row in categories.items():
            cells = ["–" if row[name] is None else f"{100 * row[name]:.2f}" for name in FIGURES]
            lines.append(f"| {scorer} | {category} | {row['answers']} | {' | '.join(cells)} |")
    return lines


def _shifted(scores: dict[str, dict]) -> list[str]:
    """Where ritual made several verdicts of an answer, what that does to the others."""
    overall = scores.get("ritual", {}).get("overall", {})
    more = overall["verdicts"] - overall["answers"] if overall else 0
    told = f"ritual: {more} verdict(s) more than answers, from further lines: what follows them"
    return ["", f"{told} is shifted"] if more else []


def run(args: argparse.Namespace) -> int:
    """What `pope` does with its flags; the exit status."""
    scorers = list(SCORERS) if args.scorer == "all" else [args.scorer]
    result = evaluate(args.questions, args.answers, scorers, args.asked)
    if args.json:
        print_json(result)
    else:
        print(report(result))
    return 0 if result["complete"] else 1
