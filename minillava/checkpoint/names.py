"""The names that releases give to the same weights, and what wrappers put before them.

One table for each part of the model. Names that are dropped are written out, so that nothing
disappears in silence.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from minillava.checkpoint.adapter import CONFIG_NAME as ADAPTER_CONFIG_NAME
from minillava.checkpoint.adapter import WRAPPED
from minillava.files.tensors import Stored, holds_weights

# Stored prefix -> ours; where several fit, the longest wins. After the prefix, every dialect of
# LLaVA checkpoints uses the same names (`layers.0.self_attn.q_proj.weight`, ...), and so do we.
PREFIXES = {
    # on the hub (llava-hf), and as transformers 4.37 to 4.57 write it
    "language_model.model.": "language_model.",
    "language_model.lm_head.": "language_model.lm_head.",
    "vision_tower.vision_model.": "vision_tower.",
    "multi_modal_projector.": "projector.",
    # transformers 5, saving a model built from a config: as above, but
    "vision_tower.": "vision_tower.",
    # the module names of transformers 4.52 and later (raw state_dict, or
    # save_original_format=False)
    "model.language_model.": "language_model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.vision_model.": "vision_tower.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "projector.",
    # the original LLaVA (and see PROJECTOR)
    "model.": "language_model.",
    "model.vision_tower.vision_tower.vision_model.": "vision_tower.",
    "model.vision_tower.vision_tower.": "vision_tower.",
    "model.mm_projector.": "projector.linear_1.",
    "mm_projector.": "projector.linear_1.",  # as some pre-trains save it alone
    # LLaVA-1.6, and its module name, which is the original's, too
    "image_newline": "image_newline",
    "model.image_newline": "image_newline",
}

# Of the prefixes that are read, those that are written: each stands for one part of the model.
LAYOUTS = {
    "hf": (
        "language_model.model.",
        "language_model.lm_head.",
        "vision_tower.vision_model.",
        "multi_modal_projector.",
        "image_newline",
    ),
    "original": (
        "model.",
        "lm_head.",
        "model.vision_tower.vision_tower.vision_model.",
        "model.mm_projector.",
        "model.image_newline",
    ),
}

# The original's projector of one layer has no number, one of N has 0, 2, 4, ...: between them stand
# the GELUs.
PROJECTOR = re.compile(r"(?:model\.)?mm_projector\.(\d*[02468])\.")

CLIP_PREFIXES = {"vision_model.": "vision_tower.", "": "vision_tower."}  # a CLIP folder of its own

OTHER_TOWERS = re.compile(
    r"laion|open_?clip|datacomp|siglip|eva|dfn|metaclip|dino|intern", re.IGNORECASE
)

# Stored names that are never weights of ours, by the end of the name: tables that are computed from
# the config.
COMPUTED = (".position_ids", ".inv_freq")

# The other half of a whole CLIP: its text tower and the heads that compare the two.
CLIP_TEXT_HALF = (
    "text_model.",
    "text_projection.",
    "visual_projection.",
    "logit_scale",
    "logit_bias",
)

# What wraps a model in training and then stands in its names: data parallel, torch.compile, FSDP,
# Fabric, PEFT.
WRAPPERS = {
    "module",
    "_module",
    "_orig_mod",
    "_forward_module",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
}

PEFT_PREFIX = "base_model.model."

# How names begin that no wrapper stands in front of ...
STARTS = {
    prefix.partition(".")[0] for prefix in (*PREFIXES, *CLIP_PREFIXES, *CLIP_TEXT_HALF, PEFT_PREFIX)
} - {""}

# the vision half of a CLIP alone
STARTS |= {"embeddings", "encoder", "pre_layrnorm", "post_layernorm"}

# ... but for a model that another one holds as its `model`.
TWO_MODELS = (
    "model.model.",
    "model.lm_head.",
    "model.language_model.model.",
    "model.language_model.lm_head.",
)

# The files beside a language model: a projector trained alone, and what a LoRA run trained besides
# its adapter.
PROJECTOR_NAME, REST_NAME = "mm_projector.bin", "non_lora_trainables.bin"

TABLES = ("language_model.embed_tokens.weight", "language_model.lm_head.weight")


def part_of_model(folder: Path) -> str | None:
    """The part of a LLaVA in a folder without a language model, in words; None for a whole model or
    for no part."""
    if holds_weights(folder):
        return None
    parts = {
        ADAPTER_CONFIG_NAME: "a LoRA adapter",
        PROJECTOR_NAME: "a projector",
        REST_NAME: "a part of a LoRA run",
    }
    return next((words for name, words in parts.items() if (folder / name).exists()), None)


def unwrapped(tensors: Sequence[Stored]) -> list[tuple[str, Stored]]:
    """Tensors by their names without wrappers (`unwrap`)."""
    return (
        list(
            zip(unwrap([stored.name for stored in tensors], tensors[0].path), tensors, strict=True)
        )
        if tensors
        else []
    )


def unwrap(names: Sequence[str], path: Path) -> list[str]:
    """Names without what training programs put around a model: `module.` and the like wherever they
    stand, and before all names one component that no dialect begins with.

    Raises ValueError naming the file if only some names begin with a wrapper: they may come from
    two training runs.
    """
    names, before = [WRAPPED.sub(".", name) for name in names], None
    while names != before:
        before, first = names, {name.partition(".")[0] for name in names}
        if all(name.startswith(PEFT_PREFIX) for name in names):
            names = [name.removeprefix(PEFT_PREFIX) for name in names]
        elif len(first) == 1 and not first & STARTS and all("." in name for name in names):
            names = [name.partition(".")[2] for name in names]
        elif first == {"model"} and any(name.startswith(TWO_MODELS) for name in names):
            names = [name.removeprefix("model.") for name in names]
        else:
            wrapped = [
                name
                for name in names
                if name.partition(".")[0] in WRAPPERS or name.startswith(PEFT_PREFIX)
            ]
            if wrapped:
                found = (
                    f"{len(wrapped)} of {len(names)} names begin with a wrapper, such as "
                    f"{wrapped[0]}"
                )
                raise ValueError(
                    f"{path}: {found}, the others do not; save the tensors of one model, unwrapped"
                )
            names = [
                ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in names
            ]
    return names


def renamed(stored: str, prefixes: dict[str, str]) -> str:
    """Our name for a stored one; a name no prefix fits stays as it is, to be reported as
    unexpected."""
    if layer := PROJECTOR.match(stored):
        return f"projector.linear_{int(layer[1]) // 2 + 1}.{stored[layer.end() :]}"
    fitting = [p for p in prefixes if stored.startswith(p)]
    longest = max(fitting, key=len, default=None)
    return stored if longest is None else prefixes[longest] + stored.removeprefix(longest)


def stored_name(name: str, to: str, projector_layers: int) -> str:
    """The stored name for one of ours: PREFIXES and PROJECTOR read from right to left, for a layout
    of LAYOUTS."""
    layer = re.match(r"projector\.linear_(\d+)\.", name)
    if to == "original" and layer and projector_layers > 1:
        return f"model.mm_projector.{2 * int(layer[1]) - 2}.{name[layer.end() :]}"
    stored = {PREFIXES[prefix]: prefix for prefix in LAYOUTS[to]}
    ours = max((prefix for prefix in stored if name.startswith(prefix)), key=len)
    return stored[ours] + name.removeprefix(ours)
