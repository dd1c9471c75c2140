"""Attention of one query per row, over the rows' own caches."""

import pytest
import torch

from minillava.attention import eager
from minillava.fast.attention import CACHED, in_float32, one_each

LENGTHS = (1, 63, 64, 65, 100, 110, 64, 700)


@pytest.mark.numeric
@pytest.mark.parametrize(("groups", "each", "width"), [(2, 3, 32), (4, 1, 128), (8, 4, 64)])
def test_rows_together_have_the_bits_that_each_has_alone(groups, each, width):
    """Who shares a step would change the last bits of an answer, and drafts, whose queries are
    computed by `in_float32`, would choose other tokens than single steps."""
    generator = torch.Generator().manual_seed(width)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    q = numbers(len(LENGTHS), groups * each, 1, width)
    # parts of caches, which have room for more
    k, v = ([numbers(1, groups, 800, width)[:, :, :length] for length in LENGTHS] for _ in "kv")
    together = one_each(q, k, v)
    for row, one in enumerate(q.split(1)):
        assert torch.equal(together[row, None], in_float32(one, k[row], v[row]))
        assert torch.equal(together[row, None], one_each(one, k[row : row + 1], v[row : row + 1]))
        right, _ = eager(one.double(), k[row].double(), v[row].double())
        torch.testing.assert_close(together[row, None].double(), right, rtol=2**-8, atol=1e-5)


def test_caches_that_are_too_large_for_the_processor_are_read_in_parts():
    """A memory as large as all keys in float32 would be read from the machine's memory twice."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 20, length, 128, generator=generator).bfloat16() for length in (1, 900, 900)
    )
    assert k.shape[1] * 960 * 128 > CACHED
    assert torch.equal(one_each(q, [k], [v]), in_float32(q, k, v))
