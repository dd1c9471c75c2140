"""`eager` against `fused`, and both against the formula in float64."""

import pytest
import torch
from bounds import assert_within, gamma, rounded
from bounds import attention as exactly

from minillava.assistant import load
from minillava.attention import eager, fused
from minillava.fast import attention as fast_attention
from minillava.fast import linear, processor
from minillava.fast.attention import in_float32

pytestmark = pytest.mark.numeric


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


def test_the_measure_is_the_formula():
    """bounds.attention, which judges everything below, against the loop that anybody can read."""
    for mask in (None, ragged_mask(), ragged_mask()[1:]):
        q, k, v = inputs()
        exact, bound = exactly(q, k, v, mask)
        assert_within(formula(q, k, v, mask), (exact, bound))
        # float64's own, not one that would allow anything
        assert bound.max() < torch.finfo(torch.float32).eps


@pytest.mark.parametrize("attend", [eager, fused])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_no_mask_a_written_mask_and_the_triangle(attend, dtype):
    """A mask that is shifted, inverted or not broadcast lets tokens see what is hidden, and answers
    stay fluent."""
    q, k, v = inputs(dtype=dtype)
    scores_in = dtype if attend is eager else None  # `eager` stores them, as transformers does
    for mask in (None, ragged_mask(), ragged_mask()[1:]):
        assert_within(attend(q, k, v, mask)[0], exactly(q, k, v, mask, scores_in=scores_in))
    q, k, v = inputs(queries=6, keys=6, dtype=dtype)
    triangle = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    assert_within(attend(q, k, v, causal=True)[0], exactly(q, k, v, triangle, scores_in=scores_in))


def test_eager_returns_weights_that_sum_to_one_and_see_nothing_masked():
    """Heat maps would show weight on padding or on tokens to come."""
    q, k, v = inputs(dtype=torch.float32)
    mask = ragged_mask()
    _, weights = eager(q, k, v, mask)
    assert weights.shape == (2, 4, 5, 7)
    # Seven sums make what each weight is divided by, a rounding the weight, and seven more the sum
    # here.
    one = torch.ones(2, 4, 5, dtype=torch.float64)
    assert_within(weights.sum(-1), (one, gamma(2 * 7 + 1, torch.float32) * one))
    assert (weights.masked_select(~mask.expand_as(weights)) == 0).all()
    assert fused(q, k, v, mask)[1] is None


@pytest.mark.parametrize("attend", [eager, fused])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_stays_finite_with_large_scores(attend, dtype):
    """Large scores overflow in float16, and the answer is NaN."""
    q, k, v = inputs(dtype=dtype)
    assert attend(q * 30, k * 30, v, ragged_mask())[0].isfinite().all()


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("cached", [1, 64, 1 << 21])
@torch.no_grad()
def test_one_query_is_attention(monkeypatch, heads, cached):
    """On processors that emulate bfloat16 and on the others, for any number of heads that their
    cache holds."""
    monkeypatch.setattr(processor, "UPCAST_QUERIES", set())
    monkeypatch.setattr(fast_attention, "CACHED", cached)
    plain = []
    monkeypatch.setattr(
        "minillava.attention.fused", lambda *a, real=fused: plain.append(fast) or real(*a)
    )
    q, k, v = inputs(heads=heads[0], kv_heads=heads[1], queries=1, keys=30, dtype=torch.bfloat16)
    for mask in (None, ragged_mask(queries=1, keys=30), ragged_mask(queries=1, keys=30)[1:]):
        for fast in (True, False):
            monkeypatch.setattr(processor, "has_fast_bfloat16", lambda fast=fast: fast)
            found, none = fast_attention.fused(q, k, v, mask)
            assert (found.dtype, found.shape, none) == (torch.bfloat16, q.shape, None)
            assert_within(found, exactly(q, k, v, mask), (heads, fast))
    assert plain == [True] * 3  # elsewhere it is computed in float32


def test_only_a_model_that_is_not_eager_is_made_faster(reference):
    """Its attention was the one of the file that is read, and had the fast way inside."""
    fast, exact = (
        load(reference / "plain", device="cpu", attention=name).model.language_model
        for name in ("fused", "eager")
    )
    assert fast.attend is fast_attention.fused
    assert exact.attend is eager
    assert {type(m) for m in exact.modules() if isinstance(m, torch.nn.Linear)} == {torch.nn.Linear}
    assert {type(m) for m in fast.modules() if isinstance(m, torch.nn.Linear)} == {
        linear.FastLinear
    }


@torch.no_grad()
def test_one_query_keeps_float32_until_the_end():
    """Weights in bfloat16, as the one kernel has them, would be farther off than this."""
    q, k, v = inputs(queries=1, keys=30, dtype=torch.bfloat16)
    exact, bound = exactly(q.float(), k.float(), v.float())
    assert_within(in_float32(q, k, v, None), (exact, rounded(exact, bound, torch.bfloat16)))


def test_a_query_that_sees_nothing_makes_no_nan_in_one_query_either():
    """The path for a single query would divide zero by zero in a row of padding."""
    q, k, v = inputs(queries=1, keys=5, dtype=torch.bfloat16)
    mask = torch.zeros(1, 1, 1, 5, dtype=torch.bool)
    assert in_float32(q, k, v, mask).isfinite().all()


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("keys", [9, 63, 66, 150])
@torch.no_grad()
def test_each_of_several_queries_is_a_step_of_its_own(heads, keys):
    """Guesses are checked six at a time, and must get the very numbers of single steps: products of
    another shape add up in another order, and a query might see those after it."""
    q, k, v = inputs(
        heads=heads[0], kv_heads=heads[1], queries=6, keys=keys, width=64, dtype=torch.bfloat16
    )
    k[:, :, -1] *= 100  # what only the last query may see
    for mask in (None, ragged_mask(queries=6, keys=keys)):
        found = in_float32(q, k, v, mask)
        triangle = torch.ones(1, 1, 6, keys, dtype=torch.bool).tril(keys - 6)
        assert_within(found, exactly(q, k, v, triangle if mask is None else mask))
        for i in range(6):
            seen = keys - 5 + i
            own = None if mask is None else mask[:, :, i : i + 1, :seen]
            alone = in_float32(q[:, :, i : i + 1], k[:, :, :seen], v[:, :, :seen], own)
            assert torch.equal(found[:, :, i : i + 1], alone), i
