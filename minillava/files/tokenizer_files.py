"""The files beside a tokenizer.model: the tokens that a fine-tune added, `legacy`, and the kind of
tokenizer.

transformers writes an added token into up to four files; which ones depends on its version. The
files are read together and must agree. A token that is only named, without an id, comes after all
others, as transformers adds it.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from sentencepiece import SentencePieceProcessor

from minillava.files.byte_json import BytePieces, is_byte_level
from minillava.files.disk import one_line, read_json, refused
from minillava.files.hub import RELEASE
from minillava.files.llama_json import LlamaPieces, is_llama

MODEL_NAME = "tokenizer.model"

CONFIG_NAME, ADDED_NAME, MAP_NAME, FAST_NAME = SIDE_NAMES = (
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer.json",
)

IMAGE_NAME = "<image>"
"""What the files of the hub's checkpoints call the id that stands for a picture's patches."""

PAD_MARKER = "<pad>"
"""The pad token of the hub's checkpoints; like IMAGE_NAME, no text becomes its id."""

PADDING = 256
"""An embedding table has fewer rows than this without a token: it is padded to a multiple of 64, at
most of 256. One for a hundred thousand byte-level pieces has up to twice as many (Qwen2: 353)."""

# The keys that name the language model's own control tokens, and those that list tokens that are
# left out of answers.
_CONTROL = ("bos_token", "eos_token", "unk_token", "pad_token")

_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)

_LISTED = ("additional_special_tokens", "extra_special_tokens")  # the second since transformers 5

_FLAGS = ("special", "lstrip", "rstrip", "single_word")

# 32,000 pieces, added tokens and padding; for more rows no known tokenizer.model would do
_LARGEST_LLAMA_2 = 32_256

_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")

# how tokenizer_class begins for other families
_OTHER_CLASSES = re.compile(
    "Qwen|GPT|Bloom|CodeGen|Bert|DistilBert|Roberta|XLM|XLNet|Albert|DebertaV2|BigBird|Bart|MBart|"
    "Marian|Pegasus|Nllb|T5|MT5|OPT|Gemma|Cohere|Whisper|ChatGLM"
)

# tokenizer_class if only tokenizer.json says which family it is
_ANY_CLASS = ("PreTrainedTokenizerFast", "TokenizersBackend")

# the files of their vocabularies
_OTHER_FILES = (
    "*.tiktoken",
    "tekken.json",
    "merges.txt",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "spm.model",
    "source.spm",
    "sentencepiece.bpe.model",
)

_OTHER_KIND = (
    "this model has another kind of tokenizer, which minillava does not read; use a LLaVA-1.5 "
    "whose language model is "
    f"of the Llama 2 family, such as {RELEASE}"
)


Pieces = SentencePieceProcessor | LlamaPieces | BytePieces
"""What cuts text: a tokenizer.model, the tokenizer.json that was made of it, or one of bytes."""

Flags = dict[str, Any]
"""A token as a JSON object describes it: its `content`, and any of _FLAGS."""


class AddedToken(NamedTuple):
    """A text that is one id wherever it stands, as transformers' AddedToken describes it."""

    text: str
    id: int
    special: bool = False  # left out of answers
    listed: bool = False  # among the special tokens that the files name, by role or in a list
    control: bool = False  # the language model's own: if a user types it, it stays plain text
    lstrip: bool = False  # takes the whitespace before it
    rstrip: bool = False
    single_word: bool = False  # a token only between spaces


class TokenizerFiles:
    """Those of the four files that a folder has. Raises ValueError naming the file that cannot be
    read."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config, self.added, self.map, self.fast = (
            read_json(folder / name) if os.path.lexists(folder / name) else {}
            for name in SIDE_NAMES
        )

    def legacy(self) -> bool:
        """`legacy` as tokenizer_config.json says. If it says nothing, as with transformers 5, what
        tokenizer.json does; else True. Raises ValueError if it is not true or false."""
        if is_byte_level(self.fast):
            return True  # it has no "▁" that could be left out
        legacy = self.config.get("legacy")
        if legacy is not None and not isinstance(legacy, bool):
            raise ValueError(
                f"{self.folder / CONFIG_NAME}: legacy is {legacy!r:.80}, expected true or false"
            )
        if legacy is None:
            before = self.fast.get("pre_tokenizer")
            return not (isinstance(before, dict) and before.get("prepend_scheme") == "first")
        return legacy

    def tokens(self, model: Pieces, wanted: Sequence[str] = ()) -> dict[str, AddedToken]:
        """Text -> token for every token that a file names, the control tokens of `model`, and the
        `wanted` ones. Raises ValueError if files contradict themselves, one another or `model`."""
        ends = (model.unk_id(), model.bos_id(), model.eos_id())
        own = [model.id_to_piece(i) for i in ends if i >= 0]
        named: dict[str, Flags] = {}
        keys: dict[str, str] = {}
        for text, key, flags in self._named():
            named.setdefault(text, flags)
            # of several keys the first, which says whether it is a control token
            keys.setdefault(text, key)
        control = {*own, *wanted, PAD_MARKER, *(text for text in named if keys[text] in _CONTROL)}
        listed = {*control, *named, IMAGE_NAME}
        found: dict[str, AddedToken] = {}
        texts: dict[int, str] = {}  # id -> text, so far
        files: dict[str, str] = {}  # text -> file, so far
        for file, text, i, flags in self._entries():
            self._check(file, text, i, flags, model)
            known = found.get(text)
            if known is not None and known.id != i:
                said = f"{text!r:.80} is {i}, {files[text]} says {known.id}"
                raise ValueError(f"{self.folder / file}: {said}; keep the files of one run")
            if texts.get(i, text) != text:
                said = f"{text!r:.80} is {i}, {files[texts[i]]} says that of {texts[i]!r:.80}"
                raise ValueError(f"{self.folder / file}: {said}; keep the files of one run")
            if known is None:
                found[text] = _token(text, i, flags, listed=text in listed, control=text in control)
                texts[i], files[text] = text, file
        following = max([model.vocab_size() - 1, *texts]) + 1
        for text in (*own, *named, *wanted):
            if text not in found:
                piece = model.piece_to_id(text)
                is_piece = model.id_to_piece(piece) == text
                i, flags = piece if is_piece else following, named.get(text, {})
                found[text] = _token(text, i, flags, listed=True, control=text in control)
                following += not is_piece
        self._check_ends(found, model)
        return found

    def _check_ends(self, found: dict[str, AddedToken], model: Pieces) -> None:
        """Check that a prompt begins with the begin token of `model` and has no end token. Raises
        ValueError if a file says otherwise."""
        begins = model.bos_id() >= 0
        for key, ours in (("add_bos_token", begins), ("add_eos_token", False)):
            if self.config.get(key, ours) not in (ours, None):
                said = f"{key} is {self.config[key]!r:.80}, supported: {ours}"
                raise ValueError(
                    f"{self.folder / CONFIG_NAME}: {said}; if the model was trained with that, "
                    "minillava cannot prompt it; if not, correct the file"
                )
        for name, raw in ((CONFIG_NAME, self.config), (MAP_NAME, self.map)):
            value = raw.get("bos_token")
            text = value.get("content") if isinstance(value, dict) else value
            if text and begins and found[text].id != model.bos_id():
                begin = model.id_to_piece(model.bos_id())
                raise ValueError(
                    f"{self.folder / name}: bos_token is {text!r:.80}, supported: {begin!r}, the "
                    f"one of {_name_of(model)}; keep the files of one run"
                )

    def _entries(self) -> Iterator[tuple[str, str, int, Flags]]:
        """Yields (file, text, id, flags) as the files have them."""
        decoder, listed = (
            self.config.get("added_tokens_decoder") or {},
            self.fast.get("added_tokens") or [],
        )
        try:
            for i, entry in decoder.items():
                yield CONFIG_NAME, entry["content"], int(i), entry
        except (AttributeError, KeyError, TypeError, ValueError):
            file = self.folder / CONFIG_NAME
            raise ValueError(
                f"{file}: added_tokens_decoder is not a token by id; download it again"
            ) from None
        try:
            for entry in listed:
                yield FAST_NAME, entry["content"], entry["id"], entry
        except (AttributeError, KeyError, TypeError):
            file = self.folder / FAST_NAME
            raise ValueError(
                f"{file}: added_tokens is not a list of tokens; download it again"
            ) from None
        for text, i in self.added.items():
            yield ADDED_NAME, text, i, {}

    def _check(self, file: str, text: str, i: int, flags: Flags, model: Pieces) -> None:
        path = self.folder / file
        if not _is_text(text):
            raise ValueError(
                f"{path}: token {i!r:.80} is {text!r:.80}, expected text; download it again"
            )
        if type(i) is not int or not 0 <= i < 2**31:
            raise ValueError(
                f"{path}: {text!r:.80} is {i!r:.80}, expected a token id; download it again"
            )
        _check_flags(path, text, flags)
        if isinstance(model, BytePieces):
            model.check_flags(path, text, flags)
        # A control piece, into which no text is cut, may have been renamed. A word may not be
        # renamed, and no piece may have another id.
        piece = model.id_to_piece(i) if i < model.vocab_size() and is_word(model, i) else text
        other = model.piece_to_id(text)
        if piece != text or (other != i and is_word(model, other)):
            said = (
                f"which is {piece!r} in {_name_of(model)}"
                if piece != text
                else f"{_name_of(model)} says {other}"
            )
            raise ValueError(f"{path}: {text!r:.80} is {i}, {said}; keep the files of one run")

    def _named(self) -> Iterator[tuple[str, str, Flags]]:
        """Yields (text, key, flags) of the tokens named without an id, in the order in which
        transformers numbers them."""
        for key in (*_NAMED, *_LISTED):
            for name, raw in ((CONFIG_NAME, self.config), (MAP_NAME, self.map)):
                value = raw.get(key) or []
                for entry in (
                    value.values()
                    if isinstance(value, dict) and key in _LISTED
                    else _as_list(value)
                ):
                    flags = entry if isinstance(entry, dict) else {"content": entry}
                    text = flags.get("content")
                    if not _is_text(text):
                        said = f"{key} is {raw[key]!r:.80}, expected text; download it again"
                        raise ValueError(f"{self.folder / name}: {said}")
                    _check_flags(self.folder / name, text, flags)
                    yield text, key, flags

    def vocabulary(self) -> dict[str, int]:
        """Text -> id of the pieces of tokenizer.json; empty if it has none."""
        model = self.fast.get("model")
        pieces = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(pieces, list):  # Unigram: pairs of a piece and its score
            pieces = {
                str(entry[0]): i
                for i, entry in enumerate(pieces)
                if isinstance(entry, list) and entry
            }
        return pieces if isinstance(pieces, dict) else {}

    def of_another_kind(self) -> str | None:
        """The file that shows that this is not a tokenizer of the Llama 2 family; None if no file
        does."""
        pieces = self.vocabulary()
        if pieces and "<0x0A>" not in pieces:  # a newline is a byte to all of the family
            return FAST_NAME
        others = [file.name for name in _OTHER_FILES for file in self.folder.glob(name)]
        if _OTHER_CLASSES.match(str(self.config.get("tokenizer_class"))):
            others.append(CONFIG_NAME)
        return None if pieces or not others else others[0]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_text(text: object) -> TypeGuard[str]:
    """Whether it is a text that is not empty and has no halves of surrogate pairs (which JSON can
    write)."""
    return isinstance(text, str) and bool(text) and text == text.encode(errors="replace").decode()


def _check_flags(path: Path, text: str, flags: Flags) -> None:
    for name in _FLAGS:
        if not isinstance(flags.get(name, False), bool):
            raise ValueError(
                f"{path}: {name} of {text!r:.80} is {flags[name]!r:.80}, expected true or false"
            )


def _token(text: str, i: int, flags: Flags, *, listed: bool, control: bool) -> AddedToken:
    flags = {name: flags.get(name, False) for name in _FLAGS}
    flags["special"] |= listed
    return AddedToken(text, i, listed=listed, control=control, **flags)


def _name_of(model: Pieces) -> str:
    """The file that has the pieces."""
    return MODEL_NAME if isinstance(model, SentencePieceProcessor) else FAST_NAME


def find_tokenizer(folders: Sequence[Path]) -> tuple[Path, Path]:
    """The tokenizer.model and the folder of the files beside it. Each is from the first folder that
    has one, as an adapter has whose run added tokens; if no folder has one, from the last."""
    model = next(
        (folder for folder in folders if os.path.lexists(folder / MODEL_NAME)), folders[-1]
    )
    names = (MODEL_NAME, *SIDE_NAMES)
    beside = next((f for f in folders if any(os.path.lexists(f / name) for name in names)), model)
    return model / MODEL_NAME, beside


def _check_model_is_there(path: Path, files: TokenizerFiles, vocabulary: int | None) -> None:
    """Raises FileNotFoundError if there is no tokenizer.model, and ValueError if no tokenizer.model
    would help. vocabulary: the rows of the embedding table, if they are known."""
    if path.is_file():
        return
    _check_kind(path, files)
    if vocabulary is not None and vocabulary > _LARGEST_LLAMA_2:
        raise FileNotFoundError(
            f"{path}: not found; get that of the language model this was trained from, whose "
            "vocabulary is about "
            f"{vocabulary:,}, or, if it has none (as Llama 3), its tokenizer.json"
        )
    raise FileNotFoundError(
        f"{path}: not found; copy tokenizer.model from the original checkpoint "
        "(liuhaotian/llava-v1.5-7b or "
        "lmsys/vicuna-7b-v1.5 on the hub), or a tokenizer.json that was made of it"
    )


def is_word(model: Pieces, i: int) -> bool:
    """Whether text can be cut into this piece: not if it is a control piece, the unknown piece or
    an unused one."""
    return not (model.is_control(i) or model.is_unknown(i) or model.is_unused(i))


def open_model(path: Path, files: TokenizerFiles, vocabulary: int | None = None) -> Pieces:
    """Open a tokenizer.model of the Llama 2 family, to which `files` belong; if it does not exist,
    the tokenizer.json of `files`, of that family or byte-level. vocabulary: the rows of the
    embedding table, if they are known. Raises FileNotFoundError or ValueError, or OSError if the
    system refuses."""
    if not os.path.lexists(path) and is_llama(files.fast):
        return LlamaPieces(files.folder / FAST_NAME, files.fast)
    if not os.path.lexists(path) and is_byte_level(files.fast):
        return BytePieces(files.folder / FAST_NAME, files.fast)
    _check_model_is_there(path, files, vocabulary)
    model = _read_model(path)
    _check_pieces(path, model, files)
    return model


def _read_model(path: Path) -> SentencePieceProcessor:
    try:
        with path.open("rb") as file:
            head = file.read(200)
    except OSError as error:
        raise refused(path, error) from None
    if _TIKTOKEN.match(head):
        raise ValueError(f"{path}: is a tiktoken vocabulary, as Llama 3 has one: {_OTHER_KIND}")
    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: not a SentencePiece model ({one_line(error)}); download it again"
        ) from None
    if model.decode(model.encode("a  b")) != "a  b":  # the end of the file, its normaliser, is lost
        raise ValueError(
            f"{path}: cut short, or of another family (it merges spaces, which no Llama tokenizer "
            "does); download it again, or the one of this language model"
        )
    if not model.is_byte(model.piece_to_id("<0x0A>")):  # a newline is a byte to all of the family
        raise ValueError(f"{path}: has no piece <0x0A>: {_OTHER_KIND}")
    if model.bos_id() < 0 or model.eos_id() < 0:
        raise ValueError(
            f"{path}: has no <s> or </s>, which every Llama tokenizer has; is it another model's?"
        )
    return model


def _check_kind(path: Path, files: TokenizerFiles) -> None:
    """Raises ValueError if the files beside `path` are another family's, or if the file is missing
    that would say which family's they are."""
    if other := files.of_another_kind():
        copied = f"; {path} is not its own" if path.is_file() else ""
        raise ValueError(f"{files.folder / other}: {_OTHER_KIND}{copied}")
    kind = files.config.get("tokenizer_class")
    if kind in _ANY_CLASS and not files.fast:
        raise ValueError(
            f"{files.folder / CONFIG_NAME}: tokenizer_class is {kind}, which may be of any family; "
            f"download the {FAST_NAME} that belongs to it"
        )


def _check_pieces(path: Path, model: Pieces, files: TokenizerFiles) -> None:
    """A tokenizer.model must be of the kind that the files beside it say, and cut from the same
    vocabulary as their tokenizer.json. Raises ValueError."""
    _check_kind(path, files)
    pieces = files.vocabulary()
    for i in range(model.vocab_size()) if pieces else ():
        piece = model.id_to_piece(i)
        if pieces.get(piece) != i and is_word(model, i):
            file, found = files.folder / FAST_NAME, pieces.get(piece)
            said = f"{piece!r} is {i}, in {file} {'not there' if found is None else repr(found)}"
            raise ValueError(f"{path}: {said}; copy the {MODEL_NAME} that belongs to these weights")


def check_vocabulary(
    path: Path, pieces: int, tokens: dict[str, AddedToken], rows: int, files: TokenizerFiles
) -> None:
    """Check pieces and added tokens against the rows of the embedding table. Raises ValueError with
    both numbers."""
    if not os.path.lexists(path):
        path = files.folder / FAST_NAME
    if pieces > rows:
        raise ValueError(
            f"{path.parent}: {path.name} has {pieces} pieces, config.json a vocabulary of {rows}; "
            f"copy the {path.name} that belongs to these weights"
        )
    # A pad token without a row is common and harmless, since no prompt contains it.
    for file, text, i, _ in files._entries():
        if i >= rows and not tokens[text].control and text != IMAGE_NAME:
            raise ValueError(
                f"{files.folder / file}: {text!r:.80} is {i}, but config.json has a vocabulary of "
                f"{rows}; "
                "keep tokenizer and weights of one run"
            )
    last = max([pieces, *(token.id + 1 for token in tokens.values())])
    byte_level = path.name == FAST_NAME and is_byte_level(files.fast)
    if rows - last >= (2 * PADDING if byte_level else PADDING):
        raise ValueError(
            f"{path}: has {pieces:,} pieces and with added tokens {last:,} ids, config.json a "
            f"vocabulary of {rows:,}: "
            f"{_OTHER_KIND}; if tokens were added to it, download {ADDED_NAME} and {CONFIG_NAME}, "
            "too"
        )
