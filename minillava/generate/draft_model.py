"""A small model that guesses what a large one will say (Leviathan et al. 2023, Chen et al. 2023): a
Llama, which reads only the text, or a smaller LLaVA, which sees the pictures too.

It chooses with a fork of the answer's sampler: with the same penalties and filters, and in sampling
with the same random numbers, so that two models with similar probabilities draw the same token.

V vocabulary of the large model, C width of the small one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minillava.cache import KVCache
from minillava.config import IMAGE_TOKEN_INDEX
from minillava.generate.speculate import fork
from minillava.llama import LanguageModel, upcast
from minillava.sampling import Sampler
from minillava.tokenizer import common_prefix


class DraftModel:
    """The drafter (see speculate.py)."""

    kind = "model"

    def __init__(
        self,
        language: LanguageModel,
        large: LanguageModel,
        see: Callable[[list[int], Sequence[Any]], Tensor] | None = None,
    ):
        """see: for a LLaVA, makes the vectors [1, T, C] of ids with -200 and their pictures."""
        self.language, self.see = language, see
        self.vocabulary, self.dtype = (
            large.config.vocab_size,
            upcast(large.embed_tokens.weight[:0]).dtype,
        )
        # A step reads all weights once, so its cost is their size.
        self.cost = size(language) / size(large)

    def begin(self, prompt: list[int], sampler: Sampler, pictures: Sequence[Any]) -> "ModelDraft":
        count = prompt.count(IMAGE_TOKEN_INDEX)
        if self.see is not None and count == len(pictures):
            return ModelDraft(self, sampler, self.see(prompt, pictures))
        words = torch.tensor([[i for i in prompt if i != IMAGE_TOKEN_INDEX]])
        return ModelDraft(self, sampler, words.to(self.language.embed_tokens.weight.device))


def size(model: LanguageModel) -> int:
    """The bytes of a model's weights."""
    tensors = (*model.parameters(), *model.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class ModelDraft:
    """The guesses for one answer. The cache has the prompt, then `read`: tokens of the answer, or
    guesses that may turn out to be wrong."""

    def __init__(self, drafter: DraftModel, sampler: Sampler, prompt: Tensor):
        """prompt: ids [1, T], or vectors [1, T, C]."""
        self.drafter, self.sampler, self.prompt = drafter, sampler, prompt
        self.answer: list[int] = []
        self.read: list[int] = []
        weight = drafter.language.embed_tokens.weight
        # as much of the remaining context as the answer can need
        longest = prompt.shape[1] + sampler.options.max_new_tokens
        self.capacity = min(drafter.language.config.context, longest)
        self.cache = KVCache(
            drafter.language.config, 1, self.capacity, dtype=weight.dtype, device=weight.device
        )

    def propose(self, count: int) -> list[int]:
        if self.prompt.shape[1] + len(self.answer) + count > self.capacity:
            return []  # its context is shorter
        chooser, found = fork(self.sampler), []
        logits = self._catch_up()
        while True:
            token_ids, _, _ = chooser(self._as_large(logits))
            chooser.remember(token_ids)
            found.append(int(token_ids))
            if len(found) == count or found[-1] in chooser.end_ids.tolist():
                return found
            logits = self._read(found[-1:])

    def accept(self, ids: list[int], hidden: Tensor) -> None:
        self.answer += ids

    def _catch_up(self) -> Tensor:
        """Read the tokens of the answer that are not in the cache yet, at least the last one."""
        if not self.cache.length:
            self.drafter.language(self.prompt, None, self.cache, last_only=True)
        # The last is read again if it was a guess that no pass checked (speculate.text_only).
        kept = min(common_prefix(self.read, self.answer), len(self.answer) - 1)
        self.cache.truncate(self.prompt.shape[1] + kept)
        self.read = self.read[:kept]
        return self._read(self.answer[kept:])

    def _read(self, ids: list[int]) -> Tensor:
        """Logits [1, V'] after further tokens, V' its own vocabulary."""
        self.read += ids
        new = torch.tensor([ids], device=self.prompt.device)
        return upcast(self.drafter.language(new, None, self.cache, last_only=True).logits[:, -1])

    def _as_large(self, logits: Tensor) -> Tensor:
        """[1, V'] -> [1, V]: a token that only one of the two models has is never guessed."""
        logits = logits.masked_fill(~logits.isfinite(), -torch.inf)[:, : self.drafter.vocabulary]
        missing = self.drafter.vocabulary - logits.shape[1]
        return F.pad(logits, (0, missing), value=-torch.inf).to(self.drafter.dtype)
