"""The filters on numbers small enough to check by hand; equality with transformers is in the parity
tests."""

import math

import pytest
import torch

from minillava import sampling

INF = -math.inf
LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]])  # probabilities .6439 .2369 .0871 .0321


def kept(scores):
    return [i for i, s in enumerate(scores[0].tolist()) if s != INF]


def test_temperature_divides():
    """A temperature that multiplies would sharpen where a user asks for variety."""
    assert torch.equal(sampling.temperature(LOGITS, 2.0), LOGITS / 2)


@pytest.mark.parametrize(
    ("k", "expected"), [(1, [0]), (2, [0, 1]), (4, [0, 1, 2, 3]), (99, [0, 1, 2, 3])]
)
def test_top_k(k, expected):
    """A k beyond the vocabulary keeps everything; torch.topk raises."""
    assert kept(sampling.top_k(LOGITS, k)) == expected


def test_top_k_keeps_ties_with_the_kth():
    """As transformers does: cut by rank instead, which of two equals goes would depend on the
    sort."""
    assert kept(sampling.top_k(torch.tensor([[1.0, 2.0, 1.0, 0.0]]), 2)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("p", "expected"),
    [(0.5, [0]), (0.65, [0, 1]), (0.9, [0, 1, 2]), (1.0, [0, 1, 2, 3]), (1e-9, [0])],
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(p, expected):
    """The token that crosses p belongs to it: cut before, the set has less than p, and may be
    empty."""
    assert kept(sampling.top_p(LOGITS, p)) == expected


@pytest.mark.parametrize(
    ("p", "expected"), [(0.5, [0]), (0.3, [0, 1]), (0.1, [0, 1, 2]), (1.0, [0])]
)
def test_min_p_is_relative_to_the_best(p, expected):
    """Taken as a probability of its own, it cuts everything where no token is likely."""
    assert kept(sampling.min_p(LOGITS, p)) == expected


def test_repetition_penalty_moves_seen_tokens_down_on_both_sides_of_zero():
    """Divided by the penalty, a negative logit rises."""
    seen = torch.tensor([[True, False, True, True]])
    assert sampling.repetition_penalty(LOGITS, seen, 2.0).tolist() == [[1.0, 1.0, 0.0, -2.0]]


@pytest.mark.parametrize(
    ("p", "expected"), [(0.2, [1]), (0.3, [0, 1]), (0.9, [0, 1, 2]), (1.0, [0, 1, 2, 3])]
)
def test_typical_p_takes_the_least_unusual_first(p, expected):
    """The entropy is .947 nats; the surprises .440, 1.440, 2.440, 3.440 are .507, .493, 1.493,
    2.493 away from it."""
    assert kept(sampling.typical_p(LOGITS, p)) == expected


def test_typical_p_keeps_ties_and_what_others_removed_stays_removed():
    """A removed token's part of the entropy is zero times infinity: NaN, and with it every token's."""
    assert kept(sampling.typical_p(torch.tensor([[1.0, 1.0, 1.0, INF]]), 0.1)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("function", "p"), [(sampling.top_p, 1e-6), (sampling.min_p, 0.999), (sampling.typical_p, 1e-6)]
)
def test_a_filter_leaves_as_many_as_it_is_told_to(function, p):
    """Beams need two tokens each: with one, a search of two beams has nowhere to go."""
    assert [len(kept(function(LOGITS, p, keep=keep))) for keep in (1, 3, 9)] == [1, 3, 4]


@pytest.mark.parametrize(
    ("history", "size", "expected"),
    [
        ([3, 1, 1], 1, [0, 2]),  # no token twice
        ([0, 1, 2, 0], 2, [0, 2, 3]),  # 0 was followed by 1
        ([0, 1, 0, 2, 0], 2, [0, 3]),
        ([0, 1, 2, 0, 1], 3, [0, 1, 3]),
        ([0, 1, 2, 1], 3, [0, 1, 2, 3]),  # 2 1 is new
        ([0, 0, 0], 3, [1, 2, 3]),
        ([0, 1], 3, [0, 1, 2, 3]),  # shorter than what must not repeat
        ([0, 1], 2, [0, 1, 2, 3]),
        ([-1, -1, 3, 1], 1, [0, 2]),  # padding is no token
        ([-1, -1, 3], 2, [0, 1, 2, 3]),
        ([-1, 3, -1, 3], 2, [0, 1, 2, 3]),
        ([9, 9, 9], 2, [0, 1, 2, 3]),  # a picture whose id is none of the model's words
    ],
)
def test_no_repeat_ngram_bars_what_would_repeat(history, size, expected):
    """A repeat would slip through, or padding and pictures would bar tokens that repeat nothing."""
    assert kept(sampling.no_repeat_ngram(LOGITS, torch.tensor([history]), size)) == expected


def test_no_repeat_ngram_looks_at_each_row_alone():
    """What one row has said must not be forbidden to another."""
    found = sampling.no_repeat_ngram(LOGITS.expand(2, -1), torch.tensor([[0, 1, 0], [0, 2, 0]]), 2)
    assert [kept(row[None]) for row in found] == [[0, 2, 3], [0, 1, 3]]


def test_draw_follows_the_distribution_and_the_seed():
    """A softmax over the wrong axis, or a generator that is ignored, still draws valid tokens."""
    scores = LOGITS.expand(20000, -1)
    drawn = sampling.draw(scores, torch.Generator().manual_seed(0)).squeeze(1)
    assert torch.equal(drawn, sampling.draw(scores, torch.Generator().manual_seed(0)).squeeze(1))
    assert not torch.equal(
        drawn, sampling.draw(scores, torch.Generator().manual_seed(1)).squeeze(1)
    )
    share = drawn.bincount(minlength=4) / 20000
    p = LOGITS[0].softmax(0)
    assert ((share - p).abs() < 4 * (p * (1 - p) / 20000).sqrt()).all()  # four standard errors


def test_draw_never_takes_a_removed_token():
    """Its probability must be zero, not small."""
    scores = torch.tensor([[0.0, INF, 0.0]]).expand(1000, -1)
    assert 1 not in sampling.draw(scores, torch.Generator().manual_seed(0))


def test_several_draws_are_different_tokens():
    """Sampled beams that begin with the same token are one beam."""
    drawn = sampling.draw(LOGITS.expand(50, -1), torch.Generator().manual_seed(0), count=3)
    assert drawn.shape == (50, 3)
    assert all(len(set(row)) == 3 for row in drawn.tolist())


def test_draw_uses_only_its_own_generator():
    """Whatever else draws in the process would change the answer, and be changed by it."""
    scores = LOGITS.expand(64, -1)
    first = sampling.draw(scores, torch.Generator().manual_seed(3))
    state = torch.get_rng_state()
    torch.rand(1)
    assert torch.equal(first, sampling.draw(scores, torch.Generator().manual_seed(3)))
    torch.set_rng_state(state)
