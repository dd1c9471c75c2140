"""The sizes of a vision tower that no config.json describes, measured from its tensors."""

import math
import re
from dataclasses import replace
from pathlib import Path

from minillava.checkpoint.config_json import check_config
from minillava.checkpoint.names import OTHER_TOWERS, TABLES
from minillava.checkpoint.stored import StoredWeights
from minillava.config import LlavaConfig, TextConfig, VisionConfig

CLIP_DEPTHS = {768: 12, 1024: 24}  # width -> blocks of OpenAI's ViT-B and ViT-L

# how the hub calls those two; others of the same size may have another activation
_OPENAI = re.compile(r"clip-vit-(base|large)", re.IGNORECASE)


def settle(config: LlavaConfig, checkpoint: StoredWeights) -> LlavaConfig:
    """The config as the tensors complete it: the language model's as `settle_text`; a tower that no
    file describes is as large as its tensors. Raises ValueError for a tower whose other properties
    cannot be known."""
    text = settle_text(config.text, checkpoint)
    vision = config.vision if config.vision_stated else _measure_tower(config, checkpoint)
    pad = config.pad_token_id if config.pad_token_id < text.vocab_size else config.eos_token_ids[0]
    config = replace(config, text=text, vision=vision, pad_token_id=pad)
    check_config(config, checkpoint.folder / "config.json")
    return config


def settle_text(text: TextConfig, checkpoint: StoredWeights) -> TextConfig:
    """A stored head is the head, whatever `tie_word_embeddings` says; tables that an adapter's run
    resized are the vocabulary."""
    if TABLES[1] in checkpoint.tensors:
        text = replace(text, tie_word_embeddings=False)
    if checkpoint.rows is not None:
        text = replace(text, vocab_size=checkpoint.rows)
    return text


def _measure_tower(config: LlavaConfig, checkpoint: StoredWeights) -> VisionConfig:
    """OpenAI's CLIP of the size that the stored tensors have: its heads are 64 wide. A name that
    does not say so is noted. Raises ValueError for other widths, whose heads nobody can know."""
    prefix = "vision_tower.embeddings."
    names = (
        f"{prefix}position_embedding.weight",
        f"{prefix}patch_embedding.weight",
        "vision_tower.encoder.layers.0.mlp.fc1.weight",
    )
    if not all(name in checkpoint.tensors for name in names):
        return config.vision  # what is missing will be said
    positions, patches, mlp = map(checkpoint.shape, names)  # [P + 1, C], [C, 3, p, p], [F, C]
    named = config.vision_tower_name
    checkpoint.notes += _check_tower(checkpoint.folder, named, positions, patches)
    blocks = (
        re.match(r"vision_tower\.encoder\.layers\.(\d+)\.", name) for name in checkpoint.tensors
    )
    depth = 1 + max(int(block[1]) for block in blocks if block)
    width = patches[0]
    return replace(
        config.vision,
        hidden_size=width,
        intermediate_size=mlp[0],
        # The last blocks may have been left out, since no feature needs them: the index of a layer
        # counts them.
        num_hidden_layers=max(depth, CLIP_DEPTHS[width]),
        num_attention_heads=width // 64,
        image_size=math.isqrt(positions[0] - 1) * patches[2],
        patch_size=patches[2],
        num_channels=patches[1],
    )


def _check_tower(
    folder: Path, name: str | None, positions: tuple[int, ...], patches: tuple[int, ...]
) -> list[str]:
    """What to note of a tower of these shapes that no file describes. Raises ValueError for one
    that is not one of OpenAI's CLIPs, or of no size that these have."""
    advice = f"{folder}: config.json does not describe the vision tower {name or 'that lies there'}"
    step = (
        "add the `vision_config` that it was trained with, or pass its own folder with "
        "--vision-tower"
    )
    if OTHER_TOWERS.search(name or ""):
        raise ValueError(f"{advice}, which is not one of OpenAI's CLIPs; {step}")
    side = math.isqrt(max(positions[0] - 1, 0))
    if len(patches) != 4 or patches[2] != patches[3] or side < 1 or side * side != positions[0] - 1:
        found = f"{positions[0]} positions and patches of shape {list(patches)}"
        raise ValueError(f"{advice}, and {found} do not say how large its pictures are; {step}")
    if patches[0] not in CLIP_DEPTHS:
        raise ValueError(
            f"{advice}, and its width {patches[0]} does not say how many heads it has; {step}"
        )
    if not name or _OPENAI.search(name):
        return []
    return [
        f"{advice}, which is taken for one of OpenAI's CLIPs (quick_gelu, heads 64 wide) by its "
        f"size; if it is another, {step}"
    ]
