"""The filters on numbers small enough to check by hand; equality with transformers is in the parity tests."""

import math

import pytest
import torch

from minillava import sampling

INF = -math.inf
LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]])  # probabilities .6439 .2369 .0871 .0321


def kept(scores):
    return [i for i, s in enumerate(scores[0].tolist()) if s != INF]


def test_temperature_divides():
    assert torch.equal(sampling.temperature(LOGITS, 2.0), LOGITS / 2)


@pytest.mark.parametrize(("k", "expected"), [(1, [0]), (2, [0, 1]), (4, [0, 1, 2, 3]), (99, [0, 1, 2, 3])])
def test_top_k(k, expected):
    assert kept(sampling.top_k(LOGITS, k)) == expected


def test_top_k_keeps_ties_with_the_kth():
    assert kept(sampling.top_k(torch.tensor([[1.0, 2.0, 1.0, 0.0]]), 2)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("p", "expected"), [(0.5, [0]), (0.65, [0, 1]), (0.9, [0, 1, 2]), (1.0, [0, 1, 2, 3]), (1e-9, [0])]
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(p, expected):
    assert kept(sampling.top_p(LOGITS, p)) == expected


@pytest.mark.parametrize(("p", "expected"), [(0.5, [0]), (0.3, [0, 1]), (0.1, [0, 1, 2]), (1.0, [0])])
def test_min_p_is_relative_to_the_best(p, expected):
    assert kept(sampling.min_p(LOGITS, p)) == expected


def test_repetition_penalty_moves_seen_tokens_down_on_both_sides_of_zero():
    seen = torch.tensor([[True, False, True, True]])
    assert sampling.repetition_penalty(LOGITS, seen, 2.0).tolist() == [[1.0, 1.0, 0.0, -2.0]]


def test_draw_follows_the_distribution_and_the_seed():
    scores = LOGITS.expand(20000, -1)
    drawn = sampling.draw(scores, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, sampling.draw(scores, torch.Generator().manual_seed(0)))
    assert not torch.equal(drawn, sampling.draw(scores, torch.Generator().manual_seed(1)))
    share = drawn.bincount(minlength=4) / 20000
    p = LOGITS[0].softmax(0)
    assert ((share - p).abs() < 4 * (p * (1 - p) / 20000).sqrt()).all()  # four standard errors


def test_draw_never_takes_a_removed_token():
    scores = torch.tensor([[0.0, INF, 0.0]]).expand(1000, -1)
    assert 1 not in sampling.draw(scores, torch.Generator().manual_seed(0))


def test_draw_uses_only_its_own_generator():
    scores = LOGITS.expand(64, -1)
    first = sampling.draw(scores, torch.Generator().manual_seed(3))
    state = torch.get_rng_state()
    torch.rand(1)
    assert torch.equal(first, sampling.draw(scores, torch.Generator().manual_seed(3)))
    torch.set_rng_state(state)
