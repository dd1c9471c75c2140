"""The messages of a command: answers go to stdout, everything else to stderr, and an error is one
line.

Exit status: 0 an answer, 1 an error of input or model in one line, 2 wrong usage, 130 Ctrl-C (what
was printed stays), 0 when the reader of a pipe went away.
"""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

from minillava.files.disk import explain, write_whole


class Messages:
    """Notes, stages and progress on stderr."""

    def __init__(self, verbose: bool, quiet: bool):
        self.verbose, self.quiet = verbose, quiet
        self.timings: dict[str, float] = {}  # seconds per stage
        self._noted: set[str] = set()

    def note(self, text: str, again: bool = False) -> None:
        """Say what a person should know, in one line and once. again: say it each time."""
        if not self.quiet and (again or text not in self._noted):
            print(f"note: {text}", file=sys.stderr)
        self._noted.add(text)

    def progress(self, text: str) -> None:
        """Show a line that the next one overwrites; only if stderr is a terminal."""
        if sys.stderr.isatty() and not self.quiet and not self.verbose:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def stage(self, name: str, started: float, detail: str) -> None:
        """Report a finished stage. started: time.perf_counter() at its beginning."""
        self.timings[name] = time.perf_counter() - started
        if self.verbose:
            print(f"{name:<8} {self.timings[name]:8.3f} s  {detail}", file=sys.stderr)

    def detail(self, text: str) -> None:
        """Add a line to the stage before it."""
        if self.verbose:
            print(text, file=sys.stderr)

    def decoded(self, started: float, more: int, ended: str) -> None:
        """Report the stage after the first token: `more` tokens, and what ended them."""
        speed = f", {more / (time.perf_counter() - started):.1f} per second" if more else ""
        self.stage("decode", started, f"{more} more token(s){speed}; ended by {ended}")


def has_colours(stream: TextIO) -> bool:
    """Whether text may be coloured: on a terminal, unless NO_COLOR is set (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def coloured(text: str) -> str:
    """A text in green, for a terminal."""
    return f"\033[32m{text}\033[0m" if text else ""


class _Forgiving:
    """A stderr that raises no errors: a full disk under a log must not cost the answer."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            _discard(self._stream)
        return len(text)

    def flush(self) -> None:
        """Do nothing, since nothing is buffered."""

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def _discard(stream: TextIO) -> None:
    """Discard what is buffered and all that follows; otherwise Python would report an error when it
    flushes at exit."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def open_streams() -> None:
    """Open a stdin, stdout or stderr that is closed, as some launchers leave it, as the null
    device. It is opened such that stdout cannot be written, so that printing an answer is an error.

    Otherwise the next file that is opened would get the free number, and what is meant for stderr
    would end up in that file; and print(file=None) would write to stdout."""
    flags = {"stdin": os.O_RDONLY, "stdout": os.O_RDONLY, "stderr": os.O_WRONLY}
    for number, flag in enumerate(flags.values()):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, flag)
            if null != number:
                os.dup2(null, number)
                os.close(null)
    # under their own numbers: another file may have taken the free one
    for name, flag in flags.items():
        if getattr(sys, name) is None:
            null = io.FileIO(os.open(os.devnull, flag), "r" if name == "stdin" else "w")
            buffer = io.BufferedReader(null) if name == "stdin" else io.BufferedWriter(null)
            setattr(sys, name, io.TextIOWrapper(buffer, encoding="utf-8", errors="replace"))


LOST = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}
"""Why what was printed may not have arrived."""


def is_of_stdout(error: Exception) -> bool:
    """Whether an error says that stdout could not be written: the error of every other file that we
    write names the file."""
    return isinstance(error, OSError) and error.filename is None and error.errno in LOST


def run(body: Callable[[], int], verbose: bool, prints: bool = False) -> int:
    """Run a command; every error becomes one line on stderr and an exit status (module docstring).
    prints: whether its answer goes to stdout, so that a closed stdout is an error before the work
    begins."""
    closed = sys.stdout is None
    open_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a terminal that lacks a character shows "?" rather than an error
        sys.stdout.reconfigure(errors="replace")
    stderr = sys.stderr
    sys.stderr = _Forgiving(stderr)
    try:
        if closed and prints:
            raise ValueError(
                "stdout is closed, so the answer has nowhere to go; redirect it to a file or a pipe"
            )
        status = body()
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        _discard(sys.stdout)  # the reader of the pipe has what it wanted
        return 0
    except Exception as error:
        if is_of_stdout(error):
            error.filename = "stdout"
            _discard(sys.stdout)
        report(error, verbose)
        return 1
    finally:
        sys.stderr = stderr


def show(text: str) -> int:
    """Print a text that needs no work; returns the exit status."""
    return run(lambda: print(text, end="") or 0, verbose=False, prints=True)


def report(error: Exception, verbose: bool) -> None:
    """Report an error as one line on stderr."""
    if verbose:
        traceback.print_exception(error)
    if isinstance(error, ModuleNotFoundError) and not f"{error.name}.".startswith("minillava."):
        error = ValueError(  # the user meant another Python
            f"{error} for {sys.executable}; in the project's folder: source .venv/bin/activate, or "
            "pip install -e ."
        )
    text = explain(error) if isinstance(error, OSError) else str(error)
    first, *more = text.splitlines() or [type(error).__name__]
    expected = isinstance(error, (ValueError, OSError))
    hint = f" ({len(more)} more like it: --verbose lists them)" if more and expected else ""
    unexpected = "" if expected else f"{type(error).__name__}: "
    where = "" if expected else " (unexpected: --verbose shows where)"
    print(f"error: {unexpected}{first}{hint}{where}", file=sys.stderr)


def print_json(value) -> None:
    """Print one line of JSON that can be read back exactly: as letters if stdout's encoding has
    them all, else escaped."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        text = json.dumps(value)
    print(text)


def write_outputs(files: dict[str, str | bytes]) -> int:
    """Write each file by `write_whole`; returns the exit status. A file that cannot be written is
    reported, and the others are written nevertheless."""
    status = 0
    for path, content in files.items():
        try:
            write_whole(path, content)
        except BrokenPipeError:
            raise
        except OSError as error:
            report(error, verbose=False)
            status = 1
    return status


def significant(x: float) -> float:
    """A number with four significant digits: rounding to decimal places would turn a small
    probability into 0.0."""
    return float(f"{x:.4g}")


def duration(seconds: float) -> str:
    """How long something takes, for a person."""
    if seconds >= 6000:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
