"""A network of the right shape without memory, filled strictly from the stored tensors."""

import re
from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from minillava.checkpoint.names import TABLES
from minillava.checkpoint.stored import StoredWeights
from minillava.config import LlavaConfig
from minillava.fast.quantize import quantised_layer, quantize_tensor
from minillava.llama import grow_rows
from minillava.llava import Llava


def build_model(
    config: LlavaConfig,
    checkpoint: StoredWeights,
    attend: Callable[..., Any],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    quantize: str | None = None,
    tokens: int = 0,
) -> Llava:
    """The network, built without memory of its own (meta device) and filled with the checkpoint's
    tensors.

    At the checkpoint's own dtype on the CPU these stay memory-mapped; otherwise they are converted
    one by one. quantize: one of quantize.KINDS, for the language model's linear layers. tokens:
    rows its tables need at least. Raises ValueError listing every missing, unexpected and
    wrong-shaped tensor.
    """
    depth = max(config.text.num_hidden_layers, config.vision.num_hidden_layers)
    # before anybody builds a billion layers
    if depth > len(checkpoint.tensors) + len(checkpoint.unused):
        found = (
            f"num_hidden_layers is {depth}, which is more than there are tensors "
            f"({len(checkpoint.tensors)})"
        )
        raise ValueError(
            f"{checkpoint.folder}: {found}; check that config.json belongs to these weights"
        )
    with torch.device("meta"):
        model = Llava(config, attend)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _compare(checkpoint, expected)
    if tokens > config.text.vocab_size:
        with torch.device("meta"):
            model = Llava(replace(config, text=replace(config.text, vocab_size=tokens)), attend)
    if quantize and checkpoint.quantised:
        raise ValueError(f"{checkpoint.folder}: is quantised already; leave --quantize out")
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        module = name.rpartition(".")[0]
        small = (
            bool(quantize)
            and name.startswith("language_model.")
            and isinstance(model.get_submodule(module), nn.Linear)
        )
        if name in checkpoint.quantised:
            parts = {  # int4 is packed anew
                suffix: stored.file.read(stored.name, transient=suffix == "weight_int4")
                for suffix, stored in checkpoint.quantised[name].items()
            }
            if checkpoint.shape(name) != tensor.shape:
                stands, wanted = list(checkpoint.shape(name)), list(tensor.shape)
                raise ValueError(
                    f"{checkpoint.folder}: {name} is quantised with shape {stands}, expected "
                    f"{wanted}"
                )
        else:
            transient = small or torch.device(device).type != "cpu"
            whole = checkpoint.read(name, None if small else dtype, transient)
            whole = (grow_rows(whole, len(tensor)) if name in TABLES else whole).to(device)
            parts = quantize_tensor(whole, quantize) if quantize and small else {}
        if parts:
            layer = quantised_layer({suffix: part.to(device) for suffix, part in parts.items()})
            model.set_submodule(module, layer)
            state |= layer.state_dict(prefix=f"{module}.")
        else:
            state[name] = whole
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def _compare(checkpoint: StoredWeights, expected: dict[str, tuple[int, ...]]) -> None:
    missing = [name for name in expected if name not in checkpoint.tensors]
    unexpected = [name for name in checkpoint.tensors if name not in expected]
    problems = []
    for name in sorted(set(expected) & set(checkpoint.tensors)):
        shape = checkpoint.shape(name)
        if shape != expected[name]:
            found = f"{checkpoint.tensors[name].name} has shape {list(shape)}"
            problems.append(
                (
                    checkpoint.tensors[name].path,
                    f"{found}, config.json expects {list(expected[name])}",
                )
            )
    near = _nearest(missing, {name: checkpoint.tensors[name].name for name in unexpected})
    problems += [(checkpoint.folder, f"{name} is missing{near[name]}") for name in missing]
    near = _nearest(unexpected, {name: name for name in expected})
    for name in unexpected:
        stored = checkpoint.tensors[name]
        problems.append((stored.path, f"{stored.name} is not part of this model{near[name]}"))
    if problems:
        path, first = problems[0]
        advice = "check that config.json belongs to these weights, or download the folder again"
        others = [
            problem if path == checkpoint.folder else f"{path}: {problem}"
            for path, problem in problems[1:]
        ]
        raise ValueError(
            "\n  ".join(
                [f"{path}: {first}; {len(problems)} tensor(s) do not fit: {advice}", *others]
            )
        )


def _nearest(names: list[str], known: dict[str, str]) -> dict[str, str]:
    """For each name a hint at what it may have been meant to be. known: candidate -> how to show
    it.

    Layers have the same names up to their numbers, so names are compared without them: a thousand
    wrong names then cost a few dozen comparisons.
    """
    numbers = re.compile(r"\d+")
    # name without numbers -> numbers -> how to show it
    groups: dict[str, dict[tuple[str, ...], str]] = {}
    for name, shown in known.items():
        groups.setdefault(numbers.sub("#", name), {})[tuple(numbers.findall(name))] = shown
    hints: dict[str, str] = {}
    closest: dict[str, str | None] = {}
    for name in names:
        form = numbers.sub("#", name)
        if form not in closest:
            closest[form] = next(iter(get_close_matches(form, groups, n=1)), None)
        group = groups.get(closest[form] or "")
        if group:
            shown = group.get(tuple(numbers.findall(name)), next(iter(group.values())))
        hints[name] = f" (nearest: {shown})" if group else ""
    return hints
