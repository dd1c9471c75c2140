"""Reading a command line; a mistake in it ends the process with one line and exit status 2."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from minillava.cli.messages import show
from minillava.files.disk import check_writable, explain, is_stream, same_file

MODEL_FILES = (".json", ".model", ".safetensors", ".bin", ".pth")
"""How the names of the files end that make a model."""


PICTURE_NAMES = (".png", ".jpg", ".jpeg", ".webp")
"""How the names of pictures end that are written."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and for which `--max_new_tokens` is
    `--max-new-tokens`."""

    def error(self, message: str):
        # the message quotes what was typed
        message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")

    def exit(self, status: int = 0, message: str | None = None):
        super().exit(status, message if sys.stderr is not None else None)

    def _print_message(self, message: str, file: TextIO | None = None) -> None:
        if file is not sys.stdout:
            super()._print_message(message, file)
        elif status := show(message):  # printing --help or --version can fail on a full disk, too
            sys.exit(status)

    @property
    def flags(self) -> Collection[str]:
        """All spellings of all flags."""
        return self._option_string_actions

    @property
    def spelled(self) -> dict[str, str]:
        """The long spelling of each flag by the name that its value has."""
        return {
            action.dest: name
            for name, action in self._option_string_actions.items()
            if name.startswith("--") and action.default is not argparse.SUPPRESS
        }

    def parse_args(self, args: Sequence[str] | None = None, namespace=None):
        given = list(sys.argv[1:] if args is None else args)
        for i, argument in enumerate(given):
            name, equals, value = argument.partition("=")
            if name.replace("_", "-") in self.flags:
                given[i] = name.replace("_", "-") + equals + value
            elif re.match("-[a-z]{2}", name) and f"-{name}" in self.flags:
                self.error(
                    f"{name} is read as {name[:2]} with the value {name[2:]!r}: did you mean "
                    f"-{name}?"
                )
        found, unknown = self.parse_known_args(given, namespace)
        if unknown:
            self.error(self._about_unknown(unknown))
        return found

    def _about_unknown(self, unknown: list[str]) -> str:
        """A sentence about arguments that no flag takes, with the nearest flag."""
        name, *_ = unknown[0].partition("=")
        if not name.startswith("-"):
            places = {
                "--prompt": "a question",
                "--image": "a picture",
                "--questions": "a file of questions",
            }
            hint = "; ".join(
                f"{what} goes after {flag}" for flag, what in places.items() if flag in self.flags
            )
            return f"unrecognized argument {unknown[0]!r}" + (f": {hint}" if hint else "")
        from difflib import get_close_matches

        name, flags = name.replace("_", "-"), [flag for flag in self.flags if flag.startswith("--")]
        near = [flag for flag in flags if flag.startswith(name)] or get_close_matches(
            name, flags, 1
        )
        return f"unrecognized arguments: {' '.join(unknown)}" + (
            f"; did you mean {' or '.join(near)}?" if near else ""
        )


def new_parser(prog: str, description: str, epilog: str) -> Parser:
    """A door's parser: texts as they are written, and no abbreviated flags."""
    return Parser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def path_name(text: str) -> Path:
    """The name of a file or folder, which is not empty."""
    return Path(file_name(not_empty(text)))


def not_empty(text: str) -> str:
    """A flag's name or folder, which must not be empty: if WEIGHTS is not set, `-m "$WEIGHTS"`
    would otherwise count as no -m at all."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; is a variable of the shell not set?")
    return text


def file_name(text: str) -> str:
    """A flag's file or folder. `~` is the home folder, since the shell does not replace it in
    --flag=~/x; a file of exactly this name goes first."""
    return text if os.path.lexists(text) else os.path.expanduser(text)


def output_name(text: str) -> str:
    """A flag's file to write. `-` is refused: other programs take it for stdout, but we would write
    a file of that name."""
    if text == "-":
        raise argparse.ArgumentTypeError(
            "- is no name here: /dev/stdout is stdout, and ./- a file that is named so"
        )
    return file_name(text)


def number_list(text: str) -> list[int] | None:
    """A flag's list of numbers from 0: "0,2-4" -> [0, 2, 3, 4]; "all" -> None."""
    if text.strip() == "all":
        return None
    found = []
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?", part)
        numbers = range(int(ends[1]), int(ends[2] or ends[1]) + 1) if ends else ()
        if not numbers:
            raise argparse.ArgumentTypeError(f"{text!r} is not like 3 or 0,2-4 or all")
        found += numbers
    return sorted(set(found))


def check_stdin(parser: Parser, args: argparse.Namespace) -> None:
    """Check that --image and --prompt have `-` at most once in all; twice is wrong usage."""
    if args.image.count("-") + (args.prompt == "-") > 1:
        parser.error("only one of --image and --prompt can read stdin")


def check_outputs(
    parser: Parser, args: argparse.Namespace, paths: Sequence[str | None], inputs: Sequence = ()
) -> None:
    """Check the files to write before the work begins.

    Wrong usage is: an empty name; a folder; a file in a folder that does not exist; the same file
    twice; a file that is read (a picture of --image, a file of the model, one of `inputs`), by
    whatever spelling; or a new file that would be taken for one of the model's. A file that the
    system does not let us write is an error."""
    paths = [os.fspath(path) for path in paths if path is not None]
    real = {path: os.path.realpath(path) for path in paths}
    there = any(map(os.path.exists, paths))
    alike = [path for path in paths if real[path].endswith(MODEL_FILES)]
    folders = list(_model_folders(args)) if there or alike else []
    inputs = [*inputs, *_inputs(args, folders)] if there else []
    for i, path in enumerate(paths):
        if not path:
            parser.error("a file to write has an empty name")
        if os.path.isdir(path):
            parser.error(f"{path}: is a folder, expected the name of a file")
        try:
            os.stat(os.path.dirname(real[path]))
        except FileNotFoundError:
            if not is_stream(path):
                parser.error(f"{path}: no such folder; make it first")
        except OSError:
            pass  # check_writable raises it as well
        for other in paths[:i]:
            if same_file(path, other):
                parser.error(f"{path} is given twice; each file needs a name of its own")
        for given in inputs:
            if same_file(path, given):
                parser.error(f"{path} is read, as {given}: what is written needs a name of its own")
        for folder in folders if path in alike else ():
            if same_file(os.path.dirname(real[path]), folder):
                parser.error(
                    f"{path}: would count as a file of the model in {folder}; choose another folder"
                )
    for path in paths:
        try:
            check_writable(path)
        except OSError as error:
            parser.exit(1, f"error: {explain(error)}\n")


def _inputs(args: argparse.Namespace, folders: Sequence[Path]) -> Iterator[str | Path]:
    """The files that a command reads: pictures, stdin, and the files of the model's folders."""
    for image in vars(args).get("image") or ():
        yield from ("/dev/stdin",) if image == "-" else (image, os.path.expanduser(image))
    if vars(args).get("prompt") == "-":
        yield "/dev/stdin"
    for folder in folders:
        yield from (path for path in folder.glob("*") if path.suffix in MODEL_FILES)


def _model_folders(args: argparse.Namespace) -> Iterator[Path]:
    """The folders of --weights and of the flags that name a model's other folders."""
    from minillava.checkpoint.folders import default_weights, find_folder

    for name in ("weights", "vision_tower", "model_base", "adapter"):
        with suppress(ValueError, OSError):  # opening it raises the error later
            given = vars(args).get(name) or (default_weights() if name == "weights" else None)
            if given:
                yield find_folder(given, vars(args).get("revision") if name == "weights" else None)
