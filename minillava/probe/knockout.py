"""Knock-outs: what a word loses when positions may no longer attend to the picture (Geva et al.
2023), or when a head or a feed-forward layer says nothing.

L layers, H heads, m tokens of the answer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minillava.options import expect_one_of
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
from minillava.probe.measure import Answered


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
    window, windows = all_windows(answered, window)
    layers = range(len(windows) - 1)
    picture = range(answered.picture_start, answered.picture_end)
    curves, everywhere = {}, {}
    for who, queries in blind(answered).items():
        place = Attention(layers, queries, picture)
        lost = []
        for some, first in batches(answered, queries.start, windows):
            states = answered.kept.states[first][:, queries.start :].repeat(len(some), 1, 1)
            with intervene(answered.model, place, in_these_layers(some)):
                lost.append(answered.drops(states, queries.start, first))
        every = np.concatenate(lost)
        curves[who], everywhere[who] = every[:-1], every[-1]
    return KnockOut(window, curves, everywhere)


def all_windows(answered: Answered, window: int | None) -> tuple[int, list[range]]:
    """The size of the windows, and those around each layer and of all layers. Raises ValueError as
    `knock_out`."""
    layers = answered.model.config.text.num_hidden_layers
    window = default_window(layers) if window is None else window
    if not 1 <= window <= layers:
        raise ValueError(f"window is {window}, expected 1 to {layers} layers")
    return window, [window_around(i, window, layers) for i in range(layers)] + [range(layers)]


def blind(answered: Answered) -> dict[str, range]:
    """Who may not look: name -> positions."""
    return {
        "answer": range(answered.first, answered.embeds.shape[1]),
        "question": range(answered.picture_end, answered.first),
    }


def batches(
    answered: Answered, start: int, windows: Sequence[range]
) -> Iterator[tuple[Sequence[range], int]]:
    """The windows of the rows of each batch, and the lowest layer that is changed in one."""
    size = answered.at_once(start)
    for i in range(0, len(windows), size):
        some = windows[i : i + size]
        yield some, min(window.start for window in some)


def in_these_layers(windows: Sequence[range]) -> How:
    """In row i of a mask [B, 1, queries, keys], nothing may be attended to in layers windows[i]."""

    def cut(values: Tensor, at: At) -> Tensor:
        cut_off = [at.layer in window for window in windows]
        blind = torch.tensor(cut_off, device=values.device)[:, None, None, None]
        return values & ~blind if any(cut_off) else values

    return cut


def knock_out_work(answered: Answered, window: int | None = None) -> tuple[int, int]:
    """What `knock_out` will compute: rows, and positions times layers."""
    _, windows = all_windows(answered, window)
    layers, length = len(windows) - 1, answered.embeds.shape[1]
    starts = [queries.start for queries in blind(answered).values()]
    every = [
        len(some) * (length - start) * (layers - first)
        for start in starts
        for some, first in batches(answered, start, windows)
    ]
    return len(starts) * len(windows), sum(every)


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
    expect_one_of("ablation", how, ABLATIONS)
    text = answered.model.config.text
    layers, rows = range(text.num_hidden_layers), parts_of(answered)
    of_heads, of_mlps = zero, zero
    if how == "mean":
        of_heads = put(means(answered, Heads(layers)))
        of_mlps = put(means(answered, MLPs(layers)))
    found = []
    for layer in layers:
        lost = []
        for some in batches_of(rows, answered.at_once()):
            states = answered.kept.states[layer].repeat(len(some), 1, 1)
            with (
                intervene(answered.model, Heads([layer]), head_of_row(some, of_heads)),
                intervene(answered.model, MLPs([layer]), mlp_of_row(some, of_mlps)),
            ):
                lost.append(answered.drops(states, layer=layer))
        found.append(np.concatenate(lost))
    every = np.array(found)  # [L, H + 1, m]
    return Ablation(how, every[:, :-1], every[:, -1])


def ablate_work(answered: Answered, how: str = "mean") -> tuple[int, int]:
    """What `ablate` will compute: rows, and positions times layers."""
    layers, length = answered.model.config.text.num_hidden_layers, answered.embeds.shape[1]
    rows, passes = len(parts_of(answered)), 2 if how == "mean" else 0
    upwards = sum(range(1, layers + 1))
    return layers * rows + passes, length * (rows * upwards + passes * layers)


@torch.no_grad()
def means(answered: Answered, where: Where) -> dict[int, Tensor]:
    """What is computed there, averaged over the positions of the prompt: layer -> [1, 1, ...]."""
    kept = Keep()
    with intervene(answered.model, where, kept):
        answered.kept.again(answered.embeds)
    return {i: x[:, : answered.first + 1].mean(1, keepdim=True) for i, x in kept.items()}


def parts_of(answered: Answered) -> list[int | None]:
    """What is taken out in each row: a head, or (None) the feed-forward layer."""
    return [*range(answered.model.config.text.num_attention_heads), None]


def batches_of(rows: Sequence[int | None], size: int) -> list[Sequence[int | None]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def head_of_row(rows: Sequence[int | None], how: How) -> How:
    """In row i of [B, n, H, D], only head rows[i] is changed."""

    def change(values: Tensor, at: At) -> Tensor:
        changed, values = how(values, at), values.clone()
        for row, head in enumerate(rows):
            if head is not None:
                values[row, :, head] = changed[row, :, head]
        return values

    return change


def mlp_of_row(rows: Sequence[int | None], how: How) -> How:
    """In row i of [B, n, C], all is changed if rows[i] is None."""

    def change(values: Tensor, at: At) -> Tensor:
        changed, values = how(values, at), values.clone()
        for row, head in enumerate(rows):
            if head is None:
                values[row] = changed[row]
        return values

    return change
