"""Interventions against formulas, in float64: each equals a model, a mask or a run that was made by
other means."""

import copy
import threading

import pytest
import torch
from bounds import assert_same_in_float64
from PIL import Image
from waiting import PATIENCE

import minillava
from minillava.cache import KVCache
from minillava.fast.compiled import Captured
from minillava.loop import Options, steps
from minillava.probe.intervene import (
    Attention,
    Heads,
    Keep,
    MLPs,
    States,
    chosen,
    intervene,
    put,
    zero,
)


@pytest.fixture(scope="module", params=["eager", "fused"])
def toy(request, reference):
    """Two query heads share a key/value head."""
    return minillava.load(
        reference / "grouped", device="cpu", dtype="float64", attention=request.param
    )


@pytest.fixture(scope="module")
def embeds(toy, reference):
    """Prompt and picture of a row, [1, T, C]."""
    picture = Image.open(reference / "pictures" / "landscape.png").convert("RGB")
    return toy.prepare(picture, toy.prompt("What is it?")).embeds


@torch.no_grad()
def states_of(toy, embeds):
    return toy.model.language_model(embeds, hidden_states=True)


def nothing_hooked(model) -> bool:
    return not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# --- against formulas -----------------------------------------------------------------------------


@torch.no_grad()
def test_an_ablated_head_is_a_model_whose_o_proj_does_not_read_it(toy, embeds):
    """Another head than the named one would be ablated, and a finding be wrong."""
    other = copy.deepcopy(toy.model)
    width = toy.model.config.text.head_dim
    for head in (0, 3):
        weight = other.language_model.layers[1].self_attn.o_proj.weight
        weight[:, head * width : (head + 1) * width] = 0
    expected = other.language_model(embeds).logits
    with intervene(toy.model, Heads([1], heads=[3, 0]), zero):
        found = toy.model.language_model(embeds).logits
    assert_same_in_float64(found, expected)
    assert (expected - toy.model.language_model(embeds).logits).abs().max() > 1e-3


@torch.no_grad()
def test_an_ablated_mlp_is_a_model_whose_down_proj_is_zero(toy, embeds):
    """Another layer's MLP would be ablated, or its residual along with it."""
    other = copy.deepcopy(toy.model)
    other.language_model.layers[0].mlp.down_proj.weight.zero_()
    with intervene(toy.model, MLPs([0]), zero):
        found = toy.model.language_model(embeds).logits
    assert_same_in_float64(found, other.language_model(embeds).logits)


@torch.no_grad()
def test_a_knock_out_is_a_mask_given_to_the_attention(toy, embeds):
    """What is knocked out would still be seen, or another layer's attention be cut."""
    language, length = toy.model.language_model, embeds.shape[1]
    queries, keys = [length - 1, length - 3], slice(2, 9)
    triangle = torch.ones(length, length, dtype=torch.bool).tril()
    triangle[[[length - 1], [length - 3]], list(range(2, 9))] = False
    context, x = {}, embeds
    tables = minillava.llama.rotary_tables(
        torch.arange(length)[None], language.config, embeds.dtype
    )
    for i, layer in enumerate(language.layers):
        mask, causal = (triangle[None, None], False) if i == 1 else (None, True)
        context = minillava.llama.Context(*tables, mask, causal, language.attend, None)
        x, _ = layer(x, context)
    with intervene(toy.model, Attention([1], queries, keys), zero):
        found = language(embeds).logits
    assert_same_in_float64(found, language.head(language.norm(x)))
    assert (found - language(embeds).logits)[0, -1].abs().max() > 1e-6


@pytest.mark.parametrize("layer", [0, 1, 2])
@torch.no_grad()
def test_all_positions_of_another_run_give_its_answer(toy, embeds, layer):
    """From there on it is that run."""
    language, other = toy.model.language_model, embeds.flip(1) * 0.7
    layer = min(layer, len(language.layers))
    kept = Keep()
    with intervene(toy.model, States([layer]), kept):
        expected = language(other).logits
    with intervene(toy.model, States([layer]), put(kept)):
        found = language(embeds).logits
    assert torch.equal(found, expected)
    assert not torch.equal(language(embeds).logits, expected)


@torch.no_grad()
def test_states_are_those_that_the_model_records(toy, embeds):
    """hidden_states[l] is state l, but for the last, which is recorded after the norm."""
    language, kept = toy.model.language_model, Keep()
    with intervene(toy.model, States(range(len(language.layers) + 1)), kept):
        recorded = language(embeds, hidden_states=True).hidden_states
    assert all(torch.equal(kept[i], recorded[i]) for i in range(len(language.layers)))
    assert torch.equal(language.norm(kept[len(language.layers)]), recorded[-1])


@torch.no_grad()
def test_one_position_of_one_state_changes_nothing_before_it(toy, embeds):
    """A changed position would reach back to those before it."""
    length = embeds.shape[1]
    with intervene(toy.model, States([1], [length - 4]), zero):
        changed = states_of(toy, embeds)
    plain = states_of(toy, embeds)
    assert (changed.hidden_states[1][0, length - 4] == 0).all()
    assert_same_in_float64(changed.logits[:, : length - 4], plain.logits[:, : length - 4])
    assert (changed.logits - plain.logits)[0, -1].abs().max() > 1e-6


@torch.no_grad()
def test_put_takes_the_chosen_positions_and_heads(toy, embeds):
    """What goes in is asked for again behind it."""
    text, seen = toy.model.config.text, Keep()
    shape = (1, embeds.shape[1], text.num_attention_heads, text.head_dim)
    stored = torch.arange(torch.tensor(shape).prod(), dtype=torch.float64).view(shape)
    place = Heads([1], [2, 1], slice(3, 6))
    with intervene(toy.model, place, put({1: stored})), intervene(toy.model, place, seen):
        toy.model.language_model(embeds)
    assert torch.equal(seen[1], stored[:, 3:6, [2, 1]])
    mean = stored.mean(1, keepdim=True)
    seen.clear()
    with intervene(toy.model, place, put({1: mean})), intervene(toy.model, place, seen):
        toy.model.language_model(embeds)
    assert torch.equal(seen[1], mean[:, :, [2, 1]].expand(1, 3, 2, text.head_dim))


# --- with a cache ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "how"),
    [
        (Heads([0, 1], [1]), zero),
        (MLPs([1], slice(5, None)), zero),
        (States([1], range(20, 1000)), lambda x, at: x * 0.5),
        (Attention([0, 1], slice(-1000, None), range(2, 6)), zero),
    ],
)
@torch.no_grad()
def test_cached_decoding_is_intervened_alike(toy, embeds, place, how):
    """Positions count from the beginning of the sequence, whatever is in the cache."""
    language, text = toy.model.language_model, toy.model.config.text
    if isinstance(place, Attention):
        place = Attention(place.layers, slice(8, None), place.keys)
    cache = KVCache(text, 1, embeds.shape[1], dtype=embeds.dtype, device="cpu")
    cut = embeds.shape[1] - 3
    with intervene(toy.model, place, how):
        whole = language(embeds).logits
        parts = [language(embeds[:, :cut], None, cache).logits]
        parts.append(language(embeds[:, cut : cut + 2], None, cache).logits)
        parts.append(language(embeds[:, cut + 2 :], None, cache).logits)
    assert_same_in_float64(torch.cat(parts, dim=1), whole)


@torch.no_grad()
def test_the_loop_is_intervened(toy, reference):
    """As anybody asks: the answer of a model without a head is another one's."""
    picture = Image.open(reference / "pictures" / "landscape.png").convert("RGB")
    spliced = toy.prepare(picture, toy.prompt("What is it?"))
    other = copy.deepcopy(toy.model)
    for layer in other.language_model.layers:
        layer.self_attn.o_proj.weight.zero_()
    options = Options(max_new_tokens=5)
    expected = [step.logits for step in steps(other, spliced, options)]
    with intervene(toy.model, Heads(range(len(other.language_model.layers))), zero):
        found = [step.logits for step in steps(toy.model, spliced, options)]
    assert_same_in_float64(torch.stack(found), torch.stack(expected))


# --- nothing else ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "place",
    [
        (),
        [],
        States([]),
        States([0, 1], []),
        Heads([1], []),
        Heads([1], None, slice(0, 0)),
        MLPs([0], [10**6]),
        Attention([0], [], None),
        Attention([0], None, []),
    ],
)
@torch.no_grad()
def test_an_empty_one_leaves_every_bit(reference, place, dtype):
    """An intervention at no place would still change the rounding."""
    model = minillava.load(reference / "grouped", device="cpu", dtype=dtype).model
    ids = torch.tensor([[1, 322, 417, 391, 13, 428]])
    plain = model.language_model(ids).logits
    with intervene(model, place, zero):
        assert torch.equal(model.language_model(ids).logits, plain)
    assert nothing_hooked(model)


@torch.no_grad()
def test_to_keep_values_changes_no_bit(toy, embeds):
    """Reading the values would compute the attention in another order and move the answer."""
    language = toy.model.language_model
    layers = range(len(language.layers))
    plain = language(embeds).logits
    places = [States(layers), Heads(layers), MLPs(layers), Attention(layers)]
    for place in places:
        with intervene(toy.model, place, lambda values, at: values):
            assert torch.equal(language(embeds).logits, plain)


@torch.no_grad()
def test_they_add_up_in_any_order(toy, embeds):
    """Of two interventions the later would replace the earlier."""
    language = toy.model.language_model
    first, second = Heads([0], [1]), MLPs([1])
    results = []
    for one, other in ((first, second), (second, first)):
        with intervene(toy.model, one, zero), intervene(toy.model, other, zero):
            results.append(language(embeds).logits)
    with intervene(toy.model, [first, second], zero):
        results.append(language(embeds).logits)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@torch.no_grad()
def test_the_outer_acts_first(toy, embeds):
    """Of two functions at one place the inner would see the model's own values."""
    place = States([1], [3])
    with (
        intervene(toy.model, place, lambda x, at: x * 0 + 2),
        intervene(toy.model, place, lambda x, at: x * 5),
    ):
        assert (states_of(toy, embeds).hidden_states[1][0, 3] == 10).all()


@torch.no_grad()
def test_the_first_may_end_first(toy, embeds):
    """Two threads, or two generators, need not end in the order in which they began."""
    plain = toy.model.language_model(embeds).logits
    one, other = (intervene(toy.model, MLPs([i]), zero) for i in (0, 1))
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    with intervene(toy.model, (), zero):
        alone = toy.model.language_model(embeds).logits
    other.__exit__(None, None, None)
    with intervene(toy.model, MLPs([1]), zero):
        assert torch.equal(toy.model.language_model(embeds).logits, alone)
    assert torch.equal(toy.model.language_model(embeds).logits, plain)


@torch.no_grad()
def test_threads_intervene_on_one_model_at_once(toy, embeds):
    """One thread's intervention would change another thread's answer."""
    language, found = toy.model.language_model, {}
    places = {0: MLPs([0]), 1: Heads([1]), 2: ()}
    expected = {}
    for name, place in places.items():
        with intervene(toy.model, place, zero):
            expected[name] = language(embeds).logits
    together = threading.Barrier(len(places))

    def work(name):
        with torch.no_grad(), intervene(toy.model, places[name], zero):
            together.wait(PATIENCE)
            found[name] = [language(embeds).logits for _ in range(3)]
            together.wait(PATIENCE)

    threads = [threading.Thread(target=work, args=(name,)) for name in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, several in found.items():
        assert all(torch.equal(one, expected[name]) for one in several), name
    assert len(found) == 3
    assert nothing_hooked(toy.model)


@torch.no_grad()
def test_an_error_inside_puts_everything_back(toy, embeds):
    """After an error the model would stay changed."""

    def broken(values, at):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), intervene(toy.model, MLPs([0, 1]), broken):
        toy.model.language_model(embeds)
    assert nothing_hooked(toy.model)


# --- what cannot be -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (Heads([2]), "no layer 2: this model has layers 0 to 1"),
        (States([3]), "no state 3: this model has states 0 to 2"),
        (MLPs([-1]), "no layer -1"),
        (Heads([0], [4]), "no head 4: this model has heads 0 to 3"),
        (States([0], [5, -2]), "positions count from 0, found -2"),
        (Attention([0], None, [-3]), "keys count from 0, found -3"),
    ],
)
def test_places_must_exist(toy, place, said):
    """A layer or head that the model lacks would be ignored, and measure nothing."""
    with pytest.raises(ValueError, match=said), intervene(toy.model, place, zero):
        pass
    assert nothing_hooked(toy.model)


@torch.no_grad()
def test_a_position_keeps_something_to_attend_to(toy, embeds):
    """A softmax over nothing is uniform in one function and NaN in the other."""
    with (
        pytest.raises(ValueError, match="nothing left to attend to"),
        intervene(toy.model, Attention([0], [4], None), zero),
    ):
        toy.model.language_model(embeds)


@torch.no_grad()
def test_what_does_not_fit_is_refused(toy, embeds):
    """A returned value of another shape would be broadcast without a word."""
    with (
        pytest.raises(ValueError, match=r"how returned \[1, 2\] float32 at layer 0, expected"),
        intervene(toy.model, MLPs([0], [4]), lambda values, at: torch.zeros(1, 2)),
    ):
        toy.model.language_model(embeds)


def test_a_compiled_model_is_refused(toy):
    """Its decoding would go on as if nothing had been asked."""
    compiled = copy.copy(toy.model)
    compiled.decoding = Captured(lambda *_: None)
    with pytest.raises(ValueError, match="without compile"), intervene(compiled, (), zero):
        pass


def test_positions_of_a_pass():
    """A position of the sequence would be taken for one of the pass, once there is a cache."""
    assert chosen(None, 3, 6) == [3, 4, 5]
    assert chosen([9, 4, 1, 4], 2, 9) == [4]
    assert chosen(slice(4, None), 2, 7) == [4, 5, 6]
    assert chosen(slice(0, None, 2), 3, 8) == [4, 6]
    assert chosen(range(2), 2, 5) == []


@torch.no_grad()
def test_its_name_in_the_package_can_be_called(toy, embeds):
    """`from minillava.probe import intervene` gives the file, which has the same name."""
    with intervene(toy.model, MLPs([0]), zero):
        expected = toy.model.language_model(embeds).logits
    with minillava.probe.intervene(toy.model, MLPs([0]), zero):
        assert torch.equal(toy.model.language_model(embeds).logits, expected)
    from minillava.probe import intervene as one

    assert one.intervene is intervene
