"""The pieces of a Llama tokenizer.json, the only file that transformers 5 saves. They cut text as
SentencePiece does with the tokenizer.model that the file was made from."""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from minillava.files.merges import NO_MODEL, merge, read_merges

_SPACE = "▁"


def is_llama(raw: dict[str, Any]) -> bool:
    """Whether a tokenizer.json has pieces for bytes, as every tokenizer of the Llama 2 family
    has."""
    model = raw.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        return False
    return model.get("type") == "BPE" and "<0x0A>" in model["vocab"]


class LlamaPieces:
    """The methods of a SentencePieceProcessor that Tokenizer calls, for the JSON object `raw` of a
    file. Raises ValueError if the file prepares text in another way than Llama, or contradicts
    itself."""

    def __init__(self, path: Path, raw: dict[str, Any]):
        self._path, model = path, raw["model"]
        if not model.get("byte_fallback") or not _prepares_as_llama(raw):
            raise ValueError(
                f"{path}: prepares text in another way than Llama's tokenizer (byte_fallback, and "
                "a ▁ for each space and before the text); copy the tokenizer.model of this "
                "language model beside it"
            )
        self._ids: dict[str, int] = model["vocab"]
        if {*self._ids.values()} != {*range(len(self._ids))}:
            raise ValueError(f"{path}: the ids of its pieces have holes; download it again")
        self._pieces = sorted(self._ids, key=lambda piece: self._ids[piece])
        self._ranks = read_merges(path, model.get("merges") or [], self._ids)
        self._bytes = {self._ids.get(f"<0x{i:02X}>") for i in range(256)}
        if None in self._bytes or not {"<s>", "</s>", "<unk>"} <= self._ids.keys():
            raise ValueError(
                f"{path}: lacks pieces of bytes, <s>, </s> or <unk>; download it again"
            )
        # Words can be cut one by one if no piece has a ▁ in its middle.
        whole = any(_SPACE in piece.lstrip(_SPACE) for piece in self._pieces)
        self._word = re.compile(".+" if whole else f"{_SPACE}+[^{_SPACE}]*|[^{_SPACE}]+", re.DOTALL)
        self._cut = lru_cache(1 << 14)(self._cut_word)

    def encode(self, text: str) -> list[int]:
        if not text:
            return []
        text = _SPACE + text.replace(" ", _SPACE)
        return [i for word in self._word.findall(text) for i in self._cut(word)]

    def _cut_word(self, word: str) -> tuple[int, ...]:
        ids: list[int] = []
        for part in merge(word, self._ranks):
            known = self._ids.get(part)
            if known is None:  # a character without a piece
                ids += [self._ids[f"<0x{byte:02X}>"] for byte in part.encode("utf-8")]
            else:
                ids.append(known)
        return tuple(ids)

    def serialized_model_proto(self) -> bytes:
        """Raises ValueError, since there is no tokenizer.model to write."""
        raise ValueError(f"{self._path}: {NO_MODEL}")

    def vocab_size(self) -> int:
        return len(self._pieces)

    def id_to_piece(self, i: int) -> str:
        return self._pieces[i]

    def piece_to_id(self, piece: str) -> int:
        return self._ids.get(piece, self.unk_id())

    def bos_id(self) -> int:
        return self._ids["<s>"]

    def eos_id(self) -> int:
        return self._ids["</s>"]

    def unk_id(self) -> int:
        return self._ids["<unk>"]

    def is_control(self, i: int) -> bool:
        return i in (self.bos_id(), self.eos_id())

    def is_unknown(self, i: int) -> bool:
        return i == self.unk_id()

    def is_unused(self, i: int) -> bool:
        return False

    def is_byte(self, i: int) -> bool:
        return i in self._bytes


def _prepares_as_llama(raw: dict[str, Any]) -> bool:
    """Whether a file prepares text in one of Llama's two forms: a normaliser that writes ▁ before
    every text and for its spaces (`legacy`), or a pre-tokenizer that writes the first ▁ for the
    first text alone."""
    normaliser, before = raw.get("normalizer"), raw.get("pre_tokenizer")
    prepend = {"type": "Prepend", "prepend": _SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if normaliser == {"type": "Sequence", "normalizers": [prepend, replace]}:
        return before is None
    if normaliser not in (None, replace) or not isinstance(before, dict):
        return False
    return (
        before.get("type") == "Metaspace"
        and before.get("replacement") == _SPACE
        and before.get("prepend_scheme") in ("first", "always")
        and not before.get("split", True)
    )
