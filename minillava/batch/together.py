"""Questions on the engine (generate/engine.py): several at a time, and one that is answered makes
room for the next at once.

A prompt is read once for all questions that begin with it, such as those on one picture. An answer
has the same bits whoever shares its passes, so that a run which goes on writes what a whole one
would have written.
"""

import queue
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from minillava.assistant import Assistant
from minillava.batch.questions import Question, shown_line
from minillava.fast.parallel import OthersEnded
from minillava.files.pictures import open_image
from minillava.generate.contrast import find_method
from minillava.generate.engine import Engine, Failed, Refused, Request, Token
from minillava.tiles.pictures import Tiled, key_of, one_of

PIECE = 256
"""Positions of a prompt that are read at once: nobody waits for the next word of a file."""

FULL = "the GPU's memory is full; the same command with a smaller --batch-size goes on"

Answered = tuple[str | None, str | None, dict | None]
"""An answer, or an error, and the metadata."""

Ended = queue.Queue[tuple[Question, Token | Failed, str]]
"""Where the engine puts the ends of answers, with what was said."""

Picture = tuple[bytes, Tensor | Tiled]


class Together:
    """The questions of a file, asked `size` at a time. prompts: line -> ids of every question that
    can be asked. options: the fields of `Options`, `system` and `contrast` by name. pictures: how
    many are kept. Raises ValueError if the memory of a GPU is full."""

    def __init__(
        self,
        assistant: Assistant,
        prompts: Mapping[int, Sequence[int]],
        most: int,
        options: dict[str, Any],
        *,
        size: int,
        pictures: int,
    ):
        """most: positions of the longest prompt. size: of which there are enough questions."""
        given = {name: value for name, value in options.items() if name not in ("system", "seed")}
        self.method = find_method(given.pop("contrast", None))
        self.assistant, self.prompts, self.given = assistant, prompts, given
        self.seed = options.get("seed") or 0
        self.size = size
        self.pixels = lru_cache(pictures)(self._open)
        self.ended: Ended = queue.Queue()
        try:
            self.engine = Engine(
                assistant.model,
                assistant.tokenizer,
                slots=self.size * (1 if self.method is None else 2),
                waiting=self.size,
                piece=PIECE,
                pictures=pictures,
                capacity=most + assistant.options(**given).max_new_tokens,
                exact=True,
            )
        except torch.OutOfMemoryError as error:
            raise ValueError(FULL) from error

    def answers(
        self, questions: Sequence[Question]
    ) -> Generator[list[tuple[Question, Answered]], None, None]:
        """The answers as they end, some at a time. Raises what the model raised, unless it was
        about one question."""
        left, asked = iter(questions), 0
        with self._running():
            while True:
                found: list[tuple[Question, Answered]] = []
                try:
                    while asked < 2 * self.size and (question := next(left, None)):
                        try:
                            self.engine.submit(self.request(question))
                            asked += 1
                        except (ValueError, OSError) as error:
                            found.append((question, (None, shown_line(error), None)))
                        except Refused:
                            for _ in range(asked):  # one of them knows what ended the engine
                                found.append(self._next())
                            raise
                    refused = len(found)
                    if asked and not found:
                        found.append(self._next())
                    while not self.ended.empty():
                        found.append(_told(*self.ended.get()))
                except Exception:
                    if found:  # what was answered before it is kept
                        yield found
                    raise
                if not found:
                    return
                asked -= len(found) - refused
                yield found

    def answer(self, question: Question) -> Answered:
        """One answer, while the engine runs; several threads may wait for one each. Raises as
        `answers`."""
        ended: Ended = queue.Queue()
        try:
            self.engine.submit(self.request(question, ended))
        except (ValueError, OSError) as error:
            return None, shown_line(error), None
        return _told(*ended.get())[1]

    def request(self, question: Question, ended: Ended | None = None) -> Request:
        """A question as the engine reads it, and where its end is put. Raises ValueError or OSError
        for a broken picture."""
        seed = (self.seed + question.line) % 2**64
        ids, more = self.prompts[question.line], dict[str, Any]()
        if self.method is not None:
            opened = [open_image(each) for each in question.images]
            generator = torch.Generator().manual_seed(seed)
            (row,), changed = self.method.second(
                [list(ids)], opened, self.assistant.image_processor, generator
            )
            changed = () if changed is None else changed
            own = [(b"%d %d" % (question.line, i), each) for i, each in enumerate(changed)]
            more = {"contrast": self.method, "second_rows": [(row, own)]}
        said: list[str] = []
        return Request(
            ids,
            [self.pixels(each, len(question.images) > 1) for each in question.images],
            [self.assistant.options(**self.given, seed=seed)],
            partial(_put, question, said, self.ended if ended is None else ended),
            **more,
        )

    def _open(self, name: str, several: bool) -> Picture:
        processor = self.assistant.image_processor
        key = key_of(processor, name.encode("utf-8", "surrogateescape"), several)
        return key, one_of(processor, name, several)

    @contextmanager
    def _running(self) -> Iterator[None]:
        self.engine.start()
        try:
            yield
        finally:
            self.engine.drain(0)
            self.engine.join()

    def _next(self) -> tuple[Question, Answered]:
        """Wait for the next end of an answer."""
        while True:
            try:
                return _told(*self.ended.get(timeout=1))  # without one, Windows hears no Ctrl-C
            except queue.Empty:
                continue


def _put(question: Question, said: list[str], ended: Ended, _: int, event: Token | Failed) -> None:
    """Take an event of a question's answer, in the engine's thread; its end is passed on."""
    if isinstance(event, Token):
        said.append(event.text)
        if event.finish_reason is None:
            return
    ended.put((question, event, "".join(said)))


def _told(question: Question, event: Token | Failed, text: str) -> tuple[Question, Answered]:
    """An answer as the file has it. Raises what the model raised, unless it was about the
    question."""
    if isinstance(event, Token):
        return question, (text, None, {"finish_reason": event.finish_reason})
    if isinstance(event.cause, torch.OutOfMemoryError):
        raise ValueError(FULL) from event.cause
    if event.cause is None:
        return question, (None, event.message, None)
    told = isinstance(event.cause, (ValueError, OSError))
    if told and not isinstance(event.cause, OthersEnded):
        return question, (None, shown_line(event.cause), None)
    raise event.cause
