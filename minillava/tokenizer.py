"""Text to token ids and back: SentencePiece with the conventions of Llama and LLaVA.

SentencePiece writes a space as "▁" and puts one before every text, so that a word at the start of a
text is the same piece as that word after a space. LLaVA cuts a prompt at `<image>` and encodes each
chunk as a text of its own, which is why the newline after a picture is two ids, 29871 ("▁") and 13
("\\n" as a byte).
"""

import codecs
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path

from minillava.config import IM_END, IM_START, IMAGE_TOKEN_INDEX
from minillava.files.added_tokens import TokenFinder
from minillava.files.byte_json import BytePieces
from minillava.files.tokenizer_files import (
    PAD_MARKER,
    AddedToken,
    TokenizerFiles,
    check_vocabulary,
    open_model,
)
from minillava.options import expect_utf8
from minillava.prompt import IMAGE_MARKER, Prompt, Segment

_SPACE = "▁"


class Tokenizer:
    """A Llama tokenizer.model, or the tokenizer.json of a folder without one, with the tokens that
    the files in `beside` (default: its own folder) add to it.

    legacy: what happens to text after a token within a chunk. True, the first behaviour: it gets a
    "▁" again ("</s>USER" is 2 3148 1001). False, from transformers 4.34: it does not (2 11889).
    None reads it from those files. added: further tokens (config.added_tokens), which come after
    all others unless a file names their ids. vocabulary: rows of the embedding table, to check
    against. Raises FileNotFoundError or ValueError.
    """

    def __init__(
        self,
        path: str | Path,
        legacy: bool | None = None,
        added: Sequence[str] = (),
        beside: str | Path | None = None,
        vocabulary: int | None = None,
    ):
        path = Path(path)
        files = TokenizerFiles(path.parent if beside is None else Path(beside))
        self.sentencepiece = open_model(path, files, vocabulary)
        self.bos_id, self.eos_id = self.sentencepiece.bos_id(), self.sentencepiece.eos_id()
        self.vocab_size = self.sentencepiece.vocab_size()
        self.legacy = files.legacy() if legacy is None else legacy
        tokens = files.tokens(self.sentencepiece, added)
        if vocabulary is not None:
            # the model grows by those that are added
            rows = max([vocabulary, *(tokens[text].id + 1 for text in added)])
            check_vocabulary(path, self.vocab_size, tokens, rows, files)
        self.by_id = {t.id: t for t in sorted(tokens.values(), key=lambda t: t.id)}
        self.added = {t.text: i for i, t in self.by_id.items() if i >= self.vocab_size}
        # What no text becomes: a picture is -200, and padding is nothing to be written.
        self._tokens = {k: t for k, t in tokens.items() if k not in (IMAGE_MARKER, PAD_MARKER)}
        self._finder = TokenFinder(self._tokens)
        # Early models have two tokens of their own around each picture.
        self._around = [
            [Segment(text, "template")] if text in added else [] for text in (IM_START, IM_END)
        ]
        self._newline = self.sentencepiece.encode("\n")

    def encode(self, prompt: str | Prompt) -> list[int]:
        """Token ids, the begin token (if there is one) first, and -200 for each `<image>`.

        Tokens that a fine-tune added are tokens wherever they stand. `<s>`, `</s>`, `<unk>` and
        `<image>` are tokens in a plain string, as in Hugging Face, but in a `Prompt` only where the
        template wrote them (and `<image>` where the user asked for a picture).
        """
        expect_utf8(prompt, "the prompt")
        segments = prompt.segments if isinstance(prompt, Prompt) else [Segment(prompt, "template")]
        ids = [self.bos_id] * (self.bos_id >= 0)  # Qwen2 has none
        chunk: list[Segment] = []  # a text of its own, from one picture to the next
        before, after = self._around
        for text, kind in segments:
            first, *others = text.split(IMAGE_MARKER) if kind == "template" else [text]
            chunk.append(Segment(first, kind))
            for other in others:
                ids += [*self._encode_chunk([*chunk, *before]), IMAGE_TOKEN_INDEX]
                chunk = [*after, Segment(other, kind)]
        return ids + self._encode_chunk(chunk)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, without the special ones and without the space before the first word."""
        decoder = TextDecoder(self)
        return "".join(decoder.feed(i) for i in ids) + decoder.flush()

    def piece(self, token_id: int) -> str:
        """An id as people are shown it: as the tokenizer writes it ("▁star"), `<image>` for a
        picture, "<704>" for a row that no text becomes."""
        if token_id == IMAGE_TOKEN_INDEX:
            return IMAGE_MARKER
        if token := self.written_as(token_id):
            return token.text
        in_model = 0 <= token_id < self.vocab_size
        return self.sentencepiece.id_to_piece(token_id) if in_model else f"<{token_id}>"

    def written_as(self, token_id: int) -> AddedToken | None:
        """The token that text can become this id by; None for pieces, and for the ids of `<image>`
        and `<pad>`."""
        token = self.by_id.get(token_id)
        return token if token is not None and token.text in self._tokens else None

    def _encode_chunk(self, chunk: list[Segment]) -> list[int]:
        """The ids of a text without pictures, as the slow Llama tokenizer of transformers makes
        them. What a user spelled goes letter by letter; all else is one text, cut at its tokens."""
        chunk = [segment for segment in chunk if segment.text]
        if not chunk:
            return []
        if not self.legacy:  # the "▁" before a text is a part of it
            chunk = [Segment(text.replace(_SPACE, " "), kind) for text, kind in chunk]
            if chunk[0].kind != "spelled":
                chunk[0] = Segment(_SPACE + chunk[0].text, chunk[0].kind)
        ids: list[int] = []
        encode_continuation = cache(self._encode_continuation)  # spelled letters come again
        # whether SentencePiece puts a "▁" before what comes next
        fresh = self.legacy or chunk[0].kind == "spelled"
        for spelled, run in groupby(chunk, lambda segment: segment.kind == "spelled"):
            if spelled:
                parts: list[str | AddedToken] = [letter for text, _ in run for letter in text]
            else:
                parts = self._finder.cut([(text, kind == "template") for text, kind in run])
            if not self.legacy and not ids and parts[0] == _SPACE and len(parts) > 1:
                second = parts[1]
                if isinstance(second, AddedToken) and second.listed:
                    del parts[0]
            for part in parts:
                if isinstance(part, AddedToken):
                    ids.append(part.id)
                else:
                    ids += self.sentencepiece.encode(part) if fresh else encode_continuation(part)
                fresh = self.legacy and not spelled
            if parts and not isinstance(parts[-1], AddedToken):
                fresh = False
        return ids

    def _encode_continuation(self, text: str) -> list[int]:
        """Encode without the leading "▁". SentencePiece cannot switch it off, so the text goes
        after a newline, which is a byte in Llama's vocabulary and so never merges with what
        follows; its ids are cut off. Byte-level pieces have no such "▁"."""
        if isinstance(self.sentencepiece, BytePieces):
            return self.sentencepiece.encode(text)
        return self.sentencepiece.encode("\n" + text)[len(self._newline) :]


class TextDecoder:
    """Decoding one id at a time, for streaming: a character of several bytes comes out once it is
    whole."""

    def __init__(self, tokenizer: Tokenizer):
        self._model, self._tokens = tokenizer.sentencepiece, tokenizer.by_id
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # byte-level pieces have no "▁", and add no space before the first word
        self._started = self._byte_level = isinstance(self._model, BytePieces)

    def feed(self, token_id: int) -> str:
        """The text that this id completes; "" for special ids and half characters. Ids without a
        token (-200, the rows that pad a table) have no text."""
        model, token_id = self._model, int(token_id)
        token = self._tokens.get(token_id)
        if token is not None:
            if token.special:
                return ""
            shown = token.text if self._byte_level else token.text.replace(_SPACE, " ")
            text = self.flush() + shown
        elif (
            not 0 <= token_id < model.vocab_size()
            or model.is_control(token_id)
            or model.is_unknown(token_id)
        ):
            return ""
        elif isinstance(model, BytePieces):
            text = self._bytes.decode(model.bytes_of(token_id))
        elif model.is_byte(token_id):  # "<0x0A>"
            text = self._bytes.decode(bytes([int(model.id_to_piece(token_id)[3:-1], 16)]))
        else:
            text = self.flush() + model.id_to_piece(token_id).replace(_SPACE, " ")
        if not self._started:
            self._started = True
            text = text.removeprefix(" ")
        return text

    def hidden(self, token_id: int) -> str:
        """How a token is spelled of which `feed` shows nothing, as `</s>`; "" for all others."""
        token = self._tokens.get(int(token_id))
        return token.text if token is not None and token.special else ""

    def flush(self) -> str:
        """What is left: bytes that never became a character, as U+FFFD."""
        rest = self._bytes.decode(b"", final=True)
        self._bytes.reset()
        return rest


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two texts, of any lengths, begin with together."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)
