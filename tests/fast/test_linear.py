"""fast/linear.py: every way to the product gives the product, and `eager` takes none of them."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from bounds import assert_within, products
from torch import nn

import minillava
from minillava.fast import linear as home
from minillava.fast.linear import (
    BLOCK,
    FEW_NARROW_ROWS,
    MANY_ROWS,
    FastLinear,
    linear,
    product,
    use_fast_linear,
)

pytestmark = pytest.mark.numeric

WIDTH, WIDTH_AFTER = 96, BLOCK + 40  # more than one block, and the last one short
ROWS = [1, 2, FEW_NARROW_ROWS, FEW_NARROW_ROWS + 1, 4, 5, 40, MANY_ROWS + 1]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(params=[True, False], ids=["fast bfloat16", "emulated bfloat16"])
def processor(request, monkeypatch):
    monkeypatch.setattr(home, "has_fast_bfloat16", lambda: request.param)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", [True, False])
def test_every_way_to_the_product_is_a_sum_of_its_terms(processor, dtype, rows, bias):
    """Against float64, and not against another kernel, whose error may be small by luck."""
    generator = torch.Generator().manual_seed(rows)
    x, weight, b = (
        torch.randn(*s, generator=generator).to(dtype)
        for s in ((rows, WIDTH), (WIDTH_AFTER, WIDTH), (WIDTH_AFTER,))
    )
    b = b if bias else None
    found = linear(x, weight, b)
    assert found.dtype == dtype
    assert_within(found, products(x, weight, b))


@pytest.mark.parametrize(
    "shape",
    [
        (WIDTH,),
        (1, WIDTH),
        (2, 3, WIDTH),
        (0, WIDTH),
        (2, 0, WIDTH),
        (1, 1, WIDTH),
        (3, 7, 2, WIDTH),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_are_those_of_the_plain_product(processor, shape, dtype):
    x, weight = torch.randn(shape).to(dtype), torch.randn(WIDTH_AFTER, WIDTH).to(dtype)
    assert linear(x, weight).shape == F.linear(x, weight).shape
    assert linear(x.transpose(0, -1).contiguous().transpose(0, -1), weight).is_contiguous()


def test_each_way_is_taken(monkeypatch):
    """A fast path that is never reached would pass every test above."""
    # two blocks of these sizes share out among one, not three
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    weight = torch.randn(WIDTH_AFTER, WIDTH)
    seen = []
    for name in ("mv", "bmm"):
        real = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *a, name=name, real=real: seen.append(name) or real(*a)
        )
    monkeypatch.setattr(
        home, "product", lambda *a, real=product: seen.append(len(a[1])) or real(*a)
    )
    monkeypatch.setattr(home, "has_fast_bfloat16", lambda: False)
    rest = WIDTH_AFTER - BLOCK
    for rows, dtype, ways in (
        (1, torch.float32, [WIDTH_AFTER, "bmm"]),
        (2, torch.float32, [WIDTH_AFTER]),
        (5, torch.float32, [WIDTH_AFTER, "bmm"]),
        (1, torch.bfloat16, ["mv"]),
        (FEW_NARROW_ROWS, torch.bfloat16, []),
        (40, torch.bfloat16, [BLOCK, "bmm", rest, "bmm"]),
        (MANY_ROWS + 1, torch.bfloat16, [WIDTH_AFTER, "bmm"]),
        (40, torch.float16, []),
    ):
        seen.clear()
        linear(torch.randn(rows, WIDTH).to(dtype), weight.to(dtype))
        assert seen == ways, (rows, dtype)
    monkeypatch.setattr(home, "has_fast_bfloat16", lambda: True)
    seen.clear()
    linear(torch.randn(40, WIDTH).bfloat16(), weight.bfloat16())
    assert seen == []


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_any_number_of_threads_makes_the_product(monkeypatch, threads):
    """Also where the rows of the weight cannot be shared out evenly."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for width in (512, 552, 7):
        x, weight = torch.randn(9, WIDTH), torch.randn(width, WIDTH)
        assert_within(linear(x, weight), products(x, weight), width)


def test_memory_is_kept_from_block_to_block_and_between_threads_apart(monkeypatch):
    monkeypatch.setattr(home, "has_fast_bfloat16", lambda: False)
    x = torch.randn(5, WIDTH).bfloat16()
    weights = [torch.randn(WIDTH_AFTER, WIDTH).bfloat16() for _ in range(8)]
    with torch.no_grad():
        alone = [linear(x, weight) for weight in weights]
        first = home.kept(10, torch.float32).data_ptr()
        assert home.kept(10, torch.float32).data_ptr() == first
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(no_grad_linear, [x] * 8, weights))
            assert pool.submit(lambda: home.kept(10, torch.float32).data_ptr()).result() != first
    for found in (alone, together):  # not bit for bit: where memory begins can decide a sum's order
        for y, weight in zip(found, weights, strict=True):
            assert_within(y, products(x, weight))


@torch.no_grad()
def no_grad_linear(x, weight):
    return linear(x, weight)


def test_gradients_are_those_of_the_product(processor):
    """Of the sum of g · product: the gradients are products, too, of g with the weight and with
    x."""
    for rows in ROWS:
        generator = torch.Generator().manual_seed(rows)
        x, weight, b, g = (
            torch.randn(*s, generator=generator)
            for s in ((rows, WIDTH), (50, WIDTH), (50,), (rows, 50))
        )
        leaves = [p.requires_grad_() for p in (x, weight, b)]
        (linear(*leaves) * g).sum().backward()
        x, weight = x.detach(), weight.detach()
        expected = products(g, weight.T), products(g.T, x.T), products(torch.ones(1, rows), g.T)
        for leaf, exact_and_bound in zip(leaves, expected, strict=True):
            assert_within(
                leaf.grad.view(exact_and_bound[0].shape), exact_and_bound, (rows, tuple(leaf.shape))
            )


def test_pictures_are_cut_into_patches_in_float32(monkeypatch):
    torch.manual_seed(0)
    conv, x = (
        nn.Conv2d(3, 8, 4, stride=4, bias=False).bfloat16(),
        torch.randn(2, 3, 16, 16).bfloat16(),
    )
    # [B, P, 3·4·4]
    plain, patches = conv(x), F.unfold(x.float(), 4, stride=4).transpose(1, 2).bfloat16()
    use_fast_linear(conv)
    monkeypatch.setattr(home, "has_fast_bfloat16", lambda: True)
    assert torch.equal(conv(x), plain)
    monkeypatch.setattr(home, "has_fast_bfloat16", lambda: False)
    found = conv(x)
    assert (found.dtype, found.shape) == (plain.dtype, plain.shape)
    assert_within(
        found.flatten(2).transpose(1, 2), products(patches, conv.weight.detach().flatten(1))
    )
    conv(x).sum().backward()
    assert conv.weight.grad.isfinite().all()


@pytest.mark.parametrize("bias", [False, True])
def test_patches_as_rows_of_a_product_are_the_convolution(bias):
    """As on a GPU in float32, where the convolution itself would round to TF32."""
    torch.manual_seed(0)
    conv, x = nn.Conv2d(3, 8, (4, 2), stride=(4, 2), bias=bias), torch.randn(2, 3, 19, 16)
    exact = copy.deepcopy(conv).double()(x.double())
    use_fast_linear(conv)
    found = conv.as_product(x)
    assert found.shape == exact.shape
    limit = x.abs().amax() * conv.weight.abs().flatten(1).sum(1).amax()
    assert (found - exact).abs().amax() <= 32 * torch.finfo(torch.float32).eps * limit


def test_load_takes_it_and_eager_does_not(reference):
    def kinds(attention):
        model = minillava.load(reference / "plain", attention=attention).model
        return {type(module) for module in model.modules() if isinstance(module, nn.Linear)}

    assert kinds("fused") == {FastLinear}
    assert kinds("eager") == {nn.Linear}


def test_names_and_weights_stay():
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 5, bias=False)))
    before = dict(model.state_dict())
    use_fast_linear(model)
    assert list(model.state_dict()) == list(before)
    assert all(
        after.data_ptr() == before[name].data_ptr() for name, after in model.state_dict().items()
    )


def test_memory_kept_from_inference_mode_can_be_written_to_later(monkeypatch):
    monkeypatch.setattr(home, "has_fast_bfloat16", lambda: False)
    x, weight = torch.randn(5, WIDTH).bfloat16(), torch.randn(WIDTH_AFTER, WIDTH).bfloat16()
    home._kept.memory = None
    with torch.inference_mode():
        first = linear(x, weight).clone()
    for found in (first, no_grad_linear(x, weight)):
        assert_within(found, products(x, weight))


@pytest.mark.parametrize(
    ("cap", "fast"),
    [
        ({}, True),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, False),
        ({"ONEDNN_MAX_CPU_ISA": "avx2"}, False),
        ({"DNNL_MAX_CPU_ISA": "SSE41"}, False),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, True),
        ({"ONEDNN_MAX_CPU_ISA": "DEFAULT"}, True),
    ],
)
def test_bfloat16_is_not_fast_where_its_instructions_are_held_back(monkeypatch, cap, fast):
    """The processor has them, oneDNN was told not to use them: what it computes is emulated."""
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in cap.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert home.has_fast_bfloat16() is fast
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert home.has_fast_bfloat16() is False
