"""The chat at a terminal or in a pipe: questions, commands that begin with a slash, and Ctrl-C."""

import argparse
import io
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from minillava import __version__
from minillava.chat import terminal
from minillava.chat.conversation import Conversation
from minillava.chat.flags import COMMANDS_HELP
from minillava.cli.messages import Messages, coloured, has_colours, is_of_stdout, report
from minillava.cli.opening import find_weights, note_several, open_assistant
from minillava.files.disk import is_stream, write_whole
from minillava.files.pictures import ImageSource, name_of, open_image
from minillava.files.text import as_meant, read_lines, refuse_nul
from minillava.generate.engine import is_final
from minillava.generate.speculate import Drafts
from minillava.templates import template_name

# --- the door -------------------------------------------------------------------------------------
COMMANDS = ("/image", "/clear", "/save", "/help", "/quit", "/exit")


class Session:
    """A conversation with somebody who types: each line is a question or a command."""

    def __init__(
        self,
        conversation: Conversation,
        options: dict,
        about: dict,
        messages: Messages,
        shown: Drafts | None = None,
    ):
        """options: the fields of `Options` by name. about: what `/save` writes before the
        conversation. shown: drafts whose right guesses are coloured."""
        self.conversation, self.options, self.about, self.messages = (
            conversation,
            options,
            about,
            messages,
        )
        self.shown, self.saved = shown, set[Path]()

    def handle(self, line: str) -> bool:
        """Do what a line says; returns False after the last one. Raises ValueError or OSError if it
        cannot be done."""
        line = as_meant(line)
        refuse_nul(line, "the line")
        found = re.match(r"\s*(/\w+)(?:\s(.*)|$)", line, re.DOTALL)
        command, rest = (found[1], found[2] or "") if found else ("", "")
        if command not in COMMANDS:
            return self.take(line)
        if command in ("/quit", "/exit"):
            return False
        if command == "/help":
            print(COMMANDS_HELP, file=sys.stderr)
        elif command == "/clear":
            self.conversation.clear()
            self.note("conversation and pictures are forgotten; /image PATH adds a picture")
        elif not rest.strip():
            raise ValueError(f"{command} needs a path after it; /help lists the commands")
        elif command == "/image":
            self.add(terminal.read_paths(rest))
        else:
            path, *more = terminal.read_paths(rest)
            if path == "-":  # other programs take it for stdout, which has the answers
                raise ValueError("/save -: give a name; ./- is a file that is named so")
            self.save(Path(rest.strip() if more else path))
        return True

    def take(self, line: str) -> bool:
        """Take a line that is a question, dropped files, or both. Raises ValueError for an unknown
        command."""
        paths, question = terminal.dropped_first(line)
        if paths:
            self.add(paths)
            if question:
                self.answer(question)
        elif terminal.means_a_path(line):
            self.add(terminal.read_paths(line))  # the error then says what is wrong with the path
        elif line.lstrip().startswith("/"):
            raise ValueError(f"{name_of(line.split()[0])}: no such command; /help lists them")
        elif line.strip():
            self.answer(line)
        return True

    def note(self, text: str) -> None:
        self.messages.note(text, again=True)

    def add(self, paths: Sequence[str]) -> None:
        """Add pictures for the next question: all of them, or none if one cannot be opened."""
        self.look([open_image(path) for path in paths], paths)
        waiting = self.conversation.waiting
        names = [name_of(picture.name) for picture in waiting]
        names = ", ".join(os.path.basename(name) or name for name in names)
        self.note(
            f"{len(waiting)} picture{'s wait' if len(waiting) > 1 else ' waits'} for the next "
            f"question: {names}"
        )

    def look(self, images: Sequence[ImageSource], names: Sequence[str]) -> None:
        for image, name in zip(images, names, strict=True):
            started = time.perf_counter()
            picture = self.conversation.add_image(image, name, more=len(images) > 1)
            count = f"{len(picture.patches)} positions"
            self.messages.stage("encode", started, f"{name_of(name)}: {count}")

    def answer(self, question: str) -> None:
        """Print the answer on stdout; if it is interrupted, its line is ended."""
        note_several(len(self.conversation.waiting), self.messages)
        started, count = time.perf_counter(), 0
        with closing(self.conversation.stream(question, **self.options)) as pieces:
            try:
                for piece in pieces:
                    if not count:
                        turn = self.conversation.turns[-1]
                        detail = (
                            f"{turn.reused} positions reused, {turn.prefilled} prefilled, first "
                            "token"
                        )
                        self.messages.stage("prefill", started, detail)
                        started = time.perf_counter()
                    right = self.shown is not None and self.shown.right(count)
                    count += 1
                    print(coloured(piece) if right else piece, end="", flush=True)
            finally:
                if count:
                    print(flush=True)
        ended = f"{turn.finish_reason}, seed {turn.options.seed}"
        self.messages.decoded(started, count - 1, ended)
        if (drafts := self.options.get("draft")) is not None:
            self.messages.detail(f"drafts   {drafts.report.told()}")
        if turn.finish_reason == "length" and self.conversation.room == 0:
            context = len(self.conversation.positions)
            self.note(f"the model's context of {context} positions is full; /clear starts anew")

    def save(self, path: Path) -> None:
        """Write the conversation as JSON. An existing file is replaced only by a complete one, and
        only if this session wrote it."""
        path = path.absolute()
        if path.exists() and path not in self.saved and not is_stream(path):
            raise ValueError(f"{path}: exists already; choose another name")
        text = json.dumps(
            {**self.about, **self.conversation.record()}, ensure_ascii=False, indent=2
        )
        write_whole(path, f"{text}\n")
        self.saved.add(path)
        self.note(f"{len(self.conversation.turns)} turn(s) written to {path}")


def run(args: argparse.Namespace, options: dict) -> int:
    messages = Messages(args.verbose, args.quiet)
    weights = find_weights(args.weights, messages)
    # a faulty picture is reported before gigabytes are opened
    images = [open_image(image) for image in args.image]
    assistant = open_assistant(args, weights, messages)
    about = {
        "minillava": __version__,
        "weights": weights,
        "template": template_name(assistant.template),
    }
    drafts = assistant.drafts(args.draft, args.draft_tokens)
    options = {**options, "draft": drafts}
    shown = drafts if args.show_drafts and has_colours(sys.stdout) else None
    session = Session(Conversation(assistant, args.system), options, about, messages, shown)
    session.look(images, args.image)
    if sys.stdin is not None and sys.stdin.isatty():
        _talk(session, args.verbose)
        return 0  # a person has seen what failed; a script sees the exit status
    failed = False
    for line in _lines():
        try:
            if not session.handle(line):
                break
        except BrokenPipeError:
            raise  # nobody reads the answers any more
        except Exception as error:
            if is_of_stdout(error) or is_final(error):
                raise  # no later answer would arrive, either
            _report(error, args.verbose)
            failed = True
    return int(failed)


def _talk(session: Session, verbose: bool) -> None:
    """A conversation at a terminal. Ctrl-C stops an answer, and clears the line that is typed.
    Raises KeyboardInterrupt, to leave, if it comes twice at an empty line."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        # bytes that are not UTF-8 spoil only their own question
        sys.stdin.reconfigure(errors="surrogateescape")
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
                kept = (
                    "what it said is kept"
                    if len(session.conversation.turns) > turns
                    else "nothing is kept of it"
                )
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
            if is_of_stdout(error) or is_final(error):
                raise
            _report(error, verbose)


def _report(error: Exception, verbose: bool) -> None:
    """Say what is wrong with what was typed, without a traceback. Any other error (for example,
    memory that runs out) gets one; the conversation before it can still be saved."""
    report(error, verbose and not isinstance(error, (ValueError, OSError)))


def _lines() -> Iterator[str]:
    """The lines of a stdin that is not a terminal, without their ends."""
    if hasattr(sys.stdin, "buffer"):
        yield from read_lines(sys.stdin.buffer, "stdin")
    else:
        yield from (line.removesuffix("\n") for line in sys.stdin)
