"""fast/same_bits.py: what is said of this processor is true, and the measure can say no."""

import pytest
import torch

from minillava.fast import fused, processor
from minillava.fast.linear import linear
from minillava.fast.processor import SAME_ROWS, WAYS
from minillava.fast.quantize import quantised_layer, quantize_tensor
from minillava.fast.same_bits import queries_alike, rows_alike
from minillava.options import KINDS

pytestmark = pytest.mark.numeric

# As [N, K]: layers of the bundled model, of a wide one, and what lies between their threads' shares.
SHAPES = [(192, 512), (512, 192), (1024, 1024), (2048, 512), (256, 2752)]


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stored", ["bfloat16", *KINDS])
@torch.no_grad()
def test_a_row_of_a_product_has_the_bits_it_has_alone(stored, shape):
    """Its answer would otherwise depend on who else is asked at the same time."""
    claimed = SAME_ROWS.get(processor.kind(), {}).get(stored, 1)
    most = min(claimed, 16)
    x, weight = numbers(most, shape[1]).bfloat16(), numbers(*shape)
    if stored == "bfloat16":
        narrow = weight.bfloat16()
        found = rows_alike(lambda rows: linear(rows, narrow), x, range(2, most + 1))
    else:
        layer = quantised_layer(quantize_tensor(weight, stored))
        found = rows_alike(layer, x, range(2, most + 1))
    assert found == most


@torch.no_grad()
def test_one_query_has_the_bits_it_has_alone():
    """In bfloat16. In float32 it has not on every processor: row_by_row asks row by row."""
    q, k, v = (
        numbers(16, heads, keys, 64).bfloat16() for heads, keys in ((8, 1), (4, 77), (4, 77))
    )
    claimed = 16 if processor.kind() in SAME_ROWS else 1
    assert queries_alike(fused, q, k, v, range(2, 17)) >= claimed


def test_nothing_is_promised_that_no_table_has():
    """Same bits would be promised for a processor without a table, or across a kernel and the
    blocks."""
    assert set(SAME_ROWS) <= set(WAYS)
    for kind, claims in SAME_ROWS.items():
        assert set(claims) <= set(WAYS[kind])
        for stored, rows in claims.items():
            if stored in KINDS:  # a kernel and the blocks add up in different orders
                most, way = WAYS[kind][stored][0]
                assert way == "kernel" and rows <= most, (kind, stored)


def test_the_measure_finds_where_bits_change():
    """From three rows on a product that adds up otherwise, in the last row only."""
    x, weight = numbers(5, 96), numbers(64, 96)

    def product(rows: torch.Tensor) -> torch.Tensor:
        out = torch.stack([weight @ row for row in rows])
        if len(rows) >= 3:
            out[-1, 7] += out[-1, 7].abs() * torch.finfo(torch.float32).eps
        return out

    assert rows_alike(product, x, range(2, 6)) == 2
    assert rows_alike(product, x, (2, 3, 4)) == 2
    assert rows_alike(lambda rows: product(rows) * len(rows), x, range(2, 6)) == 1
    q, k = numbers(4, 2, 1, 8), numbers(4, 2, 5, 8)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, None]:
        rows = [fused(*(x[i, None] for x in (q, k, v)))[0] for i in range(len(q))]
        return torch.cat(rows) * (1 + len(q) // 3), None

    assert queries_alike(attend, q, k, k) == 2
