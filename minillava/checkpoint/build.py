"""A network of the right shape without memory, filled strictly from the stored tensors."""

import ctypes
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minillava.checkpoint.names import TABLES
from minillava.checkpoint.stored import StoredWeights
from minillava.config import LlavaConfig
from minillava.fast.packed import PackedLinear, check_pack
from minillava.fast.parallel import WHOLE, Share
from minillava.fast.quantize import (
    INT4_PACKED,
    ORDER,
    TILE,
    QuantisedLinear,
    packed_order,
    quantised_layer,
    read_order,
    unpack_whole,
)
from minillava.files.rows import grow_rows
from minillava.llava import Llava
from minillava.tiles.model import network

Shape = tuple[int, ...]


def build_model(
    config: LlavaConfig,
    weights: StoredWeights,
    attend: Callable[..., Any],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    quantize: str | None = None,
    pack: bool = False,
    min_rows: int = 0,
    share: Share = WHOLE,
) -> Llava:
    """The network, built without memory of its own (meta device) and filled with the stored
    tensors.

    At their own dtype on the CPU these stay memory-mapped; otherwise they are converted one by one.
    quantize: one of options.KINDS, for the language model's linear layers. pack: whether these
    become PackedLinear. min_rows: of its tables. share: which part of the weights is this
    process's. Raises ValueError listing every missing, unexpected and wrong-shaped tensor.
    """
    check_depth(max(config.text.num_hidden_layers, config.vision.num_hidden_layers), weights)
    model = _without_memory(config, attend)
    compare(weights, shapes_of(model)).refuse(weights)
    if min_rows > config.text.vocab_size:
        config = replace(config, text=replace(config.text, vocab_size=min_rows))
        model = _without_memory(config, attend)
    if pack:
        check_pack(dtype, device, quantize or weights.quantised, attend)
    if quantize and weights.quantised:
        raise ValueError(f"{weights.folder}: is quantised already; leave --quantize out")
    part = model if share == WHOLE else _part_without_memory(config, attend, share)
    fill(part, weights, shapes_of(model), dtype, torch.device(device), quantize, share, pack)
    part.config, part.language_model.config = config, config.text
    return part.eval()


def shapes_of(model: nn.Module) -> dict[str, Shape]:
    """Our name -> shape of every tensor that a model is filled with."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


class Differences(NamedTuple):
    """How stored tensors differ from those of a network."""

    missing: list[str]  # our names
    unexpected: list[str]  # our names, of tensors that the network does not have
    misshapen: dict[str, tuple[Shape, Shape]]  # our name -> the shape found, the shape expected

    def refuse(self, weights: StoredWeights) -> None:
        """Raises ValueError listing all of them, each with the nearest known name."""
        problems = [
            (weights.tensors[name].path, self.shapes_told(name, weights)) for name in self.misshapen
        ]
        stored = {name: weights.tensors[name].name for name in self.unexpected}
        near = _nearest(self.missing, stored)
        problems += [(weights.folder, f"{name} is missing{near[name]}") for name in self.missing]
        known = [name for name in weights.tensors if name not in stored] + self.missing
        near = _nearest(self.unexpected, {name: name for name in known})
        problems += [
            (weights.tensors[name].path, f"{found} is not part of this model{near[name]}")
            for name, found in stored.items()
        ]
        if not problems:
            return
        path, first = problems[0]
        advice = "check that config.json belongs to these weights, or download the folder again"
        others = [
            problem if path == weights.folder else f"{path}: {problem}"
            for path, problem in problems[1:]
        ]
        first = f"{path}: {first}; {len(problems)} tensor(s) do not fit: {advice}"
        raise ValueError("\n  ".join([first, *others]))

    def shapes_told(self, name: str, weights: StoredWeights) -> str:
        """A sentence about a tensor of `misshapen`."""
        found, expected = map(list, self.misshapen[name])
        return f"{weights.tensors[name].name} has shape {found}, config.json expects {expected}"


def compare(weights: StoredWeights, expected: dict[str, Shape]) -> Differences:
    """Compare stored tensors with the names and shapes of a network."""
    return Differences(
        [name for name in expected if name not in weights.tensors],
        [name for name in weights.tensors if name not in expected],
        {
            name: (weights.shape(name), expected[name])
            for name in sorted(set(expected) & set(weights.tensors))
            if weights.shape(name) != expected[name]
        },
    )


def check_depth(depth: int, weights: StoredWeights) -> None:
    """Raises ValueError if the config has more layers than there are tensors, before a billion
    layers are built."""
    if depth > len(weights.tensors) + len(weights.unused):
        found = (
            f"num_hidden_layers is {depth}, which is more than there are tensors "
            f"({len(weights.tensors)})"
        )
        raise ValueError(
            f"{weights.folder}: {found}; check that config.json belongs to these weights"
        )


def _without_memory(config: LlavaConfig, attend: Callable[..., Any]) -> Llava:
    with torch.device("meta"):
        return network(config, attend)


def _part_without_memory(config: LlavaConfig, attend: Callable[..., Any], share: Share) -> Llava:
    """The network of one process: its heads, its columns, and its tokens of the head."""
    part = _without_memory(replace(config, text=share.config(config.text)), attend)
    if not config.text.tie_word_embeddings:
        first, end = share.bounds(config.text.vocab_size, TILE)
        part.language_model.lm_head = nn.Linear(
            config.text.hidden_size, end - first, bias=False, device="meta"
        )
    return part


def fill(
    model: nn.Module,
    weights: StoredWeights,
    shapes: dict[str, Shape],
    dtype: torch.dtype,
    device: torch.device,
    quantize: str | None = None,
    share: Share = WHOLE,
    pack: bool = False,
) -> None:
    """Give the model its tensors, or its share of them; linear layers that are, or become,
    quantised or packed are replaced. shapes: of the whole tensors."""
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if not share.has(name):
            state[name] = tensor  # without memory for good
            continue
        module = name.rpartition(".")[0]
        linear = (
            name.startswith("language_model.")
            and isinstance(model.get_submodule(module), nn.Linear)
            and name.endswith(".weight")
        )
        if name in weights.quantised:
            parts = _read_quantised(weights, name, shapes[name], device, share)
        elif linear and quantize is not None:
            # nothing here keeps the whole, so that it goes before its part is packed
            parts = _quantised(weights, name, shapes[name][0], device, quantize, share)
        elif linear and pack:
            parts = {"weight": _read_part(weights, name, shapes[name], dtype, device, share, True)}
        else:
            state[name] = _read_part(weights, name, shapes[name], dtype, device, share)
            continue
        layer = layer_of({suffix: part.to(device) for suffix, part in parts.items()})
        layer.bias = model.get_submodule(module).bias  # its numbers come with its own name
        model.set_submodule(module, layer)
        state |= layer.state_dict(prefix=f"{module}.")
        del parts
        give_back()
    model.load_state_dict(state, strict=True, assign=True)


def layer_of(parts: dict[str, Tensor]) -> QuantisedLinear:
    """The layer in place of an nn.Linear, for the parts of its weight or the weight itself."""
    return PackedLinear(**parts) if set(parts) == {"weight"} else quantised_layer(parts)


def _read(
    weights: StoredWeights, name: str, rows: int, dtype: torch.dtype | None, transient: bool
) -> Tensor:
    """A tensor; a table has as many rows as the network's."""
    whole = weights.read(name, dtype, transient)
    return grow_rows(whole, rows) if name in TABLES else whole


def _read_part(
    weights: StoredWeights,
    name: str,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    share: Share,
    transient: bool = False,
) -> Tensor:
    """This process's part of a tensor that is not quantised. It is cut before it is converted: a
    view of what was converted would keep the whole. transient: it is not kept."""
    transient = transient or device.type != "cpu" or share.copies(name)
    if share == WHOLE:
        return _read(weights, name, shape[0], dtype, transient).to(device)
    if name in weights.deltas or weights.shape(name) != shape:  # what is added is rounded once
        return share.cut(name, _read(weights, name, shape[0], dtype, True)).clone().to(device)
    transient = transient or dtype != weights.stored_dtype(name)
    part = share.cut(name, weights.read(name, None, transient))
    return part.to(device=device, dtype=dtype)


def _quantised(
    weights: StoredWeights,
    name: str,
    rows: int,
    device: torch.device,
    quantize: str,
    share: Share,
) -> dict[str, Tensor]:
    """This process's part of a weight that becomes quantised."""
    whole = _read(weights, name, rows, None, transient=True).to(device)
    return share.quantised(name, whole, quantize)


def _read_quantised(
    weights: StoredWeights, name: str, shape: Shape, device: torch.device, share: Share
) -> dict[str, Tensor]:
    """The parts of a weight that is stored quantised, cut to this process's share."""
    if weights.shape(name) != shape:
        found, wanted = list(weights.shape(name)), list(shape)
        raise ValueError(
            f"{weights.folder}: {name} is quantised with shape {found}, expected {wanted}"
        )
    copied = share.copies(name)
    parts = {  # what is packed anew, turned or copied is freed
        suffix: stored.file.read(stored.name, copied or suffix in ("weight_int4", "scale_zero"))
        for suffix, stored in weights.quantised[name].items()
    }
    if INT4_PACKED not in parts:
        return share.cut_parts(name, parts)
    if copied:  # columns lie side by side in a tile
        return share.cut_parts(name, _unpacked(weights, name, parts, device, keep=False))
    return _unpacked(weights, name, share.cut_parts(name, parts), device)


def _unpacked(
    weights: StoredWeights,
    name: str,
    parts: dict[str, Tensor],
    device: torch.device,
    keep: bool = True,
) -> dict[str, Tensor]:
    """int4 that was packed for some processor: unchanged if that is this one and `keep` is set,
    else in the order stored for every processor."""
    stored = weights.quantised[name][INT4_PACKED]
    try:
        order = read_order(stored.file.metadata.get(ORDER))
    except ValueError as error:
        raise ValueError(f"{stored.path}: {stored.name} {error}; convert it again") from None
    here = device.type == "cpu" and torch.equal(order, packed_order())
    if here and keep:
        return parts
    note = (
        f"{weights.folder}: its int4 weights are packed for another processor and are packed anew, "
        "which takes a while; convert them here to save it"
    )
    if device.type == "cpu" and not here and note not in weights.notes:
        weights.notes.append(note)
    return {
        "weight_int4": unpack_whole(parts[INT4_PACKED], order),
        "scale_zero": parts["scale_zero"],
    }


def give_back() -> None:
    """Give the memory that was freed back to the system. glibc keeps it for what comes next, in
    pieces that seldom fit: with int4 as much again as the weights."""
    with suppress(AttributeError, OSError, TypeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


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
