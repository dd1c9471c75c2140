"""bounds.py: what it allows, every kernel keeps to; what it must not allow, mistakes of the kind
that is made."""

import pytest
import torch
import torch.nn.functional as F
from bounds import assert_same_in_float64, assert_within, attention, gamma, network, products, unit
from torch import nn

pytestmark = pytest.mark.numeric

ROWS, WIDTH, WIDTH_AFTER = 5, 96, 64
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def rejected(found, exact_and_bound) -> bool:
    try:
        assert_within(found, exact_and_bound)
    except AssertionError:
        return True
    return False


@pytest.fixture(params=DTYPES, ids=str)
def factors(request):
    g = torch.Generator().manual_seed(0)
    shapes = (ROWS, WIDTH), (WIDTH_AFTER, WIDTH), (WIDTH_AFTER,)
    return [
        torch.randn(*shape, generator=g, dtype=torch.float64).to(request.param) for shape in shapes
    ]


def test_a_right_product_is_right(factors):
    """A bound that is too tight would fail right kernels on processors that sum in another
    order."""
    x, weight, bias = factors
    assert_within(F.linear(x, weight, bias), products(x, weight, bias))
    assert_within(F.linear(x, weight), products(x, weight))
    # Term after term, forwards and backwards, each sum rounded: the slowest growth of an error that
    # a loop has.
    for order in (range(WIDTH), reversed(range(WIDTH))):
        total = torch.zeros(ROWS, WIDTH_AFTER, dtype=torch.promote_types(x.dtype, torch.float32))
        for c in order:
            total += x[:, c, None].to(total.dtype) * weight[:, c].to(total.dtype)
        assert_within(total.to(x.dtype), products(x, weight))


def in_bfloat16(x, weight, bias):
    """Each product and sum rounded to bfloat16, where float32 was promised."""
    total = torch.zeros(ROWS, WIDTH_AFTER, dtype=torch.bfloat16)
    for c in range(WIDTH):
        total += (x[:, c, None] * weight[:, c]).bfloat16()
    return total.to(x.dtype) + bias


def without(x, c):
    return x.index_fill(1, torch.tensor(c), 0)


PRODUCT_MISTAKES = {
    "a term is left out": lambda x, w, b: F.linear(without(x, [7]), w, b),
    "a term is added twice": lambda x, w, b: F.linear(x, w, b) + (x[:, 7, None] * w[:, 7]),
    "a block ends one term early": lambda x, w, b: F.linear(without(x, [31, 63, 95]), w, b),
    "a block of rows is another's": lambda x, w, b: F.linear(x, torch.cat([w[:32], w[31:63]]), b),
    "two rows are swapped": lambda x, w, b: F.linear(x[[1, 0, 2, 3, 4]], w, b),
    "the bias is left out": lambda x, w, b: F.linear(x, w),
    "the bias is added twice": lambda x, w, b: F.linear(x, w, b) + b,
    "summed in bfloat16": in_bfloat16,
    "one number is NaN": lambda x, w, b: F.linear(x, w, b).index_fill(
        0, torch.tensor(2), torch.nan
    ),
}


@pytest.mark.parametrize("mistake", PRODUCT_MISTAKES)
def test_a_wrong_product_is_rejected(factors, mistake):
    """A bound that is too wide would let a kernel pass that leaves out a term or swaps two rows."""
    assert rejected(PRODUCT_MISTAKES[mistake](*factors), products(*factors))


def test_fewer_digits_are_rejected():
    """float32 where float64 was promised, and the bits that a fast mode of float32 leaves out (TF32
    keeps ten)."""
    x, weight = torch.randn(ROWS, WIDTH), torch.randn(WIDTH_AFTER, WIDTH)
    assert rejected(F.linear(x, weight).double(), products(x.double(), weight.double()))
    cut = [(t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (x, weight)]
    assert rejected(F.linear(*cut), products(x, weight))


def test_what_a_kernel_may_round_is_allowed_and_no_more():
    """A kernel that rounds x to bfloat16 is within the bound that says so, and outside of the one
    that does not."""
    x, weight = torch.randn(ROWS, WIDTH), torch.randn(WIDTH_AFTER, WIDTH)
    found = F.linear(x.bfloat16().float(), weight)
    assert_within(found, products(x, weight, dx=unit(torch.bfloat16) * x.double().abs()))
    assert rejected(found, products(x, weight))


# --- attention ------------------------------------------------------------------------------------


def qkv(dtype, heads=4, kv_heads=2, queries=3, keys=9, width=8):
    g = torch.Generator().manual_seed(0)
    shapes = (2, heads, queries, width), (2, kv_heads, keys, width), (2, kv_heads, keys, width)
    return [torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def attend(q, k, v, mask, scale=8**-0.5, exponent=torch.exp):
    """In float32, with a softmax that leaves its own mistakes to be made."""
    q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
    scores = (q @ k.mT * scale).masked_fill(~mask, -torch.inf)
    weights = exponent(scores - scores.amax(-1, keepdim=True))
    return weights / weights.sum(-1, keepdim=True) @ v


def swapped(x, dim):
    return x.flip(dim)


ATTENTION_MISTAKES = {
    "one key too many": lambda q, k, v, mask: attend(q, k, v, mask.roll(1, -1) | mask),
    "one key too few": lambda q, k, v, mask: attend(q, k, v, mask.roll(-1, -1) & mask),
    "no scale": lambda q, k, v, mask: attend(q, k, v, mask, scale=1),
    "the scale of another width": lambda q, k, v, mask: attend(q, k, v, mask, scale=9**-0.5),
    "heads share the wrong keys": lambda q, k, v, mask: attend(
        q, swapped(k, 1), swapped(v, 1), mask
    ),
    "values of another position": lambda q, k, v, mask: attend(q, k, v.roll(1, 2), mask),
    "a row is another's": lambda q, k, v, mask: attend(q, swapped(k, 0), v, mask),
    "scores in eight bits": lambda q, k, v, mask: attend(
        q, k, v, mask, exponent=lambda x: x.to(torch.float8_e4m3fn).to(x.dtype).exp()
    ),
}


@pytest.fixture(params=DTYPES, ids=str)
def attended(request):
    q, k, v = qkv(request.param)
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    mask = torch.ones(3, 9, dtype=torch.bool).tril(4)[None, None].expand(2, 1, 3, 9)
    return q, k, v, mask


def test_right_attention_is_right(attended):
    """A bound that is too tight would fail torch's own attention on some processor."""
    q, k, v, mask = attended
    assert_within(attend(*attended).to(q.dtype), attention(*attended))
    assert_within(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), attention(*attended))


@pytest.mark.parametrize("mistake", ATTENTION_MISTAKES)
def test_wrong_attention_is_rejected(attended, mistake):
    """A bound that is too wide would let attention pass that sees one key too many."""
    assert rejected(
        ATTENTION_MISTAKES[mistake](*attended).to(attended[0].dtype), attention(*attended)
    )


# --- a whole network ------------------------------------------------------------------------------


class Small(nn.Module):
    """Two layers with something between them, and a mistake that a test may switch on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x, mistake=False):
        y = F.silu(self.first(x))
        return self.second(y.index_fill(-1, torch.tensor([5]), 0) if mistake else y)


@torch.no_grad()
def test_a_network_may_be_as_wrong_as_its_layers_and_not_as_a_mistake():
    """The bound of a whole network would hide a mistake in one layer, or bfloat16 in float32's
    place."""
    x, exactly = torch.randn(6, 32), Small().double()
    allowed = network(exactly, lambda: {"y": exactly(x.double())})["y"]
    assert_within(Small()(x), allowed)
    assert rejected(Small()(x, mistake=True), allowed)
    halved = Small().bfloat16()(x.bfloat16())
    assert rejected(halved, allowed)
    assert_within(halved, network(exactly, lambda: {"y": exactly(x.double())}, torch.bfloat16)["y"])
    assert torch.equal(exactly(x.double()), allowed[0])  # the errors are taken out again
    with pytest.raises(AssertionError):
        network(Small(), lambda: {"y": Small()(x)})  # a float32 run is not the exact one


def test_float64_runs_agree_or_do_not():
    """Two float64 runs would pass as equal with a term left out, float32 on the way, or NaN."""
    x = torch.randn(50, 70, dtype=torch.float64)
    assert_same_in_float64(x.sum(0), x.flip(0).sum(0).clone())
    for wrong in (
        x[1:].sum(0),
        x.float().sum(0).double() * (1 + gamma(3, torch.float32)),
        x.sum(0) * torch.nan,
    ):
        with pytest.raises(AssertionError):
            assert_same_in_float64(wrong, x.sum(0))
