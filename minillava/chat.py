"""A conversation that keeps its cache, so that each question costs only its own positions; `python -m minillava.chat`.

P patches of a picture, C width, T positions of the prompt.
"""

if __name__ == "__main__":  # flags are read before torch is imported, below
    from minillava import doors

    doors.begin("chat")

import argparse
import io
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from minillava import __version__, cli, doors, terminal
from minillava.assistant import Assistant
from minillava.cache import KVCache
from minillava.config import IMAGE_TOKEN_INDEX
from minillava.disk import is_stream, read_lines, write_whole
from minillava.image import ImageSource, open_image
from minillava.loop import Process, steps
from minillava.options import Options
from minillava.parsers import CHAT_COMMANDS
from minillava.prompt import DEFAULT_TEMPLATE, place_images, render
from minillava.tokenizer import common_prefix

GROWTH = 512
"""The cache grows by this many positions: all of a 7B's context would be 2 GB, most conversations are short."""


@dataclass(eq=False)  # compared by identity: what is in the cache is this picture or it is another one
class Picture:
    name: str
    patches: Tensor  # [P, C]


@dataclass
class Turn:
    question: str  # with an `<image>` for each picture
    pictures: tuple[Picture, ...]
    options: Options  # with the seed that was used
    answer: str = ""
    finish_reason: str | None = None  # None while it goes on, "stop", "length", "interrupted"
    reused: int = 0  # positions of its prompt that were in the cache already
    prefilled: int = 0  # positions of its prompt that were not


class Conversation:
    """Questions and answers in turn, about any number of pictures, each encoded once.

    The whole conversation is rendered to ids at every question. The cache is cut back to where these ids first differ
    from those it was filled with (a finished answer may be written, or cut into tokens, in another way than it was
    generated), and the rest is prefilled: the answer is that of a fresh start with the same ids.
    """

    def __init__(self, assistant: Assistant, system: str | None = None):
        """system: instead of the template's own; "" for none."""
        self.assistant, self.system = assistant, system
        self.clear()

    def clear(self) -> None:
        """Forget everything: turns, pictures, cache."""
        self.turns: list[Turn] = []
        self.waiting: list[Picture] = []  # for the next question
        self.cache: KVCache | None = None
        # What stands, or will stand, at each position: an id, or a Picture P times; the first cache.length are cached.
        # A stream goes on only while this is its own list.
        self.positions: list[int | Picture] = []

    @property
    def room(self) -> int:
        """How many more positions fit the model's context."""
        return self.assistant.model.config.text.context - len(self.positions)

    def add_image(self, source: ImageSource, name: str | None = None) -> Picture:
        """Encode a picture, for the next question. name: for `record`. Raises as `image.open_image`."""
        self.waiting.append(Picture(name or str(source), self.assistant.encode(source)))
        return self.waiting[-1]

    def ask(self, question: str, *, process: Process | None = None, **options) -> str:
        """The answer to the next question. process: as for `generate`. options: the fields of `options.Options` by
        name."""
        return "".join(self.stream(question, process=process, **options))

    def stream(self, question: str, *, process: Process | None = None, **options) -> Iterator[str]:
        """The answer as it is made, one piece per token, some of them empty. Arguments as for `ask`.

        Where it is left early (closed, Ctrl-C, another question asked), what was said so far is the answer; if that is
        nothing, the question was not asked. Raises ValueError, and leaves the conversation as it was, when the context
        is full; and where it should go on though another question was asked since, or all was cleared.
        """
        self._leave()
        assistant, model = self.assistant, self.assistant.model
        chosen = assistant.options(**options)
        if chosen.num_return_sequences > 1:
            raise ValueError(f"num_return_sequences is {chosen.num_return_sequences}, a conversation goes on from one")
        turn = Turn(place_images(question, len(self.waiting)), tuple(self.waiting), chosen)
        said = [(before.question, before.answer) for before in self.turns]
        assistant.check_text(question)
        ids = assistant.tokenizer.encode(render(assistant.template, [*said, (turn.question, None)], self.system))
        pictures = [picture for each in (*self.turns, turn) for picture in each.pictures]
        following = iter(pictures)
        positions = []
        for i in ids:
            positions += [next(following)] * model.config.tokens_per_image if i == IMAGE_TOKEN_INDEX else [i]
        context = model.config.text.context
        if len(positions) >= context:
            raise ValueError(
                f"with this question the conversation takes {len(positions)} positions, the model's context holds "
                f"{context} with the answer; ask something shorter, or start anew with /clear"
            )
        with torch.no_grad():
            spliced = model.splice([ids], torch.stack([p.patches for p in pictures]) if pictures else None)
        if self.cache is None:
            like = spliced.embeds
            self.cache = KVCache(model.config.text, 1, 0, dtype=like.dtype, device=like.device)
        # The last position is read in any case: its logits choose the first token.
        turn.reused = common_prefix(self.positions[: self.cache.length], positions[:-1])
        turn.prefilled = len(positions) - turn.reused
        self.cache.truncate(turn.reused)
        self.positions = positions
        self._make_room(len(positions) + 1)
        self.turns.append(turn)
        self.waiting = []
        rest = replace(spliced, embeds=spliced.embeds[:, turn.reused :])  # [1, T, C] -> [1, T - reused, C]
        try:
            for step in steps(model, rest, chosen, tokenizer=assistant.tokenizer, process=process, cache=self.cache):
                positions.append(step.ids[0])
                turn.answer += step.text[0]
                turn.finish_reason = step.finish_reason[0]
                self._make_room(len(positions) + 1)  # a GPU reads the next one before we are back here
                yield step.text[0]
                if self.positions is not positions and step.finish_reason[0] is None:
                    raise ValueError(f"the conversation went on without the answer to {question!r}; ask again")
        finally:
            if self.positions is positions:
                self._leave()

    def _leave(self) -> None:
        """Where the last answer is not finished, what was said so far is the answer; no stream goes on with it."""
        if not self.turns or self.turns[-1].finish_reason is not None:
            return
        turn = self.turns[-1]
        self.positions = list(self.positions)
        if turn.answer:
            turn.finish_reason = "interrupted"
        else:
            self.turns.pop()
            self.waiting = [*turn.pictures, *self.waiting]

    def record(self) -> dict:
        """The conversation as JSON's kinds of values; options only where they are not the default."""
        defaults = vars(Options())
        turns = [
            {
                "question": turn.question,
                "images": [picture.name for picture in turn.pictures],
                "answer": turn.answer,
                "finish_reason": turn.finish_reason,
                "options": {
                    name: value
                    for name, value in vars(turn.options).items()
                    if name == "seed" or value != defaults[name]
                },
            }
            for turn in self.turns
        ]
        return {"system": self.assistant.template.system if self.system is None else self.system, "turns": turns}

    def _make_room(self, length: int) -> None:
        context = self.assistant.model.config.text.context
        if min(length, context) > self.cache.capacity:
            self.cache.grow(min(-(-length // GROWTH) * GROWTH, context))


# --- the door -------------------------------------------------------------------------------------------------

COMMANDS = ("/image", "/clear", "/save", "/help", "/quit", "/exit")


class Session:
    """A conversation with somebody who types: each line is a question or a command."""

    def __init__(self, conversation: Conversation, options: dict, about: dict, messages: cli.Messages):
        """options: the fields of `Options` by name. about: what `/save` writes before the conversation."""
        self.conversation, self.options, self.about, self.messages = conversation, options, about, messages
        self.saved: set[Path] = set()

    def handle(self, line: str) -> bool:
        """One line; False when it was the last. Raises ValueError or OSError for what cannot be done."""
        found = re.match(r"\s*(/\w+)(?:\s(.*)|$)", line, re.DOTALL)
        command, rest = (found[1], found[2] or "") if found else ("", "")
        if command not in COMMANDS:
            return self.take(line)
        if command in ("/quit", "/exit"):
            return False
        if command == "/help":
            print(CHAT_COMMANDS, file=sys.stderr)
        elif command == "/clear":
            self.conversation.clear()
            self.note("conversation and pictures are forgotten; /image PATH adds a picture")
        elif not rest.strip():
            raise ValueError(f"{command} needs a path behind it; /help lists the commands")
        elif command == "/image":
            self.add(terminal.read_paths(rest))
        else:
            path, *more = terminal.read_paths(rest)
            self.save(Path(rest.strip() if more else path))
        return True

    def take(self, line: str) -> bool:
        """A question, or a file that was dropped. Raises ValueError for a command that there is not."""
        if paths := terminal.dropped(line):
            self.add(paths)
        elif line.lstrip().startswith("/"):
            raise ValueError(f"{line.split()[0]}: no such command; /help lists them")
        elif line.strip():
            self.answer(line)
        return True

    def note(self, text: str) -> None:
        self.messages.note(text, again=True)

    def add(self, paths: Sequence[str]) -> None:
        """Pictures for the next question: all of them, or none where one cannot be opened."""
        for image, path in [(open_image(path), path) for path in paths]:
            self.look(image, path)
        waiting = self.conversation.waiting
        names = [os.path.basename(picture.name) or picture.name for picture in waiting]
        names = ", ".join(name if name.isprintable() else repr(name) for name in names)
        self.note(f"{len(waiting)} picture{'s wait' if len(waiting) > 1 else ' waits'} for the next question: {names}")

    def look(self, source: ImageSource, name: str) -> None:
        started = time.perf_counter()
        picture = self.conversation.add_image(source, name)
        self.messages.stage("encode", started, f"{name}: {len(picture.patches)} positions")

    def answer(self, question: str) -> None:
        """The answer on stdout; where it is interrupted, with the end of its line."""
        started, count = time.perf_counter(), 0
        with closing(self.conversation.stream(question, **self.options)) as pieces:
            try:
                for piece in pieces:
                    if not count:
                        turn = self.conversation.turns[-1]
                        detail = f"{turn.reused} positions reused, {turn.prefilled} prefilled, first token"
                        self.messages.stage("prefill", started, detail)
                        started = time.perf_counter()
                    count += 1
                    print(piece, end="", flush=True)
            finally:
                if count:
                    print(flush=True)
        more = count - 1
        speed = f", {more / (time.perf_counter() - started):.1f} per second" if more else ""
        ended = f"ended by {turn.finish_reason}, seed {turn.options.seed}"
        self.messages.stage("decode", started, f"{more} more token(s){speed}; {ended}")
        if turn.finish_reason == "length" and self.conversation.room == 0:
            context = len(self.conversation.positions)
            self.note(f"the model's context of {context} positions is full; /clear starts anew")

    def save(self, path: Path) -> None:
        """As JSON. What stands there is replaced only by a complete file, and only if this session wrote it."""
        path = path.absolute()
        if path.exists() and path not in self.saved and not is_stream(path):
            raise ValueError(f"{path}: exists already; choose another name")
        text = json.dumps({**self.about, **self.conversation.record()}, ensure_ascii=False, indent=2)
        write_whole(path, f"{text}\n")
        self.saved.add(path)
        self.note(f"{len(self.conversation.turns)} turn(s) written to {path}")


def run(args: argparse.Namespace, options: dict) -> int:
    messages = cli.Messages(args.verbose, args.quiet)
    weights = cli.find_weights(args.weights, messages)
    images = [open_image(image) for image in args.image]  # what is wrong with one is found before gigabytes are opened
    assistant = cli.open_assistant(args, weights, messages)
    about = {"minillava": __version__, "weights": weights, "template": args.template or DEFAULT_TEMPLATE}
    session = Session(Conversation(assistant, args.system), options, about, messages)
    for image, name in zip(images, args.image, strict=True):
        session.look(image, name)
    if sys.stdin is not None and sys.stdin.isatty():
        _talk(session, args.verbose)
        return 0  # who types has seen what failed; a script sees the exit status
    failed = False
    for line in _lines():
        try:
            if not session.handle(line):
                break
        except BrokenPipeError:
            raise  # nobody listens any more
        except Exception as error:
            _report(error, args.verbose)
            failed = True
    return int(failed)


def _talk(session: Session, verbose: bool) -> None:
    """A conversation at a terminal. Ctrl-C stops an answer, and clears the line that is typed; it leaves where it comes
    twice at an empty line. Raises KeyboardInterrupt then."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is not UTF-8 spoils its own question only
    if not session.conversation.waiting:
        session.note("no picture yet: /image PATH adds one")
    session.note("each line is a question; /help lists the commands")
    typing, warned = terminal.Terminal(COMMANDS), False
    while True:
        turns, asked = len(session.conversation.turns), False
        try:
            line = typing.read()
            asked, warned = True, False
            if line is None or not session.handle(line):
                return
        except KeyboardInterrupt:
            if asked:
                kept = "what it said is kept" if len(session.conversation.turns) > turns else "nothing is kept of it"
                session.note(f"stopped; {kept}")
                continue
            if warned and not typing.typed():
                raise
            warned = True
            print(file=sys.stderr)
            session.note("Ctrl-D leaves; so does a second Ctrl-C")
        except BrokenPipeError:
            raise
        except Exception as error:
            _report(error, verbose)


def _report(error: Exception, verbose: bool) -> None:
    """What is wrong with what was typed, without a traceback. Of anything else (memory that runs out, say) with one;
    what was said before can still be saved."""
    cli.report(error, verbose and not isinstance(error, (ValueError, OSError)))


def _lines() -> Iterator[str]:
    """The lines of stdin, which is no terminal, without their ends."""
    if hasattr(sys.stdin, "buffer"):
        yield from read_lines(sys.stdin.buffer, "stdin")
    else:
        yield from (line.removesuffix("\n") for line in sys.stdin)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m minillava.chat`; the exit status."""
    return doors.enter("chat", argv)
