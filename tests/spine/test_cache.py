"""The cache as a data structure; that decoding with it equals decoding without is in
test_llava.py."""

import pytest
import torch

from minillava.cache import KVCache
from minillava.config import TextConfig

CONFIG = TextConfig(
    hidden_size=16, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2
)


def cache(batch=2, capacity=6):
    return KVCache(CONFIG, batch, capacity, dtype=torch.float32, device="cpu")


def kv(tokens, value, batch=2):
    return torch.full((batch, 2, tokens, 4), float(value))


def test_update_returns_all_so_far_and_advance_moves_on():
    """Layers of one step write to the same positions: a cache that moved on with each layer's
    update would leave gaps."""
    c = cache()
    for layer in (0, 1):
        k, _ = c.update(layer, kv(3, layer), kv(3, layer))
        assert k.shape == (2, 2, 3, 4)
    c.advance(3)
    k, v = c.update(1, kv(1, 9), kv(1, 8))
    assert k[0, 0, :, 0].tolist() == [1, 1, 1, 9]
    assert v[0, 0, :, 0].tolist() == [1, 1, 1, 8]
    c.advance(1)
    assert c.length == 4


def test_overflow_raises_with_the_numbers():
    """A slice behind the end is empty, and what is written into it is lost without an error."""
    c = cache(capacity=4)
    c.reserve(2, 3, None)
    c.advance(3)
    with pytest.raises(ValueError, match="holds 4 tokens: 3 are in it, 2 more do not fit"):
        c.reserve(2, 2, None)


def test_another_batch_size_is_refused():
    """One row would be broadcast into every row of the cache."""
    with pytest.raises(ValueError, match=r"made for 2 row\(s\), the input has 1"):
        cache().reserve(1, 3, None)


def test_truncate_forgets_the_end_and_refuses_nonsense():
    """What was forgotten lies in memory still: the next tokens must be written over it."""
    c = cache()
    c.update(0, kv(4, 1), kv(4, 1))
    c.advance(4)
    c.truncate(2)
    k, _ = c.update(0, kv(1, 5), kv(1, 5))
    assert k[0, 0, :, 0].tolist() == [1, 1, 5]
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match="cannot truncate a cache of 2 tokens"):
            c.truncate(wrong)


def test_growing_keeps_what_is_filled():
    """A conversation's cache grows while it is used; keys, values and padding move to new memory
    together."""
    c = cache(capacity=3)
    c.reserve(2, 3, torch.tensor([[False, True, True], [True, True, True]]))
    for layer in (0, 1):
        c.update(layer, kv(3, layer + 1), kv(3, layer + 5))
    c.advance(3)
    c.grow(5)
    mask = c.reserve(2, 2, None)
    k, v = c.update(1, kv(2, 9), kv(2, 8))
    assert (k[1, 1, :, 3].tolist(), v[0, 0, :, 0].tolist()) == ([2, 2, 2, 9, 9], [6, 6, 6, 8, 8])
    assert mask.tolist() == [[False, True, True, True, True], [True] * 5]
    with pytest.raises(ValueError, match="holds 5 tokens: 3 are in it, 3 more do not fit"):
        c.reserve(2, 3, None)


def test_rows_are_repeated_and_reordered_with_their_padding():
    """Beams change places at every step: a row that leaves its padding behind attends to it."""
    c = cache(capacity=3)
    c.reserve(2, 2, torch.tensor([[False, True], [True, True]]))
    for layer in (0, 1):
        rows = torch.tensor([10.0, 20.0])[:, None, None, None].expand(2, 2, 2, 4) + layer
        c.update(layer, rows, rows + 5)
    c.advance(2)
    c.select_rows(torch.tensor([0, 0, 1, 1]))
    c.select_rows(torch.tensor([2, 0, 1, 2]))
    mask = c.reserve(4, 1, None)
    k, v = c.update(1, kv(1, 9, batch=4), kv(1, 9, batch=4))
    assert (k[:, 1, :, 0].tolist(), v[:, 0, 0, 3].tolist()) == (
        [[21, 21, 9], [11, 11, 9], [11, 11, 9], [21, 21, 9]],
        [26, 16, 16, 26],
    )
    assert mask.tolist() == [
        [True, True, True],
        [False, True, True],
        [False, True, True],
        [True, True, True],
    ]


def test_padding_is_remembered_and_new_tokens_are_real():
    """A decoding step is given no mask; without the remembered one it attends to the prompt's
    padding."""
    c = cache()
    assert c.reserve(2, 2, None) is None
    mask = torch.tensor([[False, True, True], [True, True, True]])
    assert torch.equal(c.reserve(2, 3, mask), mask)
    c.advance(3)
    assert torch.equal(
        c.reserve(2, 1, None), torch.cat([mask, torch.ones(2, 1, dtype=torch.bool)], dim=1)
    )


def test_grouped_heads_are_stored_once():
    """Stored for each query head, a cache of a grouped model takes several times its memory."""
    assert cache().keys[0].shape == (2, 2, 6, 4)


def test_keep_moves_what_stays_together():
    """The guess that came true stood behind one that did not."""
    cache = KVCache(CONFIG, 2, 8, dtype=torch.float32, device="cpu")
    before = [torch.randn_like(tensor) for tensor in (*cache.keys, *cache.values)]
    for tensor, numbers in zip((*cache.keys, *cache.values), before, strict=True):
        tensor.copy_(numbers)
    cache.reserve(2, 7, torch.tensor([[False] + [True] * 6, [True] * 7]))
    cache.advance(7)
    cache.keep([2, 3, 6])
    assert cache.length == 5
    for tensor, numbers in zip((*cache.keys, *cache.values), before, strict=True):
        assert torch.equal(tensor[:, :, :5], numbers[:, :, [0, 1, 2, 3, 6]])
    assert cache.padding_mask[:, :5].tolist() == [[False, *[True] * 4], [True] * 5]
    for wrong in ([3, 2], [2, 2], [4, 5], [-1, 2]):
        with pytest.raises(ValueError, match="cannot keep"):
            cache.keep(wrong)
