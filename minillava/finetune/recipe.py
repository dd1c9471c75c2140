"""What is learnt, how fast and for how long: published recipes, of which any field can be
changed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from minillava.options import ASPECTS, ATTENTION, KINDS, expect_one_of
from minillava.templates import DEFAULT_TEMPLATE, TEMPLATES

LEARN = ("projector", "lora", "language", "everything", "medusa")
MEANS = ("tokens", "microbatch")
ORDERS = ("length", "shuffle", "file")
INITS = ("kaiming", "gaussian")
PRECISIONS = ("auto", "float32", "bfloat16", "float64")


@dataclass(frozen=True)
class Recipe:
    """The settings of a run. The defaults are those of LLaVA-1.5's LoRA.

    learn: the projector alone; LoRA on the language model's linear layers, and the projector; the
    whole language model, and the projector; everything, the vision tower with them; or so many
    `heads` of Medusa. rslora: the LoRA counts alpha / √rank, not alpha / rank. init: how its A
    begins, as PEFT's init_lora_weights. accumulate: micro-batches of `batch` rows that make an
    update, over all processes. updates: instead of epochs. max_length: positions of a row, with
    those of pictures. warmup: the share of updates until the full rate. clip: the largest norm of
    an update's gradient; 0 for none. loss_mean: over the tokens of an update, or of each micro-
    batch alone as LLaVA was trained. quantize: the frozen language model in 8 or 4 bits a weight.
    hold_out: the share of rows that are not learnt, but measured. dtype: in which products are
    computed, and frozen weights held; what learns is float32. attention: eager, fused, or auto,
    which start.py settles. add_tokens: new tokens and their ids. Raises ValueError for values out
    of range.
    """

    learn: str = "lora"
    template: str = "vicuna_v1"
    aspect: str = "pad"
    rate: float = 2e-4
    projector_rate: float = 2e-5
    vision_rate: float = 2e-6
    rank: int = 128
    alpha: float = 256
    rslora: bool = False
    init: str = "kaiming"
    dropout: float = 0.05
    batch: int = 16
    accumulate: int = 8
    epochs: int = 1
    updates: int | None = None
    max_length: int = 2048
    warmup: float = 0.03
    decay: float = 0.0
    clip: float = 0.0
    order: str = "length"
    loss_mean: str = "tokens"
    seed: int = 42
    quantize: str | None = None
    hold_out: float = 0.0
    heads: int = 5
    dtype: str = "auto"
    attention: str = "auto"
    add_tokens: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        choices = {"learn": LEARN, "order": ORDERS, "loss_mean": MEANS, "aspect": ASPECTS,
                   "init": INITS, "attention": ("auto", *ATTENTION)}  # fmt: skip
        for name, known in {**choices, "template": tuple(TEMPLATES)}.items():
            expect_one_of(name, vars(self)[name], known)
        expect_one_of("quantize", self.quantize, (None, *KINDS))
        if self.dtype == "float16":
            raise ValueError(
                "float16 overflows at 65,504, which LLaVA's activations reach; learn in bfloat16 "
                "or float32"
            )
        expect_one_of("dtype", self.dtype, PRECISIONS)
        if self.add_tokens and self.learn in ("projector", "medusa"):
            raise ValueError(
                f"--learn {self.learn} learns no row of a table, and new tokens need theirs; "
                "choose --learn lora or language"
            )
        if self.quantize and self.learn in ("language", "everything"):
            raise ValueError("quantised weights cannot learn; choose --learn lora or projector")
        for name, low, high in (
            ("rate", 0, 1),
            ("projector_rate", 0, 1),
            ("vision_rate", 0, 1),
            ("rank", 1, 4096),
            ("alpha", 0, 1e6),
            ("dropout", 0, 0.999),
            ("batch", 1, 1 << 20),
            ("accumulate", 1, 1 << 20),
            ("epochs", 1, 1 << 20),
            ("updates", 1, 1 << 40),
            ("max_length", 2, 1 << 30),
            ("warmup", 0, 1),
            ("decay", 0, 1),
            ("clip", 0, 1e9),
            ("seed", 0, 2**32),
            ("hold_out", 0, 0.9),
            ("heads", 1, 64),
        ):
            value = vars(self)[name]
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} is {value}, expected a number from {low} to {high}")

    def rate_of(self, part: str) -> float:
        """The full rate of a part of the model, as learning.py calls it."""
        rates = {"projector": self.projector_rate, "vision tower": self.vision_rate}
        return rates.get(part, self.rate)

    def updates_for(self, rows: int) -> int:
        """How many updates a run takes."""
        if self.updates is not None:
            return self.updates
        return self.epochs * self.updates_per_epoch(rows)

    def updates_per_epoch(self, rows: int) -> int:
        return -(-rows // (self.batch * self.accumulate))


# As published for LLaVA-1.5, of 7 and 13 billion parameters alike, for 8 GPUs: an update there
# takes 256 rows in stage 1 and 128 in all others.
RECIPES: dict[str, dict[str, Any]] = {
    "stage1": {"learn": "projector", "template": "plain", "aspect": "crop", "rate": 1e-3,
               "projector_rate": 1e-3, "batch": 32, "order": "shuffle"},
    "stage2": {"learn": "language", "rate": 2e-5, "projector_rate": 2e-5},
    "lora": {},
    "task": {"learn": "language", "rate": 2e-5, "projector_rate": 2e-5},
    "task-lora": {},
}  # fmt: skip

# For heads: the rate of Medusa's training, and the prompts that are asked without a choice.
HEADS: dict[str, Any] = {"rate": 1e-3, "template": DEFAULT_TEMPLATE}


def read_recipe(name: str, changed: dict[str, Any]) -> Recipe:
    """A recipe by its name, with the fields that are not None changed. Raises ValueError."""
    expect_one_of("recipe", name, tuple(RECIPES))
    known = {field.name for field in fields(Recipe)}
    given = {key: value for key, value in changed.items() if key in known and value is not None}
    if "rate" in given and RECIPES[name].get("learn", "lora") == "projector":
        given.setdefault("projector_rate", given["rate"])
    if "rank" in given:  # the published 256 over 128, whatever the rank
        given.setdefault("alpha", 2.0 * given["rank"])
    of_heads = HEADS if given.get("learn") == "medusa" else {}
    return Recipe(**{**RECIPES[name], **of_heads, **given})


def rate_factor(update: int, updates: int, warmup: float) -> float:
    """The factor of the learning rates: it rises linearly from 0, then falls to 0 as a half cosine.
    A function of the update alone, so that a run that goes on needs no state for it."""
    rising = math.ceil(warmup * updates)
    if update < rising:
        return update / max(1, rising)
    done = (update - rising) / max(1, updates - rising)
    return 0.5 * (1 + math.cos(math.pi * done))
