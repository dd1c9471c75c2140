"""`python -m minillava.batch`: a file of questions to a file of answers, in LLaVA's evaluation
format.

While it runs, finished answers are in a journal beside the answers file, NAME.partial: a header of
what was asked and how, then one [line number, record] each. Whenever the run is killed, the same
command goes on from the journal; when all questions are answered, the answers appear under their
name at once, in order. The same command then asks again what became an error, and nothing else. A
second run at the same file waits for the first.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import torch

from minillava.assistant import Assistant
from minillava.batch.journal import Journal, digest, read_answers, read_journal, stamp
from minillava.batch.questions import (
    NOT_ASKED,
    OTHER_FOLDERS,
    Question,
    read_question_file,
    read_questions,
    shown_line,
)
from minillava.checkpoint.folders import find_folder, find_others
from minillava.checkpoint.place import choose_device
from minillava.cli.messages import Messages
from minillava.cli.opening import find_weights, open_assistant
from minillava.files.disk import explain, is_stream, same_file, write_whole
from minillava.files.pictures import path_of_url

WINDOW = 16
"""Batches sorted by length together. Not all: questions on one picture, neighbours in most files,
would drift apart."""

SECONDS = 10
"""Between two lines of progress with --verbose."""


def plan(
    assistant: Assistant, questions: list[Question], system: str | None, longest: int, size: int
) -> list[list]:
    """Questions in batches of similar prompt length; one whose prompt is impossible or too long
    gets its `error`.

    The same batches every time, whatever is answered already: the last digits, and so now and then
    a word, depend on who shares a batch.
    """
    context, each = assistant.model.config.text.context, assistant.model.config.tokens_per_image
    lengths: dict[int, int] = {}
    for question in questions:
        if question.error is None:
            pictures = len(question.images)
            try:
                ids = assistant.tokenize(
                    assistant.prompt(question.text, images=pictures, system=system)
                )
                lengths[question.line] = len(ids) + pictures * (each - 1)
            except ValueError as error:
                question.error = shown_line(error)
    good, batches = [question for question in questions if question.error is None], []
    for start in range(0, len(good), WINDOW * size):
        window = sorted(
            good[start : start + WINDOW * size], key=lambda question: -lengths[question.line]
        )
        # A long neighbour must not shorten an answer where the context ends.
        for _, alike in groupby(
            window, key=lambda question: min(longest, context - lengths[question.line])
        ):
            alike = list(alike)
            batches += [alike[i : i + size] for i in range(0, len(alike), size)]
    return batches


def ask(assistant: Assistant, batch: list[Question], seed: int, options: dict) -> list[tuple]:
    """(answer, error, metadata) of each question. If the batch fails, each is asked alone, to find
    out whose fault it is."""
    images, texts = [question.images for question in batch], [question.text for question in batch]
    seeds = [(seed + question.line) % 2**64 for question in batch]
    try:
        found = assistant.ask_each(images, texts, seed=seeds, **options)
        ends = [{"finish_reason": reason} for reason in found.finish_reason]
        return [(answer, None, end) for answer, end in zip(found.text, ends, strict=True)]
    except torch.OutOfMemoryError as error:
        raise ValueError(
            "the GPU's memory is full; the same command with a smaller --batch-size goes on"
        ) from error
    except (ValueError, OSError) as error:
        if len(batch) == 1:
            return [(None, shown_line(error), None)]
        return [
            answer for question in batch for answer in ask(assistant, [question], seed, options)
        ]


def ask_file(args: argparse.Namespace, options: dict) -> int:
    """Every question of the file that the journal does not answer; then the journal becomes the
    answers file."""
    messages = Messages(args.verbose, args.quiet)
    content = read_question_file(args)
    if not os.path.isdir(args.images):
        raise ValueError(
            f"{args.images}: no such folder of pictures; --images names the one that they are in"
        )
    name = "stdin" if args.questions == "-" else str(args.questions)
    questions = read_questions(content, args.images, name)
    ids = Counter(question.question_id for question in questions if question.error is None)
    if again := [name for name, count in ids.items() if count > 1]:
        messages.note(
            f"{len(again)} question_id(s) stand on more than one question ({again[0]!r:.80}, "
            "for one): only answer_id and order tell their answers apart"
        )
    pictures = (
        {path_of_url(image) for question in questions for image in question.images}
        if args.answers.exists()
        else ()
    )
    if any(same_file(args.answers, image) for image in pictures):
        raise ValueError(
            f"{args.answers}: is a picture of the questions; choose another name for the answers"
        )
    weights = find_weights(args.weights, messages)
    model_id = Path(os.path.abspath(weights)).name
    folders = [find_folder(weights, args.revision)]
    tower, base, lora = find_others(args.vision_tower, args.model_base, args.adapter)
    folders += [folder for folder in (base, lora, tower) if folder is not None]
    settings = {name: value for name, value in vars(args).items() if name not in NOT_ASKED} | {
        "questions": hashlib.sha256(content).hexdigest(),
        "images": os.path.abspath(args.images),
        "weights": digest([model_id, *map(stamp, folders)]),
        "device": choose_device(args.device).partition(":")[0],
    }
    asked = {
        name: value
        for name, value in settings.items()
        if name not in ("images", "weights", *OTHER_FOLDERS)
    }

    def record(
        question: Question, answer: str | None, error: str | None, metadata: dict | None = None
    ) -> dict:
        answer_id = digest([asked, model_id, question.line])[:22]
        return question.record(answer, error, metadata, answer_id, model_id)

    with ExitStack() as stack:
        home = args.answers
        if is_stream(home):  # which nobody can go on with
            home = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "answers"
        journal = Journal(home.with_name(home.name + ".partial"), settings)
        busy = (
            f"another run is at {args.answers}; waiting for its end, to go on with what it leaves "
            "(Ctrl-C leaves)"
        )
        stack.enter_context(journal.alone(lambda: messages.note(busy)))
        return _ask_rest(args, options, messages, questions, journal, record, weights)


def _ask_rest(
    args: argparse.Namespace,
    options: dict,
    messages: Messages,
    questions: list[Question],
    journal: Journal,
    record: Callable[..., dict],
    weights: str,
) -> int:
    done, finished = (
        {},
        args.answers.is_file() and args.answers.stat().st_size > 0 and not is_stream(args.answers),
    )
    if finished and not args.overwrite and not journal.is_anew:
        done = read_answers(args.answers, questions, record)
        if len(done) == len(questions):
            messages.note(
                f"{args.answers} is finished already: nothing to do (--overwrite starts anew)"
            )
            if journal.path.read_bytes().startswith(journal.header):
                journal.path.unlink()  # killed just after the answers got their name
            return 0
    if not args.overwrite:
        # whether it can go on is known before gigabytes are opened
        done |= read_journal(journal, questions, record)

    assistant = open_assistant(args, weights, messages)
    assistant.encode = lru_cache(args.image_cache)(assistant.encode)
    if args.overwrite:
        journal.begin_anew()
    batches = plan(assistant, questions, args.system, options["max_new_tokens"], args.batch_size)
    seed = options.pop("seed") or 0
    ready, started, told = len(done), time.monotonic(), time.monotonic()
    if done:
        messages.note(f"{ready} of {len(questions)} answered before; going on")
    try:
        for batch in batches:
            if all(question.line in done for question in batch):
                continue
            answers = zip(batch, ask(assistant, batch, seed, options), strict=True)
            new = {
                question.line: record(question, *answer)
                for question, answer in answers
                if question.line not in done
            }
            journal.add(new)
            done |= new
            left = sum(map(len, batches)) - len(done)
            rate = (len(done) - ready) / (time.monotonic() - started)
            text = f"{len(done)} answered, {left} to go, {rate:.2f} per second"
            text += f", {_duration(left / rate)} left" if left else ""
            messages.progress(text)
            if args.verbose and (time.monotonic() - told >= SECONDS or not left):
                told = time.monotonic()
                print(text, file=sys.stderr)
        messages.progress("")
        done |= {
            question.line: record(question, None, question.error)
            for question in questions
            if question.error
        }
        write_whole(
            args.answers, "".join(json.dumps(done[question.line]) + "\n" for question in questions)
        )
    except BrokenPipeError:
        raise
    except OSError as error:
        if is_stream(args.answers):
            raise
        kept = sum("error" not in found for found in done.values())
        left = f"{journal.path} keeps {kept} answer(s), and the same command goes on with them"
        raise OSError(f"{explain(error, journal.path)}; {left}") from error
    journal.path.unlink(missing_ok=True)
    errors = [
        done[question.line]["error"] for question in questions if "error" in done[question.line]
    ]
    if errors:
        what = (
            f"error: {len(errors)} of {len(questions)} questions have no answer; {args.answers} "
            "says why"
        )
        print(f"{what}; the first: {errors[0]}", file=sys.stderr)
    else:
        messages.note(f"{len(questions)} answer{'s' * (len(questions) != 1)} in {args.answers}")
    return 1 if errors else 0


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
