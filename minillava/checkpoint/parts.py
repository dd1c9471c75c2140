"""The parts of one model, from the folders that have them."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from minillava.checkpoint.adapter import CONFIG_NAME as ADAPTER_CONFIG_NAME
from minillava.checkpoint.config_json import LANGUAGE_MODELS, read_config
from minillava.checkpoint.folders import Folders
from minillava.checkpoint.names import (
    CLIP_PREFIXES,
    CLIP_TEXT_HALF,
    PROJECTOR_NAME,
    REST_NAME,
    part_of_model,
    unwrapped,
)
from minillava.checkpoint.side_json import read_image_processor
from minillava.checkpoint.stored import StoredWeights
from minillava.checkpoint.towers import settle
from minillava.config import IMAGE_TOKEN_INDEX, LlavaConfig
from minillava.files.disk import read_json
from minillava.files.hub import CLIP_RELEASE
from minillava.files.tensors import holds_weights, open_file
from minillava.files.tokenizer_files import find_tokenizer
from minillava.image import ImageProcessor
from minillava.prompt import IMAGE_MARKER
from minillava.tokenizer import Tokenizer


class Parts(NamedTuple):
    """The parts of an assistant, before any weight is read."""

    config: LlavaConfig
    weights: StoredWeights
    tokenizer: Tokenizer
    image_processor: ImageProcessor

    def rows_needed(self) -> int:
        """The rows that an embedding table has at least, so that every added token has one."""
        ids = [self.tokenizer.added[token] for token in self.config.added_tokens]
        return max(ids, default=-1) + 1


def open_parts(folders: Folders, aspect: str | None = None) -> Parts:
    """The parts of a whole model. aspect: pad, crop or squash, instead of what config.json
    says. Raises FileNotFoundError, OSError or ValueError, as `load`."""
    check_base(folders)
    weights, config = open_checkpoint(folders, read_model_config(folders))
    tokenizer = open_tokenizer(folders.of_tokenizer, config)
    image = config.image_token_id
    is_piece = 0 <= image < tokenizer.vocab_size and tokenizer.piece(image) != IMAGE_MARKER
    if is_piece or tokenizer.written_as(image):
        # LLaVA's own config.json names no id for pictures, and 32000 may be a word: penalties must
        # tell them apart.
        config = replace(config, image_token_id=IMAGE_TOKEN_INDEX)
    processor = read_image_processor(folders.of_pictures, config, aspect)
    return Parts(config, weights, tokenizer, processor)


def read_model_config(folders: Folders) -> LlavaConfig:
    """The configuration of the model, from its own config.json or its base's. Raises
    FileNotFoundError or ValueError."""
    home, base = folders.find("config.json"), folders.model_base
    if home == base and read_json(base / "config.json").get("model_type") in LANGUAGE_MODELS:
        raise FileNotFoundError(
            f"{folders.weights}: holds no config.json, and its base {base} is not a LLaVA; copy "
            "the config.json that the finished training saved"
        )
    return read_config(home, folders.vision_tower)


def collect_parts(folders: Folders, vocabulary: int | None = None) -> StoredWeights:
    """The tensors of one model from the folders that hold them; which is which is read from their
    files, not their names. vocabulary: the rows that the tables of a base grow to. Raises
    FileNotFoundError or ValueError.
    """
    check_base(folders)
    folder = folders.weights
    part = part_of_model(folder)
    if folders.model_base is None:
        weights = StoredWeights(folder)
    else:
        weights = StoredWeights(folders.model_base, vocabulary=vocabulary)
        weights.folder = folder
    if folders.vision_tower is not None:
        if any(name.startswith("vision_tower.") for name in weights.tensors):
            weights.notes.append(
                f"{folder}: holds a vision tower of its own, which may have been trained further; "
                f"{folders.vision_tower} takes its place"
            )
        weights.set_aside(lambda name: name.startswith("vision_tower."))
        clip = StoredWeights(folders.vision_tower, CLIP_PREFIXES, dropped=CLIP_TEXT_HALF)
        weights.tensors.update(clip.tensors)
        weights.unused += clip.unused
        weights.notes += clip.notes
    if part and (folder / PROJECTOR_NAME).exists():
        weights.override(unwrapped(open_file(folder / PROJECTOR_NAME)))
    if part and (folder / ADAPTER_CONFIG_NAME).exists():
        weights.add_lora(folder)
    elif part and (folder / REST_NAME).exists():
        raise FileNotFoundError(
            f"{folder}: holds {REST_NAME}, but no {ADAPTER_CONFIG_NAME}; download the adapter too"
        )
    if folders.adapter is not None:
        weights.add_lora(folders.adapter)
    return weights


def check_base(folders: Folders) -> None:
    """Check that a part has a base and a whole model has none. Raises FileNotFoundError naming the
    base, or ValueError."""
    folder, model_base = folders.weights, folders.model_base
    part = part_of_model(folder)
    if holds_weights(folder) and (folder / ADAPTER_CONFIG_NAME).exists():
        raise ValueError(
            f"{folder}: holds a language model and a LoRA adapter ({ADAPTER_CONFIG_NAME}); remove "
            "the adapter if it is "
            "merged already, else move it to a folder of its own and pass that with --adapter"
        )
    if part and model_base is None:
        path = folder / ADAPTER_CONFIG_NAME
        base = read_json(path).get("base_model_name_or_path") if path.exists() else None
        named = f" ({base})" if base else ""
        raise FileNotFoundError(
            f"{folder}: holds {part} and no language model; pass the folder of the one it was "
            f"trained on{named} "
            "with --model-base"
        )
    if model_base is not None and not part:
        found = "a language model of its own" if holds_weights(folder) else "no weights"
        raise ValueError(
            f"{folder}: holds {found}, so --model-base has nothing to complete; leave it out"
        )


def open_checkpoint(folders: Folders, config: LlavaConfig) -> tuple[StoredWeights, LlavaConfig]:
    """`collect_parts`, and a check that vision tower and projector are there. What the selected
    features do not need (the tower's last block, `post_layernorm`) is set aside as unused. Also
    returns the config as the tensors complete it (`settle`). Raises FileNotFoundError naming what
    to get when a part is missing: without values it would stay random."""
    weights, folder = collect_parts(folders, config.text.vocab_size), folders.weights
    if not any(name.startswith("vision_tower.") for name in weights.tensors):
        wanted = config.vision_tower_name or CLIP_RELEASE
        raise FileNotFoundError(
            f"{folder}: holds no vision tower, as the original releases do; download {wanted} "
            "and pass its folder with --vision-tower"
        )
    if not any(name.startswith("projector.") for name in weights.tensors):
        raise FileNotFoundError(
            f"{folder}: holds no projector, without which the model cannot see; expected "
            f"multi_modal_projector or mm_projector tensors, or {PROJECTOR_NAME} or {REST_NAME} "
            "beside them; is this a language model alone?"
        )
    config = settle(config, weights)

    def unread(name: str) -> bool:
        block = re.match(r"vision_tower\.encoder\.layers\.(\d+)\.", name)
        blocks = range(config.vision_layers_needed, config.vision.num_hidden_layers)
        after = name.startswith(("vision_tower.post_layernorm.", "vision_tower.head."))
        # what ends the rows of tiles is stored also where a model reads none
        after = after or (name == "image_newline" and config.vision.siglip and not config.grid)
        return after or (block is not None and int(block[1]) in blocks)

    weights.set_aside(unread)
    return weights, config


def open_tokenizer(folders: Sequence[Path], config: LlavaConfig | None = None) -> Tokenizer:
    """The tokenizer of a model whose files lie in several folders, the first that has them first;
    checked against its config. Raises as Tokenizer does."""
    path, beside = find_tokenizer(folders)
    if config is None:
        return Tokenizer(path, beside=beside)
    return Tokenizer(
        path, added=config.added_tokens, beside=beside, vocabulary=config.text.vocab_size
    )
