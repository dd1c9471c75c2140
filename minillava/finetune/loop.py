"""One update after another: rows in, gradients summed over micro-batches, a step of AdamW."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillava.config import IGNORE_INDEX
from minillava.finetune import processes
from minillava.finetune.medusa import NAME, heads_loss
from minillava.finetune.order import micro_batches, rows_in_order
from minillava.finetune.recipe import Recipe, rate_factor
from minillava.finetune.rows import Example
from minillava.image import ImageProcessor
from minillava.llama import upcast
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
    rates: dict[str, float]  # by part
    norm: float  # of the gradient, before it was clipped
    clipped: bool
    seconds: float
    tokens_per_second: float  # positions, with those of pictures and those that are only read
    peak_memory: int  # bytes that the process, or the GPU, has held at once so far


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
    model has some that learn. The model's own head runs only where the next token is learnt: over
    all positions its logits would be the largest tensor of all."""
    if hasattr(model, NAME):
        return heads_loss(model, batch.ids, batch.labels, batch.pixels)
    spliced = processes.splice(model, batch.ids, batch.pixels, batch.labels)
    assert spliced.labels is not None  # since labels were given
    following = F.pad(spliced.labels, (0, 1), value=IGNORE_INDEX)[:, 1:]  # [B, T]
    at = following != IGNORE_INDEX
    logits = model.language_model(spliced.embeds, spliced.padding_mask, at=at).logits  # [N, V]
    return F.cross_entropy(upcast(logits), following[at], reduction="sum")


def summed_loss_of_all(model: Llava, batch: Batch) -> Tensor:
    """`summed_loss` with the logits of all positions, as transformers computes it: a product of
    fewer rows may differ in its last bits."""
    spliced = processes.splice(model, batch.ids, batch.pixels, batch.labels)
    logits = model.language_model(spliced.embeds, spliced.padding_mask).logits  # [B, T, V]
    assert spliced.labels is not None
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
    groups = optimiser.param_groups
    learning = [p for group in groups for p in group["params"]]
    updates = recipe.updates_for(len(examples))
    for update, epoch, rows in _in_order(examples, recipe, start):
        began = time.monotonic()
        loss = _backward(model, [[examples[i] for i in some] for some in rows], processor, recipe,
                         update, loss_of)  # fmt: skip
        processes.sum_gradients(learning)
        norm = _clip(learning, recipe.clip)
        flat = [examples[i] for some in rows for i in some]
        check_finite(update, loss, norm, flat)
        factor = rate_factor(update, updates, recipe.warmup)
        for group in groups:
            group["lr"] = group["base_rate"] * factor
        optimiser.step()
        optimiser.zero_grad()
        seconds = time.monotonic() - began
        yield Record(
            update=update + 1,
            epoch=epoch,
            loss=loss,
            tokens=sum(example.learnt for example in flat),
            rows=len(flat),
            pictures=sum(len(example.pictures) for example in flat),
            rates={group["part"]: group["lr"] for group in groups},
            norm=norm,
            clipped=0 < recipe.clip < norm,
            seconds=seconds,
            tokens_per_second=sum(example.positions for example in flat) / seconds,
            peak_memory=processes.peak_memory(learning[0].device),
        )


def check_finite(update: int, loss: float, norm: float, rows: Sequence[Example]) -> None:
    """Raises ValueError naming the rows for a loss or a norm that is not finite: learnt from, it
    would make all weights NaN."""
    if not (math.isfinite(norm) and math.isfinite(loss)):
        names = ", ".join(example.row.name for example in rows)
        raise ValueError(
            f"update {update + 1}: the loss is {loss}, its gradient's norm {norm}; nothing was "
            f"learnt from it; its rows: {names:.300}"
        )


def _backward(
    model: Llava,
    micro: Sequence[Sequence[Example]],
    processor: ImageProcessor,
    recipe: Recipe,
    update: int,
    loss_of: Callable[[Llava, Batch], Tensor],
) -> float:
    """The loss of an update, and its gradient, summed over the micro-batches of this process."""
    counts = [sum(example.learnt for example in some) for some in micro]
    loss = 0.0
    for part, weight in processes.own(len(micro)):
        batch = collate(micro[part], processor)
        whole = sum(counts) if recipe.loss_mean == "tokens" else batch.tokens * len(micro)
        with torch.random.fork_rng(devices=[]), arithmetic(model, recipe):  # of dropout
            torch.manual_seed((recipe.seed * 1_000_003 + update) * 1_009 + part)
            share = loss_of(model, batch) * weight / whole
        if share.requires_grad:  # rows without pictures give a projector no gradient
            share.backward()
        loss += share.item()
    return processes.total(loss)


def arithmetic(model: Llava, recipe: Recipe) -> AbstractContextManager:
    """In bfloat16, products are computed in it and what learns stays float32."""
    device = model.language_model.embed_tokens.weight.device.type
    return torch.autocast(device, torch.bfloat16, enabled=recipe.dtype == "bfloat16")


def _in_order(
    examples: Sequence[Example], recipe: Recipe, start: int
) -> Iterator[tuple[int, int, list[list[int]]]]:
    """Each update from `start` on, its epoch, and the row numbers of its micro-batches. An epoch is
    put in order once, which takes seconds for as many rows as LLaVA was trained on."""
    updates, per_epoch = recipe.updates_for(len(examples)), recipe.updates_per_epoch(len(examples))
    lengths = [example.row.words for example in examples]
    batch, parts = recipe.batch, recipe.accumulate
    for epoch in range(start // per_epoch, -(-updates // per_epoch)):
        rows = rows_in_order(lengths, recipe.order, batch, parts, recipe.seed, epoch)
        for update, micro in enumerate(micro_batches(rows, batch, parts), epoch * per_epoch):
            if start <= update < updates:
                yield update, epoch, micro


def _clip(learning: list[nn.Parameter], limit: float) -> float:
    """The norm of the gradient, which is then at most `limit`; 0 for no limit."""
    norm = nn.utils.clip_grad_norm_(learning, limit or float("inf"))
    return processes.whole(norm).item()
