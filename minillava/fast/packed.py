"""bfloat16 weights of the language model in the order that this processor reads fastest, for
`--pack`. A reader may skip this file.

A product with few rows is little more than the reading of its weight. oneDNN reorders a weight
while it reads it. Stored in oneDNN's own order it need not be, and the sums are added up as before:
each row has the bits that fast/linear.py gives. tools/MEASUREMENTS.md has what is gained.

r rows, K width before, N width after.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillava.attention import eager
from minillava.fast import processor
from minillava.fast.quantize import QuantisedLinear, convert
from minillava.options import dtype_name

KIND = "packed"

LEAST = 4
"""Fewer rows are filled up to so many: by themselves they take longer, and a single one would be
added up in another order."""


class PackedLinear(QuantisedLinear):
    """weight bfloat16 [N, K] in oneDNN's order, an opaque tensor. Nothing is rounded: it is a
    QuantisedLinear since its numbers, too, have to be made again before others can use them. It
    can be neither copied nor cast."""

    kind = KIND
    has_kernel = True

    def __init__(self, weight: Tensor):
        """weight: bfloat16 [N, K], on a CPU."""
        super().__init__(
            torch.ops.mkldnn._reorder_linear_weight(weight, LEAST),  # for so many rows
            (weight.shape[0], weight.shape[1]),
        )

    def few_rows(self, x: Tensor) -> Tensor:
        """[r, K] -> [r, N]"""
        rows = len(x)
        if rows < LEAST:
            x = F.pad(x, (0, 0, 0, LEAST - rows))
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")[:rows]

    def dequantise(self, rows: slice, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Some rows of the weights, written to `out` if given: [n, K]."""
        return convert(self.weight.to_dense()[rows], out, dtype).to(dtype)


def pack_layers(language: nn.Module) -> None:
    """Pack the linear layers of a language model that is open, in bfloat16 on a CPU."""
    for name, layer in list(language.named_modules()):
        if isinstance(layer, nn.Linear):
            packed = PackedLinear(layer.weight)
            packed.bias = layer.bias
            language.set_submodule(name, packed)


def is_packed(language: nn.Module) -> bool:
    return any(isinstance(layer, PackedLinear) for layer in language.modules())


def check_pack(
    dtype: torch.dtype, device: torch.device | str, quantised: object, attend: Callable[..., Any]
) -> None:
    """Raises ValueError if a language model that is opened so cannot be packed. quantised: whether
    its weights are, or will be."""
    found, place = None, torch.device(device).type
    if quantised:
        found = "its weights are quantised"
    elif attend is eager:
        found = "eager keeps torch's own products"
    elif place != "cpu" or dtype != torch.bfloat16:
        found = f"it is opened in {dtype_name(dtype)} on {place}"
    elif KIND not in processor.WAYS[processor.kind()]:
        found = f"this processor is of kind {processor.kind()}, on which nobody has measured it"
    elif not packs():
        found = "this build of torch cannot do it"
    if found:
        raise ValueError(
            "pack is for a language model in bfloat16 on a CPU of kind avx512-bf16: "
            f"{found}; leave pack out"
        )


@cache
def packs() -> bool:
    """Whether packing was measured to gain something on a processor of this kind, and torch was
    built with oneDNN and names what it needs here as it did."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    has_order = torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in names
    )
    return has_order and KIND in processor.WAYS[processor.kind()]
