"""One update after another: rows in, gradients summed over micro-batches, a step of AdamW."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minillava.finetune.medusa import NAME, heads_loss
from minillava.finetune.order import blocks, micro_batches, rows_in_order
from minillava.finetune.recipe import Recipe, rate_factor
from minillava.finetune.rows import Example
from minillava.image import ImageProcessor
from minillava.llava import Llava, next_token_loss


class Batch(NamedTuple):
    """A micro-batch as the model takes it."""

    ids: list[list[int]]
    labels: list[list[int]]
    pixels: Tensor  # [n, 3, R, R]
    tokens: int  # that are learnt


class Record(NamedTuple):
    """What an update did: a line of the log."""

    update: int  # from 1
    epoch: int  # from 0
    loss: float
    tokens: int
    rows: int
    pictures: int
    rates: list[float]
    norm: float
    seconds: float


def collate(examples: Sequence[Example], processor: ImageProcessor) -> Batch:
    pictures = [picture for example in examples for picture in example.pictures]
    return Batch(
        [example.ids for example in examples],
        [example.labels for example in examples],
        processor(pictures),
        sum(example.learnt for example in examples),
    )


def summed_loss(model: Llava, batch: Batch) -> Tensor:
    """The cross-entropy of every learnt token of a micro-batch, summed; that of the heads, if the
    model has some that learn."""
    if hasattr(model, NAME):
        return heads_loss(model, batch.ids, batch.labels, batch.pixels)
    spliced = model.splice(batch.ids, batch.pixels, labels=batch.labels)
    logits = model.language_model(spliced.embeds, spliced.padding_mask).logits  # [B, T, V]
    assert spliced.labels is not None  # since labels were given
    return next_token_loss(logits, spliced.labels, "sum")


def train(
    model: Llava,
    examples: Sequence[Example],
    processor: ImageProcessor,
    recipe: Recipe,
    optimiser: torch.optim.Optimizer,
    start: int = 0,
    loss_of: Callable[[Llava, Batch], Tensor] = summed_loss,
) -> Iterator[Record]:
    """Yields after each update from `start` to the recipe's last. An update depends on the recipe,
    the examples and its number alone. Raises ValueError for a loss or a gradient that is not
    finite; the model is then as after the previous update."""
    learning = [p for group in optimiser.param_groups for p in group["params"]]
    updates, per_epoch = recipe.updates_for(len(examples)), recipe.updates_per_epoch(len(examples))
    for update in range(start, updates):
        began = time.monotonic()
        epoch, at = divmod(update, per_epoch)
        rows = _order(examples, recipe, epoch)[at]
        batches = [collate([examples[i] for i in some], processor) for some in rows]
        tokens = sum(batch.tokens for batch in batches)
        loss = _backward(model, batches, recipe, update, loss_of)
        norm = _clip(learning, recipe.clip)
        if not (torch.isfinite(norm) and math.isfinite(loss)):
            names = ", ".join(examples[i].row.name for some in rows for i in some)
            raise ValueError(
                f"update {update + 1}: the loss is {loss}, its gradient's norm {norm.item()}; "
                f"nothing was learnt from it; its rows: {names:.300}"
            )
        factor = rate_factor(update, updates, recipe.warmup)
        for group in optimiser.param_groups:
            group["lr"] = group["base_rate"] * factor
        optimiser.step()
        optimiser.zero_grad()
        yield Record(
            update + 1,
            epoch,
            loss,
            tokens,
            sum(map(len, rows)),
            sum(len(batch.pixels) for batch in batches),
            [group["lr"] for group in optimiser.param_groups],
            norm.item(),
            time.monotonic() - began,
        )


@torch.no_grad()
def held_out_loss(
    model: Llava, examples: Sequence[Example], processor: ImageProcessor, batch: int
) -> float:
    """The mean loss per token of rows that are not learnt, without dropout."""
    learning = model.language_model.training
    model.language_model.eval()
    loss, tokens = 0.0, 0
    for some in blocks(examples, batch):
        micro = collate(some, processor)
        loss += summed_loss(model, micro).item()
        tokens += micro.tokens
    model.language_model.train(learning)
    return loss / tokens


def _backward(
    model: Llava,
    batches: Sequence[Batch],
    recipe: Recipe,
    update: int,
    loss_of: Callable[[Llava, Batch], Tensor],
) -> float:
    """The loss of an update, and its gradient, summed over the micro-batches."""
    tokens, loss = sum(batch.tokens for batch in batches), 0.0
    for part, batch in enumerate(batches):
        with torch.random.fork_rng(devices=[]):  # of dropout
            torch.manual_seed((recipe.seed * 1_000_003 + update) * 1_009 + part)
            whole = tokens if recipe.loss_mean == "tokens" else batch.tokens * len(batches)
            share = loss_of(model, batch) / whole
            if share.requires_grad:  # rows without pictures give a projector no gradient
                share.backward()
        loss += share.item()
    return loss


def _order(examples: Sequence[Example], recipe: Recipe, epoch: int) -> list[list[list[int]]]:
    """The row numbers of an epoch: updates of micro-batches."""
    lengths = [example.row.words for example in examples]
    rows = rows_in_order(lengths, recipe.order, recipe.batch, recipe.accumulate, recipe.seed, epoch)
    return micro_batches(rows, recipe.batch, recipe.accumulate)


def _clip(learning: list[nn.Parameter], limit: float) -> Tensor:
    """The norm of the gradient, which is then at most `limit`; 0 for no limit."""
    return nn.utils.clip_grad_norm_(learning, limit or float("inf"))
