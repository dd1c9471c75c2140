"""The parameters that learn, and their groups in the optimiser."""

from typing import Any

import torch
from torch import nn

from minillava.finetune.lora import add_lora
from minillava.finetune.medusa import add_heads
from minillava.finetune.recipe import Recipe
from minillava.llava import Llava


def prepare(model: Llava, recipe: Recipe) -> dict[str, nn.Parameter]:
    """Freeze the model but for what the recipe learns, which is float32; returns that by name. The
    vision tower never learns. Raises ValueError for a language model that shares its table with its
    head, of which only the pair could learn."""
    model.requires_grad_(False)
    model.eval()  # none of the model's own layers has dropout
    if recipe.learn == "medusa":
        return add_heads(model, recipe.heads)
    if recipe.learn == "lora":
        add_lora(model, recipe.rank, recipe.alpha, recipe.dropout, recipe.seed)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        model.language_model.train()
    if recipe.learn == "language":
        model.language_model.requires_grad_(True)
    model.projector.requires_grad_(True)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def parameter_groups(learning: dict[str, nn.Parameter], recipe: Recipe) -> list[dict[str, Any]]:
    """Up to four groups, each with parameters: of the projector or not, with weight decay or
    (biases and norms) without. `base_rate` is the rate that the schedule multiplies."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in learning.items():
        decays = not name.endswith("bias") and "norm" not in name
        groups.setdefault((name.startswith("projector."), decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "base_rate": recipe.projector_rate if projector else recipe.rate,
            "lr": 0.0,
            "weight_decay": recipe.decay if decays else 0.0,
        }
        for (projector, decays), parameters in groups.items()
    ]


def make_optimiser(learning: dict[str, nn.Parameter], recipe: Recipe) -> torch.optim.AdamW:
    """torch's AdamW. On a CPU the fused variant rounds differently from the two others."""
    cuda = next(iter(learning.values())).device.type == "cuda"
    groups = parameter_groups(learning, recipe)
    return torch.optim.AdamW(groups, lr=0.0, fused=cuda, foreach=not cuda)
