"""For `--same-bits`: an answer has the same bits alone, in a batch, later in a conversation, and
with drafts.

A sum's last bits depend on its order, and libraries choose the order by the shapes. So in this file
the shapes depend on the row alone. Prompts are prefilled one row after the other, without padding,
in pieces that lie on one grid of positions. Decoded tokens share a pass as far as a row's product
has the bits that it has alone (processor.SAME_ROWS), each with its own attention; otherwise they
are computed one by one.

B rows, T new positions, S with those cached, C width, H attention heads, V vocabulary.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillava.attention import eager
from minillava.cache import KVCache
from minillava.fast import processor
from minillava.fast.compiled import Captured
from minillava.fast.linear import NAMES
from minillava.fast.quantize import QuantisedLinear
from minillava.llama import LanguageModel, LanguageOutput
from minillava.llava import Llava
from minillava.tiles.model import TiledLlava
from minillava.tiles.pictures import Tiled

PIECE = 256
"""Positions of a prompt that are read at once: from one multiple of it to the next."""


def keep_bits(model: Llava) -> None:
    """Let a model compute row by row. This costs time, but little if its products allow several
    rows. Raises ValueError for a model whose decoding step is compiled."""
    if isinstance(model.decoding, Captured):
        raise ValueError(
            "same bits are not for a compiled step: leave out --compile or --same-bits"
        )
    model.__class__ = TilesOneByOne if isinstance(model, TiledLlava) else OneByOne
    language = model.language_model
    language.__class__ = RowByRow
    language.together = rows_together(language)


def reusable(language: nn.Module, alike: int, prompt_length: int) -> int:
    """How many of the first `alike` positions in a cache may stay for another prompt: only whole
    pieces of the last prompt, since an answer was not computed in pieces."""
    if not isinstance(language, RowByRow):
        return alike
    return min(alike, prompt_length) // PIECE * PIECE


class OneByOne(Llava):
    """A Llava whose pictures are encoded each alone."""

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """[n, 3, R, R] -> [n, P, C]"""
        encode = super().encode_images
        return torch.cat([encode(one) for one in pixel_values.split(1)])


class TilesOneByOne(TiledLlava):
    """A TiledLlava whose pictures are encoded each alone, their tiles together."""

    def encode_images(self, images: Tensor | Sequence[Tiled]) -> Any:
        """As TiledLlava's."""
        encode = super().encode_images
        if isinstance(images, Tensor):
            return torch.cat([encode(one) for one in images.split(1)])
        return [encode([one])[0] for one in images]


class RowByRow(LanguageModel):
    """A LanguageModel whose rows know nothing of one another. together: rows of a decoding step
    that share a pass."""

    together: int
    one_by_one = True

    @property
    def grid(self) -> int:
        """Where the pieces of a prompt end: at its multiples, and at the prompt's end."""
        return PIECE

    def forward(  # type: ignore[override]
        self,
        inputs: Tensor,
        padding_mask: Tensor | None = None,
        cache: KVCache | None = None,
        **options: Any,
    ) -> LanguageOutput:
        """As LanguageModel's, whose result it has but for rounding. Without a cache, with padding
        that is not on the left, and for tokens with positions of their own, it is LanguageModel's,
        and nothing is promised."""
        count, length = inputs.shape[:2]
        pads = None
        if cache is not None and options.get("positions") is None:
            pads = padding(cache.reserve(count, length, padding_mask), count)
        if cache is None or pads is None:
            return super().forward(inputs, padding_mask, cache, **options)
        if length == 1:
            output = self._step(inputs, cache, pads, **options)
        else:
            rows = [self._read(inputs, cache, row, pad, options) for row, pad in enumerate(pads)]
            output = stacked(rows)
        cache.advance(length)
        return output

    def _read(
        self, inputs: Tensor, cache: KVCache, row: int, pad: int, options: dict[str, Any]
    ) -> LanguageOutput:
        """The new positions of one row, piece by piece."""
        view = View(cache, slice(row, row + 1), pad)
        start, end = view.length, cache.length + inputs.shape[1] - pad
        grid = range(start // PIECE * PIECE + PIECE, end, PIECE)
        new = inputs[row, None, inputs.shape[1] - (end - start) :]
        pieces = [
            super(RowByRow, self).forward(new[:, a - start : b - start], None, view, **options)
            for a, b in pairwise([start, *grid, end])
        ]
        last_only = options.get("last_only", False)
        return padded(joined(pieces, last_only), inputs.shape[1] - (end - start), pad, last_only)

    def _step(
        self, inputs: Tensor, cache: KVCache, pads: list[int], **options: Any
    ) -> LanguageOutput:
        """One new token for each row, [B, 1]."""
        attend = options.get("attend") or (eager if options.get("attentions") else self.attend)
        outputs = []
        for first in range(0, len(pads), self.together):
            rows = slice(first, first + self.together)
            some = pads[rows]
            one = len(some) == 1
            view = View(cache, rows, some[0]) if one else View(cache, rows, masked=any(some))
            each = attend if one else alone(attend, some)
            output = super().forward(inputs[rows], None, view, **{**options, "attend": each})
            outputs.append(padded(output, 0, some[0] if one else 0, last_only=True))
        return stacked(outputs)


class View(KVCache):
    """Some rows of a cache from position `first` on, in the same memory: what is written to the
    view is in the cache. masked: with the cache's padding."""

    def __init__(self, cache: KVCache, rows: slice, first: int = 0, masked: bool = False):
        self.capacity = cache.capacity - first
        self.length = max(0, cache.length - first)
        self.keys, self.values = (
            [tensor[rows, :, first:] for tensor in tensors]
            for tensors in (cache.keys, cache.values)
        )
        mask = cache.padding_mask
        self.padding_mask = mask[rows] if masked and mask is not None else None


def padding(real: Tensor | None, rows: int) -> list[int] | None:
    """How many positions on the left of each row are padding; None if there are others, too. real:
    bool [B, S]."""
    if real is None:
        return [0] * rows
    pads = (~real).sum(1)
    left = torch.arange(real.shape[1], device=real.device) >= pads[:, None]
    return pads.tolist() if torch.equal(left, real) else None


def alone(attend: Callable[..., Any], pads: list[int]) -> Callable[..., Any]:
    """Attention of one query per row, each over its own keys."""

    def attend_rows(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        outs, weights = zip(
            *(
                attend(q[i, None], k[i, None, :, pad:], v[i, None, :, pad:], None, False)
                for i, pad in enumerate(pads)
            ),
            strict=True,
        )
        if weights[0] is None:
            return torch.cat(outs), None
        return torch.cat(outs), torch.cat(
            [F.pad(w, (pad, 0)) for w, pad in zip(weights, pads, strict=True)]
        )

    return attend_rows


def rows_together(language: LanguageModel) -> int:
    """How many rows of the model's products keep the bits that each has alone. For the plain layers
    of `eager`, which are torch's own, nothing is known, nor for a head that is the embedding
    table, which a RowByRow multiplies by torch's own product."""
    layers = [m for m in language.modules() if isinstance(m, nn.Linear | QuantisedLinear)]
    on_cpu = language.embed_tokens.weight.device.type == "cpu"
    tied = language.config.tie_word_embeddings
    if tied or not on_cpu or any(type(layer) is nn.Linear for layer in layers):
        return 1
    claims = processor.SAME_ROWS.get(processor.kind(), {})
    stored = {
        layer.kind if isinstance(layer, QuantisedLinear) else NAMES.get(layer.weight.dtype, "")
        for layer in layers
    }
    return min(claims.get(name, 1) for name in stored)


# --- outputs, put together ------------------------------------------------------------------------


def joined(outputs: list[LanguageOutput], last_only: bool = False) -> LanguageOutput:
    """Join the outputs of consecutive pieces of the same rows. Attention weights [B, H, T, S],
    whose S differs by piece, get zeros for keys that they did not see."""
    seen = outputs[-1].attentions[0].shape[-1] if outputs[-1].attentions else 0
    kept = outputs[-1:] if last_only else outputs
    return LanguageOutput(
        torch.cat([output.logits for output in kept], 1),
        layer_by_layer(outputs, "hidden_states", lambda parts: torch.cat(parts, 1)),
        layer_by_layer(
            outputs,
            "attentions",
            lambda parts: torch.cat([F.pad(w, (0, seen - w.shape[-1])) for w in parts], 2),
        ),
        torch.cat([output.hidden for output in kept], 1),
    )


def padded(output: LanguageOutput, new: int, keys: int, last_only: bool) -> LanguageOutput:
    """Pad an output with zeros on the left, by `new` positions and `keys` keys."""
    states = (0, 0, new, 0)
    logits, hidden = (
        each if last_only else F.pad(each, states) for each in (output.logits, output.hidden)
    )
    return LanguageOutput(
        logits,
        layer_by_layer([output], "hidden_states", lambda parts: F.pad(parts[0], states)),
        layer_by_layer([output], "attentions", lambda parts: F.pad(parts[0], (keys, 0, new, 0))),
        hidden,
    )


def stacked(outputs: list[LanguageOutput]) -> LanguageOutput:
    """Stack the outputs of different rows."""
    return LanguageOutput(
        torch.cat([output.logits for output in outputs]),
        layer_by_layer(outputs, "hidden_states", torch.cat),
        layer_by_layer(outputs, "attentions", torch.cat),
        torch.cat([output.hidden for output in outputs]),
    )


def layer_by_layer(
    outputs: list[LanguageOutput], name: str, put: Callable[[Any], Tensor]
) -> tuple[Tensor, ...] | None:
    """Combine what was recorded of each layer; None if nothing was recorded."""
    recorded = [getattr(output, name) for output in outputs]
    if recorded[0] is None:
        return None
    return tuple(put(parts) for parts in zip(*recorded, strict=True))
