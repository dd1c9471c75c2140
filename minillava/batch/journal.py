"""The answers so far, on disk: the next run reads what a killed run has answered."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from minillava.batch.questions import Question
from minillava.cli.arguments import MODEL_FILES
from minillava.files.disk import locked, sync_folder


class Journal:
    """The answers so far, on disk; empty before the first."""

    ANEW = b'[0, "anew"]\n'
    """After the header: the answers file, if there is one, is older than this journal and does not
    count."""

    def __init__(self, path: Path, header: dict):
        self.path, self.header = path, json.dumps(header).encode() + b"\n"

    @contextmanager
    def alone(self, waiting: Callable[[], None]) -> Iterator[None]:
        """A block for one run at a time: a second run calls `waiting`, and enters when the first
        has finished or was killed."""
        while True:
            with open(self.path, "ab") as file, locked(file, waiting):
                try:
                    if not os.path.samestat(os.stat(self.path), os.fstat(file.fileno())):
                        continue
                except FileNotFoundError:  # the first has finished
                    continue
                if os.name == "nt":
                    file.close()  # Windows removes no open file
                try:
                    yield
                finally:
                    if self.path.exists() and not self.path.stat().st_size:
                        self.path.unlink()
                return

    def begin_anew(self) -> None:
        """Forget every answer, also those of the answers file; that file stays until it can be
        replaced."""
        self.path.write_bytes(self.header + self.ANEW)
        sync_folder(self.path.parent)

    @property
    def is_anew(self) -> bool:
        return self.path.read_bytes().startswith(self.header + self.ANEW)

    def read(self) -> dict[int, dict]:
        """Line number -> record. A last record that a killed run wrote in part is cut off. Raises
        ValueError if the journal belongs to another run."""
        content = self.path.read_bytes()
        if self.header.startswith(content):  # empty, or its run was killed before the first answer
            os.truncate(self.path, 0)
            return {}
        if not content.startswith(self.header):
            raise ValueError(
                f"{self.path} was begun with other {self._differences(content)}; repeat that run's "
                "command to finish "
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
        """Add records; they are on disk when this returns."""
        with open(self.path, "ab") as file:
            new = not file.tell()
            file.write(
                self.header * new
                + b"".join(json.dumps(pair).encode() + b"\n" for pair in records.items())
            )
            file.flush()
            os.fsync(file.fileno())
        if new:
            sync_folder(self.path.parent)

    def _differences(self, content: bytes) -> str:
        try:
            theirs, ours = (
                dict(json.loads(header)) for header in (content.partition(b"\n")[0], self.header)
            )
        except (ValueError, TypeError):
            return "settings"
        different = sorted(
            name for name in {**ours, **theirs} if ours.get(name, ...) != theirs.get(name, ...)
        )
        return ", ".join(different) or "settings"


def read_journal(
    journal: Journal, questions: list[Question], record: Callable[..., dict]
) -> dict[int, dict]:
    """Line number -> record of what the journal answers. A record that this run would not write is
    left out: after a power failure a disk may give back anything. Raises ValueError if the journal
    is another run's (see Journal.read)."""
    found, asked = journal.read(), {question.line: question for question in questions}
    return {
        line: one
        for line, one in found.items()
        if line in asked and _fits(asked[line], one, record)
    }


def _fits(question: Question, found, record: Callable[..., dict]) -> bool:
    """Whether a stored record differs from what this run would write for the question in the answer
    only."""
    if not isinstance(found, dict):
        return False
    answer, error, metadata = map(found.get, ("text", "error", "metadata"))
    kinds = isinstance(answer, str) if error is None else isinstance(error, str)
    return (
        kinds
        and (metadata is None or isinstance(metadata, dict))
        and record(question, answer, error, metadata) == found
    )


def read_answers(
    path: Path, questions: list[Question], record: Callable[..., dict]
) -> dict[int, dict]:
    """Line number -> record of what a finished file answers, without its errors. record: makes what
    this run would write. Raises ValueError if the file is not this run's: it has other questions,
    another model or other settings, or is not a file of answers."""
    try:
        records = [json.loads(line) for line in path.read_bytes().splitlines()]
        pairs = list(zip(questions, records, strict=True))
        same = all(_fits(question, found, record) for question, found in pairs)
    except (ValueError, RecursionError):
        same = False
    if not same:
        raise ValueError(
            f"{path} does not hold the answers of this command (other questions, model or "
            "settings); choose another "
            "name, or pass --overwrite to start anew"
        )
    return {question.line: found for question, found in pairs if "error" not in found}


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def stamp(folder: Path) -> list:
    """Name, size and time of a model's files, which change if the files do; comparing them reads no
    gigabytes."""
    files = sorted(path for path in folder.glob("*") if path.suffix in MODEL_FILES)
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
