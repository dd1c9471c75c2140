"""What a person types at a terminal: lines that can be edited, and paths as a terminal pastes
them."""

import os
import re
import string
import sys
from contextlib import suppress

from minillava.files.pictures import INVISIBLE, is_data_url, path_of_url

PROMPT = "> "

PATH_COMMANDS = "/image", "/save"

AROUND = f"{string.whitespace}\u00a0{INVISIBLE}"
"""What a path does not begin or end with, unless there is such a file."""

LONGEST_PATH = 4096
"""Characters of a path that Linux takes; other systems take fewer."""

STRAIGHT = str.maketrans("“”„‘’‚", "\"\"\"'''")

ESCAPES = os.name != "nt"  # on Windows a backslash separates folders

PART = re.compile(  # one part of a word: $'coded', 'single', "double", \escaped, plain
    r"""\$'((?:[^'\\]|\\.)*)'|'([^']*)'|"((?:[^"\\]|\\.)*)"|\\(.)|([^\s'"\\])"""
    if ESCAPES
    else r"""\$'((?:[^'\\]|\\.)*)'|'([^']*)'|"([^"]*)"|(?!)()|([^\s'"])""",
    # Unicode's other blanks count as letters: macOS puts one into the names of screenshots
    re.DOTALL | re.ASCII,
)


class Terminal:
    """Lines of stdin if that is a terminal; they are edited, remembered and completed if Python has
    readline."""

    def __init__(self, commands: list[str]):
        """commands: the words that Tab completes, apart from paths."""
        self.commands, self.readline = commands, None
        if sys.stdout is not None and sys.stdout.isatty():  # otherwise input() would not edit
            with suppress(ImportError):
                import readline

                self.readline = readline
                # Tab completes the whole line, since paths have spaces.
                readline.set_completer_delims("")
                readline.set_completer(lambda text, i: (*self.completions(text), None)[i])
                libedit = "libedit" in (readline.__doc__ or "")
                readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
                if not libedit:  # a pasted paragraph is then one line that contains line ends
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
        """The text of the line that Ctrl-C has cleared, as far as we can know."""
        return "" if self.readline is None else self.readline.get_line_buffer()

    def completions(self, line: str) -> list[str]:
        """All completions of a line: a command, or a command with a path after it."""
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
    """The paths that begin with `begun`, folders with a slash; `~` stays as it was typed."""
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
    """The paths after a command. If a file has exactly this name, with its blanks and quotes, it is
    that file. Otherwise the text is read as terminals paste files that are dropped into them: in
    quotes, with backslashes, as file:// URLs, several at once. A path that does not exist is
    returned as well; opening it raises the error."""
    for whole in (text, text.strip(), text.strip(AROUND)):
        if _exists(whole):
            return [os.path.expanduser(whole)]
    text = text.strip(AROUND)
    if is_data_url(text):
        return [text]
    words = _words(text)
    if not any(map(_exists, words)):  # a word processor's quotes, unless they are part of the name
        straight = _words(text.translate(STRAIGHT))
        words = straight if straight and all(map(_exists, straight)) else words
    if len(words) == 1 or any(map(_exists, words)):
        return [os.path.expanduser(word) for word in words]
    return [os.path.expanduser(path_of_url(text))]


def _words(text: str) -> list[str]:
    """The words of a line as a shell reads it, bash or PowerShell (which calls a path in quotes by
    &). No words if a quote does not end, since it is then part of a name."""
    if called := re.fullmatch(r"&\s*'((?:[^']|'')*)'", text, re.DOTALL):
        return [called[1].replace("''", "'")]
    text = re.sub(r"^&\s*(?=['\"])", "", text)
    words, end = [], 0
    while end < len(text):
        word, begun = "", end
        while part := PART.match(text, end):
            coded, single, double, escaped, plain = part.groups()
            if coded is not None:
                word += _decoded(coded)
            elif double is not None:
                word += re.sub(r'\\([\\"$`])', r"\1", double) if ESCAPES else double
            else:
                word += single or escaped or plain or ""
            end = part.end()
        words += [path_of_url(word)] if end > begun else []
        blank = re.compile(r"[ \t\r\n]+").match(text, end)
        if end < len(text) and not blank:
            return []
        end = blank.end() if blank else end
    return words


def _decoded(text: str) -> str:
    r"""The text that bash means by $'text': \t, \', \303\251, \xc3\xa9, \u00e9."""
    letters = {"a": 7, "b": 8, "e": 27, "E": 27, "f": 12, "n": 10, "r": 13, "t": 9, "v": 11}
    content = b""
    form = r"\\(?:([0-7]{1,3})|x(H{1,2})|u(H{1,4})|U(H{1,8})|(.))|([^\\]+)".replace(
        "H", "[0-9a-fA-F]"
    )
    for octal, byte, short, long, escaped, plain in re.findall(form, text, re.DOTALL):
        if octal or byte:
            content += bytes([int(octal, 8) & 255 if octal else int(byte, 16)])
        elif short or long:
            content += chr(min(int(short or long, 16), 0x10FFFF)).encode(errors="surrogatepass")
        elif escaped in letters:
            content += bytes([letters[escaped]])
        else:
            content += os.fsencode(escaped or plain)
    return os.fsdecode(content)


def dropped(line: str) -> list[str]:
    """The paths of a line that consists of nothing but whole paths of files; for any other line
    none."""
    line = line.strip(AROUND)
    if not re.match(r"""(&\s*)?\$?['"“‘]?([/\\~]|file:/|[a-z]:[/\\])""", line, re.IGNORECASE):
        return []
    paths = read_paths(line)
    return paths if all(map(os.path.isfile, paths)) else []


def dropped_first(line: str) -> tuple[list[str], str]:
    """The paths of files with which a line begins, as many as there are, and the question after
    them."""
    line = line.strip(AROUND)
    blanks = [blank.start() for blank in re.finditer(r"\s+", line[:LONGEST_PATH])]
    for end in (len(line), *reversed(blanks)):
        if paths := dropped(line[:end]):
            return paths, line[end:].strip()
    return [], line


def means_a_path(line: str) -> bool:
    """Whether a line can only be a path, whether it exists or not: the path is alone in the line,
    or it has a further slash or dot, unlike a command. Any other line with a path in it is a
    question."""
    line = line.strip(AROUND)
    if line.startswith("/"):
        return re.match(r"/\w*(\s|$)", line) is None
    words = _words(line)
    return len(words) == 1 and bool(re.match(r"~?/.|\\\\|[a-z]:[/\\]", words[0], re.IGNORECASE))


def _exists(path: str) -> bool:
    return bool(path) and os.path.lexists(os.path.expanduser(path))
