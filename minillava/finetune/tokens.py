"""Tokens that a run adds: their ids, their rows in both tables, and the files that name them.

V old rows of a table, n new ones, C width.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillava.checkpoint.folders import Folders
from minillava.checkpoint.names import TABLES
from minillava.checkpoint.parts import open_parts
from minillava.checkpoint.write import as_json
from minillava.fast.quantize import QuantisedLinear
from minillava.files.disk import read_json
from minillava.files.text import decode
from minillava.files.tokenizer_files import (
    ADDED_NAME,
    CONFIG_NAME,
    FAST_NAME,
    MODEL_NAME,
    SIDE_NAMES,
    find_tokenizer,
)
from minillava.llava import Llava
from minillava.prompt import IMAGE_MARKER
from minillava.tokenizer import Tokenizer

Ids = Mapping[str, int]
"""New tokens and their ids, which follow one another."""


def new_ids(path: Path, tokenizer: Tokenizer, folders: Folders) -> dict[str, int]:
    """The tokens of a file, one a line, with the ids after all that a tokenizer has. Raises
    FileNotFoundError, or ValueError for a token that is there already or cannot be one."""
    if folders.model_base is not None:
        raise ValueError(
            f"--add-tokens needs a model in one folder, not a part of one on {folders.model_base}; "
            "after its first stage write it as one with python -m minillava.convert"
        )
    try:
        lines = decode(path.read_bytes(), str(path)).splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file of tokens; check the path") from None
    texts = [line.strip() for line in lines if line.strip()]
    first = max([tokenizer.vocab_size - 1, *tokenizer.by_id]) + 1
    there = {token.text: i for i, token in tokenizer.by_id.items()}
    for text in texts:
        ids = tokenizer.encode(text)[int(tokenizer.bos_id >= 0) :]
        if len(ids) == 1 and tokenizer.piece(ids[0]) in (text, f"▁{text}"):
            there[text] = ids[0]
        if text in there:
            raise ValueError(
                f"{path}: {text!r:.80} is a token already, {there[text]}; leave it out"
            )
        if IMAGE_MARKER in text:
            raise ValueError(
                f"{path}: {text!r:.80} has {IMAGE_MARKER} in it, which stands for a picture; give "
                "it another name"
            )
        if texts.count(text) > 1:
            raise ValueError(f"{path}: {text!r:.80} stands there twice; leave one out")
    if not texts:
        raise ValueError(f"{path}: has no tokens; expected one a line")
    return {text: first + i for i, text in enumerate(texts)}


def token_files(folders: Folders, ids: Ids) -> dict[str, bytes]:
    """The files beside the tokenizer.model, naming the new tokens, too, as transformers does."""
    _, beside = find_tokenizer(folders.of_tokenizer)
    files = {name: read_json(beside / name) for name in SIDE_NAMES if (beside / name).exists()}
    decoder = files.setdefault(CONFIG_NAME, {}).setdefault("added_tokens_decoder", {})
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word", "special"), False)
    for text, i in ids.items():
        decoder[str(i)] = {"content": text, **flags}
        if FAST_NAME in files:
            entry = {"id": i, "content": text, **flags}
            files[FAST_NAME].setdefault("added_tokens", []).append(entry)
        if ADDED_NAME in files:
            files[ADDED_NAME][text] = i
    return {name: as_json(content) for name, content in files.items()}


def tokenizer_with(folders: Folders, ids: Ids) -> Tokenizer:
    """The tokenizer of a model, with the new tokens."""
    path, _ = find_tokenizer(folders.of_tokenizer)
    added = open_parts(folders).config.added_tokens
    with tempfile.TemporaryDirectory(prefix="tokens-") as name:
        for file, content in token_files(folders, ids).items():
            (Path(name) / file).write_bytes(content)
        if path.exists():
            (Path(name) / MODEL_NAME).write_bytes(path.read_bytes())
        return Tokenizer(Path(name) / MODEL_NAME, added=added)


def whole_config(folders: Folders, rows: int) -> dict[str, bytes]:
    """The config.json of a model whose tables have so many rows."""
    config = read_json(folders.weights / "config.json")
    config.get("text_config", config)["vocab_size"] = rows
    if "vocab_size" in config:
        config["vocab_size"] = rows
    return {"config.json": as_json(config)}


# ------------------------------------------------------------------------------------ their rows


class NewEmbedding(nn.Embedding):
    """A frozen table [V, C] with rows that learn, `added` [n, C] float32, in the place of those
    from `first` on or after the last."""

    def __init__(self, table: Tensor, first: int, count: int):
        super().__init__(*table.shape, _weight=table, _freeze=True)
        self.first = first
        self.added = nn.Parameter(_mean(table[:first]).repeat(count, 1))

    def forward(self, ids: Tensor) -> Tensor:
        """[...] -> [..., C]"""
        last = len(self.added) - 1
        new = F.embedding((ids - self.first).clamp(0, last), self.added).to(self.weight.dtype)
        old = super().forward(ids.clamp(max=len(self.weight) - 1))
        within = (ids >= self.first) & (ids <= self.first + last)
        return torch.where(within[..., None], new, old)


class NewHead(nn.Module):
    """A frozen head with rows that learn, as NewEmbedding."""

    def __init__(self, base: nn.Linear | QuantisedLinear, first: int, count: int):
        super().__init__()
        self.base, self.first = base, first
        quantised = isinstance(base, QuantisedLinear)
        table = base.dequantise(slice(None), torch.float32) if quantised else base.weight
        self.added = nn.Parameter(_mean(table[:first]).repeat(count, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., rows]"""
        old = self.base(x)
        new = F.linear(x.to(self.added.dtype), self.added).to(old.dtype)
        after = old[..., self.first + len(self.added) :]
        return torch.cat([old[..., : self.first], new, after], -1)


def _mean(table: Tensor) -> Tensor:
    """[V, C] -> [1, C], float32 or better: where a new token begins, as any word."""
    wide = torch.promote_types(table.dtype, torch.float32)
    return table.detach().to(wide).mean(0, keepdim=True)


def add_rows(model: Llava, ids: Ids, whole: bool) -> None:
    """Rows of both tables for the new tokens, which learn. whole: as all others do; else the tables
    stay as they are. Raises ValueError where the two tables are one, and the rest of it frozen."""
    language, first, count = model.language_model, min(ids.values()), len(ids)
    rows = max(language.config.vocab_size, first + count)
    if whole:
        model.resize_token_embeddings(rows)
        for name in TABLES[: 1 if language.config.tie_word_embeddings else 2]:
            table = model.get_parameter(name)
            with torch.no_grad():
                table[first : first + count] = _mean(table[:first]).to(table.dtype)
        return
    if language.config.tie_word_embeddings:
        raise ValueError(
            "the model has one table for reading and for saying, of which new rows alone cannot "
            "learn; choose --learn language"
        )
    language.embed_tokens = NewEmbedding(language.embed_tokens.weight.detach(), first, count)
    language.lm_head = NewHead(language.lm_head, first, count)
    text = replace(language.config, vocab_size=rows)
    language.config, model.config = text, replace(model.config, text=text)


def whole_tables(model: Llava, folders: Folders) -> dict[str, Tensor]:
    """Both tables with their new rows, by our names, in the dtype that the model holds; of the
    base's files, since a head may be quantised. Empty if rows do not learn by themselves."""
    language = model.language_model
    if not isinstance(language.embed_tokens, NewEmbedding):
        return {}
    weights, dtype = open_parts(folders).weights, language.embed_tokens.weight.dtype
    found = {}
    for name, part in zip(TABLES, (language.embed_tokens, language.lm_head), strict=True):
        old, new = weights.read(name, dtype), part.added.detach().to("cpu", dtype)
        found[name] = torch.cat([old[: part.first], new, old[part.first + len(new) :]])
    return found
