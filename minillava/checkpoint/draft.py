"""A small model that guesses for a large one, from its folder: a Llama alone, or a LLaVA."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minillava.checkpoint.build import check_depth, compare, fill, shapes_of
from minillava.checkpoint.config_json import is_language_model, read_text_config
from minillava.checkpoint.stored import StoredWeights
from minillava.checkpoint.towers import settle_text
from minillava.config import TextConfig
from minillava.fast.packed import is_packed, pack_layers
from minillava.files.tokenizer_files import find_tokenizer
from minillava.llama import LanguageModel
from minillava.tokenizer import Tokenizer


class Alone(nn.Module):
    """A language model by the names that it has in a LLaVA."""

    def __init__(self, config: TextConfig, attend: Callable[..., Any]):
        super().__init__()
        self.language_model = LanguageModel(config, attend)


def open_language_model(
    folder: Path, attend: Callable[..., Any], dtype: torch.dtype, device: torch.device
) -> Alone:
    """The Llama of a folder. Raises FileNotFoundError or ValueError as `build_model` does."""
    weights = StoredWeights(folder)
    config = settle_text(read_text_config(folder), weights)
    check_depth(config.num_hidden_layers, weights)
    with torch.device("meta"):
        model = Alone(config, attend)
    compare(weights, shapes_of(model)).refuse(weights)
    fill(model, weights, shapes_of(model), dtype, device)
    return model.eval()


def open_small(
    folder: Path,
    large: LanguageModel,
    tokenizer: Tokenizer,
    load: Callable[..., Any],
    speed_up: Callable[[nn.Module, LanguageModel], None] | None,
) -> tuple[LanguageModel, Callable[..., Tensor] | None]:
    """The small model of a folder and, for a LLaVA, what makes its vectors of ids and pictures.
    load: opens a LLaVA. speed_up: makes a model fast; None: it adds up as transformers does. Raises
    as `open_language_model`, or ValueError if it knows other words."""
    weight, see = large.embed_tokens.weight, None
    small: Any
    if is_language_model(folder):
        small = open_language_model(folder, large.attend, weight.dtype, weight.device)
        if speed_up is not None:
            speed_up(small, small.language_model)
    else:
        attention = "eager" if speed_up is None else "fused"
        other = load(folder, device=weight.device, dtype=weight.dtype, attention=attention)
        small, see = other.model, other.embed
    check_same_words(folder, small.language_model.config, tokenizer)
    if is_packed(large):  # what a guess costs is told by the sizes of both
        pack_layers(small.language_model)
    return small.language_model, see


def check_same_words(folder: Path, config: TextConfig, tokenizer: Tokenizer) -> None:
    """Raises ValueError if the folder's tokenizer knows other words: a guess is an id, so ids must
    mean the same. Tables may be padded to different numbers of rows."""
    known = tokenizer.sentencepiece.vocab_size()
    if config.vocab_size < known:
        raise ValueError(
            f"{folder}: has a vocabulary of {config.vocab_size} tokens, the model one of {known}; "
            "drafts need the same tokenizer"
        )
    found, beside = find_tokenizer([folder])
    if not found.is_file():
        return  # no file says that the ids differ
    ours, theirs = tokenizer.sentencepiece, Tokenizer(found, beside=beside).sentencepiece
    if theirs.vocab_size() != known or any(
        ours.id_to_piece(i) != theirs.id_to_piece(i) for i in range(known)
    ):
        raise ValueError(
            f"{folder}: its tokenizer is another than the model's; drafts need the same one"
        )
