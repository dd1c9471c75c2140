"""Text to token ids and back: SentencePiece with the conventions of Llama and LLaVA.

SentencePiece writes a space as "▁" and puts one before every text, so that "dog" and " dog" are the same
word. LLaVA cuts a prompt at `<image>` and encodes each chunk as a text of its own, which is why the
newline after a picture is two ids, 29871 ("▁") and 13 ("\\n" as a byte).
"""

import codecs
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from minillava.config import IGNORE_INDEX, IM_END, IM_START, IMAGE_TOKEN_INDEX, one_line, read_json
from minillava.disk import refused
from minillava.prompt import IMAGE_MARKER, Prompt, Segment, Template, render

_SPACE = "▁"


class Tokenizer:
    """A Llama tokenizer.model.

    legacy: what happens to text after `</s>` within a chunk. True, the first behaviour: it gets a "▁" again
    ("</s>USER" is 2 3148 1001). False, from transformers 4.34: it does not (2 11889). None reads it from the
    tokenizer_config.json beside the model, where absent means True. added: tokens (config.added_tokens) whose ids the
    files beside it name, or which continue after all others. Raises FileNotFoundError or ValueError.
    """

    def __init__(self, path: str | Path, legacy: bool | None = None, added: Sequence[str] = ()):
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: not found; copy tokenizer.model from the original checkpoint (liuhaotian/llava-v1.5-7b or "
                "lmsys/vicuna-7b-v1.5 on the hub): a tokenizer.json alone is not enough"
            )
        try:
            path.open("rb").close()
        except OSError as error:
            raise refused(path, error) from None
        try:
            self.sentencepiece = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a SentencePiece model ({one_line(error)}); download it again") from None
        if self.sentencepiece.decode(self.sentencepiece.encode("a  b")) != "a  b":  # its end, the normaliser, is lost
            raise ValueError(f"{path}: cut short (it merges spaces, which no Llama tokenizer does); download it again")
        self.bos_id, self.eos_id, self.vocab_size = (
            self.sentencepiece.bos_id(),
            self.sentencepiece.eos_id(),
            self.sentencepiece.vocab_size(),
        )
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(f"{path}: has no <s> or </s>, which every Llama tokenizer has; is it another model's?")
        self.legacy = _read_legacy(path.with_name("tokenizer_config.json")) if legacy is None else legacy
        self._special = {
            self.sentencepiece.id_to_piece(i): i for i in (self.sentencepiece.unk_id(), self.bos_id, self.eos_id)
        }
        self.added = _ids_of_added(path, added, self.vocab_size)
        self._special[IMAGE_MARKER] = IMAGE_TOKEN_INDEX
        # What stands for a picture: -200, in early models between two tokens of its own.
        self._around = [self.added[name] for name in (IM_START, IM_END) if name in self.added]
        self._marker = re.compile("(" + "|".join(map(re.escape, self._special)) + ")")

    @cached_property
    def longest_piece(self) -> int:
        """The most characters that one token stands for."""
        pieces = map(self.sentencepiece.id_to_piece, range(self.vocab_size))
        return max(len(text) for text in (*pieces, *self._special))

    def encode(self, prompt: str) -> list[int]:
        """Token ids, the begin token first and -200 for each `<image>`.

        In a plain string `<s>`, `</s>`, `<unk>` and `<image>` are tokens, as in Hugging Face. In a `Prompt`
        they are tokens only where the template wrote them (and `<image>` where the user asked for a picture).
        """
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"the prompt is not UTF-8 text at character {error.start}; write it as UTF-8") from None
        segments = prompt.segments if isinstance(prompt, Prompt) else (Segment(prompt, "template"),)
        ids, run = [self.bos_id], []  # run: segments since the last special token
        prefix = True  # whether the run is a text of its own, which SentencePiece begins with "▁"
        for segment in segments:
            parts = self._marker.split(segment.text) if segment.kind == "template" else [segment.text]
            for i, part in enumerate(parts):
                if i % 2 == 0:
                    run.append(Segment(part, segment.kind))
                    continue
                special = self._special[part]
                is_image = special == IMAGE_TOKEN_INDEX
                ids += self._encode_run(run, prefix)
                ids += [*self._around[:1], special, *self._around[1:]] if is_image else [special]
                run, prefix = [], self.legacy or (is_image and not self._around)
        return ids + self._encode_run(run, prefix)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, without the special ones and without the space before the first word."""
        decoder = TextDecoder(self)
        return "".join(decoder.feed(i) for i in ids) + decoder.flush()

    def _encode_run(self, run: list[Segment], prefix: bool) -> list[int]:
        """Text without special tokens. Neighbouring stretches are encoded as one, since words may cross them,
        except for spelled ones: letter by letter. ("a ", text), ("sta", text), ("r", text) is one piece,
        "a star", whose ids are not those of its parts; with ("r", spelled) it is "a sta" and "r"."""
        pieces: list[str] = []
        joining = False
        for text, kind in run:
            if kind == "spelled":
                pieces += text
            elif joining and text:
                pieces[-1] += text
            elif text:
                pieces.append(text)
            joining = kind != "spelled" and (joining or bool(text))
        ids = []
        for i, piece in enumerate(pieces):
            ids += self.sentencepiece.encode(piece) if prefix and i == 0 else self._encode_continuation(piece)
        return ids

    def _encode_continuation(self, text: str) -> list[int]:
        """Encode without the leading "▁". SentencePiece cannot switch it off, so the text goes behind a newline,
        which is a byte in Llama's vocabulary and so never merges with what follows; its ids are cut off."""
        before = self.sentencepiece.encode("\n")
        return self.sentencepiece.encode("\n" + text)[len(before) :]


def encode_answers(
    tokenizer: Tokenizer, template: Template, turns: Sequence[tuple[str, str]], system: str | None = None
) -> tuple[list[int], list[int]]:
    """The ids of a finished conversation, and its labels: the ids of the answers and of what ends them, IGNORE_INDEX
    elsewhere. Answers begin where the prompt ends that the model would see, and end where the next question changes how
    the text is cut; LLaVA counts words for it, and drops a conversation where the counts disagree (train.py,
    preprocess_v1)."""
    ids = tokenizer.encode(render(template, turns, system))
    labels = [IGNORE_INDEX] * len(ids)
    for i, (question, _) in enumerate(turns):
        opened = tokenizer.encode(render(template, [*turns[:i], (question, None)], system))
        finished = tokenizer.encode(render(template, turns[: i + 1], system))
        start, end = len(opened), common_prefix(finished, ids)
        labels[start:end] = ids[start:end]
    return ids, labels


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two texts begin with together."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class TextDecoder:
    """Decoding one id at a time, for streaming: a character of several bytes comes out once it is whole."""

    def __init__(self, tokenizer: Tokenizer):
        self._model = tokenizer.sentencepiece
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._started = False

    def feed(self, token_id: int) -> str:
        """The text that this id completes; "" for special ids and half characters. Ids outside the tokenizer's
        vocabulary (-200, the hub's padding rows) have no text."""
        model, token_id = self._model, int(token_id)
        if not 0 <= token_id < model.vocab_size() or model.is_control(token_id) or model.is_unknown(token_id):
            return ""
        piece = model.id_to_piece(token_id)
        if model.is_byte(token_id):  # "<0x0A>"
            text = self._bytes.decode(bytes([int(piece[3:-1], 16)]))
        else:
            text = self.flush() + piece.replace(_SPACE, " ")
        if not self._started:
            self._started = True
            text = text.removeprefix(" ")
        return text

    def flush(self) -> str:
        """What is left: bytes that never became a character, as U+FFFD."""
        rest = self._bytes.decode(b"", final=True)
        self._bytes.reset()
        return rest


def read_added_tokens(path: Path) -> dict[str, int]:
    """Tokens and ids that the files beside a tokenizer.model name: added_tokens.json, tokenizer_config.json. Raises
    ValueError."""
    found: dict[str, int] = {}
    for file, key in (("added_tokens.json", None), ("tokenizer_config.json", "added_tokens_decoder")):
        beside = path.with_name(file)
        raw = read_json(beside) if os.path.lexists(beside) else {}
        try:
            known = raw if key is None else {entry["content"]: int(i) for i, entry in (raw.get(key) or {}).items()}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(f"{beside}: {key} is not a token by id; download it again") from None
        for token, i in known.items():
            if type(i) is not int or not 0 <= i < 2**31:
                raise ValueError(f"{beside}: {token!r:.80} is {i!r:.80}, expected a token id; download it again")
        found |= known
    return found


def _ids_of_added(path: Path, wanted: Sequence[str], pieces: int) -> dict[str, int]:
    """The ids of the wanted tokens; those that no file names come after all others, as transformers adds them."""
    known = read_added_tokens(path) if wanted else {}
    first = max([pieces - 1, *known.values()]) + 1
    new = [token for token in wanted if token not in known]
    return {token: known[token] if token in known else first + new.index(token) for token in wanted}


def _read_legacy(path: Path) -> bool:
    if not os.path.lexists(path):
        return True
    legacy = read_json(path).get("legacy")
    if legacy is not None and not isinstance(legacy, bool):
        raise ValueError(f"{path}: legacy is {legacy!r:.80}, expected true or false")
    return legacy is not False
