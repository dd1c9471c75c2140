"""quality: how far a layer at each precision is from float64."""

from collections.abc import Sequence
from functools import partial

import torch

from minillava.fast.linear import linear
from minillava.fast.quantize import quantised_layer, quantize_tensor
from minillava.options import KINDS


def quality(
    shapes: Sequence[tuple[int, int]] = ((4096, 4096), (11008, 4096), (4096, 11008)),
) -> list[dict]:
    """The distance of layers [N, C] of random weights to float64, at each precision, as a fraction of
    their outputs, for one row and for many."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for n, c in shapes:
        weight, x = (torch.randn(rows, c, generator=generator) for rows in (n, 32))
        rounded = weight.bfloat16()
        layers = {
            "float32": partial(linear, weight=weight),
            "bfloat16": lambda x, rounded=rounded: linear(x.bfloat16(), rounded),
        }
        layers |= {kind: quantised_layer(quantize_tensor(weight, kind)) for kind in KINDS}
        for rows in (1, 32):
            exact = x[:rows].double() @ weight.double().T
            errors = {
                name: float((layer(x[:rows]) - exact).norm() / exact.norm())
                for name, layer in layers.items()
            }
            found.append({"shape": [n, c], "rows": rows, **errors})
    return found


def quality_table(found: Sequence[dict]) -> str:
    kinds = list(found[0])[2:]
    lines = [f"| error of a layer, % | {' | '.join(kinds)} |", "|---|" + "---:|" * len(kinds)]
    for row in found:
        cells = [f"{100 * row[kind]:.2g}" for kind in kinds]
        lines.append(
            f"| {row['shape'][0]} × {row['shape'][1]}, {row['rows']} row(s) | {' | '.join(cells)} |"
        )
    return "\n".join(lines)
