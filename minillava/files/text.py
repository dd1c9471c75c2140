"""Text that other programs wrote: its encoding, its ends of line, and bytes that are not text."""

import codecs
from collections.abc import Iterator
from typing import BinaryIO

# --- reading text ---------------------------------------------------------------------------------
_MARKS = (  # marks of four bytes before those of two, with which they begin
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def decode(content: bytes, name: str, other: str | None = None, errors: str = "strict") -> str:
    """Decode the text of any program: by its byte order mark (PowerShell writes one), else as
    UTF-8, else in the encoding `other`; lines end with "\\n". name: the file's, for messages.
    errors: for UTF-8, as in `bytes.decode`. Raises ValueError if the content is not text."""
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
    """Raises ValueError if the text has a NUL, which nobody types: it is in another encoding, or is
    not text."""
    if "\0" in text:
        raise ValueError(
            f"{name}: has NUL bytes, so it is not text, or UTF-16 without a byte order mark; save "
            "it as UTF-8"
        )


def unify_line_ends(text: str) -> str:
    """The text with "\\n" at its ends of line; Windows writes "\\r\\n", old systems "\\r"."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def as_meant(text: str) -> str:
    """A text without the characters that Windows programs add and nobody typed: `$(cat a.txt)`
    keeps the byte order mark, and the "\\r" before the last end of line."""
    return unify_line_ends(text.removeprefix("\ufeff").removesuffix("\r"))


def read_lines(stream: BinaryIO, name: str) -> Iterator[str]:
    """The lines of a stream as they arrive, without their ends, in any of the encodings of
    `decode`. Bytes that are not UTF-8 become surrogates, which spoil only their own line. NUL
    spoils only its own line as well; the reader of the line refuses it."""
    raw = stream.readline()
    encoding = next((encoding for mark, encoding in _MARKS if raw.startswith(mark)), "utf-8")
    if encoding not in ("utf-8", "utf-8-sig"):  # in these encodings a byte "\n" does not end a line
        yield from decode(raw + stream.read(), name).removesuffix("\n").split("\n")
        return
    raw = raw.removeprefix(codecs.BOM_UTF8)
    while raw:
        text = raw.decode("utf-8", errors="surrogateescape")
        yield from unify_line_ends(text).removesuffix("\n").split("\n")
        raw = stream.readline()
