"""`python -m minillava.batch`: a file of questions to a file of answers, in LLaVA's evaluation
format.

While a run is going on, finished answers are in a journal beside the answers file, NAME.partial: a
header that says what is asked and how, then one [line number, record] per answer. If the run is
killed, the same command goes on from the journal. Once all questions are answered, the answers file
appears at once, in the order of the questions. The same command then asks again only the questions
that became errors. A second run at the same file waits for the first.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
from minillava.batch.together import FULL, Answered, Together
from minillava.checkpoint.folders import find_folders
from minillava.checkpoint.place import choose_device
from minillava.cli.messages import Messages, duration
from minillava.cli.opening import find_weights, open_assistant
from minillava.fast.parallel import OthersEnded
from minillava.files.disk import explain, is_stream, same_file, write_whole
from minillava.files.pictures import open_image, path_of_url
from minillava.tiles.pictures import TileProcessor, change_by_others, positions_of_size

WINDOW = 16
"""Batches sorted by length together. Not all: questions on one picture, neighbours in most files,
would drift apart."""

SECONDS = 10
"""Between two lines of progress with --verbose."""


def read_prompts(
    assistant: Assistant, questions: list[Question], system: str | None
) -> dict[int, list[int]]:
    """Line -> ids of the prompt. A question whose prompt is impossible or too long gets its
    `error`."""
    prompts = {}
    for question in questions:
        if question.error is None:
            try:
                prompts[question.line] = assistant.tokenize(
                    assistant.prompt(question.text, images=len(question.images), system=system)
                )
            except ValueError as error:
                question.error = shown_line(error)
    return prompts


def plan(
    assistant: Assistant,
    questions: list[Question],
    prompts: dict[int, list[int]],
    longest: int,
    size: int,
) -> list[list]:
    """Questions in batches of similar prompt length, for what the engine does not do: beams,
    drafts, and a compiled step.

    The batches are the same in every run, whatever is answered already: the last digits of logits,
    and so now and then a word, depend on which questions share a batch.
    """
    lengths = lengths_of(assistant, questions, prompts)
    good, batches = [question for question in questions if question.error is None], []
    for start in range(0, len(good), WINDOW * size):
        window = sorted(
            good[start : start + WINDOW * size], key=lambda question: -lengths[question.line]
        )
        # The longest prompt of a batch must not shorten another answer where the context ends.
        context = assistant.model.config.text.context
        for _, alike in groupby(
            window, key=lambda question: min(longest, context - lengths[question.line])
        ):
            alike = list(alike)
            batches += [alike[i : i + size] for i in range(0, len(alike), size)]
    return batches


def lengths_of(
    assistant: Assistant, questions: list[Question], prompts: dict[int, list[int]]
) -> dict[int, int]:
    """Line -> positions of the prompt."""
    config, processor = assistant.model.config, assistant.image_processor
    tiled, change = isinstance(processor, TileProcessor), change_by_others(processor)

    @cache
    def shown(name: str, several: bool) -> int:
        """The positions of a picture; with tiles its size decides."""
        if not tiled or (several and change):
            return positions_of_size(config, None)
        try:
            width, height = open_image(name).size
        except (ValueError, OSError):
            return config.tokens_per_image  # it is refused when its question is asked
        return positions_of_size(config, (height, width))

    return {
        question.line: len(prompts[question.line])
        + sum(shown(each, len(question.images) > 1) - 1 for each in question.images)
        for question in questions
        if question.line in prompts
    }


def ask(
    assistant: Assistant,
    batch: list[Question],
    seed: int,
    options: dict,
    encode: Callable[[str], Tensor] | None = None,
) -> list[tuple]:
    """(answer, error, metadata) of each question. encode: as for `Assistant.ask_each`. If the batch
    fails, each question is asked alone, to find the one at fault."""
    images, texts = [question.images for question in batch], [question.text for question in batch]
    seeds = [(seed + question.line) % 2**64 for question in batch]
    try:
        found = assistant.ask_each(images, texts, encode=encode, seed=seeds, **options)
        ends = [{"finish_reason": reason} for reason in found.finish_reason]
        return [(answer, None, end) for answer, end in zip(found.text, ends, strict=True)]
    except torch.OutOfMemoryError as error:
        raise ValueError(FULL) from error
    except OthersEnded:
        raise
    except (ValueError, OSError) as error:
        if len(batch) == 1:
            return [(None, shown_line(error), None)]
        alone = (ask(assistant, [question], seed, options, encode) for question in batch)
        return [answer for answers in alone for answer in answers]


def in_batches(args: argparse.Namespace) -> bool:
    """Whether questions are asked in batches that begin and end together."""
    return args.num_beams > 1 or args.draft is not None or args.compile


class InBatches:
    """Questions in batches that begin and end together, with beams, drafts or a compiled step."""

    def __init__(self, assistant: Assistant, args: argparse.Namespace, options: dict):
        self.assistant = assistant
        self.encode = lru_cache(args.image_cache)(assistant.encode)
        self.seed = options["seed"] or 0
        self.options = {name: value for name, value in options.items() if name != "seed"}
        if args.draft is not None:
            self.options["draft"] = assistant.drafts(args.draft, args.draft_tokens)

    def answer(self, batch: list[Question]) -> list[Answered]:
        return ask(self.assistant, batch, self.seed, self.options, self.encode)


def ask_file(args: argparse.Namespace, options: dict) -> int:
    """Ask every question of the file that the journal does not answer; the journal then becomes the
    answers file. Returns the exit status."""
    messages = Messages(args.verbose, args.quiet)
    content = read_question_file(args)
    if not os.path.isdir(args.images):
        raise ValueError(
            f"{args.images}: no such folder of pictures; --images names the one that they are in"
        )
    name = "stdin" if args.questions == "-" else str(args.questions)
    questions = read_questions(content, args.images, name)
    _note_repeated(questions, messages)
    _check_answers(args.answers, questions)
    weights = find_weights(args.weights, messages)
    with ExitStack() as stack:
        cluster = None
        if args.on is not None:
            from minillava.batch.workers import join

            cluster = stack.enter_context(join(args))
            args.device = cluster.device
        settings = _settings(args, content, weights)
        home = args.answers
        if is_stream(home):  # a stream, from which no later run can go on
            home = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "answers"
        journal = Journal(home.with_name(home.name + ".partial"), settings)
        busy = (
            f"another run is at {args.answers}; waiting for its end, to go on with what it leaves "
            "(Ctrl-C leaves)"
        )
        stack.enter_context(journal.alone(lambda: messages.note(busy)))
        return Run(args, questions, weights, settings, journal, messages, cluster).go(options)


def _note_repeated(questions: list[Question], messages: Messages) -> None:
    ids = Counter(question.question_id for question in questions if question.error is None)
    if again := [name for name, count in ids.items() if count > 1]:
        messages.note(
            f"{len(again)} question_id(s) stand on more than one question ({again[0]!r:.80}, "
            "for one): only answer_id and order tell their answers apart"
        )


def _check_answers(answers: Path, questions: list[Question]) -> None:
    """Raises ValueError if the answers would be written over a picture."""
    if not answers.exists():
        return
    pictures = {path_of_url(image) for question in questions for image in question.images}
    if any(same_file(answers, image) for image in pictures):
        raise ValueError(
            f"{answers}: is a picture of the questions; choose another name for the answers"
        )


def _settings(args: argparse.Namespace, content: bytes, weights: str) -> dict:
    """The settings on which the answers depend: a journal that was begun with others is another
    run's. content: of the file of questions."""
    found = find_folders(weights, args.revision, args.vision_tower, args.model_base, args.adapter)
    folders = (found.weights, found.model_base, found.adapter, found.vision_tower)
    flags = {name: value for name, value in vars(args).items() if name not in NOT_ASKED}
    return flags | {
        "questions": hashlib.sha256(content).hexdigest(),
        "images": os.path.abspath(args.images),
        "weights": digest([_model_id(weights), *(stamp(f) for f in folders if f is not None)]),
        "device": choose_device(args.device).partition(":")[0],
    }


def _model_id(weights: str) -> str:
    return Path(os.path.abspath(weights)).name


class Run:
    """One run of the command: the questions, and `done`, line -> record of those that are
    answered."""

    def __init__(
        self,
        args: argparse.Namespace,
        questions: list[Question],
        weights: str,
        settings: dict,
        journal: Journal,
        messages: Messages,
        cluster: Any = None,
    ):
        """cluster: a Cluster of batch/workers.py, whose workers ask in place of this process."""
        self.args, self.questions, self.journal, self.messages = args, questions, journal, messages
        self.weights, self.model_id = weights, _model_id(weights)
        elsewhere = ("images", "weights", *OTHER_FOLDERS)
        self.asked = {name: value for name, value in settings.items() if name not in elsewhere}
        self.done: dict[int, dict] = {}
        self.cluster, self.batches = cluster, None

    def record(
        self,
        question: Question,
        answer: str | None,
        error: str | None,
        metadata: dict | None = None,
    ) -> dict:
        """The record of one question for the answers file."""
        answer_id = digest([self.asked, self.model_id, question.line])[:22]
        return question.record(answer, error, metadata, answer_id, self.model_id)

    def go(self, options: dict) -> int:
        """Ask the questions that are left, and write all answers; returns the exit status. options:
        the fields of `Options` by name."""
        if self.is_finished():
            return 0
        if self.cluster is not None:
            assistant = self.cluster.reader(self.args, self.weights)
        else:
            assistant = open_assistant(self.args, self.weights, self.messages)
            if in_batches(self.args):
                self.batches = InBatches(assistant, self.args, options)
        if self.args.overwrite:
            self.journal.begin_anew()
        prompts = read_prompts(assistant, self.questions, self.args.system)
        if self.done:
            count = f"{len(self.done)} of {len(self.questions)}"
            self.messages.note(f"{count} answered before; going on")
        try:
            self.ask_all(assistant, prompts, options)
            self.write()
        except BrokenPipeError:
            raise
        except OSError as error:
            if is_stream(self.args.answers):
                raise
            kept = sum("error" not in found for found in self.done.values())
            raise OSError(
                f"{explain(error, self.journal.path)}; {self.journal.path} keeps {kept} answer(s), "
                "and the same command goes on with them"
            ) from error
        self.journal.path.unlink(missing_ok=True)
        return self.tell()

    def is_finished(self) -> bool:
        """Read what was answered before; returns whether nothing is left. It runs before gigabytes
        are opened. Raises ValueError if this run cannot go on with it (see `read_answers` and
        `read_journal`)."""
        args, answers = self.args, self.args.answers
        if args.overwrite:
            return False
        there = answers.is_file() and answers.stat().st_size > 0 and not is_stream(answers)
        if there and not self.journal.is_anew:
            self.done = read_answers(answers, self.questions, self.record)
            if len(self.done) == len(self.questions):
                self.messages.note(
                    f"{answers} is finished already: nothing to do (--overwrite starts anew)"
                )
                if self.journal.path.read_bytes().startswith(self.journal.header):
                    # left by a run that was killed just after it renamed the answers
                    self.journal.path.unlink()
                return True
        self.done |= read_journal(self.journal, self.questions, self.record)
        return False

    def ask_all(self, assistant: Assistant, prompts: dict[int, list[int]], options: dict) -> None:
        """Ask every question that is not answered; an answer is in the journal as soon as it is
        made."""
        left = [q for q in self.questions if q.line in prompts and q.line not in self.done]
        if not left:
            return
        progress = Progress(self.messages, len(self.done), len(self.done) + len(left))
        with closing(self.made(assistant, prompts, left, options)) as made:
            for some in made:
                new = {
                    question.line: self.record(question, *found)
                    for question, found in some
                    if question.line not in self.done
                }
                self.journal.add(new)
                self.done |= new
                progress.tell(len(self.done))
        self.messages.progress("")

    def made(
        self,
        assistant: Assistant,
        prompts: dict[int, list[int]],
        left: list[Question],
        options: dict,
    ) -> Generator[list[tuple[Question, Answered]], None, None]:
        """The answers to the questions that are left, some at a time."""
        args, most, work = self.args, 0, [[question] for question in left]
        size = min(args.batch_size, len(prompts))
        if in_batches(args):
            work = self.plan_batches(assistant, prompts, options["max_new_tokens"])
        else:
            most = max(lengths_of(assistant, self.questions, prompts).values())
        if self.cluster is not None:
            yield from self.cluster.answers(
                (args, self.weights, options, most, size), work, prompts
            )
        elif self.batches is not None:
            for batch in work:
                yield [*zip(batch, self.batches.answer(batch), strict=True)]
        else:
            together = Together(
                assistant, prompts, most, options, size=size, pictures=args.image_cache
            )
            yield from together.answers(left)

    def plan_batches(
        self, assistant: Assistant, prompts: dict[int, list[int]], longest: int
    ) -> list[list[Question]]:
        """The batches (see `plan`) with a question that is left. They are asked whole, since the
        last digits depend on who shares a batch."""
        size = self.args.batch_size
        if self.args.draft is not None:
            size = 1
            self.messages.note("drafts are for one question at a time: --batch-size is 1")
        batches = plan(assistant, self.questions, prompts, longest, size)
        return [batch for batch in batches if any(q.line not in self.done for q in batch)]

    def write(self) -> None:
        """Write the answers file, in the order of the questions, with those that could not be
        asked."""
        for question in self.questions:
            if question.error:
                self.done[question.line] = self.record(question, None, question.error)
        lines = [json.dumps(self.done[question.line]) + "\n" for question in self.questions]
        write_whole(self.args.answers, "".join(lines))

    def tell(self) -> int:
        """Say on stderr how many were answered; returns the exit status."""
        records = [self.done[question.line] for question in self.questions]
        errors = [record["error"] for record in records if "error" in record]
        count, answers = len(records), self.args.answers
        if not errors:
            self.messages.note(f"{count} answer{'s' * (count != 1)} in {answers}")
            return 0
        what = f"error: {len(errors)} of {count} questions have no answer; {answers} says why"
        print(f"{what}; the first: {errors[0]}", file=sys.stderr)
        return 1


class Progress:
    """A line on stderr: how many are answered, how fast, and how long the rest will take."""

    def __init__(self, messages: Messages, before: int, asked: int):
        """before: how many an earlier run answered. asked: how many can be asked in all."""
        self.messages, self.before, self.asked = messages, before, asked
        self.started = self.told = time.monotonic()

    def tell(self, done: int) -> None:
        now, left = time.monotonic(), self.asked - done
        rate = (done - self.before) / (now - self.started)
        text = f"{done} answered, {left} to go, {rate:.2f} per second"
        text += f", {duration(left / rate)} left" if left else ""
        self.messages.progress(text)
        if self.messages.verbose and (now - self.told >= SECONDS or not left):
            self.told = now
            print(text, file=sys.stderr)
