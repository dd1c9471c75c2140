"""The pieces of the decoder against their papers' formulas; the whole against Hugging Face is in
the parity tests."""

import math

import pytest
import torch
from bounds import assert_within, gamma, unit

from minillava.attention import eager
from minillava.config import TextConfig
from minillava.llama import LanguageModel, RMSNorm, apply_rotary, positions_and_mask, rotary_tables

pytestmark = pytest.mark.numeric

CONFIG = TextConfig(hidden_size=32, num_attention_heads=4, rope_theta=100.0)


def test_rms_norm_is_the_formula_and_rounds_before_the_weight():
    """In half precision the order of rounding and of the weight decides the last bit, and
    transformers rounds first."""
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norm = RMSNorm(8, 1e-5).double()
    norm.weight.data = torch.arange(1.0, 9.0, dtype=torch.float64)
    expected = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * norm.weight
    # of it and of the formula
    assert_within(norm(x), (expected, 2 * gamma(8 + 6, torch.float64) * expected.abs()))
    half, weight = x.bfloat16(), norm.weight.bfloat16()
    exact = half.float() * torch.rsqrt(half.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(norm.bfloat16()(half), weight * exact.bfloat16())


def test_rms_norm_of_large_halves_does_not_overflow():
    """The mean of squares in float16 is infinite, and the layer's output zero."""
    x = torch.full((1, 8), 30000.0, dtype=torch.float16)  # its square is far beyond float16
    assert torch.equal(RMSNorm(8, 1e-5).half()(x), torch.ones(1, 8, dtype=torch.float16))


def test_rotary_turns_each_pair_by_position_times_frequency():
    """Number i is paired with number i + D/2: paired with its neighbour, as in the paper, every
    score is another."""
    x = torch.randn(1, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    for position in (0, 1, 50):
        cos, sin = rotary_tables(torch.tensor([[position]]), CONFIG, torch.float32)
        turned = apply_rotary(x, cos, sin)[0, 0, 0]
        for i in range(4):
            angle = position * 100.0 ** (-2 * i / 8)
            a, b = x[0, 0, 0, i].item(), x[0, 0, 0, i + 4].item()
            expected = (
                a * math.cos(angle) - b * math.sin(angle),
                b * math.cos(angle) + a * math.sin(angle),
            )
            # An angle of four roundings, its cosine and sine of a few more, and two products and a
            # sum.
            bound = gamma(8, torch.float32) * (1 + angle) * (abs(a) + abs(b))
            expected = torch.tensor(expected, dtype=torch.float64)
            assert_within(turned[[i, i + 4]], (expected, torch.full((2,), bound).double()))


def test_rotary_scores_depend_on_distance_only():
    """Queries and keys that are turned in opposite directions add their positions instead."""
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(8, generator=g), torch.randn(8, generator=g)

    def score(query_at, key_at):
        tables = [
            rotary_tables(torch.tensor([[p]]), CONFIG, torch.float32) for p in (query_at, key_at)
        ]
        return (apply_rotary(q, *tables[0]) * apply_rotary(k, *tables[1])).sum()

    # Each pair of q and of k is turned as above, and the products of both added up.
    size = (q.abs().view(2, 4).sum(0) * k.abs().view(2, 4).sum(0)).sum().double()
    bound = 2 * (2 * gamma(8, torch.float32) * (1 + 104) + gamma(8, torch.float32)) * 2 * size
    assert_within(score(7, 3), (score(104, 100).double(), bound))
    assert abs(score(7, 3) - score(3, 7)) > 1e-2  # and on its sign


def test_half_precision_angles_are_rounded_once():
    """At position 4000 an angle computed in bfloat16 is off by whole turns."""
    cos, _ = rotary_tables(torch.tensor([[4000]]), CONFIG, torch.bfloat16)
    exact = torch.tensor(
        [math.cos(4000 * 100.0 ** (-2 * i / 8)) for i in range(4)], dtype=torch.float64
    )
    # Rounded once, to bfloat16, and in float32 the angle itself, four times.
    bound = unit(torch.bfloat16) + gamma(8, torch.float32) * (1 + 4000)
    assert_within(cos[0, 0, 0, :4], (exact, torch.full((4,), bound).double()))


def test_linear_scaling_divides_positions():
    """Multiplied instead, a stretched context would be a shorter one."""
    scaled = TextConfig(hidden_size=32, num_attention_heads=4, rope_theta=100.0, rope_factor=4.0)
    at_8 = rotary_tables(torch.tensor([[8]]), scaled, torch.float32)
    at_2 = rotary_tables(torch.tensor([[2]]), CONFIG, torch.float32)
    assert all(map(torch.equal, at_8, at_2))  # to the bit: 4 is a power of two


@pytest.mark.parametrize("one", ["positions", "mask"])
def test_positions_and_mask_go_together(one):
    """A mask without positions was dropped without a word, for the one that the cache gives."""
    text = TextConfig(
        vocab_size=7,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model, ids = LanguageModel(text, eager), torch.tensor([[1, 2]])
    given = {
        "positions": torch.tensor([[0, 1]]),
        "mask": torch.ones(1, 1, 2, 2, dtype=torch.bool),
    }
    assert model(ids, **given).logits.shape == (1, 2, 7)
    with pytest.raises(ValueError, match="positions and mask go together"):
        model(ids, **{one: given[one]})


def test_prefill_without_padding_uses_the_causal_path():
    """A mask where none is needed takes the slow kernel, and T · T bytes."""
    positions, mask, causal = positions_and_mask(None, 0, 4, torch.device("cpu"))
    assert (positions.tolist(), mask, causal) == ([[0, 1, 2, 3]], None, True)


def test_one_new_token_needs_no_mask():
    """The fused causal flag aligns at the upper left: the one query would see the first key
    alone."""
    positions, mask, causal = positions_and_mask(None, 9, 1, torch.device("cpu"))
    assert (positions.tolist(), mask, causal) == ([[9]], None, False)


def test_several_new_tokens_behind_a_cache_get_a_shifted_triangle():
    """A triangle from the first column on would hide what was read before from all but the last."""
    positions, mask, causal = positions_and_mask(None, 2, 3, torch.device("cpu"))
    assert (positions.tolist(), causal) == ([[2, 3, 4]], False)
    assert mask[0, 0].int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_padding_is_never_seen_and_not_counted():
    """Left padding that counts as positions moves a shorter row's text away from where it stands
    alone; a row of padding that sees nothing is NaN."""
    real = torch.tensor([[False, False, True, True], [True, True, True, True]])
    positions, mask, _ = positions_and_mask(real, 0, 4, torch.device("cpu"))
    assert positions.tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert mask[1, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    positions, mask, _ = positions_and_mask(real, 3, 1, torch.device("cpu"))
    assert positions.tolist() == [[1], [3]]
    assert mask[:, 0, 0].int().tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
