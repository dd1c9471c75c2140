"""fast/quantize.py: the numbers are as near as their bits allow, and every way to the product gives the
same one."""

import weakref
from functools import partial

import pytest
import shapes
import torch
from bounds import assert_within, gamma, products, unit
from paths import ROOT
from torch import nn

import minillava
from minillava.attention import fused
from minillava.checkpoint.build import build_model
from minillava.checkpoint.config_json import read_config
from minillava.checkpoint.folders import Folders
from minillava.checkpoint.parts import open_checkpoint
from minillava.cli.doors import enter
from minillava.fast import parallel, processor, quantize
from minillava.fast.linear import BLOCK
from minillava.fast.quantize import (
    BLOCKS,
    GROUP,
    TILE,
    Int4Linear,
    Int8Linear,
    QuantisedLinear,
    pack,
    packed_order,
    quantised_layer,
    quantize_tensor,
    split,
    unpack,
)
from minillava.files.rows import grow_rows
from minillava.options import KINDS

WEIGHTS = ROOT / "weights" / "shapes"

main = partial(enter, "generate")

pytestmark = pytest.mark.numeric

LAYERS = {"int8": Int8Linear, "int4": Int4Linear}
N, K = BLOCK + TILE, 3 * GROUP  # more than one block, and the last one short
MANY_ROWS = 130  # more than any processor's kernel takes
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def takes_kernel(kind: str, rows: int) -> bool:
    return rows > 0 and processor.way(kind, rows) == "kernel"


def weights(rows: int = N, columns: int = K) -> torch.Tensor:
    """What layers hold, and what they seldom do: outliers, groups of one sign, zeros."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[1, 3] = 40.0
    weight[2] = weight[2].abs() + 1
    weight[3] = -weight[3].abs()
    weight[4, :GROUP] = 0
    weight[5] = 0
    return weight


def exact(stored: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """By the formulas, in float64: the weights [N, K] that the stored form means, and the step
    between two [N, K]."""
    if "weight_int8" in stored:
        step = stored["scale"].double()[:, None].expand(stored["weight_int8"].shape)
        return stored["weight_int8"].double() * step, step
    scale, zero = (
        part.double().repeat_interleave(GROUP, dim=1) for part in stored["scale_zero"].unbind(2)
    )
    nibbles, q = stored["weight_int4"].double(), torch.empty_like(scale)
    q[:, 0::2], q[:, 1::2] = nibbles % 16, nibbles // 16
    return (q - 8) * scale + zero, scale


def expected(
    stored: dict[str, torch.Tensor], x: torch.Tensor, kernel: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact product and its bound. A kernel may round x, the weights and the product to
    bfloat16; without one the weights are made in x's dtype, half precision that is emulated in
    float32: rounded at most as bfloat16 rounds."""
    weight, step = exact(stored)
    narrow = (
        torch.bfloat16
        if kernel or x.dtype == torch.bfloat16
        else torch.promote_types(x.dtype, torch.float32)
    )
    # Of scale times q, and of the sum with the zero where there is one; a zero of at most 8 steps
    # is at most |w| + 8.
    dw = gamma(2, narrow) * (weight.abs() + ("scale_zero" in stored) * 8 * step.abs())
    dx = unit(torch.bfloat16) * x.double().abs() if kernel else 0
    values, bound = products(x, weight, dtype=x.dtype, dx=dx, dw=dw)
    return values, bound + kernel * unit(torch.bfloat16) * (values.abs() + bound)


# --- the numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_at_most_half_a_step(kind):
    """A weight that is rounded to the wrong neighbour, or cut off, would be off by more than half a
    step."""
    weight = weights()
    stored = quantize_tensor(weight, kind)
    found, step = exact(stored)
    errors = (found - weight.double()).abs()
    # q is a float32 quotient: up to three roundings move the place where it is rounded to an
    # integer, by that part of it. q is at most 127 steps; in int4, where the zero is taken off
    # first, at most 8 and the zero as many again.
    most = 127 if kind == "int8" else 16
    assert (errors <= step * (0.5 + gamma(3, torch.float32) * most)).all()
    # A rounding error is a quarter of a step on average, and nothing where the smallest and the
    # largest number of a group lie. Its standard deviation is a step / √48; a mean of n lies within
    # six times that / √n.
    mean, slack = float((errors[6:] / step[6:]).mean()), 6 / (48 * errors[6:].numel()) ** 0.5
    assert 0.25 * (1 - 2 / GROUP) - slack < mean < 0.25 + slack
    # zeros: the smallest scale and its zero
    assert found[5].abs().max() <= 8 * torch.finfo(torch.bfloat16).tiny


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_as_small_as_the_range_allows(kind):
    """A scale that is too large would waste the few levels there are, and the answers get worse
    unseen."""
    weight = weights()
    step = exact(quantize_tensor(weight, kind))[1]
    if kind == "int8":
        ideal = (weight.abs().amax(1, keepdim=True) / 127).expand_as(weight)
    else:
        groups = weight.view(N, -1, GROUP)
        ideal = (groups.amax(2).clamp(min=0) - groups.amin(2).clamp(max=0)).repeat_interleave(
            GROUP, dim=1
        ) / 15
    ideal = ideal.double().clamp(min=torch.finfo(torch.bfloat16).tiny)
    # stored in bfloat16, computed in float32, here as well
    off = gamma(1, torch.bfloat16) + gamma(4, torch.float32)
    assert ((step - ideal).abs() <= off * ideal).all()


def test_the_stored_form_has_the_promised_shapes():
    """The stored form would change under whoever reads it, or take more memory than promised."""
    stored = quantize_tensor(weights(), "int8")
    assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == {
        "weight_int8": ((N, K), torch.int8),
        "scale": ((N,), torch.bfloat16),
    }
    stored = quantize_tensor(weights(), "int4")
    assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == {
        "weight_int4": ((N, K // 2), torch.uint8),
        "scale_zero": ((N, K // GROUP, 2), torch.bfloat16),
    }


@pytest.mark.parametrize("shape", [(TILE, GROUP - 2), (TILE - 16, GROUP), (TILE + 1, GROUP)])
def test_shapes_that_int4_cannot_pack_become_int8(shape):
    """A layer of sizes that int4 cannot pack would make --quantize int4 fail or answer wrongly."""
    assert isinstance(quantised_layer(quantize_tensor(torch.randn(shape), "int4")), Int8Linear)
    assert isinstance(
        quantised_layer(quantize_tensor(torch.randn(TILE, GROUP), "int4")), Int4Linear
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_damaged_weights_stay_visible(kind, value):
    """Quantising NaN or infinity would give finite numbers: a damaged file would answer nonsense,
    unnoticed."""
    weight = torch.randn(TILE, GROUP)
    weight[3, 5] = value
    layer = quantised_layer(quantize_tensor(weight, kind))
    for rows in (1, MANY_ROWS):
        finite = layer(torch.ones(rows, GROUP)).isfinite()
        assert finite[:, 3].logical_not().all()
        assert finite[:, 4].all()


# --- the packing ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(64, 64), (64, 192), (192, 64), (BLOCK, 128), (BLOCK + 64, 320), (64, 11008)]
)
def test_unpacking_is_the_inverse_of_packing(shape):
    """Numbers that are read back in another order than they were packed are other weights."""
    q = torch.randint(0, 16, shape, dtype=torch.uint8)
    assert torch.equal(unpack(pack(q)), q)


def pack_as(rows: int, low: list[int], high: list[int]):
    """A packing of tiles of so many rows: byte i of each column holds row low[i], and in its high
    half row high[i]."""

    def packed(q):
        tiles = q.view(-1, rows, q.shape[1]).transpose(1, 2)  # [N/R, K, R]
        return (tiles[..., low] | tiles[..., high] << 4).reshape(len(q), -1)

    return packed


LAYOUTS = {
    "neighbours": pack_as(16, list(range(0, 16, 2)), list(range(1, 16, 2))),
    "AVX2": pack_as(32, list(range(16)), list(range(16, 32))),
    "AVX512": pack_as(64, [*range(16), *range(16, 32)], [*range(32, 48), *range(48, 64)]),
    "backwards": pack_as(8, [7, 5, 3, 1], [0, 2, 4, 6]),
    "by rows": lambda q: q[:, ::2] | q[:, 1::2] << 4,
}


@pytest.fixture
def layout(request, monkeypatch):
    packed_order.cache_clear()
    monkeypatch.setattr(quantize, "pack", LAYOUTS[request.param])
    yield LAYOUTS[request.param]
    packed_order.cache_clear()


@pytest.mark.parametrize("layout", ["neighbours", "AVX2", "AVX512", "backwards"], indirect=True)
def test_the_packing_of_any_processor_is_learnt(layout):
    """torch packs int4 otherwise on each processor; the order of one would be wrong weights on the
    next."""
    q = torch.randint(0, 16, (128, 192), dtype=torch.uint8)
    assert torch.equal(unpack(layout(q)), q)


@pytest.mark.parametrize("layout", ["by rows"], indirect=True)
def test_a_packing_that_is_not_understood_is_refused(layout):
    """A packing that is none of the known kind would be unpacked to wrong weights instead of
    refused."""
    with pytest.raises(NotImplementedError, match="use int8"):
        unpack(layout(torch.zeros(64, 64, dtype=torch.uint8)))


def test_a_layer_that_was_not_packed_gives_the_same():
    """As on a GPU: `split` instead of `unpack`, and no kernel."""
    stored = quantize_tensor(weights(), "int4")
    layer, x = Int4Linear(**stored), torch.randn(MANY_ROWS, K)
    before = layer(x)
    assert not torch.equal(layer.weight, stored["weight_int4"])
    layer.weight, layer.has_kernel = stored["weight_int4"], False
    assert torch.equal(layer(x), before)
    assert torch.equal(split(stored["weight_int4"])[:, 1], stored["weight_int4"][:, 0] >> 4)


# --- the product ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 40, MANY_ROWS])
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_right_to_the_rounding_of_their_dtype(kind, rows, dtype):
    """Number by number against what rounding explains at worst; and all of them together against
    what it explains on average: roundings of x, scale times q, zero and product are four errors of
    u / √3 at most, and independent."""
    stored = quantize_tensor(
        torch.randn(N, K, generator=torch.Generator().manual_seed(1)) * 1e-3, kind
    )
    x = torch.randn(rows, K, generator=torch.Generator().manual_seed(rows)).to(dtype)
    found = quantised_layer(stored)(x)
    assert (found.dtype, tuple(found.shape)) == (dtype, (rows, N))
    kernel = takes_kernel(kind, rows)
    values, bound = expected(stored, x, kernel)
    assert_within(found, (values, bound))
    if kernel or dtype == torch.bfloat16:
        assert (found.double() - values).norm() <= 2 / 3**0.5 * unit(torch.bfloat16) * values.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", ["kernel", *BLOCKS])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_each_way_is_the_product_whoever_takes_it(kind, way, dtype):
    """Also those that the table does not name on the processor that runs this. Blocks of bfloat16
    do not make wider activations narrow."""
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(1)) * 1e-3
    stored = quantize_tensor(weight, kind)
    layer = quantised_layer(stored)
    for rows in (1, 3, 40):
        x = torch.randn(rows, K, generator=torch.Generator().manual_seed(rows)).to(dtype)
        found = layer.by(way, x)
        assert (found.dtype, tuple(found.shape)) == (dtype, (rows, N))
        assert_within(found, expected(stored, x, way == "kernel"), (way, rows))


MISTAKES = {
    "a scale is its neighbour's": lambda parts: {
        k: v if k.startswith("weight") else v.roll(1, 0) for k, v in parts
    },
    "a block of columns is left out": lambda parts: {
        k: _cut(v) if k == "weight_int8" else v for k, v in parts
    },
    "low and high halves of bytes swapped": lambda parts: {
        k: v >> 4 | v << 4 if k == "weight_int4" else v for k, v in parts
    },
    "no zero": lambda parts: {
        k: v * torch.tensor([1.0, 0.0]) if k == "scale_zero" else v for k, v in parts
    },
}


def _cut(weight):
    return weight.index_fill(1, torch.arange(64, 80), 0)


@pytest.mark.parametrize(
    ("kind", "mistake"),
    [("int8", name) for name in list(MISTAKES)[:2]]
    + [("int4", name) for name in list(MISTAKES)[:1] + list(MISTAKES)[2:]],
)
@pytest.mark.parametrize("rows", [1, MANY_ROWS])
def test_the_bound_rejects_mistakes(kind, mistake, rows):
    """The bound of the tests beside it would be so wide that wrong scales or swapped weights
    pass."""
    stored = quantize_tensor(torch.randn(N, K, generator=torch.Generator().manual_seed(1)), kind)
    wrong = {k: v.to(stored[k].dtype) for k, v in MISTAKES[mistake](stored.items()).items()}
    assert not all(torch.equal(wrong[k], stored[k]) for k in stored)
    # positive, so that nothing cancels: without its zero a row would be off by little in one of a
    # hundred draws
    x = torch.rand(rows, K, generator=torch.Generator().manual_seed(2))
    with pytest.raises(AssertionError, match="farther off"):
        assert_within(quantised_layer(wrong)(x), expected(stored, x, takes_kernel(kind, rows)))


@pytest.mark.parametrize("shape", [(K,), (1, K), (2, 3, K), (0, K), (2, 0, K), (3, 7, 2, K)])
@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_those_of_the_plain_product(kind, shape):
    """An input with other dimensions, or not contiguous, would come back in another shape or
    order."""
    stored, x = quantize_tensor(weights(), kind), torch.randn(shape)
    layer, kernel = quantised_layer(stored), takes_kernel(kind, x.numel() // K)
    for same in (x, x.transpose(0, -1).contiguous().transpose(0, -1)):
        assert layer(same).shape == (*shape[:-1], N)
        assert_within(layer(same), expected(stored, x, kernel))


@pytest.fixture
def kernels(monkeypatch):
    """The rows of every product that a kernel made, by layer."""
    seen = []
    for layer in LAYERS.values():

        def few_rows(self, x, real=layer.few_rows):
            seen.append((type(self), len(x)))
            return real(self, x)

        monkeypatch.setattr(layer, "few_rows", few_rows)
    return seen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_for_a_gpu_a_row_is_a_sum(kind, packed, dtype, monkeypatch):
    """A product would have its weights written out wide at every token, twice the bytes of
    bfloat16's."""
    stored = quantize_tensor(
        torch.randn(N, K, generator=torch.Generator().manual_seed(1)) * 1e-3, kind
    )
    layer, x = (
        quantised_layer(stored),
        torch.randn(2, 1, K, generator=torch.Generator().manual_seed(2)).to(dtype),
    )
    if not packed:
        layer.weight, layer.has_kernel = next(iter(stored.values())), False
    found = layer.as_sum(x)
    assert found.dtype == dtype
    assert_within(found, expected(stored, x, kernel=False))
    if not packed:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert torch.equal(layer(x), found)


@pytest.mark.parametrize("kind", KINDS)
def test_few_rows_take_the_kernel_and_many_do_not(kind, kernels):
    """The kernel would never be reached, or be given a whole prompt, for which it is slow."""
    layer = quantised_layer(quantize_tensor(weights(), kind))
    most = processor.WAYS[processor.kind()][kind][0][0]
    for rows in (0, 1, most, most + 1):
        layer(torch.randn(rows, K))
    assert kernels == [(LAYERS[kind], 1), (LAYERS[kind], most)]


@pytest.mark.parametrize("shape", [(7, 33), (12, 40), (TILE, 90)])
def test_rows_that_the_kernel_would_read_beyond_go_without(shape, kernels):
    """torch's int8 kernel checks nothing: such a K is wrong numbers or a crash."""
    stored = quantize_tensor(torch.randn(shape), "int8")
    x = torch.randn(2, shape[1])
    assert_within(quantised_layer(stored)(x), expected(stored, x, kernel=False))
    assert kernels == []


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_weights_that_are_meant(kind):
    """Training an adapter on a quantised model would follow gradients of other weights, or of
    none."""
    stored = quantize_tensor(weights(), kind)
    for rows in (1, 40):
        x, g = torch.randn(rows, K, requires_grad=True), torch.randn(rows, N)
        (quantised_layer(stored)(x) * g).sum().backward()
        weight, step = exact(stored)
        # Weights of float32, each off by its roundings, and the blocks' gradients added up in
        # another order.
        dw = gamma(2, torch.float32) * (weight.abs() + 8 * step.abs())
        assert_within(x.grad, products(g, weight.T, dw=dw.T))


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_is_that_of_a_linear_layer_and_keeps_no_wide_weights(kind):
    """To the last bit. Kept until the backward pass, the wide weights of all layers took more memory
    than the model that was not quantised."""
    layer = quantised_layer(quantize_tensor(weights(), kind))
    kept: list[int] = []
    x, g = torch.randn(5, K, requires_grad=True), torch.randn(5, N)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        y = layer(x)
    y.backward(g)
    assert sum(kept) == 0
    plain = torch.nn.Linear(K, N, bias=False)
    plain.weight.data = layer.dequantise(slice(None), torch.float32)
    same = x.detach().clone().requires_grad_()
    expected = plain(same)
    expected.backward(g)
    assert torch.equal(y, expected) and torch.equal(x.grad, same.grad)
    wide = torch.randn(2, K, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, wide)


# --- the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dtype"), [("int8", "float32"), ("int8", "bfloat16"), ("int4", "float32")]
)
def test_the_bundled_model_still_describes_what_it_sees(kind, dtype, kernels):
    """A quantised model would describe the bundled pictures wrongly, or not reach its kernel."""
    assistant = minillava.load(WEIGHTS, device="cpu", dtype=dtype, quantize=kind)
    for i, example in enumerate(shapes.EXAMPLES, start=1):
        assert assistant.ask(WEIGHTS / f"example-{i}.png") == shapes.describe(example)
    assert (LAYERS[kind], 1) in kernels


@pytest.mark.parametrize("attention", ["eager", "fused"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_language_model_is_quantised_and_nothing_else(kind, attention):
    """The vision tower would be quantised, too, or a layer of the language model left out."""
    plain, small = (
        minillava.load(
            WEIGHTS, device="cpu", dtype="float32", attention=attention, quantize=q
        ).model
        for q in (None, kind)
    )
    before = {
        name: module for name, module in plain.named_modules() if isinstance(module, nn.Linear)
    }
    after = {
        name: module
        for name, module in small.named_modules()
        if isinstance(module, nn.Linear | QuantisedLinear)
    }
    assert list(before) == list(after)
    assert {name.split(".")[0] for name, m in after.items() if isinstance(m, nn.Linear)} == {
        "vision_tower",
        "projector",
    }
    kinds = {type(module) for name, module in after.items() if name.startswith("language_model.")}
    assert kinds == {LAYERS[kind]}
    assert "language_model.lm_head" in after
    same = [
        name for name, p in small.named_parameters() if torch.equal(p, plain.get_parameter(name))
    ]
    assert same == [name for name, _ in small.named_parameters()]
    assert quantize.count_parameters(small) == sum(p.numel() for p in plain.parameters())


def test_weights_are_let_go_one_by_one(monkeypatch):
    """Peak memory is the small model and one tensor."""
    wide = []

    def watched(weight, kind, real=quantize_tensor):
        assert [ref() for ref in wide if ref() is not None] == []
        wide.append(weakref.ref(weight))
        return real(weight, kind)

    monkeypatch.setattr(parallel, "quantize_tensor", watched)
    model = minillava.load(WEIGHTS, device="cpu", quantize="int8").model
    assert len(wide) == sum(isinstance(module, QuantisedLinear) for module in model.modules())


def test_new_tokens_get_their_rows_before(reference):
    """Rows for new tokens cannot be added to a head that is quantised already: they would be
    missing."""
    folder = reference / "plain"
    config = read_config(folder)
    stored, _ = open_checkpoint(Folders(folder), config)
    tokens = config.text.vocab_size + 3
    settings = {"dtype": torch.float32, "device": "cpu", "quantize": "int8", "min_rows": tokens}
    model = build_model(config, stored, fused, **settings)
    assert (model.config.text.vocab_size, len(model.language_model.embed_tokens.weight)) == (
        tokens,
        tokens,
    )
    head = quantize_tensor(grow_rows(stored.read("language_model.lm_head.weight"), tokens), "int8")
    assert torch.equal(model.language_model.lm_head.weight, head["weight_int8"])


def test_an_unknown_kind_names_the_known_ones(capsys):
    """A misspelt --quantize would be a traceback, or be ignored and load the whole model."""
    with pytest.raises(ValueError, match="unknown quantize 'int3', expected one of: int8, int4"):
        minillava.load(WEIGHTS, quantize="int3")
    with pytest.raises(SystemExit) as stopped:
        main(["-i", str(WEIGHTS / "example-1.png"), "--quantize", "int3"])
    assert stopped.value.code == 2
    assert "int8" in capsys.readouterr().err


def test_the_command_line_says_what_it_loaded(capsys):
    """Whoever asks for int4 could not see with --verbose whether it was taken."""
    arguments = [
        "-m",
        str(WEIGHTS),
        "-i",
        str(WEIGHTS / "example-2.png"),
        "--dtype",
        "float32",
        "--device",
        "cpu",
    ]
    assert main([*arguments, "--quantize", "int4", "--verbose"]) == 0
    out, err = capsys.readouterr()
    assert out == shapes.describe(shapes.EXAMPLES[1]) + "\n"
    assert ", float32 and int4 on cpu" in err
