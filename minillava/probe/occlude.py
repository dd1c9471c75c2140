"""Occlusion: what a word loses when a part of the picture is hidden (Zeiler & Fergus 2014).

In the embeddings, the language model reads something else in the place of patches; the vision tower
has then mixed the picture into all other patches already. In the pixels, the tower sees a picture
with a hole, which also is something to see. The two tell different things; neither is the truth.

G patches a side, P patches, m tokens of the answer, R side of the picture in pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import ImageFilter
from torch import Tensor

from minillava.options import expect_one_of
from minillava.probe.flags import HIDINGS
from minillava.probe.measure import Answered


@dataclass
class Occlusion:
    """hiding: one of HIDINGS. block: patches a side that were hidden together. drops float64
    [m, G, G]: by how much (nats) each token became less likely when the patch's block was hidden;
    below 0 it became likelier."""

    hiding: str
    block: int
    drops: np.ndarray


def blocks(grid: int, size: int) -> list[list[tuple[int, int]]]:
    """The patches (row, column) of each block, row by row; those at the right and below may be
    smaller. Raises ValueError for a size that does not fit."""
    if not 1 <= size <= grid:
        raise ValueError(f"a block of {size} x {size} patches does not fit {grid} x {grid}")
    corners = [(top, left) for top in range(0, grid, size) for left in range(0, grid, size)]
    return [
        [
            (row, column)
            for row in range(top, min(top + size, grid))
            for column in range(left, min(left + size, grid))
        ]
        for top, left in corners
    ]


def occlude(answered: Answered, hiding: str = "mean", block: int = 1) -> Occlusion:
    """Hide block after block. hiding: mean (of all patches) or zero in the embeddings; grey (the
    mean of CLIP's training) or blur in the pixels. Raises ValueError for another word or a block
    that does not fit."""
    expect_one_of("hiding", hiding, HIDINGS)
    grid, hide = answered.grid, hidden_embeddings if in_embeddings(hiding) else hidden_pixels
    drops = np.zeros((len(answered.ids), grid, grid))
    for some, start in batches(answered, hiding, block):
        lost = answered.drops(hide(answered, hiding, some)[:, start:], start)
        for patches, losses in zip(some, lost, strict=True):  # losses [m]
            for row, column in patches:
                drops[:, row, column] = losses
    return Occlusion(hiding, block, drops)


def in_embeddings(hiding: str) -> bool:
    """Whether the tower sees the whole picture, and only the language model something else."""
    return hiding in ("mean", "zero")


def batches(
    answered: Answered, hiding: str, block: int
) -> Iterator[tuple[list[list[tuple[int, int]]], int]]:
    """The blocks that are hidden in the rows of each batch, and the first position that they
    change. In the embeddings those of one height are together, since what stands before them is
    not computed again; in the pixels each block changes all patches."""
    every, start = blocks(answered.grid, block), answered.picture_start
    groups = [every]
    if in_embeddings(hiding):
        tops = sorted({patches[0][0] for patches in every})
        groups = [[patches for patches in every if patches[0][0] == top] for top in tops]
    for group in groups:
        if in_embeddings(hiding):
            start = answered.patches[0] + group[0][0][0] * answered.grid + group[0][0][1]
        size = answered.at_once(start)
        for first in range(0, len(group), size):
            yield group[first : first + size], start


def occlude_work(answered: Answered, hiding: str, block: int) -> tuple[int, int]:
    """What `occlude` will compute: rows, and positions times layers."""
    layers, length = len(answered.model.language_model.layers), answered.embeds.shape[1]
    every = [(len(some), length - start) for some, start in batches(answered, hiding, block)]
    return sum(rows for rows, _ in every), layers * sum(rows * read for rows, read in every)


@torch.no_grad()
def hidden_embeddings(answered: Answered, hiding: str, some: list[list[tuple[int, int]]]) -> Tensor:
    """The sequence with each of these blocks hidden: [B, S, C]."""
    start, end = answered.patches
    patches = answered.embeds[0, start:end]
    instead = patches.mean(0) if hiding == "mean" else torch.zeros_like(patches[0])  # [C]
    rows = answered.embeds.repeat(len(some), 1, 1)
    for row, hidden in zip(rows, some, strict=True):
        row[[start + r * answered.grid + c for r, c in hidden]] = instead
    return rows


@torch.no_grad()
def hidden_pixels(answered: Answered, hiding: str, some: list[list[tuple[int, int]]]) -> Tensor:
    """The same, for pictures with each block hidden, which are encoded anew."""
    processor, model = answered.assistant.image_processor, answered.model
    square, side = processor.square(answered.picture), model.config.vision.patch_size
    pixels = processor.normalise(square)  # [3, R, R]
    blurred = square.filter(ImageFilter.GaussianBlur(side))
    instead = processor.normalise(blurred) if hiding == "blur" else torch.zeros_like(pixels)
    pictures = pixels.repeat(len(some), 1, 1, 1)
    for picture, hidden in zip(pictures, some, strict=True):
        for row, column in hidden:
            height = slice(row * side, row * side + side)
            width = slice(column * side, column * side + side)
            picture[:, height, width] = instead[:, height, width]
    rows = answered.embeds.repeat(len(some), 1, 1)
    span = slice(answered.picture_start, answered.picture_end)
    rows[:, span] = model.encode_images(pictures.to(rows.device)).to(rows)
    return rows
