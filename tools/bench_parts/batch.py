"""batch: questions of mixed length, on the engine that `python -m minillava.batch` uses, and in batches
that are padded on the left and begin and end together."""

import argparse
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

import minillava
from bench_parts.clock import Neighbours, say
from bench_parts.compare import PICTURE
from minillava.assistant import Assistant
from minillava.batch.flags import make_parser, read_flags
from minillava.batch.questions import Question
from minillava.batch.run import InBatches, lengths_of, plan, read_prompts
from minillava.batch.together import Together
from minillava.cli.opening import choose_threads
from minillava.fast.quantize import count_parameters

EXAMPLES = sorted(PICTURE.parent.glob("example-*.png"))
LONG = "Look at the picture from its top to its bottom and from its left to its right before you answer. "
QUESTIONS = [
    "Is it red?",
    "Please describe this image in detail.",
    "How many shapes are there?",
    f"{LONG}What is at the bottom right?",
    "Describe this image.",
    f"{LONG}{LONG}{LONG}What is at the top?",
    "What is at the bottom left, and what is at the top right?",
]
"""From 3 words to 65; the answers of the bundled model have 1 to 31."""

WARM = 16  # questions asked before the clock runs

Answers = dict[int, Any]  # by line


class Asked(NamedTuple):
    """One round of a way. others: cores that other processes kept busy meanwhile."""

    wall: float
    processor: float
    others: float
    answers: Answers


def batch(folder: Path, dtype: str, tokens: int, count: int, rounds: int) -> dict[str, list[Asked]]:
    """The rounds of each way, which take turns."""
    assistant = minillava.load(folder, device="cpu", dtype=dtype)
    choose_threads(count_parameters(assistant.model))
    found: dict[str, list[Asked]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as home:
        args, options = flags(Path(home), tokens)
        asked = questions_of(make_pictures(Path(home)), count)
        for number in range(rounds + 1):
            for way, ask in WAYS.items():
                neighbours, began, used = Neighbours(), time.perf_counter(), time.process_time()
                answers = ask(assistant, args, options, asked if number else asked[:WARM])
                seconds = time.perf_counter() - began
                used, others = time.process_time() - used, sum(neighbours.taken().values())
                if number:
                    found[way].append(Asked(seconds, used, others, answers))
                    say(f"round {number} of {rounds}, {way}: {seconds:.1f} s")
    return found


def flags(home: Path, tokens: int) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The door's flags and options, as they are by default."""
    given = {"questions": home / "questions", "answers": home / "answers", "images": home}
    given |= {"max-new-tokens": tokens}
    return read_flags(make_parser(), [f"--{name}={value}" for name, value in given.items()])


def make_pictures(home: Path) -> list[Path]:
    """The examples, and each of them turned and mirrored."""
    made = []
    for example in EXAMPLES:
        with Image.open(example) as picture:
            turned = [picture.transpose(way) for way in Image.Transpose]
            for number, each in enumerate([picture, *turned]):
                made.append(home / f"{example.stem}-{number}.png")
                each.save(made[-1])
    return made


def questions_of(pictures: list[Path], count: int) -> list[Question]:
    """So many questions, of which neighbours are about one picture."""
    each = islice(cycle((picture, text) for picture in pictures for text in QUESTIONS), count)
    return [Question(i, i, text, [str(picture)]) for i, (picture, text) in enumerate(each)]


def on_the_engine(
    assistant: Assistant, args: argparse.Namespace, options: dict, questions: list[Question]
) -> Answers:
    prompts = read_prompts(assistant, questions, None)
    most = max(lengths_of(assistant, questions, prompts).values())
    size, pictures = min(args.batch_size, len(questions)), args.image_cache
    together = Together(assistant, prompts, most, options, size=size, pictures=pictures)
    return {
        question.line: answer
        for some in together.answers(questions)
        for question, (answer, *_) in some
    }


def padded(
    assistant: Assistant, args: argparse.Namespace, options: dict, questions: list[Question]
) -> Answers:
    prompts, batches = read_prompts(assistant, questions, None), InBatches(assistant, args, options)
    longest = options["max_new_tokens"]
    return {
        question.line: answer
        for some in plan(assistant, questions, prompts, longest, args.batch_size)
        for question, (answer, *_) in zip(some, batches.answer(some), strict=True)
    }


WAYS: dict[str, Callable[..., Answers]] = {
    "on the engine": on_the_engine,
    "padded on the left": padded,
}


def batch_table(found: dict[str, list[Asked]]) -> str:
    lines = ["| | s | processor, s | questions/s | others |", "|---|---:|---:|---:|---:|"]
    for way, rounds in found.items():
        one = sorted(rounds, key=lambda each: each.wall)[len(rounds) // 2]
        others = max(each.others for each in rounds)
        rate = len(one.answers) / one.wall
        lines.append(
            f"| {way} | {one.wall:.1f} | {one.processor:.1f} | {rate:.1f} | {others:.2f} |"
        )
    first, second = (rounds[0].answers for rounds in found.values())
    same = sum(first[line] == second[line] for line in first)
    return "\n".join([*lines, "", f"{same} of {len(first)} answers are the same."])
