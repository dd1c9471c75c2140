"""Medusa's heads from a folder, in each of the layouts in which they are published.

    medusa_lm_head.pt           k.j.linear.weight, k.j.linear.bias, k.n.weight   (Medusa)
    medusa_lm_head.safetensors  k.j.linear.weight, k.j.linear.bias               (shared vocabulary)
    a model's own files         medusa_head.k.… beside the model's tensors       (Medusa-2)
    a model's own files         blocks.k.layers.j.weight, lm_heads.k.weight      (vLLM)

The number of heads and of their layers is read from the names: that of config.json is wrong in some
published folders.
"""

import re
from pathlib import Path

from torch import Tensor

from minillava.config import TextConfig
from minillava.files.tensors import Stored, holds_weights, open_file, open_folder

HEADS_NAME = "medusa_lm_head.safetensors"

FILES = (HEADS_NAME, "medusa_lm_head.pt")

TOKEN_MAP = "token_map"
"""vLLM's name of the tokens that a truncated vocabulary knows."""

_OURS = re.compile(r"(\d+)\.(\d+)\.(linear\.weight|linear\.bias|weight)")

_PREFIX = re.compile(r"medusa_heads?\.")


def open_heads(
    folder: Path, config: TextConfig, words: int
) -> tuple[dict[str, Tensor], list[int] | None]:
    """The tensors of a folder's heads by the names of the first layout, and the tokens that the
    rows of their vocabularies mean, None if row i is token i. config: of the model. words: how many
    tokens its tokenizer knows. Raises FileNotFoundError or ValueError in one line if there are no
    heads, or they are another model's."""
    stored = _find(folder)
    mapped = stored.pop(TOKEN_MAP, None)
    tokens = None if mapped is None else mapped.file.read(mapped.name).tolist()
    named = _rename_vllm(stored)
    path = next(iter(stored.values())).path
    _check(path, named, config.hidden_size)
    tensors = {name: found.read() for name, found in named.items()}
    rows = {len(tensor) for name, tensor in tensors.items() if _is_vocabulary(name)}
    if tokens is not None and rows != {len(tokens)}:
        # a vocabulary of all tokens, of which the map names the frequent ones
        tokens = None
    most = config.vocab_size
    if tokens is not None and not all(0 <= token < most for token in tokens):
        raise ValueError(f"{path}: {TOKEN_MAP} names tokens that the model does not have")
    if tokens is None and rows and not words <= min(rows) <= max(rows) <= most:
        raise ValueError(
            f"{path}: its heads have a vocabulary of {max(rows)} tokens, the model one of "
            f"{most}; they were trained for another model"
        )
    return tensors, tokens


def _find(folder: Path) -> dict[str, Stored]:
    """The heads' tensors by their names without a prefix. Raises FileNotFoundError if there are
    none, ValueError for a file of heads with other tensors."""
    for name in FILES:
        if (folder / name).exists():
            found = {_PREFIX.sub("", s.name): s for s in open_file(folder / name)}
            strange = [name for name in found if not _is_of_heads(name)]
            if strange or not found:
                raise ValueError(
                    f"{folder / name}: holds {[*strange, 'nothing'][0]}, expected heads of Medusa, "
                    "such as 0.0.linear.weight"
                )
            return found
    listed = open_folder(folder) if holds_weights(folder) else []
    found = {_PREFIX.sub("", s.name): s for s in listed}
    found = {name: s for name, s in found.items() if _is_of_heads(name)}
    if not found:
        raise FileNotFoundError(
            f"{folder}: has no heads of Medusa; expected {FILES[0]} or {FILES[1]}; train some "
            "with: python -m minillava.finetune MODEL DATA --learn medusa --out DIR"
        )
    return found


def _is_of_heads(name: str) -> bool:
    vllm = re.fullmatch(r"blocks\.\d+\.layers\.\d+\.(weight|bias)|lm_heads\.\d+\.weight", name)
    return bool(_OURS.fullmatch(name) or vllm or name == TOKEN_MAP)


def _is_vocabulary(name: str) -> bool:
    return not name.split(".", 2)[2].startswith("linear.")


def _rename_vllm(stored: dict[str, Stored]) -> dict[str, Stored]:
    """vLLM's names as the others'. A single vocabulary is that of all heads."""
    if any(_OURS.fullmatch(name) for name in stored):
        return stored
    named, layers = {}, 0
    for name, found in stored.items():
        if name.startswith("blocks."):
            _, head, _, layer, kind = name.split(".")
            named[f"{head}.{layer}.linear.{kind}"] = found
            layers = max(layers, int(layer) + 1)
    heads = {name.split(".")[0] for name in named}
    only = stored.get("lm_heads.0.weight")
    for head in heads:
        own = stored.get(f"lm_heads.{head}.weight", only)
        if own is not None:
            named[f"{head}.{layers}.weight"] = own
    return named


def _check(path: Path, named: dict[str, Stored], width: int) -> None:
    """Raises ValueError naming a tensor that is missing, of a wrong shape or one too many."""
    parts = [match.groups() for name in named if (match := _OURS.fullmatch(name))]
    layers = {(int(head), int(layer)) for head, layer, kind in parts if kind == "linear.weight"}
    heads = 1 + max((int(head) for head, _, _ in parts), default=0)
    depth = 1 + max((layer for _, layer in layers), default=0)
    expected = {f"{k}.{j}.linear.weight" for k in range(heads) for j in range(depth)}
    if any(kind == "linear.bias" for _, _, kind in parts):
        expected |= {f"{k}.{j}.linear.bias" for k in range(heads) for j in range(depth)}
    if any(kind == "weight" for _, _, kind in parts):
        expected |= {f"{k}.{depth}.weight" for k in range(heads)}
    if missing := sorted(expected - set(named)):
        raise ValueError(f"{path}: {missing[0]} is missing; download it again")
    if strange := sorted(set(named) - expected):
        raise ValueError(f"{path}: {strange[0]} belongs to no head; download it again")
    for name, found in named.items():
        shape = list(found.shape)
        square = [width] if name.endswith("bias") else [width, width]
        fits = shape[1:] == [width] and len(shape) == 2 if _is_vocabulary(name) else shape == square
        if not fits:
            raise ValueError(
                f"{path}: {found.name} has shape {shape}, but the model's hidden size is {width}; "
                "the heads were trained for another model"
            )
