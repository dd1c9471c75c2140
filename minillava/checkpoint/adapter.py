"""LoRA (Hu et al. 2021): a fine-tune stored as two narrow matrices per layer, W' = W + scale · B·A.

Read from a folder as PEFT and LLaVA write it (adapter_config.json, adapter_model.safetensors or
.bin) and added to the weights when they are loaded; afterwards the model is a plain one. r rank, C
width before, N width after.
"""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minillava.files.disk import read_json
from minillava.files.tensors import Stored, open_file, several_sets

CONFIG_NAME, WEIGHTS_NAMES = (
    "adapter_config.json",
    ("adapter_model.safetensors", "adapter_model.bin"),
)

# <module path>.lora_A.weight as stored, <module path>.lora_A.default.weight as a live model names
# it
_HALF = re.compile(r"(.+)\.lora_([AB])(?:\.[^.]+)?\.weight")

# Settings that change the formula above when they are switched on; so does whatever is called use_*
# or *_config, ...
_VARIANTS = {
    "alora_invocation_tokens",
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
}

# ... but for these: the scale, which is computed below, and how the training began.
_KNOWN = {
    "use_rslora",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "runtime_config",
}

# How it began (init_lora_weights) does not matter afterwards ...
_BEGAN = ("true", "false", "none", "gaussian", "orthogonal", "eva", "mica")

# ... unless it changed the base, too, which the adapter does not hold. PEFT adds numbers:
# pissa_niter_16.
_MOVED = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Tensors of such variants (lora_embedding_A, lora_magnitude_vector, lora_diag, ...).
_SPECIAL = re.compile(r"lora_(?:\w*[a-z]\w*|[AB]\.(?:\w+\.)?bias)|trainable_tokens_\w+")

# What PEFT puts into the name of a weight that it keeps whole, and into that of one that was
# replaced.
WRAPPED, REPLACED = re.compile(r"\.(modules_to_save\.[^.]+|base_layer)\."), ".original_module."


class Delta(NamedTuple):
    """What a LoRA adds to one weight."""

    a: Stored  # [r, C]
    b: Stored  # [N, r]
    scale: float

    def add_to(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """weight + scale · B·A, the product and the sum in float32, then rounded once to `dtype`.

        `fan_in_fan_out` is ignored: it concerns layers that store their weight transposed, which no
        layer of LLaVA does, and PEFT itself switches it off for nn.Linear."""
        delta = (self.b.read().float() @ self.a.read().float()) * self.scale
        return (weight.float() + delta).to(dtype)


class Adapter:
    """deltas: name of a weight, as the run called it -> what it gains. whole: weights that it
    replaces (`modules_to_save`). everywhere: whether it should change all layers alike. Raises
    FileNotFoundError or ValueError.
    """

    def __init__(self, folder: Path):
        path = folder / CONFIG_NAME
        if not path.exists():
            raise FileNotFoundError(
                f"{folder}: holds no {CONFIG_NAME}, expected a LoRA as PEFT or LLaVA saves it"
            )
        config = read_json(path)
        if config.get("peft_type", "LORA") != "LORA":
            raise ValueError(f"{path}: peft_type is {config['peft_type']!r}, supported: LORA")
        _check_formula(path, config)
        there = [folder / name for name in WEIGHTS_NAMES if (folder / name).exists()]
        file = next(iter(there), None)
        if file is None:
            raise FileNotFoundError(
                f"{folder}: holds {CONFIG_NAME}, but no {' or '.join(WEIGHTS_NAMES)}; download it"
            )
        halves: dict[str, dict[str, Stored]] = {}
        self.whole: dict[str, Stored] = {}
        for stored in open_file(file):
            name = stored.name
            if found := _HALF.fullmatch(name):
                pair = halves.setdefault(f"{found[1]}.weight", {})
                if found[2] in pair:
                    raise ValueError(
                        f"{file}: {pair[found[2]].name} and {name} are two adapters; save one of "
                        "them"
                    )
                pair[found[2]] = stored
            elif special := _SPECIAL.search(name):
                raise ValueError(
                    f"{file}: {stored.name}: {special[0]} is not supported; merge it with PEFT "
                    "first"
                )
            elif REPLACED not in name:
                self.whole[WRAPPED.sub(".", name)] = stored
        self.path = file
        self.notes = [several_sets(file, there[1:])] if there[1:] else []
        self.deltas = {name: self._delta(name, pair, config, path) for name, pair in halves.items()}
        if not self.deltas:
            raise ValueError(f"{file}: holds no pair of lora_A and lora_B; download it again")
        self.everywhere = _is_in_every_layer(config)

    def _delta(
        self, name: str, pair: dict[str, Stored], config: dict[str, Any], path: Path
    ) -> Delta:
        if len(pair) < 2:
            (half,) = pair
            other = {"A": "B", "B": "A"}[half]
            raise ValueError(
                f"{self.path}: holds {pair[half].name}, but no lora_{other} for it; download it "
                "again"
            )
        a, b = pair["A"], pair["B"]
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or 0 in a.shape:
            shapes = f"{a.name} has shape {list(a.shape)} and lora_B {list(b.shape)}"
            raise ValueError(
                f"{self.path}: {shapes}, expected [r, C] and [N, r]; download it again"
            )
        # As in PEFT, a pattern fits the end of a module's path and its number goes before the
        # general one.
        alpha = config.get("lora_alpha", 8)
        patterns = config.get("alpha_pattern") or {}
        module = name.removesuffix(".weight").rpartition("base_model.model.")[2]
        try:
            alpha = next(
                (
                    value
                    for key, value in patterns.items()
                    if re.fullmatch(rf"(.*\.)?({key})", module)
                ),
                alpha,
            )
        except (AttributeError, re.error):
            raise ValueError(
                f"{path}: alpha_pattern is {patterns!r:.80}, expected numbers by module"
            ) from None
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not -1e6 < alpha < 1e6:
            raise ValueError(f"{path}: lora_alpha is {alpha!r:.80}, expected a number")
        rslora = config.get("use_rslora")
        if rslora not in (True, False, None):
            raise ValueError(f"{path}: use_rslora is {rslora!r:.80}, expected true or false")
        rank = a.shape[0]
        return Delta(a, b, alpha / (math.sqrt(rank) if rslora else rank))


def _is_in_every_layer(config: dict[str, Any]) -> bool:
    """Whether PEFT adapts its modules wherever they are: it chooses them by the end of their
    names."""
    narrowed = any(config.get(key) for key in ("layers_to_transform", "exclude_modules"))
    targets = config.get("target_modules")
    return isinstance(targets, list) and not narrowed and not any("." in str(t) for t in targets)


def _check_formula(path: Path, config: dict[str, Any]) -> None:
    """Raises ValueError naming a setting that makes W' differ from the formula in the module's
    docstring, or an unknown setting that may do so."""
    for key, value in config.items():
        variant = key in _VARIANTS or (
            (key.startswith("use_") or key.endswith("_config")) and key not in _KNOWN
        )
        if variant and value:
            raise ValueError(
                f"{path}: {key} is {value!r:.80}, which is not supported; merge it with PEFT first"
            )
    began = config.get("init_lora_weights", True)
    if str(began).lower().startswith(_MOVED):
        found = f"init_lora_weights is {began!r:.80}, which also changes the base model"
        raise ValueError(f"{path}: {found}; merge it with PEFT first")
    if str(began).lower() not in _BEGAN:
        found = (
            f"init_lora_weights is {began!r:.80}, which may change the base model, too; known: "
            f"{', '.join(_BEGAN)}"
        )
        raise ValueError(f"{path}: {found}; merge it with PEFT first")
