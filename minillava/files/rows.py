"""Rows of ids, pictures and scores, which callers give to a model and which are checked before use;
and the rows of a table, one per token.

B rows of t tokens each, n pictures of P patches, C width, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def as_rows(name: str, ids: Tensor | Sequence[Any], device: Any) -> list[Tensor]:
    """A batch as a list of 1-D tensors; one flat row is a batch of one. Raises ValueError for other
    shapes."""
    rows = [torch.as_tensor(r, dtype=torch.long, device=device) for r in ids]
    if rows and all(r.dim() == 0 for r in rows):
        rows = [torch.stack(rows)]
    if any(r.dim() != 1 for r in rows):
        raise ValueError(
            f"{name} has rows of shape {[list(r.shape) for r in rows]}, expected rows of numbers"
        )
    return rows


def check_lengths(rows: list[Tensor], others: dict[str, list[Tensor]]) -> None:
    """Raises ValueError if there is no row, if a row is empty, or if one of `others` (name -> rows)
    has other lengths."""
    if not rows or not all(len(r) for r in rows):
        raise ValueError("input_ids has no row or an empty row: every row needs at least one token")
    lengths = [len(r) for r in rows]
    for name, other in others.items():
        if (found := [len(r) for r in other]) != lengths:
            raise ValueError(f"{name} has rows of {found} tokens, input_ids of {lengths}")


def check_ids(name: str, rows: list[Tensor], vocabulary: int, besides: Sequence[int]) -> None:
    """Raises ValueError for an id outside the vocabulary that is not one of `besides`."""
    for row in rows:
        known = (row >= 0) & (row < vocabulary)
        for i in besides:
            known |= row == i
        if not known.all():
            raise ValueError(
                f"{name} {int(row[~known][0])} is outside this model's vocabulary of {vocabulary}"
            )


def check_images(images: Any, width: int, placed: int, marker: int) -> None:
    """Raises ValueError unless `images` are pixels, or vectors of the language model's width, and
    there are as many pictures as ids `marker` in input_ids."""
    several = isinstance(images, (list, tuple)) and all(isinstance(i, Tensor) for i in images)
    if isinstance(images, Tensor):
        fits, found = images.dim() == 4, str(list(images.shape))
        fits |= images.dim() == 3 and images.shape[1] > 0 and images.shape[2] == width
    elif several:
        fits = all(i.dim() == 2 and len(i) > 0 and i.shape[1] == width for i in images)
        found = f"{type(images).__name__} of {[list(i.shape) for i in images]}"
    else:
        fits, found = images is None, type(images).__name__
    if not fits:
        raise ValueError(
            f"images are {found}, expected a tensor [n, 3, R, R] as image_processor makes it, or "
            f"[n, P, {width}] as encode_images does, or one [P, {width}] for each picture"
        )
    if placed != (given := 0 if images is None else len(images)):
        raise ValueError(
            f"input_ids place {placed} picture(s) with {marker}, but {given} were given"
        )


def check_scores(found: Tensor, given: Tensor) -> Tensor:
    """The scores [B, V] that `process` returned for the given ones. Raises ValueError if no token
    can be chosen from them."""
    expected = _described(given)
    if not isinstance(found, Tensor):
        raise ValueError(f"process returned {type(found).__name__}, expected a tensor {expected}")
    if _described(found) != expected:
        raise ValueError(f"process returned a tensor {_described(found)}, expected {expected}")
    if not (found < math.inf).all():  # also true for NaN
        raise ValueError(
            "process returned NaN or +inf, expected finite scores, and -inf for a token to remove"
        )
    return found


def _described(x: Tensor) -> str:
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"


def grow_rows(table: Tensor, rows: int) -> Tensor:
    """A table with rows added for new tokens, [V, C] -> [rows, C]. Each new row is the mean of the
    old ones, as LLaVA initialises it, so that a new token begins as an average word. Raises
    ValueError if the table would shrink."""
    if rows < len(table):
        raise ValueError(
            f"the table has {len(table)} rows, asked for {rows}: a model cannot forget tokens"
        )
    if rows == len(table):
        return table
    # LLaVA takes the mean in the table's own dtype. In float32 the order of the sum does not change
    # the rounded result.
    wide = table.to(torch.promote_types(table.dtype, torch.float32))
    mean = wide.mean(0, keepdim=True).to(table.dtype)  # [1, C]
    return torch.cat([table, mean.expand(rows - len(table), -1)])
