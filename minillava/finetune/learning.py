"""The parameters that learn, and their groups in the optimiser."""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from minillava.finetune.lora import add_lora
from minillava.finetune.medusa import add_heads
from minillava.finetune.recipe import Recipe
from minillava.finetune.tokens import add_rows
from minillava.llava import Llava


def prepare(model: Llava, recipe: Recipe, again: bool = False) -> dict[str, nn.Parameter]:
    """Freeze the model but for what the recipe learns, which is float32; returns that by name. The
    vision tower learns with `everything` alone. again: the blocks of what learns are computed again
    in the backward pass, which gives the same bits in less memory."""
    model.requires_grad_(False)
    model.eval()  # none of the model's own layers has dropout
    if recipe.learn == "medusa":
        return add_heads(model, recipe.heads)
    if recipe.learn == "lora":
        add_lora(model, recipe)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        model.language_model.train()
    if recipe.add_tokens:
        add_rows(model, recipe.add_tokens, whole=recipe.learn != "lora")
    if recipe.learn in ("language", "everything"):
        model.language_model.requires_grad_(True)
    if recipe.learn == "everything":
        model.vision_tower.requires_grad_(True)
    model.projector.requires_grad_(True)
    if again:
        compute_again(model)
    return learnt_of(model)


def learnt_of(model: Llava) -> dict[str, nn.Parameter]:
    """What learns, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def blocks_of(model: Llava) -> list[nn.Module]:
    return [*model.language_model.layers, *model.vision_tower.encoder.layers]


def compute_again(model: Llava) -> None:
    """Of each block only the input is kept for the backward pass, which computes the rest anew."""
    for block in blocks_of(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to, in words."""
    if ".lora_" in name:
        return "LoRA"
    if name.endswith(".added"):
        return "new tokens"
    parts = {"projector": "projector", "vision_tower": "vision tower", "medusa": "heads"}
    return parts.get(name.partition(".")[0], "language model")


def parameter_groups(learning: dict[str, nn.Parameter], recipe: Recipe) -> list[dict[str, Any]]:
    """Up to two groups for each part, with weight decay and (biases and norms) without, each with
    its parameters. `base_rate` is the rate that the schedule multiplies."""
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in learning.items():
        decays = not name.endswith("bias") and "norm" not in name
        groups.setdefault((part_of(name), decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "part": part,
            "base_rate": recipe.rate_of(part),
            "lr": 0.0,
            "weight_decay": recipe.decay if decays else 0.0,
        }
        for (part, decays), parameters in groups.items()
    ]


def make_optimiser(learning: dict[str, nn.Parameter], recipe: Recipe) -> torch.optim.AdamW:
    """torch's AdamW. On a CPU the fused variant rounds differently from the two others, and the one
    for many tensors at once (foreach) makes copies of all that learns."""
    cuda = next(iter(learning.values())).device.type == "cuda"
    groups = parameter_groups(learning, recipe)
    return torch.optim.AdamW(groups, lr=0.0, fused=cuda, foreach=False)
