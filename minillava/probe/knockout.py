"""Knock-outs: what a word loses when positions may no longer attend to the picture (Geva et al.
2023), or when a head or a feed-forward layer says nothing.

L layers, H heads, m tokens of the answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minillava.probe.flags import ABLATIONS
from minillava.probe.intervene import (
    At,
    Attention,
    Heads,
    How,
    Keep,
    MLPs,
    Where,
    intervene,
    put,
    zero,
)
from minillava.probe.measure import ROWS, Answered


@dataclass
class KnockOut:
    """window: how many layers were cut off at once. curves: who may not look at the picture
    ("answer": the positions that choose the answer's tokens; "question": the text between) ->
    float64 [L, m], by how much (nats) each token became less likely with a window around each
    layer. everywhere: the same in all layers at once, [m]."""

    window: int
    curves: dict[str, np.ndarray]
    everywhere: dict[str, np.ndarray]


def default_window(layers: int) -> int:
    """A fifth of the layers, as in the paper for GPT-2 XL."""
    return max(1, round(layers / 5))


def window_around(layer: int, size: int, layers: int) -> range:
    """`size` layers with this one in the middle, those that exist."""
    first = layer - (size - 1) // 2
    return range(max(0, first), min(layers, first + size))


def knock_out(answered: Answered, window: int | None = None) -> KnockOut:
    """Cut the answer, and then the question, off from the picture. Raises ValueError for a window
    that is not from 1 to L."""
    layers = answered.model.config.text.num_hidden_layers
    window = default_window(layers) if window is None else window
    if not 1 <= window <= layers:
        raise ValueError(f"window is {window}, expected 1 to {layers} layers")
    picture = range(answered.picture_start, answered.picture_end)
    blind = {
        "answer": slice(answered.first, None),
        "question": range(answered.picture_end, answered.first),
    }
    curves, everywhere = {}, {}
    for who, queries in blind.items():
        places = [
            Attention(window_around(layer, window, layers), queries, picture)
            for layer in range(layers)
        ]
        curves[who] = np.stack([dropped(answered, place, zero) for place in places])
        everywhere[who] = dropped(answered, Attention(range(layers), queries, picture), zero)
    return KnockOut(window, curves, everywhere)


def dropped(answered: Answered, where: Where, how: How) -> np.ndarray:
    """By how much each token became less likely, [m]."""
    with intervene(answered.model, where, how):
        return answered.drops(answered.embeds)[0]


@dataclass
class Ablation:
    """how: one of ABLATIONS. heads float64 [L, H, m], mlps [L, m]: by how much (nats) each token
    became less likely without this head, this feed-forward layer."""

    how: str
    heads: np.ndarray
    mlps: np.ndarray


def ablate(answered: Answered, how: str = "mean") -> Ablation:
    """Take out one head after the other, and one feed-forward layer. how: zero, or mean: what it
    says on average over the prompt, which other layers may rely on. Raises ValueError for another
    word."""
    if how not in ABLATIONS:
        raise ValueError(f"unknown ablation {how!r}, expected one of: {', '.join(ABLATIONS)}")
    text = answered.model.config.text
    layers, heads = range(text.num_hidden_layers), list(range(text.num_attention_heads))
    of_heads, of_mlps = zero, zero
    if how == "mean":
        of_heads = put(means(answered, Heads(layers)))
        of_mlps = put(means(answered, MLPs(layers)))
    found = [
        [lost for some in parts(heads) for lost in without(answered, i, some, of_heads)]
        for i in layers
    ]
    mlps = [dropped(answered, MLPs([i]), of_mlps) for i in layers]
    return Ablation(how, np.array(found), np.array(mlps))


@torch.no_grad()
def means(answered: Answered, where: Where) -> dict[int, Tensor]:
    """What is computed there, averaged over the positions of the prompt: layer -> [1, 1, ...]."""
    kept = Keep()
    with intervene(answered.model, where, kept):
        answered.log_probs(answered.embeds)
    return {i: x[:, : answered.first + 1].mean(1, keepdim=True) for i, x in kept.items()}


def parts(heads: Sequence[int]) -> list[Sequence[int]]:
    return [heads[i : i + ROWS] for i in range(0, len(heads), ROWS)]


def without(answered: Answered, layer: int, heads: Sequence[int], how: How) -> np.ndarray:
    """One row for each head, which is taken out in it: [heads, m]."""
    with intervene(answered.model, Heads([layer]), in_its_row(heads, how)):
        return answered.drops(answered.embeds.repeat(len(heads), 1, 1))


def in_its_row(heads: Sequence[int], how: How) -> Callable[[Tensor, At], Tensor]:
    """In row i of [B, n, H, D], only head heads[i] is changed."""

    def change(values: Tensor, at: At) -> Tensor:
        changed, values = how(values, at), values.clone()
        for row, head in enumerate(heads):
            values[row, :, head] = changed[row, :, head]
        return values

    return change
