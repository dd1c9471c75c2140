"""A pass that is kept, and the part of it that a change can reach, computed again.

Positions before the first changed one see nothing of it, and layers below the changed one come
before it. So neither is computed again: the kept keys and values stand for the former, and the kept
states go into the layer where the change is.

B rows, S positions of the sequence, T of them that are computed again, m tokens that are chosen,
C width, F feed-forward width, H heads, K key/value heads, D head width, L layers, V vocabulary.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from minillava.cache import KVCache
from minillava.checkpoint.place import available_memory
from minillava.llama import Context, LanguageModel, rotary_tables
from minillava.probe.intervene import Keep, States, intervene

SHARE = 1 / 4
"""Of the memory that is available, how much the rows of one batch may take."""

MOST_ROWS = 64
"""Rows of a batch: with more, nothing is faster, and the line that tells the progress stands still
for longer."""

UNKNOWN_ROWS = 8
"""Rows of a batch where the system does not say how much memory there is."""


class Pass:
    """One sequence that was read, [1, S, C]. states: L + 1 times [1, S, C], state l goes into layer
    l and the last one into the last norm. done: told how much was computed after each batch, in
    positions times layers. seconds: what it took."""

    done: Callable[[int], None] = staticmethod(lambda work: None)

    @torch.no_grad()
    def __init__(self, language: LanguageModel, embeds: Tensor):
        self.language, self.length = language, embeds.shape[1]
        text, kept = language.config, Keep()
        self.cache = KVCache(text, 1, self.length, dtype=embeds.dtype, device=embeds.device)
        started = time.perf_counter()
        with intervene(language, States(range(text.num_hidden_layers + 1)), kept):
            language(embeds, None, self.cache, last_only=True)
        self.seconds = time.perf_counter() - started
        self.states = [kept[layer] for layer in sorted(kept)]

    @torch.no_grad()
    def again(self, states: Tensor, start: int = 0, layer: int = 0) -> Tensor:
        """States [B, T, C] that go into a layer at the positions from `start` -> the last states of
        these positions, [B, T, C]. Interventions act on them as on any pass."""
        rows, length = states.shape[:2]
        positions = torch.arange(start, start + length, device=states.device)
        before, mask = None, None
        if start:
            before = _Before(self.cache, start)
            key = torch.arange(start + length, device=states.device)
            # each row has its own, so that an intervention can change them one by one
            mask = (key <= positions[:, None]).expand(rows, 1, -1, -1)
        tables = rotary_tables(positions[None], self.language.config, states.dtype)
        context = Context(*tables, mask, not start and length > 1, self.language.attend, before)
        for block in self.language.layers[layer:]:
            states, _ = block(states, context)
        self.done(rows * length * (len(self.language.layers) - layer))
        return states

    def rows_at_once(self, positions: int, chosen: int) -> int:
        """How many rows of so many positions are computed at once, m of them through the head; as
        many as fit into SHARE of the memory."""
        free = available_memory(str(self.cache.keys[0].device))
        if free is None:
            return UNKNOWN_ROWS
        text, size = self.language.config, self.cache.keys[0].element_size()
        # the largest at one time: of the feed-forward layer, or of the attention, where its weights
        # are written out, in float32 too
        wide = positions * (3 * text.intermediate_size + 8 * text.hidden_size)
        keys = 2 * self.length * text.num_attention_heads * text.head_dim
        weights = text.num_attention_heads * positions * self.length
        head = chosen * text.vocab_size
        each = size * (wide + keys) + (2 * size + 4) * weights + 20 * head
        return max(1, min(MOST_ROWS, int(free * SHARE / each)))


class _Before(KVCache):
    """What stands before `length`, the same for every row; what is computed is not kept."""

    def __init__(self, cache: KVCache, length: int):
        self.keys, self.values, self.length = cache.keys, cache.values, length

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """[B, K, T, D] -> those of all positions [B, K, S, D]."""
        before = (kept[layer][:, :, : self.length] for kept in (self.keys, self.values))
        one, other = (
            torch.cat([old.expand(len(k), -1, -1, -1), new], dim=2)
            for old, new in zip(before, (k, v), strict=True)
        )
        return one, other
