"""The rows of a data file, checked before a model is opened, and what a model learns of them.

A row is a picture and a conversation about it, as LLaVA's files have them: `{"id", "image",
"conversations": [{"from": "human" | "gpt", "value": text}, ...]}`. P positions of a picture.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from minillava.config import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from minillava.files.disk import refused
from minillava.files.text import decode
from minillava.labels import encode_answers
from minillava.prompt import IMAGE_MARKER
from minillava.templates import Template
from minillava.tokenizer import Tokenizer

SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}

SHOWN = 5  # offenders of a kind that are named


class Row(NamedTuple):
    """One conversation to learn from."""

    name: str  # what messages call it: its id, or its number in the file
    pictures: tuple[Path, ...]
    turns: tuple[tuple[str, str], ...]  # question, with a marker for each picture, and answer
    system: str | None  # instead of the template's

    @property
    def words(self) -> int:
        """How long it is, as LLaVA counts it: words; negative without a picture."""
        count = sum(len(text.split()) for turn in self.turns for text in turn)
        return count if self.pictures else -count


@dataclass
class Found:
    """The rows of a file. problems: what is wrong -> the names of the rows that have it."""

    rows: list[Row] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)
    first_dropped: int = 0  # answers before the first question
    last_dropped: int = 0  # questions without an answer at the end
    repeated: int = 0  # ids that stand on more than one row
    missing: int = 0  # rows left out since a picture is not there or has no bytes
    first: dict[str, str] = field(default_factory=dict)  # problem -> what the first row has of it

    def counts(self) -> str:
        """The rows in numbers, as one line."""
        pictures = sum(bool(row.pictures) for row in self.rows)
        turns = sum(len(row.turns) for row in self.rows)
        text = (
            f"{len(self.rows):,} rows ({pictures:,} with a picture, {len(self.rows) - pictures:,} "
            f"of text alone), {turns:,} answers"
        )
        for count, what in (
            (self.first_dropped, "answers before a first question left out"),
            (self.last_dropped, "questions without an answer left out"),
            (self.repeated, "ids on more than one row"),
            (self.missing, "rows left out whose picture is not there or has no bytes"),
            (
                sum(len(row.pictures) > 1 for row in self.rows),
                "rows with several pictures, of which LLaVA-1.5 never saw one",
            ),
        ):
            text += f"; {count:,} {what}" if count else ""
        return text

    def refuse(self, path: Path) -> None:
        """Raises ValueError naming the first offenders of each kind, if there are any."""
        if not self.problems:
            return
        lines = []
        for what, names in self.problems.items():
            more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
            first = f" (first: {self.first[what]})" if what in self.first else ""
            lines.append(f"row {', '.join(names[:SHOWN])}{more} {what}{first}")
        bad = sum(map(len, self.problems.values()))
        first = f"{path}: {bad:,} row(s) cannot be learnt: {lines[0]}; --skip-bad leaves them out"
        raise ValueError("\n  ".join([first, *lines[1:]]))


class Bad(ValueError):
    """What is wrong with one row; the message is the kind."""


class Missing(Bad):
    """A picture that cannot be learnt from is named, and which."""

    def __init__(self, kind: str, picture: Path):
        super().__init__(kind)
        self.picture = picture


def read_rows(
    path: Path, images: Path | None = None, plain: bool = False, skip_missing: bool = False
) -> Found:
    """The rows of a file, a JSON list or JSON lines. images: the folder that pictures are named
    from. plain: captions, of which the question is not learnt from. skip_missing: rows whose
    picture is not there are counted and left out. Raises FileNotFoundError, OSError or ValueError
    for a file that cannot be read; what is wrong with rows is in `problems`."""
    found = Found()
    ids: Counter[str] = Counter()
    for number, raw in enumerate(_raw_rows(path)):
        name = str(number)
        try:
            if not isinstance(raw, dict):
                raise Bad(f"is a {type(raw).__name__}, expected an object")
            if raw.get("id") is not None:
                name = f"{str(raw['id'])!r:.60} ({number})"
                ids[str(raw["id"])] += 1
            found.rows.append(_row(name, raw, images or path.parent, plain, found))
        except Bad as error:
            if isinstance(error, Missing):
                if skip_missing:
                    found.missing += 1
                    continue
                found.first.setdefault(str(error), str(error.picture))
            found.problems.setdefault(str(error), []).append(name)
    found.repeated = sum(count > 1 for count in ids.values())
    if not found.rows and not found.problems:
        none = f"has no row whose picture is in {images or path.parent}; is --images another?"
        empty = "has no rows; expected a list of conversations"
        raise ValueError(f"{path}: {none if found.missing else empty}")
    return found


def _raw_rows(path: Path) -> list[Any]:
    try:
        text = decode(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file of rows; check the path") from None
    except OSError as error:
        raise refused(path, error) from None
    if text.lstrip()[:1] == "[":
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not valid JSON ({error}); save it again") from None
        return list(rows)
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{path}: line {number} is not valid JSON ({error}); expected a JSON list, or "
                    "one object a line"
                ) from None
    return rows


def _row(name: str, raw: dict[str, Any], images: Path, plain: bool, found: Found) -> Row:
    system, messages = _messages(raw)
    while messages and messages[0][0] != "human":
        messages = messages[1:]
        found.first_dropped += 1
    if messages and messages[-1][0] == "human":
        messages = messages[:-1]
        found.last_dropped += 1
    if not messages:
        raise Bad("has no question with an answer")
    if [speaker for speaker, _ in messages] != ["human", "gpt"] * (len(messages) // 2):
        raise Bad("has two questions or two answers in a row")
    questions = [text for _, text in messages[::2]]
    answers = [text for _, text in messages[1::2]]
    if not all(answer.strip() for answer in answers):
        raise Bad("has an empty answer")
    pictures = _pictures(raw, images)
    if plain:
        if len(messages) != 2 or len(pictures) != 1:
            raise Bad("is no caption of one picture, as the template plain learns it")
        questions = [IMAGE_MARKER]
    else:
        questions = _place(questions, len(pictures))
    if not all(question.strip() for question in questions):
        raise Bad("has an empty question")
    return Row(name, pictures, tuple(zip(questions, answers, strict=True)), system)


def _messages(raw: dict[str, Any]) -> tuple[str | None, list[tuple[str, str]]]:
    """The system text, if there is one, and (speaker, text) of the others."""
    listed = raw.get("conversations")
    if not isinstance(listed, list):
        raise Bad("has no list of `conversations`")
    system, messages = None, []
    for message in listed:
        known = isinstance(message, dict) and SPEAKERS.get(str(message.get("from")))
        if not known or not isinstance(message.get("value"), str):
            raise Bad("has a message that is not {from: human or gpt, value: text}")
        if known == "system":
            system = message["value"]
        else:
            messages.append((known, message["value"]))
    return system, messages


def _pictures(raw: dict[str, Any], images: Path) -> tuple[Path, ...]:
    named = raw.get("image")
    named = [] if named is None else named if isinstance(named, list) else [named]
    if not all(isinstance(name, str) and name for name in named):
        raise Bad("has an `image` that is not the name of a file")
    paths = tuple(images / name for name in named)
    for path in paths:
        try:
            size = path.stat().st_size if path.is_file() else None
        except (OSError, ValueError):  # a name too long, or with a zero in it
            size = None
        if size is None:
            raise Missing("names a picture that is not there", path)
        if size == 0:
            raise Missing("names a picture of no bytes", path)
    return paths


def _place(questions: list[str], pictures: int) -> list[str]:
    """One marker per picture. A single picture goes in front of its question, however often it is
    marked there, as in LLaVA; several stay where they are marked."""
    marked = [question.count(IMAGE_MARKER) for question in questions]
    if pictures and not any(marked):
        raise Bad(f"names a picture but no question says {IMAGE_MARKER}")
    if not pictures and any(marked):
        raise Bad(f"says {IMAGE_MARKER} but names no picture")
    if pictures != 1:
        if sum(marked) != pictures:
            raise Bad("has another number of pictures than of markers")
        return questions
    if sum(map(bool, marked)) > 1:
        raise Bad("marks one picture in several questions")
    return [
        f"{IMAGE_MARKER}\n{question.replace(IMAGE_MARKER, '').strip()}" if count else question
        for question, count in zip(questions, marked, strict=True)
    ]


def hold_out(rows: Sequence[Row], share: float) -> tuple[list[Row], list[Row]]:
    """(rows to learn, rows to measure), by a hash of the picture's name, or of the text without
    one: the split stays when rows are added, and no picture is on both sides."""
    sides: tuple[list[Row], list[Row]] = [], []
    for row in rows:
        key = str([path.name for path in row.pictures] or row.turns)
        number = int.from_bytes(hashlib.sha256(key.encode(errors="replace")).digest()[:8], "big")
        sides[number < share * 2**64].append(row)
    return sides


def weighted(rows: Sequence[Row], weight: float, seed: int) -> list[Row]:
    """Each row so often as the weight says; of what is left after whole times, a part of the rows
    that the seed draws, in the order of the file."""
    whole = int(weight)
    count = round((weight - whole) * len(rows))
    drawn = sorted(random.Random(seed).sample(range(len(rows)), count))
    return [*rows] * whole + [rows[i] for i in drawn]


# ----------------------------------------------------------------------------------- what is learnt


class Example(NamedTuple):
    """A row as ids, and the labels of what is learnt."""

    row: Row
    ids: list[int]
    labels: list[int]
    pictures: tuple[Path, ...]  # those that are left after the cut
    positions: int  # with all those of the pictures
    cut: bool  # whether its end was left out

    @property
    def learnt(self) -> int:
        """The number of labels. The first id is never one, since nothing predicts it."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


def encode_row(
    row: Row, tokenizer: Tokenizer, template: Template, per_picture: int, longest: int
) -> Example:
    """A row in the template. per_picture: P. longest: positions, with those of pictures; what comes
    after them is left out, a picture whole."""
    ids, labels = encode_answers(tokenizer, template, row.turns, row.system)
    positions, kept = 0, 0
    for token in ids:
        size = per_picture if token == IMAGE_TOKEN_INDEX else 1
        if positions + size > longest:
            break
        positions += size
        kept += 1
    left = sum(token == IMAGE_TOKEN_INDEX for token in ids[:kept])
    return Example(
        row, ids[:kept], labels[:kept], row.pictures[:left], positions, cut=kept < len(ids)
    )


def check_template(template: Template, tokenizer: Tokenizer, ends: Sequence[int]) -> None:
    """Raises ValueError for a template that never teaches a model to stop: its answers end with
    neither an end token nor a stop text."""
    if template.single_turn or template.stop:
        return
    _, labels = encode_answers(tokenizer, template, [("a", "b")])
    if labels[-1] not in ends:
        raise ValueError(
            "answers of this template end without an end token, so the model would never learn to "
            "stop; choose another, such as vicuna_v1"
        )


def as_seen(example: Example, tokenizer: Tokenizer) -> str:
    """A row as a model sees it: its text with what is learnt in [[ ]], its ids, and its numbers."""
    text, inside = [], False
    for token, label in zip(example.ids, example.labels, strict=True):
        learnt = label != IGNORE_INDEX
        if learnt != inside:
            text.append("[[" if learnt else "]]")
            inside = learnt
        text.append(IMAGE_MARKER if token == IMAGE_TOKEN_INDEX else tokenizer.piece(token))
    text.append("]]" if inside else "")
    pictures = sum(token == IMAGE_TOKEN_INDEX for token in example.ids)
    read = len(example.ids) - pictures
    last = next((i for i in reversed(example.labels) if i != IGNORE_INDEX), None)
    ends = "nothing is learnt" if last is None else f"ends with {tokenizer.piece(last)}"
    numbers = (
        f"row {example.row.name}: {example.positions} positions, {example.positions - read} of "
        f"pictures, {read - example.learnt} read, {example.learnt} learnt, {ends}"
    )
    return "\n".join([numbers, "".join(text), " ".join(map(str, example.ids))])
