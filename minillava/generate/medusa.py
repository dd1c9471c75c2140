"""Medusa (Cai et al. 2024): small heads on the model itself guess several tokens at once.

A head reads the last hidden state, from which the model's own head chose the next token, and
guesses a later one: head 0 the token after the next, head 1 the one after that. It is a few layers
x + SiLU(W·x + b) and a product with a vocabulary, its own or the model's.

K heads, C width of the model, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillava.generate.tree import Tree, most_likely
from minillava.llama import LanguageModel, upcast
from minillava.sampling import Sampler

RANKS = 10
"""So many tokens of each head may be guessed, as in Medusa's own trees."""


class Layer(nn.Module):
    """x + SiLU(W·x + b). W is zero at first, so that training begins near the model's own head."""

    def __init__(self, width: int, bias: bool = True):
        super().__init__()
        self.linear = nn.Linear(width, width, bias=bias)
        nn.init.zeros_(self.linear.weight)
        if bias:
            nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


class Heads(nn.ModuleList):
    """The heads; their tensors have the names of the published files: `k.j.linear.weight` of layer
    j of head k, and `k.n.weight` [V,C] after its n layers if it has a vocabulary of its own."""

    def __init__(self, count: int, width: int, layers: int = 1, rows: int = 0, bias: bool = True):
        """rows: of a vocabulary for each head; 0: they share the model's."""
        super().__init__(
            nn.Sequential(
                *(Layer(width, bias) for _ in range(layers)),
                *(nn.Linear(width, rows, bias=False) for _ in range(1 if rows else 0)),
            )
            for _ in range(count)
        )
        self.shared = not rows

    def forward(self, hidden: Tensor, language: LanguageModel) -> Tensor:
        """Hidden states [..., C], normalised -> logits [..., K, V] of the tokens after the next."""
        found = torch.stack([head(hidden) for head in self], dim=-2)
        return language.head(found) if self.shared else found


def heads_of(tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> Heads:
    """Heads from their tensors by the names that `Heads` gives them."""
    width = tensors["0.0.linear.weight"].shape[1]
    count = 1 + max(int(name.split(".")[0]) for name in tensors)
    layers = sum(name.startswith("0.") and name.endswith("linear.weight") for name in tensors)
    own = tensors.get(f"0.{layers}.weight")
    with torch.device("meta"):
        heads = Heads(
            count, width, layers, 0 if own is None else len(own), "0.0.linear.bias" in tensors
        )
    ready = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
    heads.load_state_dict(ready, assign=True)
    return heads.eval().requires_grad_(False)


class Medusa:
    """The drafter (see speculate.py). All heads are read once, and their best tokens make a tree of
    guesses."""

    kind, cost = "medusa", None

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        words: Sequence[int] | None,
        language: LanguageModel,
        ranks: int = RANKS,
    ):
        """tensors, words: as checkpoint/medusa.py opens them. ranks: as many tokens of each head
        may be guessed; with 1 the guesses are a chain."""
        weight = language.embed_tokens.weight
        self.heads = heads_of(tensors, weight.dtype, weight.device)
        self.language, self.words, self.ranks = language, words, ranks

    def begin(self, prompt: list[int], sampler: Sampler, pictures: Sequence[Any]) -> "MedusaDraft":
        return MedusaDraft(self)


class MedusaDraft:
    """The guesses for one answer."""

    def __init__(self, drafter: Medusa):
        self.drafter = drafter
        self.hidden: Tensor | None = None  # [C], which the heads read

    def propose(self, count: int) -> Tree:
        assert self.hidden is not None  # the prompt's is known before the first guess
        drafter = self.drafter
        logits = drafter.heads(self.hidden[None], drafter.language)[0]  # [K, V]
        best = upcast(logits).softmax(-1).topk(min(drafter.ranks, logits.shape[-1]))
        tokens, words = best.indices.tolist(), drafter.words
        if words is not None:
            tokens = [[words[i] for i in each] for each in tokens]
        return most_likely(tokens, best.values.tolist(), count)

    def accept(self, ids: list[int], hidden: Tensor) -> None:
        self.hidden = hidden
