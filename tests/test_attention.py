"""`eager` against `fused`, and both against the formula in float64."""

import pytest
import torch

from minillava import attention, linear
from minillava.attention import eager, fused


def inputs(batch=2, heads=4, kv_heads=2, queries=5, keys=7, width=8, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)

    def rand(h, t):
        return torch.randn(batch, h, t, width, generator=g, dtype=torch.float64).to(dtype)

    return rand(heads, queries), rand(kv_heads, keys), rand(kv_heads, keys)


def formula(q, k, v, mask=None):
    """Head by head, query by query."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for b, h, t in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        scores = k[b, h // group] @ q[b, h, t] / q.shape[-1] ** 0.5
        if mask is not None:
            scores[~mask[b % len(mask), 0, t]] = -torch.inf
        out[b, h, t] = scores.softmax(0) @ v[b, h // group]
    return out


def ragged_mask(batch=2, queries=5, keys=7):
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).repeat(batch, 1, 1, 1)
    mask[1, :, :, :2] = False
    return mask


@pytest.mark.parametrize("attend", [eager, fused])
def test_no_mask_and_written_mask(attend):
    q, k, v = inputs()
    for mask in (None, ragged_mask()):
        torch.testing.assert_close(attend(q, k, v, mask)[0], formula(q, k, v, mask), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("attend", [eager, fused])
def test_causal_is_the_lower_triangle(attend):
    q, k, v = inputs(queries=6, keys=6)
    triangle = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    torch.testing.assert_close(attend(q, k, v, causal=True)[0], formula(q, k, v, triangle), rtol=1e-12, atol=1e-12)


def test_eager_returns_weights_that_sum_to_one_and_see_nothing_masked():
    q, k, v = inputs(dtype=torch.float32)
    mask = ragged_mask()
    _, weights = eager(q, k, v, mask)
    assert weights.shape == (2, 4, 5, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5))
    assert (weights.masked_select(~mask.expand_as(weights)) == 0).all()
    assert fused(q, k, v, mask)[1] is None


@pytest.mark.parametrize("attend", [eager, fused])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_stays_finite_with_large_scores(attend, dtype):
    q, k, v = inputs(dtype=dtype)
    assert attend(q * 30, k * 30, v, ragged_mask())[0].isfinite().all()


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("cached", [1, 64, 1 << 21])
@torch.no_grad()
def test_one_query_in_float32_is_nearer_than_in_bfloat16(monkeypatch, heads, cached):
    """The way of processors that emulate bfloat16, for any number of heads that their cache holds."""
    monkeypatch.setattr(attention, "CACHED", cached)
    taken = []
    monkeypatch.setattr(attention, "one_query", lambda *a, real=attention.one_query: taken.append(1) or real(*a))
    q, k, v = inputs(heads=heads[0], kv_heads=heads[1], queries=1, keys=30, dtype=torch.bfloat16)
    for mask in (None, ragged_mask(queries=1, keys=30), ragged_mask(queries=1, keys=30)[1:]):
        exact = formula(q.double(), k.double(), v.double(), mask)
        errors = []
        for fast in (True, False):
            monkeypatch.setattr(linear, "has_fast_bfloat16", lambda fast=fast: fast)
            found, none = fused(q, k, v, mask)
            assert (found.dtype, found.shape, none) == (torch.bfloat16, q.shape, None)
            errors.append((found.double() - exact).norm())
        assert errors[1] <= errors[0]
    assert len(taken) == 3


def test_a_query_that_sees_nothing_makes_no_nan_in_one_query_either():
    q, k, v = inputs(queries=1, keys=5, dtype=torch.bfloat16)
    mask = torch.zeros(1, 1, 1, 5, dtype=torch.bool)
    assert attention.one_query(q, k, v, mask).isfinite().all()
