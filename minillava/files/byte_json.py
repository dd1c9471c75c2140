r"""Byte-level pieces of a tokenizer.json, as Llama 3 and Qwen2 have them: a text is cut into words
by a pattern, and the UTF-8 bytes of each word are merged into pieces.

A piece is written in an alphabet of 256 printable characters, one for each byte; "Ġ" is the space.
The pattern asks what is a letter (\p{L}) and what a number (\p{N}). Characters that are newer than
Python's own table (`unicodedata.unidata_version`) are neither to us.
"""

import re
import sys
import unicodedata
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from minillava.files.merges import NO_MODEL, merge, read_merges

# the pattern of a file, by how many digits make a word: one for Qwen2, up to three for Llama 3
_PATTERNS = {
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    rf"|\p{{N}}{digits}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+": digits
    for digits in ("", "{1,3}")
}

# Unicode's White_Space; Python's own \s has four control characters more
_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"

# the bytes that stand for themselves; the others are the characters from 256 on, in their order
_SELVES = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _SELVES]
_LETTER = {byte: chr(byte) for byte in _SELVES}
_LETTER |= {byte: chr(256 + at) for at, byte in enumerate(_OTHERS)}
_BYTE = {letter: byte for byte, letter in _LETTER.items()}

_TAKES = ("lstrip", "rstrip", "single_word")


def is_byte_level(raw: dict[str, Any]) -> bool:
    """Whether a tokenizer.json cuts words by a pattern of its own, and then into bytes."""
    model, before = raw.get("model"), raw.get("pre_tokenizer")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(before, dict):
        return False
    steps = before.get("pretokenizers")
    kinds = [step.get("type") for step in _objects(steps)]
    return before.get("type") == "Sequence" and "Split" in kinds and "ByteLevel" in kinds


class BytePieces:
    """The methods of a SentencePieceProcessor that Tokenizer calls, for the JSON object `raw` of a
    file; an id of -1 is one that there is not. Raises ValueError if the file asks for what is not
    done here, or contradicts itself."""

    def __init__(self, path: Path, raw: dict[str, Any]):
        self._path, model = path, raw["model"]
        self._digits = self._read_pattern(raw["pre_tokenizer"]["pretokenizers"])
        self._nfc = raw.get("normalizer") == {"type": "NFC"}
        if not self._nfc:
            self._expect("normalizer", raw.get("normalizer"), None)
        decoder = raw.get("decoder")
        self._expect(
            "decoder", decoder.get("type") if isinstance(decoder, dict) else None, "ByteLevel"
        )
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
            if model.get(name):
                self._expect(name, model[name], None)
        self._whole_words = model.get("ignore_merges") is True
        self._ids: dict[str, int] = model.get("vocab") or {}
        ids = self._ids.values() if isinstance(self._ids, dict) else ()
        if not ids or {*map(repr, ids)} != {*map(repr, range(len(ids)))}:
            raise ValueError(f"{path}: the ids of its pieces have holes; download it again")
        if not _BYTE.keys() <= self._ids.keys():
            raise ValueError(f"{path}: lacks pieces of bytes; download it again")
        self._pieces = sorted(self._ids, key=lambda piece: self._ids[piece])
        self._ranks = read_merges(path, model.get("merges") or [], self._ids)
        self._begin = self._read_begin(raw)
        self._cut = lru_cache(1 << 14)(self._cut_word)

    def _expect(self, name: str, found: object, expected: object) -> None:
        if found != expected:
            raise ValueError(
                f"{self._path}: {name} is {found!r:.80}, supported of byte-level tokenizers: "
                f"{expected!r:.80}, as those of Llama 3 and Qwen2 have it"
            )

    def _read_pattern(self, steps: Sequence[Any]) -> str:
        """How many digits make a word."""
        self._expect("pre_tokenizer", [s["type"] for s in _objects(steps)], ["Split", "ByteLevel"])
        split, byte_level = steps
        for step, name, value in (
            (split, "behavior", "Isolated"),
            (split, "invert", False),
            (byte_level, "add_prefix_space", False),
            (byte_level, "use_regex", False),
        ):
            self._expect(name, step.get(name), value)
        pattern = split.get("pattern")
        text = pattern.get("Regex") if isinstance(pattern, dict) else None
        if text not in _PATTERNS:
            raise ValueError(
                f"{self._path}: cuts words by the pattern {text!r:.80}, supported: those of "
                "Llama 3 and Qwen2; minillava does not read this tokenizer"
            )
        return _PATTERNS[text]

    def _read_begin(self, raw: dict[str, Any]) -> tuple[int, str]:
        """The id and text of the token before every prompt; -1 and "" if there is none."""
        after = raw.get("post_processor")
        steps = (
            after.get("processors")
            if isinstance(after, dict) and "processors" in after
            else [after]
        )
        frames = [step for step in _objects(steps) if step.get("type") != "ByteLevel"]
        alone = [{"Sequence": {"id": "A", "type_id": 0}}]  # so transformers writes "no begin token"
        if not frames or [frame.get("single") for frame in frames] == [alone]:
            return -1, ""
        try:
            (frame,) = frames
            first, text = frame["single"]
            name = first["SpecialToken"]["id"]
            (i,) = frame["special_tokens"][name]["ids"]
            (known,) = (t["id"] for t in raw["added_tokens"] if t["content"] == name)
            if (
                frame["type"] == "TemplateProcessing"
                and text["Sequence"]["id"] == "A"
                and i == known
            ):
                return i, name
        except (AttributeError, KeyError, TypeError, ValueError):
            pass
        raise ValueError(
            f"{self._path}: post_processor is {frames!r:.80}, supported: one token of added_tokens "
            "before the text, or nothing"
        )

    def check_flags(self, file: Path, text: str, flags: dict[str, Any]) -> None:
        """Raises ValueError if an added token is to be found in another way than as it is
        written."""
        wrong = [name for name in _TAKES if flags.get(name)]
        wrong += ["normalized"] * (self._nfc and flags.get("normalized") is True)
        if wrong:
            raise ValueError(
                f"{file}: {wrong[0]} of {text!r:.80} is True, supported of byte-level tokenizers: "
                "False; if the model was trained so, minillava cannot prompt it"
            )

    def encode(self, text: str) -> list[int]:
        text = unicodedata.normalize("NFC", text) if self._nfc else text
        return [i for word in cut_words(text, self._digits) for i in self._cut(word)]

    def _cut_word(self, word: str) -> tuple[int, ...]:
        word = "".join(_LETTER[byte] for byte in word.encode("utf-8"))
        if self._whole_words and word in self._ids:
            return (self._ids[word],)
        return tuple(self._ids[part] for part in merge(word, self._ranks))

    def bytes_of(self, i: int) -> bytes:
        """The bytes of a piece, which may be a part of a character."""
        piece = self._pieces[i]
        known = all(letter in _BYTE for letter in piece)
        return bytes(_BYTE[letter] for letter in piece) if known else piece.encode("utf-8")

    def serialized_model_proto(self) -> bytes:
        """Raises ValueError, since there is no tokenizer.model to write."""
        raise ValueError(f"{self._path}: {NO_MODEL}")

    def vocab_size(self) -> int:
        return len(self._pieces)

    def id_to_piece(self, i: int) -> str:
        return self._begin[1] if i == self._begin[0] else self._pieces[i] if i >= 0 else ""

    def piece_to_id(self, piece: str) -> int:
        return self._ids.get(piece, -1)

    def bos_id(self) -> int:
        return self._begin[0]

    def eos_id(self) -> int:
        """The files beside it name it, or config.json."""
        return -1

    def unk_id(self) -> int:
        return -1

    def is_control(self, i: int) -> bool:
        return False

    def is_unknown(self, i: int) -> bool:
        return i < 0

    def is_unused(self, i: int) -> bool:
        return False

    def is_byte(self, i: int) -> bool:
        return False


def _objects(steps: object) -> list[dict[str, Any]]:
    return [s for s in steps if isinstance(s, dict)] if isinstance(steps, list) else []


def cut_words(text: str, digits: str) -> list[str]:
    """The words of a text: each a contraction, letters, digits (`digits` says how many), other
    characters, or whitespace."""
    return _words(digits, "" if text.isascii() else _rare_numbers()).findall(text)


@cache
def _words(digits: str, rare: str) -> re.Pattern[str]:
    r"""A file's pattern in Python's terms, which have no \p: letters are \w without numbers and the
    underscore, numbers are \d and the `rare` ones."""
    letter, number = rf"[^\W\d_{rare}]", rf"[\d{rare}]"
    return re.compile(
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
        rf"|(?:[^\w\r\n]|_)?{letter}+"
        rf"|{number}{digits}"
        rf"| ?(?:[^\w{_SPACE}]|_)+[\r\n]*"
        rf"|[{_SPACE}]*[\r\n]+"
        rf"|[{_SPACE}]+(?![^{_SPACE}])"
        rf"|[{_SPACE}]+"
    )


@cache
def _rare_numbers() -> str:
    r"""The numbers that \d has not, such as Roman numerals and fractions; a quarter of a second."""
    characters = map(chr, range(sys.maxunicode + 1))
    return "".join(c for c in characters if unicodedata.category(c) in ("Nl", "No"))
