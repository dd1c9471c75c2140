#!/usr/bin/env python3
"""Trains heads of Medusa on a model's own answers: asks it, then `finetune --learn medusa`.

    python tools/train_medusa.py --out DIR
    python tools/train_medusa.py --out DIR -m MODEL --questions questions.jsonl --images photos --heads 5

The first command asks the bundled model about scenes that tools/shapes.py draws; the second any
model, about questions as `python -m minillava.batch` takes them. DIR/data gets what was asked and
answered, DIR/heads what was learnt: --draft medusa:DIR/heads. It goes on where it was ended. What
else is on the command line is finetune's.
"""

import interrupts

if __name__ == "__main__":
    interrupts.leave_at_once()

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

# run from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import shapes

from minillava.checkpoint.folders import default_weights
from minillava.cli import messages
from minillava.cli.arguments import Parser, path_name
from minillava.cli.doors import enter
from minillava.finetune.state import STATE_NAME

SCENES = 500

QUESTIONS = 4  # about each scene; one of them is to describe it

# Medusa's own numbers are for one epoch of 68,000 conversations and heads of 17 million parameters.
FOR_SHAPES = (
    "--heads", "4", "--rate", "3e-3", "--batch", "8", "--accumulate", "1", "--epochs", "3",
    "--hold-out", "0.05", "--order", "shuffle", "--save-every", "10000",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=path_name, required=True, help="folder of all that is made")
    parser.add_argument("-m", "--model", help="(default: the bundled model)")
    parser.add_argument("--questions", type=path_name, help="(default: about drawn scenes)")
    parser.add_argument("--images", type=path_name, help="folder of the questions' pictures")
    parser.add_argument("--scenes", type=int, default=SCENES, help="to draw (default %(default)s)")
    args, learning = parser.parse_known_args(argv)
    if (args.questions is None) != (args.images is None):
        parser.error("--questions and --images go together")
    model, data = args.model or default_weights(), args.out / "data"
    data.mkdir(parents=True, exist_ok=True)
    questions, images = args.questions, args.images
    if questions is None:
        questions, images = data / "questions.jsonl", data
        draw(args.scenes, questions)
    asked = ["-m", model, "--questions", questions, "--images", images]
    if status := door("batch", *asked, "--answers", data / "answers.jsonl", "--batch-size", 16):
        return status
    write_rows(questions, data / "answers.jsonl", data / "rows.json")
    heads = args.out / "heads"
    goes_on = ["--resume"] if (heads / STATE_NAME).exists() else []
    own = FOR_SHAPES if args.questions is None else ()
    return door(
        "finetune", model, data / "rows.json", "--images", images, "--out", heads,
        "--learn", "medusa", *own, *learning, *goes_on,
    )  # fmt: skip


def door(name: str, *arguments: object) -> int:
    return enter(name, [str(argument) for argument in arguments])


def draw(scenes: int, questions: Path) -> None:
    """Pictures of scenes beside a file of questions about them."""
    lines = []
    for number in range(scenes):
        rng = random.Random(f"medusa/{number}")
        scene = shapes.sample_scene(rng)
        name = f"{number}.png"
        shapes.draw(scene).save(questions.parent / name)
        for dialogue in shapes.ask_any(scene, QUESTIONS, rng):
            line = {"question_id": len(lines), "image": name, "text": dialogue.turns[0][0]}
            lines.append(json.dumps(line))
    questions.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_rows(questions: Path, answers: Path, rows: Path) -> None:
    """What was asked and answered, as finetune learns it. Answers that are empty are left out."""
    asked, said = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        for path in (questions, answers)
    )
    found = []
    for question, answer in zip(asked, said, strict=True):
        if not answer.get("text", "").strip():
            continue
        marker = "<image>\n" if "image" in question else ""
        turns = [("human", marker + question["text"]), ("gpt", answer["text"])]
        row = {"id": question["question_id"], "conversations": turns_of(turns)}
        found.append(row | {k: v for k, v in question.items() if k == "image"})
    rows.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")


def turns_of(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"from": speaker, "value": text} for speaker, text in turns]


if __name__ == "__main__":
    interrupts.end(lambda: messages.run(main, verbose=True, prints=True))
