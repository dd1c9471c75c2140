"""Text that others wrote: its encoding, its ends of line, and what can be no text."""

import codecs
from collections.abc import Iterator
from typing import BinaryIO

# --- reading text ---------------------------------------------------------------------------------
_MARKS = (  # of four bytes before those of two, which they begin with
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def decode(content: bytes, name: str, other: str | None = None, errors: str = "strict") -> str:
    """Text of any program: by its byte order mark (as PowerShell writes), else UTF-8, else in the
    encoding `other`; lines end with "\\n". name: of the file, for messages. Raises ValueError for
    what is not text; errors: of UTF-8, as `bytes.decode` takes them."""
    encoding = next((encoding for mark, encoding in _MARKS if content.startswith(mark)), "utf-8")
    others = [other] if other is not None and encoding == "utf-8" else []
    for candidate in (encoding, *others):
        try:
            text = content.decode(candidate, errors if candidate.startswith("utf-8") else "strict")
            break
        except UnicodeDecodeError as error:
            byte = f"byte 0x{content[error.start]:02x} at {error.start:,}"
    else:
        raise ValueError(f"{name}: not text in {encoding} ({byte}); save it as UTF-8")
    refuse_nul(text, name)
    return unify_line_ends(text)


def refuse_nul(text: str, name: str) -> None:
    """Raises ValueError for text with NUL, which nobody types: another encoding, or no text at
    all."""
    if "\0" in text:
        raise ValueError(
            f"{name}: has NUL bytes, so it is not text, or UTF-16 without a byte order mark; save "
            "it as UTF-8"
        )


def unify_line_ends(text: str) -> str:
    """Windows ends a line with "\\r\\n", old systems with "\\r"; here it is "\\n"."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def as_meant(text: str) -> str:
    """A text without what a program for Windows puts around it, and nobody typed: `$(cat a.txt)`
    leaves the byte order mark, and the "\\r" before the last end of line."""
    return unify_line_ends(text.removeprefix("\ufeff").removesuffix("\r"))


def read_lines(stream: BinaryIO, name: str) -> Iterator[str]:
    """The lines of a stream as they arrive, without their ends, in any of the encodings of
    `decode`. What is not UTF-8 becomes surrogates, which spoil their own line only; so does NUL,
    which is for the reader of the line to refuse."""
    raw = stream.readline()
    encoding = next((encoding for mark, encoding in _MARKS if raw.startswith(mark)), "utf-8")
    if encoding not in ("utf-8", "utf-8-sig"):  # a byte "\n" does not end a line there
        yield from decode(raw + stream.read(), name).removesuffix("\n").split("\n")
        return
    raw = raw.removeprefix(codecs.BOM_UTF8)
    while raw:
        text = raw.decode("utf-8", errors="surrogateescape")
        yield from unify_line_ends(text).removesuffix("\n").split("\n")
        raw = stream.readline()
