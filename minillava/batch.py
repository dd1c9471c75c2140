"""`python -m minillava.batch`: a file of questions to a file of answers, in LLaVA's evaluation format.

While it runs, finished answers are in a journal beside the answers file, NAME.partial: a header of what was asked and
how, then one [line number, record] each. Whenever the run is killed, the same command goes on from the journal; when
all questions are answered, the answers appear under their name at once, in order. The same command then asks again
what became an error, and nothing else. A second run at the same file waits for the first.
"""

if __name__ == "__main__":  # flags are read before torch is imported, below
    from minillava import doors

    doors.begin("batch")

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import torch

from minillava import cli, doors
from minillava.assistant import Assistant, choose_device, find_folder
from minillava.disk import decode, explain, is_stream, locked, same_file, sync_folder, write_whole

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
    """One line of the questions file, or one object of a JSON array, valid or not."""

    line: int  # from 1
    question_id: str | int | None = None
    text: str = ""
    images: list[str] = field(default_factory=list)
    error: str | None = None  # why it cannot be asked
    place: str = "line"  # or "question": what `line` counts

    def record(
        self, answer: str | None, error: str | None, metadata: dict | None, answer_id: str, model_id: str
    ) -> dict:
        """What stands in the answers file; LLaVA's own scripts read it."""
        if error is not None:
            name = {self.place: self.line} if self.question_id is None else {"question_id": self.question_id}
            return {**name, "error": error}
        names = {"answer_id": answer_id, "model_id": model_id, "metadata": metadata or {}}
        return {"question_id": self.question_id, "prompt": self.text, "text": answer, **names}


FORM = "one JSON object per line with question_id, text and, if it is about one, image"


def read_questions(content: bytes, folder: str, name: str = "questions") -> list[Question]:
    """The questions of a file: its lines that are not blank; or, counted from 1, the objects of one
    JSON array, or objects over several lines. Names of pictures are relative to `folder`, `name` is the
    file's. One that is not a question has its `error`; ValueError for a file without any."""
    text = decode(content, name, errors="surrogateescape")
    lines = [(i, line.removeprefix("\ufeff")) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    first = _parse(lines[0][1]) if lines else None
    values = None if isinstance(first, dict) else _values(text)
    if values is not None:
        questions = [_check(i, "question", value, folder) for i, value in enumerate(values, start=1)]
    elif first is None and lines and lines[0][1].lstrip().startswith("["):
        raise ValueError(f"{name}: begins as a JSON array, but is not JSON ({_mistake(text)}); correct it")
    else:
        questions = [_read_line(i, line, folder) for i, line in lines]
    if questions and all(question.error for question in questions):
        what = _nature(first if values is None else values[0], lines[0][1])
        raise ValueError(f"{name}: no question in it ({questions[0].error}); {what}expected {FORM}")
    return questions


def _parse(text: str):
    """The value that a line is, None for what is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _values(text: str) -> list | None:
    """The objects of a text wherever its lines end: in one array, or one after another; else None."""
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")
    found, end = [], space.match(text).end()
    try:
        while end < len(text):
            value, end = decoder.raw_decode(text, end)
            found.append(value)
            end = space.match(text, end).end()
    except (ValueError, RecursionError):
        return None
    if len(found) == 1 and isinstance(found[0], list):
        return found[0]
    return found if all(isinstance(value, dict) for value in found) else None


def _mistake(text: str) -> str:
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        return _one_line(error)
    return "a value that is not an object"


def _nature(first, line: str) -> str:
    """What a file without questions seems to be."""
    lists = [key for key, value in first.items() if isinstance(value, list)] if isinstance(first, dict) else []
    if "conversations" in lists:
        return "it has LLaVA's conversations, as for training or ScienceQA; "
    if lists:
        return f"it has a list {json.dumps(lists[0])[:40]} inside an object; "
    kinds = {"\t": "tab-separated values", ",": "comma-separated values", ";": "values separated by ;"}
    kind = next((kind for mark, kind in kinds.items() if mark in line), None)
    return f"it looks like {kind}; " if kind and line.lstrip()[:1] not in ("{", "[") else ""


def _read_line(number: int, line: str, folder: str) -> Question:
    try:
        line.encode()
        raw = json.loads(line)
    except UnicodeEncodeError:
        return Question(number, error=f"line {number} is not JSON (it is not UTF-8)")
    except (ValueError, RecursionError) as error:
        return Question(number, error=f"line {number} is not JSON ({error})")
    return _check(number, "line", raw, folder)


def _check(number: int, place: str, raw, folder: str) -> Question:
    """A question of the file's objects; place: what is counted."""
    question = Question(number, place=place)
    if not isinstance(raw, dict):
        found = type(raw).__name__
        question.error = f"{place} {number} is {found}, expected an object with question_id and text"
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
            question.error = f"{place} {number}: {name} is {json.dumps(raw.get(name))[:80]}, expected {expected}"
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
                ids = assistant.tokenize(assistant.prompt(question.text, images=pictures, system=system))
                lengths[question.line] = len(ids) + pictures * (each - 1)
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


def ask(assistant: Assistant, batch: list[Question], seed: int, options: dict) -> list[tuple]:
    """(answer, error, metadata) of each question. If the batch fails, each is asked alone, to find out
    whose fault it is."""
    images, texts = [question.images for question in batch], [question.text for question in batch]
    seeds = [(seed + question.line) % 2**64 for question in batch]
    try:
        found = assistant.ask_each(images, texts, seed=seeds, **options)
        ends = [{"finish_reason": reason} for reason in found.finish_reason]
        return [(answer, None, end) for answer, end in zip(found.text, ends, strict=True)]
    except torch.OutOfMemoryError as error:
        raise ValueError("the GPU's memory is full; the same command with a smaller --batch-size goes on") from error
    except (ValueError, OSError) as error:
        if len(batch) == 1:
            return [(None, _one_line(error), None)]
        return [answer for question in batch for answer in ask(assistant, [question], seed, options)]


class Journal:
    """The answers so far, on disk; empty before the first."""

    ANEW = b'[0, "anew"]\n'
    """After the header: the answers file, if there is one, is older than this journal and does not count."""

    def __init__(self, path: Path, header: dict):
        self.path, self.header = path, json.dumps(header).encode() + b"\n"

    @contextmanager
    def alone(self, waiting: Callable[[], None]) -> Iterator[None]:
        """One run at a time: a second one calls `waiting`, and goes on from here when the first has
        finished or was killed."""
        while True:
            with open(self.path, "ab") as file, locked(file, waiting):
                try:
                    if not os.path.samestat(os.stat(self.path), os.fstat(file.fileno())):
                        continue
                except FileNotFoundError:  # the first has finished
                    continue
                if os.name == "nt":
                    file.close()  # an open file could not be removed
                try:
                    yield
                finally:
                    if self.path.exists() and not self.path.stat().st_size:
                        self.path.unlink()
                return

    def begin_anew(self) -> None:
        """Forget everything, the answers file as well, which stays until it can be replaced."""
        self.path.write_bytes(self.header + self.ANEW)
        sync_folder(self.path.parent)

    @property
    def is_anew(self) -> bool:
        return self.path.read_bytes().startswith(self.header + self.ANEW)

    def read(self) -> dict[int, dict]:
        """Line number -> record. What a kill left half written at the end is cut off. Raises ValueError where the
        journal belongs to another run."""
        content = self.path.read_bytes()
        if self.header.startswith(content):  # nothing yet, or killed before the first answer
            os.truncate(self.path, 0)
            return {}
        if not content.startswith(self.header):
            raise ValueError(
                f"{self.path} was begun with other {self._differences(content)}; repeat that run's command to finish "
                "it, or pass --overwrite to start anew"
            )
        records, end = {}, len(self.header + self.ANEW * self.is_anew)
        for line in content[end:].splitlines(keepends=True):
            try:
                number, record = json.loads(line)
            except (ValueError, TypeError, RecursionError):
                break
            if not line.endswith(b"\n") or type(number) is not int or not isinstance(record, dict):
                break
            records[number] = record
            end += len(line)
        os.truncate(self.path, end)
        return records

    def add(self, records: dict[int, dict]) -> None:
        """On disk when this returns."""
        with open(self.path, "ab") as file:
            new = not file.tell()
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


def read_journal(journal: Journal, questions: list[Question], record: Callable[..., dict]) -> dict[int, dict]:
    """Line number -> record of what the journal answers, as far as that is what this run would write: a
    disk that lost its power may give back anything. Raises ValueError as `Journal.read`."""
    found, asked = journal.read(), {question.line: question for question in questions}
    return {line: one for line, one in found.items() if line in asked and _fits(asked[line], one, record)}


def _fits(question: Question, found, record: Callable[..., dict]) -> bool:
    """Whether a stored record says of the question what this run would say, but for the answer."""
    if not isinstance(found, dict):
        return False
    answer, error, metadata = map(found.get, ("text", "error", "metadata"))
    kinds = isinstance(answer, str) if error is None else isinstance(error, str)
    return (
        kinds
        and (metadata is None or isinstance(metadata, dict))
        and record(question, answer, error, metadata) == found
    )


def read_answers(path: Path, questions: list[Question], record: Callable[..., dict]) -> dict[int, dict]:
    """Line number -> record of what a finished file answers, its errors left out. record: what this run would write.
    Raises ValueError where that is another file's: other questions, model or settings, or something else altogether."""
    try:
        records = [json.loads(line) for line in path.read_bytes().splitlines()]
        pairs = list(zip(questions, records, strict=True))
        same = all(_fits(question, found, record) for question, found in pairs)
    except (ValueError, RecursionError):
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
    files = sorted(path for path in folder.glob("*") if path.suffix in cli.MODEL_FILES)
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def _read_file(args: argparse.Namespace) -> bytes:
    path = args.questions
    if str(path) == "-":
        cli.say_what_is_awaited(args, "the questions")
        return cli.read_stdin()
    if not path.exists() or path.is_dir():
        raise FileNotFoundError(f"{path}: no such file of questions; check the path")
    return path.read_bytes()


def ask_file(args: argparse.Namespace, options: dict) -> int:
    """Every question of the file that the journal does not answer; then the journal becomes the answers file."""
    messages = cli.Messages(args.verbose, args.quiet)
    content = _read_file(args)
    if not os.path.isdir(args.images):
        raise ValueError(f"{args.images}: no such folder of pictures; --images names the one that they are in")
    name = "stdin" if str(args.questions) == "-" else str(args.questions)
    questions = read_questions(content, args.images, name)
    pictures = {image for question in questions for image in question.images} if args.answers.exists() else ()
    if any(same_file(args.answers, image) for image in pictures):
        raise ValueError(f"{args.answers}: is a picture of the questions; choose another name for the answers")
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

    def record(question: Question, answer: str | None, error: str | None, metadata: dict | None = None) -> dict:
        answer_id = _digest([asked, model_id, question.line])[:22]
        return question.record(answer, error, metadata, answer_id, model_id)

    with ExitStack() as stack:
        home = args.answers
        if is_stream(home):  # which nobody can go on with
            home = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "answers"
        journal = Journal(home.with_name(home.name + ".partial"), settings)
        busy = f"another run is at {args.answers}; waiting for its end, to go on with what it leaves (Ctrl-C leaves)"
        stack.enter_context(journal.alone(lambda: messages.note(busy)))
        return _ask_rest(args, options, messages, questions, journal, record, weights)


def _ask_rest(
    args: argparse.Namespace,
    options: dict,
    messages: cli.Messages,
    questions: list[Question],
    journal: Journal,
    record: Callable[..., dict],
    weights: str,
) -> int:
    done, finished = {}, args.answers.is_file() and args.answers.stat().st_size > 0 and not is_stream(args.answers)
    if finished and not args.overwrite and not journal.is_anew:
        done = read_answers(args.answers, questions, record)
        if len(done) == len(questions):
            messages.note(f"{args.answers} is finished already: nothing to do (--overwrite starts anew)")
            if journal.path.read_bytes().startswith(journal.header):
                journal.path.unlink()  # killed just after the answers got their name
            return 0
    if not args.overwrite:
        done |= read_journal(journal, questions, record)  # whether it can go on is known before gigabytes are opened

    assistant = cli.open_assistant(args, weights, messages)
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
                question.line: record(question, *answer) for question, answer in answers if question.line not in done
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
        done |= {question.line: record(question, None, question.error) for question in questions if question.error}
        write_whole(args.answers, "".join(json.dumps(done[question.line]) + "\n" for question in questions))
    except BrokenPipeError:
        raise
    except OSError as error:
        if is_stream(args.answers):
            raise
        kept = sum("error" not in found for found in done.values())
        left = f"{journal.path} keeps {kept} answer(s), and the same command goes on with them"
        raise OSError(f"{explain(error, journal.path)}; {left}") from error
    journal.path.unlink(missing_ok=True)
    errors = [done[question.line]["error"] for question in questions if "error" in done[question.line]]
    if errors:
        what = f"error: {len(errors)} of {len(questions)} questions have no answer; {args.answers} says why"
        print(f"{what}; the first: {errors[0]}", file=sys.stderr)
    else:
        messages.note(f"{len(questions)} answer{'s' * (len(questions) != 1)} in {args.answers}")
    return 1 if errors else 0


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m minillava.batch`; the exit status."""
    return doors.enter("batch", argv)
