"""How well a run does on rows that it does not learn: their loss, and answers to two questions."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minillava.assistant import Assistant
from minillava.config import IMAGE_TOKEN_INDEX
from minillava.finetune.loop import Batch, arithmetic, collate, summed_loss
from minillava.finetune.order import blocks
from minillava.finetune.recipe import Recipe
from minillava.finetune.rows import Example
from minillava.generate.generation import generate
from minillava.image import ImageProcessor
from minillava.llava import Llava
from minillava.prompt import render

ASKED = 2  # held-out questions that are answered
LONGEST = 48  # tokens of such an answer: one that never stops is seen by then


def held_out_loss(
    model: Llava,
    examples: Sequence[Example],
    processor: ImageProcessor,
    recipe: Recipe,
    loss_of: Callable[[Llava, Batch], Tensor] = summed_loss,
) -> float:
    """The mean loss per token of rows that are not learnt, without dropout. Over quantised weights
    it is computed as in the training: without a gradient, products of few rows go other ways."""
    learning = model.language_model.training
    model.language_model.eval()
    loss, tokens = 0.0, 0
    with torch.set_grad_enabled(recipe.quantize is not None), arithmetic(model, recipe):
        for some in blocks(examples, recipe.batch):
            batch = collate(some, processor)
            loss += loss_of(model, batch).item()
            tokens += batch.tokens
    model.language_model.train(learning)
    return loss / tokens


@torch.no_grad()
def answers(assistant: Assistant, examples: Sequence[Example], recipe: Recipe) -> list[dict]:
    """The first questions of some rows, answered greedily: what was asked, answered, expected."""
    model, told = assistant.model, []
    learning = model.language_model.training
    model.language_model.eval()
    for example in examples[:ASKED]:
        row = example.row
        (question, expected), *_ = row.turns
        ids = assistant.tokenizer.encode(render(assistant.template, [(question, None)], row.system))
        pictures = row.pictures[: ids.count(IMAGE_TOKEN_INDEX)]
        pixels = assistant.image_processor(list(pictures)) if pictures else None
        with arithmetic(model, recipe):
            found = generate(
                model, [ids], pixels, tokenizer=assistant.tokenizer,
                max_new_tokens=LONGEST, stop=assistant.template.stop,
            )  # fmt: skip
        answer: dict[str, Any] = {"row": row.name, "question": question, "expected": expected}
        told.append({**answer, "answer": (found.text or [""])[0], "ended": found.finish_reason[0]})
    model.language_model.train(learning)
    return told


def best_of(records: Sequence[dict[str, Any]]) -> tuple[float, int]:
    """The lowest held-out loss so far, and how many measurements came after it."""
    losses = [record["held_out_loss"] for record in records if "held_out_loss" in record]
    if not losses:
        return float("inf"), 0
    return min(losses), len(losses) - 1 - losses.index(min(losses))
