"""fast/linear.py: every way to the product gives the product, and `eager` takes none of them."""

import copy
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from bounds import assert_within, gamma, products
from torch import nn

import minillava
from minillava.fast import linear as home
from minillava.fast import processor, quantize
from minillava.fast.linear import (
    BLOCK,
    NAMES,
    OF_ONE_ROW,
    PRODUCTS,
    FastLinear,
    linear,
    use_fast_linear,
)
from minillava.fast.processor import NARROW, SHORT, SMALL, WAYS

pytestmark = pytest.mark.numeric

FORMS = {
    "": (NARROW + 8, NARROW + 1),
    "narrow": (SHORT + 8, SHORT + 1),
    "wide": (96, SMALL // 90),
    "short": (SMALL // 90, 96),
    "small": (96, 96),
}  # of weights [N, C]
WIDTH, WIDTH_AFTER = 96, BLOCK + 40  # more than one block, and the last one short
ROWS = [1, 2, 3, 4, 5, 40, 65]  # on both sides of what the tables say
OF_ALL = ["float32", "bfloat16", "int8", "int4"]  # what every kind of processor has ways for
OF_ONE_TYPE = {"float32": {"onednn"}, "bfloat16": {way for way in PRODUCTS if "blocks" in way}}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def pretend(monkeypatch, kind):
    """Products as on a processor of that kind; what its instructions would make faster is not."""
    monkeypatch.setattr(processor, "kind", lambda: kind)
    fast = kind in ("avx512-bf16", "amx", "arm-bf16")
    monkeypatch.setattr(processor, "has_fast_bfloat16", lambda: fast)


@pytest.fixture(params=WAYS)
def kind(request, monkeypatch):
    pretend(monkeypatch, request.param)
    return request.param


def test_tables_name_ways_that_exist_for_every_number_of_rows():
    """A way that is misspelt or missing in a table would fail only on the processor that the table
    is for."""
    for kind, table in WAYS.items():
        plain = [stored for stored in table if "," not in stored]
        assert plain in (OF_ALL, [*OF_ALL, "packed"]), kind
        named = {tuple(stored.split(", ")) for stored in table if stored not in plain}
        shapes = {form for _, form in named if re.fullmatch(r"[1-9][0-9]* × [1-9][0-9]*", form)}
        assert named <= {(stored, form) for stored in NAMES.values() for form in {*FORMS, *shapes}}
        for stored, ways in table.items():
            known = {"kernel", *quantize.BLOCKS} if stored.startswith("int") else set(PRODUCTS)
            known = {"kernel"} if stored == "packed" else known
            known -= OF_ONE_TYPE["bfloat16" if stored.startswith("float32") else "float32"]
            bounds, names = zip(*ways, strict=True)
            assert set(names) <= known, (kind, stored)
            assert list(bounds) == sorted(bounds), (kind, stored)
            assert bounds[-1] == float("inf"), (kind, stored)
            assert names[-1] != "kernel" or stored == "packed", (
                "a layer without a kernel needs another way"
            )
            assert all(most == 1 for most, name in ways if name in OF_ONE_ROW), (kind, stored)


@pytest.mark.parametrize(
    ("way", "dtype"),
    [(way, torch.float32) for way in PRODUCTS]
    + [(way, torch.bfloat16) for way in PRODUCTS if way not in OF_ONE_TYPE["float32"]],
)
def test_each_way_is_the_product_whoever_takes_it(monkeypatch, way, dtype):
    """Also those that no table names on the processor that runs this."""
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for rows in [1] if way in OF_ONE_ROW else [1, 2, 5, 33]:
            x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(rows)).to(dtype)
            for width in (512, WIDTH_AFTER, 7):
                weight = torch.randn(width, WIDTH).to(dtype)
                found = PRODUCTS[way](x, weight)
                assert (found.dtype, found.shape) == (dtype, (rows, width))
                assert_within(found, products(x, weight), (way, rows, width, threads))


@pytest.mark.parametrize("learnt", ["x", "weight", "both"])
def test_onednn_has_the_gradient_of_the_product_and_the_same_bits_with_and_without(learnt):
    """Nothing would be learnt, silently; or an answer's last bits would hang on torch.no_grad."""
    x, weight = torch.randn(5, WIDTH), torch.randn(WIDTH_AFTER, WIDTH)
    plain = PRODUCTS["onednn"](x, weight)
    x.requires_grad_(learnt != "weight")
    weight.requires_grad_(learnt != "x")
    found = PRODUCTS["onednn"](x, weight)
    assert torch.equal(found, plain)
    kept = [each is not None for each in found.grad_fn.saved_tensors]  # x for the weight's gradient
    assert kept == [learnt != "x", learnt != "weight"]
    grad = torch.randn(5, WIDTH_AFTER)
    found.backward(grad)
    assert (x.grad is None, weight.grad is None) == (learnt == "weight", learnt == "x")
    if x.grad is not None:
        assert_within(x.grad, products(grad, weight.T.detach()))
    if weight.grad is not None:
        assert_within(weight.grad, products(grad.T, x.T.detach()))


def test_autocast_is_obeyed():
    """Who asks torch for bfloat16 would get float32, and wait for it."""
    x, weight = torch.randn(5, WIDTH), torch.randn(WIDTH_AFTER, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        found = PRODUCTS["onednn"](x, weight)
        assert found.dtype == torch.bfloat16 and torch.equal(found, F.linear(x, weight))


def test_without_onednn_it_is_the_plain_product(monkeypatch):
    """A torch without it, or that names it otherwise, would end every answer with an error."""
    monkeypatch.setattr("minillava.fast.linear.has_onednn", lambda: False)
    x, weight = torch.randn(5, WIDTH), torch.randn(WIDTH_AFTER, WIDTH)
    assert torch.equal(PRODUCTS["onednn"](x, weight), F.linear(x, weight))


@pytest.mark.parametrize("layout", ["turned", "columns", "rows", "offset"])
def test_onednn_takes_every_layout(layout):
    """Parts of a weight that several processes divide, or of a prompt, lie in memory with gaps."""
    weight = {
        "turned": torch.randn(WIDTH, WIDTH_AFTER).T,
        "columns": torch.randn(WIDTH_AFTER, 3 * WIDTH)[:, WIDTH:-WIDTH],
        "rows": torch.randn(2 * WIDTH_AFTER, WIDTH)[::2],
        "offset": torch.randn(WIDTH_AFTER * WIDTH + 3)[3:].view(WIDTH_AFTER, WIDTH),
    }[layout]
    for x in (
        torch.randn(9, WIDTH)[::3],
        torch.randn(WIDTH, 3).T,
        torch.randn(3, 2 * WIDTH)[:, ::2],
    ):
        found = PRODUCTS["onednn"](x, weight)
        assert found.is_contiguous()
        assert_within(found, products(x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", [True, False])
def test_every_way_to_the_product_is_a_sum_of_its_terms(kind, dtype, rows, bias):
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
def test_shapes_are_those_of_the_plain_product(kind, shape, dtype):
    """An input with other dimensions, none or no rows would come back in another shape, or fail."""
    x, weight = torch.randn(shape).to(dtype), torch.randn(WIDTH_AFTER, WIDTH).to(dtype)
    assert linear(x, weight).shape == F.linear(x, weight).shape
    assert linear(x.transpose(0, -1).contiguous().transpose(0, -1), weight).is_contiguous()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_way_of_the_table_is_taken(monkeypatch, kind, dtype):
    """A fast path that is never reached would pass every test above. F.linear is torch's own and
    stands for itself."""
    seen = []
    for name, way in PRODUCTS.items():
        monkeypatch.setitem(
            PRODUCTS, name, lambda *a, name=name, way=way: seen.append((name, len(a[0]))) or way(*a)
        )
    for form, shape in FORMS.items():
        weight = torch.randn(shape).to(getattr(torch, dtype))
        for most, name in WAYS[kind].get(f"{dtype}, {form}", WAYS[kind][dtype]):
            rows = int(min(most, 130))
            seen.clear()
            linear(torch.randn(rows, shape[1]).to(weight.dtype), weight)
            assert seen[:1] == [(name, rows)] * (name != "plain"), (kind, form, rows)


def test_a_shape_that_falls_out_of_line_has_a_line_of_its_own(monkeypatch):
    """It would be taken by the way of its form, which takes it twice the time; or its neighbours
    by its own."""
    ways = {"float32": ((9, "parts"),), "float32, short": ((9, "halves"),)}
    monkeypatch.setitem(WAYS, "avx2", ways | {"float32, 2048 × 1024": ((9, "turned"),)})
    shapes = [(2048, 1024), (2056, 1024), (2048, 1016), (4096, 4096), (1024, 2048)]
    found = [processor.way("float32", 2, shape, on="avx2") for shape in shapes]
    assert found == ["turned", "halves", "halves", "parts", "parts"]


def test_the_last_positions_of_prompts_are_one_matrix(monkeypatch):
    """torch copied the head's weight for the last position of a prompt, 0.3 s of 1b's, as those are
    no block of memory."""
    pretend(monkeypatch, "unknown")
    seen, plain = [], F.linear
    monkeypatch.setattr(home.F, "linear", lambda x, *rest: seen.append(x.dim()) or plain(x, *rest))
    x, weight = torch.randn(2, 3, WIDTH)[:, -1:], torch.randn(WIDTH_AFTER, WIDTH)
    assert not x.is_contiguous()
    found = linear(x, weight)
    assert (seen, found.shape) == ([2], (2, 1, WIDTH_AFTER))
    assert_within(found[:, 0], products(x[:, 0], weight))


@pytest.mark.parametrize("larger", [False, True])
def test_blocks_are_as_large_as_their_name_says(monkeypatch, larger):
    """Weights upcast in larger blocks than asked for would leave the processor's cache and be
    slow."""
    monkeypatch.setattr(home, "LARGER", 2)
    seen = []
    monkeypatch.setattr(home, "linear", lambda x, w: seen.append(len(w)) or linear(x, w))
    weight = torch.randn(2 * BLOCK + 40, WIDTH).bfloat16()
    PRODUCTS["float32 blocks" + " x4" * larger](torch.randn(5, WIDTH).bfloat16(), weight)
    assert seen == ([2 * BLOCK, 40] if larger else [BLOCK, BLOCK, 40])


def test_memory_is_kept_from_block_to_block_and_between_threads_apart(monkeypatch):
    """Threads that share the scratch buffer would overwrite each other's weights and give wrong
    products."""
    pretend(monkeypatch, "avx2")
    x = torch.randn(5, WIDTH).bfloat16()
    weights = [torch.randn(WIDTH_AFTER, WIDTH).bfloat16() for _ in range(8)]
    with torch.no_grad():
        alone = [linear(x, weight) for weight in weights]
        first = home.scratch(10, torch.float32).data_ptr()
        assert home.scratch(10, torch.float32).data_ptr() == first
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(no_grad_linear, [x] * 8, weights))
            assert pool.submit(lambda: home.scratch(10, torch.float32).data_ptr()).result() != first
    for found in (alone, together):  # not bit for bit: where memory begins can decide a sum's order
        for y, weight in zip(found, weights, strict=True):
            assert_within(y, products(x, weight))


@torch.no_grad()
def no_grad_linear(x, weight):
    return linear(x, weight)


def test_gradients_are_those_of_the_product(kind):
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
    """On a processor without bfloat16 the patches would be rounded twice, or have no gradient."""
    torch.manual_seed(0)
    conv, x = (
        nn.Conv2d(3, 8, 4, stride=4, bias=False).bfloat16(),
        torch.randn(2, 3, 16, 16).bfloat16(),
    )
    # [B, P, 3·4·4]
    plain, patches = conv(x), F.unfold(x.float(), 4, stride=4).transpose(1, 2).bfloat16()
    use_fast_linear(conv)
    pretend(monkeypatch, "amx")
    assert torch.equal(conv(x), plain)
    pretend(monkeypatch, "avx2")
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
    size = nn.functional.conv2d(x.abs().double(), conv.weight.abs().double(), stride=(4, 2)) + bias
    assert_within(found, (exact, gamma(3 * 4 * 2 + 1, torch.float32) * size))


def test_load_takes_it_and_eager_does_not(reference):
    """Eager would lose its bit identity to transformers, or the fused model its fast products."""

    def kinds(attention):
        model = minillava.load(reference / "plain", attention=attention).model
        return {type(module) for module in model.modules() if isinstance(module, nn.Linear)}

    assert kinds("fused") == {FastLinear}
    assert kinds("eager") == {nn.Linear}


@pytest.mark.parametrize(("attention", "fast"), [("fused", True), ("eager", False)])
def test_a_head_that_is_the_table_of_words_is_as_fast(reference, monkeypatch, attention, fast):
    """A third of what llava-interleave-qwen-0.5b reads for a token went through torch's plain
    product; or that of eager through ours."""
    model = minillava.load(
        reference / "tied", device="cpu", dtype="float32", attention=attention
    ).model
    language, seen = model.language_model, []
    monkeypatch.setattr(
        "minillava.fast.linear.linear",
        lambda x, weight, bias=None: seen.append(weight) or torch.nn.functional.linear(x, weight),
    )
    x = torch.randn(1, 1, model.config.text.hidden_size)
    with torch.no_grad():
        assert language.head(x).shape == (1, 1, model.config.text.vocab_size)
    assert len(seen) == fast and all(w is language.embed_tokens.weight for w in seen)


def test_names_and_weights_stay():
    """A layer that is made fast would rename its weights or copy them, at twice the memory."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 5, bias=False)))
    before = dict(model.state_dict())
    use_fast_linear(model)
    assert list(model.state_dict()) == list(before)
    assert all(
        after.data_ptr() == before[name].data_ptr() for name, after in model.state_dict().items()
    )


def test_memory_kept_from_inference_mode_can_be_written_to_later(monkeypatch):
    """A scratch buffer made in inference mode would be an error at the first product outside of
    it."""
    pretend(monkeypatch, "avx2")
    x, weight = torch.randn(5, WIDTH).bfloat16(), torch.randn(WIDTH_AFTER, WIDTH).bfloat16()
    home._scratch.memory = None
    with torch.inference_mode():
        first = linear(x, weight).clone()
    for found in (first, no_grad_linear(x, weight)):
        assert_within(found, products(x, weight))


@pytest.fixture
def uncapped(monkeypatch):
    """A processor that has everything, and nobody who told libraries to leave it alone."""
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(processor.platform, "machine", lambda: "x86_64")
    processor.kind.cache_clear()
    yield monkeypatch
    processor.kind.cache_clear()


@pytest.mark.parametrize(
    ("cap", "kind"),
    [
        ({}, "amx"),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, "avx512"),
        ({"ONEDNN_MAX_CPU_ISA": "avx2"}, "avx512"),
        ({"DNNL_MAX_CPU_ISA": "SSE41"}, "avx512"),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "avx512-bf16"),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, "amx"),
        ({"ONEDNN_MAX_CPU_ISA": "DEFAULT"}, "amx"),
    ],
)
def test_a_processor_is_what_its_libraries_may_use_of_it(uncapped, cap, kind):
    """It has the instructions, oneDNN was told not to use them: what it computes is emulated."""
    for name, value in cap.items():
        uncapped.setenv(name, value)
    assert processor.kind() == kind
    assert processor.has_fast_bfloat16() is (kind != "avx512")


@pytest.mark.parametrize(
    ("machine", "capability", "bfloat16", "kind"),
    [
        ("x86_64", "AVX512", False, "avx512"),
        ("AMD64", "AVX2", False, "avx2"),
        ("x86_64", "DEFAULT", False, "unknown"),
        ("riscv64", "DEFAULT", False, "unknown"),
        ("aarch64", "DEFAULT", False, "arm"),
        ("arm64", "SVE256", True, "arm-bf16"),
    ],
)
def test_every_processor_is_of_one_kind(uncapped, machine, capability, bfloat16, kind):
    """A processor would be taken for another, or for one that has no table, and fail at the first
    product."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        uncapped.setattr(torch.cpu, name, lambda: False)
    uncapped.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    uncapped.setattr(processor.platform, "machine", lambda: machine)
    uncapped.setattr(processor, "arm_has_bfloat16", lambda: bfloat16)
    assert processor.kind() == kind
    assert kind in WAYS
