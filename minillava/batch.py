"""`python -m minillava.batch`: a file of questions to a file of answers, in LLaVA's evaluation format.

While it runs, finished answers are in a journal beside the answers file, NAME.partial: a header of what was asked and
how, then one [line number, record] each. Whenever the run is killed, the same command goes on from the journal; when
all questions are answered, the answers appear under their name at once, in order. The same command then asks again
what became an error, and nothing else.
"""

if __name__ == "__main__":  # flags are read before torch is imported, below
    from minillava import doors

    doors.begin("batch")

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import torch

from minillava import cli, doors
from minillava.assistant import Assistant, choose_device, find_folder
from minillava.disk import sync_folder

WINDOW = 16
"""Batches sorted by length together. Not all: questions on one picture, neighbours in most files, would drift apart."""

SECONDS = 10
"""Between two lines of progress with --verbose."""

NOT_ASKED = {"answers", "batch_size", "image_cache", "overwrite", "verbose", "quiet", "device"}
"""The flags that change no answer (beyond the last digits), so that a resumed run may change them; but for the kind of
device, which `ask_file` adds."""
OTHER_FOLDERS = ("model_base", "adapter", "vision_tower")  # besides --weights


@dataclass
class Question:
    """One line of the questions file, valid or not."""

    line: int  # from 1
    question_id: str | int | None = None
    text: str = ""
    images: list[str] = field(default_factory=list)
    error: str | None = None  # why it cannot be asked

    def record(self, answer: str | None, error: str | None, answer_id: str, model_id: str) -> dict:
        """What stands in the answers file; LLaVA's own scripts read it."""
        if error is not None:
            name = {"line": self.line} if self.question_id is None else {"question_id": self.question_id}
            return {**name, "error": error}
        names = {"answer_id": answer_id, "model_id": model_id, "metadata": {}}
        return {"question_id": self.question_id, "prompt": self.text, "text": answer, **names}


def read_questions(content: bytes, folder: str) -> list[Question]:
    """Every line that is not blank. Names of pictures are relative to `folder`."""
    lines = enumerate(content.split(b"\n"), start=1)
    return [_read_question(number, line, folder) for number, line in lines if line.strip()]


def _read_question(number: int, line: bytes, folder: str) -> Question:
    question = Question(number)
    try:
        raw = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        question.error = f"line {number} is not JSON ({error})"
        return question
    if not isinstance(raw, dict):
        question.error = f"line {number} is {type(raw).__name__}, expected an object with question_id and text"
        return question
    if type(raw.get("question_id")) in (str, int):
        question.question_id = raw["question_id"]
    images = raw.get("image")
    images = [] if images is None else images if isinstance(images, list) else [images]
    checks = (
        ("question_id", question.question_id is not None, "a text or a whole number"),
        ("text", isinstance(raw.get("text"), str), "the question"),
        ("image", all(isinstance(image, str) for image in images), "the name of a picture, or a list of them"),
    )
    for name, good, expected in checks:
        if not good:
            question.error = f"line {number}: {name} is {json.dumps(raw.get(name))[:80]}, expected {expected}"
            return question
    question.text, question.images = raw["text"], [os.path.join(folder, image) for image in images]
    return question


def plan(assistant: Assistant, questions: list[Question], system: str | None, longest: int, size: int) -> list[list]:
    """Questions in batches of similar prompt length; one whose prompt is impossible or too long gets its `error`.

    The same batches every time, whatever is answered already: the last digits, and so now and then a word, depend on
    who shares a batch.
    """
    context, each = assistant.model.config.text.context, assistant.model.config.tokens_per_image
    lengths: dict[int, int] = {}
    for question in questions:
        if question.error is None:
            pictures = len(question.images)
            try:
                ids = assistant.tokenizer.encode(assistant.prompt(question.text, images=pictures, system=system))
                lengths[question.line] = length = len(ids) + pictures * (each - 1)
                if length >= context:
                    raise ValueError(f"the prompt takes {length} positions, the model's context holds {context}")
            except ValueError as error:
                question.error = _one_line(error)
    good, batches = [question for question in questions if question.error is None], []
    for start in range(0, len(good), WINDOW * size):
        window = sorted(good[start : start + WINDOW * size], key=lambda question: -lengths[question.line])
        # A long neighbour must not shorten an answer where the context ends.
        for _, alike in groupby(window, key=lambda question: min(longest, context - lengths[question.line])):
            alike = list(alike)
            batches += [alike[i : i + size] for i in range(0, len(alike), size)]
    return batches


def ask(assistant: Assistant, batch: list[Question], seed: int, options: dict) -> list[tuple[str | None, str | None]]:
    """(answer, error) of each question. Where the batch fails, each is asked alone, to find out whose fault it is."""
    images, texts = [question.images for question in batch], [question.text for question in batch]
    seeds = [(seed + question.line) % 2**64 for question in batch]
    try:
        return [(answer, None) for answer in assistant.ask(images, texts, seed=seeds, **options)]
    except torch.OutOfMemoryError as error:
        raise ValueError("the GPU's memory is full; the same command with a smaller --batch-size goes on") from error
    except (ValueError, OSError) as error:
        if len(batch) == 1:
            return [(None, _one_line(error))]
        return [answer for question in batch for answer in ask(assistant, [question], seed, options)]


class Journal:
    """The answers so far, on disk: there is none before the first."""

    def __init__(self, path: Path, header: dict):
        self.path, self.header = path, json.dumps(header).encode() + b"\n"

    def read(self) -> dict[int, dict]:
        """Line number -> record. What a kill left half written at the end is cut off. Raises ValueError where the
        journal belongs to another run."""
        content = self.path.read_bytes() if self.path.exists() else b""
        if self.header.startswith(content):  # nothing yet, or killed before the first answer
            self.path.unlink(missing_ok=True)
            return {}
        if not content.startswith(self.header):
            raise ValueError(
                f"{self.path} was begun with other {self._differences(content)}; repeat that run's command to finish "
                "it, or pass --overwrite to start anew"
            )
        records, end = {}, len(self.header)
        for line in content[end:].splitlines(keepends=True):
            try:
                number, record = json.loads(line)
            except (ValueError, TypeError):
                break
            if not line.endswith(b"\n"):
                break
            records[number] = record
            end += len(line)
        os.truncate(self.path, end)
        return records

    def add(self, records: dict[int, dict]) -> None:
        """On disk when this returns."""
        new = not self.path.exists()
        with open(self.path, "ab") as file:
            file.write(self.header * new + b"".join(json.dumps(pair).encode() + b"\n" for pair in records.items()))
            file.flush()
            os.fsync(file.fileno())
        if new:
            sync_folder(self.path.parent)

    def _differences(self, content: bytes) -> str:
        try:
            theirs, ours = (dict(json.loads(header)) for header in (content.partition(b"\n")[0], self.header))
        except (ValueError, TypeError):
            return "settings"
        different = sorted(name for name in {**ours, **theirs} if ours.get(name, ...) != theirs.get(name, ...))
        return ", ".join(different) or "settings"


def read_answers(path: Path, questions: list[Question], record: Callable[..., dict]) -> dict[int, dict]:
    """Line number -> record of what a finished file answers, its errors left out. record: what this run would write.
    Raises ValueError where that is another file's: other questions, model or settings, or something else altogether."""
    try:
        records = [json.loads(line) for line in path.read_bytes().splitlines()]
        pairs = list(zip(questions, records, strict=True))
        same = all(record(question, found.get("text"), found.get("error")) == found for question, found in pairs)
    except (ValueError, TypeError, AttributeError):
        same = False
    if not same:
        raise ValueError(
            f"{path} does not hold the answers of this command (other questions, model or settings); choose another "
            "name, or pass --overwrite to start anew"
        )
    return {question.line: found for question, found in pairs if "error" not in found}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _stamp(folder: Path) -> list:
    """Name, size and time of the files that make a model: what changes when they do, without reading gigabytes."""
    kinds = (".json", ".model", ".safetensors", ".bin", ".pth")
    files = sorted(path for path in folder.glob("*") if path.suffix in kinds)
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def ask_file(args: argparse.Namespace, options: dict) -> int:
    """Every question of the file that the journal does not answer; then the journal becomes the answers file."""
    messages = cli.Messages(args.verbose, args.quiet)
    if not args.questions.is_file():
        raise FileNotFoundError(f"{args.questions}: no such file of questions; check the path")
    content = args.questions.read_bytes()
    if not args.answers.parent.is_dir():
        raise ValueError(f"{args.answers.parent}: no such folder for the answers; make it first")
    if not os.path.isdir(args.images):
        raise ValueError(f"{args.images}: no such folder of pictures; --images names the one that they are in")
    weights = cli.find_weights(args.weights, messages)
    model_id = Path(os.path.abspath(weights)).name
    folders = [find_folder(weights, args.revision)]
    folders += [find_folder(vars(args)[name]) for name in OTHER_FOLDERS if vars(args)[name]]
    settings = {name: value for name, value in vars(args).items() if name not in NOT_ASKED} | {
        "questions": hashlib.sha256(content).hexdigest(),
        "images": os.path.abspath(args.images),
        "weights": _digest([model_id, *map(_stamp, folders)]),
        "device": choose_device(args.device).partition(":")[0],
    }
    asked = {name: value for name, value in settings.items() if name not in ("images", "weights", *OTHER_FOLDERS)}

    def record(question: Question, answer: str | None, error: str | None) -> dict:
        return question.record(answer, error, _digest([asked, model_id, question.line])[:22], model_id)

    questions, done = read_questions(content, args.images), {}
    journal = Journal(args.answers.with_name(args.answers.name + ".partial"), settings)
    if args.answers.exists() and not args.overwrite:
        done = read_answers(args.answers, questions, record)
        if len(done) == len(questions):
            messages.note(f"{args.answers} is finished already: nothing to do (--overwrite starts anew)")
            if journal.path.exists() and journal.path.read_bytes().startswith(journal.header):
                journal.path.unlink()  # killed just after the answers got their name
            return 0
    if not args.overwrite:
        done |= journal.read()  # whether it can go on is known before gigabytes are opened

    assistant = cli.open_assistant(args, weights, messages)
    assistant.encode = lru_cache(args.image_cache)(assistant.encode)
    if args.overwrite:
        journal.path.unlink(missing_ok=True)
        args.answers.unlink(missing_ok=True)
    batches = plan(assistant, questions, args.system, options["max_new_tokens"], args.batch_size)
    seed = options.pop("seed") or 0
    ready, started, told = len(done), time.monotonic(), time.monotonic()
    if done:
        messages.note(f"{ready} of {len(questions)} answered before; going on")
    for batch in batches:
        if all(question.line in done for question in batch):
            continue
        answers = zip(batch, ask(assistant, batch, seed, options), strict=True)
        new = {question.line: record(question, *answer) for question, answer in answers if question.line not in done}
        journal.add(new)
        done |= new
        seconds = time.monotonic() - started
        left = sum(map(len, batches)) - len(done)
        rate = (len(done) - ready) / seconds
        text = f"{len(done)} answered, {left} to go, {rate:.2f} per second, {left / rate / 60:.0f} min left"
        messages.progress(text)
        if args.verbose and (time.monotonic() - told >= SECONDS or not left):
            told = time.monotonic()
            print(text, file=sys.stderr)
    messages.progress("")

    done |= {question.line: record(question, None, question.error) for question in questions if question.error}
    cli.write_whole(args.answers, "".join(json.dumps(done[question.line]) + "\n" for question in questions))
    journal.path.unlink(missing_ok=True)
    errors = [done[question.line]["error"] for question in questions if "error" in done[question.line]]
    if errors:
        what = f"error: {len(errors)} of {len(questions)} questions have no answer; {args.answers} says why"
        print(f"{what}; the first: {errors[0]}", file=sys.stderr)
    return 1 if errors else 0


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m minillava.batch`; the exit status."""
    return doors.enter("batch", argv)
