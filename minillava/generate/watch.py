"""The attention that chose a token: the last position's, noted while the model runs.

L layers, H heads, P patches of a picture, S keys.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minillava.attention import eager
from minillava.llava import Llava, Spliced
from minillava.tiles.grid import Size
from minillava.tiles.places import Fold


class Watch:
    """Notes in one pass, layer by layer, [H, end - start]: the attention of the last position to
    start..end, as `fold` puts it together, if there is one. What the layers return is untouched.
    Only that row is kept: at 7B, the prefill's weights are 1.6 GB in float32."""

    def __init__(self, start: int, end: int, fold: Callable[[Tensor], Tensor] | None = None):
        self.start, self.end, self.fold = start, end, fold
        self.rows: list[Tensor] = []

    def over(self, attend: Callable[..., Any]) -> Callable[..., Any]:
        """The same attention, of one row, watched."""

        def watched(q, k, v, mask=None, causal=False):
            out, weights = attend(q, k, v, mask, causal)
            row = weights
            # `fused` has none. The last position sees all keys, so that it needs no triangle.
            if row is None:
                last = None if mask is None else mask[:, :, -1:]
                _, row = eager(q[:, :, -1:], k, v, last)  # [1, H, 1, S]
            found = row[0, :, -1, self.start : self.end].float()
            self.rows.append(found.clone() if self.fold is None else self.fold(found))
            return out, weights

        return watched

    def mean(self, layers: Sequence[int], heads: Sequence[int]) -> Tensor:
        """The mean over some layers and heads, [end - start], on the CPU."""
        return torch.stack(self.rows)[list(layers)][:, list(heads)].mean((0, 1)).cpu()


def patch_span(model: Llava, spliced: Spliced) -> tuple[int, int]:
    """Where the patches of the first row's first picture are: of the whole of it, since with tiles
    the overview comes first. A class token, where a model keeps it, stands before."""
    count = model.config.vision.num_patches
    start = spliced.image_spans[0][0][0] + model.config.tokens_per_image - count
    return start, start + count


def seen_span(model: Llava, spliced: Spliced, size: Size | None) -> tuple[Any, ...]:
    """What a Watch of the first picture is made of. size: its height and width, if it was cut into
    tiles."""
    if size is None:
        return patch_span(model, spliced)
    return (*spliced.image_spans[0][0], Fold(model.config, size))
