"""What somebody types at a terminal: lines that can be edited, and paths as a terminal pastes
them."""

import os
import re
import shlex
import sys
from contextlib import suppress
from urllib.parse import unquote

PROMPT = "> "

PATH_COMMANDS = "/image", "/save"


class Terminal:
    """Lines of stdin where that is a terminal; edited, remembered and completed where Python has
    readline."""

    def __init__(self, commands: list[str]):
        """commands: the words that Tab completes, apart from paths."""
        self.commands, self.readline = commands, None
        if sys.stdout is not None and sys.stdout.isatty():  # else input() would not edit
            with suppress(ImportError):
                import readline

                self.readline = readline
                # what is completed is the whole line: paths have spaces
                readline.set_completer_delims("")
                readline.set_completer(lambda text, i: (*self.completions(text), None)[i])
                libedit = "libedit" in (readline.__doc__ or "")
                readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
                if not libedit:  # a pasted paragraph is then one line with line ends in it
                    readline.parse_and_bind("set enable-bracketed-paste on")

    def read(self) -> str | None:
        """The next line without its end, None after the last. Raises KeyboardInterrupt."""
        if self.readline is not None:
            try:
                return input(PROMPT)
            except EOFError:
                print(file=sys.stderr)
                return None
        print(PROMPT, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        return line.removesuffix("\n") if line else None

    def typed(self) -> str:
        """What stood in the line that Ctrl-C has cleared, as far as we can know."""
        return "" if self.readline is None else self.readline.get_line_buffer()

    def completions(self, line: str) -> list[str]:
        """All that a line can become: a command, or one with a path behind it."""
        command, space, begun = line.partition(" ")
        if not space:
            names = [name + " " * (name in PATH_COMMANDS) for name in self.commands]
            return [name for name in names if name.startswith(line)] if line else []
        if command not in PATH_COMMANDS:
            return []
        found = _paths_from(begun)
        if not found and begun.startswith(("'", '"')):
            found = _paths_from(begun[1:])
        if not found and "\\" in begun:
            found = _paths_from(re.sub(r"\\(.)", r"\1", begun))
        return [f"{command} {path}" for path in found]


def _paths_from(begun: str) -> list[str]:
    """The paths that begin so, folders with a slash; `~` stays as it was typed."""
    folder, name = os.path.split(begun)
    try:
        entries = list(os.scandir(os.path.expanduser(folder) or "."))
    except (OSError, ValueError):
        return []
    hidden = name.startswith(".")
    names = [
        e.name + "/" * e.is_dir()
        for e in entries
        if e.name.startswith(name) and (hidden or e.name[0] != ".")
    ]
    return sorted(os.path.join(folder, name) for name in names)


def read_paths(text: str) -> list[str]:
    """The paths behind a command. As it stands if there is such a file, blanks, quotes and all;
    else as terminals paste what is dropped into them: in quotes, with backslashes, as file:// URLs,
    several at once. A path that leads nowhere comes back, too: who opens it says so."""
    for whole in (text, text.strip()):
        if _exists(whole):
            return [os.path.expanduser(whole)]
    text = text.strip()
    if text.lower().startswith("data:"):
        return [text]
    lexer = shlex.shlex(text, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters = True, ""
    if os.name == "nt":
        lexer.escape = ""  # it stands between folders
    try:
        words = [_without_scheme(word) for word in lexer]
    except ValueError:  # a quote that does not end is one of the name
        words = []
    if len(words) == 1 or any(map(_exists, words)):
        return [os.path.expanduser(word) for word in words]
    return [os.path.expanduser(_without_scheme(text))]


def dropped(line: str) -> list[str]:
    """The paths of a line that consists of nothing but whole paths of files; else none."""
    line = line.strip()
    if not re.match(r"""['"]?([/\\~]|file:/|[a-z]:[/\\])""", line, re.IGNORECASE):
        return []
    paths = read_paths(line)
    return paths if all(map(os.path.isfile, paths)) else []


def _exists(path: str) -> bool:
    return bool(path) and os.path.lexists(os.path.expanduser(path))


def _without_scheme(path: str) -> str:
    """file:///a%20b, file://localhost/a%20b and file:/a%20b are /a b."""
    found = re.match(r"file:(?://(?:localhost)?)?(?=/)", path, re.IGNORECASE)
    if not found:
        return path
    rest = unquote(path[found.end() :], errors="surrogateescape")
    return rest.removeprefix("/") if re.match("/[A-Za-z]:", rest) else rest  # /C:/a.png
