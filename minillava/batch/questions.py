"""Files of questions, in each of the forms in which people write them, and what is wrong with a
line."""

import argparse
import json
import os
import re
from dataclasses import dataclass, field

from minillava.cli.opening import read_stdin, say_what_is_awaited
from minillava.files.pictures import is_data_url, is_file_url
from minillava.files.text import as_meant, decode

NOT_ASKED = {"answers", "batch_size", "image_cache", "overwrite", "verbose", "quiet", "device"}
NOT_ASKED |= {"draft", "draft_tokens", "on", "address", "workers"}
"""The flags that change no answer (beyond the last digits), so that a resumed run may change them;
but for the kind of device, which `ask_file` adds."""

OTHER_FOLDERS = ("model_base", "adapter", "vision_tower")  # folders besides --weights


@dataclass
class Question:
    """One line of the questions file, or one object of a JSON array; it may be invalid."""

    line: int  # from 1
    question_id: str | int | None = None
    text: str = ""
    images: list[str] = field(default_factory=list)
    error: str | None = None  # why it cannot be asked
    place: str = "line"  # or "question": what `line` counts

    def record(
        self,
        answer: str | None,
        error: str | None,
        metadata: dict | None,
        answer_id: str,
        model_id: str,
    ) -> dict:
        """The record for the answers file, in the format that LLaVA's own scripts read."""
        if error is not None:
            name = (
                {self.place: self.line}
                if self.question_id is None
                else {"question_id": self.question_id}
            )
            return {**name, "error": error}
        names = {"answer_id": answer_id, "model_id": model_id, "metadata": metadata or {}}
        return {"question_id": self.question_id, "prompt": self.text, "text": answer, **names}


FORM = "one JSON object per line with question_id, text and, if it is about one, image"


def read_questions(content: bytes, folder: str, name: str = "questions") -> list[Question]:
    """The questions of a file: its lines that are not blank; or, counted from 1, the objects of one
    JSON array, or objects over several lines. Names of pictures are relative to `folder`; `name` is
    the file's. A line that is not a question has an `error`. Raises ValueError for a file without a
    question."""
    text = decode(content, name, errors="surrogateescape")
    lines = [
        (i, line.removeprefix("\ufeff"))
        for i, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]
    first = _parse(lines[0][1]) if lines else None
    values = None if isinstance(first, dict) else _values(text)
    if values is not None:
        questions = [
            _check(i, "question", value, folder) for i, value in enumerate(values, start=1)
        ]
    elif first is None and lines and lines[0][1].lstrip().startswith("["):
        raise ValueError(
            f"{name}: begins as a JSON array, but is not JSON ({_mistake(text)}); correct it"
        )
    else:
        questions = [_read_line(i, line, folder) for i, line in lines]
    if questions and all(question.error for question in questions):
        what = _nature(first if values is None else values[0], lines[0][1])
        raise ValueError(f"{name}: no question in it ({questions[0].error}); {what}expected {FORM}")
    return questions


def _parse(text: str):
    """The JSON value of a line, None if the line is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _values(text: str) -> list | None:
    """The objects of a text in one JSON array or one after another, wherever its lines end; None if
    the text is neither."""
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
        return shown_line(error)
    return "a value that is not an object"


def _nature(first, line: str) -> str:
    """A sentence about what a file without questions seems to be."""
    lists = (
        [key for key, value in first.items() if isinstance(value, list)]
        if isinstance(first, dict)
        else []
    )
    if "conversations" in lists:
        return "it has LLaVA's conversations, as for training or ScienceQA; "
    if lists:
        return f"it has a list {json.dumps(lists[0])[:40]} inside an object; "
    kinds = {
        "\t": "tab-separated values",
        ",": "comma-separated values",
        ";": "values separated by ;",
    }
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
    """Check one object of the file; a question that cannot be asked gets its `error`. place: what
    `number` counts, lines or questions."""
    question = Question(number, place=place)
    if not isinstance(raw, dict):
        found = type(raw).__name__
        question.error = (
            f"{place} {number} is {found}, expected an object with question_id and text"
        )
        return question
    if type(raw.get("question_id")) in (str, int):
        question.question_id = raw["question_id"]
    images = raw.get("image")
    images = [] if images is None else images if isinstance(images, list) else [images]
    checks = (
        ("question_id", question.question_id is not None, "a text or a whole number"),
        ("text", isinstance(raw.get("text"), str), "the question"),
        (
            "image",
            all(isinstance(image, str) for image in images),
            "the name of a picture, or a list of them",
        ),
        ("video", raw.get("video") is None, "none: videos are not read; give frames as pictures"),
    )
    for name, good, expected in checks:
        if not good:
            question.error = (
                f"{place} {number}: {name} is {json.dumps(raw.get(name))[:80]}, expected {expected}"
            )
            return question
    question.text = as_meant(raw["text"])
    question.images = [
        image if is_data_url(image) or is_file_url(image) else os.path.join(folder, image)
        for image in images
    ]
    return question


def shown_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def read_question_file(args: argparse.Namespace) -> bytes:
    path = args.questions
    if path == "-":
        say_what_is_awaited(args, "the questions")
        return read_stdin()
    if not path.exists() or path.is_dir():
        raise FileNotFoundError(f"{path}: no such file of questions; check the path")
    return path.read_bytes()
