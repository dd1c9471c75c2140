"""LoRA that learns (Hu et al. 2021): y = W·x + scale · B·A·x, with W frozen.

The names are those that checkpoint/adapter.py reads. r rank, C width before, N width after.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillava.fast.quantize import QuantisedLinear
from minillava.finetune.recipe import Recipe
from minillava.llava import Llava


class LoraLinear(nn.Module):
    """A linear layer with a LoRA. A and B are float32 over a narrower W; A is initialised as in
    PEFT, B with zeros, so that the output is unchanged before the first update. The scale is
    alpha / r, or alpha / √r (rsLoRA, Kalajdzievski 2023)."""

    def __init__(self, base: nn.Linear | QuantisedLinear, recipe: Recipe):
        super().__init__()
        self.base, self.dropout, rank = base, recipe.dropout, recipe.rank
        self.scale = recipe.alpha / (math.sqrt(rank) if recipe.rslora else rank)
        kept = base.weight
        a = torch.empty(rank, base.in_features, device=kept.device)
        if recipe.init == "gaussian":
            nn.init.normal_(a, std=1 / rank)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        dtype = torch.float64 if kept.dtype == torch.float64 else torch.float32
        self.lora_A = nn.Parameter(a.to(dtype))  # [r, C]
        b = torch.zeros(base.out_features, rank, device=kept.device, dtype=dtype)
        self.lora_B = nn.Parameter(b)  # [N, r]

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., N]"""
        y = self.base(x)
        narrow = F.dropout(x.to(self.lora_A.dtype), self.dropout, self.training)
        # PEFT computes in this order: the scale last.
        gain = F.linear(F.linear(narrow, self.lora_A), self.lora_B) * self.scale
        return (y + gain).to(y.dtype)


def add_lora(model: Llava, recipe: Recipe) -> None:
    """A LoRA on every linear layer of the language model's blocks. The vision tower has layers of
    the same names, and gets none."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        for block in model.language_model.layers:
            for part in (block.self_attn, block.mlp):
                for name, base in list(part.named_children()):
                    if isinstance(base, (nn.Linear, QuantisedLinear)):
                        part.add_module(name, LoraLinear(base, recipe))


def lora_layers(model: Llava) -> dict[str, LoraLinear]:
    """The LoRA layers by our names of their weights, without `.weight`."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)
    }
