"""The key/value cache: what every token already read has left behind for the tokens to come.

B batch, K key/value heads, T new tokens, S cached and new tokens, D head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minillava.config import TextConfig


class KVCache:
    """Preallocated keys and values of every layer, made by the caller and passed down through the
    model. Not the queries: a query is used once, by its own token, but every later token looks at
    its key and reads its value.

    keys, values: per layer [B, K, capacity, D], rotary embedding already applied, not repeated for
    grouped heads. length: how many positions are filled, one number for all layers; a layer that
    counted its own would be ahead of the others while a step runs, and for good if the step fails.
    padding_mask: bool [B, capacity], False where a row is padding; None as long as no row has any.
    """

    def __init__(
        self,
        config: TextConfig,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        self.capacity, self.length = capacity, 0
        self.padding_mask: Tensor | None = None
        shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.empty_like(k) for k in self.keys]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new keys and values [B,K,T,D] after the cached ones. Returns all keys
        and values so far [B,K,S,D]. The length grows only with `advance`, once all layers have
        written.
        """
        start, end = self.length, self.length + k.shape[2]
        self.keys[layer][:, :, start:end] = k
        self.values[layer][:, :, start:end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def reserve(self, batch: int, new: int, padding_mask: Tensor | None) -> Tensor | None:
        """Make sure `new` tokens fit and note which are padding: bool [B, T], or None (all real).
        Returns the mask over old and new [B, S], None if nothing is padding. Raises ValueError if
        the cache is full."""
        rows, end = len(self.keys[0]), self.length + new
        if batch != rows:
            raise ValueError(f"the cache was made for {rows} row(s), the input has {batch}")
        if end > self.capacity:
            found = f"the cache holds {self.capacity} tokens: {self.length} are in it"
            raise ValueError(f"{found}, {new} more do not fit")
        if self.padding_mask is None:
            if padding_mask is None:
                return None
            shape, device = (rows, self.capacity), self.keys[0].device
            self.padding_mask = torch.ones(shape, dtype=torch.bool, device=device)
        self.padding_mask[:, self.length : end] = True if padding_mask is None else padding_mask
        return self.padding_mask[:, :end]

    def advance(self, new: int) -> None:
        self.length += new

    def truncate(self, length: int) -> None:
        """Forget what comes after `length` positions (a rejected draft, an abandoned turn)."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} tokens to {length}")
        self.length = length

    def keep(self, positions: list[int]) -> None:
        """What comes before positions[0] stays. Of the rest only `positions`, in rising order, stay
        and are moved together (the guesses of a tree that came true)."""
        first, end = positions[0], positions[0] + len(positions)
        if sorted({*positions}) != positions or not 0 <= first <= positions[-1] < self.length:
            raise ValueError(f"cannot keep {positions} of a cache of {self.length} tokens")
        for tensor in (*self.keys, *self.values):
            tensor[:, :, first:end] = tensor[:, :, positions]
        if self.padding_mask is not None:
            self.padding_mask[:, first:end] = self.padding_mask[:, positions]
        self.length = end

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` positions, keeping what is filled. One tensor after the other
        moves to a larger one, so that no more than one of them is ever held twice."""
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                new = old.new_empty(*old.shape[:2], capacity, old.shape[3])
                new[:, :, : self.length] = old[:, :, : self.length]
                tensors[layer] = new
        if self.padding_mask is not None:
            self.padding_mask = F.pad(self.padding_mask, (0, capacity - self.capacity))
        self.capacity = capacity

    def copy_to(self, other: "KVCache", length: int) -> None:
        """Let another cache of as many rows hold the first `length` positions of this one."""
        for ours, theirs in ((self.keys, other.keys), (self.values, other.values)):
            for old, new in zip(ours, theirs, strict=True):
                new[:, :, :length] = old[:, :, :length]
        other.length = length

    def select_rows(self, rows: Tensor) -> None:
        """Row i goes on as a copy of what row rows[i] was: prompts repeated for beams, or beams in
        a new order."""
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                filled = old[rows, :, : self.length]
                if len(rows) != len(old):
                    tensors[layer] = old.new_empty((len(rows), *old.shape[1:]))
                tensors[layer][:, :, : self.length] = filled
        if self.padding_mask is not None:
            self.padding_mask = self.padding_mask[rows]
