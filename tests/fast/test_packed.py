"""fast/packed.py: another order of the same weights, the same bits."""

import pytest
import torch
from bounds import assert_within, products
from paths import ROOT

import minillava
from minillava.cli.doors import enter
from minillava.convert.run import convert
from minillava.fast import packed, processor
from minillava.fast.linear import linear
from minillava.fast.packed import KIND, LEAST, PackedLinear, packs
from minillava.fast.same_bits import ROWS
from minillava.inspection import doctor

WEIGHTS = ROOT / "weights" / "shapes"
PICTURE = WEIGHTS / "example-2.png"
SHAPES = [(1000, 130), (96, 384), (640, 192), (100, 33)]  # also such as no block fits

pytestmark = pytest.mark.numeric
needs_packing = pytest.mark.skipif(
    not packs(),
    reason=f"weights are packed on AVX-512 with bfloat16; this is {processor.kind()}",
)


@pytest.fixture(scope="module")
def plain():
    return minillava.load(WEIGHTS, dtype="bfloat16")


@pytest.fixture(scope="module")
def by_pack():
    return minillava.load(WEIGHTS, dtype="bfloat16", pack=True)


def numbers(rows, columns):
    draw = torch.Generator().manual_seed(rows)
    return torch.randn(rows, columns, generator=draw).bfloat16()


@needs_packing
@pytest.mark.parametrize(("n", "k"), SHAPES)
@torch.no_grad()
def test_a_row_has_the_bits_of_a_weight_that_is_not_packed(n, k):
    """Answers would change with --pack, or with who shares a pass."""
    weight = numbers(n, k)
    layer = PackedLinear(weight)
    for rows in (1, *ROWS, 5, 7):
        x = numbers(rows, k)
        assert torch.equal(layer(x), linear(x, weight)), rows
        assert torch.equal(layer(x[None])[0], linear(x, weight)), rows
        alone = torch.cat([layer(row[None]) for row in x])
        assert torch.equal(layer(x), alone), rows


@needs_packing
@pytest.mark.parametrize("rows", [1, LEAST, 40, 300])
@torch.no_grad()
def test_the_product_is_the_one_of_float64(rows):
    """The library might read its own order wrongly, for one row or for many."""
    weight, x = numbers(1000, 130), numbers(rows, 130)
    assert_within(PackedLinear(weight)(x), products(x, weight), rows)


@needs_packing
def test_the_numbers_can_be_had_again_and_have_a_gradient():
    """A weight would be rounded by being packed, or a map of gradients end at the first layer."""
    weight, x = numbers(96, 384), numbers(3, 384)
    layer = PackedLinear(weight)
    assert torch.equal(layer.dequantise(slice(None), torch.bfloat16), weight)
    assert torch.equal(layer.dequantise(slice(10, 20), torch.float32), weight[10:20].float())
    layer(x.requires_grad_()).sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 96, dtype=torch.bfloat16) @ weight)


@needs_packing
def test_answers_are_those_without(plain, by_pack):
    """Packed layers would be another model: other tokens, or other scores of the same ones."""
    layers = [m for m in by_pack.model.modules() if isinstance(m, PackedLinear)]
    assert len(layers) == 7 * 4 + 1  # and the head
    for options in ({}, {"temperature": 0.8, "seed": 3}, {"num_beams": 3}, {"contrast": "vcd"}):
        both = [each.ask(PICTURE, "Describe this image.", **options) for each in (plain, by_pack)]
        assert both[0] == both[1], options
    ids = torch.arange(5, 45).view(2, 20)
    for rows in (ids, ids[:1], ids[:, :1]):
        logits = [each.model.language_model(rows).logits for each in (plain, by_pack)]
        assert torch.equal(*logits)
    assert by_pack.model.language_model.alike == plain.model.language_model.alike


@needs_packing
def test_with_drafts_and_with_same_bits(plain, by_pack):
    """A pass over guesses has more rows, --same-bits asks the layers what they promise, and a small
    model that is not packed costs more than its size says."""
    from minillava.fast.row_by_row import keep_bits

    question = "Describe this image."
    wanted = plain.ask(PICTURE, question)
    small = by_pack.drafts(str(WEIGHTS)).drafter.language
    assert sum(isinstance(layer, PackedLinear) for layer in small.modules()) == 7 * 4 + 1
    assert by_pack.ask(PICTURE, question, draft="lookup") == wanted
    assert by_pack.ask(PICTURE, question, draft="medusa") == wanted
    exact = minillava.load(WEIGHTS, dtype="bfloat16", pack=True)
    keep_bits(exact.model)
    assert exact.model.language_model.together == processor.SAME_ROWS[processor.kind()][KIND]
    assert exact.ask(PICTURE, question) == wanted


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"quantize": "int8"}, "its weights are quantised"),
        pytest.param(
            {"compile": True}, "a compiled step cannot read packed weights", marks=needs_packing
        ),
        ({"attention": "eager"}, "eager keeps torch's own products"),
        ({"dtype": "float32"}, "it is opened in float32 on cpu"),
    ],
)
def test_what_cannot_be_packed_is_refused(asked, found):
    """It would be left as it was without a word, or lose what eager promises."""
    with pytest.raises(ValueError, match=f"{found}; leave pack out$"):
        minillava.load(WEIGHTS, pack=True, **{"dtype": "bfloat16"} | asked)


@pytest.mark.parametrize("kind", ["here", "avx2", "amx"])
def test_a_processor_on_which_it_was_not_measured_is_told(monkeypatch, kind):
    """It would be slower there, or end in an error of torch."""
    if kind != "here":
        monkeypatch.setattr(processor, "kind", lambda: kind)
    elif packs():
        pytest.skip("it was measured on this kind")
    told = f"of kind {processor.kind()}, on which nobody has measured it; leave pack out$"
    with pytest.raises(ValueError, match=told):
        minillava.load(WEIGHTS, dtype="bfloat16", pack=True)


def test_a_build_of_torch_without_it_is_told(monkeypatch):
    """An operation that a later torch no longer has would end in an error of torch."""
    monkeypatch.setattr(packed, "packs", lambda: False)
    monkeypatch.setattr(processor, "kind", lambda: "avx512-bf16")
    with pytest.raises(ValueError, match=r"this build of torch cannot do it; leave pack out$"):
        minillava.load(WEIGHTS, dtype="bfloat16", pack=True)


@needs_packing
def test_the_doctor_examines_a_packed_model(tmp_path, monkeypatch, capsys):
    """Its weights are opaque, and the examination ended in an error of torch; and they were called
    mapped, which needs no memory."""
    mapped, memory = [], doctor.memory
    monkeypatch.setattr(doctor, "memory", lambda *given: mapped.append(given[-1]) or memory(*given))
    convert(WEIGHTS, tmp_path / "narrow", "hf", dtype=torch.bfloat16)
    for more in ([], ["--pack"]):
        assert (
            enter("inspect", [str(tmp_path / "narrow"), "--doctor", "--device", "cpu", *more]) == 0
        )
    assert mapped == [True, False]
    out = capsys.readouterr().out
    assert out.count("every number is finite") == 2
    assert "in packed, a token decoded beside others has the bits that it has alone up to 32" in out
