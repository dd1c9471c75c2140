"""Heads of Medusa learn what a frozen model says next (generate/medusa.py reads them).

The model runs without gradients, so that an update costs a forward pass and the heads. Learn from
the model's own answers: a head must guess what this model says, not what is true.

B rows, T positions, N positions before an answer's tokens, K heads, C width, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from minillava.checkpoint.medusa import HEADS_NAME
from minillava.config import IGNORE_INDEX
from minillava.files.disk import write_whole
from minillava.finetune.order import blocks
from minillava.finetune.rows import Example
from minillava.generate.medusa import Heads
from minillava.image import ImageProcessor
from minillava.llava import Llava

LATER = 0.8
"""Each further head counts so much less in the loss, as in Medusa's own training."""

RANKS = (1, 5)
"""Whether the token is the best guess, and whether it is one of the best five."""

NAME = "medusa"
"""Under which the heads are a part of the model while they learn."""


def add_heads(model: Llava, count: int) -> dict[str, nn.Parameter]:
    """Give a frozen model heads that share its vocabulary; returns their parameters by name."""
    heads = Heads(count, model.config.text.hidden_size)
    model.add_module(NAME, heads.to(model.projector.linear_1.weight.device))
    return {f"{NAME}.{name}": parameter for name, parameter in heads.named_parameters()}


def heads_of(model: Llava) -> Heads:
    heads = model.get_submodule(NAME)
    assert isinstance(heads, Heads)
    return heads


def heads_loss(
    model: Llava, ids: list[list[int]], labels: list[list[int]], pixels: Tensor
) -> Tensor:
    """The cross-entropy of every token that a head has to guess, summed."""
    hidden, targets = read_answers(model, ids, labels, pixels)
    logits = heads_of(model)(hidden, model.language_model)  # [N, K, V]
    losses = [
        LATER**k * F.cross_entropy(logits[:, k], target, ignore_index=IGNORE_INDEX, reduction="sum")
        for k, target in enumerate(targets.unbind(1))
    ]
    return torch.stack(losses).sum()


@torch.no_grad()
def read_answers(
    model: Llava, ids: list[list[int]], labels: list[list[int]], pixels: Tensor
) -> tuple[Tensor, Tensor]:
    """The hidden states [N, C] from which the model's head chooses an answer's tokens, and for each
    the tokens [N, K] after that one, IGNORE_INDEX where the answer has ended."""
    spliced = model.splice(ids, pixels, labels=labels)
    hidden = model.language_model(spliced.embeds, spliced.padding_mask).hidden  # [B, T, C]
    assert hidden is not None and spliced.labels is not None
    later = spliced.labels[:, 1:]  # [B, T - 1], what position t chooses
    before = answered = later != IGNORE_INDEX
    targets = []
    for _ in heads_of(model):
        later = F.pad(later[:, 1:], (0, 1), value=IGNORE_INDEX)
        # an answer goes on as long as every token of it is learnt, up to that one
        answered = answered & (later != IGNORE_INDEX)
        targets.append(later.masked_fill(~answered, IGNORE_INDEX))
    return hidden[:, :-1][before], torch.stack(targets, dim=-1)[before]


@torch.no_grad()
def accuracy(
    model: Llava, examples: Sequence[Example], processor: ImageProcessor, batch: int
) -> list[list[float]]:
    """For each head, how often its token is among the best of RANKS."""
    heads = heads_of(model)
    right, asked = torch.zeros(len(heads), len(RANKS)), torch.zeros(len(heads))
    for some in blocks(examples, batch):
        pictures = processor([picture for example in some for picture in example.pictures])
        hidden, targets = read_answers(
            model, [e.ids for e in some], [e.labels for e in some], pictures
        )
        logits = heads(hidden, model.language_model)  # [N, K, V]
        best = logits.topk(min(max(RANKS), logits.shape[-1]), dim=-1).indices
        found = (best == targets[..., None]) & (targets[..., None] != IGNORE_INDEX)  # [N, K, 5]
        for at, rank in enumerate(RANKS):
            right[:, at] += found[..., :rank].any(-1).sum(0).cpu()
        asked += (targets != IGNORE_INDEX).sum(0).cpu()
    return (right / asked.clamp(min=1)[:, None]).tolist()


def told(found: list[list[float]]) -> str:
    """The accuracies in words."""
    each = (f"{k}: {one:.1%} and {five:.1%}" for k, (one, five) in enumerate(found))
    return f"top-1 and top-5 of head {', '.join(each)}"


def save_heads(model: Llava, out: Path) -> None:
    """The heads as `--draft medusa:OUT` reads them, in float16. Raises OSError."""
    tensors = {
        name: tensor.detach().to("cpu", torch.float16).contiguous()
        for name, tensor in heads_of(model).state_dict().items()
    }
    write_whole(out / HEADS_NAME, save(tensors, metadata={"format": "pt"}))
